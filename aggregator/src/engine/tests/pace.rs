//! When a round ends, and with how much work of whom.

use consort_common::spec::AdaptiveDeadline;

use super::*;

/// A run that waits for 2 of 4 sites, and puts 3 to work.
fn over_selected() -> World {
    World::new(
        |spec| {
            participate(spec, (2, 2, 0, 60));
            spec.participation.over_selection = 1;
        },
        &["a", "b"],
    )
}

#[test]
fn with_over_selection_a_round_ends_with_the_first_deltas_and_the_rest_is_late() {
    let mut world = over_selected();
    world.ready(&["c", "d"]);
    assert_eq!(world.working(), ["a", "b", "c"], "one beyond the two that are wanted");
    assert!(world.run.state().expected(&world.plan).is_empty(), "nobody can tell whose deltas will count");
    let effects = world.deliver("c", 1).unwrap();
    assert!(effects.contains(&Effect::Event("c delivered for round 1 (1 of 2)".to_owned())));
    let reason = "delta accepted; waiting for 1 other site".to_owned();
    assert_eq!(world.instruction("c"), Instruction::Idle { reason });
    assert_eq!(world.words(), "deltas of a and b (1 of 2 in; deadline in 1 min 00 s)");
    world.restart();
    world.ready(&["a", "b", "c", "d"]);
    assert!(reduce_effect(&world.deliver("a", 1).unwrap()).is_some());
    assert_eq!(world.reducing().unwrap(), ["a", "c"]);
    assert_eq!(world.deliver("b", 1), Err(Rejection::RoundOver { round: 1, current: 1 }));
    assert!(!world.is_training("b"));
}

#[test]
fn with_over_selection_the_quorum_is_what_is_waited_for() {
    let mut world = over_selected();
    world.ready(&["c"]);
    world.deliver("a", 1).unwrap();
    world.wait(60_000);
    assert!(world.reducing().is_none(), "one is not two");
    assert_eq!(world.working(), ["b", "c"], "tried again");
    world.deliver("b", 1).unwrap();
    assert_eq!(world.reducing().unwrap(), ["a", "b"]);
}

#[test]
fn sites_beyond_need_are_put_to_work_where_there_are_any() {
    let world = over_selected();
    assert_eq!(world.working(), ["a", "b"]);
    assert_eq!(world.run.state().expected(&world.plan).len(), 2);
}

/// A run of two sites, a quorum of one, a deadline of ten minutes and one of median + 2 x MAD, at least 5 s.
fn adaptive() -> World {
    World::new(
        |spec| {
            participate(spec, (2, 0, 1, 600));
            spec.participation.adaptive_deadline =
                Some(AdaptiveDeadline { deviations: 2.0, minimum_seconds: 5 });
            spec.rounds = 50;
        },
        &["a", "b"],
    )
}

/// `a` and `b` deliver after so many milliseconds each.
fn round(world: &mut World, number: u32, a_ms: u64, b_ms: u64) {
    assert!(a_ms <= b_ms);
    world.wait(a_ms);
    world.deliver("a", number).unwrap();
    world.wait(b_ms - a_ms);
    world.deliver("b", number).unwrap();
    world.reduce(number);
}

fn deadline_in_ms(world: &World) -> u64 {
    world.run.deadline_ms().unwrap() - world.now
}

#[test]
fn the_adaptive_deadline_follows_from_earlier_rounds_once_enough_are_known() {
    let mut world = adaptive();
    for (number, a_ms, b_ms) in [(1, 10_000, 20_000), (2, 11_000, 21_000), (3, 12_000, 22_000)] {
        assert_eq!(deadline_in_ms(&world), 600_000, "the fixed one");
        round(&mut world, number, a_ms, b_ms);
    }
    // By hand: 10 11 12 20 21 22 s have the median 16 s, and deviate from it by 4 4 5 5 6 6 s: MAD 5 s.
    assert_eq!(deadline_in_ms(&world), 16_000 + 2 * 5_000);
    world.restart();
    world.ready(&["a", "b"]);
    round(&mut world, 4, 13_000, 23_000);
    // 10 11 12 13 20 21 22 23 s: 16.5 s, and 3.5 3.5 4.5 4.5 5.5 5.5 6.5 6.5 s: 5 s.
    assert_eq!(deadline_in_ms(&world), 16_500 + 2 * 5_000, "a restart forgets nothing");
}

#[test]
fn the_adaptive_deadline_ends_a_round_and_a_site_that_missed_it_counts_with_the_time_it_had() {
    let mut world = adaptive();
    for number in 1..=3 {
        round(&mut world, number, 10_000, 10_000);
    }
    assert_eq!(deadline_in_ms(&world), 10_000);
    world.wait(9_000);
    world.deliver("a", 4).unwrap();
    assert!(reduce_effect(&world.wait(1_000)).is_some(), "without b");
    world.reduce(4);
    // 9 10 10 10 10 10 10 10.
    assert_eq!(deadline_in_ms(&world), 10_000);
    for number in 5..=20 {
        world.wait(8_000);
        world.deliver("a", number).unwrap();
        world.wait(deadline_in_ms(&world));
        world.reduce(number);
        assert!(deadline_in_ms(&world) >= 9_000, "the deadline does not close in on the fastest site");
    }
}

#[test]
fn the_adaptive_deadline_has_bounds() {
    let mut world = adaptive();
    for number in 1..=3 {
        round(&mut world, number, 10, 20);
    }
    assert_eq!(deadline_in_ms(&world), 5_000, "the minimum");
    let mut world = adaptive();
    for number in 1..=3 {
        round(&mut world, number, 100_000, 590_000);
    }
    assert_eq!(deadline_in_ms(&world), 600_000, "the fixed one");
}

#[test]
fn a_round_that_was_paused_says_nothing_about_the_sites_pace() {
    let mut world = adaptive();
    for number in 1..=3 {
        world.ok(Event::Pause);
        world.now += 1_000_000;
        world.ok(Event::Resume);
        round(&mut world, number, 1_000, 2_000);
    }
    assert_eq!(deadline_in_ms(&world), 600_000, "nothing is known yet");
}

#[test]
fn what_is_remembered_of_the_sites_pace_is_bounded() {
    let names: Vec<String> = (0..200).map(|number| format!("site-{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut world = adaptive();
    world.ready(&names);
    let mut lengths = Vec::new();
    for number in 1..=20 {
        world.now += 100;
        for name in world.working().into_iter().map(str::to_owned).collect::<Vec<_>>() {
            world.now += 1;
            world.deliver(&name, number).unwrap();
        }
        world.reduce(number);
        lengths.push(serde_json::to_string(&world.run.state().pace).unwrap().len());
    }
    assert!(lengths[19] <= lengths[8] + 16, "{lengths:?}");
    assert!(lengths[19] < 8 * 64 * 8, "{lengths:?}");
}

#[test]
fn a_state_that_was_stored_before_there_was_a_pace_still_loads() {
    let mut world = adaptive();
    let mut stored = serde_json::to_value(world.run.state()).unwrap();
    stored.as_object_mut().unwrap().remove("pace").unwrap();
    stored["phase"]["training"].as_object_mut().unwrap().remove("assignments").unwrap();
    let state: State = serde_json::from_value(stored).unwrap();
    world.run = Run::restore(&world.plan, state, world.now);
    world.ready(&["a", "b"]);
    assert!(world.is_training("a"));
    world.deliver_all(&["a", "b"], 1);
    assert_eq!(world.reducing().unwrap(), ["a", "b"]);
}

/// A run of `a`, `b` and, three times as slow as they, `c`, whose first round is committed; 4 local steps.
fn after_a_round_at_unequal_speeds(minimum_steps: u32) -> World {
    let adjust = |spec: &mut RunSpec| {
        participate(spec, (3, 0, 0, 0));
        spec.participation.minimum_steps = minimum_steps;
        spec.rounds = 3;
    };
    let mut world = World::new(adjust, &["a", "b", "c"]);
    for (name, train_seconds) in [("a", 1.0), ("b", 1.0), ("c", 3.0)] {
        let facts = ContributionFacts { train_seconds, ..facts(&site(name), 1) };
        world.ok(Event::Delivered { site: site(name), round: 1, facts });
    }
    world.reduce(1);
    world
}

fn task(world: &World, name: &str) -> (u64, u32, u64) {
    match world.instruction(name) {
        Instruction::Train { first_step, steps, tokens, .. } => (first_step, steps, tokens),
        other => panic!("{other:?}"),
    }
}

#[test]
fn slower_sites_take_fewer_steps_and_count_accordingly_while_the_clock_is_the_runs() {
    let mut world = after_a_round_at_unequal_speeds(1);
    assert_eq!((task(&world, "a"), task(&world, "c")), ((4, 4, 64), (4, 1, 16)));
    let expected = world.run.state().expected(&world.plan);
    world.deliver_all(&["a", "b"], 2);
    let refused = Rejection::OverClaimed { what: "steps", claimed: 4, allowed: 1 };
    assert_eq!(world.deliver("c", 2), Err(refused));
    world.restart();
    world.ready(&["a", "b", "c"]);
    assert_eq!(task(&world, "c"), (4, 1, 16));
    let facts = ContributionFacts { steps: 1, tokens: 16, train_seconds: 0.5, ..facts(&site("c"), 2) };
    let effects = world.ok(Event::Delivered { site: site("c"), round: 2, facts });
    let Some(Effect::Reduce { contributions, .. }) = reduce_effect(&effects) else { panic!("{effects:?}") };
    let weights: Vec<f64> = contributions.iter().map(|one| one.weight).collect();
    assert_eq!(weights, [64.0 / 144.0, 64.0 / 144.0, 16.0 / 144.0]);
    assert_eq!(expected.into_iter().map(|(_, weight)| weight).collect::<Vec<_>>(), weights);
    world.reduce(2);
    assert_eq!(world.run.state().cumulative_step, 8);
    assert_eq!(task(&world, "c"), (8, 1, 16), "half a second for a step, where a and b take 25 ms");
}

#[test]
fn no_site_takes_fewer_steps_than_the_minimum_and_none_fewer_at_all_without_one() {
    for (minimum_steps, expected) in [(0, 4), (1, 1), (3, 3), (4, 4)] {
        let world = after_a_round_at_unequal_speeds(minimum_steps);
        assert_eq!(task(&world, "c").1, expected);
        assert_eq!(task(&world, "a").1, 4);
    }
}
