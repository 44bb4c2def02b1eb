//! MPT (MosaicML, 2023; the model that Photon, arXiv 2411.02908, trains): LayerNorm without bias, ALiBi
//! (Press et al., arXiv 2108.12409), GELU; the tensors of Hugging Face's `MptForCausalLM`.
//!
//! What that class computes whatever its configuration says is no hyper-parameter here: a feed-forward
//! layer four times as wide as the model, projections without bias, ALiBi with `alibi_bias_max` = 8.

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{
    CONTEXT_MAX, Init, LAYERS_MAX, TensorSpec, VOCABULARY_MAX, WIDTH_MAX, check_positive, check_range,
    hugging_face::{ConfigError, ConfigReader},
};

/// Hyper-parameters; keys are those of Hugging Face's `MptConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MptConfig {
    /// Rows of the embedding; at least the tokenizer's vocabulary.
    pub vocab_size: usize,
    /// Longest sequence, in tokens.
    pub max_seq_len: usize,
    /// Width of the residual stream.
    pub d_model: usize,
    /// Number of blocks.
    pub n_layers: usize,
    /// Attention heads; must divide `d_model`.
    pub n_heads: usize,
    /// Added to the variance in LayerNorm.
    pub layer_norm_epsilon: f64,
    /// Whether the output projection is the embedding.
    pub tie_word_embeddings: bool,
    /// Standard deviation of initial weights; those that write to the residual stream are divided by
    /// sqrt(2 x layers).
    pub initializer_range: f64,
    /// The attention's own.
    pub attn_config: MptAttentionConfig,
}

/// Hyper-parameters of MPT's attention; keys are those of Hugging Face's `MptAttentionConfig`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct MptAttentionConfig {
    /// Queries, keys and values are cut to this magnitude; none: not.
    pub clip_qkv: Option<f64>,
    /// Factor on the products of queries and keys; none: 1 / sqrt(width of a head).
    pub softmax_scale: Option<f64>,
}

impl Default for MptConfig {
    fn default() -> Self {
        Self {
            vocab_size: 257,
            max_seq_len: 256,
            d_model: 128,
            n_layers: 4,
            n_heads: 4,
            layer_norm_epsilon: 1e-5,
            tie_word_embeddings: true,
            initializer_range: 0.02,
            attn_config: MptAttentionConfig::default(),
        }
    }
}

impl MptConfig {
    /// Width of the feed-forward layer over that of the residual stream.
    pub const EXPANSION_RATIO: usize = 4;
    /// The exponent of the head that looks least far back.
    pub const ALIBI_BIAS_MAX: f64 = 8.0;

    /// Width of one attention head.
    pub fn head_dim(&self) -> usize {
        self.d_model / self.n_heads
    }

    /// ALiBi's slope of each head (Press et al., section 3): the geometric sequence 2^(-8/n), 2^(-16/n), ...,
    /// 2^-8 for n heads, n a power of two. For other numbers the sequence of the next power of two, first
    /// its even members and then its odd ones, as many as there are heads (as MPT does it; the paper's own
    /// rule differs).
    #[allow(clippy::cast_precision_loss)]
    pub fn alibi_slopes(&self) -> Vec<f64> {
        let power = self.n_heads.next_power_of_two();
        let slope = |member: usize| (-(member as f64) * Self::ALIBI_BIAS_MAX / power as f64).exp2();
        if power == self.n_heads {
            return (1..=power).map(slope).collect();
        }
        let (even, odd) = ((2..=power).step_by(2), (1..=power).step_by(2));
        even.chain(odd).take(self.n_heads).map(slope).collect()
    }

    pub(super) fn tensors(&self) -> Vec<TensorSpec> {
        let (width, inner) = (self.d_model, Self::EXPANSION_RATIO * self.d_model);
        let normal = Init::Normal(self.initializer_range);
        #[allow(clippy::cast_precision_loss)]
        let residual = Init::Normal(self.initializer_range / ((2 * self.n_layers) as f64).sqrt());

        let mut tensors = vec![TensorSpec::new("transformer.wte.weight", &[self.vocab_size, width], normal)];
        for layer in 0..self.n_layers {
            let mut add = |name: &str, shape: &[usize], init| {
                tensors.push(TensorSpec::new(format!("transformer.blocks.{layer}.{name}"), shape, init));
            };
            add("norm_1.weight", &[width], Init::Ones);
            add("attn.Wqkv.weight", &[3 * width, width], normal);
            add("attn.out_proj.weight", &[width, width], residual);
            add("norm_2.weight", &[width], Init::Ones);
            add("ffn.up_proj.weight", &[inner, width], normal);
            add("ffn.down_proj.weight", &[width, inner], residual);
        }
        tensors.push(TensorSpec::new("transformer.norm_f.weight", &[width], Init::Ones));
        if !self.tie_word_embeddings {
            tensors.push(TensorSpec::new("lm_head.weight", &[self.vocab_size, width], normal));
        }
        tensors
    }

    pub(super) fn hugging_face_config(&self) -> serde_json::Value {
        json!({
            "architectures": ["MptForCausalLM"],
            "model_type": "mpt",
            "attn_config": {
                "alibi": true,
                "alibi_bias_max": 8,
                // transformers 5 takes a whole number only.
                "attn_pdrop": 0,
                "attn_type": "multihead_attention",
                "clip_qkv": self.attn_config.clip_qkv,
                "prefix_lm": false,
                "qk_ln": false,
                "softmax_scale": self.attn_config.softmax_scale,
            },
            "d_model": self.d_model,
            "emb_pdrop": 0.0,
            "expansion_ratio": Self::EXPANSION_RATIO,
            "initializer_range": self.initializer_range,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "learned_pos_emb": false,
            "max_seq_len": self.max_seq_len,
            "n_heads": self.n_heads,
            "n_layers": self.n_layers,
            "no_bias": true,
            "resid_pdrop": 0.0,
            "tie_word_embeddings": self.tie_word_embeddings,
            // transformers 4 reads torch_dtype, 5 reads dtype.
            "torch_dtype": "float32",
            "dtype": "float32",
            "use_cache": true,
            "vocab_size": self.vocab_size,
        })
    }

    /// The inverse of [`Self::hugging_face_config`]; defaults are those of `transformers`' `MptConfig`.
    /// Dropout is not taken over: pretraining here has none.
    pub(super) fn from_hugging_face(reader: &ConfigReader<'_>) -> Result<Self, ConfigError> {
        reader.require("expansion_ratio", &[Self::EXPANSION_RATIO.into()])?;
        reader.require("no_bias", &[true.into()])?;
        reader.require("logit_scale", &[])?;
        reader.require("embedding_fraction", &[1.into()])?;
        let attention = reader.object("attn_config")?;
        let attn_config = attention.as_ref().map(MptAttentionConfig::from_hugging_face).transpose();
        Ok(Self {
            vocab_size: reader.size("vocab_size", 50_368)?,
            max_seq_len: reader.size("max_seq_len", 2048)?,
            d_model: reader.size("d_model", 2048)?,
            n_layers: reader.size("n_layers", 24)?,
            n_heads: reader.size("n_heads", 16)?,
            layer_norm_epsilon: reader.number("layer_norm_epsilon", 1e-5)?,
            tie_word_embeddings: reader.flag("tie_word_embeddings", true)?,
            initializer_range: reader.number("initializer_range", 0.02)?,
            attn_config: attn_config.map_err(|error| error.within("attn_config"))?.unwrap_or_default(),
        })
    }

    pub(super) fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        check_range(&mut problems, "vocab_size", self.vocab_size, VOCABULARY_MAX);
        check_range(&mut problems, "max_seq_len", self.max_seq_len, CONTEXT_MAX);
        check_range(&mut problems, "d_model", self.d_model, WIDTH_MAX);
        check_range(&mut problems, "n_layers", self.n_layers, LAYERS_MAX);
        check_range(&mut problems, "n_heads", self.n_heads, WIDTH_MAX);
        if problems.is_empty() && !self.d_model.is_multiple_of(self.n_heads) {
            problems
                .push(("n_heads", format!("is {}; must divide d_model = {}", self.n_heads, self.d_model)));
        }
        check_positive(
            &mut problems,
            &[("layer_norm_epsilon", self.layer_norm_epsilon), ("initializer_range", self.initializer_range)],
        );
        let MptAttentionConfig { clip_qkv, softmax_scale } = self.attn_config;
        for (key, value) in [("attn_config.clip_qkv", clip_qkv), ("attn_config.softmax_scale", softmax_scale)]
        {
            check_positive(&mut problems, &value.map(|value| (key, value)).into_iter().collect::<Vec<_>>());
        }
        problems
    }
}

impl MptAttentionConfig {
    fn from_hugging_face(reader: &ConfigReader<'_>) -> Result<Self, ConfigError> {
        reader.require("attn_type", &["multihead_attention".into()])?;
        reader.require("alibi", &[true.into()])?;
        reader.require("alibi_bias_max", &[8.into()])?;
        reader.require("prefix_lm", &[false.into()])?;
        reader.require("qk_ln", &[false.into()])?;
        let optional = |key| reader.get(key).map(|_| reader.number(key, 0.0)).transpose();
        Ok(Self {
            // `transformers` takes 0 for no clipping.
            clip_qkv: optional("clip_qkv")?.filter(|limit| *limit != 0.0),
            softmax_scale: optional("softmax_scale")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_slopes(n_heads: usize, exponents: &[f64]) {
        let slopes = MptConfig { n_heads, ..MptConfig::default() }.alibi_slopes();
        assert_eq!(slopes.iter().map(|slope| -slope.log2()).collect::<Vec<_>>(), exponents);
    }

    #[test]
    fn slopes_are_geometric_and_interleaved_for_other_numbers_of_heads() {
        check_slopes(1, &[8.0]);
        check_slopes(4, &[2.0, 4.0, 6.0, 8.0]);
        check_slopes(3, &[4.0, 8.0, 2.0]);
        check_slopes(6, &[2.0, 4.0, 6.0, 8.0, 1.0, 3.0]);
    }
}
