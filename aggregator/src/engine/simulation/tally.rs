//! What the oracle goes by, and what it counts.

use consort_common::spec::Weighting;

/// How often things happened: a simulation that never gets anywhere proves nothing.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Tally {
    pub steps: u64,
    pub commits: u64,
    pub chaotic_commits: u64,
    /// Rounds that took several attempts; replaced sites' deltas that counted; sites that joined an
    /// attempt under way.
    pub retried: u64,
    pub replaced: u64,
    pub joined: u64,
    pub duplicates: u64,
    pub conflicts: u64,
    pub late: u64,
    /// Rounds that ended without some of the sites that were selected beyond need.
    pub spared: u64,
    /// Rounds that began with a deadline that followed from earlier ones.
    pub adapted: u64,
    /// Assignments of fewer than the full local steps.
    pub shortened: u64,
    pub rejections: u64,
    pub crashes: u64,
    pub failed_reductions: u64,
    /// Deltas that turned out to be spoilt, and were left out of the average, or not, for want of others.
    pub left_out: u64,
    pub kept: u64,
    pub finished: u64,
    /// Deltas that were accepted for a later round than their own; sites whose work for an earlier round was given
    /// up for want of others; rounds of the buffered mode.
    pub folded: u64,
    pub given_up: u64,
    pub buffers: u64,
}

impl Tally {
    pub(super) fn add(self, other: Self) -> Self {
        Self {
            steps: self.steps + other.steps,
            commits: self.commits + other.commits,
            chaotic_commits: self.chaotic_commits + other.chaotic_commits,
            retried: self.retried + other.retried,
            replaced: self.replaced + other.replaced,
            joined: self.joined + other.joined,
            duplicates: self.duplicates + other.duplicates,
            conflicts: self.conflicts + other.conflicts,
            late: self.late + other.late,
            spared: self.spared + other.spared,
            adapted: self.adapted + other.adapted,
            shortened: self.shortened + other.shortened,
            rejections: self.rejections + other.rejections,
            crashes: self.crashes + other.crashes,
            failed_reductions: self.failed_reductions + other.failed_reductions,
            left_out: self.left_out + other.left_out,
            kept: self.kept + other.kept,
            finished: self.finished + other.finished,
            folded: self.folded + other.folded,
            given_up: self.given_up + other.given_up,
            buffers: self.buffers + other.buffers,
        }
    }
}

/// What the specification says, as the oracle reads it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms {
    pub rounds: u32,
    pub minimum: usize,
    pub quorum: usize,
    /// 0: none.
    pub deadline_ms: u64,
    /// Of the deadline that follows the sites' pace; 0: there is none.
    pub adaptive_minimum_ms: u64,
    pub weighting: Weighting,
    pub minimum_steps: u32,
    pub per_round: usize,
    pub over_selection: usize,
    pub staleness_max: u32,
    pub staleness_exponent: f64,
    /// 0: rounds are synchronous.
    pub buffer: usize,
    /// Deltas that the rule of aggregation takes.
    pub deltas_min: usize,
}

impl Terms {
    /// Deltas without which no round is committed, late ones among them only with a buffer; and where there is none,
    /// sites not at work on an earlier round without which none begins.
    pub(super) fn least(&self) -> usize {
        match (self.buffer, self.quorum, self.per_round) {
            (0, 0, 0) => self.minimum.max(1),
            (0, 0, per_round) => self.minimum.min(per_round).max(1),
            (0, quorum, _) => quorum,
            (buffer, ..) => buffer,
        }
    }
}
