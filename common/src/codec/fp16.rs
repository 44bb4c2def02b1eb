//! `fp16`: IEEE 754 binary16, rounded to nearest even, little-endian, 2 bytes per value, in order.
//!
//! Relative error at most 2^-11 (half a unit in the last of 11 significant bits) for magnitudes from
//! 2^-14 = 6.1e-5 to 65504; below, absolute error at most 2^-25 = 3.0e-8 (subnormals). A finite value beyond
//! 65504 becomes 65504 with its sign, so that a finite delta stays finite. Deltas are small: where most
//! values are below 1e-5, bf16 keeps more of them.

use half::{f16, slice::HalfFloatSliceExt};
use multiversion::multiversion;

use super::{DecodeError, DeltaCodec, INFINITY, MAGNITUDE, check_largest, check_length, largest_magnitude};

/// Values converted at a time, on the stack.
const TILE: usize = 1024;

pub(super) struct Fp16;

impl DeltaCodec for Fp16 {
    fn encoded_bytes(&self, parameters: usize) -> usize {
        parameters * 2
    }

    fn block_parameters(&self) -> usize {
        1
    }

    fn encode(&self, values: &[f32], payload: &mut [u8]) {
        let (mut saturated, mut halves) = ([0.0; TILE], [f16::ZERO; TILE]);
        for (values, payload) in values.chunks(TILE).zip(payload.chunks_mut(TILE * 2)) {
            let (saturated, halves) = (&mut saturated[..values.len()], &mut halves[..values.len()]);
            saturate(values, saturated);
            // With the processor's instructions where it has them.
            halves.convert_from_f32_slice(saturated);
            for (bytes, half) in payload.as_chunks_mut::<2>().0.iter_mut().zip(&*halves) {
                *bytes = half.to_le_bytes();
            }
        }
    }

    fn decode(&self, payload: &[u8], values: &mut [f32]) -> Result<(), DecodeError> {
        check_length(payload, values.len() * 2)?;
        let (mut halves, mut largest) = ([f16::ZERO; TILE], 0);
        for (values, payload) in values.chunks_mut(TILE).zip(payload.chunks(TILE * 2)) {
            let halves = &mut halves[..values.len()];
            for (half, bytes) in halves.iter_mut().zip(payload.as_chunks::<2>().0) {
                *half = f16::from_le_bytes(*bytes);
            }
            halves.convert_to_f32_slice(values);
            largest = largest.max(largest_of(values));
        }
        check_largest(largest, values)
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+bmi2", "x86_64+avx2+bmi2"))]
fn saturate(values: &[f32], saturated: &mut [f32]) {
    let most = f16::MAX.to_f32_const().to_bits();
    for (saturated, value) in saturated.iter_mut().zip(values) {
        let (sign, magnitude) = (value.to_bits() & !MAGNITUDE, value.to_bits() & MAGNITUDE);
        let limit = if magnitude < INFINITY { most } else { u32::MAX };
        *saturated = f32::from_bits(sign | magnitude.min(limit));
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+bmi2", "x86_64+avx2+bmi2"))]
fn largest_of(values: &[f32]) -> u32 {
    largest_magnitude(values)
}
