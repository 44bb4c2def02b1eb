//! A run under a model of its driver: database, spool, effects in flight, crashes; and an oracle, which
//! checks every step against what it has seen and not against the engine's own books.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use consort_common::{ids::SiteName, spec::Weighting};

use super::{
    super::{
        tests::{facts, reduced},
        *,
    },
    tally::{Tally, Terms},
};

pub(super) struct World {
    pub plan: Plan,
    pub terms: Terms,
    pub run: Run,
    pub now: UnixMs,
    pub tally: Tally,
    /// Effects that are stored nowhere and not yet performed.
    pub pending: VecDeque<Effect>,
    /// Reductions and publications under way; lost in a crash.
    pub reductions: Vec<u32>,
    pub publications: Vec<u32>,
    /// The database: what the records say.
    stored: State,
    contributions: BTreeMap<(u32, SiteName), Contribution>,
    commits: Vec<RoundRecord>,
    evaluations: BTreeSet<(u32, SiteName)>,
    /// Whose deltas, of which round, are spoilt and left out of an average.
    left_out: BTreeSet<(u32, SiteName)>,
    /// Deltas on disk, by round and site.
    spool: BTreeSet<(u32, SiteName)>,
    /// Who was ever put to work, by round, and for how many steps.
    assigned: BTreeMap<(u32, SiteName), u32>,
    /// A deadline passed in the round in progress, or the run was resumed.
    was_disturbed: bool,
    trace: bool,
}

impl World {
    pub(super) fn new(plan: Plan, terms: Terms, trace: bool) -> Self {
        Self {
            plan,
            terms,
            run: Run::new(),
            now: 1_700_000_000_000,
            tally: Tally::default(),
            pending: VecDeque::new(),
            reductions: Vec::new(),
            publications: Vec::new(),
            stored: State::new(),
            contributions: BTreeMap::new(),
            commits: Vec::new(),
            evaluations: BTreeSet::new(),
            left_out: BTreeSet::new(),
            spool: BTreeSet::new(),
            assigned: BTreeMap::new(),
            was_disturbed: false,
            trace,
        }
    }

    pub(super) fn state(&self) -> &State {
        self.run.state()
    }

    /// What `site` delivers if it does as it was told in `round`, at its own speed.
    pub(super) fn honest_facts(&self, site: &SiteName, round: u32) -> ContributionFacts {
        let full = self.plan.local_steps();
        let steps = self.assigned.get(&(round, site.clone())).copied().unwrap_or(full);
        let slowness = site.as_str().bytes().last().unwrap_or_default() % 4 + 1;
        ContributionFacts {
            steps,
            tokens: self.plan.tokens(steps),
            train_seconds: 0.1 * f64::from(steps) * f64::from(slowness),
            ..facts(site, round)
        }
    }

    pub(super) fn note(&self, text: impl FnOnce() -> String) {
        if self.trace {
            println!("{:>9} {}", self.now - 1_699_999_000_000, text());
        }
    }

    /// One event: step, check, and the transaction that stores its outcome. Whether it was accepted.
    pub(super) fn take(&mut self, event: Event) -> bool {
        let before = self.run.clone();
        let taken = event.clone();
        let outcome = self.run.step(&self.plan, event, self.now);
        let event = taken;
        self.note(|| format!("{event:?}\n          -> {outcome:?}"));
        self.tally.steps += 1;
        if let Event::Delivered { site, round, facts } = &event {
            self.check_delivery(before.state(), site, *round, facts, &outcome);
        }
        if let Event::Reduced { round, .. } | Event::ReduceFailed { round, .. } = event {
            let is_reducing = matches!(&before.state().phase, Phase::Reducing(one) if one.round == round);
            assert_eq!(outcome.is_ok(), is_reducing, "a reduction is taken where it is waited for");
        }
        if let (Event::ReduceFailed { round, spoilt: Some(spoilt), .. }, Ok(_)) = (&event, &outcome) {
            self.check_spoilt(*round, spoilt);
        }
        match outcome {
            Ok(effects) => {
                self.check_transition(before.state(), &event);
                if effects.is_empty() {
                    assert_eq!(before.state(), self.state(), "no effect, no change");
                    assert_eq!(before.ready(), self.run.ready(), "no effect, no change");
                }
                self.stored = self.state().clone();
                for effect in effects {
                    if effect.is_record() { self.record(effect) } else { self.pending.push_back(effect) }
                }
                self.check_next_timer();
                true
            }
            Err(rejection) => {
                assert_eq!(before, self.run, "a rejected event changes nothing");
                assert!(!rejection.to_string().is_empty());
                self.tally.rejections += 1;
                false
            }
        }
    }

    /// The transaction's records. Here none of them may come twice.
    fn record(&mut self, effect: Effect) {
        match effect {
            Effect::RecordContribution { round, contribution } => {
                let key = (round, contribution.site.clone());
                self.spool.insert(key.clone());
                let before = self.contributions.insert(key, contribution);
                assert_eq!(before, None, "a contribution is recorded once");
            }
            Effect::RecordEvaluation { site, evaluation } => {
                let is_new = self.evaluations.insert((evaluation.version, site));
                assert!(is_new, "an evaluation is recorded once");
            }
            Effect::Commit(record) => self.check_commit(record),
            Effect::Event(text) => assert!(!text.is_empty()),
            other => panic!("{other:?} is no record"),
        }
    }

    /// What the driver does with an effect after the transaction.
    pub(super) fn perform(&mut self, effect: Effect) {
        self.note(|| format!("perform {effect:?}"));
        match effect {
            Effect::Reduce { round, contributions } => {
                let is_current = matches!(&self.state().phase, Phase::Reducing(one) if one.round == round);
                if is_current {
                    let key = |one: &Weighted| (one.contribution.round(round), one.contribution.site.clone());
                    let is_spooled = contributions.iter().all(|one| self.spool.contains(&key(one)));
                    assert!(is_spooled, "the deltas of round {round} are on disk");
                }
                self.reductions.push(round);
            }
            Effect::Publish { version } => {
                assert!(version <= self.state().version && self.plan.publishes(version));
                self.publications.push(version);
            }
            Effect::DiscardSpool { round, keep } => {
                let is_aborted = matches!(self.state().status, RunStatus::Aborted { .. });
                let is_needed = |key: &(u32, SiteName), one: &Contribution| {
                    let is_averaged = key.0 + one.age > self.state().version && !self.left_out.contains(key);
                    key.0 <= round && !keep.contains(&key.0) && is_averaged
                };
                let is_any_needed = self.contributions.iter().any(|(key, one)| is_needed(key, one));
                assert!(is_aborted || round <= self.state().version, "only spent deltas are deleted");
                assert!(is_aborted || !is_any_needed, "no delta is deleted that is to be averaged");
                self.spool.retain(|(spooled, _)| *spooled > round || keep.contains(spooled));
            }
            Effect::InstructionsChanged | Effect::Duplicate { .. } => {}
            record => panic!("{record:?} belongs into the transaction"),
        }
    }

    /// Kills the process: what is stored remains, and nothing else.
    pub(super) fn crash(&mut self) {
        self.note(|| "crash".into());
        self.tally.crashes += 1;
        let text = serde_json::to_string(&self.stored).unwrap();
        let state: State = serde_json::from_str(&text).unwrap();
        assert_eq!(state, self.stored, "what is stored comes back as it was");
        self.run = Run::restore(&self.plan, state, self.now);
        self.reductions.clear();
        self.publications.clear();
        self.pending = self.run.resume_effects(&self.plan).into();
        if let (Phase::Reducing(one), RunStatus::Active) = (&self.state().phase, &self.state().status) {
            let is_resumed = self.pending.iter().any(|effect| matches!(effect, Effect::Reduce { .. }));
            assert!(is_resumed || one.retry_at_ms.is_some(), "a lost reduction is performed again");
        }
    }

    /// A crash between a step and its transaction: the event is lost with all that it did.
    pub(super) fn crash_in_transaction(&mut self, event: Event) {
        self.note(|| format!("{event:?}, lost in a crash"));
        let _ = self.run.step(&self.plan, event, self.now);
        self.crash();
    }

    pub(super) fn finish_reduction(&mut self, index: usize) {
        let round = self.reductions.swap_remove(index);
        self.take(Event::Reduced { round, facts: reduced(round) });
    }

    pub(super) fn fail_reduction(&mut self, index: usize, spoilt: Option<(SiteName, u32)>) {
        let round = self.reductions.swap_remove(index);
        if self.take(Event::ReduceFailed { round, reason: "it could not be read".into(), spoilt }) {
            self.tally.failed_reductions += 1;
        }
    }

    /// A delta that is spoilt is left out where the others are enough, by the oracle's own books, and no other is.
    fn check_spoilt(&mut self, round: u32, (site, trained): &(SiteName, u32)) {
        let averaged: Vec<(u32, SiteName, u32)> =
            self.contributions_of(round).map(|one| (one.round(round), one.site.clone(), one.age)).collect();
        let counting = |deltas: &[(u32, SiteName, u32)]| {
            deltas.iter().filter(|(.., age)| *age == 0 || self.terms.buffer > 0).count()
        };
        let others: Vec<_> =
            averaged.iter().filter(|(of, by, _)| (of, by) != (trained, site)).cloned().collect();
        let least = if self.terms.buffer > 0 { 1 } else { self.terms.least() };
        let are_enough = counting(&others) >= least && others.len() >= self.terms.deltas_min;
        if others.len() < averaged.len() {
            if are_enough {
                self.left_out.insert((*trained, site.clone()));
            }
            self.tally.left_out += u64::from(are_enough);
            self.tally.kept += u64::from(!are_enough);
        }
        let Phase::Reducing(reducing) = &self.state().phase else { panic!("it is tried again") };
        let key = |one: &Contribution| (one.round(round), one.site.clone());
        let remaining: BTreeSet<_> = reducing.contributions.iter().map(key).collect();
        assert_eq!(remaining, self.contributions_of(round).map(key).collect());
    }

    /// The oracle's answer to a delivery, from its own books.
    fn check_delivery(
        &mut self,
        before: &State,
        site: &SiteName,
        round: u32,
        facts: &ContributionFacts,
        outcome: &Result<Vec<Effect>, Rejection>,
    ) {
        let is_running = matches!(before.status, RunStatus::Active | RunStatus::Paused);
        let open_round = match &before.phase {
            Phase::Training(training) => Some(training.round),
            _ => None,
        };
        let reduced_round = match &before.phase {
            Phase::Reducing(reducing) => Some(reducing.round),
            _ => None,
        };
        let first = self.contributions.get(&(round, site.clone()));
        let assigned_steps = self.assigned.get(&(round, site.clone())).copied();
        let is_assigned = assigned_steps.is_some();
        let steps = assigned_steps.unwrap_or_default();
        let is_sane =
            facts.steps <= steps && facts.tokens <= self.plan.tokens(steps) && facts.train_loss.is_finite();
        // What counts in a later round than its own: who was given up, `check_behind` sees.
        let is_behind = before.behind.get(site).is_some_and(|behind| behind.round == round);
        let filled = reduced_round.map_or(before.version + 1, |reduced| reduced + 1);
        let is_left_out = self.left_out.contains(&(round, site.clone()));
        let is_pending = first.is_some_and(|first| round + first.age > before.version) && !is_left_out;
        let is_current = is_running && is_pending;
        let is_open = open_round == Some(round) || is_behind;
        match (first, outcome) {
            (Some(first), Ok(effects)) => {
                assert!(is_current && first.facts.delta_digest == facts.delta_digest);
                assert_eq!(effects[0], Effect::Duplicate { site: site.clone(), round });
                self.tally.duplicates += 1;
            }
            (Some(first), Err(Rejection::Conflict { .. })) => {
                assert!(is_current && first.facts.delta_digest != facts.delta_digest);
                self.tally.conflicts += 1;
            }
            (Some(_), Err(_)) => assert!(!is_current, "{outcome:?}"),
            (None, Ok(effects)) => {
                assert!(is_running && is_open && is_assigned && is_sane);
                let Effect::RecordContribution { round: recorded, contribution } = &effects[0] else {
                    panic!("{:?} is no record of a contribution", effects[0])
                };
                assert_eq!((*recorded, round + contribution.age), (round, filled));
                assert!(contribution.age <= self.terms.staleness_max && filled <= self.terms.rounds);
                self.tally.folded += u64::from(contribution.age > 0);
                if let Phase::Training(training) = &before.phase {
                    self.tally.replaced += u64::from(training.sites.get(site) == Some(&Standing::Replaced));
                }
            }
            (None, Err(rejection)) => {
                let is_welcome = is_running && is_open && is_assigned && is_sane;
                assert!(
                    !is_welcome,
                    "an honest delivery of {site} for round {round} is refused: {rejection}"
                );
                self.tally.late += u64::from(matches!(rejection, Rejection::RoundOver { .. }));
            }
        }
    }

    /// What must hold between the states before and after an accepted event.
    fn check_transition(&mut self, before: &State, event: &Event) {
        let after = self.run.state();
        assert!(after.version == before.version || after.version == before.version + 1);
        assert_eq!(after.cumulative_step, u64::from(after.version) * u64::from(self.plan.local_steps()));
        assert!(after.version <= self.terms.rounds);
        if before.status.is_over() {
            assert_eq!((&before.status, before.version), (&after.status, after.version), "over is over");
            assert_eq!(after.phase, Phase::Done);
        }
        if let Phase::Training(training) = &before.phase {
            let is_overdue = training.deadline_ms.is_some_and(|deadline_ms| deadline_ms <= self.now);
            self.was_disturbed |= is_overdue || *event == Event::Resume;
        }
        if let (Phase::Training(training), Phase::Reducing(reducing)) = (&before.phase, &after.phase) {
            self.tally.spared += u64::from(self.check_round_end(training, reducing));
        }
        self.check_behind(before, event);
        let after = self.run.state();
        if let Phase::Training(training) = &after.phase {
            if !matches!(&before.phase, Phase::Training(_)) {
                assert_eq!(training.round, before.version.max(after.version) + 1);
                assert!(training.wanted >= self.terms.least());
                let is_free = |site: &&SiteName| !after.behind.contains_key(*site);
                let ready = self.run.ready().keys().filter(is_free).count();
                let most = if self.terms.per_round == 0 {
                    ready
                } else {
                    self.terms.per_round.max(self.terms.quorum)
                };
                if self.terms.buffer > 0 {
                    assert_eq!((training.wanted, training.sites.len()), (self.terms.buffer, ready));
                } else {
                    assert_eq!(training.wanted, ready.min(most));
                    assert_eq!(training.sites.len(), ready.min(training.wanted + self.terms.over_selection));
                }
                self.was_disturbed = false;
                self.tally.adapted += u64::from(self.check_deadline(training));
            } else if let (Event::SiteReady { .. }, Phase::Training(before)) = (event, &before.phase) {
                let has_joined =
                    training.attempt == before.attempt && training.selected() > before.selected();
                self.tally.joined += u64::from(has_joined);
            }
            for site in training.sites.keys() {
                let steps = training.assignments[site].steps;
                let full = self.plan.local_steps();
                let least = if self.terms.minimum_steps == 0 { full } else { self.terms.minimum_steps };
                assert!((least..=full).contains(&steps), "{steps} steps");
                let before = self.assigned.insert((training.round, site.clone()), steps);
                assert_eq!(before.unwrap_or(steps), steps, "an assignment holds for the whole round");
                self.tally.shortened += u64::from(before.is_none() && steps < full);
            }
        }
    }

    /// A round's first deadline is within the specification's bounds; whether it follows from earlier rounds.
    fn check_deadline(&self, training: &Training) -> bool {
        let Terms { deadline_ms: fixed_ms, adaptive_minimum_ms: minimum_ms, .. } = self.terms;
        let span_ms = training.deadline_ms.map(|deadline_ms| deadline_ms - self.now);
        match span_ms {
            None => assert!(fixed_ms == 0, "a round has its fixed deadline"),
            Some(span_ms) if fixed_ms > 0 && span_ms == fixed_ms => {}
            Some(span_ms) => {
                assert!(minimum_ms > 0 && training.round > 3, "a deadline out of nothing");
                assert!(fixed_ms == 0 || span_ms < fixed_ms);
                assert!(span_ms >= minimum_ms);
                return true;
            }
        }
        false
    }

    /// A round ends with all that was accepted for it, never without its quorum, and where nothing went
    /// wrong with all that were selected, or all that it waited for; whether it left some out for that.
    fn check_round_end(&self, training: &Training, reducing: &Reducing) -> bool {
        let key = |one: &Contribution| (one.site.clone(), one.round(training.round));
        let mut accepted: BTreeSet<(SiteName, u32)> =
            self.contributions_of(training.round).map(key).collect();
        // The event's own contribution is recorded right after this check.
        accepted.extend(reducing.contributions.iter().map(key));
        let reduced: Vec<(SiteName, u32)> = reducing.contributions.iter().map(key).collect();
        assert_eq!(accepted.into_iter().collect::<Vec<_>>(), reduced, "all that was accepted is reduced");
        if self.terms.buffer > 0 {
            assert!(reduced.len() >= self.terms.buffer, "a buffer of {} is reduced", reduced.len());
            return false;
        }
        let reduced: Vec<&Contribution> = reducing.contributions.iter().filter(|one| one.age == 0).collect();
        let least = match self.terms.quorum {
            0 => self.terms.minimum.min(training.wanted).max(1),
            quorum => quorum,
        };
        assert!(reduced.len() >= least, "round {} ends with {} of {least}", training.round, reduced.len());
        if !self.was_disturbed {
            let awaited = if self.terms.over_selection > 0 { training.wanted } else { training.sites.len() };
            assert_eq!(reduced.len(), awaited, "no site is left out without cause");
        }
        self.terms.over_selection > 0 && !self.was_disturbed && training.sites.len() > reduced.len()
    }

    /// What was accepted for `round`, but for what was left out of it since.
    fn contributions_of(&self, round: u32) -> impl Iterator<Item = &Contribution> {
        let counts = move |(key, one): &(&(u32, SiteName), &Contribution)| {
            key.0 + one.age == round && !self.left_out.contains(*key)
        };
        self.contributions.iter().filter(counts).map(|(_, one)| one)
    }

    fn check_commit(&mut self, record: RoundRecord) {
        assert_eq!(record.round as usize, self.commits.len() + 1, "rounds are committed once and in order");
        assert_eq!(record.reduced, reduced(record.round));
        let weights: Vec<f64> = record.contributions.iter().map(|one| one.weight).collect();
        assert!((weights.iter().sum::<f64>() - 1.0).abs() <= 1e-12, "{weights:?}");
        assert!(weights.iter().all(|weight| *weight > 0.0 && *weight <= 1.0));
        if self.terms.weighting == Weighting::Uniform {
            let is_fresh = record.contributions.iter().all(|one| one.contribution.age == 0);
            assert!(!is_fresh || weights.windows(2).all(|pair| pair[0] == pair[1]));
        }
        let key = |one: &Weighted| (one.contribution.site.clone(), one.contribution.round(record.round));
        let mass = |one: &Weighted| {
            let (site, round) = key(one);
            let staleness = f64::from(1 + one.contribution.age).powf(-self.terms.staleness_exponent);
            match self.terms.weighting {
                Weighting::Tokens => f64::from(self.assigned[&(round, site)]) * staleness,
                Weighting::Uniform => staleness,
            }
        };
        let all: f64 = record.contributions.iter().map(mass).sum();
        for one in &record.contributions {
            let share = mass(one) / all;
            assert!((one.weight - share).abs() <= 1e-12, "weights follow the assigned steps and the age");
        }
        let names: Vec<(SiteName, u32)> = record.contributions.iter().map(key).collect();
        assert!(names.windows(2).all(|pair| pair[0] < pair[1]), "in canonical order, each once: {names:?}");
        for one in &record.contributions {
            let (site, round) = key(one);
            let recorded = self.contributions.get(&(round, site));
            assert_eq!(recorded, Some(&one.contribution), "what is counted was recorded");
        }
        assert_eq!(names.len(), self.contributions_of(record.round).count(), "what was recorded is counted");
        let fresh = record.contributions.iter().filter(|one| one.contribution.age == 0).count();
        let counting = if self.terms.buffer > 0 { names.len() } else { fresh };
        let is_lessened = self.left_out.iter().any(|key| key.0 + self.contributions[key].age == record.round);
        // A buffer was full before one of its deltas was left out.
        let least = if self.terms.buffer > 0 && is_lessened { 1 } else { self.terms.least() };
        assert!(counting >= least, "no round without its quorum, or the minimum");
        assert!(names.len() >= self.terms.deltas_min, "no round without what its rule takes");
        self.tally.buffers += u64::from(self.terms.buffer > 0);
        self.tally.commits += 1;
        self.tally.retried += u64::from(record.attempts > 1);
        self.commits.push(record);
    }

    /// Who falls behind, and who is no longer: it delivered, its delta would be too old, or others are too few.
    fn check_behind(&mut self, before: &State, event: &Event) {
        let after = self.run.state();
        let reduced = |state: &State| match &state.phase {
            Phase::Reducing(reducing) => Some(reducing.round),
            _ => None,
        };
        let is_round_end = reduced(after).is_some() && reduced(after) != reduced(before);
        for (site, behind) in &after.behind {
            // A round can take a site in and end in one step: with deltas enough for its buffer, or when a run goes
            // on past its deadline.
            let key = (behind.round, site.clone());
            if is_round_end && Some(behind.round) == reduced(after) {
                self.assigned.entry(key).or_insert(behind.steps);
            }
            assert!(self.assigned.contains_key(&(behind.round, site.clone())), "{site} was put to work");
            assert!(
                !self.contributions.contains_key(&(behind.round, site.clone())),
                "{site} has not delivered"
            );
            let age = after.filling() - behind.round;
            assert!((1..=self.terms.staleness_max).contains(&age), "{site} is {age} rounds behind");
            assert!(after.filling() <= self.terms.rounds);
        }
        for (site, behind) in &before.behind {
            if after.behind.get(site) == Some(behind) {
                continue;
            }
            let delivered = matches!(event, Event::Delivered { site: by, round, .. } if (by, *round) == (site, behind.round));
            let is_too_old = after.filling().saturating_sub(behind.round) > self.terms.staleness_max;
            let is_over = after.status.is_over() || after.filling() > self.terms.rounds;
            if delivered || (is_round_end && (is_too_old || is_over)) || after.status.is_over() {
                continue;
            }
            let has_begun = matches!(
                (&before.phase, &after.phase),
                (Phase::Waiting, Phase::Training(_) | Phase::Reducing(_))
            );
            let is_overdue = match &before.phase {
                Phase::Training(training) => training.deadline_ms.is_some_and(|at| at <= self.now),
                _ => false,
            };
            let free = self.run.ready().keys().filter(|site| !before.behind.contains_key(*site)).count();
            let is_short = free < self.terms.least();
            let has_reduced = matches!(&before.phase, Phase::Reducing(_));
            assert!(
                self.terms.buffer == 0 && (is_overdue || is_short && (has_begun || has_reduced)),
                "{site} is given up without cause"
            );
            self.tally.given_up += 1;
        }
        if let (Phase::Training(training), Phase::Reducing(_)) = (&before.phase, &after.phase)
            && self.terms.staleness_max > 0
            && training.round < self.terms.rounds
        {
            for (site, standing) in &training.sites {
                let delivered = matches!(event, Event::Delivered { site: by, .. } if by == site)
                    || matches!(standing, Standing::Delivered(_));
                let behind = after.behind.get(site).map(|behind| behind.round);
                assert!(delivered || behind == Some(training.round), "{site} goes on with its work");
            }
        }
    }

    fn check_next_timer(&self) {
        if let Some(timer_ms) = self.run.next_timer() {
            assert!(timer_ms > self.now, "a timer that is due at once would spin");
        }
    }

    /// What is said to and about one site.
    pub(super) fn check_words(&self, site: &SiteName) {
        assert!(!self.run.waiting_for(&self.plan, self.now).is_empty());
        let state = self.state();
        let is_ready = self.run.ready().contains_key(site);
        let instruction = self.run.instruction(&self.plan, site);
        let shall_prepare = matches!(state.status, RunStatus::Active | RunStatus::Paused) && !is_ready;
        assert_eq!(instruction == Instruction::Prepare, shall_prepare);
        if let Instruction::Train { round, first_step, steps, tokens, evaluate_base, .. } = instruction {
            let assigned_steps = self.assigned.get(&(round, site.clone())).copied();
            assert_eq!(assigned_steps, Some(steps), "only who was selected trains");
            assert!(!self.contributions.contains_key(&(round, site.clone())), "who delivered is done");
            let age_max = if state.behind.contains_key(site) { self.terms.staleness_max } else { 0 };
            assert!(round + age_max >= state.filling() && round <= self.commits.len() as u32 + 1);
            assert_eq!(first_step, u64::from(round - 1) * u64::from(self.plan.local_steps()));
            assert_eq!(tokens, self.plan.tokens(steps));
            assert_eq!(evaluate_base, self.plan.evaluates(round - 1));
        }
        if self.run.participation(site) == Participation::Working
            && is_ready
            && state.status == RunStatus::Active
        {
            assert!(matches!(self.run.instruction(&self.plan, site), Instruction::Train { .. }));
        }
    }
}
