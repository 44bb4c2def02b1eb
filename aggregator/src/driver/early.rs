//! Folding the chunks of a round that every expected site has delivered, while the rest is on its way.
//!
//! What this makes is a head start and nothing else: it is in memory and in a version that is not in its
//! place yet, a restart forgets it, and the reduction takes it only if it was begun with exactly the
//! contributions that the engine reduces, as they were accepted. In every other case it is thrown away and the
//! round is reduced from the beginning, with the same result bit by bit. Under a rule of aggregation that compares
//! whole deltas nothing is folded early.
//!
//! One task per run folds one chunk at a time, on one thread; uploads never wait for it. Memory: one core's
//! share of `reduce::fold`, and a byte per chunk and delta.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use consort_common::{
    ids::{RunName, SiteName},
    spec::{Aggregation, OuterOptimizer},
};
use tokio::{
    sync::{Mutex as AsyncMutex, Notify, OwnedMutexGuard},
    task::spawn_blocking,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    models::{ModelFiles, ModelLayout},
    reduce::{ReduceError, RoundFold, Share, TensorPlan, WeightedContribution},
    spool::SpooledDelta,
};

/// What a run's round is expected to average.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct ExpectedRound {
    pub(super) round: u32,
    /// Sites and their weights, in canonical order; not empty.
    pub(super) weights: Vec<(SiteName, f64)>,
    pub(super) layout: ModelLayout,
    pub(super) optimizer: OuterOptimizer,
    /// One that averages value by value.
    pub(super) aggregation: Aggregation,
    pub(super) tensors: TensorPlan,
}

/// The rounds of all runs.
#[derive(Debug)]
pub(super) struct EarlyFolds {
    models: ModelFiles,
    /// What stays free on the disk besides the new version.
    reserve_bytes: u64,
    tasks: TaskTracker,
    stopping: CancellationToken,
    runs: Mutex<BTreeMap<RunName, Arc<EarlyRun>>>,
}

/// One run's round in progress.
#[derive(Debug)]
struct EarlyRun {
    name: RunName,
    arrivals: Mutex<Arrivals>,
    /// Something arrived, or what is expected changed.
    changed: Notify,
    /// What is folded so far. Who holds the lock is the only one to write the run's next version.
    slot: Slot,
}

type Slot = Arc<AsyncMutex<Option<Begun>>>;

/// A fold, and the state of the arrivals that it was begun in.
#[derive(Debug)]
struct Begun {
    generation: u64,
    fold: RoundFold,
}

/// The right to write a run's next version, with what is folded of it already. To be kept for as long as the
/// round is reduced.
pub(super) struct Claim {
    early: Option<RoundFold>,
    run: Arc<EarlyRun>,
    _slot: OwnedMutexGuard<Option<Begun>>,
}

impl Drop for Claim {
    fn drop(&mut self) {
        lock(&self.run.arrivals).claimed = false;
    }
}

impl Claim {
    /// What is folded already, if it is of these contributions.
    pub(super) fn take(&mut self, contributions: &[WeightedContribution]) -> Option<RoundFold> {
        self.early.take().filter(|fold| fold.is_of(contributions))
    }
}

/// What is known of a round's deltas.
#[derive(Debug, Default)]
struct Arrivals {
    expected: Option<ExpectedRound>,
    /// Of the expected round, whoever sends them.
    deltas: BTreeMap<SiteName, Arrived>,
    /// Counts the changes after which what was folded is worth nothing.
    generation: u64,
    /// Whether a fold was begun in this generation.
    begun: bool,
    /// Whether one of an earlier generation may still be there.
    stale: bool,
    /// Chunks of the deltas to fold: all expected sites have delivered them.
    ready: VecDeque<u32>,
    /// Whether the round is being reduced: nothing is done meanwhile, and nothing heard. What comes of the
    /// reduction changes what is expected.
    claimed: bool,
    /// Whether a task looks after the run.
    tended: bool,
}

#[derive(Debug)]
struct Arrived {
    delta: Arc<SpooledDelta>,
    /// Which chunks are durable.
    chunks: Vec<bool>,
}

/// What the task does next.
#[derive(Debug)]
enum Step {
    /// Throw away what is worth nothing any more.
    Discard,
    Begin(ExpectedRound, Vec<Share>),
    Fold(u32),
    Wait,
    /// Nothing is expected: the task ends.
    End,
}

impl EarlyFolds {
    pub(super) fn new(
        models: ModelFiles,
        reserve_bytes: u64,
        tasks: TaskTracker,
        stopping: CancellationToken,
    ) -> Self {
        Self { models, reserve_bytes, tasks, stopping, runs: Mutex::default() }
    }

    /// Tells what the run's round is expected to average, whenever that may have changed. What was folded for
    /// another expectation is thrown away.
    pub(super) fn expect(&self, run: &RunName, expected: Option<ExpectedRound>) {
        if expected.is_none() && !lock(&self.runs).contains_key(run) {
            return;
        }
        let run = self.run(run);
        let mut arrivals = lock(&run.arrivals);
        if arrivals.expected != expected && !arrivals.claimed {
            let round = |expected: &Option<ExpectedRound>| expected.as_ref().map(|expected| expected.round);
            if round(&arrivals.expected) != round(&expected) {
                arrivals.deltas.clear();
            }
            arrivals.expected = expected;
            arrivals.start_over();
            run.changed.notify_one();
        }
    }

    /// Tells that these chunks of the delta are durable.
    pub(super) fn chunks_stored(&self, delta: &Arc<SpooledDelta>, indices: &[u32]) {
        let key = delta.key();
        let Some(run) = lock(&self.runs).get(&key.run).cloned() else { return };
        let mut arrivals = lock(&run.arrivals);
        if arrivals.expected.as_ref().is_none_or(|expected| expected.round != key.round) {
            return;
        }
        arrivals.add(delta, indices);
        if !arrivals.tended {
            arrivals.tended = true;
            let (models, stopping) = (self.models.clone(), self.stopping.clone());
            let tended = tend(run.clone(), models, self.reserve_bytes);
            self.tasks.spawn(async move { stopping.run_until_cancelled(tended).await });
        }
        run.changed.notify_one();
    }

    /// Ends the early folding of the run's round, and waits until nothing writes its next version. To be kept
    /// for as long as the round is reduced.
    pub(super) async fn claim(&self, run: &RunName) -> Claim {
        let run = self.run(run);
        {
            let mut arrivals = lock(&run.arrivals);
            arrivals.claimed = true;
            arrivals.expected = None;
            arrivals.deltas.clear();
        }
        let mut slot = run.slot.clone().lock_owned().await;
        let begun = slot.take();
        let generation = {
            let mut arrivals = lock(&run.arrivals);
            let generation = arrivals.generation;
            arrivals.start_over();
            generation
        };
        let early = begun.filter(|begun| begun.generation == generation).map(|begun| begun.fold);
        Claim { early, run, _slot: slot }
    }

    fn run(&self, name: &RunName) -> Arc<EarlyRun> {
        let new = || {
            Arc::new(EarlyRun {
                name: name.clone(),
                arrivals: Mutex::default(),
                changed: Notify::new(),
                slot: Slot::default(),
            })
        };
        lock(&self.runs).entry(name.clone()).or_insert_with(new).clone()
    }
}

impl Arrivals {
    /// What was folded is worth nothing any more.
    fn start_over(&mut self) {
        self.generation += 1;
        self.stale |= self.begun;
        self.begun = false;
        self.ready.clear();
    }

    fn add(&mut self, delta: &Arc<SpooledDelta>, indices: &[u32]) {
        let site = &delta.key().site;
        // A site that computed its delta anew sends another.
        if self.deltas.get(site).is_none_or(|arrived| !Arc::ptr_eq(&arrived.delta, delta)) {
            let chunks = vec![false; delta.layout().chunks() as usize];
            self.deltas.insert(site.clone(), Arrived { delta: delta.clone(), chunks });
            self.start_over();
        }
        for &index in indices {
            let chunk = self.deltas.get_mut(site).and_then(|arrived| arrived.chunks.get_mut(index as usize));
            let new = chunk.is_some_and(|chunk| !std::mem::replace(chunk, true));
            if new && self.begun && self.is_complete(index) {
                self.ready.push_back(index);
            }
        }
    }

    /// The deltas that are expected, if all of them have begun to arrive.
    fn shares(&self) -> Option<Vec<Share>> {
        let share = |(site, weight): &(SiteName, f64)| {
            let delta = self.deltas.get(site)?.delta.clone();
            Some(Share { delta, weight: *weight })
        };
        self.expected.as_ref()?.weights.iter().map(share).collect()
    }

    fn is_complete(&self, index: u32) -> bool {
        let has = |site| self.deltas.get(site).is_some_and(|arrived| arrived.chunks[index as usize]);
        self.expected.as_ref().is_some_and(|expected| expected.weights.iter().all(|(site, _)| has(site)))
    }

    fn step(&mut self) -> Step {
        if self.claimed {
            return Step::Wait;
        }
        if std::mem::take(&mut self.stale) {
            return Step::Discard;
        }
        let Some(expected) = &self.expected else {
            self.tended = false;
            return Step::End;
        };
        if !self.begun {
            let Some(shares) = self.shares() else { return Step::Wait };
            let chunks = expected.layout.fragment(expected.round).plan().chunks();
            let ready: VecDeque<u32> = (0..chunks).filter(|index| self.is_complete(*index)).collect();
            // Nothing is gained, and no space taken, before there is something to fold.
            if ready.is_empty() {
                return Step::Wait;
            }
            let expected = expected.clone();
            self.ready = ready;
            self.begun = true;
            return Step::Begin(expected, shares);
        }
        self.ready.pop_front().map_or(Step::Wait, Step::Fold)
    }
}

/// Looks after a run until nothing is expected of it.
async fn tend(run: Arc<EarlyRun>, models: ModelFiles, reserve_bytes: u64) {
    loop {
        let (step, generation) = {
            let mut arrivals = lock(&run.arrivals);
            (arrivals.step(), arrivals.generation)
        };
        match step {
            Step::End => return,
            Step::Wait => {
                run.changed.notified().await;
                continue;
            }
            Step::Discard | Step::Begin(..) | Step::Fold(_) => {}
        }
        let mut slot = run.slot.clone().lock_owned().await;
        let (current, claimed) = {
            let arrivals = lock(&run.arrivals);
            (arrivals.generation, arrivals.claimed)
        };
        if claimed {
            continue;
        }
        let name = run.name.clone();
        let models = models.clone();
        let done = spawn_blocking(move || {
            // Removing what is worth nothing takes a while too.
            let begun = slot.take().filter(|begun| begun.generation == current);
            let result = match step {
                // Decided on before something changed.
                _ if generation != current => Ok(begun),
                Step::Begin(expected, shares) => {
                    let fold = begin(&models, &name, expected, shares, reserve_bytes);
                    fold.map(|fold| fold.map(|fold| Begun { generation, fold }))
                }
                Step::Fold(index) => fold(begun, index),
                Step::Discard | Step::Wait | Step::End => Ok(begun),
            };
            match result {
                Ok(begun) => *slot = begun,
                Err(error) => tracing::info!(run = %name, %error, "the round is not folded early"),
            }
        });
        if done.await.is_err() {
            return;
        }
    }
}

/// Begins to fold a round, unless that would take the space that others need.
fn begin(
    models: &ModelFiles,
    run: &RunName,
    expected: ExpectedRound,
    shares: Vec<Share>,
    reserve_bytes: u64,
) -> Result<Option<RoundFold>, ReduceError> {
    let ExpectedRound { round, layout, optimizer, aggregation, tensors, .. } = expected;
    if !models.has_room(layout.version_bytes(round).saturating_add(reserve_bytes))? {
        return Ok(None);
    }
    let base = models.open(run, round.saturating_sub(1), layout)?;
    RoundFold::begin(shares, base, optimizer, &aggregation, tensors, models).map(Some)
}

/// Folds one chunk; what cannot be folded is thrown away, and with it all that was.
fn fold(begun: Option<Begun>, index: u32) -> Result<Option<Begun>, ReduceError> {
    if let Some(begun) = &begun {
        begun.fold.fold_delta(index)?;
    }
    Ok(begun)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
