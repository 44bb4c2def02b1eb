//! LLaMA (Touvron et al., arXiv 2302.13971) with grouped-query attention (Ainslie et al., arXiv
//! 2305.13245) and the scaled rotary positions of Llama 3.1, in the order of the forward pass. Computes what
//! Hugging Face's `LlamaForCausalLM` does.

use consort_common::model::LlamaConfig;
use tch::{Device, Kind, TchError, Tensor};

use super::{
    attention::Attention,
    error::{Doing, TrainerError},
    kernels,
    parameters::Parameters,
};

pub(super) struct Llama {
    /// Heads of the queries; of the keys, and as many of the values; width of each.
    queries: i64,
    keys: i64,
    head: i64,
    epsilon: f64,
    /// `[vocabulary, width]`.
    embedding: Tensor,
    rotary: Rotary,
    blocks: Vec<Block>,
    norm: Tensor,
    /// `[vocabulary, width]`; the same parameters as the embedding when tied.
    output: Tensor,
}

struct Block {
    attention_norm: Tensor,
    /// `[(queries + 2 keys) x head, width]`: lying next to each other, the three projections are one matrix.
    query_key_value: Projection,
    attention_output: Projection,
    feed_forward_norm: Tensor,
    /// `[2 inner, width]`.
    gate_up: Projection,
    down: Projection,
}

struct Projection {
    /// `[out, in]`.
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Llama {
    pub(super) fn new(
        config: &LlamaConfig,
        parameters: &Parameters,
        device: Device,
    ) -> Result<Self, TrainerError> {
        let embedding = parameters.leaf("model.embed_tokens.weight")?;
        let block = |layer| {
            let leaf = |name: &str| parameters.leaf(&format!("model.layers.{layer}.{name}.weight"));
            let projection = |parts: &[&str], has_bias: bool| {
                let joined = |kind: &str| {
                    let names: Vec<String> =
                        parts.iter().map(|part| format!("model.layers.{layer}.{part}.{kind}")).collect();
                    parameters.factor(&names.iter().map(String::as_str).collect::<Vec<_>>())
                };
                let bias = has_bias.then(|| joined("bias")).transpose()?;
                Ok::<_, TrainerError>(Projection { weight: joined("weight")?, bias })
            };
            let query_key_value = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];
            Ok(Block {
                attention_norm: leaf("input_layernorm")?,
                query_key_value: projection(&query_key_value, config.attention_bias)?,
                attention_output: projection(&["self_attn.o_proj"], config.attention_bias)?,
                feed_forward_norm: leaf("post_attention_layernorm")?,
                gate_up: projection(&["mlp.gate_proj", "mlp.up_proj"], config.mlp_bias)?,
                down: projection(&["mlp.down_proj"], config.mlp_bias)?,
            })
        };
        let output = if config.tie_word_embeddings { "model.embed_tokens.weight" } else { "lm_head.weight" };
        Ok(Self {
            queries: config.num_attention_heads as i64,
            keys: config.num_key_value_heads as i64,
            head: config.head_dim() as i64,
            epsilon: config.rms_norm_eps,
            embedding,
            rotary: Rotary::new(config, device).doing("computing the rotary positions")?,
            blocks: (0..config.num_hidden_layers).map(block).collect::<Result<_, TrainerError>>()?,
            norm: parameters.leaf("model.norm.weight")?,
            output: parameters.factor(&[output])?,
        })
    }

    /// Tokens `[batch, time]` to what the output projection takes, `[batch, time, width]`.
    pub(super) fn hidden(&self, tokens: &Tensor, attention: &mut Attention) -> Result<Tensor, TchError> {
        let mut x = kernels::embedding(&self.embedding, tokens)?;
        for (number, block) in self.blocks.iter().enumerate() {
            let normed = self.rms_norm(&x, &block.attention_norm)?;
            x = x.f_add(&self.attention(number, block, &normed, attention)?)?;
            x = x.f_add(&Self::feed_forward(block, &self.rms_norm(&x, &block.feed_forward_norm)?)?)?;
        }
        self.rms_norm(&x, &self.norm)
    }

    /// `[vocabulary, width]`.
    pub(super) fn output(&self) -> &Tensor {
        &self.output
    }

    /// x / sqrt(mean(x^2) + epsilon) x gain (Zhang and Sennrich, arXiv 1910.07467, eq. 4).
    fn rms_norm(&self, x: &Tensor, gain: &Tensor) -> Result<Tensor, TchError> {
        x.f_rms_norm(gain.size(), Some(gain), self.epsilon)
    }

    fn attention(
        &self,
        number: usize,
        block: &Block,
        x: &Tensor,
        attention: &mut Attention,
    ) -> Result<Tensor, TchError> {
        let (batch, time, _) = x.size3()?;
        let heads = [batch, time, self.queries + 2 * self.keys, self.head];
        let heads = block.query_key_value.apply(x)?.f_view(heads)?;
        let turned = self.rotary.turn(&heads.f_narrow(2, 0, self.queries + self.keys)?, attention.past())?;
        // [batch, time, heads, head] -> [batch, heads, time, head].
        let query = turned.f_narrow(2, 0, self.queries)?.f_transpose(1, 2)?;
        let key = turned.f_narrow(2, self.queries, self.keys)?.f_transpose(1, 2)?;
        let value = heads.f_narrow(2, self.queries + self.keys, self.keys)?.f_transpose(1, 2)?;
        let mixed = attention.mix(number, &query, &key, &value, None)?;
        let mixed = mixed.f_transpose(1, 2)?.f_reshape([batch, time, self.queries * self.head])?;
        block.attention_output.apply(&mixed)
    }

    /// SwiGLU (Shazeer, arXiv 2002.05202, eq. 6): down(silu(gate(x)) x up(x)).
    fn feed_forward(block: &Block, x: &Tensor) -> Result<Tensor, TchError> {
        let both = block.gate_up.apply(x)?.f_chunk(2, -1)?;
        block.down.apply(&both[0].f_silu()?.f_mul(&both[1])?)
    }
}

impl Projection {
    fn apply(&self, x: &Tensor) -> Result<Tensor, TchError> {
        kernels::linear(x, &self.weight, self.bias.as_ref())
    }
}

/// Radians per position of each pair of components: base^(-2 i / head) for pair i (Su et al., arXiv 2104.09864,
/// section 3.2.2), stretched as the configuration says. The power is libtorch's in f32, as in `transformers`: the
/// exponent's rounding alone is some ulps of the frequency, and a position of 100,000 turns an ulp into some
/// thousandths of a radian.
#[allow(clippy::cast_possible_truncation)]
fn frequencies(config: &LlamaConfig) -> Result<Vec<f32>, TchError> {
    let half = (config.head_dim() / 2) as i64;
    let even = Tensor::f_arange(half, (Kind::Float, Device::Cpu))?.f_mul_scalar(2.0)?;
    let exponents = even.f_div_scalar(config.head_dim() as i64)?;
    let powers = Tensor::f_pow_scalar(config.rope_theta, &exponents)?;
    let mut frequencies = Vec::<f32>::try_from(powers.f_reciprocal()?)?;
    if let Some(scaling) = &config.rope_scaling {
        for frequency in &mut frequencies {
            *frequency = scaling.scaled(f64::from(*frequency)) as f32;
        }
    }
    Ok(frequencies)
}

/// Rotary position embedding (Su et al., arXiv 2104.09864, eq. 34) in Hugging Face's convention, which pairs
/// component i with component i + head/2: x cos + rotate_half(x) sin, where rotate_half(a | b) = (-b | a).
struct Rotary {
    /// `[context, 1, head]`.
    cosines: Tensor,
    /// `[context, 1, head]`, negated in the first half: so the halves need only be swapped.
    sines: Tensor,
    half: i64,
}

impl Rotary {
    /// Frequencies and angles are computed in f32, as there: in f64 they would differ from it by more than an ulp
    /// in long contexts.
    #[allow(clippy::cast_possible_truncation, clippy::cast_precision_loss)]
    fn new(config: &LlamaConfig, device: Device) -> Result<Self, TchError> {
        let (context, head) = (config.max_position_embeddings, config.head_dim());
        let half = head / 2;
        let frequencies = frequencies(config)?;
        let angle =
            |position: usize, component: usize| f64::from(position as f32 * frequencies[component % half]);
        let table = |value: &dyn Fn(usize, usize) -> f64| {
            let values =
                (0..context).flat_map(|position| (0..head).map(move |component| (position, component)));
            let values: Vec<f32> =
                values.map(|(position, component)| value(position, component) as f32).collect();
            Tensor::f_from_slice(&values)?.f_view([context as i64, 1, head as i64])?.f_to_device(device)
        };
        let cosines = table(&|position, component| angle(position, component).cos())?;
        let sines = table(&|position, component| {
            let sine = angle(position, component).sin();
            if component < half { -sine } else { sine }
        })?;
        Ok(Self { cosines, sines, half: half as i64 })
    }

    /// `[batch, time, heads, head]`, whose first position is `first`.
    fn turn(&self, x: &Tensor, first: i64) -> Result<Tensor, TchError> {
        let (_, time, _, _) = x.size4()?;
        let swapped = x.f_roll([self.half], [-1])?;
        let turned = x.f_mul(&self.cosines.f_narrow(0, first, time)?)?;
        turned.f_addcmul(&swapped, &self.sines.f_narrow(0, first, time)?)?.f_to_kind(x.kind())
    }
}

#[cfg(test)]
mod tests {
    use consort_common::model::RopeScaling;

    use super::*;

    /// 1.0 / 500000.0 ** (torch.arange(0, 96, 2).float() / 96), as `transformers` has it. In f64 some of these are
    /// 4 ulps away.
    const FREQUENCIES: [(usize, u32); 7] = [
        (0, 0x3f80_0000),
        (1, 0x3f42_c3e5),
        (26, 0x3a56_958d),
        (28, 0x39f8_6938),
        (34, 0x38c0_b0b1),
        (41, 0x3763_6e53),
        (47, 0x3630_6a88),
    ];

    #[test]
    fn frequencies_are_those_of_transformers_to_an_ulp_so_that_long_contexts_are_too() {
        let config = LlamaConfig { head_dim: Some(96), rope_theta: 5e5, ..LlamaConfig::default() };
        let found = frequencies(&config).unwrap();
        assert_eq!(found.len(), 48);
        for (pair, bits) in FREQUENCIES {
            assert!(found[pair].to_bits().abs_diff(bits) <= 1, "{pair}: {:#x}", found[pair].to_bits());
        }
        let scaling = Some(RopeScaling { factor: 8.0, ..RopeScaling::default() });
        let stretched = frequencies(&LlamaConfig { rope_scaling: scaling, ..config }).unwrap();
        assert_eq!(stretched[0].to_bits(), found[0].to_bits(), "a fast rotation stays");
        assert_eq!((8.0 * stretched[47]).to_bits(), found[47].to_bits(), "a slow one is divided");
    }
}
