//! `int8`: blocks of 64 values; a block is its scale, then one byte per value, two's complement, -127 to 127:
//! value = code * scale. 66 bytes per block, 3.88 times less than fp32.
//!
//! The scale (bf16, see `scale.rs`) is the largest magnitude of the block divided by 127, rounded up;
//! the code is the value divided by the scale, rounded to nearest even. The error of a value is at most half
//! a scale: the largest magnitude times 1/254, and 1/128 of that again at most for the scale's rounding up.
//! A scale is at most what leaves 127 times itself finite, so the codes of magnitudes beyond 3.4026e38
//! saturate, far within that error. The last block has the values that are left: its scale, then a byte for
//! each. Absmax in blocks is the common form: Dettmers et al., "8-bit Optimizers via Block-wise
//! Quantization", arXiv 2110.02861.

use multiversion::multiversion;

use super::{
    DecodeError, DeltaCodec, Fault, INFINITY,
    blocks::{self, Block},
    check_length, largest_magnitude, scale,
};

const BLOCK: usize = 64;
const BLOCK_BYTES: usize = scale::BYTES + BLOCK;

const LARGEST_CODE: f32 = 127.0;

/// The largest scale that leaves 127 times itself finite.
const LARGEST_SCALE: f32 = f32::from_bits((f32::MAX / LARGEST_CODE).to_bits() & 0xffff_0000);

/// Added to a value of at most 2^22, it leaves the nearest integer, ties to even, in the lowest bits: 1.5 * 2^23.
const TO_INTEGER: f32 = 12_582_912.0;

pub(super) struct Int8;

impl DeltaCodec for Int8 {
    fn encoded_bytes(&self, parameters: usize) -> usize {
        parameters.div_ceil(BLOCK) * scale::BYTES + parameters
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
    blocks::encode(&mut Int8, values, payload);
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+bmi2", "x86_64+avx2+bmi2"))]
fn decode(payload: &[u8], values: &mut [f32]) -> Result<(), DecodeError> {
    blocks::decode::<BLOCK, BLOCK_BYTES, Int8>(payload, values)
}

impl Block<BLOCK, BLOCK_BYTES> for Int8 {
    #[inline(always)]
    fn encode_block(&mut self, values: &[f32], bytes: &mut [u8]) {
        let (head, codes) = bytes.split_at_mut(scale::BYTES);
        let largest = largest_magnitude(values);
        if largest >= INFINITY {
            head.copy_from_slice(&scale::NOT_FINITE);
            return codes.fill(0);
        }
        let encoded = scale::not_below(f32::from_bits(largest) / LARGEST_CODE, LARGEST_SCALE);
        head.copy_from_slice(&encoded);
        let scale = scale::value(encoded);
        if scale == 0.0 {
            return codes.fill(0);
        }
        for (code, value) in codes.iter_mut().zip(values) {
            // A division, not a multiplication by 1 / scale, which is infinite for the smallest scales.
            let code_exact = (value / scale).clamp(-LARGEST_CODE, LARGEST_CODE);
            *code = (code_exact + TO_INTEGER).to_bits() as u8;
        }
    }

    #[inline(always)]
    fn decode_block(bytes: &[u8], values: &mut [f32]) -> Result<(), Fault> {
        let (head, codes) = bytes.split_at(scale::BYTES);
        let scale = scale::read([head[0], head[1]], LARGEST_SCALE)?;
        let mut smallest = 0;
        for (value, code) in values.iter_mut().zip(codes) {
            let code = code.cast_signed();
            smallest = smallest.min(code);
            *value = f32::from(code) * scale;
        }
        if smallest == i8::MIN {
            Err(Fault::Malformed("has the code -128, which no value has"))
        } else {
            Ok(())
        }
    }
}
