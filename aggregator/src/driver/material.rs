//! What does not change about a run once it is created.

use std::sync::Arc;

use consort_common::{
    chunk::ChunkPlan,
    codec::Encoding,
    ids::{Digest, RunName},
    spec::{RunSpec, SpecError},
};

use crate::{
    engine::Plan,
    models::{ModelError, ModelLayout, ModelVersion},
    reduce,
};

/// What does not change about a run once it is created.
#[derive(Debug)]
pub struct RunMaterial {
    /// The run.
    pub name: RunName,
    /// Its specification as it was given.
    pub spec_toml: String,
    /// The same, read.
    pub spec: RunSpec,
    /// BLAKE3 of `spec_toml`.
    pub spec_digest: Digest,
    /// Digest of the model's tensor manifest.
    pub manifest_digest: Digest,
    /// BLAKE3 of the run's tokenizer.json.
    pub tokenizer_digest: Digest,
    /// How the model is cut.
    pub plan: ChunkPlan,
    /// What the round engine needs of the specification.
    pub rounds: Plan,
}

impl RunMaterial {
    /// Derives everything from the specification's text.
    ///
    /// # Errors
    /// If the specification cannot be used.
    pub fn new(spec_toml: String, tokenizer_digest: Digest) -> Result<Self, SpecError> {
        let spec = RunSpec::parse(&spec_toml)?;
        let plan = spec.chunk_plan();
        Ok(Self {
            name: spec.name.clone(),
            spec_digest: RunSpec::digest(&spec_toml),
            manifest_digest: spec.model.manifest().digest(),
            tokenizer_digest,
            plan,
            rounds: Plan::new(&spec),
            spec,
            spec_toml,
        })
    }
}

impl RunMaterial {
    /// What the run's versions consist of.
    pub fn layout(&self) -> ModelLayout {
        let momentum = reduce::has_momentum(&self.spec.outer.optimizer);
        ModelLayout { plan: self.plan, encoding: self.spec.wire.model_encoding, momentum }
    }
}

/// A model version that is being sent.
pub struct ModelReader {
    /// Its run.
    pub material: Arc<RunMaterial>,
    /// BLAKE3 over its flat vector.
    pub digest: Digest,
    pub(super) files: ModelVersion,
}

impl ModelReader {
    /// The encoding of [`ModelReader::chunk`].
    pub fn encoding(&self) -> Encoding {
        self.files.encoding()
    }

    /// The encoding of [`ModelReader::update_chunk`], if the version is an update of the one before.
    pub fn update_encoding(&self) -> Option<Encoding> {
        self.files.update_encoding()
    }

    /// The parameters of chunk `index` as they are sent, and the digest of these bytes, verified after reading.
    ///
    /// # Errors
    /// If the disk cannot be read or returned something else than was written.
    pub fn chunk(&self, index: u32) -> Result<(Vec<u8>, Digest), ModelError> {
        self.files.chunk(index)
    }

    /// Chunk `index` of what changed since the version before: its decoded values are added in f32.
    ///
    /// # Errors
    /// If there is no update, or as [`ModelReader::chunk`].
    pub fn update_chunk(&self, index: u32) -> Result<(Vec<u8>, Digest), ModelError> {
        self.files.update_chunk(index)
    }
}
