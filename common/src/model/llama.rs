//! LLaMA (Touvron et al., arXiv 2302.13971) with grouped-query attention (Ainslie et al., arXiv
//! 2305.13245) and the scaled rotary positions of Llama 3.1: the tensors of Hugging Face's
//! `LlamaForCausalLM`.

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{
    CONTEXT_MAX, Init, LAYERS_MAX, TensorSpec, VOCABULARY_MAX, WIDTH_MAX, check_positive, check_range,
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
    /// Width of one head where it is not `hidden_size / num_attention_heads`; even.
    pub head_dim: Option<usize>,
    /// Whether the four projections of the attention have a bias.
    pub attention_bias: bool,
    /// Whether the three projections of the feed-forward layer have a bias.
    pub mlp_bias: bool,
    /// Longest sequence, in tokens.
    pub max_position_embeddings: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// How the rotary frequencies are stretched to a context longer than that of the training; none: not.
    pub rope_scaling: Option<RopeScaling>,
    /// Added to the mean square in RMSNorm.
    pub rms_norm_eps: f64,
    /// Whether the output projection is the embedding.
    pub tie_word_embeddings: bool,
    /// Standard deviation of initial weights; those that write to the residual stream are divided by
    /// sqrt(2 x layers) (GPT-2's rule).
    pub initializer_range: f64,
}

/// How rotary frequencies are stretched to long contexts; the defaults are those of Llama 3.1.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RopeScaling {
    /// The rule.
    pub rope_type: RopeType,
    /// How many times longer the context has become.
    pub factor: f64,
    /// Rotations within the original context below which a frequency is divided by the whole factor.
    pub low_freq_factor: f64,
    /// Rotations above which a frequency stays.
    pub high_freq_factor: f64,
    /// Longest sequence of the original training, in tokens.
    pub original_max_position_embeddings: usize,
}

/// By which rule rotary frequencies are stretched.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RopeType {
    /// As in Llama 3.1: the interpolation "NTK-by-parts" (Peng et al., arXiv 2309.00071, definition 2).
    #[default]
    Llama3,
}

impl Default for RopeScaling {
    fn default() -> Self {
        Self {
            rope_type: RopeType::default(),
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192,
        }
    }
}

impl RopeScaling {
    /// What a frequency, in radians per position, becomes: between the two limits on its rotations something
    /// between the whole and the divided frequency, linear in the rotations.
    #[allow(clippy::cast_precision_loss)]
    pub fn scaled(&self, frequency: f64) -> f64 {
        let rotations = self.original_max_position_embeddings as f64 * frequency / std::f64::consts::TAU;
        let between = (rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor);
        let kept = between.clamp(0.0, 1.0);
        frequency * ((1.0 - kept) / self.factor + kept)
    }

    fn problems(&self) -> Vec<(&'static str, String)> {
        let Self { factor, low_freq_factor, high_freq_factor, .. } = *self;
        let mut problems = Vec::new();
        check_positive(
            &mut problems,
            &[("rope_scaling.factor", factor), ("rope_scaling.low_freq_factor", low_freq_factor)],
        );
        if !(high_freq_factor.is_finite() && high_freq_factor > low_freq_factor) {
            let problem = format!(
                "is {high_freq_factor}; must be above rope_scaling.low_freq_factor = {low_freq_factor}"
            );
            problems.push(("rope_scaling.high_freq_factor", problem));
        }
        check_range(
            &mut problems,
            "rope_scaling.original_max_position_embeddings",
            self.original_max_position_embeddings,
            CONTEXT_MAX,
        );
        problems
    }

    fn hugging_face_config(&self) -> serde_json::Value {
        json!({
            "rope_type": "llama3",
            "factor": self.factor,
            "low_freq_factor": self.low_freq_factor,
            "high_freq_factor": self.high_freq_factor,
            "original_max_position_embeddings": self.original_max_position_embeddings,
        })
    }

    /// What `rope` names, which is the object `rope_scaling` or `rope_parameters` of the whole `config`.
    fn from_hugging_face(
        config: &ConfigReader<'_>,
        rope: &ConfigReader<'_>,
    ) -> Result<Option<Self>, ConfigError> {
        // The older of the two names of one key.
        let name = if rope.get("rope_type").is_some() { "rope_type" } else { "type" };
        rope.require(name, &["default".into(), "llama3".into()])?;
        rope.require("partial_rotary_factor", &[1.into()])?;
        if rope.get(name).is_none_or(|kind| kind == "default") {
            return Ok(None);
        }
        // `transformers` looks for this one outside first, then inside, then takes the context length.
        let key = "original_max_position_embeddings";
        let context = config.size("max_position_embeddings", LlamaConfig::HUGGING_FACE_CONTEXT)?;
        let original_max_position_embeddings = config.size(key, rope.size(key, context)?)?;
        Ok(Some(Self {
            rope_type: RopeType::Llama3,
            factor: rope.needed_number("factor")?,
            low_freq_factor: rope.needed_number("low_freq_factor")?,
            high_freq_factor: rope.needed_number("high_freq_factor")?,
            original_max_position_embeddings,
        }))
    }
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
            head_dim: None,
            attention_bias: false,
            mlp_bias: false,
            max_position_embeddings: 256,
            rope_theta: 10_000.0,
            rope_scaling: None,
            rms_norm_eps: 1e-5,
            tie_word_embeddings: true,
            initializer_range: 0.02,
        }
    }
}

impl LlamaConfig {
    /// The default of `max_position_embeddings` in `transformers`.
    const HUGGING_FACE_CONTEXT: usize = 2048;

    /// Width of one attention head.
    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads)
    }

    /// See [`Architecture::without_usual_sizes`](super::Architecture::without_usual_sizes).
    pub(super) fn without_usual_sizes(self) -> Self {
        let usual = self.hidden_size.checked_div(self.num_attention_heads).unwrap_or_default();
        Self { head_dim: self.head_dim.filter(|head_dim| *head_dim != usual), ..self }
    }

    pub(super) fn tensors(&self) -> Vec<TensorSpec> {
        // Tensors that are multiplied with the same input lie next to each other, so that they can be one
        // matrix; their biases too.
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
            if self.attention_bias {
                add("self_attn.q_proj.bias", &[queries], Init::Zeros);
                add("self_attn.k_proj.bias", &[keys], Init::Zeros);
                add("self_attn.v_proj.bias", &[keys], Init::Zeros);
            }
            add("self_attn.o_proj.weight", &[width, queries], residual);
            if self.attention_bias {
                add("self_attn.o_proj.bias", &[width], Init::Zeros);
            }
            add("post_attention_layernorm.weight", &[width], Init::Ones);
            add("mlp.gate_proj.weight", &[inner, width], normal);
            add("mlp.up_proj.weight", &[inner, width], normal);
            if self.mlp_bias {
                add("mlp.gate_proj.bias", &[inner], Init::Zeros);
                add("mlp.up_proj.bias", &[inner], Init::Zeros);
            }
            add("mlp.down_proj.weight", &[width, inner], residual);
            if self.mlp_bias {
                add("mlp.down_proj.bias", &[width], Init::Zeros);
            }
        }
        tensors.push(TensorSpec::new("model.norm.weight", &[width], Init::Ones));
        if !self.tie_word_embeddings {
            tensors.push(TensorSpec::new("lm_head.weight", &[self.vocab_size, width], normal));
        }
        tensors
    }

    pub(super) fn hugging_face_config(&self) -> serde_json::Value {
        // transformers 4 reads rope_theta and rope_scaling, 5 reads rope_parameters.
        let rope_scaling = self.rope_scaling.as_ref().map(RopeScaling::hugging_face_config);
        let mut rope_parameters = rope_scaling.clone().unwrap_or_else(|| json!({"rope_type": "default"}));
        rope_parameters["rope_theta"] = self.rope_theta.into();
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": self.attention_bias,
            "attention_dropout": 0.0,
            "head_dim": self.head_dim(),
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": self.initializer_range,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "mlp_bias": self.mlp_bias,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": rope_scaling,
            "rope_parameters": rope_parameters,
            "tie_word_embeddings": self.tie_word_embeddings,
            // transformers 4 reads torch_dtype, 5 reads dtype.
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
        reader.require("partial_rotary_factor", &[1.into()])?;
        let mut rope_theta = reader.number("rope_theta", 10_000.0)?;
        let mut rope_scaling = None;
        for key in ["rope_parameters", "rope_scaling"] {
            if let Some(rope) = reader.object(key)? {
                let within = |error: ConfigError| error.within(key);
                rope_scaling = RopeScaling::from_hugging_face(reader, &rope).map_err(within)?;
                rope_theta = rope.number("rope_theta", rope_theta).map_err(within)?;
            }
        }
        let num_attention_heads = reader.size("num_attention_heads", 32)?;
        let hidden_size = reader.size("hidden_size", 4096)?;
        let usual_head_dim = hidden_size.checked_div(num_attention_heads).unwrap_or_default();
        let head_dim = reader.size("head_dim", usual_head_dim)?;
        let config = Self {
            vocab_size: reader.size("vocab_size", 32_000)?,
            hidden_size,
            intermediate_size: reader.size("intermediate_size", 11_008)?,
            num_hidden_layers: reader.size("num_hidden_layers", 32)?,
            num_attention_heads,
            num_key_value_heads: reader.size("num_key_value_heads", num_attention_heads)?,
            head_dim: Some(head_dim),
            attention_bias: reader.flag("attention_bias", false)?,
            mlp_bias: reader.flag("mlp_bias", false)?,
            max_position_embeddings: reader.size("max_position_embeddings", Self::HUGGING_FACE_CONTEXT)?,
            rope_theta,
            rope_scaling,
            rms_norm_eps: reader.number("rms_norm_eps", 1e-6)?,
            tie_word_embeddings: reader.flag("tie_word_embeddings", false)?,
            initializer_range: reader.number("initializer_range", 0.02)?,
        };
        Ok(config.without_usual_sizes())
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
        if let Some(head_dim) = self.head_dim {
            check_range(&mut problems, "head_dim", head_dim, WIDTH_MAX);
        }
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
                let key = if self.head_dim.is_some() { "head_dim" } else { "num_attention_heads" };
                problems.push((
                    key,
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
        check_positive(
            &mut problems,
            &[
                ("rope_theta", self.rope_theta),
                ("rms_norm_eps", self.rms_norm_eps),
                ("initializer_range", self.initializer_range),
            ],
        );
        problems.extend(self.rope_scaling.iter().flat_map(RopeScaling::problems));
        problems
    }
}
