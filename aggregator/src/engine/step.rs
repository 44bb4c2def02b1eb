//! The transitions that events make: each is checked whole, then applied.

use std::{collections::BTreeSet, mem};

use consort_common::{
    ids::SiteName,
    units::{UnixMs, duration_ms},
};

use super::{
    Contribution, ContributionFacts, Effect, Evaluation, Event, Phase, Plan, REASON_CHARACTERS_MAX,
    ReducedFacts, Rejection, RoundRecord, Run, RunStatus, SITES_MAX, Standing,
    event::{check_claim, check_measurement},
    participation::weighted,
    state::{EVALUATED_VERSIONS_MAX, UNPUBLISHED_VERSIONS_MAX},
    words,
};

/// The pause before a failed reduction is tried again, in milliseconds; it doubles with each failure...
pub const REDUCE_RETRY_MS_MIN: u64 = 5_000;
/// ...up to this.
pub const REDUCE_RETRY_MS_MAX: u64 = 5 * 60 * 1000;

/// How long the last evaluation waits for a site that lost its connection, in milliseconds.
pub const EVALUATION_PATIENCE_MS: u64 = 10_000;

impl Run {
    /// Takes an event at `now` and says what to do. Where no effect comes back, nothing changed.
    ///
    /// # Errors
    /// Why the event may not happen; the run is as it was.
    pub fn step(&mut self, plan: &Plan, event: Event, now: UnixMs) -> Result<Vec<Effect>, Rejection> {
        let mut turn = Turn { run: self, plan, now, effects: Vec::new(), changed: false };
        turn.apply(event)?;
        turn.move_on();
        let Turn { mut effects, changed, .. } = turn;
        if changed {
            effects.push(Effect::InstructionsChanged);
        }
        Ok(effects)
    }
}

/// One step in progress.
pub(super) struct Turn<'a> {
    pub run: &'a mut Run,
    pub plan: &'a Plan,
    pub now: UnixMs,
    pub effects: Vec<Effect>,
    /// Whether the state or the roster changed.
    pub changed: bool,
}

impl Turn<'_> {
    /// Every handler checks everything before it changes anything.
    fn apply(&mut self, event: Event) -> Result<(), Rejection> {
        match event {
            Event::SiteReady { site, train_tokens } => self.site_ready(site, train_tokens),
            Event::SiteGone(site) => {
                self.site_gone(&site);
                Ok(())
            }
            Event::Start => self.start(),
            Event::Pause => self.pause(),
            Event::Resume => self.resume(),
            Event::Abort { reason } => self.abort(&reason),
            Event::Delivered { site, round, facts } => self.delivered(&site, round, facts),
            Event::Tick => Ok(()),
            Event::Reduced { round, facts } => self.reduced(round, facts),
            Event::ReduceFailed { round, reason, spoilt } => {
                self.reduce_failed(round, &reason, spoilt.as_ref())
            }
            Event::Published { version } => {
                self.changed |= self.run.state.unpublished.remove(&version);
                Ok(())
            }
            Event::Evaluated { site, evaluation } => self.evaluated(site, evaluation),
        }
    }

    pub(super) fn say(&mut self, text: impl Into<String>) {
        self.effects.push(Effect::Event(text.into()));
        self.changed = true;
    }

    // What operators do.

    fn start(&mut self) -> Result<(), Rejection> {
        let state = &mut self.run.state;
        if state.status != RunStatus::Created {
            return Err(Rejection::WrongStatus { action: "started", status: state.status.clone() });
        }
        state.status = RunStatus::Active;
        self.say("the run was started");
        Ok(())
    }

    /// A site that is still to report its last held-out loss gets a while to come back.
    fn site_gone(&mut self, site: &SiteName) {
        let gone = self.run.roster.ready.remove(site).is_some();
        self.changed |= gone;
        let state = &self.run.state;
        let awaited = matches!(&state.phase, Phase::Evaluating(evaluating) if evaluating.asked.contains(site))
            && !state.has_evaluated(site, state.version);
        if gone && awaited {
            let until = self.now.saturating_add(EVALUATION_PATIENCE_MS);
            self.run.roster.patient_until_ms = self.run.roster.patient_until_ms.max(until);
        }
    }

    fn pause(&mut self) -> Result<(), Rejection> {
        let state = &mut self.run.state;
        if state.status != RunStatus::Active {
            return Err(Rejection::WrongStatus { action: "paused", status: state.status.clone() });
        }
        state.status = RunStatus::Paused;
        self.say("the run was paused");
        Ok(())
    }

    /// Deadlines begin anew, since the sites were idle; sites that are gone lose their place.
    fn resume(&mut self) -> Result<(), Rejection> {
        let deadline_ms = self.deadline_from_now();
        let state = &mut self.run.state;
        if state.status != RunStatus::Paused {
            return Err(Rejection::WrongStatus { action: "resumed", status: state.status.clone() });
        }
        state.status = RunStatus::Active;
        self.say("the run goes on");
        match &mut self.run.state.phase {
            Phase::Training(training) => {
                training.deadline_ms = deadline_ms;
                let undelivered =
                    |site: &SiteName| !matches!(training.sites.get(site), Some(Standing::Delivered(_)));
                for (_, assignment) in training.assignments.iter_mut().filter(|(site, _)| undelivered(site)) {
                    assignment.began_ms = None;
                }
                let ready = &self.run.roster.ready;
                // With nobody connected the aggregator has just restarted, which says nothing about sites.
                if !ready.is_empty() {
                    self.replace(|site, run| !run.roster.ready.contains_key(site));
                }
            }
            Phase::Reducing(reducing) => {
                reducing.retry_at_ms = None;
                let effect = reducing.effect(self.plan);
                self.effects.push(effect);
            }
            Phase::Evaluating(evaluating) => {
                evaluating.deadline_ms = self.now.saturating_add(self.plan.evaluation_deadline_ms());
            }
            Phase::Waiting | Phase::Done => {}
        }
        Ok(())
    }

    fn abort(&mut self, reason: &str) -> Result<(), Rejection> {
        let round = self.run.state.round();
        let state = &mut self.run.state;
        if state.status.is_over() {
            return Err(Rejection::WrongStatus { action: "aborted", status: state.status.clone() });
        }
        let reason = shortened(reason);
        state.status = RunStatus::Aborted { reason: reason.clone() };
        state.phase = Phase::Done;
        state.behind.clear();
        state.late.clear();
        self.effects.push(Effect::DiscardSpool { round, keep: BTreeSet::new() });
        self.say(format!("the run was aborted: {reason}"));
        Ok(())
    }

    // What sites do.

    fn site_ready(&mut self, site: SiteName, train_tokens: u64) -> Result<(), Rejection> {
        let ready = &mut self.run.roster.ready;
        if ready.len() >= SITES_MAX && !ready.contains_key(&site) {
            return Err(Rejection::TooManySites { site, limit: SITES_MAX });
        }
        if let Phase::Evaluating(evaluating) = &mut self.run.state.phase {
            self.changed |= evaluating.asked.insert(site.clone());
        }
        self.changed |= ready.insert(site, train_tokens) != Some(train_tokens);
        Ok(())
    }

    fn delivered(&mut self, site: &SiteName, round: u32, facts: ContributionFacts) -> Result<(), Rejection> {
        let state = &mut self.run.state;
        if state.status == RunStatus::Created || state.status.is_over() {
            return Err(Rejection::NotRunning { status: state.status.clone() });
        }
        if let Some(first) = state.accepted(site, round) {
            self.effects.push(again(first, round, &facts)?);
            return Ok(());
        }
        let steps = state.assigned_steps(self.plan, site, round)?;
        check_facts(&facts, steps, self.plan)?;
        let filling = state.filling();
        let contribution = Contribution {
            site: site.clone(),
            age: filling.saturating_sub(round),
            assigned_tokens: self.plan.tokens(steps),
            accepted_ms: self.now,
            facts,
        };
        self.effects.push(Effect::RecordContribution { round, contribution: contribution.clone() });
        if state.behind.remove(site).is_some() {
            state.late.push(contribution);
            self.say(format!("{site} delivered late for round {round}; its delta counts in round {filling}"));
            return Ok(());
        }
        let Phase::Training(training) = &mut state.phase else { return Ok(()) };
        let before = training.sites.insert(site.clone(), Standing::Delivered(contribution));
        let late = if before == Some(Standing::Replaced) { " late" } else { "" };
        let goal = training.goal(self.plan);
        let count = state.in_hand(self.plan);
        self.say(format!("{site} delivered{late} for round {round} ({count} of {goal})"));
        Ok(())
    }

    fn evaluated(&mut self, site: SiteName, evaluation: Evaluation) -> Result<(), Rejection> {
        let state = &mut self.run.state;
        let (version, current) = (evaluation.version, state.version);
        if state.status == RunStatus::Created {
            return Err(Rejection::NotRunning { status: state.status.clone() });
        }
        if version > current {
            return Err(Rejection::UnknownVersion { version, current });
        }
        if !self.plan.evaluates(version) || is_forgotten(version, current) {
            return Err(Rejection::NotWanted { version, current });
        }
        check_measurement("the held-out loss", evaluation.loss)?;
        check_claim("held-out tokens", evaluation.tokens, self.plan.evaluation_tokens_max())?;
        let reported = state.evaluated.entry(version).or_default();
        if reported.contains(&site) {
            return Ok(());
        }
        if reported.len() >= SITES_MAX {
            return Err(Rejection::TooManySites { site, limit: SITES_MAX });
        }
        reported.insert(site.clone());
        self.effects.push(Effect::RecordEvaluation { site, evaluation });
        self.changed = true;
        Ok(())
    }

    // What the reduction does.

    fn reduced(&mut self, round: u32, facts: ReducedFacts) -> Result<(), Rejection> {
        let current = self.run.state.round();
        let state = &mut self.run.state;
        let reducing = match &mut state.phase {
            Phase::Reducing(reducing) if reducing.round == round => reducing,
            _ => return Err(Rejection::NotReducing { round, current }),
        };
        // A model with an infinity in it must never become a version.
        if !(facts.delta_norm.is_finite() && facts.update_norm.is_finite()) {
            return self.reduce_failed(round, "the averaged delta or its update is not finite", None);
        }
        let contributions = mem::take(&mut reducing.contributions);
        let contributors = contributions.len();
        let record = RoundRecord {
            round,
            attempts: reducing.attempts,
            started_ms: reducing.started_ms,
            committed_ms: self.now,
            first_step: state.cumulative_step,
            contributions: weighted(&contributions, self.plan),
            reduced: facts,
        };
        state.version = round;
        state.cumulative_step = state.cumulative_step.saturating_add(u64::from(self.plan.local_steps()));
        state.evaluated.retain(|&version, _| !is_forgotten(version, round));
        state.phase = Phase::Waiting;
        if round >= self.plan.rounds() {
            self.begin_evaluating(contributions);
        }
        let loss = record.train_loss();
        let stale = record.contributions.iter().filter(|one| one.contribution.age > 0).count();
        let late = if stale == 0 { String::new() } else { format!(" ({stale} late)") };
        let deltas = if stale == 0 && self.plan.buffer().is_none() {
            words::count(contributors, "site", "sites")
        } else {
            words::count(contributors, "delta", "deltas")
        };
        self.effects.push(Effect::Commit(record));
        self.effects.push(self.run.state.discard());
        self.publish(round);
        self.say(format!("round {round} is committed: {deltas}{late}, training loss {loss:.4}"));
        Ok(())
    }

    fn publish(&mut self, version: u32) {
        if !self.plan.publishes(version) {
            return;
        }
        let unpublished = &mut self.run.state.unpublished;
        unpublished.insert(version);
        if unpublished.len() > UNPUBLISHED_VERSIONS_MAX {
            unpublished.pop_first();
        }
        self.effects.push(Effect::Publish { version });
    }

    /// Tries again after a pause; without the delta that is spoilt, as if its site had gone before it delivered,
    /// where the others are a quorum, and enough for the rule of aggregation.
    fn reduce_failed(
        &mut self,
        round: u32,
        reason: &str,
        spoilt: Option<&(SiteName, u32)>,
    ) -> Result<(), Rejection> {
        let current = self.run.state.round();
        let reducing = match &mut self.run.state.phase {
            Phase::Reducing(reducing) if reducing.round == round => reducing,
            _ => return Err(Rejection::NotReducing { round, current }),
        };
        let pause_ms = REDUCE_RETRY_MS_MIN
            .saturating_mul(1_u64.checked_shl(reducing.failures).unwrap_or(u64::MAX))
            .min(REDUCE_RETRY_MS_MAX);
        reducing.failures = reducing.failures.saturating_add(1);
        reducing.retry_at_ms = Some(self.now.saturating_add(pause_ms));
        let is_spoilt = |one: &Contribution| {
            spoilt.is_some_and(|(site, trained)| one.site == *site && one.round(round) == *trained)
        };
        let counts_late = self.plan.buffer().is_some();
        let counting = |contributions: &[Contribution]| {
            contributions.iter().filter(|one| one.age == 0 || counts_late).count()
        };
        let (healthy, lost): (Vec<Contribution>, Vec<Contribution>) =
            reducing.contributions.iter().cloned().partition(|one| !is_spoilt(one));
        let (delivered, others) = (counting(&reducing.contributions), counting(&healthy));
        // More than were wanted may have delivered: replaced sites' deltas count, too.
        let quorum = self.plan.quorum(others, self.plan.sites_wanted(delivered));
        let are_enough = others >= quorum && healthy.len() as u64 >= self.plan.deltas_min();
        let leave_out = !lost.is_empty() && are_enough;
        if leave_out {
            reducing.contributions = healthy;
        }
        let (reason, pause) = (shortened(reason), duration_ms(pause_ms));
        if let (Some((site, trained)), true) = (spoilt, leave_out) {
            self.say(format!(
                "{site}'s delta for round {trained} is spoilt and left out of the average of round {round}"
            ));
        }
        self.say(format!("the reduction of round {round} failed, next try in {pause}: {reason}"));
        Ok(())
    }
}

/// Versions so old that who reported them is not remembered.
fn is_forgotten(version: u32, current: u32) -> bool {
    u64::from(version) + EVALUATED_VERSIONS_MAX as u64 <= u64::from(current)
}

/// A delta for which there is one already.
fn again(first: &Contribution, round: u32, facts: &ContributionFacts) -> Result<Effect, Rejection> {
    let site = first.site.clone();
    let (first, second) = (first.facts.delta_digest, facts.delta_digest);
    if first == second {
        Ok(Effect::Duplicate { site, round })
    } else {
        Err(Rejection::Conflict { site, round, first, second })
    }
}

/// Refuses facts that exceed the assignment, or that no training gives (a stored state holds no NaN).
fn check_facts(facts: &ContributionFacts, steps: u32, plan: &Plan) -> Result<(), Rejection> {
    check_claim("steps", u64::from(facts.steps), u64::from(steps))?;
    check_claim("tokens", facts.tokens, plan.tokens(steps))?;
    check_measurement("the training loss", facts.train_loss)?;
    check_measurement("the training time", facts.train_seconds)?;
    check_measurement("the delta's norm", facts.delta_norm)
}

fn shortened(reason: &str) -> String {
    reason.chars().take(REASON_CHARACTERS_MAX).collect()
}
