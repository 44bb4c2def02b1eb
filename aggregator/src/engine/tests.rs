//! Each rule of the engine as a sentence. [`World`] is one run with a clock that tests move by hand.

mod late;
mod pace;
mod selection;

use consort_common::{
    codec::Encoding,
    ids::{Digest, SiteName},
    spec::{RunSpec, Weighting},
};

use super::{
    participation::weighted,
    plan::EVALUATION_DEADLINE_MS,
    state::EVALUATED_VERSIONS_MAX,
    step::{EVALUATION_PATIENCE_MS, REDUCE_RETRY_MS_MIN},
    *,
};

/// A specification with four steps of 2 x 8 tokens, evaluated and published every round.
pub(super) fn spec() -> RunSpec {
    let text = "name = 'run'\nrounds = 2\n[model]\narchitecture = 'llama'\n\
                [training]\nlocal_steps = 4\nbatch_size = 2\nsequence_length = 8\n";
    toml::from_str(text).unwrap()
}

pub(super) fn site(name: &str) -> SiteName {
    name.parse().unwrap()
}

pub(super) fn ready(name: &str) -> Event {
    Event::SiteReady { site: site(name), train_tokens: 1000 }
}

/// What site `name` honestly delivers in `round`.
pub(super) fn facts(name: &SiteName, round: u32) -> ContributionFacts {
    ContributionFacts {
        steps: 4,
        tokens: 64,
        train_loss: 2.0 + 1.0 / f64::from(round + 2),
        train_seconds: 0.1,
        delta_norm: 0.3,
        bytes: 1000,
        delta_digest: Digest::of(format!("{name} {round}").as_bytes()),
        delta: [1; 16].into(),
        encoding: Encoding::Fp32,
    }
}

pub(super) fn reduced(round: u32) -> ReducedFacts {
    ReducedFacts {
        digest: Digest::of(&round.to_le_bytes()),
        delta_norm: 0.2,
        update_norm: 0.1,
        statistics: RoundStatistics::default(),
        treatments: Vec::new(),
        tensors: Vec::new(),
    }
}

struct World {
    plan: Plan,
    run: Run,
    now: UnixMs,
}

impl World {
    /// A started run whose specification `adjust` has changed, with these sites ready.
    fn new(adjust: impl Fn(&mut RunSpec), sites: &[&str]) -> Self {
        let mut spec = spec();
        adjust(&mut spec);
        let mut world = Self { plan: Plan::new(&spec), run: Run::new(), now: 1_000_000 };
        world.ok(Event::Start);
        world.ready(sites);
        world
    }

    /// As `new`, with this participation: minimum, per round, quorum, deadline in seconds.
    fn with(participation: (u32, u32, u32, u64), sites: &[&str]) -> Self {
        Self::new(|spec| participate(spec, participation), sites)
    }

    fn step(&mut self, event: Event) -> Result<Vec<Effect>, Rejection> {
        let before = self.run.clone();
        let outcome = self.run.step(&self.plan, event, self.now);
        if outcome.is_err() {
            assert_eq!(self.run, before, "a rejected event changes nothing");
        }
        outcome
    }

    fn ok(&mut self, event: Event) -> Vec<Effect> {
        self.step(event).unwrap()
    }

    fn ready(&mut self, sites: &[&str]) {
        for name in sites {
            self.ok(ready(name));
        }
    }

    fn gone(&mut self, sites: &[&str]) {
        for name in sites {
            self.ok(Event::SiteGone(site(name)));
        }
    }

    fn deliver(&mut self, name: &str, round: u32) -> Result<Vec<Effect>, Rejection> {
        let facts = facts(&site(name), round);
        self.step(Event::Delivered { site: site(name), round, facts })
    }

    fn deliver_all(&mut self, names: &[&str], round: u32) {
        for name in names {
            self.deliver(name, round).unwrap();
        }
    }

    fn reduce(&mut self, round: u32) -> Vec<Effect> {
        self.ok(Event::Reduced { round, facts: reduced(round) })
    }

    fn evaluate(&mut self, name: &str, version: u32) -> Result<Vec<Effect>, Rejection> {
        let evaluation = Evaluation { version, loss: 1.5, tokens: 100, text_bytes: 400 };
        self.step(Event::Evaluated { site: site(name), evaluation })
    }

    fn wait(&mut self, milliseconds: u64) -> Vec<Effect> {
        self.now += milliseconds;
        self.ok(Event::Tick)
    }

    /// Kills the engine and restores it from what was stored.
    fn restart(&mut self) -> Vec<Effect> {
        let stored = serde_json::to_string(self.run.state()).unwrap();
        let state: State = serde_json::from_str(&stored).unwrap();
        assert_eq!(state, *self.run.state());
        self.run = Run::restore(&self.plan, state, self.now);
        self.run.resume_effects(&self.plan)
    }

    fn instruction(&self, name: &str) -> Instruction {
        self.run.instruction(&self.plan, &site(name))
    }

    fn is_training(&self, name: &str) -> bool {
        matches!(self.instruction(name), Instruction::Train { .. })
    }

    fn working(&self) -> Vec<&str> {
        match &self.run.state().phase {
            Phase::Training(training) => training.working().map(SiteName::as_str).collect(),
            phase => panic!("not training: {phase:?}"),
        }
    }

    fn words(&self) -> String {
        self.run.waiting_for(&self.plan, self.now)
    }

    fn reducing(&self) -> Option<Vec<&str>> {
        match &self.run.state().phase {
            Phase::Reducing(reducing) => {
                Some(reducing.contributions.iter().map(|one| one.site.as_str()).collect())
            }
            _ => None,
        }
    }
}

fn participate(spec: &mut RunSpec, (minimum, per_round, quorum, deadline): (u32, u32, u32, u64)) {
    spec.participation.minimum_clients = minimum;
    spec.participation.clients_per_round = per_round;
    spec.participation.quorum = quorum;
    spec.participation.deadline_seconds = deadline;
}

fn reduce_effect(effects: &[Effect]) -> Option<&Effect> {
    effects.iter().find(|effect| matches!(effect, Effect::Reduce { .. }))
}

#[test]
fn a_run_goes_through_its_rounds_and_its_last_evaluation() {
    let mut world = World::with((2, 0, 0, 0), &["bank"]);
    assert_eq!(world.words(), "1 more site to connect and get ready (1 of 2 is)");
    world.ready(&["clinic"]);
    assert_eq!(world.words(), "deltas of bank and clinic (0 of 2 in)");
    world.deliver_all(&["clinic", "bank"], 1);
    assert_eq!(world.words(), "reduction of round 1");
    let effects = world.reduce(1);
    assert!(effects.contains(&Effect::Publish { version: 1 }));
    assert!(effects.contains(&Effect::DiscardSpool { round: 1, keep: BTreeSet::new() }));
    let train = Instruction::Train {
        round: 2,
        first_step: 4,
        steps: 4,
        tokens: 64,
        deadline_ms: None,
        evaluate_base: true,
    };
    assert_eq!(world.instruction("bank"), train);
    world.deliver_all(&["bank", "clinic"], 2);
    world.reduce(2);
    assert_eq!((world.run.state().version, world.run.state().cumulative_step), (2, 8));
    assert_eq!(world.instruction("clinic"), Instruction::Evaluate { version: 2 });
    world.evaluate("bank", 2).unwrap();
    assert!(world.words().starts_with("held-out loss of version 2 from clinic"), "{}", world.words());
    world.evaluate("clinic", 2).unwrap();
    assert_eq!(world.run.state().status, RunStatus::Finished);
    assert_eq!(world.words(), "nothing: the run is finished");
    assert_eq!(world.run.next_timer(), None);
}

#[test]
fn a_run_that_was_not_started_selects_nobody() {
    let mut run = Run::new();
    let plan = Plan::new(&spec());
    run.step(&plan, ready("bank"), 1).unwrap();
    assert_eq!(run.state().phase, Phase::Waiting);
    assert!(matches!(run.instruction(&plan, &site("bank")), Instruction::Idle { .. }));
    run.step(&plan, Event::Start, 1).unwrap();
    assert!(matches!(run.state().phase, Phase::Training(_)));
}

#[test]
fn a_round_does_not_begin_below_the_minimum_or_below_the_quorum() {
    for participation in [(3, 0, 0, 0), (1, 0, 3, 0)] {
        let mut world = World::with(participation, &["a", "b"]);
        assert_eq!(world.run.state().phase, Phase::Waiting);
        world.ready(&["c"]);
        assert_eq!(world.working(), ["a", "b", "c"]);
    }
}

#[test]
fn connected_sites_that_are_not_ready_prepare() {
    let mut world = World::with((2, 0, 0, 0), &["a"]);
    assert_eq!(world.instruction("b"), Instruction::Prepare);
    world.ok(Event::Pause);
    assert_eq!(world.instruction("b"), Instruction::Prepare);
    assert!(matches!(world.instruction("a"), Instruction::Idle { .. }));
}

#[test]
fn sites_that_were_not_selected_idle() {
    let world = World::with((3, 1, 0, 0), &["a", "b", "c"]);
    let idle = ["a", "b", "c"].into_iter().filter(|name| !world.is_training(name)).count();
    assert_eq!(idle, 2);
}

#[test]
fn a_site_that_delivered_waits_for_the_others() {
    let mut world = World::with((3, 0, 0, 0), &["a", "b", "c"]);
    world.deliver("b", 1).unwrap();
    let reason = "delta accepted; waiting for 2 other sites".to_owned();
    assert_eq!(world.instruction("b"), Instruction::Idle { reason });
    assert_eq!(world.run.participation(&site("b")), Participation::Delivered);
    assert_eq!(world.run.participation(&site("a")), Participation::Working);
    assert_eq!(world.run.participation(&site("z")), Participation::NotSelected);
}

#[test]
fn contributions_are_reduced_in_canonical_order_with_weights_that_sum_to_one() {
    for weighting in [Weighting::Tokens, Weighting::Uniform] {
        let mut world = World::new(
            |spec| {
                participate(spec, (3, 0, 0, 0));
                spec.outer.weighting = weighting;
            },
            &["c", "a", "b"],
        );
        world.deliver_all(&["c", "a"], 1);
        let effects = world.deliver("b", 1).unwrap();
        let Some(Effect::Reduce { round: 1, contributions }) = reduce_effect(&effects) else {
            panic!("no reduction in {effects:?}")
        };
        let names: Vec<&str> = contributions.iter().map(|one| one.contribution.site.as_str()).collect();
        assert_eq!(names, ["a", "b", "c"]);
        assert!(contributions.iter().all(|one| (one.weight - 1.0 / 3.0).abs() < 1e-15));
    }
}

#[test]
fn weights_follow_the_tokens_of_the_assignments_and_not_the_reported_ones() {
    let contribution = |name: &str, assigned_tokens| Contribution {
        site: site(name),
        age: 0,
        assigned_tokens,
        accepted_ms: 0,
        facts: facts(&site(name), 1),
    };
    let contributions = [contribution("a", 100), contribution("b", 300)];
    let plan = |weighting| {
        let mut spec = spec();
        spec.outer.weighting = weighting;
        Plan::new(&spec)
    };
    let weights = |weighting| -> Vec<f64> {
        weighted(&contributions, &plan(weighting)).iter().map(|one| one.weight).collect()
    };
    assert_eq!(weights(Weighting::Tokens), [0.25, 0.75]);
    assert_eq!(weights(Weighting::Uniform), [0.5, 0.5]);
    assert_eq!(weighted(&[contribution("a", 0)], &plan(Weighting::Tokens))[0].weight, 1.0);
}

#[test]
fn a_repeated_delivery_counts_once() {
    let mut world = World::with((2, 0, 0, 0), &["a", "b"]);
    world.deliver("a", 1).unwrap();
    let duplicate = vec![Effect::Duplicate { site: site("a"), round: 1 }];
    assert_eq!(world.deliver("a", 1).unwrap(), duplicate);
    assert_eq!(world.working(), ["b"]);
    world.deliver("b", 1).unwrap();
    assert_eq!(world.deliver("a", 1).unwrap(), duplicate, "also while the round is being reduced");
}

#[test]
fn a_second_delta_that_differs_is_refused_and_the_first_stays() {
    let mut world = World::with((2, 0, 0, 0), &["a", "b"]);
    world.deliver("a", 1).unwrap();
    let other = ContributionFacts { delta_digest: Digest::of(b"other"), ..facts(&site("a"), 1) };
    let delivered = |facts| Event::Delivered { site: site("a"), round: 1, facts };
    assert!(matches!(world.step(delivered(other.clone())), Err(Rejection::Conflict { .. })));
    world.deliver("b", 1).unwrap();
    assert!(matches!(world.step(delivered(other)), Err(Rejection::Conflict { .. })));
}

#[test]
fn late_delivery_is_told_the_current_round() {
    let mut world = World::with((2, 0, 0, 0), &["a", "b"]);
    world.deliver_all(&["a", "b"], 1);
    world.reduce(1);
    assert_eq!(world.deliver("a", 1), Err(Rejection::RoundOver { round: 1, current: 2 }));
    assert_eq!(world.deliver("a", 3), Err(Rejection::RoundOver { round: 3, current: 2 }));
}

#[test]
fn a_delivery_without_an_assignment_is_refused() {
    let mut world = World::with((2, 0, 0, 0), &["a"]);
    let refused = |name| Err(Rejection::NotAssigned { site: site(name), round: 1 });
    assert_eq!(world.deliver("a", 1), refused("a"), "nothing is assigned while the run waits");
    world.ready(&["b"]);
    assert_eq!(world.deliver("mallory", 1), refused("mallory"));
}

#[test]
fn more_steps_or_tokens_than_assigned_are_refused() {
    let mut world = World::with((1, 0, 0, 0), &["a"]);
    let good = facts(&site("a"), 1);
    for (what, claimed, facts) in [
        ("steps", 5, ContributionFacts { steps: 5, ..good.clone() }),
        ("tokens", 65, ContributionFacts { tokens: 65, ..good.clone() }),
    ] {
        let outcome = world.step(Event::Delivered { site: site("a"), round: 1, facts });
        assert_eq!(outcome, Err(Rejection::OverClaimed { what, claimed, allowed: claimed - 1 }));
    }
    let less = ContributionFacts { steps: 1, tokens: 16, ..good };
    world.ok(Event::Delivered { site: site("a"), round: 1, facts: less });
}

#[test]
fn measurements_that_no_training_gives_are_refused() {
    let mut world = World::with((1, 0, 0, 0), &["a"]);
    let good = facts(&site("a"), 1);
    for facts in [
        ContributionFacts { train_loss: f64::NAN, ..good.clone() },
        ContributionFacts { train_seconds: -1.0, ..good.clone() },
        ContributionFacts { delta_norm: f64::INFINITY, ..good },
    ] {
        let outcome = world.step(Event::Delivered { site: site("a"), round: 1, facts });
        assert!(matches!(outcome, Err(Rejection::Implausible { .. })), "{outcome:?}");
    }
    let evaluation = Evaluation { version: 0, loss: f64::NAN, tokens: 1, text_bytes: 1 };
    let outcome = world.step(Event::Evaluated { site: site("a"), evaluation });
    assert!(matches!(outcome, Err(Rejection::Implausible { .. })), "{outcome:?}");
}

#[test]
fn a_site_that_lost_its_connection_may_still_deliver() {
    let mut world = World::with((2, 0, 0, 60), &["a", "b"]);
    world.gone(&["b"]);
    assert_eq!(world.working(), ["a", "b"]);
    assert_eq!(world.words(), "deltas of a and b (0 of 2 in; not connected: b; deadline in 1 min 00 s)");
    world.deliver_all(&["b", "a"], 1);
    assert_eq!(world.reducing().unwrap(), ["a", "b"]);
}

#[test]
fn the_deadline_ends_a_round_that_has_its_quorum() {
    let mut world = World::with((3, 0, 2, 60), &["a", "b", "c"]);
    world.deliver("a", 1).unwrap();
    world.deliver("c", 1).unwrap();
    assert_eq!(world.working(), ["b"], "a quorum alone does not end it");
    assert_eq!(world.run.next_timer(), Some(world.now + 60_000));
    assert!(world.wait(59_999).is_empty());
    assert!(reduce_effect(&world.wait(1)).is_some());
    assert_eq!(world.reducing().unwrap(), ["a", "c"]);
    assert_eq!(world.deliver("b", 1), Err(Rejection::RoundOver { round: 1, current: 1 }));
}

#[test]
fn a_missed_deadline_gives_the_places_to_others_and_keeps_what_was_delivered() {
    let mut world = World::with((2, 0, 2, 60), &["a", "b"]);
    world.ready(&["c"]);
    world.deliver("a", 1).unwrap();
    world.wait(60_000);
    assert_eq!(world.working(), ["c"], "c was not tried yet");
    assert_eq!(world.run.participation(&site("b")), Participation::Replaced);
    assert!(world.is_training("b"), "what b has trained is not thrown away");
    assert!(world.words().contains("attempt 2"), "{}", world.words());
    let effects = world.deliver("c", 1).unwrap();
    assert!(reduce_effect(&effects).is_some());
    let effects = world.reduce(1);
    let record = effects.iter().find_map(|effect| match effect {
        Effect::Commit(record) => Some(record),
        _ => None,
    });
    let record = record.unwrap();
    assert_eq!((record.round, record.attempts, record.contributions.len()), (1, 2, 2));
    assert_eq!((record.first_step, record.tokens(), record.started_ms), (0, 128, 1_000_000));
    assert!((record.train_loss() - (2.0 + 1.0 / 3.0)).abs() < 1e-12);
}

#[test]
fn a_late_delta_of_a_replaced_site_counts_while_the_round_lasts() {
    let mut world = World::with((2, 0, 2, 60), &["a", "b"]);
    world.ready(&["c"]);
    world.deliver("a", 1).unwrap();
    world.wait(60_000);
    world.deliver("b", 1).unwrap();
    assert_eq!(world.working(), ["c"], "the round waits for the site at work");
    world.deliver("c", 1).unwrap();
    assert_eq!(world.reducing().unwrap(), ["a", "b", "c"]);
}

#[test]
fn a_slow_site_is_put_to_work_again_where_there_is_no_other() {
    let mut world = World::with((2, 0, 0, 60), &["a", "b"]);
    world.deliver("a", 1).unwrap();
    for attempt in 2..5 {
        world.wait(60_000);
        assert_eq!(world.working(), ["b"]);
        assert!(world.words().contains(&format!("attempt {attempt}")), "{}", world.words());
    }
    world.deliver("b", 1).unwrap();
    assert_eq!(world.reducing().unwrap(), ["a", "b"]);
}

#[test]
fn a_round_without_enough_sites_takes_the_first_that_gets_ready() {
    let mut world = World::with((2, 0, 2, 60), &["a", "b"]);
    world.gone(&["a", "b"]);
    world.wait(60_000);
    assert!(world.working().is_empty());
    assert_eq!(
        world.words(),
        "sites to take part in round 1 (0 of 2 in; 2 more sites to join; deadline in 1 min 00 s)"
    );
    world.ready(&["c"]);
    assert_eq!(world.working(), ["c"]);
    world.ready(&["b", "d"]);
    assert_eq!(world.working(), ["b", "c"], "as many as the round wants");
    world.deliver_all(&["b", "c"], 1);
    assert_eq!(world.reducing().unwrap(), ["b", "c"]);
}

#[test]
fn an_open_quorum_follows_the_selection_but_not_below_the_minimum() {
    let mut world = World::with((2, 0, 0, 60), &[]);
    world.ok(Event::Pause);
    world.ready(&["a", "b", "c"]);
    world.ok(Event::Resume);
    world.deliver("a", 1).unwrap();
    world.gone(&["b", "c"]);
    world.wait(60_000);
    assert!(world.reducing().is_none(), "one delta is below the minimum of clients");
    world.ready(&["c"]);
    world.deliver("c", 1).unwrap();
    assert_eq!(world.reducing().unwrap(), ["a", "c"], "b is gone, and two are the minimum");
}

#[test]
fn a_round_that_selects_fewer_than_the_minimum_needs_those_it_selected() {
    let mut world = World::with((3, 2, 0, 60), &["a", "b", "c"]);
    let working: Vec<String> = world.working().iter().map(ToString::to_string).collect();
    assert_eq!(working.len(), 2);
    world.deliver(&working[0], 1).unwrap();
    world.deliver(&working[1], 1).unwrap();
    assert_eq!(world.reducing().unwrap().len(), 2);
}

#[test]
fn without_a_deadline_pausing_and_resuming_replaces_the_sites_that_are_gone() {
    let mut world = World::with((2, 2, 2, 0), &["a", "b"]);
    world.ready(&["c"]);
    world.deliver("a", 1).unwrap();
    world.gone(&["b"]);
    assert_eq!(world.run.next_timer(), None);
    assert_eq!(world.working(), ["b"]);
    world.ok(Event::Pause);
    assert!(matches!(world.instruction("c"), Instruction::Idle { .. }));
    world.ok(Event::Resume);
    assert_eq!(world.working(), ["c"]);
    world.deliver("c", 1).unwrap();
    assert_eq!(world.reducing().unwrap(), ["a", "c"]);
}

#[test]
fn resuming_keeps_the_sites_that_are_there_and_gives_them_the_whole_deadline() {
    let mut world = World::with((2, 0, 2, 60), &["a", "b"]);
    world.ok(Event::Pause);
    assert_eq!(world.run.next_timer(), None);
    assert!(world.wait(1_000_000).is_empty(), "no deadline while paused");
    world.ok(Event::Resume);
    assert_eq!(world.working(), ["a", "b"]);
    assert_eq!(world.run.next_timer(), Some(world.now + 60_000));
    assert!(!world.words().contains("attempt"), "{}", world.words());
}

#[test]
fn resuming_right_after_a_restart_takes_no_site_for_gone() {
    let mut world = World::with((2, 0, 0, 0), &["a", "b"]);
    world.ok(Event::Pause);
    world.restart();
    world.ok(Event::Resume);
    assert_eq!(world.working(), ["a", "b"]);
}

#[test]
fn deltas_are_taken_while_paused_but_the_round_ends_after_the_pause() {
    let mut world = World::with((2, 0, 0, 0), &["a", "b"]);
    world.ok(Event::Pause);
    world.deliver_all(&["a", "b"], 1);
    assert!(world.reducing().is_none());
    let effects = world.ok(Event::Resume);
    assert!(reduce_effect(&effects).is_some());
}

#[test]
fn a_reduction_that_ends_while_paused_is_committed_and_the_run_stays_paused() {
    let mut world = World::with((1, 0, 0, 0), &["a"]);
    world.deliver("a", 1).unwrap();
    world.ok(Event::Pause);
    world.reduce(1);
    assert_eq!(world.run.state().version, 1);
    assert_eq!((&world.run.state().status, &world.run.state().phase), (&RunStatus::Paused, &Phase::Waiting));
    world.ok(Event::Resume);
    assert_eq!(world.working(), ["a"]);
}

#[test]
fn operators_actions_that_do_not_fit_are_refused() {
    let mut world = World::with((1, 0, 0, 0), &[]);
    let refused = |action, status| Err(Rejection::WrongStatus { action, status });
    assert_eq!(world.step(Event::Start), refused("started", RunStatus::Active));
    assert_eq!(world.step(Event::Resume), refused("resumed", RunStatus::Active));
    world.ok(Event::Pause);
    assert_eq!(world.step(Event::Pause), refused("paused", RunStatus::Paused));
    world.ok(Event::Abort { reason: "no budget".into() });
    let aborted = RunStatus::Aborted { reason: "no budget".into() };
    for (event, action) in [
        (Event::Start, "started"),
        (Event::Pause, "paused"),
        (Event::Resume, "resumed"),
        (Event::Abort { reason: String::new() }, "aborted"),
    ] {
        assert_eq!(world.step(event), refused(action, aborted.clone()));
    }
}

#[test]
fn an_aborted_run_takes_nothing_and_discards_its_spool() {
    let mut world = World::with((1, 0, 0, 0), &["a"]);
    let effects = world.ok(Event::Abort { reason: "x".repeat(10_000) });
    assert!(effects.contains(&Effect::DiscardSpool { round: 1, keep: BTreeSet::new() }));
    assert!(matches!(world.deliver("a", 1), Err(Rejection::NotRunning { .. })));
    assert_eq!(world.words().len(), "nothing: the run was aborted ()".len() + REASON_CHARACTERS_MAX);
    let resumed =
        vec![Effect::DiscardSpool { round: u32::MAX, keep: BTreeSet::new() }, Effect::InstructionsChanged];
    assert_eq!(world.restart(), resumed);
}

#[test]
fn a_failed_reduction_is_tried_again_after_a_while() {
    let mut world = World::with((1, 0, 0, 0), &["a"]);
    world.deliver("a", 1).unwrap();
    let mut pauses_ms = Vec::new();
    for _ in 0..9 {
        let effects = world.ok(Event::ReduceFailed { round: 1, reason: "disk full".into(), spoilt: None });
        assert!(reduce_effect(&effects).is_none());
        let pause_ms = world.run.next_timer().unwrap() - world.now;
        assert!(reduce_effect(&world.wait(pause_ms - 1)).is_none());
        assert!(reduce_effect(&world.wait(1)).is_some());
        pauses_ms.push(pause_ms);
    }
    assert_eq!(pauses_ms[..3], [REDUCE_RETRY_MS_MIN, 2 * REDUCE_RETRY_MS_MIN, 4 * REDUCE_RETRY_MS_MIN]);
    assert_eq!(pauses_ms[8], 300_000);
    world.reduce(1);
    assert_eq!(world.run.state().version, 1);
}

/// Two of three deltas turn out to be spoilt, one after the other.
fn check_spoilt(participation: (u32, u32, u32, u64), averaged: &[&[&str]]) {
    let mut world = World::with(participation, &["a", "b", "c"]);
    world.deliver_all(&["a", "b", "c"], 1);
    for (spoilt, expected) in ["b", "c"].into_iter().zip(averaged) {
        let spoilt = Some((site(spoilt), 1));
        world.ok(Event::ReduceFailed { round: 1, reason: "damaged".into(), spoilt });
        let pause_ms = world.run.next_timer().unwrap() - world.now;
        let effects = world.wait(pause_ms);
        let Some(Effect::Reduce { contributions, .. }) = reduce_effect(&effects) else {
            panic!("{effects:?}");
        };
        let sites: Vec<_> = contributions.iter().map(|one| one.contribution.site.as_str()).collect();
        assert_eq!(sites, *expected);
        assert_eq!(contributions.iter().map(|one| one.weight).sum::<f64>(), 1.0);
    }
    assert_eq!(world.deliver("b", 1).is_ok(), averaged[1].contains(&"b"), "it is over for who is left out");
    world.reduce(1);
    assert_eq!(world.run.state().version, 1);
}

#[test]
fn a_spoilt_delta_is_left_out_while_the_others_are_a_quorum() {
    check_spoilt((3, 0, 1, 0), &[&["a", "c"], &["a"]]);
    check_spoilt((3, 0, 2, 0), &[&["a", "c"], &["a", "c"]]);
    check_spoilt((3, 0, 3, 0), &[&["a", "b", "c"], &["a", "b", "c"]]);
    check_spoilt((3, 0, 0, 0), &[&["a", "b", "c"], &["a", "b", "c"]]);
}

#[test]
fn a_site_that_is_not_in_the_round_cannot_be_left_out() {
    let mut world = World::with((1, 0, 0, 0), &["a"]);
    world.deliver("a", 1).unwrap();
    for spoilt in [("a", 1), ("a", 2), ("z", 1)] {
        let spoilt = Some((site(spoilt.0), spoilt.1));
        world.ok(Event::ReduceFailed { round: 1, reason: "damaged".into(), spoilt });
        let pause_ms = world.run.next_timer().unwrap() - world.now;
        let effects = world.wait(pause_ms);
        assert!(
            matches!(reduce_effect(&effects), Some(Effect::Reduce { contributions, .. }) if contributions.len() == 1)
        );
    }
}

#[test]
fn a_model_with_an_infinity_in_it_is_not_committed() {
    let mut world = World::with((1, 0, 0, 0), &["a"]);
    world.deliver("a", 1).unwrap();
    world.ok(Event::Reduced { round: 1, facts: ReducedFacts { update_norm: f64::INFINITY, ..reduced(1) } });
    assert_eq!(world.run.state().version, 0);
    assert!(world.words().starts_with("another try to reduce round 1 in 5.0 s"), "{}", world.words());
}

#[test]
fn a_round_is_committed_once() {
    let mut world = World::with((1, 0, 0, 0), &["a"]);
    world.deliver("a", 1).unwrap();
    world.reduce(1);
    let again = world.step(Event::Reduced { round: 1, facts: reduced(1) });
    assert_eq!(again, Err(Rejection::NotReducing { round: 1, current: 2 }));
}

#[test]
fn a_restart_performs_again_what_may_not_have_been_done() {
    let mut world = World::with((1, 0, 0, 0), &["a"]);
    world.deliver("a", 1).unwrap();
    let effects = world.restart();
    assert!(reduce_effect(&effects).is_some());
    world.reduce(1);
    let effects = world.restart();
    assert!(reduce_effect(&effects).is_none());
    assert!(effects.contains(&Effect::Publish { version: 1 }));
    assert!(effects.contains(&Effect::DiscardSpool { round: 1, keep: BTreeSet::new() }));
    world.ok(Event::Published { version: 1 });
    assert!(!world.restart().contains(&Effect::Publish { version: 1 }));
}

#[test]
fn after_a_restart_deadlines_wait_for_sites_to_come_back() {
    let mut world = World::with((2, 0, 2, 600), &["a", "b"]);
    world.now += 1_000_000;
    world.restart();
    assert_eq!(world.instruction("a"), Instruction::Prepare);
    assert_eq!(world.run.next_timer(), Some(world.now + RECONNECT_MS_MAX));
    world.wait(RECONNECT_MS_MAX - 1);
    world.ready(&["b", "a"]);
    assert_eq!(world.working(), ["a", "b"]);
    assert!(world.is_training("a"));
    world.deliver_all(&["a", "b"], 1);
    assert_eq!(world.reducing().unwrap(), ["a", "b"]);
}

/// A run of one round whose only round was just committed.
fn last_evaluation() -> World {
    let mut world = World::new(
        |spec| {
            participate(spec, (2, 0, 0, 0));
            spec.rounds = 1;
        },
        &["a", "b"],
    );
    world.deliver_all(&["a", "b"], 1);
    world.reduce(1);
    world
}

#[test]
fn the_last_evaluation_does_not_wait_long_for_sites_that_are_gone() {
    let mut world = last_evaluation();
    world.evaluate("a", 1).unwrap();
    world.gone(&["b"]);
    assert_eq!(world.run.state().status, RunStatus::Active, "it may have lost its connection only");
    assert_eq!(world.run.next_timer(), Some(world.now + EVALUATION_PATIENCE_MS));
    world.wait(EVALUATION_PATIENCE_MS);
    assert_eq!(world.run.state().status, RunStatus::Finished);
}

#[test]
fn a_site_that_reconnects_during_the_last_evaluation_is_still_heard() {
    let mut world = last_evaluation();
    world.evaluate("a", 1).unwrap();
    world.gone(&["b"]);
    world.evaluate("b", 1).unwrap();
    assert_eq!(world.run.state().status, RunStatus::Finished);
    assert!(world.run.state().has_evaluated(&site("b"), 1));
}

#[test]
fn the_last_evaluation_ends_at_its_deadline() {
    let mut world = last_evaluation();
    world.evaluate("a", 1).unwrap();
    world.wait(EVALUATION_DEADLINE_MS - 1);
    assert_eq!(world.run.state().status, RunStatus::Active);
    world.wait(1);
    assert_eq!(world.run.state().status, RunStatus::Finished);
}

#[test]
fn the_last_evaluation_waits_for_sites_to_come_back_after_a_restart() {
    let mut world = last_evaluation();
    world.restart();
    world.ready(&["a"]);
    world.evaluate("a", 1).unwrap();
    assert_eq!(world.run.state().status, RunStatus::Active);
    assert_eq!(world.run.next_timer(), Some(world.now + RECONNECT_MS_MAX));
    let mut without_b = World { plan: world.plan.clone(), run: world.run.clone(), now: world.now };
    without_b.wait(RECONNECT_MS_MAX);
    assert_eq!(without_b.run.state().status, RunStatus::Finished);
    world.ready(&["b"]);
    world.evaluate("b", 1).unwrap();
    assert_eq!(world.run.state().status, RunStatus::Finished);
}

#[test]
fn a_run_that_evaluates_nothing_finishes_with_its_last_round() {
    let mut world = World::new(
        |spec| {
            spec.rounds = 1;
            spec.evaluation.every_rounds = 0;
        },
        &["a"],
    );
    let evaluate_base = matches!(world.instruction("a"), Instruction::Train { evaluate_base: true, .. });
    assert!(!evaluate_base);
    world.deliver("a", 1).unwrap();
    world.reduce(1);
    assert_eq!(world.run.state().status, RunStatus::Finished);
}

#[test]
fn a_run_of_no_rounds_finishes_when_it_is_started() {
    let world = World::new(|spec| spec.rounds = 0, &[]);
    assert_eq!(world.run.state().status, RunStatus::Finished);
}

#[test]
fn an_evaluation_is_recorded_once_per_site_and_version() {
    let mut world = World::with((2, 0, 0, 0), &["a", "b"]);
    let effects = world.evaluate("a", 0).unwrap();
    assert!(matches!(effects[0], Effect::RecordEvaluation { .. }));
    assert!(world.evaluate("a", 0).unwrap().is_empty());
    assert!(!world.evaluate("b", 0).unwrap().is_empty());
    let unknown = Rejection::UnknownVersion { version: 1, current: 0 };
    assert_eq!(world.evaluate("a", 1), Err(unknown));
    let evaluation = Evaluation { version: 0, loss: 1.0, tokens: u64::MAX, text_bytes: 1 };
    let outcome = world.step(Event::Evaluated { site: site("c"), evaluation });
    assert!(matches!(outcome, Err(Rejection::OverClaimed { .. })));
}

#[test]
fn what_is_remembered_of_evaluations_and_publications_is_bounded() {
    let mut world = World::new(|spec| spec.rounds = 50, &["a"]);
    for round in 1..50 {
        world.evaluate("a", round - 1).unwrap();
        world.deliver("a", round).unwrap();
        world.reduce(round);
        assert!(world.run.state().evaluated.len() <= EVALUATED_VERSIONS_MAX);
        assert!(world.run.state().unpublished.len() <= state::UNPUBLISHED_VERSIONS_MAX);
    }
    assert_eq!(world.evaluate("b", 45), Err(Rejection::NotWanted { version: 45, current: 49 }));
    assert!(!world.evaluate("b", 46).unwrap().is_empty());
}

#[test]
fn a_run_has_room_for_so_many_sites() {
    let mut world = World::with((u32::MAX, 0, 0, 0), &[]);
    for number in 0..SITES_MAX {
        world.ready(&[format!("site-{number}").as_str()]);
    }
    let limit = SITES_MAX;
    assert_eq!(world.step(ready("one-more")), Err(Rejection::TooManySites { site: site("one-more"), limit }));
    world.ready(&["site-0"]);
}

#[test]
fn numbers_at_their_limits_do_not_panic() {
    let mut world = World::with((1, 0, 2, u64::MAX), &["a", "b"]);
    world.now = u64::MAX;
    world.ok(Event::Tick);
    world.deliver("a", 1).unwrap();
    world.ok(Event::Tick);
    world.restart();
    world.ok(Event::Tick);
    assert!(!world.words().is_empty());
}

#[test]
fn a_stored_state_comes_back_as_it_was() {
    let mut world = World::with((2, 0, 0, 60), &["a", "b"]);
    for exponent in 0..200 {
        let odd =
            ContributionFacts { train_loss: 1.0 / 3.0 * 0.7_f64.powi(exponent), ..facts(&site("a"), 1) };
        let mut world = World { plan: world.plan.clone(), run: world.run.clone(), now: world.now };
        world.ok(Event::Delivered { site: site("a"), round: 1, facts: odd });
        world.restart();
    }
    world.deliver_all(&["a", "b"], 1);
    world.restart();
}

#[test]
fn long_lists_of_names_are_cut() {
    for (length, expected) in [
        (0, "nobody"),
        (1, "s0"),
        (2, "s0 and s1"),
        (3, "s0, s1 and s2"),
        (6, "s0, s1, s2, s3, s4 and s5"),
        (7, "s0, s1, s2, s3, s4, s5 and 1 other"),
        (9, "s0, s1, s2, s3, s4, s5 and 3 others"),
    ] {
        let sites: Vec<SiteName> = (0..length).map(|number| site(&format!("s{number}"))).collect();
        assert_eq!(words::names(&sites), expected);
    }
}
