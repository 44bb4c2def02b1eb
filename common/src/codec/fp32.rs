//! `fp32`: IEEE 754 binary32, little-endian, 4 bytes per value, in order. Exact.

use super::{DecodeError, DeltaCodec, check_finite, check_length};

pub(super) struct Fp32;

impl DeltaCodec for Fp32 {
    fn encoded_bytes_max(&self, parameters: usize) -> usize {
        parameters * 4
    }

    fn encode(&self, values: &[f32], out: &mut Vec<u8>) {
        out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    }

    fn decode(&self, payload: &[u8], values: &mut [f32]) -> Result<(), DecodeError> {
        check_length(payload, values.len() * 4)?;
        for (value, bytes) in values.iter_mut().zip(payload.chunks_exact(4)) {
            *value = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        check_finite(values)
    }
}
