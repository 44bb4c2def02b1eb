//! Reduction: the deltas of a round, in canonical order, become the next version of the model.
//!
//! Chunk by chunk, in parallel over the cores of the current rayon pool. Memory is O(cores x chunk): a core
//! holds one chunk's worth of each vector it works on (36 bytes per parameter of the chunk, about 9 MiB
//! with the default chunk), whatever the size of the model and the number of sites. The result is a
//! function of the base version, the set of weighted deltas and the outer optimizer: bit-identical whatever
//! the order in which deltas arrived, the number of threads and the chunk size. Norms alone may differ in
//! their last digits between chunk sizes, since they are added chunk by chunk.
//!
//! Reduction writes a version's files and nothing else: the driver commits it in the database, later.
//! Blocks for as long as it takes: async callers use `spawn_blocking`.

mod kernel;
mod outer;

use std::sync::Arc;

use consort_common::{
    codec::{DecodeError, Encoding},
    ids::{Digest, SiteName},
    spec::OuterOptimizer,
};
use rayon::prelude::*;

pub use self::outer::has_momentum;
use crate::{
    models::{ChunkDigests, ModelError, ModelFiles, ModelVersion, NewVersion},
    spool::{ContributionKey, DeltaLayout, Spool, SpoolError, SpooledDelta},
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
    #[error("round {} cannot be reduced with {}'s delta: {source}", key.round, key.site)]
    Damaged {
        /// The contribution.
        key: Box<ContributionKey>,
        /// Which chunk.
        chunk: u32,
        /// Why.
        source: ChunkFault,
    },
    /// What is spooled is not the delta that was accepted.
    #[error("round {} cannot be reduced with {}'s delta: {accepted} was accepted, but the spool holds {found}", key.round, key.site)]
    OtherDelta {
        /// The contribution.
        key: Box<ContributionKey>,
        /// Digest when it was accepted.
        accepted: Digest,
        /// Digest now.
        found: Digest,
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
    /// The site without whose contribution the round could be reduced, if it is one's fault.
    pub fn site(&self) -> Option<&SiteName> {
        match self {
            Self::Damaged { key, .. } | Self::OtherDelta { key, .. } => Some(&key.site),
            Self::NoContributions { .. } | Self::Unfit { .. } | Self::NotFinite { .. } | Self::Model(_) => {
                None
            }
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

/// A delta and what it counts.
#[derive(Debug, Clone, PartialEq)]
pub struct WeightedContribution {
    /// Where it is spooled.
    pub key: ContributionKey,
    /// Its weight, above 0; shares of the average are weights divided by their sum.
    pub weight: f64,
    /// What it was when it was accepted (see [`Spool::summary`]).
    pub delta_digest: Digest,
}

/// What a reduction works on. The version it makes is the base's successor, cut as the base is.
#[derive(Debug)]
pub struct ReduceInputs<'a> {
    /// What is averaged, in any order: the canonical order is by site.
    pub contributions: Vec<WeightedContribution>,
    /// How deltas are encoded.
    pub encoding: Encoding,
    /// The version that the sites trained from.
    pub base: &'a ModelVersion,
    /// What is done with the average.
    pub optimizer: &'a OuterOptimizer,
    /// Where the deltas are.
    pub spool: &'a Spool,
    /// Where the new version goes.
    pub models: &'a ModelFiles,
}

impl ReduceInputs<'_> {
    fn spooled(&self, key: &ContributionKey) -> Result<Arc<SpooledDelta>, SpoolError> {
        self.spool.stored(key, DeltaLayout::new(self.base.plan(), self.encoding))
    }
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
}

/// Averages the contributions, moves the base version by the outer optimizer's step and writes the next.
/// An orphan of that version is replaced.
///
/// # Errors
/// See [`ReduceError`]; nothing is left on disk then.
pub fn reduce(mut inputs: ReduceInputs<'_>) -> Result<Reduction, ReduceError> {
    inputs.contributions.sort_by(|a, b| a.key.cmp(&b.key));
    let round = inputs.base.version() + 1;
    check(&inputs, round)?;
    let plan = inputs.base.plan();
    inputs.contributions.par_iter().try_for_each(|contribution| check_delta(&inputs, contribution))?;

    let momentum = has_momentum(inputs.optimizer);
    let new = inputs.models.begin(inputs.base.run(), round, plan, momentum)?;
    let work = Work {
        total_weight: inputs.contributions.iter().map(|contribution| contribution.weight).sum(),
        inputs,
        new,
    };
    let chunks: Vec<ReducedChunk> = (0..plan.chunks())
        .into_par_iter()
        .map_init(Scratch::default, |scratch, index| work.reduce_chunk(index, scratch))
        .collect::<Result<_, _>>()?;

    let digests: Vec<_> = chunks.iter().map(|chunk| chunk.digests).collect();
    Ok(Reduction {
        version: work.new.finish(&digests)?,
        delta_norm: chunks.iter().map(|chunk| chunk.delta_square).sum::<f64>().sqrt(),
        update_norm: chunks.iter().map(|chunk| chunk.update_square).sum::<f64>().sqrt(),
    })
}

/// Refuses lists that no round can have: the engine's invariants, checked before they cost a version.
fn check(inputs: &ReduceInputs<'_>, round: u32) -> Result<(), ReduceError> {
    if inputs.contributions.is_empty() {
        return Err(ReduceError::NoContributions { round });
    }
    let unfit = |key: &ContributionKey, reason: String| {
        Err(ReduceError::Unfit { round, key: Box::new(key.clone()), reason })
    };
    for WeightedContribution { key, weight, .. } in &inputs.contributions {
        if key.run != *inputs.base.run() || key.round != round {
            return unfit(key, "is not for this round".to_owned());
        }
        if !weight.is_finite() || *weight <= 0.0 {
            return unfit(key, format!("has the weight {weight}, which must be finite and above 0"));
        }
    }
    match inputs.contributions.windows(2).find(|pair| pair[0].key.site == pair[1].key.site) {
        Some(pair) => unfit(&pair[1].key, "is there twice".to_owned()),
        None => Ok(()),
    }
}

/// Compares what is spooled with what was accepted, by the chunks' digests; payloads follow as they are
/// read.
fn check_delta(inputs: &ReduceInputs<'_>, contribution: &WeightedContribution) -> Result<(), ReduceError> {
    let WeightedContribution { key, delta_digest: accepted, .. } = contribution;
    let found = inputs
        .spooled(key)
        .and_then(|delta| delta.summary())
        .map_err(|error| damaged(key, error.chunk(), error))?
        .digest;
    if found == *accepted {
        Ok(())
    } else {
        Err(ReduceError::OtherDelta { key: Box::new(key.clone()), accepted: *accepted, found })
    }
}

fn damaged(key: &ContributionKey, chunk: u32, fault: impl Into<ChunkFault>) -> ReduceError {
    ReduceError::Damaged { key: Box::new(key.clone()), chunk, source: fault.into() }
}

struct Work<'a> {
    inputs: ReduceInputs<'a>,
    /// Sum of the weights, in canonical order.
    total_weight: f64,
    new: NewVersion,
}

/// One core's vectors, each of a chunk's length, kept from chunk to chunk.
#[derive(Default)]
struct Scratch {
    bytes: Vec<u8>,
    decoded: Vec<f32>,
    sums: Vec<f64>,
    delta: Vec<f32>,
    base: Vec<f32>,
    parameters: Vec<f32>,
    momentum: Vec<f32>,
}

impl Scratch {
    fn resize(&mut self, length: usize, momentum: bool) {
        for values in [&mut self.decoded, &mut self.delta, &mut self.base, &mut self.parameters] {
            values.resize(length, 0.0);
        }
        self.sums.clear();
        self.sums.resize(length, 0.0);
        self.momentum.resize(if momentum { length } else { 0 }, 0.0);
    }
}

struct ReducedChunk {
    digests: ChunkDigests,
    delta_square: f64,
    update_square: f64,
}

impl Work<'_> {
    fn reduce_chunk(&self, index: u32, scratch: &mut Scratch) -> Result<ReducedChunk, ReduceError> {
        let plan = self.inputs.base.plan();
        let momentum = has_momentum(self.inputs.optimizer);
        scratch.resize(plan.length(index).map_err(ModelError::from)?, momentum);
        self.average(index, scratch)?;

        let Scratch { bytes, delta, base, parameters, momentum: state, .. } = scratch;
        self.inputs.base.read_parameters(index, bytes, base)?;
        if momentum {
            self.inputs.base.read_momentum(index, bytes, state)?;
        }
        parameters.copy_from_slice(base);
        outer::step(self.inputs.optimizer, delta, parameters, state);
        self.check_finite(index, parameters, state)?;

        let digests = self.new.write(index, parameters, momentum.then_some(state.as_slice()))?;
        let update = parameters.iter().zip(base).map(|(new, base)| f64::from(*new) - f64::from(*base));
        Ok(ReducedChunk {
            digests,
            delta_square: kernel::sum_of_squares(delta.iter().map(|value| f64::from(*value))),
            update_square: kernel::sum_of_squares(update),
        })
    }

    /// The weighted mean of the chunk's deltas, into `scratch.delta`.
    fn average(&self, index: u32, scratch: &mut Scratch) -> Result<(), ReduceError> {
        let codec = self.inputs.encoding.codec();
        for WeightedContribution { key, weight, .. } in &self.inputs.contributions {
            let Scratch { bytes, decoded, sums, .. } = scratch;
            let delta = self.inputs.spooled(key).map_err(|error| damaged(key, index, error))?;
            delta.read(index, bytes).map_err(|error| damaged(key, index, error))?;
            codec.decode(bytes, decoded).map_err(|error| damaged(key, index, error))?;
            kernel::accumulate(sums, weight / self.total_weight, decoded);
        }
        kernel::round(&scratch.sums, &mut scratch.delta);
        Ok(())
    }

    fn check_finite(&self, index: u32, parameters: &[f32], momentum: &[f32]) -> Result<(), ReduceError> {
        // Whole passes without branches vectorise; the position is looked for only when there is one.
        let finite = |values: &[f32]| values.iter().fold(true, |finite, value| finite & value.is_finite());
        if finite(parameters) && finite(momentum) {
            return Ok(());
        }
        let first = |values: &[f32]| values.iter().position(|value| !value.is_finite());
        let position = first(parameters).or(first(momentum)).unwrap_or_default() as u64;
        let start = self.inputs.base.plan().range(index).map_err(ModelError::from)?.start;
        Err(ReduceError::NotFinite { version: self.inputs.base.version() + 1, parameter: start + position })
    }
}

#[cfg(test)]
mod tests;
