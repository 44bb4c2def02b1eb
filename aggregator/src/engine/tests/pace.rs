//! When a round ends, and with how much work of whom.

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
