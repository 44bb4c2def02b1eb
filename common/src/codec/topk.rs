//! `topk`: of each block of 4096 values the 64 largest by magnitude, everything else zero. A block is two
//! magnitudes, low and high (bf16, see `scale.rs`), then the positions of the values kept, ascending, 12
//! bits each, then 2 bits for each of them: the sign above, whether the magnitude is the high one below.
//! 116 bytes per block, 141 times less than fp32.
//!
//! This is the payload of SparseLoCo: Sarfi et al., "Communication Efficient LLM Pre-training with
//! SparseLoCo", arXiv 2508.15706: top-k in blocks, 12 bits for a position, 2 bits for a value, error
//! feedback (`feedback.rs`) with a decay of 0.95. Of equal magnitudes the one at the lower position is kept.
//!
//! The values kept are far from zero, half of them below it: their distribution has a hole in the middle, and
//! four bins of the signed values, even ones or with as many values each, waste cuts on it. So the two bits are
//! the sign and one of two magnitudes, found as `split.rs` says. Squared error of the values kept over their
//! square, bins with their means (`signs_and_two_magnitudes_lose_less_than_four_bins`):
//!
//! | values | bins of as many values | even bins | this |
//! |---|---|---|---|
//! | Gaussian | 0.106 | 0.0115 | 0.0036 |
//! | Laplace | 0.113 | 0.0245 | 0.0107 |
//! | Student's t, 3 degrees of freedom | 0.193 | 0.0691 | 0.0618 |
//!
//! The last block has the n values that are left, of which ceil(n / 64) are kept. Bit streams begin at the
//! lowest bit of a byte; the positions end with a whole byte, the codes too, filled up with zeros.

use multiversion::multiversion;

use super::{
    DecodeError, DeltaCodec, Fault, INFINITY, MAGNITUDE,
    blocks::{self, Block},
    check_length, scale,
    split::{Split, split},
};

const BLOCK: usize = 4096;
/// Of how many values one is kept.
const KEPT_ONE_IN: usize = 64;
const KEPT: usize = BLOCK / KEPT_ONE_IN;
const HEAD_BYTES: usize = 2 * scale::BYTES;
const BLOCK_BYTES: usize = block_bytes(BLOCK);

/// What stays of an error from one round to the next (SparseLoCo).
pub(super) const ERROR_DECAY: f32 = 0.95;

const HIGH: u8 = 1;
const NEGATIVE: u8 = 2;

const fn block_bytes(parameters: usize) -> usize {
    let kept = parameters.div_ceil(KEPT_ONE_IN);
    HEAD_BYTES + (kept * 12).div_ceil(8) + (kept * 2).div_ceil(8)
}

pub(super) struct TopK;

impl DeltaCodec for TopK {
    fn encoded_bytes(&self, parameters: usize) -> usize {
        let left = parameters % BLOCK;
        parameters / BLOCK * BLOCK_BYTES + if left == 0 { 0 } else { block_bytes(left) }
    }

    fn block_parameters(&self) -> usize {
        BLOCK
    }

    fn encode(&self, values: &[f32], payload: &mut [u8]) {
        encode(values, payload);
    }

    fn decode(&self, payload: &[u8], values: &mut [f32]) -> Result<(), DecodeError> {
        check_length(payload, self.encoded_bytes(values.len()))?;
        blocks::decode::<BLOCK, BLOCK_BYTES, Selection>(payload, values)
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+bmi2", "x86_64+avx2+bmi2"))]
fn encode(values: &[f32], payload: &mut [u8]) {
    blocks::encode(&mut Selection { candidates: [0; BLOCK], order: [0; BLOCK] }, values, payload);
}

/// Vectors of the selection, 64 KiB on the stack, made once per chunk.
struct Selection {
    candidates: [u64; BLOCK],
    order: [u64; BLOCK],
}

impl Block<BLOCK, BLOCK_BYTES> for Selection {
    #[inline(always)]
    fn encode_block(&mut self, values: &[f32], bytes: &mut [u8]) {
        let kept = values.len().div_ceil(KEPT_ONE_IN);
        let (head, packed) = bytes.split_at_mut(HEAD_BYTES);
        let (positions, codes) = packed.split_at_mut((kept * 12).div_ceil(8));
        let mut selected = [0; KEPT];
        let selected = &mut selected[..kept];
        if !self.select(values, selected) {
            positions.fill(0);
            codes.fill(0);
            head[..scale::BYTES].copy_from_slice(&scale::NOT_FINITE);
            return head[scale::BYTES..].copy_from_slice(&scale::NOT_FINITE);
        }

        let mut magnitudes = [0.0; KEPT];
        for (magnitude, position) in magnitudes.iter_mut().zip(&*selected) {
            *magnitude = values[usize::from(*position)].abs();
        }
        let Split { threshold, scales } = split(&magnitudes, kept);
        head[..scale::BYTES].copy_from_slice(&scales[0]);
        head[scale::BYTES..].copy_from_slice(&scales[1]);
        for (bytes, pair) in positions.chunks_mut(3).zip(selected.chunks(2)) {
            let both = u32::from(pair[0]) | u32::from(pair.get(1).copied().unwrap_or_default()) << 12;
            bytes.copy_from_slice(&both.to_le_bytes()[..bytes.len()]);
        }
        for (byte, (positions, magnitudes)) in
            codes.iter_mut().zip(selected.chunks(4).zip(magnitudes.chunks(4)))
        {
            *byte = 0;
            for (at, (position, magnitude)) in positions.iter().zip(magnitudes).enumerate() {
                let code = if *magnitude > threshold { HIGH } else { 0 }
                    | if values[usize::from(*position)] < 0.0 { NEGATIVE } else { 0 };
                *byte |= code << (2 * at);
            }
        }
    }

    #[inline(always)]
    fn decode_block(bytes: &[u8], values: &mut [f32]) -> Result<(), Fault> {
        let kept = values.len().div_ceil(KEPT_ONE_IN);
        let (head, packed) = bytes.split_at(HEAD_BYTES);
        let low = scale::read([head[0], head[1]], scale::LARGEST)?.to_bits();
        let high = scale::read([head[2], head[3]], scale::LARGEST)?.to_bits();
        let (positions, codes) = packed.split_at((kept * 12).div_ceil(8));
        values.fill(0.0);
        let mut least = 0;
        for at in 0..kept {
            let (byte, odd) = (at / 2 * 3, at % 2 == 1);
            let position = if odd {
                u16::from(positions[byte + 1]) >> 4 | u16::from(positions[byte + 2]) << 4
            } else {
                u16::from(positions[byte]) | u16::from(positions[byte + 1] & 15) << 8
            };
            let position = usize::from(position);
            if position < least {
                return Err(Fault::Malformed("has positions that do not ascend"));
            }
            let Some(value) = values.get_mut(position) else {
                return Err(Fault::Malformed("has a position beyond its values"));
            };
            least = position + 1;
            let code = codes[at / 4] >> (2 * (at % 4));
            let magnitude = if code & HIGH == 0 { low } else { high };
            *value = f32::from_bits(magnitude | u32::from(code & NEGATIVE) << 30);
        }
        let position_padding = if kept % 2 == 1 { positions[positions.len() - 1] >> 4 } else { 0 };
        let code_padding =
            if kept.is_multiple_of(4) { 0 } else { codes[codes.len() - 1] >> (2 * (kept % 4)) };
        blocks::check_padding(&[position_padding, code_padding])
    }
}

impl Selection {
    /// Puts the positions of the `selected.len()` largest magnitudes of a block into `selected`, ascending; false
    /// if a value is not finite.
    ///
    /// Three passes: the maxima of 128 groups, of which the k-th largest bounds the k-th largest of all from
    /// below, as k groups have a value that large; the few values from that bound on; the k-th largest among
    /// them. So a full selection runs over some hundred values instead of 4096, unless many are equal.
    #[inline(always)]
    fn select(&mut self, values: &[f32], selected: &mut [u16]) -> bool {
        const GROUPS: usize = 128;
        const POSITION_BITS: u32 = BLOCK.trailing_zeros();
        let mut maxima = [0; GROUPS];
        for values in values.chunks(GROUPS) {
            for (maximum, value) in maxima.iter_mut().zip(values) {
                *maximum = (*maximum).max(value.to_bits() & MAGNITUDE);
            }
        }
        let largest = maxima.iter().fold(0, |largest: u32, maximum| largest.max(*maximum));
        if largest >= INFINITY {
            return false;
        }
        let (_, bound, _) = maxima.select_nth_unstable(GROUPS - selected.len());
        let bound = *bound;

        // A candidate orders by magnitude, then by position, the lower one first: no two are equal.
        let mut count = 0;
        for (position, value) in values.iter().enumerate() {
            let magnitude = value.to_bits() & MAGNITUDE;
            // Written always, counted if it is one: a branch would be missed too often. The count is at most the
            // position, so the remainder changes nothing but the compiler's mind about a check.
            self.candidates[count % BLOCK] =
                u64::from(magnitude) << POSITION_BITS | (BLOCK - 1 - position) as u64;
            count += usize::from(magnitude >= bound);
        }
        let (candidates, order) = (&self.candidates[..count], &mut self.order[..count]);
        order.copy_from_slice(candidates);
        let (_, least, _) = order.select_nth_unstable(count - selected.len());
        let least = *least;
        let chosen = candidates.iter().filter(|candidate| **candidate >= least);
        for (selected, candidate) in selected.iter_mut().zip(chosen) {
            *selected = (BLOCK - 1) as u16 - (candidate % BLOCK as u64) as u16;
        }
        true
    }
}
