//! Error feedback: what an encoding drops of a delta is kept by its sender and added to its next one.
//!
//! Seide et al., "1-Bit Stochastic Gradient Descent", Interspeech 2014; Karimireddy et al., arXiv 1901.09847,
//! algorithm 2. SparseLoCo (arXiv 2508.15706) and MuLoCo (arXiv 2505.23725) let errors decay. This module
//! holds no state: the error belongs to the sender, who keeps it beside its model.

use super::{DecodeError, DeltaCodec};

/// Values worked on at a time: a multiple of every encoding's block, 16 KiB, so that they stay in a core's
/// first cache.
pub const TILE_PARAMETERS: usize = 4096;

/// Encodes a chunk of a delta together with what is left of the last round's error, and leaves this round's:
///
/// - x = `delta` + `decay` * `error`, the product rounded first, then the sum, all in f32;
/// - `payload` = encode(x);
/// - `error` = x - decode(`payload`).
///
/// `delta` and `error` have the chunk's length, `payload` exactly its encoded bytes. Nothing is allocated.
///
/// # Errors
/// If x is not finite, so that the receiver would refuse the payload; `error` and `payload` are then
/// unspecified.
///
/// # Panics
/// If the lengths differ.
pub fn encode_with_feedback(
    codec: &dyn DeltaCodec,
    decay: f32,
    delta: &[f32],
    error: &mut [f32],
    payload: &mut [u8],
) -> Result<(), DecodeError> {
    assert_eq!(delta.len(), error.len(), "a delta and its error have the same length");
    assert_eq!(payload.len(), codec.encoded_bytes(delta.len()), "the payload has the chunk's encoded bytes");
    let tile_bytes = codec.encoded_bytes(TILE_PARAMETERS);
    let mut decoded = [0.0; TILE_PARAMETERS];
    let tiles = delta.chunks(TILE_PARAMETERS).zip(error.chunks_mut(TILE_PARAMETERS));
    for (at, ((delta, error), payload)) in tiles.zip(payload.chunks_mut(tile_bytes)).enumerate() {
        for (error, delta) in error.iter_mut().zip(delta) {
            *error = delta + decay * *error;
        }
        codec.encode(error, payload);
        let decoded = &mut decoded[..delta.len()];
        codec.decode(payload, decoded).map_err(|error| error.after(at * TILE_PARAMETERS))?;
        for (error, decoded) in error.iter_mut().zip(&*decoded) {
            *error -= decoded;
        }
    }
    Ok(())
}
