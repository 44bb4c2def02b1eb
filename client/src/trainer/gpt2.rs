//! GPT-2 (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019), in the order of the
//! forward pass. Computes what Hugging Face's `GPT2LMHeadModel` does.

use consort_common::model::Gpt2Config;
use tch::{Device, Kind, TchError, Tensor};

use super::{
    attention::Attention,
    error::{Doing, TrainerError},
    kernels,
    parameters::Parameters,
};

pub(super) struct Gpt2 {
    heads: i64,
    head: i64,
    epsilon: f64,
    /// `[vocabulary, width]`.
    embedding: Tensor,
    /// `[context, width]`.
    positions: Tensor,
    /// 0, 1, ... up to the context length.
    indices: Tensor,
    blocks: Vec<Block>,
    norm: Norm,
    /// `[vocabulary, width]`; the same parameters as the embedding when tied.
    output: Tensor,
}

struct Block {
    attention_norm: Norm,
    query_key_value: Projection,
    attention_output: Projection,
    feed_forward_norm: Norm,
    widen: Projection,
    narrow: Projection,
}

struct Norm {
    gain: Tensor,
    bias: Tensor,
}

/// Stored input-first: `[in, out]` (Hugging Face's `Conv1D`).
struct Projection {
    weight: Tensor,
    bias: Tensor,
}

impl Gpt2 {
    pub(super) fn new(
        config: &Gpt2Config,
        parameters: &Parameters,
        device: Device,
    ) -> Result<Self, TrainerError> {
        let leaf = |name: String| parameters.leaf(&name);
        let norm = |name: &str| {
            Ok::<_, TrainerError>(Norm {
                gain: leaf(format!("transformer.{name}.weight"))?,
                bias: leaf(format!("transformer.{name}.bias"))?,
            })
        };
        let projection = |name: &str| {
            Ok::<_, TrainerError>(Projection {
                weight: parameters.factor(&[&format!("transformer.{name}.weight")])?,
                bias: parameters.factor(&[&format!("transformer.{name}.bias")])?,
            })
        };
        let block = |layer| {
            Ok(Block {
                attention_norm: norm(&format!("h.{layer}.ln_1"))?,
                query_key_value: projection(&format!("h.{layer}.attn.c_attn"))?,
                attention_output: projection(&format!("h.{layer}.attn.c_proj"))?,
                feed_forward_norm: norm(&format!("h.{layer}.ln_2"))?,
                widen: projection(&format!("h.{layer}.mlp.c_fc"))?,
                narrow: projection(&format!("h.{layer}.mlp.c_proj"))?,
            })
        };
        let context = config.n_positions as i64;
        let embedding = parameters.leaf("transformer.wte.weight")?;
        let output = if config.tie_word_embeddings { "transformer.wte.weight" } else { "lm_head.weight" };
        Ok(Self {
            heads: config.n_head as i64,
            head: config.head_dim() as i64,
            epsilon: config.layer_norm_epsilon,
            embedding,
            positions: parameters.leaf("transformer.wpe.weight")?,
            indices: Tensor::f_arange(context, (Kind::Int64, device)).doing("counting the positions")?,
            blocks: (0..config.n_layer).map(block).collect::<Result<_, TrainerError>>()?,
            norm: norm("ln_f")?,
            output: parameters.factor(&[output])?,
        })
    }

    /// Tokens `[batch, time]` to what the output projection takes, `[batch, time, width]`.
    pub(super) fn hidden(&self, tokens: &Tensor, attention: &mut Attention) -> Result<Tensor, TchError> {
        let positions = self.indices.f_narrow(0, attention.past(), tokens.size2()?.1)?;
        let positions = kernels::embedding(&self.positions, &positions)?;
        let mut x = kernels::embedding(&self.embedding, tokens)?.f_add(&positions)?;
        for (number, block) in self.blocks.iter().enumerate() {
            let normed = block.attention_norm.apply(&x, self.epsilon)?;
            x = x.f_add(&self.attention(number, block, &normed, attention)?)?;
            x = x.f_add(&Self::feed_forward(block, &block.feed_forward_norm.apply(&x, self.epsilon)?)?)?;
        }
        self.norm.apply(&x, self.epsilon)
    }

    /// `[vocabulary, width]`.
    pub(super) fn output(&self) -> &Tensor {
        &self.output
    }

    fn attention(
        &self,
        number: usize,
        block: &Block,
        x: &Tensor,
        attention: &mut Attention,
    ) -> Result<Tensor, TchError> {
        let (batch, time, width) = x.size3()?;
        let heads = block.query_key_value.apply(x)?.f_view([batch, time, 3 * self.heads, self.head])?;
        // [batch, time, 3 heads, head] -> three of [batch, heads, time, head].
        let heads = heads.f_transpose(1, 2)?.f_chunk(3, 1)?;
        let mixed = attention.mix(number, &heads[0], &heads[1], &heads[2], None)?;
        block.attention_output.apply(&mixed.f_transpose(1, 2)?.f_reshape([batch, time, width])?)
    }

    /// With GELU in its tanh approximation (Hendrycks and Gimpel, arXiv 1606.08415, sec. 2).
    fn feed_forward(block: &Block, x: &Tensor) -> Result<Tensor, TchError> {
        block.narrow.apply(&block.widen.apply(x)?.f_gelu("tanh")?)
    }
}

impl Norm {
    /// LayerNorm (Ba et al., arXiv 1607.06450, eq. 4).
    fn apply(&self, x: &Tensor, epsilon: f64) -> Result<Tensor, TchError> {
        x.f_layer_norm(self.gain.size(), Some(&self.gain), Some(&self.bias), epsilon, true)
    }
}

impl Projection {
    fn apply(&self, x: &Tensor) -> Result<Tensor, TchError> {
        kernels::linear_input_first(x, &self.weight, &self.bias)
    }
}
