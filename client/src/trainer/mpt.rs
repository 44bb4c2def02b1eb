//! MPT (MosaicML, 2023), which Photon (arXiv 2411.02908) trains, in the order of the forward pass. Computes
//! what Hugging Face's `MptForCausalLM` does.

use std::cell::RefCell;

use consort_common::model::MptConfig;
use tch::{Device, Kind, TchError, Tensor};

use super::{
    attention::{Attention, blocked},
    error::{Doing, TrainerError},
    kernels,
    parameters::Parameters,
};

pub(super) struct Mpt {
    heads: i64,
    head: i64,
    epsilon: f64,
    /// Queries, keys and values are cut to this magnitude.
    clip: Option<f64>,
    /// Factor on the products of queries and keys, where it is not 1 / sqrt(head).
    scale: Option<f64>,
    /// `[vocabulary, width]`.
    embedding: Tensor,
    alibi: Alibi,
    blocks: Vec<Block>,
    norm: Tensor,
    /// `[vocabulary, width]`; the same parameters as the embedding when tied.
    output: Tensor,
}

struct Block {
    attention_norm: Tensor,
    /// `[3 width, width]`.
    query_key_value: Tensor,
    attention_output: Tensor,
    feed_forward_norm: Tensor,
    up: Tensor,
    down: Tensor,
}

impl Mpt {
    pub(super) fn new(
        config: &MptConfig,
        parameters: &Parameters,
        device: Device,
    ) -> Result<Self, TrainerError> {
        let embedding = parameters.leaf("transformer.wte.weight")?;
        let block = |layer| {
            let name = |name: &str| format!("transformer.blocks.{layer}.{name}.weight");
            let leaf = |part: &str| parameters.leaf(&name(part));
            let factor = |part: &str| parameters.factor(&[&name(part)]);
            Ok(Block {
                attention_norm: leaf("norm_1")?,
                query_key_value: factor("attn.Wqkv")?,
                attention_output: factor("attn.out_proj")?,
                feed_forward_norm: leaf("norm_2")?,
                up: factor("ffn.up_proj")?,
                down: factor("ffn.down_proj")?,
            })
        };
        let output = if config.tie_word_embeddings { "transformer.wte.weight" } else { "lm_head.weight" };
        Ok(Self {
            heads: config.n_heads as i64,
            head: config.head_dim() as i64,
            epsilon: config.layer_norm_epsilon,
            clip: config.attn_config.clip_qkv,
            scale: config.attn_config.softmax_scale,
            embedding,
            alibi: Alibi::new(config, device).doing("computing the slopes of ALiBi")?,
            blocks: (0..config.n_layers).map(block).collect::<Result<_, TrainerError>>()?,
            norm: parameters.leaf("transformer.norm_f.weight")?,
            output: parameters.factor(&[output])?,
        })
    }

    /// Tokens `[batch, time]` to what the output projection takes, `[batch, time, width]`.
    pub(super) fn hidden(&self, tokens: &Tensor, attention: &mut Attention) -> Result<Tensor, TchError> {
        attention.add_bias(self.alibi.bias(attention.past(), tokens.size2()?.1)?)?;
        let mut x = kernels::embedding(&self.embedding, tokens)?;
        for (number, block) in self.blocks.iter().enumerate() {
            let normed = self.layer_norm(&x, &block.attention_norm)?;
            x = x.f_add(&self.attention(number, block, &normed, attention)?)?;
            x = x.f_add(&Self::feed_forward(block, &self.layer_norm(&x, &block.feed_forward_norm)?)?)?;
        }
        self.layer_norm(&x, &self.norm)
    }

    /// `[vocabulary, width]`.
    pub(super) fn output(&self) -> &Tensor {
        &self.output
    }

    /// LayerNorm (Ba et al., arXiv 1607.06450, eq. 4) without bias.
    fn layer_norm(&self, x: &Tensor, gain: &Tensor) -> Result<Tensor, TchError> {
        x.f_layer_norm(gain.size(), Some(gain), None::<&Tensor>, self.epsilon, true)
    }

    fn attention(
        &self,
        number: usize,
        block: &Block,
        x: &Tensor,
        attention: &mut Attention,
    ) -> Result<Tensor, TchError> {
        let (batch, time, width) = x.size3()?;
        let mut heads = kernels::linear(x, &block.query_key_value, None)?;
        if let Some(limit) = self.clip {
            heads = heads.f_clamp(-limit, limit)?;
        }
        // [batch, time, 3 heads, head] -> three of [batch, heads, time, head].
        let heads =
            heads.f_view([batch, time, 3 * self.heads, self.head])?.f_transpose(1, 2)?.f_chunk(3, 1)?;
        let mixed = attention.mix(number, &heads[0], &heads[1], &heads[2], self.scale)?;
        let mixed = mixed.f_transpose(1, 2)?.f_reshape([batch, time, width])?;
        kernels::linear(&mixed, &block.attention_output, None)
    }

    /// With the exact GELU (Hendrycks and Gimpel, arXiv 1606.08415, sec. 2).
    fn feed_forward(block: &Block, x: &Tensor) -> Result<Tensor, TchError> {
        let wide = kernels::linear(x, &block.up, None)?.f_gelu("none")?;
        kernels::linear(&wide, &block.down, None)
    }
}

/// Attention with linear biases (Press et al., arXiv 2108.12409, section 3): a query's score for a key is
/// lowered by their distance times the head's slope.
struct Alibi {
    /// `[heads, 1, 1]`.
    slopes: Tensor,
    /// The bias made last, with its `past` and `new`: training asks for the same again and again.
    last: RefCell<Option<(i64, i64, Tensor)>>,
}

impl Alibi {
    #[allow(clippy::cast_possible_truncation)] // as many digits as the scores have
    fn new(config: &MptConfig, device: Device) -> Result<Self, TchError> {
        let slopes: Vec<f32> = config.alibi_slopes().into_iter().map(|slope| slope as f32).collect();
        let slopes =
            Tensor::f_from_slice(&slopes)?.f_view([slopes.len() as i64, 1, 1])?.f_to_device(device)?;
        Ok(Self { slopes, last: RefCell::default() })
    }

    /// `[1, heads, new, past + new]`: slope x (key - query), minus infinity where the key comes later.
    fn bias(&self, past: i64, new: i64) -> Result<Tensor, TchError> {
        let mut last = self.last.borrow_mut();
        if let Some((_, _, bias)) = last.as_ref().filter(|made| (made.0, made.1) == (past, new)) {
            return Ok(bias.shallow_clone());
        }
        let options = (Kind::Float, self.slopes.device());
        let keys = Tensor::f_arange(past + new, options)?;
        let queries = keys.f_narrow(0, past, new)?.f_unsqueeze(1)?;
        let distances = keys.f_sub(&queries)?;
        let later = blocked(&distances.f_gt(0.0)?)?;
        let bias = self.slopes.f_mul(&distances)?.f_add(&later)?.f_unsqueeze(0)?;
        *last = Some((past, new, bias.shallow_clone()));
        Ok(bias)
    }
}
