//! `fp32`: IEEE 754 binary32, little-endian, 4 bytes per value, in order. Exact.

use super::{DecodeError, DeltaCodec, check_finite, check_length};

pub(super) struct Fp32;

impl DeltaCodec for Fp32 {
    fn encoded_bytes(&self, parameters: usize) -> usize {
        parameters * 4
    }

    fn encode(&self, values: &[f32], payload: &mut [u8]) {
        for (bytes, value) in payload.chunks_exact_mut(4).zip(values) {
            bytes.copy_from_slice(&value.to_le_bytes());
        }
    }

    fn decode(&self, payload: &[u8], values: &mut [f32]) -> Result<(), DecodeError> {
        check_length(payload, values.len() * 4)?;
        for (value, bytes) in values.iter_mut().zip(payload.chunks_exact(4)) {
            *value = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        check_finite(values)
    }
}
