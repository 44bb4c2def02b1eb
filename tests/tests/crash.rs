//! `kill -9` at any instant loses nothing that was acknowledged and changes nothing in the result.
//!
//! Full participation, CPU, fp32 weights: every version of the global model, and every checkpoint, must be the same
//! bits as without any kill.

use std::time::Duration;

use consort_tests::{
    TestFederation,
    federation::tiny_spec,
    phases::Files,
    process::{wait_closely_for, wait_for},
    texts,
};
use rand::{Rng, SeedableRng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

const SITES: [&str; 2] = ["bank", "lab"];
const RUN: &str = "killed";
/// Published checkpoints that are kept by default; all runs have more rounds.
const CHECKPOINTS_KEPT: u64 = 3;

/// Rounds of about a second.
fn spec(rounds: u32) -> String {
    tiny_spec(RUN, rounds, 2).replace("local_steps = 8", "local_steps = 60")
}

fn start(federation: &mut TestFederation, spec: &str) {
    federation.start_aggregator();
    federation.start_run(spec);
    for site in SITES {
        federation.start_client(site);
    }
}

/// What a run leaves.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    /// Digest of each version, in order.
    versions: Vec<String>,
    /// The published checkpoints that are kept, with the digest of each file.
    checkpoints: Vec<(String, Vec<(String, String)>)>,
}

/// The rounds of the run, ascending.
fn rounds(federation: &TestFederation) -> Vec<Value> {
    federation.json(&["rounds", "list", RUN])["rounds"].as_array().expect("a list of rounds").clone()
}

/// What the run leaves, once it is finished and its last version is published.
fn outcome(federation: &TestFederation) -> Outcome {
    federation.wait_for_run(RUN, "the run to finish", |run| (run["status"] == "finished").then_some(()));
    let rounds = rounds(federation);
    let last = rounds.last().and_then(|round| round["round"].as_u64()).expect("a run has rounds");
    // An older one may be published after it.
    let checkpoints = wait_for("the last checkpoints", || {
        let list = federation.json(&["checkpoints", "list", RUN]);
        let checkpoints = list["checkpoints"].as_array().expect("a list of checkpoints").clone();
        let versions = checkpoints.iter().map(|checkpoint| checkpoint["version"].as_u64());
        versions.eq((last - CHECKPOINTS_KEPT + 1..=last).map(Some)).then_some(checkpoints)
    });
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    Outcome {
        versions: rounds.iter().map(|round| text(&round["digest"])).collect(),
        checkpoints: checkpoints
            .iter()
            .map(|checkpoint| (checkpoint["version"].to_string(), files(&text(&checkpoint["path"]))))
            .collect(),
    }
}

/// How long a round of the finished run took, on average.
fn round_ms(federation: &TestFederation) -> u64 {
    let rounds = rounds(federation);
    let moment = |round: Option<&Value>, name: &str| round.and_then(|round| round[name].as_u64());
    let begin = moment(rounds.first(), "started_unix_ms").expect("a round began");
    let end = moment(rounds.last(), "committed_unix_ms").expect("a round was committed");
    (end - begin) / rounds.len() as u64
}

/// The files of a checkpoint with their digests, by name.
fn files(checkpoint: &str) -> Vec<(String, String)> {
    let entries = std::fs::read_dir(checkpoint).expect("the checkpoint is there");
    let mut files: Vec<(String, String)> = entries
        .map(|entry| {
            let entry = entry.expect("the checkpoint can be read");
            let bytes = std::fs::read(entry.path()).expect("the checkpoint can be read");
            (entry.file_name().to_string_lossy().into_owned(), blake3::hash(&bytes).to_string())
        })
        .collect();
    files.sort();
    files
}

/// What the same run leaves when nobody is killed.
fn undisturbed(spec: &str, prepare: impl FnOnce(&TestFederation)) -> Outcome {
    let mut federation = TestFederation::new(&SITES);
    prepare(&federation);
    start(&mut federation, spec);
    outcome(&federation)
}

/// Kills `victim` and starts it again; `look` sees what it left.
fn kill<T>(federation: &mut TestFederation, victim: &str, look: impl FnOnce() -> T) -> T {
    if victim == "aggregator" {
        federation.kill_aggregator();
        let seen = look();
        federation.start_aggregator();
        seen
    } else {
        federation.kill_client(victim);
        let seen = look();
        federation.start_client(victim);
        seen
    }
}

#[test]
fn ten_random_kills_change_no_bit_of_any_version() {
    // A kill comes in the round of its number or, as it waits for up to one round, some rounds later.
    // Deltas with error feedback and versions that travel as updates: what both sides keep of the rounds
    // before must survive as well.
    let wire = "[wire]\ndelta_encoding = \"2bit\"\nmodel_encoding = \"2bit-update\"\n";
    kill_at_random(10, &spec(16).replace("[wire]\n", wire));
}

/// The sites' own models, and the steps that they take while a fragment is on its way, must survive, too.
#[test]
fn random_kills_change_no_bit_of_a_run_that_streams_its_fragments() {
    let streaming = "[outer.streaming]\nfragments = 3\noverlap = 20\nmixing = 0.5\n";
    let wire = "[wire]\ndelta_encoding = \"2bit\"\nmodel_encoding = \"int8-update\"\n";
    kill_at_random(6, &(spec(11).replace("[wire]\n", wire) + streaming));
}

/// So many kills of any process at any instant leave what the same run leaves when nobody is killed.
fn kill_at_random(kills: u64, spec: &str) {
    let given = std::env::var("CONSORT_KILL_SEED").ok();
    let seed = given.map_or_else(rand::random, |seed| seed.parse().expect("CONSORT_KILL_SEED is a number"));
    println!("replay with CONSORT_KILL_SEED={seed}");
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut quiet = TestFederation::new(&SITES);
    start(&mut quiet, spec);
    let expected = outcome(&quiet);
    let round_ms = round_ms(&quiet);
    drop(quiet);

    let mut federation = TestFederation::new(&SITES);
    start(&mut federation, spec);
    for number in 1..=kills {
        federation.wait_for_run(RUN, &format!("round {number}"), |run| {
            (run["round"].as_u64()? >= number).then_some(())
        });
        // The instant is the fault that is injected, not a wait for something.
        std::thread::sleep(Duration::from_millis(random.random_range(0..round_ms)));
        let victim = ["aggregator", "bank", "lab"].choose(&mut random).expect("there are three");
        let run = federation.json(&["runs", "show", RUN]);
        println!("kill {number}: {victim} in round {}, {}", run["round"], run["phase"]);
        if run["status"] != "active" {
            // The machine was busier when nobody was killed.
            assert!(number > kills / 2, "a kill came too late to matter; make the run longer");
            break;
        }
        kill(&mut federation, victim, || ());
    }
    assert_eq!(outcome(&federation), expected);
}

/// Long enough phases on a loopback connection: 1.4 million parameters in 350 chunks. A round trains for
/// some seconds, so that a local checkpoint is written, which is due after one.
fn large_spec() -> String {
    tiny_spec(RUN, 4, 2)
        .replace("hidden_size = 32", "hidden_size = 256")
        .replace("intermediate_size = 64", "intermediate_size = 512")
        .replace("local_steps = 8", "local_steps = 100")
        .replace("tokens_max = 2000", "tokens_max = 4000\nheld_out_fraction = 0.2")
}

/// Enough text for the bank's preparation to be caught, and a limit for its uploads to be: 5.6 MB take two
/// seconds.
fn slow_bank(federation: &TestFederation) {
    let kit = federation.kit("site-bank");
    texts::write(&kit.join("data"), 0, 25_000);
    let mut config = std::fs::read_to_string(kit.join("client.toml")).expect("the kit has a configuration");
    config += "\n[transfer]\nupload_bytes_per_second = 2_800_000\n";
    std::fs::write(kit.join("client.toml"), config).expect("the configuration can be written");
}

/// Whether the files tell that a process is in a phase.
type InPhase = fn(&Files) -> bool;

/// Kills `victim` whenever it is seen in the phase, until it has died in it.
fn kill_in(federation: &mut TestFederation, spec: &str, victim: &str, phase: &str, is_in: InPhase) {
    // A phase may be over between the look and the kill.
    const KILLS_MAX: u32 = 20;
    let files = Files::new(federation, "bank", spec);
    for _ in 0..KILLS_MAX {
        wait_closely_for(&format!("the {victim}, {phase}"), || is_in(&files).then_some(()));
        let hit = kill(federation, victim, || is_in(&files));
        println!("killed the {victim}, {phase}{}", if hit { "" } else { " (a moment after)" });
        if hit {
            return;
        }
    }
    panic!("the {victim} was never caught {phase}");
}

#[test]
fn every_process_killed_in_every_phase_of_a_round_goes_on_to_the_same_bits() {
    // In the order in which they come; what the bank left half done is no phase of the aggregator's.
    let kills: [(&str, &str, InPhase); 11] = [
        ("bank", "preparing its text", Files::preparing),
        ("bank", "downloading the model", Files::downloading),
        ("bank", "evaluating it", Files::evaluating),
        ("bank", "training", Files::training),
        ("aggregator", "waiting for a site to train", Files::training),
        ("bank", "uploading its delta", Files::uploading),
        ("aggregator", "reducing", Files::reducing),
        ("aggregator", "publishing a checkpoint", Files::publishing),
        ("aggregator", "receiving a delta", Files::uploading),
        ("bank", "evaluating the last version", Files::evaluating_last),
        ("aggregator", "waiting for the last evaluation", Files::evaluating_last),
    ];
    let spec = large_spec();
    let mut federation = TestFederation::new(&SITES);
    slow_bank(&federation);
    federation.start_aggregator();
    federation.start_run(&spec);
    assert_eq!(federation.json(&["runs", "show", RUN])["phase"], "waiting");
    kill(&mut federation, "aggregator", || ());
    println!("killed the aggregator, waiting for sites");
    for site in SITES {
        federation.start_client(site);
    }
    for (victim, phase, is_in) in kills {
        kill_in(&mut federation, &spec, victim, phase, is_in);
    }
    assert_eq!(outcome(&federation), undisturbed(&spec, slow_bank));
}

/// A run must not depend on what died where between two rounds either.
#[test]
fn all_processes_killed_at_once_go_on_where_they_were() {
    let spec = spec(4);
    let mut federation = TestFederation::new(&SITES);
    start(&mut federation, &spec);
    federation.wait_for_run(RUN, "a committed round", |run| (run["version"].as_u64()? >= 1).then_some(()));
    federation.kill_aggregator();
    for site in SITES {
        federation.kill_client(site);
    }
    federation.start_aggregator();
    let restored: Value = federation.json(&["runs", "show", RUN]);
    assert!(restored["version"].as_u64() >= Some(1), "a committed round was lost: {restored}");
    for site in SITES {
        federation.start_client(site);
    }
    assert_eq!(outcome(&federation), undisturbed(&spec, |_| ()));
}

#[test]
fn sigterm_stops_both_daemons_cleanly_and_the_run_goes_on_after() {
    let spec = spec(4);
    let mut federation = TestFederation::new(&SITES);
    start(&mut federation, &spec);
    federation.wait_for_run(RUN, "the first round", |run| (run["phase"] == "training").then_some(()));
    assert!(federation.terminate_client("bank").success());
    assert!(federation.terminate_aggregator().success());
    federation.start_aggregator();
    federation.start_client("bank");
    assert_eq!(outcome(&federation), undisturbed(&spec, |_| ()));
}
