//! What follows by itself: after an event the run moves on as far as it can, from phase to phase.

use std::{
    collections::{BTreeMap, BTreeSet},
    mem,
};

use consort_common::{ids::SiteName, units::UnixMs};

use super::{
    Assignment, Behind, Contribution, Evaluating, Phase, Reducing, Run, RunStatus, Standing, State, Training,
    participation::{Draw, select},
    step::Turn,
    words,
};

/// Most moves that one event can set off. The longest chain is two: a deadline replaces sites, after which
/// the round may be complete. The bound holds where time itself ends (deadlines saturate).
const MOVES_MAX: usize = 4;

impl Turn<'_> {
    /// Moves the run on as far as it can get by itself.
    pub(super) fn move_on(&mut self) {
        if self.now >= self.run.roster.patient_until_ms {
            self.run.roster.patient_until_ms = 0;
        }
        for _ in 0..MOVES_MAX {
            if self.run.state.status != RunStatus::Active || !self.try_move() {
                return;
            }
        }
    }

    /// One move, if there is one to make.
    fn try_move(&mut self) -> bool {
        match &self.run.state.phase {
            Phase::Waiting if self.run.state.version >= self.plan.rounds() => {
                self.begin_evaluating(Vec::new());
                true
            }
            Phase::Waiting => self.try_begin(),
            Phase::Training(_) => self.try_end_training(),
            Phase::Reducing(reducing) => {
                if reducing.retry_at_ms.is_some_and(|retry_at_ms| retry_at_ms <= self.now) {
                    self.retry_reduction();
                }
                false
            }
            Phase::Evaluating(_) => self.try_finish(),
            Phase::Done => false,
        }
    }

    fn try_begin(&mut self) -> bool {
        if self.run.roster.ready.len() < self.plan.sites_to_begin() {
            return false;
        }
        if self.run.free_sites().len() < self.plan.free_sites_to_begin() {
            self.give_up(|_| true);
        }
        let free = self.run.free_sites();
        let round = self.run.state.version.saturating_add(1);
        let draw = Draw::new(self.plan, round, 1);
        let wanted = self.plan.sites_wanted(free.len());
        let chosen = select(draw, &free, self.plan.places(wanted));
        self.say(format!("round {round} began with {}", words::names(&chosen)));
        self.run.state.phase = Phase::Training(Training {
            round,
            attempt: 1,
            started_ms: self.now,
            deadline_ms: self.deadline_from_now(),
            wanted,
            sites: BTreeMap::new(),
            assignments: BTreeMap::new(),
        });
        self.put_to_work(chosen);
        true
    }

    fn try_end_training(&mut self) -> bool {
        let overdue = self.run.deadline_ms().is_some_and(|deadline_ms| deadline_ms <= self.now);
        let deadline_ms = self.deadline_from_now();
        let in_hand = self.run.state.in_hand(self.plan);
        let Phase::Training(training) = &mut self.run.state.phase else { return false };
        if let Some(buffer) = self.plan.buffer() {
            if in_hand >= buffer {
                self.end_training();
            } else {
                self.fill_places(false);
            }
            return in_hand >= buffer;
        }
        let delivered = training.contributions().count();
        let quorum = self.plan.quorum(training.selected(), training.wanted);
        let all_in = training.working().next().is_none();
        // Those beyond need are not waited for.
        let enough = self.plan.over_selection() > 0 && delivered >= training.wanted;
        if delivered >= quorum && (all_in || enough || overdue) {
            self.end_training();
            return true;
        }
        if overdue {
            training.deadline_ms = deadline_ms;
            self.changed = true;
            self.give_up(|_| true);
            self.replace(|_, _| true);
            return true;
        }
        self.fill_places(false);
        false
    }

    /// Takes their place from the sites at work of which `lost` holds, and gives it to others.
    pub(super) fn replace(&mut self, lost: impl Fn(&SiteName, &Run) -> bool) {
        let Phase::Training(training) = &self.run.state.phase else { return };
        let lost: Vec<SiteName> = training.working().filter(|site| lost(site, self.run)).cloned().collect();
        let Phase::Training(training) = &mut self.run.state.phase else { return };
        for site in &lost {
            training.sites.insert(site.clone(), Standing::Replaced);
        }
        if !lost.is_empty() {
            let (round, attempt) = (training.round, training.attempt);
            self.say(format!(
                "round {round}, attempt {attempt}: no delta of {} in time",
                words::names(&lost)
            ));
        }
        self.fill_places(true);
    }

    /// Puts ready sites to work in the places that are free: those not tried in this round first.
    fn fill_places(&mut self, is_new_attempt: bool) {
        let free = self.run.free_sites();
        let Phase::Training(training) = &mut self.run.state.phase else { return };
        let places = self.plan.places(training.wanted).saturating_sub(training.selected());
        if places == 0 {
            return;
        }
        let ready_with = |wanted: Option<&Standing>| -> BTreeMap<SiteName, u64> {
            let has = |(site, _): &(&SiteName, &u64)| training.sites.get(*site) == wanted;
            free.iter().filter(has).map(|(site, tokens)| (site.clone(), *tokens)).collect()
        };
        let (fresh, tried) = (ready_with(None), ready_with(Some(&Standing::Replaced)));
        if fresh.is_empty() && tried.is_empty() {
            return;
        }
        if is_new_attempt {
            training.attempt = training.attempt.saturating_add(1);
        }
        let draw = Draw::new(self.plan, training.round, training.attempt);
        let mut chosen = select(draw, &fresh, places);
        chosen.extend(select(draw, &tried, places - chosen.len()));
        let (round, attempt) = (training.round, training.attempt);
        self.say(format!("round {round}, attempt {attempt}: {} to train", words::names(&chosen)));
        self.put_to_work(chosen);
    }

    /// A site that was tried before goes on with what it was put to work on then.
    fn put_to_work(&mut self, chosen: Vec<SiteName>) {
        let State { phase: Phase::Training(training), pace, .. } = &mut self.run.state else { return };
        training.sites.extend(chosen.iter().map(|site| (site.clone(), Standing::Working)));
        let full = self.plan.local_steps();
        let steps = self.plan.minimum_steps().map(|minimum| pace.steps(training.sites.keys(), minimum, full));
        for site in chosen {
            let steps = steps.as_ref().and_then(|steps| steps.get(&site)).copied().unwrap_or(full);
            let assignment = Assignment { began_ms: Some(self.now), steps };
            training.assignments.entry(site).or_insert(assignment);
        }
    }

    /// When an attempt that begins now ends, if it does.
    pub(super) fn deadline_from_now(&self) -> Option<UnixMs> {
        self.plan.deadline_ms(&self.run.state.pace).map(|ms| self.now.saturating_add(ms))
    }

    /// Gives up the late deltas of the sites that are behind by what `is_lost` says: they may be put to work anew.
    fn give_up(&mut self, is_lost: impl Fn(&Behind) -> bool) {
        let lost: Vec<SiteName> =
            self.run.state.behind.extract_if(.., |_, behind| is_lost(behind)).map(|(site, _)| site).collect();
        if !lost.is_empty() {
            self.say(format!("late deltas are not waited for any longer: {}", words::names(&lost)));
            self.effects.push(self.run.state.discard());
        }
    }

    /// The round's deltas, and those of earlier rounds that have come meanwhile. Who did not deliver is behind from
    /// now on, unless its delta would be too old for the next average, or there is none.
    fn end_training(&mut self) {
        let State { phase: Phase::Training(training), pace, behind, late, .. } = &mut self.run.state else {
            return;
        };
        if self.plan.has_adaptive_deadline() {
            pace.record_durations(training, self.now);
        }
        if self.plan.minimum_steps().is_some() {
            pace.record_speeds(late.iter().chain(training.contributions()));
        }
        let round = training.round;
        let takes_late = self.plan.staleness_max() > 0 && round < self.plan.rounds();
        let mut contributions = mem::take(late);
        for (site, standing) in mem::take(&mut training.sites) {
            match standing {
                Standing::Delivered(contribution) => contributions.push(contribution),
                Standing::Working | Standing::Replaced if takes_late => {
                    let steps = training.steps(&site, self.plan);
                    behind.insert(site, Behind { round, steps });
                }
                Standing::Working | Standing::Replaced => {}
            }
        }
        contributions.sort_by(|a, b| (&a.site, b.age).cmp(&(&b.site, a.age)));
        let reducing = Reducing {
            round: training.round,
            attempts: training.attempt,
            started_ms: training.started_ms,
            contributions,
            failures: 0,
            retry_at_ms: None,
        };
        self.effects.push(reducing.effect(self.plan));
        self.run.state.phase = Phase::Reducing(reducing);
        self.changed = true;
        let age_max = self.plan.staleness_max();
        self.give_up(|behind| !takes_late || round.saturating_add(1) - behind.round > age_max);
    }

    fn retry_reduction(&mut self) {
        if let Phase::Reducing(reducing) = &mut self.run.state.phase {
            reducing.retry_at_ms = None;
            self.effects.push(reducing.effect(self.plan));
            self.changed = true;
        }
    }

    pub(super) fn begin_evaluating(&mut self, contributions: Vec<Contribution>) {
        let mut asked: BTreeSet<SiteName> = self.run.roster.ready.keys().cloned().collect();
        asked.extend(contributions.into_iter().map(|one| one.site));
        let deadline_ms = self.now.saturating_add(self.plan.evaluation_deadline_ms());
        self.run.state.phase = Phase::Evaluating(Evaluating { asked, deadline_ms });
        self.changed = true;
    }

    fn try_finish(&mut self) -> bool {
        let overdue = self.run.deadline_ms().is_some_and(|deadline_ms| deadline_ms <= self.now);
        if !overdue && self.plan.evaluates(self.run.state.version) && !self.run.unheard().is_empty() {
            return false;
        }
        self.run.state.phase = Phase::Done;
        self.run.state.status = RunStatus::Finished;
        self.say(format!(
            "the run is finished after {}",
            words::count(self.run.state.version as usize, "round", "rounds")
        ));
        true
    }
}
