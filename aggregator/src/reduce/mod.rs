//! Reduction: the deltas of a round, in canonical order, become the next version of the model.
//!
//! | file | what |
//! |---|---|
//! | `fold` | a round's reduction, chunk by chunk, in any order of chunks |
//! | `robust` | what the rule of aggregation does with each delta; `survey`: what it must know of all for that |
//! | `chunk` | one chunk: read, decode, mean, outer step, rounding, in tiles |
//! | `gather` | the same piece of all deltas, for rules that compare them |
//! | `kernel`, `coordinates`, `outer`, `broadcast` | the formulas |
//! | `statistics`, `tensors` | what is recorded of a round beside its model |
//! | `initial` | version 0 |
//!
//! Memory is O(cores x chunk): see `fold`, and for rules that compare deltas `gather`, and `survey` for what Krum takes
//! besides. The result is a function of the base version, the set of weighted deltas, the rule of aggregation and the
//! outer optimizer: bit-identical whatever the order in which deltas arrived, the number of threads and the chunk
//! size. Norms alone may differ in their last digits between chunk sizes, since they are added chunk by chunk, and
//! with them what they clip; and where the model is sent in an encoding that looks at blocks of values, its last block
//! is that of each chunk.
//!
//! Reduction writes a version's files and nothing else: the driver commits it in the database, later.
//! Blocks for as long as it takes: async callers use `spawn_blocking`.

mod broadcast;
mod chunk;
mod coordinates;
mod fold;
mod gather;
mod initial;
mod kernel;
mod outer;
mod robust;
mod statistics;
mod survey;
mod tensors;

use consort_common::{
    codec::{DecodeError, Encoding},
    ids::Digest,
    spec::{Aggregation, OuterOptimizer},
};
use rayon::prelude::*;

pub use self::{
    fold::{RoundFold, Share},
    initial::create_initial,
    outer::{has_momentum, initial_second_moment},
    statistics::ModelStatistics,
    tensors::TensorPlan,
};
use crate::{
    engine::{TensorNorms, Treatment},
    models::{ModelError, ModelFiles, ModelVersion},
    spool::{ContributionKey, DeltaLayout, Spool, SpoolError},
};

/// Why a round could not be reduced. Nothing was written; the spool and the base version are as they were.
#[derive(Debug, thiserror::Error)]
pub enum ReduceError {
    /// There is nothing to average.
    #[error("round {round} cannot be reduced: it has no contributions")]
    NoContributions {
        /// The round.
        round: u32,
    },
    /// The rule of aggregation is not defined for so few.
    #[error(
        "round {round} cannot be reduced: the rule {rule} of outer.aggregation takes {needed} deltas, and there are {deltas}"
    )]
    TooFew {
        /// The round.
        round: u32,
        /// The rule, by its name in specifications.
        rule: &'static str,
        /// How many there are.
        deltas: usize,
        /// How many there must be.
        needed: u64,
    },
    /// The list of contributions is not one that the round can have.
    #[error("round {round} cannot be reduced: {key} {reason}")]
    Unfit {
        /// The round.
        round: u32,
        /// The contribution.
        key: Box<ContributionKey>,
        /// What is wrong with it.
        reason: String,
    },
    /// A contribution's chunk is missing, damaged or unreadable.
    #[error("{key} cannot be averaged: {source}")]
    Damaged {
        /// The contribution.
        key: Box<ContributionKey>,
        /// Which chunk.
        chunk: u32,
        /// Why.
        source: ChunkFault,
    },
    /// What is spooled is not the delta that was accepted.
    #[error("{key} cannot be averaged: {accepted} was accepted, but the spool holds {found}")]
    OtherDelta {
        /// The contribution.
        key: Box<ContributionKey>,
        /// Digest when it was accepted.
        accepted: Digest,
        /// Digest now.
        found: Digest,
    },
    /// The round was begun with other deltas than are to be averaged now.
    #[error("round {round} was begun with other contributions than it has now")]
    OtherContributions {
        /// The round.
        round: u32,
    },
    /// The new model overflows.
    #[error(
        "version {version} cannot be made: parameter {parameter} would not be finite; the training diverges, lower the outer or local learning rate"
    )]
    NotFinite {
        /// The version.
        version: u32,
        /// Position in the flat vector.
        parameter: u64,
    },
    /// The model's files failed.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl ReduceError {
    /// The delta that is spoilt for good, if that is why: the round could be reduced without it.
    pub fn spoilt(&self) -> Option<&ContributionKey> {
        match self {
            Self::OtherDelta { key, .. } => Some(key.as_ref()),
            Self::Damaged { key, source, .. } => source.is_lasting().then_some(key.as_ref()),
            Self::NoContributions { .. }
            | Self::TooFew { .. }
            | Self::Unfit { .. }
            | Self::OtherContributions { .. }
            | Self::NotFinite { .. }
            | Self::Model(_) => None,
        }
    }
}

/// What is wrong with a spooled chunk.
#[derive(Debug, thiserror::Error)]
pub enum ChunkFault {
    /// It is not as it was stored.
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// It is not an encoding of the chunk.
    #[error("a chunk cannot be decoded: {0}")]
    Decode(#[from] DecodeError),
}

impl ChunkFault {
    /// Whether reading the chunk again would not help; a store that could not be reached may come back.
    fn is_lasting(&self) -> bool {
        match self {
            Self::Decode(_) | Self::Spool(SpoolError::Missing { .. } | SpoolError::Corrupt { .. }) => true,
            Self::Spool(
                SpoolError::Full { .. }
                | SpoolError::Sealed { .. }
                | SpoolError::Io(_)
                | SpoolError::Storage(_),
            ) => false,
        }
    }
}

/// A delta that was accepted, and what it counts.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightedContribution {
    /// Where it is spooled.
    pub key: ContributionKey,
    /// Its weight, above 0; shares of the average are weights divided by their sum.
    pub weight: f64,
    /// How it is encoded.
    pub encoding: Encoding,
    /// What it was when it was accepted (see [`crate::spool::SpooledDelta::summary`]).
    pub delta_digest: Digest,
}

/// What a reduction works on. The version it makes is the base's successor, and consists of what the base
/// does.
#[derive(Debug)]
pub struct ReduceInputs<'a> {
    /// What is averaged, in any order: the canonical order is by site, then by round.
    pub contributions: Vec<WeightedContribution>,
    /// The version that the sites trained from.
    pub base: ModelVersion,
    /// What is done with the average.
    pub optimizer: OuterOptimizer,
    /// How the deltas become one.
    pub aggregation: Aggregation,
    /// Where the model's tensors lie.
    pub tensors: TensorPlan,
    /// Where the deltas are.
    pub spool: &'a Spool,
    /// Where the new version goes.
    pub models: &'a ModelFiles,
}

/// A version that was made and is durable.
#[derive(Debug)]
pub struct Reduction {
    /// The version; its digest is the commit's.
    pub version: ModelVersion,
    /// L2 norm of the averaged delta.
    pub delta_norm: f64,
    /// L2 norm of new minus base parameters.
    pub update_norm: f64,
    /// How else the round moved the model.
    pub statistics: ModelStatistics,
    /// What became of each delta, in canonical order.
    pub treatments: Vec<Treatment>,
    /// Norms of the model's tensors, in the plan's order.
    pub tensors: Vec<TensorNorms>,
}

/// Averages the contributions, moves the base version by the outer optimizer's step and writes the next.
/// An orphan of that version is replaced.
///
/// # Errors
/// See [`ReduceError`]; nothing is left on disk then.
pub fn reduce(inputs: ReduceInputs<'_>) -> Result<Reduction, ReduceError> {
    let ReduceInputs { contributions, base, optimizer, aggregation, tensors, spool, models } = inputs;
    let plan = base.layout().fragment(base.version() + 1).plan();
    // One that this process did not receive is verified whole when it is opened, hence in parallel.
    let shares = contributions.par_iter().map(|contribution| {
        let WeightedContribution { key, weight, encoding, .. } = contribution;
        let delta = spool.stored(key, DeltaLayout::new(plan, *encoding));
        let delta = delta.map_err(|error| damaged(key, error.chunk(), error))?;
        Ok::<_, ReduceError>(Share { delta, weight: *weight })
    });
    let shares = shares.collect::<Result<_, _>>()?;
    RoundFold::begin(shares, base, optimizer, &aggregation, tensors, models)?.finish(&contributions)
}

fn damaged(key: &ContributionKey, chunk: u32, fault: impl Into<ChunkFault>) -> ReduceError {
    ReduceError::Damaged { key: Box::new(key.clone()), chunk, source: fault.into() }
}

#[cfg(test)]
mod tests;
