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

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::super::{
        Encoding,
        tests::{gaussian, round_trip},
    };
    use super::*;

    /// Sends a delta that is the same in every round but for noise; gives the norm of the sum of the deltas less
    /// the sum of what arrived, over the norm of the former.
    fn drift(encoding: Encoding, decay: Option<f32>, rounds: usize) -> f64 {
        let mut random = ChaCha8Rng::seed_from_u64(5);
        let codec = encoding.codec();
        let length = 5000;
        let lasting: Vec<f32> = (0..length).map(|_| gaussian(&mut random)).collect();
        let (mut error, mut decoded) = (vec![0.0; length], vec![0.0; length]);
        let mut payload = vec![0; codec.encoded_bytes(length)];
        let (mut sent, mut arrived) = (vec![0.0; length], vec![0.0; length]);
        for _ in 0..rounds {
            let delta: Vec<f32> =
                lasting.iter().map(|value| value + 0.1 * random.random_range(-1f32..1.0)).collect();
            match decay {
                Some(decay) => encode_with_feedback(codec, decay, &delta, &mut error, &mut payload).unwrap(),
                None => codec.encode(&delta, &mut payload),
            }
            codec.decode(&payload, &mut decoded).unwrap();
            for at in 0..length {
                sent[at] += f64::from(delta[at]);
                arrived[at] += f64::from(decoded[at]);
            }
        }
        let norm = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>().sqrt();
        let lost: Vec<f64> = sent.iter().zip(&arrived).map(|(sent, arrived)| sent - arrived).collect();
        norm(&lost) / norm(&sent)
    }

    #[test]
    fn with_feedback_what_arrives_over_many_rounds_is_what_was_sent() {
        for (encoding, rounds, with, with_decay, without) in
            [(Encoding::TwoBit, 100, 0.03, 0.2, 0.25), (Encoding::TopK, 400, 0.15, 0.9, 0.9)]
        {
            let kept = drift(encoding, Some(1.0), rounds);
            let decaying = drift(encoding, encoding.error_feedback_decay(), rounds);
            let forgotten = drift(encoding, None, rounds);
            assert!(kept < with, "{encoding:?}: {kept}");
            assert!(decaying < with_decay && decaying < forgotten, "{encoding:?}: {decaying}");
            assert!(forgotten > without, "{encoding:?}: {forgotten}");
            // The error is bounded: in twice the rounds its share is half.
            let longer = drift(encoding, Some(1.0), 2 * rounds);
            assert!(longer < 0.6 * kept, "{encoding:?}: {longer} after twice the rounds, {kept} before");
        }
    }

    #[test]
    fn feedback_follows_its_formula_to_the_bit() {
        let mut random = ChaCha8Rng::seed_from_u64(6);
        let delta: Vec<f32> = (0..10_001).map(|_| gaussian(&mut random)).collect();
        let before: Vec<f32> = (0..10_001).map(|_| gaussian(&mut random)).collect();
        for encoding in Encoding::ALL {
            let codec = encoding.codec();
            let (mut error, mut payload) = (before.clone(), vec![0; codec.encoded_bytes(delta.len())]);
            encode_with_feedback(codec, 0.95, &delta, &mut error, &mut payload).unwrap();
            let x: Vec<f32> = delta.iter().zip(&before).map(|(delta, error)| delta + 0.95 * error).collect();
            assert_eq!(payload, encoding.encode(&x), "{encoding:?}");
            let expected: Vec<f32> =
                x.iter().zip(round_trip(encoding, &x)).map(|(x, decoded)| x - decoded).collect();
            assert_eq!(error, expected, "{encoding:?}");
        }
    }

    #[test]
    fn feedback_tells_the_sender_where_a_value_is_not_finite() {
        let mut delta = vec![1.0; 9000];
        delta[8500] = f32::INFINITY;
        for encoding in Encoding::ALL {
            let codec = encoding.codec();
            let (mut error, mut payload) = (vec![0.0; 9000], vec![0; codec.encoded_bytes(9000)]);
            let refused = encode_with_feedback(codec, 0.9, &delta, &mut error, &mut payload).unwrap_err();
            let expected = 8500 / codec.block_parameters() * codec.block_parameters();
            assert!(
                matches!(refused, DecodeError::NotFinite { position, .. } | DecodeError::Scale { position, .. } if position == expected),
                "{encoding:?}: {refused}"
            );
        }
    }
}
