//! What becomes of a round whose deltas were accepted and cannot be averaged: one that the aggregator's disk has
//! damaged is left out where the others are a quorum, or waits for the operator; and the log says whose it is.

use std::{
    fs::{self, File},
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use consort_tests::{
    TestFederation,
    federation::tiny_spec,
    raw::{Delta, RawSite},
};

const SITES: [&str; 3] = ["bank", "clinic", "court"];

/// A federation whose run needs so many deltas of each round and averages them in this way, and its sites, ready.
async fn federation(quorum: u32, optimizer: &str) -> (TestFederation, [RawSite; 3]) {
    let mut federation = TestFederation::new(&SITES);
    federation.start_aggregator();
    let spec = tiny_spec("pilot", 3, 3)
        .replace("minimum_clients = 3", &format!("minimum_clients = 3\nquorum = {quorum}"));
    federation.start_run(&format!("{spec}\n[outer.optimizer]\nkind = \"{optimizer}\"\n"));
    let sites = ready(&federation).await;
    (federation, sites)
}

async fn ready(federation: &TestFederation) -> [RawSite; 3] {
    let mut sites = SITES.map(|site| RawSite::new(federation, site));
    for site in &mut sites {
        site.get_ready("pilot").await;
    }
    sites
}

/// A site's part in a round: a delta that is `value` everywhere, accepted.
async fn deliver(site: &mut RawSite, round: u32, value: f32) {
    let assignment = site.assignment(round).await;
    assert!(!site.upload(&Delta::constant(&assignment, value)).await.expect("the delta is taken"));
}

/// Where the aggregator keeps the bank's delta of the first round.
fn spooled(federation: &TestFederation) -> PathBuf {
    let folder = federation.aggregator_state().join("spool/pilot/1/bank");
    let mut files = fs::read_dir(folder).expect("the site has delivered");
    files.next().expect("its delta is there").expect("the folder can be read").path()
}

/// Turns some bytes in the middle around; done twice, nothing has happened.
fn flip(delta: &Path) {
    let mut file = File::options().read(true).write(true).open(delta).expect("the delta is there");
    let middle = SeekFrom::Start(file.metadata().expect("it has a length").len() / 2);
    let mut bytes = [0; 64];
    file.seek(middle).expect("a file can be sought in");
    file.read_exact(&mut bytes).expect("it can be read");
    file.seek(middle).expect("a file can be sought in");
    file.write_all(&bytes.map(|byte| !byte)).expect("it can be written");
}

fn cut_short(delta: &Path) {
    let file = File::options().write(true).open(delta).expect("the delta is there");
    file.set_len(8192).expect("a file can be cut");
}

fn remove(delta: &Path) {
    fs::remove_file(delta).expect("the delta is there");
}

/// The run's log.
fn events(federation: &TestFederation) -> String {
    let output = federation.consort(&["runs", "watch", "pilot", "--once", "--json"]);
    assert!(output.status.success(), "{output:?}");
    let snapshot: serde_json::Value = serde_json::from_slice(&output.stdout).expect("--json prints JSON");
    let events = snapshot["events"].as_array().expect("a snapshot has events");
    events.iter().map(|event| event["text"].as_str().expect("an event is a text").to_owned() + "\n").collect()
}

/// What the sites' deltas counted, in their order.
fn weights(federation: &TestFederation, round: u32) -> [f64; 3] {
    let contributions = federation.contributions("pilot", round);
    assert!(contributions.iter().map(|(site, _)| site).eq(&SITES), "{contributions:?}");
    [0, 1, 2].map(|place| contributions[place].1)
}

fn assert_moved(base: &[f32], model: &[f32], by: f32) {
    assert!(base.iter().zip(model).all(|(old, new)| (new - old - by).abs() < 1e-6));
}

/// The bank's delta is damaged before the last site delivers; if `restarted`, while the aggregator is down.
async fn check_left_out(damage: fn(&Path), restarted: bool) {
    let (mut federation, [mut bank, mut clinic, mut court]) = federation(2, "fedavg").await;
    let base = court.model(0).await.expect("the base is there");
    deliver(&mut bank, 1, 0.5).await;
    deliver(&mut clinic, 1, 0.001).await;
    if restarted {
        federation.kill_aggregator();
    }
    damage(&spooled(&federation));
    if restarted {
        federation.start_aggregator();
        [bank, clinic, court] = ready(&federation).await;
    }
    deliver(&mut court, 1, 0.003).await;

    court.assignment(2).await;
    let events = events(&federation);
    for text in [
        "bank's delta for round 1 is spoilt and left out of the average of round 1\n",
        "the reduction of round 1 failed, next try in 5.0 s: bank's delta for round 1 of run pilot cannot be averaged",
        "round 1 is committed: 2 sites",
    ] {
        assert!(events.contains(text), "{text:?} is not in:\n{events}");
    }
    assert_eq!(weights(&federation, 1), [0.0, 0.5, 0.5]);
    assert_moved(&base, &court.model(1).await.expect("version 1 is there"), 0.002);

    // The aggregator goes on with all three.
    for site in [&mut bank, &mut clinic, &mut court] {
        deliver(site, 2, 0.001).await;
    }
    court.assignment(3).await;
    assert_eq!(weights(&federation, 2), [1.0 / 3.0; 3]);
}

#[tokio::test]
async fn a_delta_that_the_disk_changed_is_left_out() {
    check_left_out(flip, false).await;
}

#[tokio::test]
async fn a_delta_that_the_disk_cut_short_is_left_out() {
    check_left_out(cut_short, false).await;
}

#[tokio::test]
async fn a_delta_that_the_disk_changed_while_the_aggregator_was_down_is_left_out() {
    check_left_out(flip, true).await;
}

#[tokio::test]
async fn a_delta_that_the_disk_lost_while_the_aggregator_was_down_is_left_out() {
    check_left_out(remove, true).await;
}

/// Waits until the round's reduction has failed for that reason.
fn wait_for_failure(federation: &TestFederation, reason: &str) {
    federation.wait_for_run("pilot", "the reduction to fail", |run| {
        assert_eq!(run["version"], 0);
        let events = events(federation);
        assert!(!events.contains("left out of the average"), "{events}");
        events.contains(reason).then_some(())
    });
}

#[tokio::test]
async fn a_round_that_needs_its_spoilt_delta_waits_until_the_disk_is_restored() {
    let (federation, [mut bank, mut clinic, mut court]) = federation(3, "fedavg").await;
    let base = court.model(0).await.expect("the base is there");
    deliver(&mut bank, 1, 0.005).await;
    flip(&spooled(&federation));
    deliver(&mut clinic, 1, 0.001).await;
    deliver(&mut court, 1, 0.003).await;
    wait_for_failure(&federation, "bank's delta for round 1 of run pilot cannot be averaged");
    // The aggregator serves.
    assert_eq!(court.model(0).await.expect("the base is there"), base);

    flip(&spooled(&federation));
    federation.json(&["runs", "pause", "pilot"]);
    federation.json(&["runs", "resume", "pilot"]);
    bank.assignment(2).await;
    assert_eq!(weights(&federation, 1), [1.0 / 3.0; 3]);
    assert_moved(&base, &bank.model(1).await.expect("version 1 is there"), 0.003);
}

#[tokio::test]
async fn a_round_whose_values_overflow_the_model_waits_for_the_operator_and_the_next_run_goes_on() {
    let (federation, mut sites) = federation(2, "nesterov").await;
    // Each is finite, as is their mean; a step of 1.33 times that is not.
    for site in &mut sites {
        deliver(site, 1, f32::MAX).await;
    }
    wait_for_failure(&federation, "parameter 0 would not be finite");
    federation.json(&["runs", "abort", "pilot", "--reason", "it diverges", "--yes"]);
    federation.start_run(&tiny_spec("next", 2, 3));
    for site in &mut sites {
        site.report_ready("next").await.expect("the site may be ready");
    }
    for site in &mut sites {
        deliver(site, 1, 0.001).await;
    }
    sites[0].assignment(2).await;
}
