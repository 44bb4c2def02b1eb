//! What sites do: join, attend, get ready, fetch the model, deliver, report, leave.

use std::sync::Arc;

use consort_common::{
    ids::{DeltaId, Digest, RunName, SiteName},
    units::unix_ms_now,
};
use consort_proto::v1;
use rand::RngCore;
use tokio::sync::watch;

use super::{Core, Driver, DriverError, LiveRun, ModelReader, RunMaterial};
use crate::{
    engine::{self, ContributionFacts, Effect, Event, Rejection, RunStatus},
    models::ModelError,
    sessions::{Daemon, Prepared, Session, SessionId},
    spool::ContributionKey,
    store::{ClientRow, RunSiteRow},
};

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

impl Driver {
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
            self.site_ready(&mut core, &ready, site).await?;
        }
        self.push_instructions(&core);
        self.changed();
        Ok(attendance)
    }

    /// A run that is over takes no sites; that is nothing that the site did wrong.
    async fn site_ready(
        self: &Arc<Self>,
        core: &mut Core,
        ready: &Prepared,
        site: &SiteName,
    ) -> Result<(), DriverError> {
        let event = Event::SiteReady { site: site.clone(), train_tokens: ready.train_tokens };
        match self.apply(core, &ready.run, event).await {
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
        if core.sessions.get(site).is_some_and(Session::connected) {
            return; // it has joined again, and this was its old stream
        }
        tracing::info!(%site, "site disconnected");
        let runs: Vec<RunName> = core
            .runs
            .iter()
            .filter(|(_, live)| live.run.ready().contains_key(site))
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
        let ready = Prepared { run: report.run, train_tokens: report.train_tokens };
        session.ready = Some(ready.clone());
        if session.connected() {
            self.site_ready(&mut core, &ready, site).await?;
        }
        Ok(())
    }

    /// A committed version of a run's model, or what makes it of the version that the site holds.
    ///
    /// # Errors
    /// If the session is not the site's, or there is no such version.
    pub async fn model_for(
        &self,
        site: &SiteName,
        session: &[u8],
        run: &RunName,
        version: u32,
        held: Option<u32>,
    ) -> Result<ModelReader, DriverError> {
        let material = self.material_for(site, session, run).await?;
        let newest = self.core.lock().await.run(run)?.run.state().version;
        if version > newest {
            return Err(DriverError::NoSuchVersion { run: run.clone(), version, newest });
        }
        let files = self.models.open(run, version, material.layout()).map_err(|error| match error {
            ModelError::Missing { .. } => DriverError::NoSuchVersion { run: run.clone(), version, newest },
            other => other.into(),
        })?;
        let update = version > 0 && held == Some(version - 1) && files.update_encoding().is_some();
        Ok(ModelReader { material, files, update })
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
        let open = is_open(live, &key)?;
        Ok(open.then(|| UploadTicket { material: live.material.clone(), key }))
    }

    /// Whether the round still takes this delta; asked before each chunk is stored.
    ///
    /// # Errors
    /// If it does not.
    pub async fn check_upload_open(&self, ticket: &UploadTicket) -> Result<(), DriverError> {
        let mut core = self.core.lock().await;
        let key = &ticket.key;
        if is_open(core.run(&key.run)?, key)? {
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
fn is_open(live: &LiveRun, key: &ContributionKey) -> Result<bool, Rejection> {
    let (state, plan) = (live.run.state(), &live.material.rounds);
    if !matches!(state.status, RunStatus::Active | RunStatus::Paused) {
        return Err(Rejection::NotRunning { status: state.status.clone() });
    }
    if state.accepted(&key.site, key.round).is_some() {
        return Ok(false);
    }
    state.assigned_steps(plan, &key.site, key.round).map(|_| true)
}
