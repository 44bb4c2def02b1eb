//! The one place where the round engine meets the world.
//!
//! The driver holds every run's state and every session behind one lock. An event is applied in three
//! steps: the engine computes the next state and its effects; the state and the records among the effects
//! are stored in one transaction; only then does the new state hold, are the other effects performed and
//! the sites' instructions brought up to date. If the transaction fails, nothing has happened.
//!
//! The lock is held for the transaction (milliseconds), never for a transfer, a reduction or a checkpoint:
//! those are tasks that come back with an event.

mod early;
mod error;
mod instructions;
mod material;
mod operators;
mod sites;
mod starts;
mod tasks;

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use consort_common::{
    ids::{Digest, RunName},
    units::{UnixMs, unix_ms_now},
};
use tokio::sync::{Mutex, MutexGuard, Notify, watch};
use tokio_util::{
    sync::{CancellationToken, WaitForCancellationFutureOwned},
    task::TaskTracker,
};

use self::{
    early::{EarlyFolds, ExpectedRound},
    tasks::Work,
};
pub use self::{
    error::DriverError,
    material::{ModelReader, RunMaterial},
    sites::{Attendance, Evaluated, ReadyReport, UploadTicket},
};
use crate::{
    checkpoints::Checkpoints,
    config::{Config, Limits},
    engine::{Effect, Event, RoundRecord, Run, RunStatus},
    models::ModelFiles,
    sessions::Sessions,
    spool::{Spool, SpooledDelta},
    storage::Storage,
    store::{ContributionRow, EvaluationRow, Record, RoundCommit, RoundRow, Store},
};

/// Longest sleep of the timer task, so that a change of the machine's clock is noticed.
const TIMER_MAX: Duration = Duration::from_secs(60);

/// How often, and with what pause, the state directory's lock is tried.
const LOCK_ATTEMPTS_MAX: u32 = 50;
const LOCK_PAUSE: Duration = Duration::from_millis(100);

/// One run as the driver holds it.
#[derive(Debug, Clone)]
pub struct LiveRun {
    /// What does not change.
    pub material: Arc<RunMaterial>,
    /// What does.
    pub run: Run,
    /// BLAKE3 of the newest committed version's flat vector.
    pub version_digest: Digest,
    /// The same of older versions, which sites that are behind train from.
    pub older_digests: BTreeMap<u32, Digest>,
}

impl LiveRun {
    /// BLAKE3 of a version that sites train from; none if it is not known any more.
    fn digest(&self, version: u32) -> Option<Digest> {
        let is_newest = version == self.run.state().version;
        if is_newest { Some(self.version_digest) } else { self.older_digests.get(&version).copied() }
    }

    /// Takes note of the version that a round made.
    fn committed(&mut self, round: &RoundRecord) {
        self.older_digests.insert(round.round.saturating_sub(1), self.version_digest);
        self.version_digest = round.reduced.digest;
        let bases = self.run.state().bases();
        self.older_digests.retain(|version, _| bases.contains(version));
    }

    /// What the round in progress averages, if all that are waited for deliver; none where no value can be averaged
    /// before all have.
    fn expected_round(&self) -> Option<ExpectedRound> {
        let (state, outer) = (self.run.state(), &self.material.spec.outer);
        let expected = ExpectedRound {
            round: state.round(),
            weights: state.expected(&self.material.rounds),
            layout: self.material.layout(),
            optimizer: outer.optimizer.clone(),
            aggregation: outer.aggregation.clone(),
            tensors: self.material.tensors.clone(),
        };
        let whole = outer.aggregation.compares_deltas();
        Some(expected).filter(|expected| !expected.weights.is_empty() && !whole)
    }
}

/// Everything that the lock guards.
#[derive(Default)]
pub struct Core {
    /// Who is connected.
    pub sessions: Sessions,
    /// Every run.
    pub runs: BTreeMap<RunName, LiveRun>,
}

impl Core {
    /// The run of that name.
    pub fn run(&self, name: &RunName) -> Result<&LiveRun, DriverError> {
        self.runs.get(name).ok_or_else(|| DriverError::NoSuchRun(name.clone()))
    }

    /// The run that sites are to work for: active, or paused (they stay prepared).
    pub fn current(&self) -> Option<&LiveRun> {
        let with = |status: RunStatus| self.runs.values().find(move |live| live.run.state().status == status);
        with(RunStatus::Active).or_else(|| with(RunStatus::Paused))
    }
}

/// The driver. One per process.
pub struct Driver {
    core: Mutex<Core>,
    store: Store,
    spool: Arc<Spool>,
    checkpoints: Checkpoints,
    models: ModelFiles,
    limits: Limits,
    federation: String,
    state_directory: PathBuf,
    /// Held while this process uses the state directory.
    _lock: std::fs::File,
    /// Counts changes that a watcher may want to see.
    changes: watch::Sender<u64>,
    timer: Notify,
    tasks: TaskTracker,
    early: EarlyFolds,
    under_way: std::sync::Mutex<BTreeSet<Work>>,
    stopping: CancellationToken,
}

impl Driver {
    /// Opens the state directory and takes up every run where it was.
    ///
    /// # Errors
    /// If the database, a run's specification or its state cannot be read, another aggregator is here, or the
    /// configured object store cannot be used.
    pub async fn open(
        config: &Config,
        federation: &str,
        stopping: CancellationToken,
    ) -> Result<Arc<Self>, DriverError> {
        let directory = &config.state_directory;
        let lock = lock_directory(directory).await?;
        let storage = Storage::open(&config.storage, directory).await?;
        let store = Store::open(&config.database.location(directory)).await?;
        let spool = match storage.clone() {
            Some(storage) => Spool::in_storage(storage, config.limits.spool()).await?,
            None => Spool::new(directory.join("spool"), config.limits.spool()),
        };
        let (models, tasks) = (ModelFiles::new(directory.join("models")), TaskTracker::new());
        let reserve_bytes = config.limits.disk_reserve_bytes;
        let early = EarlyFolds::new(models.clone(), reserve_bytes, tasks.clone(), stopping.clone());
        let driver = Arc::new(Self {
            core: Mutex::default(),
            store,
            spool: Arc::new(spool),
            checkpoints: Checkpoints::new(storage),
            models,
            limits: config.limits.clone(),
            federation: federation.to_owned(),
            state_directory: directory.clone(),
            _lock: lock,
            changes: watch::Sender::new(0),
            timer: Notify::new(),
            tasks,
            early,
            under_way: std::sync::Mutex::default(),
            stopping,
        });
        driver.restore_runs().await?;
        driver.spawn_task("timer", driver.clone().run_timer());
        driver.spawn_task("abandoned models", driver.clone().discard_abandoned_starts());
        Ok(driver)
    }

    async fn restore_runs(self: &Arc<Self>) -> Result<(), DriverError> {
        let mut core = self.core.lock().await;
        let now = unix_ms_now();
        for row in self.store.runs().await? {
            let material = Arc::new(RunMaterial::new(row.spec_toml, row.tokenizer_digest)?);
            let state = serde_json::from_str(&row.state_json).map_err(|error| DriverError::State {
                run: material.name.clone(),
                reason: error.to_string(),
            })?;
            let run = Run::restore(&material.rounds, state, now);
            tracing::info!(run = %material.name, status = %run.state().status, version = run.state().version, "run restored");
            let effects = run.resume_effects(&material.rounds);
            let name = material.name.clone();
            let mut older_digests = BTreeMap::new();
            for version in run.state().bases() {
                match self.models.open(&name, version, material.layout()) {
                    Ok(model) => drop(older_digests.insert(version, model.digest())),
                    Err(error) => {
                        tracing::error!(run = %name, %error, "sites that train from version {version} have to wait until their work is given up");
                    }
                }
            }
            let version_digest = row.version_digest;
            core.runs.insert(name.clone(), LiveRun { material, run, version_digest, older_digests });
            self.perform(&mut core, &name, effects);
        }
        Ok(())
    }

    /// Sends [`Event::Tick`] when a run's timer is due.
    async fn run_timer(self: Arc<Self>) {
        while !self.stopping.is_cancelled() {
            let due: Vec<RunName>;
            let sleep;
            {
                let core = self.core.lock().await;
                let now = unix_ms_now();
                let timers =
                    || core.runs.iter().filter_map(|(name, live)| Some((name, live.run.next_timer()?)));
                due = timers().filter(|(_, at)| *at <= now).map(|(name, _)| name.clone()).collect();
                let next = timers().map(|(_, at)| at.saturating_sub(now)).min();
                sleep = next.map_or(TIMER_MAX, Duration::from_millis).min(TIMER_MAX);
            }
            for run in &due {
                if let Err(error) = self.event(run, Event::Tick).await {
                    tracing::error!(%run, %error, "a deadline could not be acted on; trying again");
                }
            }
            // The floor keeps a store that fails from being tried in a hot loop.
            let floor = if due.is_empty() { Duration::from_millis(1) } else { Duration::from_millis(200) };
            tokio::select! {
                () = tokio::time::sleep(sleep.max(floor)) => (),
                () = self.timer.notified(), if due.is_empty() => (),
                () = self.stopping.cancelled() => (),
            }
        }
    }

    /// Applies an event to a run.
    ///
    /// # Errors
    /// If the engine refuses it or it cannot be stored; the run is then as it was.
    pub async fn event(self: &Arc<Self>, run: &RunName, event: Event) -> Result<Vec<Effect>, DriverError> {
        let mut core = self.core.lock().await;
        self.apply(&mut core, run, event).await
    }

    async fn apply(
        self: &Arc<Self>,
        core: &mut Core,
        name: &RunName,
        event: Event,
    ) -> Result<Vec<Effect>, DriverError> {
        self.apply_with(core, name, event, Vec::new()).await
    }

    /// Applies an event; `records` become durable with it or not at all.
    async fn apply_with(
        self: &Arc<Self>,
        core: &mut Core,
        name: &RunName,
        event: Event,
        mut records: Vec<Record>,
    ) -> Result<Vec<Effect>, DriverError> {
        let now = unix_ms_now();
        let live = core.run(name)?;
        let mut run = live.run.clone();
        let effects = run.step(&live.material.rounds, event, now)?;
        for effect in &effects {
            records.extend(self.record(name, effect, now).await?);
        }
        let (before, after) = (&live.run.state().status, &run.state().status);
        if *before == RunStatus::Created && *after == RunStatus::Active {
            records.push(Record::Started(now));
        }
        if !before.is_over() && after.is_over() {
            records.push(Record::Finished(now));
        }
        if run.state() != live.run.state() || !records.is_empty() {
            let state_json = serde_json::to_string(run.state())
                .map_err(|error| DriverError::State { run: name.clone(), reason: error.to_string() })?;
            self.store.save_state(name, &state_json, &records).await?;
        }
        for record in &records {
            if let Record::Event { text, .. } = record {
                tracing::info!(run = %name, "{text}");
            }
        }
        if let Some(live) = core.runs.get_mut(name) {
            live.run = run;
            for effect in &effects {
                if let Effect::Commit(round) = effect {
                    live.committed(round);
                }
            }
        }
        self.perform(core, name, effects.clone());
        Ok(effects)
    }

    /// The database record of an effect, if it is one.
    async fn record(
        &self,
        run: &RunName,
        effect: &Effect,
        now: UnixMs,
    ) -> Result<Option<Record>, DriverError> {
        let record = match effect {
            Effect::RecordContribution { round, contribution } => Record::Contribution(ContributionRow {
                site: contribution.site.clone(),
                run: run.clone(),
                round: *round,
                age: contribution.age,
                weight: None,
                tokens: contribution.facts.tokens,
                steps: contribution.facts.steps,
                train_loss: contribution.facts.train_loss,
                train_seconds: contribution.facts.train_seconds,
                delta_norm: contribution.facts.delta_norm,
                bytes: contribution.facts.bytes,
                encoding: contribution.facts.encoding,
                delta_digest: contribution.facts.delta_digest,
                accepted_ms: contribution.accepted_ms,
                measured_norm: None,
                clip: None,
                selected: None,
            }),
            Effect::RecordEvaluation { site, evaluation } => Record::Evaluation(EvaluationRow {
                version: evaluation.version,
                site: site.clone(),
                loss: evaluation.loss,
                tokens: evaluation.tokens,
                text_bytes: evaluation.text_bytes,
            }),
            Effect::Commit(round) => Record::Round(self.round_commit(run, round).await?),
            Effect::Event(text) => Record::Event { time_ms: now, text: text.clone() },
            Effect::Duplicate { .. }
            | Effect::Reduce { .. }
            | Effect::Publish { .. }
            | Effect::DiscardSpool { .. }
            | Effect::InstructionsChanged => return Ok(None),
        };
        Ok(Some(record))
    }

    /// A committed round as it is stored; its bytes are those counted since the round before.
    async fn round_commit(&self, run: &RunName, round: &RoundRecord) -> Result<RoundCommit, DriverError> {
        let counted = self.store.run(run).await?.map_or((0, 0), |row| (row.bytes_down, row.bytes_up));
        let before = self.store.rounds(run).await?;
        let down: u64 = before.iter().map(|row| row.bytes_down).sum();
        let up: u64 = before.iter().map(|row| row.bytes_up).sum();
        let row = RoundRow {
            round: round.round,
            started_ms: round.started_ms,
            committed_ms: round.committed_ms,
            attempts: round.attempts,
            first_step: round.first_step,
            tokens: round.tokens(),
            train_loss: round.train_loss(),
            delta_norm: round.reduced.delta_norm,
            update_norm: round.reduced.update_norm,
            statistics: Some(round.reduced.statistics),
            bytes_down: counted.0.saturating_sub(down),
            bytes_up: counted.1.saturating_sub(up),
            digest: round.reduced.digest,
            contributors: 0,
        };
        let (treatments, tensors) = (round.reduced.treatments.clone(), round.reduced.tensors.clone());
        Ok(RoundCommit { row, treatments, tensors })
    }

    /// Performs what is not a record.
    fn perform(self: &Arc<Self>, core: &mut Core, name: &RunName, effects: Vec<Effect>) {
        let Some(material) = core.runs.get(name).map(|live| live.material.clone()) else { return };
        for effect in effects {
            match effect {
                Effect::Reduce { round, contributions } => self.begin_reduce(&material, round, contributions),
                Effect::Publish { version } => self.begin_publish(&material, version),
                Effect::DiscardSpool { round, keep } => self.begin_discard(&material, round, keep),
                Effect::InstructionsChanged => self.push_instructions(core),
                Effect::RecordContribution { .. }
                | Effect::RecordEvaluation { .. }
                | Effect::Commit(_)
                | Effect::Event(_)
                | Effect::Duplicate { .. } => {}
            }
        }
        self.early.expect(name, core.runs.get(name).and_then(LiveRun::expected_round));
        self.timer.notify_one();
        self.changed();
    }

    /// Tells each connected site what holds for it now, if that changed.
    fn push_instructions(&self, core: &Core) {
        let current = core.current();
        for (site, session) in core.sessions.iter() {
            let instruction = instructions::for_site(current, site, &session.daemon);
            session.instruction.send_if_modified(|sent| {
                let changed = *sent != instruction;
                *sent = instruction;
                changed
            });
        }
    }

    fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    /// Everything that the lock guards, for reading.
    pub async fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().await
    }

    /// The database, for reading.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// The spool.
    pub fn spool(&self) -> Arc<Spool> {
        self.spool.clone()
    }

    /// Tells that these chunks of a delta are durable, so that its round can be folded early. Cheap: notes them
    /// down. To be told of each chunk once at least: when it is made durable, or when a call takes up a delta
    /// that holds it.
    pub fn chunks_stored(&self, delta: &Arc<SpooledDelta>, indices: &[u32]) {
        self.early.chunks_stored(delta, indices);
    }

    /// The configured bounds.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// The federation that is served.
    pub fn federation(&self) -> &str {
        &self.federation
    }

    /// Where a run's tokenizer.json is.
    pub fn tokenizer_path(&self, run: &RunName) -> PathBuf {
        self.state_directory.join("runs").join(run.as_str()).join("tokenizer.json")
    }

    /// Changes that a watcher may want to see.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Completes when the aggregator is to stop.
    pub fn stopping(&self) -> WaitForCancellationFutureOwned {
        self.stopping.clone().cancelled_owned()
    }

    /// Counts model payload sent to and received from a run's sites.
    pub fn count_traffic(self: &Arc<Self>, run: &RunName, down: u64, up: u64) {
        if down == 0 && up == 0 {
            return;
        }
        let (driver, run) = (self.clone(), run.clone());
        self.tasks.spawn(async move {
            if let Err(error) = driver.store.add_traffic(&run, down, up).await {
                tracing::error!(%run, %error, "{down} bytes down and {up} bytes up were not counted");
            }
        });
    }

    /// Makes a change to its end, though the caller goes away meanwhile: a call that is dropped between the
    /// commit and what follows it would leave the database and the memory apart.
    ///
    /// # Errors
    /// Those of the change.
    pub async fn to_its_end<T: Send + 'static>(
        &self,
        change: impl Future<Output = Result<T, DriverError>> + Send + 'static,
    ) -> Result<T, DriverError> {
        self.tasks.spawn(change).await.map_err(|_| DriverError::TaskFailed("the call"))?
    }

    /// Runs a task until the aggregator stops; it may be cut at any await.
    pub fn spawn_task(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        let stopping = self.stopping.clone();
        self.tasks.spawn(async move {
            tokio::select! {
                () = task => (),
                () = stopping.cancelled() => tracing::debug!(task = name, "cut"),
            }
        });
    }

    /// Waits for the tasks that write, then closes the database.
    pub async fn close(&self) {
        self.stopping.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        self.store.close().await;
    }
}

/// Keeps a second aggregator out of the state directory; the lock goes with the process. One that was
/// killed a moment ago may still be on its way out.
async fn lock_directory(directory: &std::path::Path) -> Result<std::fs::File, DriverError> {
    let path = directory.join("lock");
    let file = std::fs::File::create(&path).map_err(|source| write_error(&path, source))?;
    for _ in 0..LOCK_ATTEMPTS_MAX {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(std::fs::TryLockError::WouldBlock) => tokio::time::sleep(LOCK_PAUSE).await,
            Err(std::fs::TryLockError::Error(source)) => return Err(write_error(&path, source)),
        }
    }
    Err(DriverError::DirectoryInUse(directory.to_owned()))
}

fn write_error(path: &std::path::Path, source: std::io::Error) -> DriverError {
    DriverError::Write { what: path.display().to_string(), source }
}
