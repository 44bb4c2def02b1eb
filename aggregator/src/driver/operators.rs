//! What operators do to runs: create them, and let them start, pause, go on and end.

use std::{collections::BTreeMap, sync::Arc};

use consort_common::{
    atomic_file::write_atomically,
    ids::{Digest, RunName, SiteName},
    spec::{RunSpec, TokenizerSpec},
    tokenizer::{byte_tokenizer_json, token_id, vocabulary_size},
    units::unix_ms_now,
};
use tokio::task::spawn_blocking;

use super::{Core, Driver, DriverError, LiveRun, RunMaterial, starts, tasks::Work, write_error};
use crate::{
    engine::{Event, Run, RunStatus},
    models::{ModelFiles, ModelVersion},
    reduce,
    sessions::Session,
    store::{NewRun, StartOrigin},
};

impl Driver {
    /// Validates and stores a run; its initial model is on disk when this returns. `start` is the model that it
    /// starts from, received before, where the specification names one.
    ///
    /// # Errors
    /// If the specification, the tokenizer or the model cannot be used, or the name is taken.
    pub async fn create_run(
        self: &Arc<Self>,
        spec_toml: String,
        tokenizer: Vec<u8>,
        start: Option<StartOrigin>,
    ) -> Result<RunName, DriverError> {
        let spec = RunSpec::parse(&spec_toml)?;
        check_start(&spec, start.as_ref())?;
        let tokenizer = tokenizer_json(&spec, tokenizer)?;
        let material = Arc::new(RunMaterial::new(spec_toml, Digest::of(&tokenizer))?);
        let work = Work::Create(material.name.clone());
        // Two at a time would write the same files.
        if !self.claim(work.clone()) {
            return Err(DriverError::RunExists(material.name.clone()));
        }
        let created = self.create_claimed_run(material, tokenizer, start).await;
        self.release(&work);
        created
    }

    async fn create_claimed_run(
        self: &Arc<Self>,
        material: Arc<RunMaterial>,
        tokenizer: Vec<u8>,
        start: Option<StartOrigin>,
    ) -> Result<RunName, DriverError> {
        let name = material.name.clone();
        if self.core.lock().await.runs.contains_key(&name) {
            return Err(DriverError::RunExists(name));
        }
        let path = self.tokenizer_path(&name);
        let (models, spool, description) = (self.models.clone(), self.spool(), material.clone());
        let start_digest = start.as_ref().map(|start| start.digest);
        let version = spawn_blocking(move || -> Result<_, DriverError> {
            if let Some(folder) = path.parent() {
                std::fs::create_dir_all(folder).map_err(|source| write_error(&path, source))?;
            }
            write_atomically(&path, &tokenizer)
                .map_err(|error| write_error(&path, std::io::Error::other(error)))?;
            match start_digest {
                Some(digest) => starts::create_version(&spool, &models, &description, digest),
                None => create_seeded_version(&models, &description),
            }
        })
        .await
        .map_err(|_| DriverError::TaskFailed("the initial model"))??;

        let start = match start {
            Some(start) => Some(self.name_start(start).await?),
            None => None,
        };
        let starts_from_model = start.is_some();
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
                start,
                created_ms: unix_ms_now(),
            })
            .await?;
        core.runs.insert(
            name.clone(),
            LiveRun { material, run, version_digest: version.digest(), older_digests: BTreeMap::new() },
        );
        drop(core);
        self.changed();
        if starts_from_model && let Err(error) = self.discard_start(&name).await {
            tracing::warn!(run = %name, %error, "the model that the run starts from is still in the spool too; it is deleted within a day");
        }
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
        let prepared = |(site, session): (&SiteName, &Session)| {
            let prepared = session.ready.as_ref().filter(|prepared| prepared.run == *name)?;
            session.connected().then(|| (site.clone(), prepared.train_tokens))
        };
        let ready: Vec<(SiteName, u64)> = core.sessions.iter().filter_map(prepared).collect();
        for (site, train_tokens) in ready {
            self.apply(core, name, Event::SiteReady { site, train_tokens }).await?;
        }
        Ok(())
    }
}

/// Whether a model comes where the specification names one, and only there.
fn check_start(spec: &RunSpec, start: Option<&StartOrigin>) -> Result<(), DriverError> {
    let reason = match (&spec.start, start) {
        (None, None) => return Ok(()),
        (Some(_), Some(start)) => match starts::check_origin(&start.name) {
            Ok(()) => return Ok(()),
            Err(problem) => format!("the name of the model that it starts from {problem}"),
        },
        (Some(named), None) => format!(
            "the model of start.checkpoint = {:?} was not sent; install the `consort` tool of the aggregator's version",
            named.checkpoint
        ),
        (None, Some(_)) => "a model to start from was sent, but its specification has no [start]".to_owned(),
    };
    Err(DriverError::Start { run: spec.name.clone(), reason })
}

/// Writes version 0 as the seed gives it.
fn create_seeded_version(models: &ModelFiles, material: &RunMaterial) -> Result<ModelVersion, DriverError> {
    let manifest = material.spec.model.manifest();
    let fill = |start, values: &mut [f32]| {
        manifest.fill_initial(material.spec.seed, start, values);
        Ok(())
    };
    reduce::create_initial(models, &material.name, material.layout(), fill)
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
