//! `fp32`: IEEE 754 binary32, little-endian, 4 bytes per value, in order. Exact.

use multiversion::multiversion;

use super::{DecodeError, DeltaCodec, MAGNITUDE, check_largest, check_length};

pub(super) struct Fp32;

impl DeltaCodec for Fp32 {
    fn encoded_bytes(&self, parameters: usize) -> usize {
        parameters * 4
    }

    fn block_parameters(&self) -> usize {
        1
    }

    fn encode(&self, values: &[f32], payload: &mut [u8]) {
        // On a little-endian machine the compiler makes one memcpy of this.
        for (bytes, value) in payload.as_chunks_mut::<4>().0.iter_mut().zip(values) {
            *bytes = value.to_le_bytes();
        }
    }

    fn decode(&self, payload: &[u8], values: &mut [f32]) -> Result<(), DecodeError> {
        check_length(payload, values.len() * 4)?;
        let largest = decode(payload, values);
        check_largest(largest, values)
    }
}

/// Gives the largest magnitude's bits.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+bmi2", "x86_64+avx2+bmi2"))]
fn decode(payload: &[u8], values: &mut [f32]) -> u32 {
    let mut largest = 0;
    for (value, bytes) in values.iter_mut().zip(payload.as_chunks::<4>().0) {
        let bits = u32::from_le_bytes(*bytes);
        largest = largest.max(bits & MAGNITUDE);
        *value = f32::from_bits(bits);
    }
    largest
}
