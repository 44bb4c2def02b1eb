//! GPT-2 (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019): the tensors of
//! Hugging Face's `GPT2LMHeadModel`, whose projections are stored input-first (`Conv1D`).

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{
    CONTEXT_MAX, Init, LAYERS_MAX, TensorSpec, VOCABULARY_MAX, WIDTH_MAX, check_positive, check_range,
    hugging_face::{ConfigError, ConfigReader},
};

/// Hyper-parameters; keys are those of Hugging Face's `GPT2Config`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Gpt2Config {
    /// Rows of the embedding; at least the tokenizer's vocabulary.
    pub vocab_size: usize,
    /// Longest sequence, in tokens.
    pub n_positions: usize,
    /// Width of the residual stream.
    pub n_embd: usize,
    /// Number of blocks.
    pub n_layer: usize,
    /// Attention heads; must divide `n_embd`.
    pub n_head: usize,
    /// Width of the feed-forward layer where it is not `4 n_embd`.
    pub n_inner: Option<usize>,
    /// Whether the output projection is the embedding.
    pub tie_word_embeddings: bool,
    /// Added to the variance in LayerNorm.
    pub layer_norm_epsilon: f64,
    /// Standard deviation of initial weights; those that write to the residual stream are divided by
    /// sqrt(2 x layers).
    pub initializer_range: f64,
}

impl Default for Gpt2Config {
    fn default() -> Self {
        Self {
            vocab_size: 257,
            n_positions: 256,
            n_embd: 128,
            n_layer: 4,
            n_head: 4,
            n_inner: None,
            tie_word_embeddings: true,
            layer_norm_epsilon: 1e-5,
            initializer_range: 0.02,
        }
    }
}

impl Gpt2Config {
    /// Width of one attention head.
    pub fn head_dim(&self) -> usize {
        self.n_embd / self.n_head
    }

    /// Width of the feed-forward layer.
    pub fn inner(&self) -> usize {
        self.n_inner.unwrap_or(4 * self.n_embd)
    }

    /// See [`Architecture::without_usual_sizes`](super::Architecture::without_usual_sizes).
    pub(super) fn without_usual_sizes(self) -> Self {
        let usual = self.n_embd.saturating_mul(4);
        Self { n_inner: self.n_inner.filter(|n_inner| *n_inner != usual), ..self }
    }

    pub(super) fn tensors(&self) -> Vec<TensorSpec> {
        let (width, inner) = (self.n_embd, self.inner());
        let normal = Init::Normal(self.initializer_range);
        #[allow(clippy::cast_precision_loss)]
        let residual = Init::Normal(self.initializer_range / ((2 * self.n_layer) as f64).sqrt());

        let mut tensors = vec![
            TensorSpec::new("transformer.wte.weight", &[self.vocab_size, width], normal),
            TensorSpec::new("transformer.wpe.weight", &[self.n_positions, width], normal),
        ];
        for layer in 0..self.n_layer {
            let mut add = |name: &str, shape: &[usize], init| {
                tensors.push(TensorSpec::new(format!("transformer.h.{layer}.{name}"), shape, init));
            };
            add("ln_1.weight", &[width], Init::Ones);
            add("ln_1.bias", &[width], Init::Zeros);
            add("attn.c_attn.weight", &[width, 3 * width], normal);
            add("attn.c_attn.bias", &[3 * width], Init::Zeros);
            add("attn.c_proj.weight", &[width, width], residual);
            add("attn.c_proj.bias", &[width], Init::Zeros);
            add("ln_2.weight", &[width], Init::Ones);
            add("ln_2.bias", &[width], Init::Zeros);
            add("mlp.c_fc.weight", &[width, inner], normal);
            add("mlp.c_fc.bias", &[inner], Init::Zeros);
            add("mlp.c_proj.weight", &[inner, width], residual);
            add("mlp.c_proj.bias", &[width], Init::Zeros);
        }
        tensors.push(TensorSpec::new("transformer.ln_f.weight", &[width], Init::Ones));
        tensors.push(TensorSpec::new("transformer.ln_f.bias", &[width], Init::Zeros));
        if !self.tie_word_embeddings {
            tensors.push(TensorSpec::new("lm_head.weight", &[self.vocab_size, width], normal));
        }
        tensors
    }

    pub(super) fn hugging_face_config(&self) -> serde_json::Value {
        json!({
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            "activation_function": "gelu_new",
            "attn_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "initializer_range": self.initializer_range,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "n_embd": self.n_embd,
            "n_head": self.n_head,
            "n_inner": self.n_inner,
            "n_layer": self.n_layer,
            "n_positions": self.n_positions,
            "tie_word_embeddings": self.tie_word_embeddings,
            // transformers 4 reads torch_dtype, 5 reads dtype.
            "torch_dtype": "float32",
            "dtype": "float32",
            "use_cache": true,
            "vocab_size": self.vocab_size,
        })
    }

    /// The inverse of [`Self::hugging_face_config`]; defaults are those of `transformers`' `GPT2Config`.
    /// Dropout is not taken over: pretraining here has none.
    pub(super) fn from_hugging_face(reader: &ConfigReader<'_>) -> Result<Self, ConfigError> {
        // Two names for one function.
        reader.require("activation_function", &["gelu_new".into(), "gelu_pytorch_tanh".into()])?;
        reader.require("scale_attn_weights", &[true.into()])?;
        reader.require("scale_attn_by_inverse_layer_idx", &[false.into()])?;
        reader.require("add_cross_attention", &[false.into()])?;
        let n_embd = reader.size("n_embd", 768)?;
        let n_inner = reader.size("n_inner", n_embd.saturating_mul(4))?;
        let config = Self {
            vocab_size: reader.size("vocab_size", 50_257)?,
            n_positions: reader.size("n_positions", 1024)?,
            n_embd,
            n_layer: reader.size("n_layer", 12)?,
            n_head: reader.size("n_head", 12)?,
            n_inner: Some(n_inner),
            tie_word_embeddings: reader.flag("tie_word_embeddings", true)?,
            layer_norm_epsilon: reader.number("layer_norm_epsilon", 1e-5)?,
            initializer_range: reader.number("initializer_range", 0.02)?,
        };
        Ok(config.without_usual_sizes())
    }

    pub(super) fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        check_range(&mut problems, "vocab_size", self.vocab_size, VOCABULARY_MAX);
        check_range(&mut problems, "n_positions", self.n_positions, CONTEXT_MAX);
        check_range(&mut problems, "n_embd", self.n_embd, WIDTH_MAX);
        check_range(&mut problems, "n_layer", self.n_layer, LAYERS_MAX);
        check_range(&mut problems, "n_head", self.n_head, WIDTH_MAX);
        if let Some(n_inner) = self.n_inner {
            check_range(&mut problems, "n_inner", n_inner, 4 * WIDTH_MAX);
        }
        if problems.is_empty() && !self.n_embd.is_multiple_of(self.n_head) {
            problems.push(("n_head", format!("is {}; must divide n_embd = {}", self.n_head, self.n_embd)));
        }
        check_positive(
            &mut problems,
            &[("layer_norm_epsilon", self.layer_norm_epsilon), ("initializer_range", self.initializer_range)],
        );
        problems
    }
}
