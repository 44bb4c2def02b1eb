//! One round's reduction, chunk by chunk: chunks may be folded in any order, while others are still to come.
//!
//! Memory: a core that folds holds one chunk's worth of each vector it works on and a payload (5 to 7 MiB with
//! the default chunk), kept from chunk to chunk; all cores together stay under
//! [`SCRATCH_BYTES_MAX`]: cores that this leaves idle would wait for memory anyway. A record is kept of each
//! chunk: some 200 bytes, and 48 for each contribution; with the default chunk of 1 MiB, a twenty-thousandth
//! of the deltas.

use std::sync::{
    Arc, Mutex, MutexGuard, OnceLock, PoisonError,
    atomic::{AtomicU32, Ordering},
};

use consort_common::{
    codec::Encoding,
    ids::{Digest, SiteName},
    spec::{Aggregation, OuterOptimizer},
};

use super::{
    ReduceError, Reduction, WeightedContribution,
    chunk::{FoldedChunk, Inputs, Scratch, tile_parameters},
    gather::Gather,
    outer::{has_momentum, initial_second_moment},
    robust::Judgement,
    statistics::Sums,
    survey::Survey,
    tensors::TensorPlan,
};
use crate::{
    engine::Treatment,
    models::{ModelError, ModelFiles, ModelLayout, ModelVersion, NewVersion},
    spool::{ContributionKey, DeltaLayout, SpooledDelta},
};

/// Most that the vectors of all cores take together.
const SCRATCH_BYTES_MAX: usize = 128 << 20;

/// A delta of a round, complete or still being received, and what it counts.
#[derive(Debug, Clone)]
pub struct Share {
    /// The delta.
    pub delta: Arc<SpooledDelta>,
    /// Its weight, above 0; shares of the average are weights divided by their sum.
    pub weight: f64,
}

impl Share {
    pub(super) fn encoding(&self) -> Encoding {
        self.delta.layout().encoding()
    }

    fn is(&self, contribution: &WeightedContribution) -> bool {
        let WeightedContribution { key, weight, encoding, .. } = contribution;
        self.delta.key() == key && self.encoding() == *encoding && self.weight.to_bits() == weight.to_bits()
    }
}

/// A round that is being reduced. Dropped unfinished, it leaves nothing.
#[derive(Debug)]
pub struct RoundFold {
    /// In canonical order, as they were given.
    shares: Vec<Share>,
    /// What is folded of them.
    inputs: Inputs,
    treatments: Vec<Treatment>,
    /// What is not folded, and what it was when that was decided.
    left_out: Vec<(ContributionKey, Digest)>,
    new: NewVersion,
    chunks: Mutex<Vec<Progress>>,
    /// Vectors that no core works with at the moment.
    idle: Mutex<Vec<Scratch>>,
}

#[derive(Debug)]
enum Progress {
    Open,
    UnderWay,
    Folded(Box<FoldedChunk>),
}

impl RoundFold {
    /// Begins to make the version after `base` of these deltas, in any order: the canonical order is by site, then by
    /// round. Takes the new version's space on disk. An orphan of that version is replaced in the end. If the rule
    /// [compares deltas](Aggregation::compares_deltas), they must be whole, and are read.
    ///
    /// # Errors
    /// [`ReduceError::NoContributions`], [`ReduceError::TooFew`], [`ReduceError::Unfit`], what is wrong with a
    /// delta that is compared, or the model files'.
    pub fn begin(
        mut shares: Vec<Share>,
        base: ModelVersion,
        optimizer: OuterOptimizer,
        aggregation: &Aggregation,
        tensors: TensorPlan,
        models: &ModelFiles,
    ) -> Result<Self, ReduceError> {
        shares.sort_by(|a, b| canonical(a.delta.key()).cmp(&canonical(b.delta.key())));
        check(&shares, &base)?;
        let Judgement { shares: folded, combination, treatments, left_out } =
            Judgement::new(base.version() + 1, &shares, aggregation, |distances| {
                survey(&shares, &base, distances)
            })?;
        let (momentum, second_moment) =
            (has_momentum(&optimizer), initial_second_moment(&optimizer).is_some());
        let layout = ModelLayout { momentum, second_moment, ..base.layout() };
        // Successive updates of different fragments are of different parameters: there is nothing to compare.
        let previous = base.version().checked_sub(1).filter(|_| layout.fragments == 1);
        // It may be gone; what is recorded of the round then says less.
        let previous = previous.and_then(|version| models.open(base.run(), version, base.layout()).ok());
        let new = models.begin(base.run(), base.version() + 1, layout)?;
        let chunks = (0..layout.plan.chunks()).map(|_| Progress::Open).collect();
        Ok(Self {
            shares,
            inputs: Inputs::new(folded, base, previous, optimizer, combination, tensors),
            treatments,
            left_out,
            new,
            chunks: Mutex::new(chunks),
            idle: Mutex::default(),
        })
    }

    /// Whether these are the contributions that it was begun with.
    pub fn is_of(&self, contributions: &[WeightedContribution]) -> bool {
        let mut contributions: Vec<_> = contributions.iter().collect();
        contributions.sort_by(|a, b| canonical(&a.key).cmp(&canonical(&b.key)));
        let shares = &self.shares;
        shares.len() == contributions.len()
            && shares.iter().zip(contributions).all(|(share, one)| share.is(one))
    }

    /// How many chunks are folded.
    pub fn folded(&self) -> usize {
        lock(&self.chunks).iter().filter(|progress| matches!(progress, Progress::Folded(_))).count()
    }

    /// Folds the model's chunk that is chunk `index` of the deltas, and durable in all of them; does nothing if it
    /// is folded, or being folded. Several threads may fold at a time.
    ///
    /// # Errors
    /// See [`ReduceError`]; the chunk can be tried again.
    pub fn fold_delta(&self, index: u32) -> Result<(), ReduceError> {
        self.fold(self.inputs.fragment().chunk(index))
    }

    /// Folds the model's chunk `index`, as [`RoundFold::fold_delta`]; one that the round does not synchronise is
    /// carried over from the base.
    ///
    /// # Errors
    /// See [`ReduceError`]; the chunk can be tried again.
    fn fold(&self, index: u32) -> Result<(), ReduceError> {
        self.inputs.base.plan().range(index).map_err(ModelError::from)?;
        let begin = |progress: &mut Progress| match progress {
            Progress::Open => {
                *progress = Progress::UnderWay;
                true
            }
            Progress::UnderWay | Progress::Folded(_) => false,
        };
        if !begin(&mut lock(&self.chunks)[index as usize]) {
            return Ok(());
        }
        let mut scratch = lock(&self.idle).pop().unwrap_or_default();
        let folded = self.inputs.fold(index, &mut scratch, &self.new);
        lock(&self.idle).push(scratch);
        let (progress, result) = match folded {
            Ok(folded) => (Progress::Folded(Box::new(folded)), Ok(())),
            Err(error) => (Progress::Open, Err(error)),
        };
        lock(&self.chunks)[index as usize] = progress;
        result
    }

    /// Folds what is not folded yet, on the cores of the current rayon pool, in the chunks' order as far as
    /// there is one: disks prefer that.
    ///
    /// # Errors
    /// The first of [`RoundFold::fold`]'s.
    pub fn fold_rest(&self) -> Result<(), ReduceError> {
        let chunks = self.inputs.base.plan().chunks();
        let (next, failure) = (AtomicU32::new(0), OnceLock::new());
        let work = || {
            while failure.get().is_none() {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= chunks {
                    return;
                }
                if let Err(error) = self.fold(index) {
                    let _ = failure.set(error);
                }
            }
        };
        let workers = workers(self.inputs.scratch_bytes());
        rayon::scope(|scope| (0..workers).for_each(|_| scope.spawn(|_| work())));
        failure.into_inner().map_or(Ok(()), Err)
    }

    /// Folds the rest, compares each delta with the one that was accepted, and makes the version durable.
    ///
    /// # Errors
    /// See [`ReduceError`]; nothing is left on disk then. [`ReduceError::OtherContributions`] unless these are
    /// the contributions that it was begun with.
    pub fn finish(self, accepted: &[WeightedContribution]) -> Result<Reduction, ReduceError> {
        if !self.is_of(accepted) {
            return Err(ReduceError::OtherContributions { round: self.new.version() });
        }
        self.fold_rest()?;
        let Self { inputs, mut treatments, left_out, new, chunks, .. } = self;
        let folded: Vec<FoldedChunk> = chunks
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .into_iter()
            .filter_map(|progress| match progress {
                Progress::Folded(folded) => Some(*folded),
                Progress::Open | Progress::UnderWay => None,
            })
            .collect();
        for (place, share) in inputs.shares.iter().enumerate() {
            let mut hasher = blake3::Hasher::new();
            // Chunks that were carried over have no digests.
            for digest in folded.iter().filter_map(|chunk| chunk.digests.get(place)) {
                hasher.update(digest.as_bytes());
            }
            check_delta(share.delta.key(), accepted, hasher.finalize().into())?;
        }
        for (key, found) in &left_out {
            check_delta(key, accepted, *found)?;
        }
        // Where the rule leaves something out, which moves the places, its survey has found all norms.
        for (place, treatment) in treatments.iter_mut().enumerate() {
            let squares = folded.iter().filter_map(|chunk| *chunk.squares.get(place)?);
            let norm = squares.reduce(|sum, square| sum + square).map(f64::sqrt);
            treatment.norm = treatment.norm.or(norm);
        }
        let mut sums = Sums::default();
        let pieces = || folded.iter().flat_map(|chunk| chunk.sums.iter().copied());
        pieces().for_each(|(_, piece)| sums.add(piece));
        let has_momentum = inputs.base.layout().momentum;
        let tensors = inputs.tensors.norms(pieces(), has_momentum);
        let records: Vec<_> = folded.iter().map(|chunk| chunk.record).collect();
        Ok(Reduction {
            version: new.finish(&records)?,
            delta_norm: sums.delta_squares.sqrt(),
            update_norm: sums.update_squares.sqrt(),
            statistics: sums.statistics(has_momentum),
            treatments,
            tensors,
        })
    }
}

/// Where a delta stands in the canonical order: by site, then by the round that it was trained for.
fn canonical(key: &ContributionKey) -> (&SiteName, u32) {
    (&key.site, key.round)
}

/// Refuses lists that no round can have: the engine's invariants, checked before they cost a version.
fn check(shares: &[Share], base: &ModelVersion) -> Result<(), ReduceError> {
    let round = base.version() + 1;
    let plan = base.layout().fragment(round).plan();
    if shares.is_empty() {
        return Err(ReduceError::NoContributions { round });
    }
    let unfit = |key: &ContributionKey, reason: String| {
        Err(ReduceError::Unfit { round, key: Box::new(key.clone()), reason })
    };
    for Share { delta, weight } in shares {
        let key = delta.key();
        if key.run != *base.run() || !(1..=round).contains(&key.round) {
            return unfit(key, "is not for this round or one before".to_owned());
        }
        if delta.layout() != DeltaLayout::new(plan, delta.layout().encoding()) {
            return unfit(key, "is not cut as the round's part of the model is".to_owned());
        }
        if !weight.is_finite() || *weight <= 0.0 {
            return unfit(key, format!("has the weight {weight}, which must be finite and above 0"));
        }
    }
    let trained = |share: &Share| (share.delta.key().site.clone(), share.delta.key().round);
    match shares.windows(2).find(|pair| trained(&pair[0]) == trained(&pair[1])) {
        Some(pair) => unfit(pair[1].delta.key(), "is there twice".to_owned()),
        None => Ok(()),
    }
}

/// Compares what was read of a delta with the one that was accepted: a chunk may have been sent again meanwhile.
fn check_delta(
    key: &ContributionKey,
    accepted: &[WeightedContribution],
    found: Digest,
) -> Result<(), ReduceError> {
    match accepted.iter().find(|accepted| accepted.key == *key) {
        Some(WeightedContribution { delta_digest: accepted, .. }) if *accepted != found => {
            Err(ReduceError::OtherDelta { key: Box::new(key.clone()), accepted: *accepted, found })
        }
        _ => Ok(()),
    }
}

/// Looks at all deltas before they are folded.
fn survey(shares: &[Share], base: &ModelVersion, distances: bool) -> Result<Survey, ReduceError> {
    let plan = base.layout().fragment(base.version() + 1).plan();
    let tile_parameters = tile_parameters(shares.iter().map(Share::encoding));
    let bytes = Gather::bytes(shares, plan.chunk_parameters() as usize, tile_parameters)
        + Survey::bytes(shares.len(), distances);
    Survey::of(shares, plan, tile_parameters, distances, workers(bytes))
}

/// Cores that work at a time, with vectors of so many bytes each.
fn workers(scratch_bytes: usize) -> usize {
    rayon::current_num_threads().min(SCRATCH_BYTES_MAX / scratch_bytes).max(1)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
