//! Who is selected, and what each contribution counts: functions of the seed and of sorted lists, never of
//! the order in which sites arrived.

use consort_common::{
    ids::{Digest, SiteName},
    spec::Weighting,
};
use rand::{SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

use super::{effect::Weighted, state::Contribution};

/// What a selection is drawn for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Draw {
    /// The run's.
    pub seed: u64,
    /// From 1.
    pub round: u32,
    /// From 1.
    pub attempt: u32,
}

/// Chooses `count` sites uniformly out of `candidates` (sorted), or all where there are no more; sorted.
///
/// The generator is ChaCha8, seeded with BLAKE3 over the seed, round and attempt (little-endian) and the
/// candidates' names, each ended by a line feed.
pub(super) fn select(draw: Draw, candidates: &[SiteName], count: usize) -> Vec<SiteName> {
    debug_assert!(candidates.is_sorted());
    if count >= candidates.len() {
        return candidates.to_vec();
    }
    let mut text = Vec::new();
    text.extend(draw.seed.to_le_bytes());
    text.extend(draw.round.to_le_bytes());
    text.extend(draw.attempt.to_le_bytes());
    for site in candidates {
        text.extend(site.as_str().as_bytes());
        text.push(b'\n');
    }
    let mut generator = ChaCha8Rng::from_seed(*Digest::of(&text).as_bytes());
    let mut order = candidates.to_vec();
    let (chosen, _) = order.partial_shuffle(&mut generator, count);
    chosen.sort();
    chosen.to_vec()
}

/// The shares of contributions in canonical order.
pub(super) fn weighted(contributions: &[Contribution], weighting: Weighting) -> Vec<Weighted> {
    let tokens: Vec<u64> = contributions.iter().map(|one| one.assigned_tokens).collect();
    let weights = weights(&tokens, weighting).into_iter();
    let weighted = contributions.iter().zip(weights);
    weighted.map(|(one, weight)| Weighted { contribution: one.clone(), weight }).collect()
}

/// The shares of sites in canonical order: w_i = t_i / sum(t) over the assignments' tokens (McMahan et al.,
/// arXiv 1602.05629, algorithm 1, with n_k the trained tokens), or 1/n. In f64; the sum of tokens is exact in
/// u128.
pub(super) fn weights(assigned_tokens: &[u64], weighting: Weighting) -> Vec<f64> {
    let sum: u128 = assigned_tokens.iter().copied().map(u128::from).sum();
    #[allow(clippy::cast_precision_loss)]
    let weight = |tokens: &u64| match weighting {
        Weighting::Tokens if sum > 0 => *tokens as f64 / sum as f64,
        Weighting::Tokens | Weighting::Uniform => 1.0 / assigned_tokens.len() as f64,
    };
    assigned_tokens.iter().map(weight).collect()
}
