//! The models that runs start from. They come before their run is created and wait in the spool, as what no
//! run has: the delta of a round 0. Creating the run makes version 0 of one, and the transaction that records
//! the run is its commit: before it there is an upload that can go on, after it a run, and nothing between.
//!
//! A model's place follows from the run's name and the model's digest: whoever sends the same one goes on with it,
//! another one for the same run takes its place.

use std::{sync::Arc, time::Duration};

use consort_common::{
    chunk::ChunkPlan,
    codec::Encoding,
    ids::{DeltaId, Digest, RunName},
    units::{self, UnixMs, unix_ms_now},
};
use tokio::task::spawn_blocking;

use super::{Driver, DriverError, RunMaterial, tasks::Work};
use crate::{
    aligned::AlignedVec,
    models::{ModelFiles, ModelVersion},
    reduce,
    spool::{ContributionKey, DeltaLayout, Spool, SpoolError, SpooledDelta},
    store::StartOrigin,
};

/// How long an upload is kept that nothing comes of.
const KEPT_MS: UnixMs = 24 * 3600 * 1000;
/// How often it is looked for such.
const LOOK_INTERVAL: Duration = Duration::from_secs(3600);
/// Longest name of where a model comes from, in characters.
const ORIGIN_CHARACTERS_MAX: usize = 200;

/// A model that is being received.
#[derive(Debug)]
pub struct StartUpload {
    run: RunName,
    /// How it is cut; its chunks are fp32.
    pub plan: ChunkPlan,
    /// Its chunks.
    pub model: Arc<SpooledDelta>,
}

impl Driver {
    /// Begins to receive the model of that digest for the run of a specification, or goes on with it. There is
    /// room for all of it and for the version 0 that it becomes.
    ///
    /// # Errors
    /// If the specification cannot be used or names no checkpoint, its run exists, or there is no room.
    pub async fn begin_start(
        self: &Arc<Self>,
        spec_toml: &str,
        digest: Digest,
    ) -> Result<StartUpload, DriverError> {
        let material = RunMaterial::new(spec_toml.to_owned(), Digest::of(&[]))?;
        let (run, plan) = (material.name.clone(), material.plan);
        if material.spec.start.is_none() {
            return Err(DriverError::Start { run, reason: "its specification has no [start]".to_owned() });
        }
        if self.core.lock().await.runs.contains_key(&run) {
            return Err(DriverError::RunExists(run));
        }
        self.store.touch_start_upload(&run, unix_ms_now()).await?;
        let (driver, key) = (self.clone(), key(&run, digest));
        let model = spawn_blocking(move || -> Result<_, DriverError> {
            driver.spool.discard_other_deltas(&key)?;
            let model = driver.spool.receive(&key, DeltaLayout::new(plan, Encoding::Fp32))?;
            // What a call that broke off had written need not be sent again.
            model.sync(|_| true)?;
            let (version_bytes, reserve_bytes) =
                (material.layout().version_bytes(0), driver.limits.disk_reserve_bytes);
            if !driver.models.has_room(version_bytes.saturating_add(reserve_bytes))? {
                if model.held().is_empty() {
                    driver.spool.discard_round(&key.run, key.round)?;
                }
                let bytes = units::bytes(version_bytes);
                let reason = format!("the aggregator's disk has not the {bytes} left that version 0 takes");
                return Err(DriverError::NoRoom { run: key.run, reason });
            }
            Ok(model)
        })
        .await
        .map_err(|_| DriverError::TaskFailed("the upload of a model"))??;
        Ok(StartUpload { run, plan, model })
    }

    /// Makes durable what has come of a model.
    ///
    /// # Errors
    /// The disk's, the object store's or the database's refusal.
    pub async fn sync_start(&self, upload: &StartUpload) -> Result<(), DriverError> {
        let model = upload.model.clone();
        spawn_blocking(move || model.sync(|_| true))
            .await
            .map_err(|_| DriverError::TaskFailed("the upload of a model"))??;
        Ok(self.store.touch_start_upload(&upload.run, unix_ms_now()).await?)
    }

    /// What a model is called: by the run that made it, where that was here, else as it was given.
    pub(super) async fn name_start(&self, given: StartOrigin) -> Result<StartOrigin, DriverError> {
        let made_here = self.store.version_with_digest(given.digest).await?;
        let name = made_here.map(|(run, version)| format!("version {version} of run {run}"));
        Ok(StartOrigin { name: name.unwrap_or(given.name), ..given })
    }

    /// Deletes what was received for a run that exists now.
    pub(super) async fn discard_start(self: &Arc<Self>, run: &RunName) -> Result<(), DriverError> {
        let (spool, name) = (self.spool.clone(), run.clone());
        spawn_blocking(move || spool.discard_round(&name, 0))
            .await
            .map_err(|_| DriverError::TaskFailed("a model that was received"))??;
        Ok(self.store.forget_start_upload(run).await?)
    }

    /// Deletes models for which nothing came for long, from time to time.
    pub(super) async fn discard_abandoned_starts(self: Arc<Self>) {
        loop {
            let before = unix_ms_now().saturating_sub(KEPT_MS);
            if let Err(error) = self.discard_starts_before(before).await {
                tracing::warn!(%error, "models that no run was made of were not looked for; the next look does");
            }
            tokio::time::sleep(LOOK_INTERVAL).await;
        }
    }

    /// Deletes the models for which nothing came since `before`, and those whose run exists. One that cannot be
    /// deleted keeps none of the others.
    async fn discard_starts_before(self: &Arc<Self>, before: UnixMs) -> Result<(), DriverError> {
        for run in self.store.spent_start_uploads(before).await? {
            let work = Work::Create(run.clone());
            if !self.claim(work.clone()) {
                continue;
            }
            let discarded = self.discard_spent_start(&run).await;
            self.release(&work);
            if let Err(error) = discarded {
                tracing::warn!(%run, %error, "a model that no run was made of is still there; the next look deletes it");
            }
        }
        Ok(())
    }

    async fn discard_spent_start(self: &Arc<Self>, run: &RunName) -> Result<(), DriverError> {
        if !self.core.lock().await.runs.contains_key(run) {
            // Its creation may have come as far as a version 0.
            let (models, name) = (self.models.clone(), run.clone());
            spawn_blocking(move || models.remove_run(&name))
                .await
                .map_err(|_| DriverError::TaskFailed("a model that was received"))??;
            tracing::info!(%run, "a model that was uploaded and of which no run was made is deleted");
        }
        self.discard_start(run).await
    }
}

/// Where the model of that digest waits.
fn key(run: &RunName, digest: Digest) -> ContributionKey {
    let mut id = [0; 16];
    id.copy_from_slice(&digest.as_bytes()[..16]);
    let site = "operator".parse().expect("it is a name");
    ContributionKey { run: run.clone(), round: 0, site, delta: DeltaId::from(id) }
}

/// Checks the name by which a model is recorded.
///
/// # Errors
/// What is wrong with it.
pub fn check_origin(name: &str) -> Result<(), String> {
    let printable = !name.is_empty() && !name.chars().any(char::is_control);
    if printable && name.chars().count() <= ORIGIN_CHARACTERS_MAX {
        return Ok(());
    }
    Err(format!("must be 1 to {ORIGIN_CHARACTERS_MAX} characters, none of them a control character"))
}

/// Writes version 0 of a run from the model of that digest, which was received for it.
pub(super) fn create_version(
    spool: &Spool,
    models: &ModelFiles,
    material: &RunMaterial,
    digest: Digest,
) -> Result<ModelVersion, DriverError> {
    let key = key(&material.name, digest);
    let incomplete = |held| DriverError::StartIncomplete {
        run: material.name.clone(),
        held,
        chunks: material.plan.chunks(),
    };
    let model = match spool.stored(&key, DeltaLayout::new(material.plan, Encoding::Fp32)) {
        Err(SpoolError::Missing { .. }) => return Err(incomplete(0)),
        model => model?,
    };
    model.sync(|_| true)?;
    // It does not change between the two readings.
    model.seal();
    let version = match model.held().len() {
        held if held < material.plan.chunks() as usize => Err(incomplete(held)),
        _ => check_digest(&model, &material.name, digest)
            .and_then(|()| write_version(&model, models, material)),
    };
    model.unseal();
    if let Err(DriverError::OtherStart { .. }) = version {
        // Sending it again would change nothing: it has all chunks.
        spool.discard_round(&key.run, key.round)?;
    }
    version
}

fn check_digest(model: &SpooledDelta, run: &RunName, announced: Digest) -> Result<(), DriverError> {
    let (mut hasher, mut payload) = (blake3::Hasher::new(), AlignedVec::default());
    for index in 0..model.layout().chunks() {
        model.read(index, &mut payload)?;
        hasher.update_rayon(&payload);
    }
    let found = Digest::from(hasher.finalize());
    if found == announced {
        return Ok(());
    }
    Err(DriverError::OtherStart { run: run.clone(), announced, found })
}

fn write_version(
    model: &SpooledDelta,
    models: &ModelFiles,
    material: &RunMaterial,
) -> Result<ModelVersion, DriverError> {
    let fill = |start: u64, values: &mut [f32]| {
        let index = u32::try_from(start / u64::from(material.plan.chunk_parameters())).unwrap_or(u32::MAX);
        let mut payload = AlignedVec::default();
        model.read(index, &mut payload)?;
        let decoded = Encoding::Fp32.codec().decode(&payload, values);
        decoded.map_err(|source| DriverError::Undecodable { index, source })
    };
    reduce::create_initial(models, &material.name, material.layout(), fill)
}

#[cfg(test)]
mod tests;
