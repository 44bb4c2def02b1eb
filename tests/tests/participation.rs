//! Who takes part in a round, how much each does, and when it ends, over real connections. What can happen
//! besides is the business of the engine's simulation.

use consort_common::spec::{RunSpec, Sampling};
use consort_proto::v1::{LeaveRequest, instruction::Task};
use consort_tests::{
    TestFederation,
    federation::tiny_spec,
    raw::{Delta, RawSite, assert_refused, soon},
};
use serde_json::Value;
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

/// What `consort rounds show` tells of a round's deltas: site, age and weight.
fn aged(federation: &TestFederation, round: u32) -> Vec<(String, u64, f64)> {
    let round = federation.json(&["rounds", "show", "pilot", &round.to_string()]);
    let contributions = round["contributions"].as_array().expect("a round has contributions");
    let aged = |one: &Value| {
        let site = one["site"].as_str().expect("a contribution has a site").to_owned();
        (site, one["age"].as_u64().expect("it has an age"), one["weight"].as_f64().expect("it has a weight"))
    };
    contributions.iter().map(aged).collect()
}

/// Shares of one fresh delta and one that is a round late: 1 and 1 / sqrt(2).
fn fresh_and_late() -> (f64, f64) {
    let late = 1.0 / (1.0 + 2f64.sqrt());
    (1.0 - late, late)
}

fn assert_shares(found: &[(String, u64, f64)], expected: &[(&str, u64, f64)]) {
    let same = |(one, other): (&(String, u64, f64), &(&str, u64, f64))| {
        one.0 == other.0 && one.1 == other.1 && (one.2 - other.2).abs() < 1e-9
    };
    let equal = found.len() == expected.len() && found.iter().zip(expected).all(same);
    assert!(equal, "{found:?} instead of {expected:?}");
}

/// Two sites, of which each round waits for one; the clinic is half-way with its upload when the first round
/// ends. Gives the digest of the version that its delta is part of.
async fn late_upload(is_killed: bool) -> String {
    let rules = "clients_per_round = 1\nover_selection = 1\nstaleness_max = 2\n\n\
                 [outer.optimizer]\nkind = \"fedavg\"";
    let (mut federation, [mut bank, mut clinic]) = federation(["bank", "clinic"], rules).await;
    let first = [bank.assignment(1).await, clinic.assignment(1).await];
    let late = Delta::constant(&first[1], 0.003);
    let mut upload = clinic.begin(&late.begin).await.expect("an upload begins");
    assert_eq!(upload.held().await.expect("it may go on"), [0_u32; 0]);
    upload.send_chunk(&late.chunks[0]).await.expect("the round is open");
    assert!(!bank.upload(&Delta::constant(&first[0], 0.001)).await.expect("the delta is right"));
    let mut second = bank.assignment(2).await;
    upload.send_chunk(&late.chunks[1]).await.expect("its delta is taken though the round is over");
    if is_killed {
        federation.kill_aggregator();
        federation.start_aggregator();
        [bank, clinic] = ready(&federation, ["bank", "clinic"]).await;
        second = bank.assignment(2).await;
        // It may have lost the model that it trains from, and the first round's is still there.
        let again = clinic.assignment(1).await;
        assert_eq!(again.train, first[1].train);
        clinic.model(0).await.expect("the late site's base is kept");
        let mut resumed = clinic.begin(&late.begin).await.expect("the upload goes on");
        let held = resumed.held().await.expect("it may go on");
        assert!(held.contains(&0), "what was acknowledged is held: {held:?}");
    }
    assert!(!clinic.upload(&late).await.expect("the delta is taken"));
    assert!(clinic.upload(&late).await.expect("a repeated upload is told so"), "it counts once");
    clinic.assignment(2).await;
    assert!(!bank.upload(&Delta::constant(&second, 0.001)).await.expect("the delta is right"));
    bank.assignment(3).await;
    assert_refused(clinic.upload(&late).await, Code::FailedPrecondition, &["round 1 takes no deltas"]);
    let (fresh, one_late) = fresh_and_late();
    assert_shares(&aged(&federation, 2), &[("bank", 0, fresh), ("clinic", 1, one_late)]);
    // FedAvg: the model moved by the mean.
    let (before, after) = (bank.model(1).await.expect("a model"), bank.model(2).await.expect("a model"));
    let moved = fresh * 0.001 + one_late * 0.003;
    let is_right = |(before, after): (&f32, &f32)| (f64::from(after - before) - moved).abs() < 1e-6;
    assert!(before.iter().zip(&after).all(is_right), "the model moves by the weighted mean");
    let shown = federation.json(&["rounds", "show", "pilot", "2"]);
    shown["digest"].as_str().expect("a version has a digest").to_owned()
}

#[tokio::test]
async fn a_late_delta_counts_in_the_next_round_to_the_same_bits_also_when_the_aggregator_is_killed() {
    let (undisturbed, killed) = tokio::join!(late_upload(false), late_upload(true));
    assert_eq!(undisturbed, killed);
}

#[tokio::test]
async fn a_buffer_of_two_makes_versions_of_three_sites_without_waiting_for_the_slowest() {
    let rules = "buffer = 2\nstaleness_max = 2";
    let (mut federation, [mut bank, mut clinic, mut lab]) =
        federation(["bank", "clinic", "lab"], rules).await;
    let (of_bank, of_clinic, of_lab) =
        (bank.assignment(1).await, clinic.assignment(1).await, lab.assignment(1).await);
    assert!(!bank.upload(&Delta::constant(&of_bank, 0.001)).await.expect("the delta is right"));
    assert!(!clinic.upload(&Delta::constant(&of_clinic, 0.001)).await.expect("the delta is right"));
    let of_bank = bank.assignment(2).await;
    clinic.assignment(2).await;
    federation.kill_aggregator();
    federation.start_aggregator();
    [bank, clinic, lab] = ready(&federation, ["bank", "clinic", "lab"]).await;
    assert_eq!(lab.assignment(1).await.train, of_lab.train, "it goes on with what it began");
    assert!(!lab.upload(&Delta::constant(&of_lab, 0.002)).await.expect("a late delta fills the buffer too"));
    lab.assignment(2).await;
    assert!(!bank.upload(&Delta::constant(&of_bank, 0.001)).await.expect("the delta is right"));
    bank.assignment(3).await;
    let (fresh, late) = fresh_and_late();
    assert_shares(&aged(&federation, 2), &[("bank", 0, fresh), ("lab", 1, late)]);
    // Both that began with version 1 still do.
    for site in [&mut clinic, &mut lab] {
        let assignment = site.assignment(2).await;
        assert_eq!(assignment.train.base_digest, of_bank.train.base_digest);
    }
}

#[tokio::test]
async fn sites_join_and_leave_in_the_middle_of_a_run() {
    let mut federation = TestFederation::new(&["bank", "clinic", "lab"]);
    federation.start_aggregator();
    let rules = "minimum_clients = 2\nquorum = 2\ndeadline_seconds = 5";
    federation.start_run(&tiny_spec("pilot", 4, 2).replace("minimum_clients = 2", rules));
    // The deadline runs from when both others are ready.
    let mut lab = RawSite::new(&federation, "lab");
    lab.join().await.expect("the lab may join");
    lab.attend().await.expect("the lab may attend");
    let [mut bank, mut clinic] = ready(&federation, ["bank", "clinic"]).await;
    bank.assignment(1).await;
    // Who joins in the middle of a round waits for the next, in which it takes part.
    lab.report_ready("pilot").await.expect("the lab is ready");
    let waits = |task: &Task| match task {
        Task::Idle(idle) => Some(idle.reason.clone()),
        _ => None,
    };
    assert_eq!(lab.instruction("an instruction", waits).await, "not selected for round 1");
    deliver(&mut [&mut bank, &mut clinic], 1).await;
    let second = lab.assignment(2).await;
    clinic.assignment(2).await;
    // Who leaves in the middle of a round is waited for until the deadline, and no longer.
    let leave = LeaveRequest { session_id: clinic.session.clone(), reason: "maintenance".to_owned() };
    soon("the leave", clinic.client.leave(leave)).await.expect("a site may leave");
    assert!(!lab.upload(&Delta::constant(&second, 0.001)).await.expect("the delta is right"));
    deliver(&mut [&mut bank], 2).await;
    bank.assignment(3).await;
    assert_eq!(names(&federation, 2), ["bank", "lab"]);
    // Who comes back takes part again, and the one that is killed does not hold up the others.
    clinic.get_ready("pilot").await;
    lab.assignment(3).await;
    drop(lab);
    deliver(&mut [&mut bank], 3).await;
    // The deadline finds no quorum, and puts the one that came back in the place of the one that is gone.
    deliver(&mut [&mut clinic], 3).await;
    deliver(&mut [&mut bank, &mut clinic], 4).await;
    federation.wait_for_run("pilot", "the last round", |run| (run["version"] == 4).then_some(()));
    assert_eq!(
        (names(&federation, 1), names(&federation, 3)),
        (names(&federation, 4), names(&federation, 1))
    );
    assert_eq!(names(&federation, 4), ["bank", "clinic"]);
}

/// Each delivers what it is told to train.
async fn deliver(sites: &mut [&mut RawSite], round: u32) {
    for site in sites {
        let assignment = site.assignment(round).await;
        assert!(!site.upload(&Delta::constant(&assignment, 0.001)).await.expect("the delta is right"));
    }
}

fn names(federation: &TestFederation, round: u32) -> Vec<String> {
    federation.contributions("pilot", round).into_iter().map(|(site, _)| site).collect()
}

/// Real daemons, which carry what their encoding drops and their optimizers' moments from one version to the next.
#[test]
fn in_the_buffered_mode_daemons_are_killed_and_join_and_the_model_learns() {
    let mut federation = TestFederation::new(&["bank", "clinic", "lab", "ward"]);
    federation.start_aggregator();
    // Rounds enough for the one that joins after the third to be among the first two in one of them.
    let spec = tiny_spec("pilot", 10, 3)
        .replace("local_steps = 8", "local_steps = 60")
        .replace("minimum_clients = 3", "minimum_clients = 3\nbuffer = 2\nstaleness_max = 4")
        .replace("[wire]", "[wire]\ndelta_encoding = \"2bit\"");
    federation.start_run(&spec);
    for site in ["bank", "clinic", "lab"] {
        federation.start_client(site);
    }
    let version = |least: u64| move |run: &Value| run["version"].as_u64().filter(|version| *version >= least);
    federation.wait_for_run("pilot", "the first versions", version(3));
    federation.kill_client("clinic");
    federation.kill_client("lab");
    // No round begins with fewer sites than the minimum.
    federation.start_client("lab");
    federation.start_client("ward");
    federation.wait_for_run("pilot", "versions with the one that joined", version(7));
    federation.start_client("clinic");
    federation.wait_for_run("pilot", "the end", |run| (run["status"] == "finished").then_some(()));
    let took_part = |site: &str, rounds: std::ops::RangeInclusive<u32>| {
        rounds.into_iter().any(|round| names(&federation, round).iter().any(|name| name == site))
    };
    assert!(took_part("ward", 4..=10));
    let rounds = federation.json(&["rounds", "list", "pilot"]);
    let loss = |index: usize| rounds["rounds"][index]["train_loss"].as_f64().expect("a round has a loss");
    assert!(loss(9) < 0.9 * loss(0), "{} at first, {} in the end", loss(0), loss(9));
}
