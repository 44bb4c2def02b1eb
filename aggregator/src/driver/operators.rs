//! What operators do to runs: create them, and let them start, pause, go on and end.

use std::sync::Arc;

use consort_common::{
    atomic_file::write_atomically,
    ids::{Digest, RunName, SiteName},
    spec::{RunSpec, TokenizerSpec},
    tokenizer::{byte_tokenizer_json, token_id, vocabulary_size},
    units::unix_ms_now,
};
use tokio::task::spawn_blocking;

use super::{Core, Driver, DriverError, LiveRun, RunMaterial, tasks::Work, write_error};
use crate::{
    engine::{Event, Run, RunStatus},
    reduce,
    sessions::Session,
    store::NewRun,
};

impl Driver {
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
            let manifest = description.spec.model.manifest();
            let fill = |start, values: &mut [f32]| {
                manifest.fill_initial(description.spec.seed, start, values);
            };
            Ok(reduce::create_initial(&models, &description.name, description.layout(), fill)?)
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
