//! The numbers of a run that the engine decides by: read-only, derived from the run specification.

use consort_common::spec::{RunSpec, Sampling, Weighting};

use super::Pace;

/// How long the sites have to report their held-out loss of the last version, in milliseconds.
pub const EVALUATION_DEADLINE_MS: u64 = 10 * 60 * 1000;

/// What the specification says about rounds. Total over all specifications, also those that validation
/// refuses: numbers that contradict each other are read in the way that keeps the run safe.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    spec: RunSpec,
}

impl Plan {
    /// The plan of a run.
    pub fn new(spec: &RunSpec) -> Self {
        Self { spec: spec.clone() }
    }

    /// Rounds to train.
    pub fn rounds(&self) -> u32 {
        self.spec.rounds
    }

    /// Seed of the selection of sites.
    pub fn seed(&self) -> u64 {
        self.spec.seed
    }

    /// Local steps of one assignment, but for slow sites; and steps of the run's clock per round.
    pub fn local_steps(&self) -> u32 {
        self.spec.training.local_steps
    }

    /// Fewest local steps that a slow site is given; none: every site takes as many.
    pub fn minimum_steps(&self) -> Option<u32> {
        Some(self.spec.participation.minimum_steps).filter(|steps| *steps > 0)
    }

    /// Tokens that `steps` local steps train.
    pub fn tokens(&self, steps: u32) -> u64 {
        self.spec.tokens(steps)
    }

    /// The cumulative step at which `round` (from 1) begins.
    pub fn first_step(&self, round: u32) -> u64 {
        u64::from(round.saturating_sub(1)) * u64::from(self.local_steps())
    }

    /// Most rounds between the one that a delta was trained for and the one in whose average it counts.
    pub fn staleness_max(&self) -> u32 {
        self.spec.participation.staleness_max
    }

    /// How fast a delta's weight falls with its age.
    pub fn staleness_exponent(&self) -> f64 {
        self.spec.participation.staleness_exponent
    }

    /// The deltas, of whatever age, with which a round of the buffered mode ends; none: rounds are synchronous.
    pub fn buffer(&self) -> Option<usize> {
        Some(self.spec.participation.buffer as usize).filter(|deltas| *deltas > 0)
    }

    /// What a contribution counts.
    pub fn weighting(&self) -> Weighting {
        self.spec.outer.weighting
    }

    /// Milliseconds that an attempt at a round may last, where the sites had this pace; none: as long as it
    /// takes.
    pub fn deadline_ms(&self, pace: &Pace) -> Option<u64> {
        let participation = &self.spec.participation;
        if self.buffer().is_some() {
            return None;
        }
        let milliseconds = |seconds: u64| seconds.saturating_mul(1000);
        let fixed_ms = Some(participation.deadline_seconds).filter(|seconds| *seconds > 0).map(milliseconds);
        let adaptive_ms = participation.adaptive_deadline.as_ref().and_then(|adaptive| {
            let usual_ms = pace.usual_ms(adaptive.deviations)?;
            Some(usual_ms.max(milliseconds(adaptive.minimum_seconds.max(1))))
        });
        [fixed_ms, adaptive_ms].into_iter().flatten().min()
    }

    /// Whether deadlines follow the sites' pace.
    pub fn has_adaptive_deadline(&self) -> bool {
        self.spec.participation.adaptive_deadline.is_some()
    }

    /// Milliseconds that the evaluation of the last version may last.
    pub fn evaluation_deadline_ms(&self) -> u64 {
        EVALUATION_DEADLINE_MS
    }

    /// Most held-out tokens that a site may report: sites measure whole batches.
    pub fn evaluation_tokens_max(&self) -> u64 {
        self.spec.evaluation.tokens_max.saturating_add(self.spec.tokens(1))
    }

    /// Whether version `version` is measured on held-out text.
    pub fn evaluates(&self, version: u32) -> bool {
        self.spec.evaluates(version)
    }

    /// Whether version `version` is published as a checkpoint.
    pub fn publishes(&self, version: u32) -> bool {
        self.spec.publishes(version)
    }

    /// Ready sites without which no round begins: the minimum, and at least the quorum.
    pub fn sites_to_begin(&self) -> usize {
        self.minimum_clients().max(self.spec.participation.quorum as usize)
    }

    /// Ready sites not at work on an earlier round, without which no synchronous round begins: the quorum or, where
    /// the specification leaves it open, the minimum, but no more than a round selects.
    pub fn free_sites_to_begin(&self) -> usize {
        let participation = &self.spec.participation;
        match (participation.quorum, participation.clients_per_round) {
            _ if self.buffer().is_some() => 0,
            (0, 0) => self.minimum_clients(),
            (0, clients) => self.minimum_clients().min(clients as usize),
            (quorum, _) => quorum as usize,
        }
    }

    /// Fewest deltas that the rule of aggregation takes.
    pub fn deltas_min(&self) -> u64 {
        self.spec.outer.aggregation.deltas_min()
    }

    /// How the sites of a round are drawn.
    pub fn sampling(&self) -> Sampling {
        self.spec.participation.sampling
    }

    /// Sites that a round selects beyond those that it waits for.
    pub fn over_selection(&self) -> usize {
        self.spec.participation.over_selection as usize
    }

    /// Deltas that a round waits for, with so many sites ready that are not at work: of all, or so many per round
    /// (and at least the quorum); the buffer's, where there is one.
    pub fn sites_wanted(&self, ready: usize) -> usize {
        let participation = &self.spec.participation;
        if let Some(buffer) = self.buffer() {
            return buffer;
        }
        match participation.clients_per_round {
            0 => ready,
            clients => ready.min(clients.max(participation.quorum) as usize),
        }
    }

    /// Sites that a round which wants so many deltas puts to work: with a buffer, all.
    pub fn places(&self, wanted: usize) -> usize {
        if self.buffer().is_some() { usize::MAX } else { wanted.saturating_add(self.over_selection()) }
    }

    /// Deltas that are waited for of the `selected` sites of an attempt, where the round wants so many: all
    /// but those that were selected beyond need.
    pub fn awaited(&self, selected: usize, wanted: usize) -> usize {
        let all_count = self.over_selection() == 0 && self.buffer().is_none();
        if all_count { selected } else { selected.min(wanted) }
    }

    /// Deltas without which a round is not committed. Where the specification leaves the quorum open, it
    /// is all that are awaited of the `selected` sites of the attempt. An attempt may select fewer than are
    /// `wanted`, because sites are gone, but the quorum stays at least the minimum of clients.
    pub fn quorum(&self, selected: usize, wanted: usize) -> usize {
        match self.spec.participation.quorum {
            _ if self.buffer().is_some() => 1,
            0 => self.awaited(selected, wanted).max(self.minimum_clients().min(wanted)),
            quorum => quorum as usize,
        }
    }

    fn minimum_clients(&self) -> usize {
        self.spec.participation.minimum_clients.max(1) as usize
    }
}
