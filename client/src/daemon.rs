//! The daemon as a whole: puts the parts together, and takes them apart again in the right order.

use std::{
    sync::{Arc, atomic::AtomicU32},
    time::Duration,
};

use consort_common::{
    identity::Role,
    ids::{RunName, SiteName},
    tls::{Credentials, CredentialsError, connect_channel, connect_channel_lazy},
};
use tokio::sync::{Mutex, watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    config::Config,
    data::Source,
    link::{Link, link},
    overlap::Held,
    prepare::{self, Material},
    progress::Reporter,
    round,
    session::{Member, keep, leave},
    state::{StateDirectory, StateError},
    supervisor::supervise,
    trainer::{Device, DeviceError, Worker, WorkerError, be_deterministic, describe},
    transfer::Transfers,
    work::{Work, WorkError},
};

/// Why the daemon cannot start. Once it has started, it ends only when told to.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The site's certificate, key or CA.
    #[error(transparent)]
    Credentials(#[from] CredentialsError),
    /// The state directory.
    #[error(transparent)]
    State(#[from] StateError),
    /// The device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The trainer's thread.
    #[error("cannot start the trainer: {0}")]
    Worker(#[from] WorkerError),
    /// The system gives no thread.
    #[error("cannot start the trainer's thread: {0}")]
    Thread(#[source] std::io::Error),
}

/// What every piece of work needs.
pub struct Context {
    /// Calls to the aggregator.
    pub link: Link,
    /// Moves models.
    pub transfers: Transfers,
    /// Takes what work says of itself.
    pub reporter: Reporter,
    /// This site, as its certificate names it.
    pub site: SiteName,
    /// The daemon's files.
    pub state: StateDirectory,
    /// The site's text.
    pub sources: Vec<Source>,
    /// Time between two local checkpoints.
    pub checkpoint_interval: Duration,
    /// The thread that owns every tensor.
    pub worker: Worker,
    /// What it computes on.
    pub device: Device,
    /// What the worker's trainer holds; touched by the worker's jobs only.
    pub held: Arc<std::sync::Mutex<Held>>,
    /// How many first steps of a round were taken ahead.
    pub steps_ahead: Arc<AtomicU32>,
    /// The daemon is to end.
    pub stopping: CancellationToken,
    /// The run prepared last.
    pub material: Mutex<Option<Arc<Material>>>,
}

impl Context {
    /// Does one piece of work to its end.
    async fn perform(self: Arc<Self>, work: Work, cancel: CancellationToken) -> Result<(), WorkError> {
        let result = match &work {
            Work::Prepare(run) => prepare::prepare(&self, run, &cancel).await,
            Work::Train(task) => round::train(&self, task, &cancel).await,
            Work::Evaluate(task) => round::evaluate(&self, task, &cancel).await,
        };
        self.reporter.idle(work.run());
        result
    }
}

/// Runs the daemon until `stop`; then writes a local checkpoint, leaves and returns.
///
/// # Errors
/// If it cannot start.
pub async fn run(config: &Config, stop: CancellationToken) -> Result<(), DaemonError> {
    let credentials = Credentials::load(&config.tls)?.require_role(Role::Site)?;
    for warning in credentials.warnings() {
        warn!("{warning}");
    }
    let state = StateDirectory::open(&config.state_directory)?;
    let worker = Worker::spawn(config.device.threads as usize).map_err(DaemonError::Thread)?;
    let device = config.device.kind.open()?;
    if config.device.deterministic {
        be_deterministic(device)?;
    }
    // On the worker's thread, whose number of threads is the one that counts.
    let description = worker.run(move |_| describe(device)).await?;
    info!(
        "{} on {description}, aggregator {}, state in {}",
        credentials.identity(),
        config.endpoint,
        config.state_directory.display()
    );

    let (link, keeper) = link();
    let (standings, standings_receiver) = watch::channel(None);
    let member = Member { instance_id: state.instance_id(), device: description };
    let (endpoint, further) = (config.endpoint.clone(), credentials.clone());
    let further = move || connect_channel_lazy(&endpoint, &further);
    let context = Arc::new(Context {
        transfers: Transfers::new(link.clone(), &config.transfer, further),
        link: link.clone(),
        reporter: Reporter::default(),
        site: credentials.identity().name.clone(),
        state,
        sources: config.data.sources(),
        checkpoint_interval: Duration::from_secs(config.training.checkpoint_seconds),
        worker,
        device,
        held: Arc::default(),
        steps_ahead: Arc::default(),
        stopping: stop.clone(),
        material: Mutex::default(),
    });
    let performer = context.clone();
    let perform = move |work, cancel| performer.clone().perform(work, cancel);

    let connect = || connect_channel(&config.endpoint, &credentials);
    let supervisor = tokio::spawn(supervise(standings_receiver, stop.clone(), perform));
    tokio::select! {
        never = keep(connect, member, keeper, standings) => match never {},
        () = context.reporter.run(&link) => {}
        // The session stays open until the work has stopped.
        result = supervisor => result.unwrap_or_else(|error| warn!("an internal failure: {error}")),
    }
    if let Some(session) = link.current() {
        leave(session, "the daemon was stopped").await;
    }
    if let Some(context) = Arc::into_inner(context) {
        context.worker.stop().await;
    }
    Ok(())
}

impl Work {
    /// The run that it is about.
    fn run(&self) -> &RunName {
        match self {
            Self::Prepare(run) => &run.name,
            Self::Train(task) => &task.run.name,
            Self::Evaluate(task) => &task.run.name,
        }
    }
}
