//! What a site shall be doing now: a pure function of the state, so that a site that missed some
//! instructions needs only the last.

use consort_common::{ids::SiteName, units::UnixMs};

use super::{Phase, Plan, Run, RunStatus, Standing, Training, words};

/// The whole of what a site shall be doing for the run.
#[derive(Debug, Clone, PartialEq)]
pub enum Instruction {
    /// Nothing; work in progress is void.
    Idle {
        /// Why, in words.
        reason: String,
    },
    /// Get ready for the run. Training in progress need not stop: it may be asked for next.
    Prepare,
    /// Train and deliver. Two of these with the same round are the same task.
    Train {
        /// From 1; trains from version `round - 1`.
        round: u32,
        /// The run's cumulative step before the round.
        first_step: u64,
        /// Local steps to take.
        steps: u32,
        /// Tokens that those steps train.
        tokens: u64,
        /// When the attempt ends, if it does.
        deadline_ms: Option<UnixMs>,
        /// Whether to report the base model's held-out loss first.
        evaluate_base: bool,
    },
    /// Report the held-out loss of a version.
    Evaluate {
        /// Which.
        version: u32,
    },
}

/// What a site was asked to do in the round in progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Participation {
    /// Nothing.
    NotSelected,
    /// The round waits for its delta.
    Working,
    /// Its delta is accepted.
    Delivered,
    /// Its delta is taken but not waited for.
    Replaced,
    /// It is at work on an earlier round, and its delta is taken.
    Behind,
}

impl Run {
    /// What `site`, which is connected, shall be doing now.
    pub fn instruction(&self, plan: &Plan, site: &SiteName) -> Instruction {
        match &self.state.status {
            RunStatus::Created => idle("the run has not been started"),
            RunStatus::Finished => idle("the run is finished"),
            RunStatus::Aborted { reason } => idle(format!("the run was aborted: {reason}")),
            RunStatus::Active | RunStatus::Paused if !self.roster.ready.contains_key(site) => {
                Instruction::Prepare
            }
            RunStatus::Paused => idle("the run is paused"),
            RunStatus::Active => self.active_instruction(plan, site),
        }
    }

    /// What `site` was asked to do in the round in progress.
    pub fn participation(&self, site: &SiteName) -> Participation {
        if self.state.behind.contains_key(site) {
            return Participation::Behind;
        }
        let delivered = match &self.state.phase {
            Phase::Training(training) => match training.sites.get(site) {
                Some(Standing::Working) => return Participation::Working,
                Some(Standing::Replaced) => return Participation::Replaced,
                standing => standing.is_some(),
            },
            Phase::Reducing(reducing) => reducing.contributions.iter().any(|one| one.site == *site),
            Phase::Waiting | Phase::Evaluating(_) | Phase::Done => false,
        };
        if delivered { Participation::Delivered } else { Participation::NotSelected }
    }

    fn active_instruction(&self, plan: &Plan, site: &SiteName) -> Instruction {
        let state = &self.state;
        if let Some(behind) = state.behind.get(site) {
            return train(plan, behind.round, behind.steps, None);
        }
        match &state.phase {
            Phase::Waiting => idle(format!("waiting for {}", words::sites_to_begin(self, plan))),
            Phase::Training(training) => self.training_instruction(plan, training, site),
            Phase::Reducing(reducing) => idle(format!("round {} is being reduced", reducing.round)),
            Phase::Evaluating(_) if state.has_evaluated(site, state.version) => {
                idle(format!("held-out loss of version {} accepted", state.version))
            }
            Phase::Evaluating(_) => Instruction::Evaluate { version: state.version },
            Phase::Done => idle("the run is finished"),
        }
    }

    fn training_instruction(&self, plan: &Plan, training: &Training, site: &SiteName) -> Instruction {
        match training.sites.get(site) {
            Some(Standing::Working | Standing::Replaced) => {
                train(plan, training.round, training.steps(site, plan), self.deadline_ms())
            }
            Some(Standing::Delivered(_)) => {
                let awaited = plan.awaited(training.selected(), training.wanted);
                let others = awaited.saturating_sub(self.state.in_hand(plan));
                let others = words::count(others, "other site", "other sites");
                idle(format!("delta accepted; waiting for {others}"))
            }
            None => idle(format!("not selected for round {}", training.round)),
        }
    }
}

fn train(plan: &Plan, round: u32, steps: u32, deadline_ms: Option<UnixMs>) -> Instruction {
    Instruction::Train {
        round,
        first_step: plan.first_step(round),
        steps,
        tokens: plan.tokens(steps),
        deadline_ms,
        evaluate_base: plan.evaluates(round.saturating_sub(1)),
    }
}

fn idle(reason: impl Into<String>) -> Instruction {
    Instruction::Idle { reason: reason.into() }
}
