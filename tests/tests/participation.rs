//! Who takes part in a round, how much each does, and when it ends, over real connections. What can happen
//! besides is the business of the engine's simulation.

use consort_common::spec::{RunSpec, Sampling};
use consort_tests::{
    TestFederation,
    federation::tiny_spec,
    raw::{Delta, RawSite, assert_refused},
};
use tonic::Code;

/// A federation whose run of three rounds has these rules, and its sites, ready.
async fn federation<const COUNT: usize>(
    sites: [&str; COUNT],
    rules: &str,
) -> (TestFederation, [RawSite; COUNT]) {
    let mut federation = TestFederation::new(&sites);
    federation.start_aggregator();
    let spec = tiny_spec("pilot", 3, COUNT as u32);
    let minimum = format!("minimum_clients = {COUNT}");
    assert!(spec.contains(&minimum));
    federation.start_run(&spec.replace(&minimum, &format!("{minimum}\n{rules}")));
    let sites = ready(&federation, sites).await;
    (federation, sites)
}

async fn ready<const COUNT: usize>(federation: &TestFederation, sites: [&str; COUNT]) -> [RawSite; COUNT] {
    let mut raw = sites.map(|site| RawSite::new(federation, site));
    for site in &mut raw {
        site.get_ready("pilot").await;
    }
    raw
}

#[tokio::test]
async fn with_over_selection_a_round_ends_with_the_first_deltas_and_the_last_site_goes_on_with_the_next() {
    let rules = "clients_per_round = 2\nover_selection = 1\nsampling = \"tokens\"";
    let (federation, [mut bank, mut clinic, mut lab]) = federation(["bank", "clinic", "lab"], rules).await;
    let assignment = bank.assignment(1).await;
    clinic.assignment(1).await;
    lab.assignment(1).await;
    let (spec, ..): (RunSpec, _, _) = bank.describe("pilot").await.expect("the run is described");
    assert_eq!((spec.participation.over_selection, spec.participation.sampling), (1, Sampling::Tokens));
    let delta = |value| Delta::constant(&assignment, value);
    let (first, second, third) = (delta(0.001), delta(0.002), delta(0.003));
    let mut slow = clinic.begin(&third.begin).await.expect("an upload begins");
    slow.held().await.expect("nothing is held");
    slow.send_chunk(&third.chunks[0]).await.expect("the round is open");
    assert!(!lab.upload(&first).await.expect("the delta is right"));
    assert!(!bank.upload(&second).await.expect("the delta is right"));
    // All three are selected again: as many as are wanted, and one.
    clinic.assignment(2).await;
    let words = ["round 1 takes no deltas", "at round 2"];
    assert_refused(slow.send_chunk(&third.chunks[1]).await, Code::FailedPrecondition, &words);
    let expected = [("bank".to_owned(), 0.5), ("lab".to_owned(), 0.5)];
    assert_eq!(federation.contributions("pilot", 1), expected);
}

#[tokio::test]
async fn a_slow_site_takes_fewer_steps_and_counts_less_also_after_a_sigkill_of_the_aggregator() {
    let (mut federation, [mut bank, mut clinic]) = federation(["bank", "clinic"], "minimum_steps = 1").await;
    for (site, train_seconds) in [(&mut bank, 1.0), (&mut clinic, 4.0)] {
        let assignment = site.assignment(1).await;
        assert_eq!((assignment.train.steps, assignment.train.first_step), (8, 0));
        let delta = Delta::constant(&assignment, 0.001);
        let delta = delta.with(|delta| delta.finish.train_seconds = train_seconds);
        assert!(!site.upload(&delta).await.expect("the delta is right"));
    }
    bank.assignment(2).await;
    federation.kill_aggregator();
    federation.start_aggregator();
    let [mut bank, mut clinic] = ready(&federation, ["bank", "clinic"]).await;
    for (site, steps) in [(&mut bank, 8), (&mut clinic, 2)] {
        let assignment = site.assignment(2).await;
        let train = &assignment.train;
        assert_eq!((train.steps, train.tokens, train.first_step), (steps, u64::from(steps) * 128, 8));
        let delta = Delta::constant(&assignment, 0.001);
        let boast = delta.with(|delta| delta.finish.steps = steps + 1);
        assert!(site.upload(&boast).await.is_err(), "more than it was given");
        assert!(!site.upload(&delta).await.expect("the delta is right"));
    }
    assert_eq!(bank.assignment(3).await.train.first_step, 16, "the clock is the run's");
    let expected = [("bank".to_owned(), 0.8), ("clinic".to_owned(), 0.2)];
    assert_eq!(federation.contributions("pilot", 2), expected);
}
