//! Who is selected, and what each contribution counts: functions of the seed and of sorted lists, never of
//! the order in which sites arrived.

use std::collections::BTreeMap;

use consort_common::{
    ids::{Digest, SiteName},
    spec::{Sampling, Weighting},
};
use rand::{RngCore, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;

use super::{Plan, effect::Weighted, state::Contribution};

/// What a selection is drawn for, and how.
#[derive(Debug, Clone, Copy)]
pub(super) struct Draw {
    /// The run's.
    pub seed: u64,
    /// From 1.
    pub round: u32,
    /// From 1.
    pub attempt: u32,
    /// The run's.
    pub sampling: Sampling,
}

impl Draw {
    pub(super) fn new(plan: &Plan, round: u32, attempt: u32) -> Self {
        Self { seed: plan.seed(), round, attempt, sampling: plan.sampling() }
    }

    /// ChaCha8, seeded with BLAKE3 over the seed, round and attempt (little-endian) and the candidates' names,
    /// each ended by a line feed.
    pub(super) fn generator(self, candidates: &BTreeMap<SiteName, u64>) -> ChaCha8Rng {
        let mut text = Vec::new();
        text.extend(self.seed.to_le_bytes());
        text.extend(self.round.to_le_bytes());
        text.extend(self.attempt.to_le_bytes());
        for site in candidates.keys() {
            text.extend(site.as_str().as_bytes());
            text.push(b'\n');
        }
        ChaCha8Rng::from_seed(*Digest::of(&text).as_bytes())
    }
}

/// Chooses `count` out of the candidates, which have so many tokens to train on, without replacement, or all
/// where there are no more; sorted.
pub(super) fn select(draw: Draw, candidates: &BTreeMap<SiteName, u64>, count: usize) -> Vec<SiteName> {
    let mut sites: Vec<SiteName> = candidates.keys().cloned().collect();
    if count >= sites.len() {
        return sites;
    }
    let mut generator = draw.generator(candidates);
    match draw.sampling {
        // The chosen ones come to the slice's end.
        Sampling::Uniform => sites = sites.partial_shuffle(&mut generator, count).0.to_vec(),
        Sampling::Tokens => {
            let times: BTreeMap<SiteName, f64> = candidates
                .iter()
                .map(|(site, tokens)| (site.clone(), arrival_time(generator.next_u64(), *tokens)))
                .collect();
            sites.sort_by(|a, b| times[a].total_cmp(&times[b]));
        }
    }
    sites.truncate(count);
    sites.sort();
    sites
}

/// When a candidate arrives: the first `count` to do so are a sample without replacement in which each next
/// one is drawn in proportion to the weights of those left. -ln(u) / w, with u uniform over (0, 1] in steps of
/// 2^-53, falls as the key u^(1/w) of Efraimidis and Spirakis (Information Processing Letters 97, 2006,
/// algorithm A) rises, and does not round to 1 where weights are large. A site that reports no tokens weighs
/// as much as one token. libm's logarithm is the same on every machine.
fn arrival_time(bits: u64, tokens: u64) -> f64 {
    const STEP: f64 = 1.0 / (1_u64 << 53) as f64;
    let uniform = ((bits >> 11) + 1) as f64 * STEP;
    -libm::log(uniform) / tokens.max(1) as f64
}

/// The shares of contributions in canonical order.
pub(super) fn weighted(contributions: &[Contribution], plan: &Plan) -> Vec<Weighted> {
    let parts: Vec<(u64, u32)> = contributions.iter().map(|one| (one.assigned_tokens, one.age)).collect();
    let weights = weights(&parts, plan).into_iter();
    let weighted = contributions.iter().zip(weights);
    weighted.map(|(one, weight)| Weighted { contribution: one.clone(), weight }).collect()
}

/// The shares of deltas, of which each is the tokens of its assignment t_i and its age in rounds a_i, in canonical
/// order: w_i = t_i s(a_i) / sum(t s(a)) (McMahan et al., arXiv 1602.05629, algorithm 1, with n_k the trained
/// tokens), or without t. s(a) = (1 + a)^-exponent is the polynomial staleness of Xie et al., arXiv 1903.03934,
/// section 5.2, which FedBuff (Nguyen et al., arXiv 2106.06639, section 5) takes with 1/2. FedBuff divides by the
/// number of deltas and not by the sum of s: here an average stays one, however old its parts are. In f64, summed
/// in canonical order; libm's power is the same on every machine, and 1 for an age of 0.
pub(super) fn weights(parts: &[(u64, u32)], plan: &Plan) -> Vec<f64> {
    let tokens_of_all: u128 = parts.iter().map(|(tokens, _)| u128::from(*tokens)).sum();
    #[allow(clippy::cast_precision_loss)]
    let mass = |(tokens, age): &(u64, u32)| {
        let staleness = libm::pow(1.0 + f64::from(*age), -plan.staleness_exponent());
        match plan.weighting() {
            Weighting::Tokens if tokens_of_all > 0 => *tokens as f64 * staleness,
            Weighting::Tokens | Weighting::Uniform => staleness,
        }
    };
    let masses: Vec<f64> = parts.iter().map(mass).collect();
    let sum: f64 = masses.iter().sum();
    masses.into_iter().map(|mass| mass / sum).collect()
}
