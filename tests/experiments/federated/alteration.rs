//! What a gateway makes of a site's deltas: other encodings than the product has, and hostile sites.

use std::sync::Arc;

use consort_common::codec::Encoding;
use consort_tests::gateway::Alter;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

/// What becomes of a delta.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) enum Alteration {
    /// It is encoded with two bits and decoded again; what that loses is lost.
    TwoBitsWithoutFeedback,
    /// The same with the largest values only.
    TopkWithoutFeedback,
    /// Each value is sent with this probability, and is zero otherwise.
    RandomlyDropped(f32),
    /// The same, and what is sent is divided by the probability, so that the mean is right.
    RandomlyDroppedAndRescaled(f32),
    /// Its sign is flipped.
    SignFlipped,
    /// It is multiplied by this.
    Scaled(f32),
    /// Gaussian noise of its own norm, chunk by chunk, times this stands in its place.
    Noise(f32),
    /// This value stands in its place everywhere.
    Constant(f32),
}

impl Alteration {
    /// As a function for a site's gateway; sites differ by `seed`.
    pub(super) fn function(self, seed: u64) -> Alter {
        Arc::new(move |round, chunk, values| {
            let seed = seed << 48 | u64::from(round) << 24 | u64::from(chunk);
            self.apply(values, &mut ChaCha8Rng::seed_from_u64(seed));
        })
    }

    fn apply(self, values: &mut [f32], random: &mut ChaCha8Rng) {
        match self {
            Self::TwoBitsWithoutFeedback => encode_and_decode(Encoding::TwoBit, values),
            Self::TopkWithoutFeedback => encode_and_decode(Encoding::TopK, values),
            Self::RandomlyDropped(kept) => values.iter_mut().for_each(|value| {
                if random.random::<f32>() >= kept {
                    *value = 0.0;
                }
            }),
            Self::RandomlyDroppedAndRescaled(kept) => values.iter_mut().for_each(|value| {
                *value = if random.random::<f32>() < kept { *value / kept } else { 0.0 };
            }),
            Self::SignFlipped => values.iter_mut().for_each(|value| *value = -*value),
            Self::Scaled(factor) => values.iter_mut().for_each(|value| *value *= factor),
            Self::Noise(factor) => {
                let squares: f64 = values.iter().map(|value| f64::from(*value).powi(2)).sum();
                let deviation = factor * (squares / values.len().max(1) as f64).sqrt() as f32;
                values.iter_mut().for_each(|value| *value = deviation * gaussian(random));
            }
            Self::Constant(constant) => values.fill(constant),
        }
    }
}

fn encode_and_decode(encoding: Encoding, values: &mut [f32]) {
    let payload = encoding.encode(values);
    encoding.codec().decode(&payload, values).expect("what was encoded can be decoded");
}

/// A standard normal number (Box and Muller 1958).
fn gaussian(random: &mut ChaCha8Rng) -> f32 {
    let (u, v): (f32, f32) = (random.random(), random.random());
    (-2.0 * (1.0 - u).ln()).sqrt() * (std::f32::consts::TAU * v).cos()
}
