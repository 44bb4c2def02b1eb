//! Delta encodings: how a chunk of fp32 values travels. One file per encoding, one trait, one table.

mod bf16;
mod fp32;
mod model;

use serde::{Deserialize, Serialize};

pub use self::model::{ModelEncoding, UnknownModelEncoding};

/// Encodes and decodes one chunk. Implementations keep no state and allocate nothing per chunk.
pub trait DeltaCodec: Send + Sync {
    /// Bytes that `parameters` values take, whatever they are: every encoding has a fixed rate, so that a
    /// payload of another length is refused unread and a chunk's place in a file is known.
    fn encoded_bytes(&self, parameters: usize) -> usize;

    /// Encodes `values` into `payload`, which has exactly [`DeltaCodec::encoded_bytes`] bytes.
    fn encode(&self, values: &[f32], payload: &mut [u8]);

    /// Decodes `payload` into `values`, which has the chunk's length.
    ///
    /// # Errors
    /// If the payload is not an encoding of exactly `values.len()` finite values; `values` is then
    /// unspecified.
    fn decode(&self, payload: &[u8], values: &mut [f32]) -> Result<(), DecodeError>;
}

/// Why a payload could not be decoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The payload's length does not fit the chunk.
    #[error("the payload has {actual} bytes where the chunk's encoding takes {expected}")]
    Length {
        /// Bytes that the chunk takes.
        expected: usize,
        /// Bytes received.
        actual: usize,
    },
    /// A value is NaN or infinite.
    #[error(
        "value {position} of the chunk is {value}: a delta must be finite; the local training diverged or its memory is faulty"
    )]
    NotFinite {
        /// Position in the chunk.
        position: usize,
        /// "NaN", "inf" or "-inf".
        value: String,
    },
}

/// The encodings by name, as the run specification chooses them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Encoding {
    /// Four bytes per value, exact.
    #[default]
    Fp32,
    /// Two bytes per value: the upper half of fp32, rounded to nearest even.
    Bf16,
}

impl Encoding {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Fp32, Self::Bf16];

    /// The name in specifications and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Bf16 => "bf16",
        }
    }

    /// The encoding of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|encoding| encoding.name() == name)
    }

    /// What is left of the error of the last round when the next one is encoded, for encodings that lose so
    /// much that it must not be lost: the sender encodes `delta + decay * error` and keeps what the encoding
    /// dropped of that. None: errors are forgotten.
    pub fn error_feedback_decay(self) -> Option<f32> {
        match self {
            Self::Fp32 | Self::Bf16 => None,
        }
    }

    /// The encoding of `values` in a vector of its own.
    pub fn encode(self, values: &[f32]) -> Vec<u8> {
        let mut payload = vec![0; self.codec().encoded_bytes(values.len())];
        self.codec().encode(values, &mut payload);
        payload
    }

    /// The implementation.
    pub fn codec(self) -> &'static dyn DeltaCodec {
        match self {
            Self::Fp32 => &fp32::Fp32,
            Self::Bf16 => &bf16::Bf16,
        }
    }
}

/// Refuses NaN and infinities, naming the first.
fn check_finite(values: &[f32]) -> Result<(), DecodeError> {
    // A whole pass without branches vectorises; the position is looked for only when there is one.
    if values.iter().fold(true, |finite, value| finite & value.is_finite()) {
        return Ok(());
    }
    let position = values.iter().position(|value| !value.is_finite()).unwrap_or_default();
    Err(DecodeError::NotFinite { position, value: values[position].to_string() })
}

fn check_length(payload: &[u8], expected: usize) -> Result<(), DecodeError> {
    if payload.len() == expected {
        Ok(())
    } else {
        Err(DecodeError::Length { expected, actual: payload.len() })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn round_trip(encoding: Encoding, values: &[f32]) -> Vec<f32> {
        let payload = encoding.encode(values);
        let mut decoded = vec![f32::NAN; values.len()];
        encoding.codec().decode(&payload, &mut decoded).unwrap();
        decoded
    }

    proptest! {
        #[test]
        fn fp32_is_exact(values in prop::collection::vec(-1e30f32..1e30, 0..300)) {
            prop_assert_eq!(round_trip(Encoding::Fp32, &values), values);
        }

        #[test]
        fn bf16_is_within_half_a_unit_in_the_last_place(values in prop::collection::vec(-1e30f32..1e30, 0..300)) {
            for (decoded, value) in round_trip(Encoding::Bf16, &values).iter().zip(&values) {
                prop_assert!((decoded - value).abs() <= value.abs() / 256.0 + f32::MIN_POSITIVE);
            }
        }

        #[test]
        fn any_bytes_decode_to_finite_values_or_an_error(payload in prop::collection::vec(any::<u8>(), 0..600), length in 0usize..200) {
            for encoding in Encoding::ALL {
                let mut values = vec![0.0; length];
                if encoding.codec().decode(&payload, &mut values).is_ok() {
                    prop_assert!(values.iter().all(|value| value.is_finite()));
                }
            }
        }
    }

    #[test]
    fn values_that_are_not_finite_are_refused() {
        for encoding in Encoding::ALL {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let payload = encoding.encode(&[0.0, 1.0, bad, 2.0]);
                let error = encoding.codec().decode(&payload, &mut [0.0; 4]).unwrap_err();
                assert!(matches!(error, DecodeError::NotFinite { position: 2, .. }), "{error}");
            }
        }
    }

    #[test]
    fn names_are_those_of_the_specification() {
        for encoding in Encoding::ALL {
            assert_eq!(serde_json::to_value(encoding).unwrap(), encoding.name());
        }
    }
}
