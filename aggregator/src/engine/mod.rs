//! The round engine: a pure state machine, one [`Run`] per run.
//!
//! `step(plan, event, now)` turns a state into the next one and a list of effects. The engine owns every
//! decision about rounds: who takes part, what counts, when a round ends, what a site shall do now. It
//! must never do I/O, read a clock, draw randomness but from the run's seed, or panic: an event that may
//! not happen is a typed [`Rejection`] that leaves the state as it was.
//!
//! ```text
//!              enough sites ready                    all at work delivered, or deadline with quorum
//!   ┌► Waiting ──────────────────► Training ◄─┐ ──────────────────────────────────► Reducing ◄─┐
//!   │                                 └───────┘                                      │   └──────┘
//!   │                   deadline without quorum: attempt + 1,         failed: again  │
//!   │                   deliveries kept                               after a while  │
//!   └──────────────────────── committed, rounds left ────────────────────────────────┤
//!                                                                                    │ last round
//!        Done ◄── all that are connected reported, or deadline ── Evaluating ◄───────┘
//!
//!   status: Created ─ Start ─► Active ◄─ Pause / Resume ─► Paused;  Active ─► Finished;  Abort from any
//! ```
//!
//! Rules that the driver and the sites rely on:
//!
//! - A contribution is keyed by (run, round, site) and not by attempt: the base model of a round is the
//!   same in each attempt, so a site's delta is too. Round `r` (from 1) trains from version `r - 1`.
//! - A site at work that loses its connection stays at work until the deadline: it may come back. Without
//!   a deadline the round waits for it; pausing and resuming the run then replaces the sites that are gone.
//! - At a deadline without quorum the sites that did not deliver are *replaced*: others take their place,
//!   those that were not tried in this round first. A replaced site goes on training, and its delta counts
//!   if it arrives while the round lasts. While the round has fewer sites than it wants, each site that
//!   becomes ready joins it.
//! - Deadlines, and the local steps of slow sites, may follow the sites' [`Pace`] in earlier rounds, which is
//!   stored with the run. The run's clock ([`State::cumulative_step`]) runs as if all took the full number.
//! - With over-selection a round puts more sites to work than it waits for and ends with the first deltas;
//!   those that come later are late.
//! - A site whose round ends without it is *behind* where the specification takes late deltas: it goes on with
//!   what it was put to work on and takes part in no other round until its delta is in, which then counts in the
//!   round that is open, or the next one, as a contribution with an *age*. It is never waited for and counts
//!   towards no quorum. It is given up when its delta would be too old, when too few sites are free to begin a
//!   round, and at a deadline without quorum: then it may be put to work anew.
//! - In the buffered mode (FedBuff, arXiv 2106.06639) a round is the filling of a buffer: every ready site that is
//!   neither behind nor has delivered in the round is put to work, and the round ends with so many deltas, of
//!   whatever age. The sites that are still at work then are behind.
//! - Which part of the model a round synchronises is no affair of the engine's. With streaming, sites train ahead of
//!   the next round on their own account: rounds still follow each other.
//! - Deltas are taken while the run is paused too (what was trained is not wasted), but the round does not
//!   end before the run goes on.
//!
//! Persistence: the driver writes [`State`] (serde) and the effects that are records
//! ([`Effect::is_record`]) in one transaction, and performs the others afterwards. All of them are
//! idempotent; after a crash, [`Run::restore`] and [`Run::resume_effects`] make good what was not done.
//! Who is connected is not stored: after a restart nobody is until it comes back, for which deadlines
//! wait at least [`RECONNECT_MS_MAX`] (or the round's deadline where that is shorter).

mod effect;
mod event;
mod instruction;
mod pace;
mod participation;
mod plan;
mod progress;
mod state;
mod step;
mod words;

#[cfg(test)]
mod simulation;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use consort_common::{ids::SiteName, units::UnixMs};

pub use self::{
    effect::{Effect, RoundRecord, Weighted},
    event::{
        ContributionFacts, Evaluation, Event, ReducedFacts, Rejection, RoundStatistics, TensorNorms,
        Treatment,
    },
    instruction::{Instruction, Participation},
    pace::Pace,
    plan::Plan,
    state::{
        Assignment, Behind, Contribution, Evaluating, Phase, Reducing, RunStatus, Standing, State, Training,
    },
};

/// How long deadlines wait for sites to come back after the aggregator's restart, in milliseconds.
pub const RECONNECT_MS_MAX: u64 = 60_000;

/// Most sites that can be ready for one run.
pub const SITES_MAX: usize = 4096;

/// Most characters kept of a reason that an operator or the reduction gives.
pub const REASON_CHARACTERS_MAX: usize = 500;

/// One run: its state, and which sites are ready for it now.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    state: State,
    roster: Roster,
}

/// What is known of the sites at this moment; never stored.
#[derive(Debug, Clone, Default, PartialEq)]
struct Roster {
    /// Connected and ready for the run, with the tokens that they have to train on.
    ready: BTreeMap<SiteName, u64>,
    /// Until then sites may still be on their way back after a restart; 0: no longer.
    patient_until_ms: UnixMs,
}

impl Run {
    /// A run that was created and not started; nobody is connected.
    pub fn new() -> Self {
        Self { state: State::new(), roster: Roster::default() }
    }

    /// A run as it was stored; nobody is connected. Perform [`Run::resume_effects`] next.
    pub fn restore(plan: &Plan, state: State, now: UnixMs) -> Self {
        let patience_ms =
            plan.deadline_ms(&state.pace).map_or(RECONNECT_MS_MAX, |ms| ms.min(RECONNECT_MS_MAX));
        let roster = Roster { ready: BTreeMap::new(), patient_until_ms: now.saturating_add(patience_ms) };
        Self { state, roster }
    }

    /// What is stored.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The sites that are connected and ready, by name, with the tokens that they have to train on.
    pub fn ready(&self) -> &BTreeMap<SiteName, u64> {
        &self.roster.ready
    }

    /// The ready sites that are not at work on an earlier round.
    fn free_sites(&self) -> BTreeMap<SiteName, u64> {
        let is_free = |(site, _): &(&SiteName, &u64)| !self.state.behind.contains_key(*site);
        self.roster.ready.iter().filter(is_free).map(|(site, tokens)| (site.clone(), *tokens)).collect()
    }

    /// The deadline of the phase in progress; none while the run is not active.
    pub fn deadline_ms(&self) -> Option<UnixMs> {
        if self.state.status != RunStatus::Active {
            return None;
        }
        let deadline_ms = match &self.state.phase {
            Phase::Training(training) => training.deadline_ms?,
            Phase::Evaluating(evaluating) => evaluating.deadline_ms,
            Phase::Waiting | Phase::Reducing(_) | Phase::Done => return None,
        };
        Some(deadline_ms.max(self.roster.patient_until_ms))
    }

    /// When the next [`Event::Tick`] is due, if no other event comes before. After a step it is later than
    /// that step's `now`.
    pub fn next_timer(&self) -> Option<UnixMs> {
        if self.state.status != RunStatus::Active {
            return None;
        }
        match &self.state.phase {
            Phase::Training(_) => self.deadline_ms(),
            // The end of the patience with sites that do not come back may end the phase.
            Phase::Evaluating(evaluating) => Some(match self.roster.patient_until_ms {
                0 => evaluating.deadline_ms,
                patient_until_ms => patient_until_ms,
            }),
            Phase::Reducing(reducing) => reducing.retry_at_ms,
            Phase::Waiting | Phase::Done => None,
        }
    }

    /// The sites whose held-out loss of the last version is waited for: those connected, and for a while
    /// after a restart also those that may be on their way back.
    fn unheard(&self) -> Vec<&SiteName> {
        let Phase::Evaluating(evaluating) = &self.state.phase else { return Vec::new() };
        let is_patient = self.roster.patient_until_ms > 0;
        let is_unheard = |site: &&SiteName| {
            !self.state.has_evaluated(site, self.state.version)
                && (is_patient || self.roster.ready.contains_key(*site))
        };
        evaluating.asked.iter().filter(is_unheard).collect()
    }

    /// The effects to perform after a restart: those that the state calls for and that may not have been
    /// performed, or not to their end. Records are not among them: they were written with the state.
    pub fn resume_effects(&self, plan: &Plan) -> Vec<Effect> {
        let state = &self.state;
        let mut effects = Vec::new();
        if matches!(state.status, RunStatus::Aborted { .. }) {
            effects.push(Effect::DiscardSpool { round: u32::MAX, keep: BTreeSet::new() });
        } else if state.version > 0 {
            effects.push(state.discard());
        }
        effects.extend(state.unpublished.iter().map(|&version| Effect::Publish { version }));
        if let (RunStatus::Active, Phase::Reducing(reducing)) = (&state.status, &state.phase)
            && reducing.retry_at_ms.is_none()
        {
            effects.push(reducing.effect(plan));
        }
        effects.push(Effect::InstructionsChanged);
        effects
    }
}

impl Default for Run {
    fn default() -> Self {
        Self::new()
    }
}
