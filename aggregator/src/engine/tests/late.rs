//! Deltas that come after their round has ended, and rounds that wait for a number of deltas only.

use consort_common::spec::Aggregation;

use super::*;

/// Two sites, of which a round needs one at its deadline of 10 s; deltas may be so many rounds late.
fn with_late(staleness_max: u32, rounds: u32) -> World {
    let adjust = |spec: &mut RunSpec| {
        participate(spec, (2, 0, 1, 10));
        spec.rounds = rounds;
        spec.participation.staleness_max = staleness_max;
    };
    World::new(adjust, &["fast", "slow"])
}

/// The buffered mode with these sites, all of them needed to begin.
fn buffered(buffer: u32, staleness_max: u32, sites: &[&str]) -> World {
    let adjust = |spec: &mut RunSpec| {
        spec.rounds = 6;
        spec.participation.minimum_clients = sites.len() as u32;
        spec.participation.buffer = buffer;
        spec.participation.staleness_max = staleness_max;
    };
    World::new(adjust, sites)
}

impl World {
    /// The fast site delivers and the deadline passes; the round is reduced.
    fn round_without_slow(&mut self, round: u32) -> Vec<Effect> {
        self.deliver("fast", round).unwrap();
        self.wait(10_000);
        self.reduce(round)
    }

    fn round_of(&self, name: &str) -> u32 {
        match self.instruction(name) {
            Instruction::Train { round, .. } => round,
            other => panic!("{name} does not train: {other:?}"),
        }
    }

    /// Site, age and weight of what is averaged.
    fn averaged(&self) -> Vec<(&str, u32, f64)> {
        let Phase::Reducing(reducing) = &self.run.state().phase else { panic!("not reducing") };
        let Effect::Reduce { contributions, .. } = reducing.effect(&self.plan) else {
            panic!("no reduction")
        };
        let weights = contributions.into_iter().map(|one| one.weight);
        let averaged = reducing.contributions.iter().zip(weights);
        averaged.map(|(one, weight)| (one.site.as_str(), one.age, weight)).collect()
    }
}

/// Up to which round deltas are deleted, and of which rounds before they are not.
fn discarded(effects: &[Effect]) -> Option<(u32, Vec<u32>)> {
    effects.iter().find_map(|effect| match effect {
        Effect::DiscardSpool { round, keep } => Some((*round, keep.iter().copied().collect())),
        _ => None,
    })
}

#[test]
fn without_a_staleness_a_late_delta_is_dropped() {
    let mut world = with_late(0, 3);
    world.round_without_slow(1);
    assert_eq!(world.round_of("slow"), 2, "it goes on with the others");
    let over = Rejection::RoundOver { round: 1, current: 2 };
    assert_eq!(world.deliver("slow", 1), Err(over));
}

#[test]
fn a_late_delta_counts_in_the_next_round_with_less_weight_also_after_a_restart() {
    let mut world = with_late(1, 3);
    let effects = world.round_without_slow(1);
    let late_to_come = Some((1, vec![1]));
    assert_eq!(discarded(&effects), late_to_come, "the late delta may be on its way");
    assert_eq!((world.round_of("fast"), world.round_of("slow")), (2, 1));
    assert_eq!(world.run.participation(&site("slow")), Participation::Behind);
    assert_eq!(world.working(), ["fast"], "it takes part in no other round");
    assert!(world.words().contains("at work on an earlier round: slow"), "{}", world.words());
    assert_eq!(discarded(&world.restart()), late_to_come);
    world.ready(&["fast", "slow"]);
    let effects = world.deliver("slow", 1).unwrap();
    let recorded = effects.iter().find_map(|effect| match effect {
        Effect::RecordContribution { round, contribution } => Some((*round, contribution.age)),
        _ => None,
    });
    assert_eq!(recorded, Some((1, 1)));
    assert!(!world.is_training("slow"), "the round is full");
    let again = Effect::Duplicate { site: site("slow"), round: 1 };
    assert_eq!(world.deliver("slow", 1).unwrap(), std::slice::from_ref(&again));
    world.deliver("fast", 2).unwrap();
    assert_eq!(world.deliver("slow", 1).unwrap(), [again]);
    // 1 and 1 / sqrt(2), as shares.
    let late = 1.0 / (1.0 + 2f64.sqrt());
    let [("fast", 0, first), ("slow", 1, second)] = world.averaged()[..] else {
        panic!("{:?}", world.averaged())
    };
    assert!((first - (1.0 - late)).abs() < 1e-15 && (second - late).abs() < 1e-15);
    assert_eq!(discarded(&world.restart()), Some((1, vec![1])), "both are needed");
    assert_eq!(discarded(&world.reduce(2)), Some((2, vec![])));
    world.ready(&["fast", "slow"]);
    assert_eq!((world.round_of("fast"), world.round_of("slow")), (3, 3));
}

#[test]
fn a_site_that_is_behind_keeps_no_deltas_of_other_rounds_and_none_once_it_is_given_up() {
    let mut world = with_late(3, 6);
    world.round_without_slow(1);
    for round in 2..=3 {
        world.deliver("fast", round).unwrap();
        assert_eq!(discarded(&world.reduce(round)), Some((round, vec![1])));
    }
    let effects = world.deliver("fast", 4).unwrap();
    assert_eq!(discarded(&effects), Some((3, vec![])), "its delta would be 4 rounds late");
}

#[test]
fn a_delta_that_comes_while_the_next_round_is_reduced_counts_in_the_one_after_if_it_may() {
    for (staleness_max, age) in [(1, None), (2, Some(2))] {
        let mut world = with_late(staleness_max, 3);
        world.round_without_slow(1);
        world.deliver("fast", 2).unwrap();
        assert_eq!(world.reducing(), Some(vec!["fast"]), "it is not waited for");
        let delivered = world.deliver("slow", 1);
        assert_eq!(delivered.is_ok(), age.is_some());
        world.reduce(2);
        world.deliver("fast", 3).unwrap();
        if let Some(age) = age {
            world.wait(10_000);
            assert_eq!(world.averaged().iter().map(|one| one.1).collect::<Vec<_>>(), [0, age]);
        } else {
            assert_eq!(delivered, Err(Rejection::RoundOver { round: 1, current: 2 }));
            assert_eq!(world.round_of("slow"), 3);
        }
    }
}

#[test]
fn a_late_delta_counts_towards_no_quorum_and_is_given_up_at_a_deadline_without_one() {
    let adjust = |spec: &mut RunSpec| {
        participate(spec, (3, 0, 2, 10));
        spec.rounds = 3;
        spec.participation.staleness_max = 3;
    };
    let mut world = World::new(adjust, &["a", "b", "c"]);
    world.deliver_all(&["a", "b"], 1);
    world.wait(10_000);
    world.reduce(1);
    assert_eq!(world.working(), ["a", "b"]);
    world.deliver("a", 2).unwrap();
    world.wait(10_000);
    assert_eq!(world.working(), ["c"], "a fresh delta of it makes the quorum");
    assert_eq!(world.round_of("c"), 2);
    assert!(world.deliver("c", 1).is_err());
}

#[test]
fn too_few_free_sites_for_a_round_give_their_late_deltas_up() {
    let adjust = |spec: &mut RunSpec| {
        participate(spec, (2, 0, 2, 10));
        spec.rounds = 3;
        spec.participation.staleness_max = 3;
    };
    let mut world = World::new(adjust, &["a", "b"]);
    world.ready(&["c"]);
    world.deliver("a", 1).unwrap();
    world.gone(&["b"]);
    world.wait(10_000);
    world.deliver("c", 1).unwrap();
    world.gone(&["a"]);
    world.reduce(1);
    world.ready(&["b"]);
    assert_eq!(world.working(), ["b", "c"], "with b and c only, b cannot be left to an old round");
}

#[test]
fn the_last_round_waits_for_nobody_who_is_behind() {
    let mut world = with_late(5, 2);
    world.round_without_slow(1);
    world.deliver("fast", 2).unwrap();
    assert_eq!(world.deliver("slow", 1), Err(Rejection::RoundOver { round: 1, current: 2 }));
    world.reduce(2);
    assert_eq!(world.instruction("slow"), Instruction::Evaluate { version: 2 });
}

#[test]
fn a_full_buffer_makes_a_version_and_the_sites_at_work_go_on_with_what_they_began() {
    let mut world = buffered(2, 3, &["a", "b", "c", "d"]);
    assert_eq!(world.working(), ["a", "b", "c", "d"]);
    world.deliver("a", 1).unwrap();
    assert_eq!(world.words(), "deltas of b, c and d (1 of 2 in)");
    assert!(!world.is_training("a"), "from the same version it would deliver twice");
    world.deliver("b", 1).unwrap();
    assert_eq!(world.reducing(), Some(vec!["a", "b"]));
    world.deliver("c", 1).unwrap();
    world.reduce(1);
    let rounds = ["a", "b", "c", "d"].map(|name| world.round_of(name));
    assert_eq!(rounds, [2, 2, 2, 1], "c delivered while the buffer was reduced");
    assert_eq!(world.run.state().in_hand(&world.plan), 1);
    world.deliver("c", 2).unwrap();
    let late = 1.0 / (1.0 + 2f64.sqrt());
    let [("c", 1, old), ("c", 0, new)] = world.averaged()[..] else { panic!("{:?}", world.averaged()) };
    assert!((old - late).abs() < 1e-15 && (new - (1.0 - late)).abs() < 1e-15);
    world.reduce(2);
    world.deliver("d", 1).unwrap();
    assert_eq!(world.round_of("d"), 3, "once its delta is in it gets the newest version");
    world.deliver("d", 3).unwrap();
    assert_eq!(world.averaged().iter().map(|one| (one.0, one.1)).collect::<Vec<_>>(), [("d", 2), ("d", 0)]);
}

#[test]
fn a_site_that_joins_is_put_to_work_at_once_and_one_that_is_too_far_behind_anew() {
    let mut world = buffered(1, 2, &["a", "b"]);
    world.ready(&["new"]);
    assert_eq!(world.round_of("new"), 1);
    for round in 1..=2 {
        world.deliver("a", round).unwrap();
        world.reduce(round);
    }
    world.gone(&["new"]);
    assert_eq!(world.round_of("b"), 1);
    world.deliver("a", 3).unwrap();
    world.reduce(3);
    assert_eq!(world.round_of("b"), 4, "its delta would be 3 rounds late");
    assert_eq!(world.deliver("b", 1), Err(Rejection::RoundOver { round: 1, current: 4 }));
    world.ready(&["new"]);
    assert_eq!(world.round_of("new"), 4);
}

#[test]
fn a_site_with_a_spoilt_delta_is_left_out_of_a_buffer() {
    let mut world = buffered(2, 1, &["a", "b"]);
    world.deliver_all(&["a", "b"], 1);
    let spoilt = Some((site("a"), 1));
    world.ok(Event::ReduceFailed { round: 1, reason: "damaged".into(), spoilt });
    assert_eq!(world.reducing(), Some(vec!["b"]));
}

/// A buffer of three: late and new deltas of a, and a new one of b.
#[test]
fn of_two_deltas_of_a_site_only_the_spoilt_one_is_left_out_and_never_so_many_that_the_rule_cannot_go_on() {
    for (aggregation, averaged) in [
        (Aggregation::default(), vec![("a", 1), ("b", 0)]),
        (Aggregation::Median {}, vec![("a", 1), ("a", 0), ("b", 0)]),
    ] {
        let adjust = |spec: &mut RunSpec| {
            spec.rounds = 6;
            spec.outer.aggregation = aggregation.clone();
            spec.participation.minimum_clients = 4;
            spec.participation.buffer = 3;
            spec.participation.staleness_max = 3;
        };
        let mut world = World::new(adjust, &["a", "b", "c", "d"]);
        world.deliver_all(&["b", "c", "d"], 1);
        world.reduce(1);
        world.deliver("a", 1).unwrap();
        world.deliver_all(&["a", "b"], 2);
        assert_eq!(world.reducing(), Some(vec!["a", "a", "b"]));
        let spoilt = Some((site("a"), 2));
        world.ok(Event::ReduceFailed { round: 2, reason: "damaged".into(), spoilt });
        let Phase::Reducing(reducing) = &world.run.state().phase else { panic!("not reducing") };
        let found: Vec<_> = reducing.contributions.iter().map(|one| (one.site.as_str(), one.age)).collect();
        assert_eq!(found, averaged);
    }
}

#[test]
fn late_deltas_make_no_quorum_of_what_a_spoilt_one_leaves() {
    let mut world = with_late(1, 3);
    world.round_without_slow(1);
    world.deliver("slow", 1).unwrap();
    world.deliver("fast", 2).unwrap();
    assert_eq!(world.reducing(), Some(vec!["fast", "slow"]));
    for (spoilt, averaged) in [(("fast", 2), vec!["fast", "slow"]), (("slow", 1), vec!["fast"])] {
        let spoilt = Some((site(spoilt.0), spoilt.1));
        world.ok(Event::ReduceFailed { round: 2, reason: "damaged".into(), spoilt });
        assert_eq!(world.reducing(), Some(averaged));
    }
}

#[test]
fn where_the_quorum_is_left_open_a_round_takes_the_minimum_of_free_sites() {
    let adjust = |spec: &mut RunSpec| {
        participate(spec, (3, 3, 0, 0));
        spec.rounds = 3;
        spec.participation.over_selection = 1;
        spec.participation.staleness_max = 3;
    };
    let mut world = World::new(adjust, &["a", "b", "c"]);
    world.ready(&["d"]);
    world.deliver_all(&["a", "b", "c"], 1);
    assert_eq!(world.reducing(), Some(vec!["a", "b", "c"]));
    world.gone(&["a"]);
    world.reduce(1);
    assert_eq!(world.working(), ["b", "c", "d"], "d is not left to its old round");
    assert_eq!(world.round_of("d"), 2);
}
