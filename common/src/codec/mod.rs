//! Delta encodings: how a chunk of fp32 values travels. One file per encoding, one trait, one table.
//!
//! Every encoding has a fixed rate and gives the same bytes for the same values on every machine, whatever
//! its vectors: nothing depends on an order that the compiler or the processor chooses. The values of every
//! payload that decodes are finite. What an encoding loses is the business of `feedback.rs`; this module
//! keeps no state.

mod bf16;
mod blocks;
mod e3m0;
mod feedback;
mod fp16;
mod fp32;
mod int8;
mod model;
mod scale;
mod split;
#[cfg(test)]
mod tests;
mod topk;
mod two_bit;

use serde::{Deserialize, Serialize};

pub use self::{
    feedback::{TILE_PARAMETERS, encode_with_feedback},
    model::{ModelEncoding, UnknownModelEncoding},
};

/// Encodes and decodes one chunk. Implementations keep no state and allocate nothing per chunk.
pub trait DeltaCodec: Send + Sync {
    /// Bytes that `parameters` values take, whatever they are: every encoding has a fixed rate, so that a
    /// payload of another length is refused unread and a chunk's place in a file is known.
    fn encoded_bytes(&self, parameters: usize) -> usize;

    /// The smallest run of values that encodes by itself. A chunk may be encoded and decoded in pieces that
    /// begin at multiples of this: their payloads, one after another, are the chunk's. All divide
    /// [`TILE_PARAMETERS`].
    fn block_parameters(&self) -> usize;

    /// Encodes `values` into `payload`, which has exactly [`DeltaCodec::encoded_bytes`] bytes.
    ///
    /// It cannot fail: values that are not finite become a payload that [`DeltaCodec::decode`] refuses.
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
    /// The scale of a block is NaN, infinite, negative, or leads to values beyond the range of fp32.
    #[error(
        "the block at value {position} of the chunk has the scale {value}: one of its values was not finite, as when the local training diverged, or the sender's encoder is faulty"
    )]
    Scale {
        /// Position of the block's first value in the chunk.
        position: usize,
        /// The scale, as text.
        value: String,
    },
    /// A block has bits that no encoder writes.
    #[error("the block at value {position} of the chunk {fault}; the sender's encoder is faulty")]
    Malformed {
        /// Position of the block's first value in the chunk.
        position: usize,
        /// What is wrong with it.
        fault: &'static str,
    },
}

impl DecodeError {
    /// The same error, of values that have `before` others before them in their chunk.
    #[must_use]
    pub fn after(mut self, before: usize) -> Self {
        match &mut self {
            Self::Length { .. } => {}
            Self::NotFinite { position, .. }
            | Self::Scale { position, .. }
            | Self::Malformed { position, .. } => {
                *position += before;
            }
        }
        self
    }
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
    /// Two bytes per value: IEEE binary16.
    Fp16,
    /// One byte per value and a scale for each 64.
    Int8,
    /// Four bits per value, sign and exponent, and a scale for each 128.
    E3m0,
    /// Two bits per value, sign and one of two magnitudes, which each 256 have to themselves.
    #[serde(rename = "2bit")]
    TwoBit,
    /// The 64 largest of each 4096 values, two bits each.
    TopK,
}

impl Encoding {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Fp32, Self::Bf16, Self::Fp16, Self::Int8, Self::E3m0, Self::TwoBit, Self::TopK];

    /// The name in specifications and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Bf16 => "bf16",
            Self::Fp16 => "fp16",
            Self::Int8 => "int8",
            Self::E3m0 => "e3m0",
            Self::TwoBit => "2bit",
            Self::TopK => "topk",
        }
    }

    /// The encoding of that name.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|encoding| encoding.name() == name)
    }

    /// What is left of the error of the last round when the next one is encoded, for encodings that lose so
    /// much that it must not be lost: the sender encodes `delta + decay * error` and keeps what the encoding
    /// dropped of that ([`encode_with_feedback`]). None: errors are forgotten.
    pub fn error_feedback_decay(self) -> Option<f32> {
        match self {
            Self::Fp32 | Self::Bf16 | Self::Fp16 | Self::Int8 | Self::E3m0 => None,
            Self::TwoBit => Some(two_bit::ERROR_DECAY),
            Self::TopK => Some(topk::ERROR_DECAY),
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
            Self::Fp16 => &fp16::Fp16,
            Self::Int8 => &int8::Int8,
            Self::E3m0 => &e3m0::E3m0,
            Self::TwoBit => &two_bit::TwoBit,
            Self::TopK => &topk::TopK,
        }
    }
}

/// The bits of an fp32 without its sign. They order as the magnitudes do, infinity and NaN last.
const MAGNITUDE: u32 = 0x7fff_ffff;

/// The bits of infinity: those of a finite magnitude are below.
const INFINITY: u32 = 0x7f80_0000;

/// The bits of the largest magnitude, 0 for no values.
#[inline(always)]
fn largest_magnitude(values: &[f32]) -> u32 {
    values.iter().fold(0, |largest, value| largest.max(value.to_bits() & MAGNITUDE))
}

/// Refuses NaN and infinities, naming the first, given the largest magnitude's bits.
fn check_largest(largest: u32, values: &[f32]) -> Result<(), DecodeError> {
    if largest < INFINITY {
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

/// What is wrong with one block, wherever it is.
enum Fault {
    Scale(f32),
    Malformed(&'static str),
}

impl Fault {
    #[cold]
    fn at(self, position: usize) -> DecodeError {
        match self {
            Self::Scale(value) => DecodeError::Scale { position, value: value.to_string() },
            Self::Malformed(fault) => DecodeError::Malformed { position, fault },
        }
    }
}
