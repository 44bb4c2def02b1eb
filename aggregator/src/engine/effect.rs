//! What the driver shall do after a step. Every effect is idempotent.

use std::collections::BTreeSet;

use consort_common::{ids::SiteName, units::UnixMs};

use super::{
    event::{Evaluation, ReducedFacts},
    state::Contribution,
};

/// One thing to do.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Record: a delta was accepted. Keyed by (run, round, site).
    RecordContribution {
        /// For which round.
        round: u32,
        /// The delta.
        contribution: Contribution,
    },
    /// Record: a site's held-out loss. Keyed by (run, version, site).
    RecordEvaluation {
        /// Which site.
        site: SiteName,
        /// What it found.
        evaluation: Evaluation,
    },
    /// Record: the round's commit point. Keyed by (run, round).
    Commit(RoundRecord),
    /// Record: a sentence for the run's log.
    Event(String),
    /// Answer: the delta had been accepted before; it counts once. Nothing to do.
    Duplicate {
        /// Whose.
        site: SiteName,
        /// For which round.
        round: u32,
    },
    /// Average the deltas into version `round`, then report [`super::Event::Reduced`] or
    /// [`super::Event::ReduceFailed`]. To be ignored while the same round's reduction is under way.
    Reduce {
        /// Which round.
        round: u32,
        /// What to average, in this order.
        contributions: Vec<Weighted>,
    },
    /// Publish version `version` as a checkpoint, then report [`super::Event::Published`].
    Publish {
        /// Which version.
        version: u32,
    },
    /// Delete what is spooled for rounds up to and including `round`, but for those of `keep`.
    DiscardSpool {
        /// The last of them.
        round: u32,
        /// Rounds of which a delta is still to be averaged, or to come.
        keep: BTreeSet<u32>,
    },
    /// Work out each connected site's instruction anew and push those that changed.
    InstructionsChanged,
}

impl Effect {
    /// Whether it belongs into the transaction that stores the state; the others are performed after it.
    pub fn is_record(&self) -> bool {
        match self {
            Self::RecordContribution { .. }
            | Self::RecordEvaluation { .. }
            | Self::Commit(_)
            | Self::Event(_) => true,
            Self::Duplicate { .. }
            | Self::Reduce { .. }
            | Self::Publish { .. }
            | Self::DiscardSpool { .. }
            | Self::InstructionsChanged => false,
        }
    }
}

/// A contribution and its share of the average.
#[derive(Debug, Clone, PartialEq)]
pub struct Weighted {
    /// The delta.
    pub contribution: Contribution,
    /// Its share, 0 to 1.
    pub weight: f64,
}

/// A committed round.
#[derive(Debug, Clone, PartialEq)]
pub struct RoundRecord {
    /// From 1; also the version that it made.
    pub round: u32,
    /// Attempts that it took.
    pub attempts: u32,
    /// When the first attempt began.
    pub started_ms: UnixMs,
    /// When it was committed.
    pub committed_ms: UnixMs,
    /// The run's cumulative step before the round.
    pub first_step: u64,
    /// What was averaged, in canonical order.
    pub contributions: Vec<Weighted>,
    /// What the reduction gave.
    pub reduced: ReducedFacts,
}

impl RoundRecord {
    /// Tokens trained, all sites.
    pub fn tokens(&self) -> u64 {
        self.contributions.iter().map(|weighted| weighted.contribution.facts.tokens).sum()
    }

    /// Weighted mean of the sites' training loss, nats per token; summed in canonical order.
    pub fn train_loss(&self) -> f64 {
        self.contributions
            .iter()
            .map(|weighted| weighted.weight * weighted.contribution.facts.train_loss)
            .sum()
    }
}
