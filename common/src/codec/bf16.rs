//! `bf16`: the upper 16 bits of IEEE 754 binary32, rounded to nearest even, little-endian, 2 bytes per
//! value, in order. Relative error at most 2^-9 (half a unit in the last of 8 significant bits); what is
//! finite but rounds beyond the largest finite bf16, 3.39e38, becomes that, so that it stays finite.

use multiversion::multiversion;

use super::{DecodeError, DeltaCodec, INFINITY, MAGNITUDE, check_largest, check_length};

pub(super) struct Bf16;

impl DeltaCodec for Bf16 {
    fn encoded_bytes(&self, parameters: usize) -> usize {
        parameters * 2
    }

    fn block_parameters(&self) -> usize {
        1
    }

    fn encode(&self, values: &[f32], payload: &mut [u8]) {
        encode(values, payload);
    }

    fn decode(&self, payload: &[u8], values: &mut [f32]) -> Result<(), DecodeError> {
        check_length(payload, values.len() * 2)?;
        let largest = decode(payload, values);
        check_largest(largest, values)
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+bmi2", "x86_64+avx2+bmi2"))]
fn encode(values: &[f32], payload: &mut [u8]) {
    for (bytes, value) in payload.as_chunks_mut::<2>().0.iter_mut().zip(values) {
        *bytes = nearest(*value).to_le_bytes();
    }
}

/// Gives the largest magnitude's bits.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+bmi2", "x86_64+avx2+bmi2"))]
fn decode(payload: &[u8], values: &mut [f32]) -> u32 {
    let mut largest = 0;
    for (value, bytes) in values.iter_mut().zip(payload.as_chunks::<2>().0) {
        let bits = u32::from(u16::from_le_bytes(*bytes)) << 16;
        largest = largest.max(bits & MAGNITUDE);
        *value = f32::from_bits(bits);
    }
    largest
}

/// The nearest bf16, ties to even, at most the largest finite one; NaN and infinities stay what they are.
///
/// `half` has the same but branches on NaN, which keeps its loop from being vectorised.
#[inline(always)]
pub(super) fn nearest(value: f32) -> u16 {
    const LARGEST: u32 = 0x7f7f;
    const QUIET: u32 = 0x40;
    let (sign, magnitude) = ((value.to_bits() >> 16) & 0x8000, value.to_bits() & MAGNITUDE);
    let rounded = ((magnitude + 0x7fff + ((magnitude >> 16) & 1)) >> 16).min(LARGEST);
    let special = (magnitude >> 16) | if magnitude > INFINITY { QUIET } else { 0 };
    (sign | if magnitude < INFINITY { rounded } else { special }) as u16
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn rounding_is_that_of_half_but_for_saturation(bits in any::<u32>()) {
            let value = f32::from_bits(bits);
            let expected = half::bf16::from_f32(value);
            if value.is_finite() && expected.is_infinite() {
                prop_assert_eq!(nearest(value), half::bf16::MAX.to_bits() | expected.to_bits() & 0x8000);
            } else {
                prop_assert_eq!(nearest(value), expected.to_bits());
            }
        }
    }
}
