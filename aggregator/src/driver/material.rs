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
    reduce::{self, TensorPlan},
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
    /// Where its tensors lie.
    pub tensors: TensorPlan,
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
        let (plan, manifest) = (spec.chunk_plan(), spec.model.manifest());
        Ok(Self {
            name: spec.name.clone(),
            spec_digest: RunSpec::digest(&spec_toml),
            manifest_digest: manifest.digest(),
            tensors: TensorPlan::new(&manifest),
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
        let optimizer = &self.spec.outer.optimizer;
        ModelLayout {
            plan: self.plan,
            encoding: self.spec.wire.model_encoding,
            momentum: reduce::has_momentum(optimizer),
            second_moment: reduce::initial_second_moment(optimizer).is_some(),
            fragments: self.spec.fragments(),
        }
    }
}

/// A model version that is being sent.
pub struct ModelReader {
    /// Its run.
    pub material: Arc<RunMaterial>,
    pub(super) files: ModelVersion,
    /// Whether what makes it of the version before is sent instead of the whole.
    pub(super) update: bool,
}

impl ModelReader {
    /// The version.
    pub fn version(&self) -> u32 {
        self.files.version()
    }

    /// BLAKE3 over its flat vector.
    pub fn digest(&self) -> Digest {
        self.files.digest()
    }

    /// The version that the chunks are to be added to; none if they are the parameters.
    pub fn base_version(&self) -> Option<u32> {
        self.update.then(|| self.version().saturating_sub(1))
    }

    /// How the chunks are encoded.
    pub fn encoding(&self) -> Encoding {
        self.files.update_encoding().filter(|_| self.update).unwrap_or(self.files.encoding())
    }

    /// The payload of chunk `index` and its digest, verified after reading.
    ///
    /// # Errors
    /// If the disk cannot be read or returned something else than was written.
    pub fn chunk(&self, index: u32) -> Result<(Vec<u8>, Digest), ModelError> {
        if self.update { self.files.update_chunk(index) } else { self.files.chunk(index) }
    }
}
