//! How the deltas of a round become one: their weighted mean, or a rule that bounds what some of them can do.

use serde::{Deserialize, Serialize};

use super::ParticipationSpec;

/// How the deltas of a round become one. All but the mean are for sites that are not fully trusted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Aggregation {
    /// The weighted mean (McMahan et al., arXiv 1602.05629, algorithm 1).
    // With braces, because serde lets a unit variant pass with unknown keys.
    Mean {},
    /// The weighted mean of the deltas, those whose L2 norm is above `factor` x the median of the norms scaled down
    /// to that (norm clipping: Sun et al., arXiv 1911.07963, section 4, with a threshold that follows the sites).
    ClippedMean {
        /// Multiple of the median norm that a delta may have.
        #[serde(default = "one")]
        factor: f64,
    },
    /// In each coordinate, the mean of the values without the `fraction` largest and the `fraction` smallest (Yin et
    /// al., arXiv 1803.01498, definition 2). Unweighted.
    TrimmedMean {
        /// Share of the deltas that is left out at each end, rounded down to whole deltas.
        #[serde(default = "quarter")]
        fraction: f64,
    },
    /// In each coordinate, the median of the values (the same, definition 1). Unweighted.
    Median {},
    /// The delta with the least sum of squared distances to its n - hostile - 2 nearest (Blanchard et al., NeurIPS
    /// 2017, section 4).
    Krum {
        /// Most deltas of a round that may be hostile: f in the paper, which asks for n >= 2f + 3.
        #[serde(default = "one_site")]
        hostile: u32,
    },
    /// The weighted mean of the `selected` deltas that have the least such sums (the same, section 5).
    MultiKrum {
        /// As for Krum.
        #[serde(default = "one_site")]
        hostile: u32,
        /// Deltas that are averaged; 0: n - hostile - 2, up to which Damaskinos et al. (MLSys 2019, AggregaThor)
        /// prove resilience.
        #[serde(default)]
        selected: u32,
    },
}

fn one() -> f64 {
    1.0
}

fn quarter() -> f64 {
    0.25
}

fn one_site() -> u32 {
    1
}

impl Default for Aggregation {
    fn default() -> Self {
        Self::Mean {}
    }
}

impl Aggregation {
    /// Its name in specifications.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Mean {} => "mean",
            Self::ClippedMean { .. } => "clipped-mean",
            Self::TrimmedMean { .. } => "trimmed-mean",
            Self::Median {} => "median",
            Self::Krum { .. } => "krum",
            Self::MultiKrum { .. } => "multi-krum",
        }
    }

    /// Whether whole deltas are compared before any value is averaged: nothing can be until all have come.
    pub fn compares_deltas(&self) -> bool {
        match self {
            Self::ClippedMean { .. } | Self::Krum { .. } | Self::MultiKrum { .. } => true,
            Self::Mean {} | Self::TrimmedMean { .. } | Self::Median {} => false,
        }
    }

    /// Fewest deltas that the rule is defined for and does something with.
    pub fn deltas_min(&self) -> u64 {
        match *self {
            Self::Mean {} => 1,
            // Of two, a median is the mean.
            Self::ClippedMean { .. } | Self::TrimmedMean { .. } | Self::Median {} => 3,
            Self::Krum { hostile } | Self::MultiKrum { hostile, .. } => 2 * u64::from(hostile) + 3,
        }
    }

    /// How many of `deltas` values are left out at each end: of a trimmed mean and, as the one that leaves out most,
    /// of a median. None for other rules.
    pub fn trimmed(&self, deltas: usize) -> Option<usize> {
        match *self {
            Self::TrimmedMean { fraction } => {
                // 0.29 x 100 is a little less than 29 in floating point.
                #[allow(
                    clippy::cast_precision_loss,
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss
                )]
                let trimmed = (fraction * deltas as f64 + 1e-9) as usize;
                Some(trimmed.min(deltas.saturating_sub(1) / 2))
            }
            Self::Median {} => Some(deltas.saturating_sub(1) / 2),
            Self::Mean {} | Self::ClippedMean { .. } | Self::Krum { .. } | Self::MultiKrum { .. } => None,
        }
    }
}

/// Fewest deltas that a round of the specification may end with, and the key that says so.
pub(super) fn deltas_min(participation: &ParticipationSpec) -> (u32, &'static str) {
    let ParticipationSpec { quorum, minimum_clients, clients_per_round, buffer, .. } = *participation;
    if buffer > 0 {
        return (buffer, "buffer");
    }
    match (quorum, clients_per_round) {
        (0, clients) if clients > 0 && clients < minimum_clients => (clients, "clients_per_round"),
        (0, _) => (minimum_clients, "minimum_clients"),
        (quorum, _) => (quorum, "quorum"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fractions_are_rounded_down_to_whole_deltas() {
        let trimmed = |fraction, deltas| Aggregation::TrimmedMean { fraction }.trimmed(deltas);
        for (fraction, deltas, expected) in [
            (0.25, 4, 1),
            (0.25, 7, 1),
            (0.25, 8, 2),
            (0.29, 100, 29),
            (0.1, 9, 0),
            (0.49, 3, 1),
            (0.49, 1, 0),
        ] {
            assert_eq!(trimmed(fraction, deltas), Some(expected), "{fraction} of {deltas}");
        }
    }

    #[test]
    fn a_median_keeps_the_middle_one_or_two() {
        for deltas in 1..20 {
            let trimmed = Aggregation::Median {}.trimmed(deltas).unwrap();
            assert_eq!(deltas - 2 * trimmed, if deltas % 2 == 1 { 1 } else { 2 });
        }
    }
}
