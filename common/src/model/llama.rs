//! LLaMA (Touvron et al., arXiv 2302.13971) with grouped-query attention (Ainslie et al., arXiv
//! 2305.13245): the tensors of Hugging Face's `LlamaForCausalLM`.

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{
    CONTEXT_MAX, Init, LAYERS_MAX, TensorSpec, VOCABULARY_MAX, WIDTH_MAX, check_range,
    hugging_face::{ConfigError, ConfigReader},
};

/// Hyper-parameters; keys and defaults are those of Hugging Face's `LlamaConfig`, sizes excepted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LlamaConfig {
    /// Rows of the embedding; at least the tokenizer's vocabulary.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub num_hidden_layers: usize,
    /// Query heads; must divide `hidden_size`.
    pub num_attention_heads: usize,
    /// Key and value heads; must divide `num_attention_heads`.
    pub num_key_value_heads: usize,
    /// Longest sequence, in tokens.
    pub max_position_embeddings: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Whether the output projection is the embedding.
    pub tie_word_embeddings: bool,
    /// Standard deviation of initial weights; those that write to the residual stream are divided by
    /// sqrt(2 x layers) (GPT-2's rule).
    pub initializer_range: f64,
}

impl Default for LlamaConfig {
    fn default() -> Self {
        Self {
            vocab_size: 257,
            hidden_size: 128,
            intermediate_size: 352,
            num_hidden_layers: 4,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            max_position_embeddings: 256,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-5,
            tie_word_embeddings: true,
            initializer_range: 0.02,
        }
    }
}

impl LlamaConfig {
    /// Width of one attention head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }

    pub(super) fn tensors(&self) -> Vec<TensorSpec> {
        let (width, inner) = (self.hidden_size, self.intermediate_size);
        let (queries, keys) =
            (self.num_attention_heads * self.head_dim(), self.num_key_value_heads * self.head_dim());
        let normal = Init::Normal(self.initializer_range);
        #[allow(clippy::cast_precision_loss)]
        let residual = Init::Normal(self.initializer_range / ((2 * self.num_hidden_layers) as f64).sqrt());

        let mut tensors =
            vec![TensorSpec::new("model.embed_tokens.weight", &[self.vocab_size, width], normal)];
        for layer in 0..self.num_hidden_layers {
            let mut add = |name: &str, shape: &[usize], init| {
                tensors.push(TensorSpec::new(format!("model.layers.{layer}.{name}"), shape, init));
            };
            add("input_layernorm.weight", &[width], Init::Ones);
            add("self_attn.q_proj.weight", &[queries, width], normal);
            add("self_attn.k_proj.weight", &[keys, width], normal);
            add("self_attn.v_proj.weight", &[keys, width], normal);
            add("self_attn.o_proj.weight", &[width, queries], residual);
            add("post_attention_layernorm.weight", &[width], Init::Ones);
            add("mlp.gate_proj.weight", &[inner, width], normal);
            add("mlp.up_proj.weight", &[inner, width], normal);
            add("mlp.down_proj.weight", &[width, inner], residual);
        }
        tensors.push(TensorSpec::new("model.norm.weight", &[width], Init::Ones));
        if !self.tie_word_embeddings {
            tensors.push(TensorSpec::new("lm_head.weight", &[self.vocab_size, width], normal));
        }
        tensors
    }

    pub(super) fn hugging_face_config(&self) -> serde_json::Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": false,
            "attention_dropout": 0.0,
            "head_dim": self.head_dim(),
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": self.initializer_range,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "mlp_bias": false,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "rms_norm_eps": self.rms_norm_eps,
            // transformers 4 reads rope_theta and torch_dtype, 5 reads rope_parameters and dtype.
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_theta": self.rope_theta, "rope_type": "default"},
            "tie_word_embeddings": self.tie_word_embeddings,
            "torch_dtype": "float32",
            "dtype": "float32",
            "use_cache": true,
            "vocab_size": self.vocab_size,
        })
    }

    /// The inverse of [`Self::hugging_face_config`]; defaults are those of `transformers`' `LlamaConfig`.
    /// Dropout is not taken over: pretraining here has none.
    pub(super) fn from_hugging_face(reader: &ConfigReader<'_>) -> Result<Self, ConfigError> {
        reader.require("hidden_act", &["silu".into()])?;
        reader.require("attention_bias", &[false.into()])?;
        reader.require("mlp_bias", &[false.into()])?;
        reader.require("partial_rotary_factor", &[1.into()])?;
        let mut rope_theta = reader.number("rope_theta", 10_000.0)?;
        for key in ["rope_parameters", "rope_scaling"] {
            if let Some(rope) = reader.object(key)? {
                rope.require("rope_type", &["default".into()]).map_err(|error| error.within(key))?;
                rope.require("type", &["default".into()]).map_err(|error| error.within(key))?;
                rope.require("partial_rotary_factor", &[1.into()]).map_err(|error| error.within(key))?;
                rope_theta = rope.number("rope_theta", rope_theta).map_err(|error| error.within(key))?;
            }
        }
        let num_attention_heads = reader.size("num_attention_heads", 32)?;
        let config = Self {
            vocab_size: reader.size("vocab_size", 32_000)?,
            hidden_size: reader.size("hidden_size", 4096)?,
            intermediate_size: reader.size("intermediate_size", 11_008)?,
            num_hidden_layers: reader.size("num_hidden_layers", 32)?,
            num_attention_heads,
            num_key_value_heads: reader.size("num_key_value_heads", num_attention_heads)?,
            max_position_embeddings: reader.size("max_position_embeddings", 2048)?,
            rope_theta,
            rms_norm_eps: reader.number("rms_norm_eps", 1e-6)?,
            tie_word_embeddings: reader.flag("tie_word_embeddings", false)?,
            initializer_range: reader.number("initializer_range", 0.02)?,
        };
        if let Some(head_dim) = config.hidden_size.checked_div(config.num_attention_heads) {
            reader.require("head_dim", &[head_dim.into()])?;
        }
        Ok(config)
    }

    pub(super) fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        check_range(&mut problems, "vocab_size", self.vocab_size, VOCABULARY_MAX);
        check_range(&mut problems, "hidden_size", self.hidden_size, WIDTH_MAX);
        check_range(&mut problems, "intermediate_size", self.intermediate_size, 4 * WIDTH_MAX);
        check_range(&mut problems, "num_hidden_layers", self.num_hidden_layers, LAYERS_MAX);
        check_range(&mut problems, "num_attention_heads", self.num_attention_heads, WIDTH_MAX);
        check_range(&mut problems, "num_key_value_heads", self.num_key_value_heads, WIDTH_MAX);
        check_range(&mut problems, "max_position_embeddings", self.max_position_embeddings, CONTEXT_MAX);
        if problems.is_empty() {
            if !self.hidden_size.is_multiple_of(self.num_attention_heads) {
                problems.push((
                    "num_attention_heads",
                    format!(
                        "is {}; must divide hidden_size = {}",
                        self.num_attention_heads, self.hidden_size
                    ),
                ));
            } else if !self.head_dim().is_multiple_of(2) {
                problems.push((
                    "num_attention_heads",
                    format!("gives heads of width {}; rotary positions need an even width", self.head_dim()),
                ));
            }
            if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
                problems.push((
                    "num_key_value_heads",
                    format!(
                        "is {}; must divide num_attention_heads = {}",
                        self.num_key_value_heads, self.num_attention_heads
                    ),
                ));
            }
        }
        for (key, value) in [
            ("rope_theta", self.rope_theta),
            ("rms_norm_eps", self.rms_norm_eps),
            ("initializer_range", self.initializer_range),
        ] {
            if !(value.is_finite() && value > 0.0) {
                problems.push((key, format!("is {value}; must be a positive number")));
            }
        }
        problems
    }
}
