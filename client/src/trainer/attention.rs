//! What positions attend to, for all architectures alike: those before them, in their whole sequence or in
//! their own document, and in generation also those whose keys and values were kept.
//!
//! The mask is made once per forward pass and shared by its blocks.

use tch::{Device, Kind, TchError, Tensor};

/// Attention in one forward pass.
pub(super) struct Attention<'a> {
    /// Positions before the first one of this pass.
    past: i64,
    /// Added to the scores, `[batch or 1, heads or 1, queries, keys]`: 0 or a bias where a query sees a key,
    /// else minus infinity. None: as `causal` says.
    mask: Option<Tensor>,
    /// Without a mask: whether query i sees the keys 0 to i, or all.
    causal: bool,
    cache: Option<&'a mut Cache>,
}

impl<'a> Attention<'a> {
    /// Every position sees itself and those before it.
    pub(super) fn causal() -> Self {
        Self { past: 0, mask: None, causal: true, cache: None }
    }

    /// Every position of `tokens`, `[batch, time]`, sees itself and those before it in its document (as
    /// in Llama 3, arXiv 2407.21783, section 3.2). An end-of-text token opens the document that follows it,
    /// as it does where text is generated without a prompt: the first token of a document is predicted from
    /// it alone, and every token is predicted.
    pub(super) fn within_documents(tokens: &Tensor, end_of_text: i64) -> Result<Self, TchError> {
        let document = tokens.f_eq(end_of_text)?.f_cumsum(1, Kind::Int)?;
        let same = document.f_unsqueeze(2)?.f_eq_tensor(&document.f_unsqueeze(1)?)?;
        let mask = blocked(&same.f_tril(0)?.f_logical_not()?)?.f_unsqueeze(1)?;
        Ok(Self { mask: Some(mask), causal: false, ..Self::causal() })
    }

    /// The `new` positions of this pass follow those in `cache`, see them too, and are added to them.
    pub(super) fn following(cache: &'a mut Cache, new: i64, device: Device) -> Result<Self, TchError> {
        let past = cache.length;
        cache.length += new;
        let mask = if past > 0 && new > 1 {
            let later = Tensor::f_ones([new, past + new], (Kind::Bool, device))?.f_triu(past + 1)?;
            Some(blocked(&later)?.f_view([1, 1, new, past + new])?)
        } else {
            None
        };
        Ok(Self { past, mask, causal: past == 0, cache: Some(cache) })
    }

    /// Positions before the first one of this pass.
    pub(super) fn past(&self) -> i64 {
        self.past
    }

    /// Adds `bias`, `[1, heads, queries, keys]` with minus infinity at keys that come after the query, to
    /// the scores of all blocks.
    pub(super) fn add_bias(&mut self, bias: Tensor) -> Result<(), TchError> {
        self.mask = Some(match &self.mask {
            Some(mask) => mask.f_add(&bias)?,
            None => bias,
        });
        self.causal = false;
        Ok(())
    }

    /// softmax(query key' x scale + mask) value, in the block of number `block`. `query` is `[batch, heads,
    /// time, head]`; `key` and `value` may have fewer heads, which then serve as many groups of the query's.
    /// Without a `scale`, it is 1 / sqrt(head).
    pub(super) fn mix(
        &mut self,
        block: usize,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        scale: Option<f64>,
    ) -> Result<Tensor, TchError> {
        let (mut key, mut value) = (key.shallow_clone(), value.shallow_clone());
        if let Some(cache) = &mut self.cache {
            (key, value) = cache.append(block, self.past, &key, &value)?;
        }
        if let Some(mask) = &mut self.mask
            && mask.kind() != query.kind()
        {
            *mask = mask.f_to_kind(query.kind())?;
        }
        let group = query.size4()?.1 / key.size4()?.1;
        if group > 1 && query.device().is_cuda() && (self.mask.is_some() || query.kind() == Kind::Float) {
            // Of the GPU's kernels that are spared the whole matrix of scores, the one that takes groups takes
            // neither a mask nor fp32.
            key = key.f_repeat_interleave_self_int(group, 1, None)?;
            value = value.f_repeat_interleave_self_int(group, 1, None)?;
        }
        Tensor::f_scaled_dot_product_attention(
            query,
            &key,
            &value,
            self.mask.as_ref(),
            /* dropout_p: */ 0.0,
            self.causal,
            scale,
            /* enable_gqa: */ group > 1,
        )
    }
}

/// Minus infinity where `mask` is true, else 0.
pub(super) fn blocked(mask: &Tensor) -> Result<Tensor, TchError> {
    let zeros = Tensor::f_zeros(mask.size(), (Kind::Float, mask.device()))?;
    zeros.f_masked_fill(mask, f64::NEG_INFINITY)
}

/// Keys and values of the positions so far, block by block.
#[derive(Default)]
pub(super) struct Cache {
    /// Positions that are kept.
    length: i64,
    /// Per block: keys and values, `[batch, heads, room, head]`, of which the first `length` are filled.
    blocks: Vec<[Tensor; 2]>,
}

/// Positions for which there is room at first; it doubles when it does not suffice.
const ROOM_MIN: i64 = 64;

impl Cache {
    /// Positions that are kept.
    pub(super) fn length(&self) -> i64 {
        self.length
    }

    /// Adds the keys and values of the positions from `past` on, and returns those of all positions.
    fn append(
        &mut self,
        block: usize,
        past: i64,
        key: &Tensor,
        value: &Tensor,
    ) -> Result<(Tensor, Tensor), TchError> {
        let (batch, heads, new, head) = key.size4()?;
        let needed = past + new;
        let grown = |kept: Option<&Tensor>| {
            let mut room = ROOM_MIN;
            while room < needed {
                room *= 2;
            }
            let grown = Tensor::f_empty([batch, heads, room, head], (key.kind(), key.device()))?;
            if let Some(kept) = kept {
                grown.f_narrow(2, 0, past)?.f_copy_(&kept.f_narrow(2, 0, past)?)?;
            }
            Ok::<_, TchError>(grown)
        };
        match self.blocks.get_mut(block) {
            None => self.blocks.push([grown(None)?, grown(None)?]),
            Some(kept) if kept[0].size4()?.2 < needed => {
                *kept = [grown(Some(&kept[0]))?, grown(Some(&kept[1]))?];
            }
            Some(_) => {}
        }
        let [keys, values] = &self.blocks[block];
        keys.f_narrow(2, past, new)?.f_copy_(key)?;
        values.f_narrow(2, past, new)?.f_copy_(value)?;
        Ok((keys.f_narrow(2, 0, needed)?, values.f_narrow(2, 0, needed)?))
    }
}
