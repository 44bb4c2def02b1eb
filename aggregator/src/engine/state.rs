//! What is stored of a run: everything that must survive a restart, and nothing about connections.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use consort_common::{ids::SiteName, units::UnixMs};
use serde::{Deserialize, Serialize};

use super::{Effect, Pace, Plan, Rejection, event::ContributionFacts, participation};

/// Versions, newest first, whose evaluations are still taken. Sites measure a version while it is the
/// newest, or at most a round later; remembering who reported each version ever would make the state grow.
pub const EVALUATED_VERSIONS_MAX: usize = 4;

/// Versions that may wait to be published at one time; older ones are given up.
pub const UNPUBLISHED_VERSIONS_MAX: usize = 8;

/// A run, as stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Whether it is to make progress.
    pub status: RunStatus,
    /// The newest committed version: as many rounds are committed.
    pub version: u32,
    /// Local steps that each site has taken up to that version, had it been in every round.
    pub cumulative_step: u64,
    /// Where the round in progress is.
    pub phase: Phase,
    /// Who has reported the held-out loss of the newest [`EVALUATED_VERSIONS_MAX`] versions.
    pub evaluated: BTreeMap<u32, BTreeSet<SiteName>>,
    /// Committed versions to be published and not known to be; at most [`UNPUBLISHED_VERSIONS_MAX`].
    pub unpublished: BTreeSet<u32>,
    /// The sites' pace in earlier rounds.
    #[serde(default)]
    pub pace: Pace,
    /// Sites that are still at work on a round that is over, and whose deltas are taken all the same. Each is at
    /// most [`Plan::staleness_max`] rounds behind the round in whose average its delta would count.
    #[serde(default)]
    pub behind: BTreeMap<SiteName, Behind>,
    /// Deltas of such sites that count in the next average to come: that of the round [`State::filling`].
    #[serde(default)]
    pub late: Vec<Contribution>,
}

/// What a site that is behind works on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Behind {
    /// The round of its assignment.
    pub round: u32,
    /// Local steps to take.
    pub steps: u32,
}

/// Whether a run is to make progress.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RunStatus {
    /// Not started.
    Created,
    /// Making progress.
    Active,
    /// Set aside by an operator.
    Paused,
    /// All rounds are committed and evaluated.
    Finished,
    /// Ended by an operator.
    Aborted {
        /// Why, in words.
        reason: String,
    },
}

impl RunStatus {
    /// Whether the run is over for good.
    pub fn is_over(&self) -> bool {
        matches!(self, Self::Finished | Self::Aborted { .. })
    }
}

impl fmt::Display for RunStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Created => "created",
            Self::Active => "active",
            Self::Paused => "paused",
            Self::Finished => "finished",
            Self::Aborted { .. } => "aborted",
        })
    }
}

/// Where the round in progress is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Not enough sites are ready.
    Waiting,
    /// Sites train and deliver.
    Training(Training),
    /// The deltas are averaged into the next version.
    Reducing(Reducing),
    /// The last version is measured at the sites.
    Evaluating(Evaluating),
    /// Nothing is left to do.
    Done,
}

/// A round whose sites are at work.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Training {
    /// From 1.
    pub round: u32,
    /// Times that sites were put to work for this round because others had not delivered, from 1.
    pub attempt: u32,
    /// When the first attempt began.
    pub started_ms: UnixMs,
    /// When this attempt ends; none: when all at work have delivered.
    pub deadline_ms: Option<UnixMs>,
    /// Deltas that the round waits for: of the sites that the first attempt selected, but for those beyond
    /// need.
    pub wanted: usize,
    /// Every site that was selected in any attempt.
    pub sites: BTreeMap<SiteName, Standing>,
    /// What each of them was put to work on: once per round, since in each attempt it is the same task.
    #[serde(default)]
    pub assignments: BTreeMap<SiteName, Assignment>,
}

/// What a site was put to work on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Assignment {
    /// When; none: unknown, or the run was paused since, so that the time it takes says nothing.
    pub began_ms: Option<UnixMs>,
    /// Local steps to take.
    pub steps: u32,
}

impl Training {
    /// The sites at work, by name.
    pub fn working(&self) -> impl Iterator<Item = &SiteName> {
        self.sites.iter().filter(|(_, standing)| **standing == Standing::Working).map(|(site, _)| site)
    }

    /// The contributions accepted so far, in the sites' order.
    pub fn contributions(&self) -> impl Iterator<Item = &Contribution> {
        self.sites.values().filter_map(|standing| match standing {
            Standing::Delivered(contribution) => Some(contribution),
            Standing::Working | Standing::Replaced => None,
        })
    }

    /// Deltas with which the round is complete.
    pub fn goal(&self, plan: &Plan) -> usize {
        self.wanted.max(plan.awaited(self.selected(), self.wanted))
    }

    /// Local steps that `site` was given. States stored by earlier versions have no assignments: each was of
    /// the full number.
    pub fn steps(&self, site: &SiteName, plan: &Plan) -> u32 {
        self.assignments.get(site).map_or(plan.local_steps(), |assignment| assignment.steps)
    }

    /// Sites at work and deltas accepted: what the attempt has selected.
    pub fn selected(&self) -> usize {
        self.working().count() + self.contributions().count()
    }
}

/// What became of a site that was selected.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Standing {
    /// The round waits for its delta.
    Working,
    /// It missed a deadline, or was gone when the run went on; its delta is taken but not waited for.
    Replaced,
    /// Its delta is accepted.
    Delivered(Contribution),
}

/// An accepted delta.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Contribution {
    /// Whose.
    pub site: SiteName,
    /// Rounds between the one that it was trained for and the one in whose average it counts; 0: the same.
    #[serde(default)]
    pub age: u32,
    /// Tokens of its assignment: what it is weighted by.
    pub assigned_tokens: u64,
    /// When it was accepted.
    pub accepted_ms: UnixMs,
    /// What the site and the upload said.
    pub facts: ContributionFacts,
}

impl Contribution {
    /// The round that it was trained for, where it counts in the average of `filled`.
    pub fn round(&self, filled: u32) -> u32 {
        filled.saturating_sub(self.age)
    }
}

/// A round whose deltas are being averaged.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reducing {
    /// From 1.
    pub round: u32,
    /// Attempts that it took.
    pub attempts: u32,
    /// When the first attempt began.
    pub started_ms: UnixMs,
    /// What is averaged, in canonical order: by site name, then the oldest first.
    pub contributions: Vec<Contribution>,
    /// Times that the reduction failed.
    pub failures: u32,
    /// When it is tried again; none: it is under way.
    pub retry_at_ms: Option<UnixMs>,
}

impl Reducing {
    /// The effect that performs the reduction.
    pub(super) fn effect(&self, plan: &Plan) -> Effect {
        let contributions = participation::weighted(&self.contributions, plan);
        Effect::Reduce { round: self.round, contributions }
    }
}

/// The last version, being measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Evaluating {
    /// Sites to hear from, where they are connected: the last round's contributors, and all that were
    /// ready since.
    pub asked: BTreeSet<SiteName>,
    /// When the run finishes without those that did not report.
    pub deadline_ms: UnixMs,
}

impl State {
    /// The state of a run that was created and not started.
    pub fn new() -> Self {
        Self {
            status: RunStatus::Created,
            version: 0,
            cumulative_step: 0,
            phase: Phase::Waiting,
            evaluated: BTreeMap::new(),
            unpublished: BTreeSet::new(),
            pace: Pace::default(),
            behind: BTreeMap::new(),
            late: Vec::new(),
        }
    }

    /// The round in progress (while waiting, the one to come), or the last one.
    pub fn round(&self) -> u32 {
        match &self.phase {
            Phase::Waiting => self.version.saturating_add(1),
            Phase::Training(training) => training.round,
            Phase::Reducing(reducing) => reducing.round,
            Phase::Evaluating(_) | Phase::Done => self.version,
        }
    }

    /// The round in whose average a delta counts that is accepted now.
    pub fn filling(&self) -> u32 {
        match &self.phase {
            Phase::Reducing(reducing) => reducing.round.saturating_add(1),
            _ => self.round(),
        }
    }

    /// Deltas that the round in progress has: in the buffered mode also those of earlier rounds.
    pub fn in_hand(&self, plan: &Plan) -> usize {
        let Phase::Training(training) = &self.phase else { return 0 };
        let late = if plan.buffer().is_some() { self.late.len() } else { 0 };
        training.contributions().count() + late
    }

    /// The delta of `site` for `round` that was accepted and is not averaged yet.
    pub fn accepted(&self, site: &SiteName, round: u32) -> Option<&Contribution> {
        let is_it = |filled: u32| move |one: &&Contribution| one.site == *site && one.round(filled) == round;
        let in_phase = match &self.phase {
            Phase::Training(training) if training.round == round => match training.sites.get(site) {
                Some(Standing::Delivered(contribution)) => Some(contribution),
                _ => None,
            },
            Phase::Reducing(reducing) => reducing.contributions.iter().find(is_it(reducing.round)),
            _ => None,
        };
        in_phase.or_else(|| self.late.iter().find(is_it(self.filling())))
    }

    /// Local steps that `site`, whose delta for `round` is not accepted yet, is to take for it.
    ///
    /// # Errors
    /// Why the round takes no delta of it.
    pub fn assigned_steps(&self, plan: &Plan, site: &SiteName, round: u32) -> Result<u32, Rejection> {
        if let Some(behind) = self.behind.get(site).filter(|behind| behind.round == round) {
            return Ok(behind.steps);
        }
        let not_assigned = || Rejection::NotAssigned { site: site.clone(), round };
        match &self.phase {
            Phase::Training(training) if training.round == round => {
                let is_selected = training.sites.contains_key(site);
                is_selected.then(|| training.steps(site, plan)).ok_or_else(not_assigned)
            }
            Phase::Waiting if self.round() == round => Err(not_assigned()),
            _ => Err(Rejection::RoundOver { round, current: self.round() }),
        }
    }

    /// The effect that deletes the deltas of committed rounds but for those of which one is still to be averaged, or
    /// to come. One that is performed late keeps more than it need.
    pub(super) fn discard(&self) -> Effect {
        let reducing = match &self.phase {
            Phase::Reducing(reducing) => reducing.contributions.as_slice(),
            _ => &[],
        };
        let reduced = reducing.iter().map(|one| one.round(self.round()));
        let late = self.late.iter().map(|one| one.round(self.filling()));
        let behind = self.behind.values().map(|behind| behind.round);
        let needed = reduced.chain(late).chain(behind);
        let keep = needed.filter(|round| *round <= self.version).collect();
        Effect::DiscardSpool { round: self.version, keep }
    }

    /// The versions that the sites that are behind train from.
    pub fn bases(&self) -> BTreeSet<u32> {
        self.behind.values().map(|behind| behind.round.saturating_sub(1)).collect()
    }

    /// Whose deltas the round in progress averages, and their shares, in canonical order: while sites train,
    /// if all deliver that are waited for and no other; nothing while nobody can tell whose they will be, which
    /// deltas of earlier rounds see to.
    pub fn expected(&self, plan: &Plan) -> Vec<(SiteName, f64)> {
        let is_open = matches!(self.phase, Phase::Training(_));
        if is_open && (plan.buffer().is_some() || !self.behind.is_empty() || !self.late.is_empty()) {
            return Vec::new();
        }
        let (sites, tokens): (Vec<_>, Vec<_>) = match &self.phase {
            Phase::Training(training)
                if training.selected() > plan.awaited(training.selected(), training.wanted) =>
            {
                return Vec::new();
            }
            Phase::Training(training) => {
                let assigned = |(site, standing): (&SiteName, &Standing)| match standing {
                    Standing::Working => Some((site.clone(), plan.tokens(training.steps(site, plan)))),
                    Standing::Delivered(contribution) => Some((site.clone(), contribution.assigned_tokens)),
                    Standing::Replaced => None,
                };
                training.sites.iter().filter_map(assigned).unzip()
            }
            Phase::Reducing(reducing) if reducing.contributions.iter().any(|one| one.age > 0) => {
                return Vec::new();
            }
            Phase::Reducing(reducing) => {
                let assigned = |one: &Contribution| (one.site.clone(), one.assigned_tokens);
                reducing.contributions.iter().map(assigned).unzip()
            }
            Phase::Waiting | Phase::Evaluating(_) | Phase::Done => return Vec::new(),
        };
        let tokens: Vec<(u64, u32)> = tokens.into_iter().map(|tokens| (tokens, 0)).collect();
        sites.into_iter().zip(participation::weights(&tokens, plan)).collect()
    }

    /// Whether `site` has reported its held-out loss of `version`.
    pub fn has_evaluated(&self, site: &SiteName, version: u32) -> bool {
        self.evaluated.get(&version).is_some_and(|sites| sites.contains(site))
    }
}

impl Default for State {
    fn default() -> Self {
        Self::new()
    }
}
