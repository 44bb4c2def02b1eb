//! A model is a manifest plus a flat vector.
//!
//! The manifest lists the tensors in order (name, shape) and follows from the architecture alone; names
//! and shapes are those of the Hugging Face checkpoint. The flat vector is the tensors' fp32 values in
//! that order, each row-major. Nothing outside this module and the trainer knows layer types.

mod gpt2;
mod hugging_face;
mod init;
mod llama;
mod mpt;

use serde::{Deserialize, Serialize};

pub use self::{
    gpt2::Gpt2Config,
    hugging_face::ConfigError,
    llama::{LlamaConfig, RopeScaling, RopeType},
    mpt::{MptAttentionConfig, MptConfig},
};
use crate::ids::Digest;

/// The model's architecture with its hyper-parameters; keys are those of the Hugging Face `config.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "architecture", rename_all = "lowercase")]
pub enum Architecture {
    /// LLaMA: RMSNorm, rotary positions, SwiGLU, grouped-query attention.
    Llama(LlamaConfig),
    /// GPT-2: LayerNorm, learned positions, GELU.
    Gpt2(Gpt2Config),
    /// MPT: LayerNorm without bias, ALiBi, GELU.
    Mpt(MptConfig),
}

/// How a tensor begins.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    /// All ones (the gain of a norm).
    Ones,
    /// All zeros (a bias).
    Zeros,
}

/// One tensor of the model.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorSpec {
    /// Its name in the Hugging Face checkpoint.
    pub name: String,
    /// Its dimensions, outermost first.
    pub shape: Vec<usize>,
    /// How it begins.
    pub init: Init,
}

impl TensorSpec {
    fn new(name: impl Into<String>, shape: &[usize], init: Init) -> Self {
        Self { name: name.into(), shape: shape.to_vec(), init }
    }

    /// Number of values.
    pub fn parameters(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether weight decay applies: matrices and embeddings, not gains and biases (GPT-3, arXiv
    /// 2005.14165, and every open recipe since).
    pub fn decays(&self) -> bool {
        self.shape.len() >= 2
    }

    /// Whether it is a matrix of a block: not an embedding of tokens or positions, nor the output projection.
    pub fn is_hidden_matrix(&self) -> bool {
        const OUTSIDE: [&str; 4] = ["embed_tokens.weight", "lm_head.weight", "wte.weight", "wpe.weight"];
        self.shape.len() == 2 && !OUTSIDE.iter().any(|name| self.name.ends_with(name))
    }
}

/// The model's tensors, in the order of the flat vector.
#[derive(Debug, Clone, PartialEq)]
pub struct Manifest {
    tensors: Vec<TensorSpec>,
}

impl Manifest {
    /// The tensors, in order.
    pub fn tensors(&self) -> &[TensorSpec] {
        &self.tensors
    }

    /// Length of the flat vector.
    pub fn parameters(&self) -> u64 {
        self.tensors.iter().map(|tensor| tensor.parameters() as u64).sum()
    }

    /// What two sides compare to know that they mean the same vector: BLAKE3 over one line per tensor,
    /// `name shape f32`.
    pub fn digest(&self) -> Digest {
        let mut hasher = blake3::Hasher::new();
        for tensor in &self.tensors {
            hasher.update(format!("{} {:?} f32\n", tensor.name, tensor.shape).as_bytes());
        }
        hasher.finalize().into()
    }

    /// The initial flat vector. A function of the seed and the manifest alone: bit-identical on every
    /// machine, whatever its number of cores.
    pub fn initialise(&self, seed: u64) -> Vec<f32> {
        init::flat_vector(self, seed)
    }

    /// Fills `values` with what [`Manifest::initialise`] gives from the position `start` on, for a vector
    /// that is made piece by piece.
    pub fn fill_initial(&self, seed: u64, start: u64, values: &mut [f32]) {
        init::fill(self, seed, start, values);
    }
}

/// What every architecture tells, whatever its layers are.
impl Architecture {
    /// "llama", "gpt2" or "mpt": the name in specifications, and Hugging Face's `model_type`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Llama(_) => "llama",
            Self::Gpt2(_) => "gpt2",
            Self::Mpt(_) => "mpt",
        }
    }

    /// The tensors.
    pub fn manifest(&self) -> Manifest {
        let tensors = match self {
            Self::Llama(config) => config.tensors(),
            Self::Gpt2(config) => config.tensors(),
            Self::Mpt(config) => config.tensors(),
        };
        Manifest { tensors }
    }

    /// The `config.json` that `transformers` loads.
    pub fn hugging_face_config(&self) -> serde_json::Value {
        match self {
            Self::Llama(config) => config.hugging_face_config(),
            Self::Gpt2(config) => config.hugging_face_config(),
            Self::Mpt(config) => config.hugging_face_config(),
        }
    }

    /// Size of the vocabulary that the embedding has room for.
    pub fn vocab_size(&self) -> usize {
        match self {
            Self::Llama(config) => config.vocab_size,
            Self::Gpt2(config) => config.vocab_size,
            Self::Mpt(config) => config.vocab_size,
        }
    }

    /// Longest sequence, in tokens.
    pub fn context_length(&self) -> usize {
        match self {
            Self::Llama(config) => config.max_position_embeddings,
            Self::Gpt2(config) => config.n_positions,
            Self::Mpt(config) => config.max_seq_len,
        }
    }

    /// The hyper-parameter that is the context length: its key.
    pub fn context_key(&self) -> &'static str {
        match self {
            Self::Llama(_) => "max_position_embeddings",
            Self::Gpt2(_) => "n_positions",
            Self::Mpt(_) => "max_seq_len",
        }
    }

    /// The same model, with optional sizes left out where they are what they would be without being given: so two
    /// models are the same just if they are equal.
    #[must_use]
    pub fn without_usual_sizes(self) -> Self {
        match self {
            Self::Llama(config) => Self::Llama(config.without_usual_sizes()),
            Self::Gpt2(config) => Self::Gpt2(config.without_usual_sizes()),
            Self::Mpt(config) => Self::Mpt(config),
        }
    }

    /// What is wrong with the hyper-parameters: (key, what is allowed).
    pub fn problems(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::Llama(config) => config.problems(),
            Self::Gpt2(config) => config.problems(),
            Self::Mpt(config) => config.problems(),
        }
    }
}

/// Checks shared by the architectures' `problems`: a dimension's allowed range.
fn check_range(problems: &mut Vec<(&'static str, String)>, key: &'static str, value: usize, maximum: usize) {
    if value == 0 || value > maximum {
        problems.push((key, format!("is {value}; allowed: 1 to {maximum}")));
    }
}

/// The same for numbers that must be above 0.
fn check_positive(problems: &mut Vec<(&'static str, String)>, values: &[(&'static str, f64)]) {
    let wrong = values.iter().filter(|(_, value)| !(value.is_finite() && *value > 0.0));
    problems.extend(wrong.map(|(key, value)| (*key, format!("is {value}; must be a positive number"))));
}

/// Bounds on hyper-parameters: far above any model that is trained this way, far below what would
/// overflow a size or exhaust a machine by typing error.
const LAYERS_MAX: usize = 256;
const WIDTH_MAX: usize = 65_536;
const VOCABULARY_MAX: usize = 1 << 20;
const CONTEXT_MAX: usize = 1 << 20;
