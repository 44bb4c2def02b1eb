//! `e3m0`: blocks of 128 values; a block is its scale, then 4 bits per value: the sign above, a 3-bit
//! exponent e below, no mantissa. The magnitude is 0 for e = 0, else scale * 2^(e - 7): a scale's
//! 1, 1/2, ... 1/64, or nothing. 66 bytes per block, 7.76 times less than fp32.
//!
//! The format is that in which Streaming DiLoCo sends its outer gradients: Douillard et al., arXiv 2501.18512,
//! on low-precision outer gradients. The scale per block is ours. It is the block's largest magnitude,
//! rounded to bf16 (see `scale.rs`); a value becomes the nearest that can be had, ties away from zero.
//! The error of a value is at most a third of its magnitude, and 1/128 of the scale for what is below 1/64 of
//! it. On Gaussian values the squared error is 3.7% of the square of the values.
//!
//! Code j of a block of n is in the lower half of byte j for j < h = ceil(n / 2), else in the upper half
//! of byte j - h. The last block has the values that are left; with an odd number of them its last upper half
//! is zero. The code 8, a negative zero, is refused.

use multiversion::multiversion;

use super::{
    DecodeError, DeltaCodec, Fault, INFINITY, MAGNITUDE,
    blocks::{self, Block},
    check_length, largest_magnitude, scale,
};

const BLOCK: usize = 128;
const BLOCK_BYTES: usize = scale::BYTES + BLOCK / 2;

/// 2^-7, below which of a scale a value becomes 0: half of the smallest magnitude.
const ZERO_BELOW: u32 = (127 - 7) << 23;

/// Exponent field of binary32 for the code e = 0.
const EXPONENT_OF_CODE_0: u32 = 127 - 7;

const NEGATIVE: u8 = 8;

pub(super) struct E3m0;

impl DeltaCodec for E3m0 {
    fn encoded_bytes(&self, parameters: usize) -> usize {
        // A whole block has an even number of values.
        parameters.div_ceil(BLOCK) * scale::BYTES + parameters.div_ceil(2)
    }

    fn block_parameters(&self) -> usize {
        BLOCK
    }

    fn encode(&self, values: &[f32], payload: &mut [u8]) {
        encode(values, payload);
    }

    fn decode(&self, payload: &[u8], values: &mut [f32]) -> Result<(), DecodeError> {
        check_length(payload, self.encoded_bytes(values.len()))?;
        decode(payload, values)
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+bmi2", "x86_64+avx2+bmi2"))]
fn encode(values: &[f32], payload: &mut [u8]) {
    blocks::encode(&mut E3m0, values, payload);
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+bmi2", "x86_64+avx2+bmi2"))]
fn decode(payload: &[u8], values: &mut [f32]) -> Result<(), DecodeError> {
    blocks::decode::<BLOCK, BLOCK_BYTES, E3m0>(payload, values)
}

impl Block<BLOCK, BLOCK_BYTES> for E3m0 {
    #[inline(always)]
    fn encode_block(&mut self, values: &[f32], bytes: &mut [u8]) {
        let (head, packed) = bytes.split_at_mut(scale::BYTES);
        let largest = largest_magnitude(values);
        if largest >= INFINITY {
            head.copy_from_slice(&scale::NOT_FINITE);
            return packed.fill(0);
        }
        let encoded = scale::nearest(f32::from_bits(largest));
        head.copy_from_slice(&encoded);
        let scale = scale::value(encoded);
        if scale == 0.0 {
            return packed.fill(0);
        }
        let mut codes = [0; BLOCK];
        for (code, value) in codes.iter_mut().zip(values) {
            let ratio = (value / scale).to_bits();
            let (negative, magnitude) = (ratio > MAGNITUDE, ratio & MAGNITUDE);
            // Half a mantissa more carries into the exponent from 1.5 * 2^e on: the nearest power of two.
            let exponent =
                ((magnitude + 0x0040_0000) >> 23).clamp(EXPONENT_OF_CODE_0 + 1, EXPONENT_OF_CODE_0 + 7);
            let kept = (exponent - EXPONENT_OF_CODE_0) as u8 | if negative { NEGATIVE } else { 0 };
            *code = if magnitude < ZERO_BELOW { 0 } else { kept };
        }
        blocks::pack::<2>(&codes[..packed.len() * 2], packed);
    }

    #[inline(always)]
    fn decode_block(bytes: &[u8], values: &mut [f32]) -> Result<(), Fault> {
        let (head, packed) = bytes.split_at(scale::BYTES);
        let scale = scale::read([head[0], head[1]], scale::LARGEST)?;
        let mut codes = [0; BLOCK];
        let codes = &mut codes[..packed.len() * 2];
        blocks::unpack::<2>(packed, codes);
        blocks::check_padding(&codes[values.len()..])?;
        let mut negative_zero = false;
        for (value, code) in values.iter_mut().zip(&*codes) {
            negative_zero |= *code == NEGATIVE;
            let (sign, exponent) = (u32::from(code & NEGATIVE) << 28, u32::from(code & 7));
            let power = if exponent == 0 { 0 } else { (exponent + EXPONENT_OF_CODE_0) << 23 };
            *value = f32::from_bits((f32::from_bits(power) * scale).to_bits() | sign);
        }
        if negative_zero { Err(Fault::Malformed("has a negative zero, which is not sent")) } else { Ok(()) }
    }
}
