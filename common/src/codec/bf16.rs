//! `bf16`: the upper 16 bits of IEEE 754 binary32, rounded to nearest even, little-endian, 2 bytes per
//! value, in order. Relative error at most 2^-9 (half a unit in the last of 8 significant bits).

use half::bf16;

use super::{DecodeError, DeltaCodec, check_finite, check_length};

pub(super) struct Bf16;

impl DeltaCodec for Bf16 {
    fn encoded_bytes(&self, parameters: usize) -> usize {
        parameters * 2
    }

    fn encode(&self, values: &[f32], payload: &mut [u8]) {
        for (bytes, value) in payload.chunks_exact_mut(2).zip(values) {
            bytes.copy_from_slice(&bf16::from_f32(*value).to_le_bytes());
        }
    }

    fn decode(&self, payload: &[u8], values: &mut [f32]) -> Result<(), DecodeError> {
        check_length(payload, values.len() * 2)?;
        for (value, bytes) in values.iter_mut().zip(payload.chunks_exact(2)) {
            *value = bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
        }
        check_finite(values)
    }
}
