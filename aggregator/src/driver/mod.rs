//! The one place where the round engine meets the world.
//!
//! The driver holds every run's state and every session behind one lock. An event is applied in three
//! steps: the engine computes the next state and its effects; the state and the records among the effects
//! are stored in one transaction; only then does the new state hold, are the other effects performed and
//! the sites' instructions brought up to date. If the transaction fails, nothing has happened.
//!
//! The lock is held for the transaction (milliseconds), never for a transfer, a reduction or a checkpoint:
//! those are tasks that come back with an event.

mod error;
mod instructions;
mod material;
mod tasks;

use std::{
    collections::{BTreeMap, BTreeSet},
    future::Future,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use consort_common::{
    atomic_file::write_atomically,
    ids::{DeltaId, Digest, RunName, SiteName},
    spec::{RunSpec, TokenizerSpec},
    tokenizer::{byte_tokenizer_json, token_id, vocabulary_size},
    units::{UnixMs, unix_ms_now},
};
use consort_proto::v1;
use rand::RngCore;
use tokio::{
    sync::{Mutex, MutexGuard, Notify, watch},
    task::spawn_blocking,
};
use tokio_util::{
    sync::{CancellationToken, WaitForCancellationFutureOwned},
    task::TaskTracker,
};

use self::tasks::Work;
pub use self::{
    error::DriverError,
    material::{ModelReader, RunMaterial},
};
use crate::{
    config::{Config, Limits},
    engine::{
        self, ContributionFacts, Effect, Event, Phase, Rejection, RoundRecord, Run, RunStatus, Standing,
    },
    models::{ModelError, ModelFiles},
    reduce,
    sessions::{Daemon, Ready, SessionId, Sessions},
    spool::{ContributionKey, Spool},
    store::{
        ClientRow, ContributionRow, EvaluationRow, NewRun, Record, RoundCommit, RoundRow, RunSiteRow, Store,
    },
};

/// Longest sleep of the timer task, so that a change of the machine's clock is noticed.
const TIMER_MAX: Duration = Duration::from_secs(60);

/// How often, and with what pause, the state directory's lock is tried.
const LOCK_ATTEMPTS_MAX: u32 = 50;
const LOCK_PAUSE: Duration = Duration::from_millis(100);

/// What a site measured.
pub type Evaluated = engine::Evaluation;

/// What a site says once its text is tokenised.
#[derive(Debug)]
pub struct ReadyReport {
    /// The run.
    pub run: RunName,
    /// Digest of the specification that the site read.
    pub spec_digest: Digest,
    /// Digest of the manifest that the site derived.
    pub manifest_digest: Digest,
    /// Tokens to train on.
    pub train_tokens: u64,
    /// Tokens held out.
    pub held_out_tokens: u64,
    /// Documents, both together.
    pub documents: u64,
}

/// The right to upload one delta.
#[derive(Debug)]
pub struct UploadTicket {
    /// The run.
    pub material: Arc<RunMaterial>,
    /// Where the delta is spooled.
    pub key: ContributionKey,
}

/// One run as the driver holds it.
#[derive(Debug, Clone)]
pub struct LiveRun {
    /// What does not change.
    pub material: Arc<RunMaterial>,
    /// What does.
    pub run: Run,
    /// BLAKE3 of the newest committed version's flat vector.
    pub version_digest: Digest,
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
    under_way: std::sync::Mutex<BTreeSet<Work>>,
    stopping: CancellationToken,
}

impl Driver {
    /// Opens the state directory and takes up every run where it was.
    ///
    /// # Errors
    /// If the database, a run's specification or its model cannot be read.
    pub async fn open(
        config: &Config,
        federation: &str,
        stopping: CancellationToken,
    ) -> Result<Arc<Self>, DriverError> {
        let directory = &config.state_directory;
        let lock = lock_directory(directory).await?;
        let store = Store::open(&directory.join("consort.db")).await?;
        let driver = Arc::new(Self {
            core: Mutex::default(),
            store,
            spool: Arc::new(Spool::new(directory.join("spool"), config.limits.disk_reserve_bytes)),
            models: ModelFiles::new(directory.join("models")),
            limits: config.limits.clone(),
            federation: federation.to_owned(),
            state_directory: directory.clone(),
            _lock: lock,
            changes: watch::Sender::new(0),
            timer: Notify::new(),
            tasks: TaskTracker::new(),
            under_way: std::sync::Mutex::default(),
            stopping,
        });
        driver.restore_runs().await?;
        driver.spawn_task("timer", driver.clone().run_timer());
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
            core.runs.insert(name.clone(), LiveRun { material, run, version_digest: row.version_digest });
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
                    live.version_digest = round.reduced.digest;
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
                weight: None,
                tokens: contribution.facts.tokens,
                steps: contribution.facts.steps,
                train_loss: contribution.facts.train_loss,
                train_seconds: contribution.facts.train_seconds,
                delta_norm: contribution.facts.delta_norm,
                bytes: contribution.facts.bytes,
                delta_digest: contribution.facts.delta_digest,
                accepted_ms: contribution.accepted_ms,
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
            bytes_down: counted.0.saturating_sub(down),
            bytes_up: counted.1.saturating_sub(up),
            digest: round.reduced.digest,
            contributors: 0,
        };
        let weights = round.contributions.iter().map(|one| (one.contribution.site.clone(), one.weight));
        Ok(RoundCommit { row, weights: weights.collect() })
    }

    /// Performs what is not a record.
    fn perform(self: &Arc<Self>, core: &mut Core, name: &RunName, effects: Vec<Effect>) {
        let Some(material) = core.runs.get(name).map(|live| live.material.clone()) else { return };
        for effect in effects {
            match effect {
                Effect::Reduce { round, contributions } => self.begin_reduce(&material, round, contributions),
                Effect::Publish { version } => self.begin_publish(&material, version),
                Effect::DiscardSpool { round } => self.begin_discard(&material, round),
                Effect::InstructionsChanged => self.push_instructions(core),
                Effect::RecordContribution { .. }
                | Effect::RecordEvaluation { .. }
                | Effect::Commit(_)
                | Effect::Event(_)
                | Effect::Duplicate { .. } => {}
            }
        }
        self.timer.notify_one();
        self.changed();
    }

    /// Tells each connected site what holds for it now, if that changed.
    fn push_instructions(&self, core: &Core) {
        let current = core.current();
        for (site, session) in core.sessions.iter() {
            let instruction = instructions::for_site(current, site);
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

    // ---- for operators

    /// Validates and stores a run; its initial model is on disk when this returns.
    ///
    /// # Errors
    /// If the specification or the tokenizer cannot be used, or the name is taken.
    pub async fn create_run(
        self: &Arc<Self>,
        spec_toml: String,
        tokenizer: Vec<u8>,
    ) -> Result<RunName, DriverError> {
        let spec = RunSpec::parse(&spec_toml)?;
        let tokenizer = tokenizer_json(&spec, tokenizer)?;
        let material = Arc::new(RunMaterial::new(spec_toml, Digest::of(&tokenizer))?);
        let work = Work::Create(material.name.clone());
        // Two at a time would write the same files.
        if !self.claim(work.clone()) {
            return Err(DriverError::RunExists(material.name.clone()));
        }
        let created = self.create_claimed_run(material, tokenizer).await;
        self.release(&work);
        created
    }

    async fn create_claimed_run(
        self: &Arc<Self>,
        material: Arc<RunMaterial>,
        tokenizer: Vec<u8>,
    ) -> Result<RunName, DriverError> {
        let name = material.name.clone();
        if self.core.lock().await.runs.contains_key(&name) {
            return Err(DriverError::RunExists(name));
        }
        let path = self.tokenizer_path(&name);
        let (models, description) = (self.models.clone(), material.clone());
        let version = spawn_blocking(move || -> Result<_, DriverError> {
            if let Some(folder) = path.parent() {
                std::fs::create_dir_all(folder).map_err(|source| write_error(&path, source))?;
            }
            write_atomically(&path, &tokenizer)
                .map_err(|error| write_error(&path, std::io::Error::other(error)))?;
            let flat = description.spec.model.manifest().initialise(description.spec.seed);
            let momentum = reduce::has_momentum(&description.spec.outer.optimizer);
            Ok(models.create_initial(&description.name, description.plan, &flat, momentum)?)
        })
        .await
        .map_err(|_| DriverError::TaskFailed("the initial model"))??;

        let mut core = self.core.lock().await;
        let run = Run::new();
        self.store
            .create_run(&NewRun {
                name: name.clone(),
                spec_toml: material.spec_toml.clone(),
                spec_digest: material.spec_digest,
                manifest_digest: material.manifest_digest,
                tokenizer_digest: material.tokenizer_digest,
                architecture: material.spec.model.name().to_owned(),
                parameters: material.plan.parameters(),
                state_json: serde_json::to_string(run.state())
                    .map_err(|error| DriverError::State { run: name.clone(), reason: error.to_string() })?,
                version_digest: version.digest(),
                created_ms: unix_ms_now(),
            })
            .await?;
        core.runs.insert(name.clone(), LiveRun { material, run, version_digest: version.digest() });
        self.changed();
        Ok(name)
    }

    /// Applies an operator's event. One run is active at a time.
    ///
    /// # Errors
    /// If another run is active, or the run's status does not allow it.
    pub async fn command(self: &Arc<Self>, name: &RunName, event: Event) -> Result<(), DriverError> {
        let mut core = self.core.lock().await;
        core.run(name)?;
        let starts = matches!(event, Event::Start | Event::Resume);
        let active = core.runs.values().find(|live| live.run.state().status == RunStatus::Active);
        if let Some(active) = active.filter(|active| starts && active.material.name != *name) {
            return Err(DriverError::OtherRunActive {
                run: name.clone(),
                active: active.material.name.clone(),
            });
        }
        self.apply(&mut core, name, event).await?;
        if starts {
            self.announce_ready_sites(&mut core, name).await?;
        }
        Ok(())
    }

    /// Sites that got ready for the run before it started, or while another one was current.
    async fn announce_ready_sites(
        self: &Arc<Self>,
        core: &mut Core,
        name: &RunName,
    ) -> Result<(), DriverError> {
        let ready: Vec<SiteName> = core
            .sessions
            .iter()
            .filter(|(_, session)| {
                session.connected() && session.ready.as_ref().is_some_and(|ready| ready.run == *name)
            })
            .map(|(site, _)| site.clone())
            .collect();
        for site in ready {
            self.apply(core, name, Event::SiteReady(site)).await?;
        }
        Ok(())
    }

    // ---- for sites

    /// Opens a session.
    ///
    /// # Errors
    /// If another daemon of the site is connected.
    pub async fn join(self: &Arc<Self>, site: &SiteName, daemon: Daemon) -> Result<SessionId, DriverError> {
        let mut id = SessionId::default();
        rand::rng().fill_bytes(&mut id);
        let mut core = self.core.lock().await;
        let now = unix_ms_now();
        core.sessions.join(site, id, daemon.clone(), now)?;
        tracing::info!(%site, device = daemon.device, version = daemon.software_version, "site joined");
        let client = ClientRow {
            site: site.clone(),
            first_seen_ms: now,
            last_seen_ms: now,
            device: daemon.device,
            software_version: daemon.software_version,
        };
        self.store.upsert_client(&client).await?;
        self.push_instructions(&core);
        self.changed();
        Ok(id)
    }

    /// Opens the site's instruction stream: it is present until the attendance is dropped.
    ///
    /// # Errors
    /// If the session is not the site's.
    pub async fn attend(
        self: &Arc<Self>,
        site: &SiteName,
        session: &[u8],
    ) -> Result<Attendance, DriverError> {
        let mut core = self.core.lock().await;
        let session = core.sessions.touch(site, session, unix_ms_now())?;
        let receiver = session.instruction.subscribe();
        let ready = session.ready.clone();
        let attendance = Attendance { driver: self.clone(), site: site.clone(), receiver: Some(receiver) };
        if let Some(ready) = ready
            && core.runs.contains_key(&ready.run)
        {
            self.site_ready(&mut core, &ready.run, site).await?;
        }
        self.push_instructions(&core);
        self.changed();
        Ok(attendance)
    }

    /// A run that is over takes no sites; that is nothing that the site did wrong.
    async fn site_ready(
        self: &Arc<Self>,
        core: &mut Core,
        run: &RunName,
        site: &SiteName,
    ) -> Result<(), DriverError> {
        match self.apply(core, run, Event::SiteReady(site.clone())).await {
            Err(DriverError::Rejected(Rejection::NotRunning { .. })) => Ok(()),
            other => other.map(|_| ()),
        }
    }

    /// When the aggregator stops, all streams end; that says nothing about the sites.
    async fn site_gone(self: &Arc<Self>, site: &SiteName) {
        if self.stopping.is_cancelled() {
            return;
        }
        let mut core = self.core.lock().await;
        if core.sessions.get(site).is_some_and(crate::sessions::Session::connected) {
            return; // it has joined again, and this was its old stream
        }
        tracing::info!(%site, "site disconnected");
        let runs: Vec<RunName> = core
            .runs
            .iter()
            .filter(|(_, live)| live.run.ready().contains(site))
            .map(|(name, _)| name.clone())
            .collect();
        for run in runs {
            if let Err(error) = self.apply(&mut core, &run, Event::SiteGone(site.clone())).await {
                tracing::error!(%site, %run, %error, "a site's departure could not be recorded");
            }
        }
        self.changed();
    }

    /// Closes the session.
    ///
    /// # Errors
    /// If the session is not the site's.
    pub async fn leave(
        self: &Arc<Self>,
        site: &SiteName,
        session: &[u8],
        reason: &str,
    ) -> Result<(), DriverError> {
        let left = self.core.lock().await.sessions.leave(site, session)?;
        tracing::info!(%site, reason, "site left");
        drop(left);
        self.site_gone(site).await;
        Ok(())
    }

    /// What a site may know of a run.
    ///
    /// # Errors
    /// If the session is not the site's or there is no such run.
    pub async fn material_for(
        &self,
        site: &SiteName,
        session: &[u8],
        run: &RunName,
    ) -> Result<Arc<RunMaterial>, DriverError> {
        let mut core = self.core.lock().await;
        core.sessions.touch(site, session, unix_ms_now())?;
        Ok(core.run(run)?.material.clone())
    }

    /// The site is ready for the run.
    ///
    /// # Errors
    /// If it read another specification or derived another manifest.
    pub async fn ready(
        self: &Arc<Self>,
        site: &SiteName,
        session: &[u8],
        report: ReadyReport,
    ) -> Result<(), DriverError> {
        let mut core = self.core.lock().await;
        core.sessions.touch(site, session, unix_ms_now())?;
        let material = core.run(&report.run)?.material.clone();
        for (what, theirs, ours) in [
            ("spec_digest", report.spec_digest, material.spec_digest),
            ("manifest_digest", report.manifest_digest, material.manifest_digest),
        ] {
            if theirs != ours {
                return Err(DriverError::OtherDigest { what, run: report.run });
            }
        }
        let now = unix_ms_now();
        let prepared = RunSiteRow {
            site: site.clone(),
            train_tokens: report.train_tokens,
            held_out_tokens: report.held_out_tokens,
            documents: report.documents,
        };
        self.store.upsert_run_site(&report.run, &prepared).await?;
        let session = core.sessions.touch(site, session, now)?;
        session.ready = Some(Ready {
            run: report.run.clone(),
            train_tokens: report.train_tokens,
            held_out_tokens: report.held_out_tokens,
        });
        if session.connected() {
            self.site_ready(&mut core, &report.run, site).await?;
        }
        Ok(())
    }

    /// A committed version of a run's model.
    ///
    /// # Errors
    /// If the session is not the site's, or there is no such version.
    pub async fn model_for(
        &self,
        site: &SiteName,
        session: &[u8],
        run: &RunName,
        version: u32,
    ) -> Result<ModelReader, DriverError> {
        let material = self.material_for(site, session, run).await?;
        let newest = self.core.lock().await.run(run)?.run.state().version;
        if version > newest {
            return Err(DriverError::NoSuchVersion { run: run.clone(), version, newest });
        }
        let files = self.models.open(run, version, material.plan).map_err(|error| match error {
            ModelError::Missing { .. } => DriverError::NoSuchVersion { run: run.clone(), version, newest },
            other => other.into(),
        })?;
        Ok(ModelReader { material, digest: files.digest(), files })
    }

    /// The right to upload; none if the site's delta for the round was accepted before.
    ///
    /// # Errors
    /// If the session is not the site's, or the round takes no delta of it now.
    pub async fn upload_ticket(
        &self,
        site: &SiteName,
        session: &[u8],
        run: &RunName,
        round: u32,
        delta: DeltaId,
    ) -> Result<Option<UploadTicket>, DriverError> {
        let mut core = self.core.lock().await;
        core.sessions.touch(site, session, unix_ms_now())?;
        let live = core.run(run)?;
        let key = ContributionKey { run: run.clone(), round, site: site.clone(), delta };
        let open = is_open(&live.run, &key)?;
        Ok(open.then(|| UploadTicket { material: live.material.clone(), key }))
    }

    /// Whether the round still takes this delta; asked before each chunk is stored.
    ///
    /// # Errors
    /// If it does not.
    pub async fn check_upload_open(&self, ticket: &UploadTicket) -> Result<(), DriverError> {
        let mut core = self.core.lock().await;
        let key = &ticket.key;
        if is_open(&core.run(&key.run)?.run, key)? {
            core.sessions.heard(&key.site, unix_ms_now());
            return Ok(());
        }
        Err(Rejection::RoundOver { round: key.round, current: key.round }.into())
    }

    /// The delta is complete. Tells whether it had been accepted before.
    ///
    /// # Errors
    /// If the engine refuses it.
    pub async fn delivered(
        self: &Arc<Self>,
        ticket: &UploadTicket,
        facts: ContributionFacts,
    ) -> Result<bool, DriverError> {
        let event = Event::Delivered { site: ticket.key.site.clone(), round: ticket.key.round, facts };
        let effects = self.event(&ticket.key.run, event).await?;
        Ok(effects.iter().any(|effect| matches!(effect, Effect::Duplicate { .. })))
    }

    /// A site's progress, for people.
    ///
    /// # Errors
    /// If the session is not the site's.
    pub async fn progress(
        &self,
        site: &SiteName,
        session: &[u8],
        progress: v1::Progress,
    ) -> Result<(), DriverError> {
        let mut core = self.core.lock().await;
        core.sessions.touch(site, session, unix_ms_now())?.progress = Some(progress);
        self.changed();
        Ok(())
    }

    /// A site's held-out loss.
    ///
    /// # Errors
    /// If the session is not the site's, or the engine refuses it.
    pub async fn evaluated(
        self: &Arc<Self>,
        site: &SiteName,
        session: &[u8],
        run: &RunName,
        evaluation: Evaluated,
    ) -> Result<(), DriverError> {
        let mut core = self.core.lock().await;
        core.sessions.touch(site, session, unix_ms_now())?;
        self.apply(&mut core, run, Event::Evaluated { site: site.clone(), evaluation }).await?;
        Ok(())
    }

    /// The specification of the run that sites are to work for.
    pub async fn active_spec(&self) -> Option<String> {
        self.core.lock().await.current().map(|live| live.material.spec_toml.clone())
    }

    // ---- for both

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

/// A site's presence: it is connected as long as this lives.
pub struct Attendance {
    driver: Arc<Driver>,
    site: SiteName,
    receiver: Option<watch::Receiver<v1::Instruction>>,
}

impl Attendance {
    /// The instructions. To be called once; the stream keeps the receiver.
    pub fn instructions(&self) -> watch::Receiver<v1::Instruction> {
        self.receiver.clone().unwrap_or_else(|| watch::channel(v1::Instruction { task: None }).1)
    }
}

impl Drop for Attendance {
    fn drop(&mut self) {
        self.receiver = None; // before the question whether the site is still connected
        let (driver, site) = (self.driver.clone(), self.site.clone());
        self.driver.tasks.spawn(async move { driver.site_gone(&site).await });
    }
}

/// Whether the round takes this delta: not so if it was accepted before.
fn is_open(run: &Run, key: &ContributionKey) -> Result<bool, Rejection> {
    let state = run.state();
    if !matches!(state.status, RunStatus::Active | RunStatus::Paused) {
        return Err(Rejection::NotRunning { status: state.status.clone() });
    }
    let not_assigned = || Rejection::NotAssigned { site: key.site.clone(), round: key.round };
    match &state.phase {
        Phase::Training(training) if training.round == key.round => match training.sites.get(&key.site) {
            Some(Standing::Working | Standing::Replaced) => Ok(true),
            Some(Standing::Delivered(_)) => Ok(false),
            None => Err(not_assigned()),
        },
        Phase::Reducing(reducing) if reducing.round == key.round => {
            match reducing.contributions.iter().any(|contribution| contribution.site == key.site) {
                true => Ok(false),
                false => Err(Rejection::RoundOver { round: key.round, current: state.round() }),
            }
        }
        _ => Err(Rejection::RoundOver { round: key.round, current: state.round() }),
    }
}

/// The run's tokenizer.json: the built-in one, or the one that was given.
fn tokenizer_json(spec: &RunSpec, given: Vec<u8>) -> Result<Vec<u8>, DriverError> {
    match (&spec.tokenizer, given.is_empty()) {
        (TokenizerSpec::Byte {}, true) => Ok(byte_tokenizer_json().into_bytes()),
        (TokenizerSpec::Byte {}, false) => Err(DriverError::Tokenizer(
            "the byte tokenizer is built in; none is to be sent with it".to_owned(),
        )),
        (TokenizerSpec::File { path, .. }, true) => {
            Err(DriverError::Tokenizer(format!("{path} was not sent, or is empty")))
        }
        (TokenizerSpec::File { path, end_of_text }, false) => {
            let refuse = |reason: String| DriverError::Tokenizer(format!("{path}: {reason}"));
            let json: serde_json::Value =
                serde_json::from_slice(&given).map_err(|error| refuse(format!("is not JSON: {error}")))?;
            if token_id(&json, end_of_text).is_none() {
                return Err(refuse(format!(
                    "has no token {end_of_text:?}, which the specification names as end_of_text"
                )));
            }
            let (needed, rows) = (vocabulary_size(&json), spec.model.vocab_size());
            if needed > rows as u64 {
                return Err(refuse(format!(
                    "needs model.vocab_size = {needed} at least; the specification says {rows}"
                )));
            }
            Ok(given)
        }
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
