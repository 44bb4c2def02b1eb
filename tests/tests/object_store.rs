//! The spool and published checkpoints in an S3-compatible store: what was acknowledged is found again, what
//! was half written is not, the model is the same bits as with a local spool, and a store that is away costs
//! nothing but time. The server is real, see `s3`.

mod s3;

use std::{fs, path::Path, process::Command};

use consort_common::ids::Digest;
use consort_proto::v1::upload_delta_request::Part;
use consort_tests::{
    TestFederation, binaries,
    federation::tiny_spec,
    process::wait_for,
    raw::{Assignment, Delta, RawOperator, RawSite, assert_refused},
};
use serde_json::Value;
use tonic::Code;

use self::s3::{ACCESS_KEY, BUCKET, Fault, S3Server, SECRET_KEY};

const SITES: [&str; 2] = ["bank", "clinic"];
const RUN: &str = "pilot";

fn spec(rounds: u32) -> String {
    tiny_spec(RUN, rounds, SITES.len() as u32) + "\n[checkpoints]\nevery_rounds = 1\nkeep = 1\n"
}

/// What makes an aggregator use the server.
fn environment(server: &S3Server) -> [(&'static str, String); 5] {
    [
        ("CONSORT_AGGREGATOR_STORAGE__URL", format!("s3://{BUCKET}/federations/test")),
        ("CONSORT_AGGREGATOR_STORAGE__ENDPOINT", server.endpoint()),
        ("AWS_ACCESS_KEY_ID", ACCESS_KEY.to_owned()),
        ("AWS_SECRET_ACCESS_KEY", SECRET_KEY.to_owned()),
        // The server is on this machine, whatever proxy leads out of it.
        ("NO_PROXY", "127.0.0.1".to_owned()),
    ]
}

/// A federation with a started run, its storage on `server` if there is one.
fn federation(server: Option<&S3Server>, rounds: u32) -> TestFederation {
    let mut federation = TestFederation::new(&SITES);
    for (name, value) in server.map(environment).into_iter().flatten() {
        federation.set_aggregator_environment(name, &value);
    }
    federation.start_aggregator();
    federation.start_run(&spec(rounds));
    federation
}

/// Both sites with their assignment for `round`.
async fn assigned(federation: &TestFederation, round: u32) -> ([RawSite; 2], Assignment) {
    let mut sites = SITES.map(|site| RawSite::new(federation, site));
    for site in &mut sites {
        site.get_ready(RUN).await;
    }
    let assignment = sites[0].assignment(round).await;
    sites[1].assignment(round).await;
    (sites, assignment)
}

/// A delta with a different value for each parameter.
fn ramp(assignment: &Assignment, slope: f32) -> Delta {
    let values = (0..assignment.plan.parameters()).map(|index| (index as f32).sin() * slope);
    Delta::new(assignment, &values.collect::<Vec<f32>>())
}

/// The folder of a checkpoint in the store.
fn checkpoint(version: u32) -> String {
    format!("federations/test/checkpoints/{RUN}/version-{version:06}")
}

const SPOOL: &str = "federations/test/spool";

/// The files of a folder by name, with their digests.
fn files(folder: &Path) -> Vec<(String, String)> {
    let entries = fs::read_dir(folder).expect("the folder is there");
    let mut files: Vec<_> = entries
        .map(|entry| {
            let path = entry.expect("the folder can be read").path();
            let name = path.file_name().expect("a file has a name").to_string_lossy().into_owned();
            (name, Digest::of(&fs::read(&path).expect("the file can be read")).to_string())
        })
        .collect();
    files.sort();
    files
}

/// The checkpoint in the store is the local one, and its manifest says so.
#[track_caller]
fn assert_published(federation: &TestFederation, server: &S3Server, version: u32) {
    let name = checkpoint(version);
    wait_for("the checkpoint to be recorded", || {
        let list = federation.json(&["checkpoints", "list", RUN]);
        let checkpoints = list["checkpoints"].as_array().expect("a list of checkpoints").clone();
        checkpoints.iter().any(|checkpoint| checkpoint["version"] == version).then_some(())
    });
    let local = format!("checkpoints/{RUN}/version-{version:06}");
    let local = files(&federation.aggregator_state().join(local));
    let mut stored = files(&server.path(&name));
    stored.retain(|(name, _)| name != "manifest.json");
    assert_eq!(stored, local);
    let manifest = fs::read(server.path(&format!("{name}/manifest.json"))).expect("there is a manifest");
    let manifest: Value = serde_json::from_slice(&manifest).expect("the manifest is JSON");
    assert_eq!((&manifest["run"], &manifest["version"]), (&Value::from(RUN), &Value::from(version)));
    let described = manifest["files"].as_array().expect("the manifest names files").iter();
    let described = described.map(|file| {
        let text = |key: &str| file[key].as_str().expect("a text").to_owned();
        let bytes =
            fs::metadata(server.path(&format!("{name}/{}", text("name")))).expect("it is there").len();
        assert_eq!(file["bytes"], bytes);
        (text("name"), text("blake3"))
    });
    assert_eq!(described.collect::<Vec<_>>(), local);
    let out = federation.path().join("fetched");
    let out = out.to_str().expect("a path is text");
    federation.json(&["checkpoints", "get", RUN, "--out", out]);
    assert_eq!(files(Path::new(out)), local);
}

/// The digest of version 1 with a local spool.
async fn digest_with_a_local_spool() -> Vec<u8> {
    let federation = federation(None, 2);
    let ([mut bank, mut clinic], assignment) = assigned(&federation, 1).await;
    bank.upload(&ramp(&assignment, 0.01)).await.expect("the delta is right");
    clinic.upload(&ramp(&assignment, -0.3)).await.expect("the delta is right");
    RawOperator::new(&federation).committed(RUN, 1).await.version_digest
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_goes_on_after_a_sigkill_with_exactly_the_acknowledged_chunks_and_gives_the_same_bits() {
    let server = S3Server::start();
    let mut federation = federation(Some(&server), 2);
    let ([mut bank, _clinic], assignment) = assigned(&federation, 1).await;
    let delta = ramp(&assignment, 0.01);
    let mut upload = bank.begin(&delta.begin).await.expect("an upload begins");
    assert!(upload.held().await.expect("nothing is held").is_empty());
    for index in [6, 2, 4] {
        upload.send_chunk(&delta.chunks[index]).await.expect("the chunk is right");
    }
    // Two chunks are on their way to the store when the aggregator dies.
    server.fail("/spool/", Fault::Held);
    for index in [0, 5] {
        upload.send(Part::Chunk(delta.chunks[index].clone())).await;
    }
    server.wait_for_hits(2);
    federation.kill_aggregator();
    server.recover();
    federation.start_aggregator();

    let ([mut bank, mut clinic], assignment) = assigned(&federation, 1).await;
    let mut upload = bank.begin(&delta.begin).await.expect("an upload begins");
    assert_eq!(upload.held().await.expect("some are held"), [2, 4, 6]);
    assert_eq!(server.objects(SPOOL).len(), 3);
    for index in [0, 1, 3, 5] {
        upload.send_chunk(&delta.chunks[index]).await.expect("the chunk is right");
    }
    assert!(!upload.finish(&delta.finish).await.expect("the delta is whole"));
    // Accepted, and not averaged: that too outlives the aggregator.
    federation.kill_aggregator();
    federation.start_aggregator();
    for site in [&mut bank, &mut clinic] {
        site.get_ready(RUN).await;
    }
    clinic.assignment(1).await;
    assert!(!clinic.upload(&ramp(&assignment, -0.3)).await.expect("the delta is right"));

    let run = RawOperator::new(&federation).committed(RUN, 1).await;
    assert_eq!(run.version_digest, digest_with_a_local_spool().await);
    assert!(!federation.aggregator_state().join("spool").exists());
    wait_for("the round's deltas to be gone", || server.objects(SPOOL).is_empty().then_some(()));
    assert_published(&federation, &server, 1);

    // The next round's checkpoint takes the place of this one's.
    for site in [&mut bank, &mut clinic] {
        let assignment = site.assignment(2).await;
        site.upload(&ramp(&assignment, 0.01)).await.expect("the delta is right");
    }
    wait_for("the first checkpoint to be retired", || {
        server.objects(&checkpoint(1)).is_empty().then_some(())
    });
    assert!(server.path(&format!("{}/manifest.json", checkpoint(2))).exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_is_published_whole_or_not_at_all() {
    let server = S3Server::start();
    let mut federation = federation(Some(&server), 1);
    let ([mut bank, mut clinic], assignment) = assigned(&federation, 1).await;
    server.fail("manifest.json", Fault::Held);
    for site in [&mut bank, &mut clinic] {
        site.upload(&ramp(&assignment, 0.01)).await.expect("the delta is right");
    }
    // All but the last object are there, and so it does not count.
    server.wait_for_hits(1);
    let files = server.objects(&checkpoint(1));
    assert!(files.iter().any(|name| name.ends_with("model.safetensors")), "{files:?}");
    assert!(!files.iter().any(|name| name.ends_with("manifest.json")), "{files:?}");
    assert_eq!(federation.json(&["checkpoints", "list", RUN])["checkpoints"], Value::Array(Vec::new()));
    federation.kill_aggregator();
    server.recover();
    federation.start_aggregator();
    assert_published(&federation, &server, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_down_costs_only_time() {
    let mut server = S3Server::start();
    let mut federation = federation(Some(&server), 2);
    let ([mut bank, mut clinic], assignment) = assigned(&federation, 1).await;
    let delta = ramp(&assignment, 0.01);
    let mut upload = bank.begin(&delta.begin).await.expect("an upload begins");
    upload.held().await.expect("nothing is held");
    upload.send_chunk(&delta.chunks[0]).await.expect("the chunk is right");

    // Away for so long that the sender is told to come again.
    server.stop();
    let words = ["could not do this now", "the object store did not"];
    assert_refused(upload.send_chunk(&delta.chunks[1]).await, Code::Unavailable, &words);
    assert_refused(clinic.upload(&delta).await, Code::Unavailable, &words);
    server.restart();
    let mut upload = bank.begin(&delta.begin).await.expect("an upload begins");
    assert_eq!(upload.held().await.expect("one is held"), [0]);

    // Away for a moment, which nobody notices.
    server.stop();
    upload.send(Part::Chunk(delta.chunks[1].clone())).await;
    federation.aggregator().wait_for_output("backing off");
    server.restart();
    let acknowledged = upload.answer().await.expect("the chunk is stored");
    assert!(format!("{acknowledged:?}").contains("indices: [1]"), "{acknowledged:?}");
    for chunk in &delta.chunks[2..] {
        upload.send_chunk(chunk).await.expect("the chunk is right");
    }
    assert!(!upload.finish(&delta.finish).await.expect("the delta is whole"));

    // Away when the round is to be averaged.
    let other = ramp(&assignment, -0.3);
    let mut upload = clinic.begin(&other.begin).await.expect("an upload begins");
    upload.held().await.expect("nothing is held");
    for chunk in &other.chunks {
        upload.send_chunk(chunk).await.expect("the chunk is right");
    }
    server.stop();
    assert!(!upload.finish(&other.finish).await.expect("the delta is whole"));
    // All may have been folded before the store was away.
    wait_for("the reduction to fail, or not to need the store", || {
        let output = federation.aggregator().output();
        ["the reduction failed", "round 1 is committed"]
            .iter()
            .any(|said| output.contains(said))
            .then_some(())
    });
    server.restart();
    let run = RawOperator::new(&federation).committed(RUN, 1).await;
    assert_eq!(run.version_digest, digest_with_a_local_spool().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_is_full_is_told_to_the_sender_and_loses_nothing() {
    let server = S3Server::start();
    let mut federation = federation(Some(&server), 2);
    let ([mut bank, _clinic], assignment) = assigned(&federation, 1).await;
    let delta = ramp(&assignment, 0.01);
    let mut upload = bank.begin(&delta.begin).await.expect("an upload begins");
    upload.held().await.expect("nothing is held");
    upload.send_chunk(&delta.chunks[3]).await.expect("there is room");
    server.fail("/spool/", Fault::Full);
    let words = ["was not stored", "the object store takes no more data", "operator"];
    assert_refused(upload.send_chunk(&delta.chunks[4]).await, Code::ResourceExhausted, &words);
    federation.aggregator().wait_for_output("the object store takes no more data");
    server.recover();
    let mut upload = bank.begin(&delta.begin).await.expect("an upload begins");
    assert_eq!(upload.held().await.expect("one is held"), [3]);
    upload.send_chunk(&delta.chunks[4]).await.expect("there is room");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_bounds_of_the_spool_hold_in_the_store_too() {
    let server = S3Server::start();
    let mut federation = TestFederation::new(&SITES);
    for (name, value) in environment(&server) {
        federation.set_aggregator_environment(name, &value);
    }
    federation.set_aggregator_environment("CONSORT_AGGREGATOR_LIMITS__SPOOL_BYTES_MAX", "150000");
    // What is left on this machine's disk is of no concern.
    federation.start_aggregator();
    federation.start_run(&spec(2));
    let ([mut bank, mut clinic], assignment) = assigned(&federation, 1).await;
    let delta = ramp(&assignment, 0.01);
    bank.upload(&delta).await.expect("there is room for one");
    let words = ["was not stored", "limits.spool_bytes_max"];
    assert_refused(clinic.upload(&delta).await, Code::ResourceExhausted, &words);
    // Nor does a restart forget what is there.
    federation.kill_aggregator();
    federation.start_aggregator();
    clinic.get_ready(RUN).await;
    clinic.assignment(1).await;
    assert_refused(clinic.upload(&delta).await, Code::ResourceExhausted, &words);
}

/// The aggregator does not start, nor does its check pass, and both say all of `words`.
#[track_caller]
fn assert_unusable(federation: &TestFederation, environment: &[(&str, String)], words: &[&str]) {
    for arguments in [&[][..], &["--check"]] {
        let output = aggregator(federation, environment, arguments);
        assert!(!output.0, "it started: {}", output.1);
        for word in words {
            assert!(output.1.contains(word), "{word:?} is not in {}", output.1);
        }
    }
}

/// Runs the aggregator until it ends: whether it ended well, and what it said.
fn aggregator(
    federation: &TestFederation,
    environment: &[(&str, String)],
    arguments: &[&str],
) -> (bool, String) {
    let output = Command::new(binaries::aggregator())
        .arg("--config")
        .arg(federation.kit("aggregator-main").join("aggregator.toml"))
        .args(arguments)
        .env("CONSORT_AGGREGATOR_LISTEN", "127.0.0.1:0")
        .env("CONSORT_AGGREGATOR_LIMITS__DISK_RESERVE_BYTES", "1000000")
        .envs(environment.iter().cloned())
        .output()
        .expect("the aggregator can be run");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.success(), text(&output.stdout) + &text(&output.stderr))
}

#[test]
fn a_store_that_cannot_be_used_stops_the_aggregator_at_its_start_with_what_to_do() {
    let mut server = S3Server::start();
    let mut federation = TestFederation::new(&[]);
    let right = environment(&server);
    let with = |name: &str, value: &str| {
        let mut wrong = right.clone();
        let entry = wrong.iter_mut().find(|(key, _)| *key == name).expect("it is set");
        entry.1 = value.to_owned();
        wrong
    };
    let check = |environment: &[(&str, String)], words: &[&str]| {
        assert_unusable(&federation, environment, words);
    };
    let url = "CONSORT_AGGREGATOR_STORAGE__URL";
    check(&with(url, "s3://nowhere/p"), &["s3://nowhere/p cannot be used", "create the bucket"]);
    check(&with(url, "/srv/spool"), &["storage.url", "must be s3://BUCKET"]);
    let words = ["cannot be used", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"];
    check(&with("AWS_SECRET_ACCESS_KEY", "wrong"), &words);
    check(&with("AWS_ACCESS_KEY_ID", "nobody"), &words);

    let (well, said) = aggregator(&federation, &right, &["--check"]);
    assert!(well && said.contains("can be written, read, listed and cleared"), "{said}");
    assert_eq!(server.objects("federations"), [""; 0], "a check leaves nothing");

    // The prefix is another aggregator's.
    for (name, value) in &right {
        federation.set_aggregator_environment(name, value);
    }
    federation.start_aggregator();
    federation.kill_aggregator();
    let other = TestFederation::new(&[]);
    let (well, said) = aggregator(&other, &right, &[]);
    assert!(
        !well && said.contains("belongs to another aggregator") && said.contains("storage.url"),
        "{said}"
    );
    federation.start_aggregator();
    federation.kill_aggregator();

    server.stop();
    let words = [&server.endpoint(), "cannot be used", "is up and can be reached"];
    assert_unusable(&federation, &right, &words);
}
