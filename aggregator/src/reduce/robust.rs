//! What becomes of each delta under the round's rule (`outer.aggregation` in the specification), before any value
//! is averaged. The arithmetic is a function of the deltas' norms and distances, and knows no values.
//!
//! | rule | what is folded |
//! |---|---|
//! | mean | all, with their weights |
//! | clipped mean | all, with their weights times min(1, factor x median norm / norm), over the sum of the weights |
//! | trimmed mean, median | all, coordinate by coordinate: `coordinates` |
//! | Krum | the one that is selected |
//! | multi-Krum | those that are selected, with their weights |
//!
//! The clipped mean and Krum read all deltas twice: for the `survey`, and to fold them.

use consort_common::{ids::Digest, spec::Aggregation};

use super::{
    ReduceError, Share,
    coordinates::TrimmedMean,
    survey::{Distances, Survey},
};
use crate::{engine::Treatment, spool::ContributionKey};

/// How the values of one coordinate become one.
#[derive(Debug)]
pub(super) enum Combination {
    /// By their weights, divided by this.
    WeightedMean { total_weight: f64 },
    /// By their order.
    TrimmedMean(TrimmedMean),
}

/// What is folded, and why.
#[derive(Debug)]
pub(super) struct Judgement {
    /// What is folded, in canonical order, with the weights that they have then.
    pub(super) shares: Vec<Share>,
    pub(super) combination: Combination,
    /// All, in canonical order; norms are still missing where the fold finds them.
    pub(super) treatments: Vec<Treatment>,
    /// What is not folded, and what it was when it was judged.
    pub(super) left_out: Vec<(ContributionKey, Digest)>,
}

impl Judgement {
    /// Judges the `shares` of `round`, in canonical order; `survey` is asked with whether distances are wanted, if the rule
    /// compares deltas.
    ///
    /// # Errors
    /// [`ReduceError::TooFew`], or the survey's.
    pub(super) fn new(
        round: u32,
        shares: &[Share],
        rule: &Aggregation,
        survey: impl FnOnce(bool) -> Result<Survey, ReduceError>,
    ) -> Result<Self, ReduceError> {
        let total_weight = shares.iter().map(|share| share.weight).sum();
        if let Some(trimmed) = rule.trimmed(shares.len()) {
            let combination = Combination::TrimmedMean(TrimmedMean::new(shares.len(), trimmed));
            #[allow(clippy::cast_precision_loss)] // there are at most thousands
            let weight = 1.0 / shares.len() as f64;
            let treatments = shares.iter().map(|share| Treatment { weight, ..treatment(share) });
            let (shares, treatments) = (shares.to_vec(), treatments.collect());
            return Ok(Self { shares, combination, treatments, left_out: Vec::new() });
        }
        match *rule {
            Aggregation::ClippedMean { factor } => Ok(clipped(shares, total_weight, factor, &survey(false)?)),
            Aggregation::Krum { hostile } => select(round, shares, rule, hostile, 1, survey),
            Aggregation::MultiKrum { hostile, selected } => {
                let most = shares.len().saturating_sub(hostile as usize + 2);
                let selected = if selected == 0 { most } else { selected as usize };
                select(round, shares, rule, hostile, selected, survey)
            }
            Aggregation::Mean {} | Aggregation::TrimmedMean { .. } | Aggregation::Median {} => Ok(Self {
                shares: shares.to_vec(),
                combination: Combination::WeightedMean { total_weight },
                treatments: shares.iter().map(treatment).collect(),
                left_out: Vec::new(),
            }),
        }
    }
}

fn treatment(share: &Share) -> Treatment {
    let ContributionKey { site, round, .. } = share.delta.key();
    Treatment {
        site: site.clone(),
        round: *round,
        weight: share.weight,
        norm: None,
        clip: None,
        selected: None,
    }
}

fn clipped(shares: &[Share], total_weight: f64, factor: f64, survey: &Survey) -> Judgement {
    let norms: Vec<f64> = survey.squares.iter().map(|square| square.sqrt()).collect();
    let factors = clip_factors(&norms, factor);
    let mut judgement = Judgement {
        shares: Vec::new(),
        combination: Combination::WeightedMean { total_weight },
        treatments: Vec::new(),
        left_out: Vec::new(),
    };
    for (at, (share, clip)) in shares.iter().zip(factors).enumerate() {
        let (norm, clip_shown) = (Some(norms[at]), Some(clip));
        judgement.treatments.push(Treatment { norm, clip: clip_shown, ..treatment(share) });
        let weight = share.weight * clip;
        if weight > 0.0 {
            judgement.shares.push(Share { weight, ..share.clone() });
        } else {
            judgement.left_out.push((share.delta.key().clone(), survey.digests[at]));
        }
    }
    judgement
}

fn select(
    round: u32,
    shares: &[Share],
    rule: &Aggregation,
    hostile: u32,
    count: usize,
    survey: impl FnOnce(bool) -> Result<Survey, ReduceError>,
) -> Result<Judgement, ReduceError> {
    let needed = rule.deltas_min();
    if (shares.len() as u64) < needed {
        return Err(ReduceError::TooFew { round, rule: rule.name(), deltas: shares.len(), needed });
    }
    let survey = survey(true)?;
    let distances = survey.distances.as_ref();
    let scores = distances.map_or_else(Vec::new, |distances| krum_scores(distances, hostile as usize));
    let selected = least(&scores, count);
    let weight_of = |share: &Share| if count == 1 { 1.0 } else { share.weight };
    let chosen = || shares.iter().zip(&selected).filter(|(_, selected)| **selected).map(|(share, _)| share);
    let total_weight: f64 = chosen().map(weight_of).sum();
    let mut judgement = Judgement {
        shares: chosen().map(|share| Share { weight: weight_of(share), ..share.clone() }).collect(),
        combination: Combination::WeightedMean { total_weight },
        treatments: Vec::new(),
        left_out: Vec::new(),
    };
    for (at, share) in shares.iter().enumerate() {
        let weight = if selected[at] { weight_of(share) / total_weight } else { 0.0 };
        let (norm, selected) = (Some(survey.squares[at].sqrt()), Some(selected[at]));
        judgement.treatments.push(Treatment { weight, norm, selected, ..treatment(share) });
        if selected == Some(false) {
            judgement.left_out.push((share.delta.key().clone(), survey.digests[at]));
        }
    }
    Ok(judgement)
}

/// min(1, factor x median / norm) for each norm; the median of an even number is the mean of the middle two.
fn clip_factors(norms: &[f64], factor: f64) -> Vec<f64> {
    let mut sorted = norms.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let median = match sorted.len() % 2 {
        0 => sorted[middle - 1] / 2.0 + sorted[middle] / 2.0,
        _ => sorted[middle],
    };
    let bound = factor * median;
    norms.iter().map(|norm| if *norm <= bound { 1.0 } else { bound / norm }).collect()
}

/// Sums of each delta's squared distances to its n - hostile - 2 nearest, added from the nearest on.
fn krum_scores(distances: &Distances, hostile: usize) -> Vec<f64> {
    let deltas = distances.deltas();
    let score = |at: usize| -> f64 {
        let others = (0..deltas).filter(|other| *other != at);
        let mut squares: Vec<f64> = others.map(|other| distances.square(at, other)).collect();
        squares.sort_by(f64::total_cmp);
        squares.iter().take(deltas.saturating_sub(hostile + 2)).sum()
    };
    (0..deltas).map(score).collect()
}

/// Which `count` of the scores are the least; of equal ones the first.
fn least(scores: &[f64], count: usize) -> Vec<bool> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]));
    let mut least = vec![false; scores.len()];
    order.into_iter().take(count).for_each(|at| least[at] = true);
    least
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn norms_above_the_median_times_the_factor_are_clipped_to_it() {
        assert_eq!(clip_factors(&[1.0, 2.0, 100.0], 1.0), [1.0, 1.0, 0.02]);
        assert_eq!(clip_factors(&[4.0, 100.0, 2.0, 3.0], 2.0), [1.0, 0.07, 1.0, 1.0]);
        assert_eq!(clip_factors(&[3.0], 0.5), [0.5]);
        assert_eq!(clip_factors(&[0.0, 0.0, 5.0], 1.0), [1.0, 1.0, 0.0]);
        assert_eq!(clip_factors(&[f64::MAX, f64::MAX], 1.0), [1.0, 1.0]);
    }

    /// Points 0, 1, 3, 6 and 100 on a line, f = 1: sums over the 2 nearest are 1 + 9, 1 + 4, 4 + 9, 9 + 25 and
    /// 94^2 + 97^2.
    #[test]
    fn scores_are_those_of_the_paper_by_hand() {
        let points: [f64; 5] = [0.0, 1.0, 3.0, 6.0, 100.0];
        let pairs = (0..5).flat_map(|a| (a + 1..5).map(move |b| (a, b)));
        let distances = Distances::new(5, pairs.map(|(a, b)| (points[a] - points[b]).powi(2)).collect());
        let scores = krum_scores(&distances, 1);
        assert_eq!(scores, [10.0, 5.0, 13.0, 34.0, 94.0 * 94.0 + 97.0 * 97.0]);
        assert_eq!(least(&scores, 1), [false, true, false, false, false]);
        assert_eq!(least(&scores, 3), [true, true, true, false, false]);
    }

    #[test]
    fn of_equal_scores_the_first_is_taken() {
        assert_eq!(least(&[2.0, 1.0, 1.0], 1), [false, true, false]);
    }
}
