//! What becomes of deltas: a wrong one is refused with what is wrong about it and leaves nothing behind, a
//! right one counts once, an acknowledged chunk is never lost, and nobody's trouble stops the others.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};

use consort_common::{ids::Digest, spec::RunSpec, tls::client_config};
use consort_proto::v1::{federation_client::FederationClient, instruction::Task, upload_delta_request::Part};
use consort_tests::{
    TestFederation,
    federation::tiny_spec,
    gateway::Gateway,
    process::wait_for,
    raw::{Assignment, Delta, RawOperator, RawSite, assert_refused, channel_with, chunk_of, credentials},
};
use tonic::Code;

/// A federation with these sites and a started run of three rounds, each of which takes all of them.
fn federation(sites: &[&str]) -> TestFederation {
    let mut federation = TestFederation::new(sites);
    federation.start_aggregator();
    federation.start_run(&spec(sites));
    federation
}

fn spec(sites: &[&str]) -> String {
    tiny_spec("pilot", 3, sites.len() as u32)
}

/// Each site, ready.
async fn ready<const COUNT: usize>(federation: &TestFederation, sites: [&str; COUNT]) -> [RawSite; COUNT] {
    let mut raw = sites.map(|site| RawSite::new(federation, site));
    for site in &mut raw {
        site.get_ready("pilot").await;
    }
    raw
}

/// A delta with a different value for each parameter.
fn ramp(assignment: &Assignment, slope: f32) -> Delta {
    let values: Vec<f32> =
        (0..assignment.plan.parameters()).map(|index| (index as f32).sin() * slope).collect();
    Delta::new(assignment, &values)
}

/// The first message with one thing wrong is refused, and nothing is stored.
async fn check_begin(
    federation: &TestFederation,
    site: &mut RawSite,
    delta: &Delta,
    spoil: impl FnOnce(&mut Delta),
    code: Code,
    words: &[&str],
) {
    let stored = federation.stored();
    let spoilt = delta.with(spoil);
    let mut upload = site.begin(&spoilt.begin).await.expect("a call begins");
    assert_refused(upload.held().await, code, words);
    assert_eq!(federation.stored(), stored);
}

#[tokio::test]
async fn an_upload_that_does_not_fit_the_run_is_refused_with_what_is_wrong() {
    let federation = federation(&["bank"]);
    let [mut bank] = ready(&federation, ["bank"]).await;
    let delta = Delta::constant(&bank.assignment(1).await, 0.001);
    let (refuse, mismatch) = (Code::InvalidArgument, Code::FailedPrecondition);
    type Case = (fn(&mut Delta), Code, &'static [&'static str]);
    let cases: [Case; 12] = [
        (|d| d.begin.spec_digest = vec![1; 32], mismatch, &["spec_digest", "run pilot", "restart it"]),
        (
            |d| d.begin.manifest_digest = vec![1; 32],
            mismatch,
            &["manifest_digest", "run pilot", "restart it"],
        ),
        (|d| d.begin.manifest_digest = vec![1; 31], refuse, &["manifest_digest", "32 bytes"]),
        (|d| d.begin.encoding = "bf16".into(), refuse, &["encoding", "\"bf16\"", "\"fp32\""]),
        (|d| d.begin.encoding = "gzip".into(), refuse, &["encoding", "\"gzip\"", "\"fp32\""]),
        (|d| d.begin.chunks += 1, refuse, &["chunks: is 8", "has 7"]),
        (|d| d.begin.total_bytes += 1, refuse, &["total_bytes", "takes"]),
        (|d| d.begin.total_bytes = u64::MAX, refuse, &["total_bytes", "takes"]),
        (|d| d.begin.delta_id.truncate(15), refuse, &["delta_id", "16"]),
        (|d| d.begin.round = 2, mismatch, &["round 2", "at round 1"]),
        (|d| d.begin.run = "other".into(), Code::NotFound, &["no run other"]),
        (|d| d.begin.run = "../../etc".into(), refuse, &["run"]),
    ];
    for (spoil, code, words) in cases {
        check_begin(&federation, &mut bank, &delta, spoil, code, words).await;
    }
    bank.complete_round(1).await;
}

#[tokio::test]
async fn the_messages_of_an_upload_come_in_order_or_are_refused() {
    let federation = federation(&["bank"]);
    let [mut bank] = ready(&federation, ["bank"]).await;
    let delta = Delta::constant(&bank.assignment(1).await, 0.001);
    for first in [Part::Chunk(delta.chunks[0].clone()), Part::Finish(delta.finish)] {
        let mut upload = bank.open().await.expect("a call begins");
        upload.send(first).await;
        assert_refused(upload.held().await, Code::InvalidArgument, &["starts with `begin`"]);
    }
    let mut upload = bank.begin(&delta.begin).await.expect("an upload begins");
    upload.held().await.expect("nothing is held");
    upload.send(Part::Begin(delta.begin.clone())).await;
    assert_refused(upload.answer().await, Code::InvalidArgument, &["after `begin` come chunks"]);
    bank.complete_round(1).await;
}

#[tokio::test]
async fn a_wrong_chunk_is_refused_with_what_is_wrong_and_is_not_stored() {
    let federation = federation(&["bank"]);
    let [mut bank] = ready(&federation, ["bank"]).await;
    let delta = Delta::constant(&bank.assignment(1).await, 0.001);
    let payload = delta.chunks[2].payload.to_vec();
    let holding = |value: f32| {
        let mut payload = payload.clone();
        payload[400..404].copy_from_slice(&value.to_le_bytes());
        chunk_of(2, payload)
    };
    let with_digest = |digest: Vec<u8>| {
        let mut chunk = delta.chunks[2].clone();
        chunk.digest = digest;
        chunk
    };
    let longer = [payload.as_slice(), &[0; 4]].concat();
    let cases = [
        (with_digest(vec![0; 32]), vec!["chunk 2", "digest", "send it again"]),
        (with_digest(vec![0; 31]), vec!["chunk digest", "32 bytes"]),
        (chunk_of(2, payload[4..].to_vec()), vec!["chunk 2", "16380 bytes", "takes 16384"]),
        (chunk_of(2, Vec::new()), vec!["chunk 2", "0 bytes", "takes 16384"]),
        (chunk_of(2, longer), vec!["chunk 2", "16388 bytes", "takes 16384"]),
        (chunk_of(7, payload.clone()), vec!["chunk 7 does not exist", "7 chunks"]),
        (chunk_of(u32::MAX, payload.clone()), vec!["does not exist", "7 chunks"]),
        (holding(f32::NAN), vec!["chunk 2", "value 100", "NaN", "must be finite"]),
        (holding(f32::INFINITY), vec!["chunk 2", "value 100", "inf", "must be finite"]),
        (holding(f32::NEG_INFINITY), vec!["chunk 2", "value 100", "-inf", "must be finite"]),
    ];
    for (chunk, words) in cases {
        let mut upload = bank.begin(&delta.begin).await.expect("an upload begins");
        assert!(upload.held().await.expect("an upload begins").is_empty());
        let stored = federation.stored();
        assert_refused(upload.send_chunk(&chunk).await, Code::InvalidArgument, &words);
        assert_eq!(federation.stored(), stored, "{words:?}");
    }
    bank.complete_round(1).await;
}

#[tokio::test]
async fn an_upload_is_no_longer_than_its_delta() {
    let federation = federation(&["bank"]);
    let [mut bank] = ready(&federation, ["bank"]).await;
    let delta = Delta::constant(&bank.assignment(1).await, 0.001);
    let short = delta.with(|delta| delta.begin.total_bytes = 2 * 16384);
    let upload = bank.upload(&short).await;
    assert_refused(upload, Code::InvalidArgument, &["total_bytes: is 32768"]);
    // Nor can one chunk be sent again and again.
    let mut upload = bank.begin(&delta.begin).await.expect("an upload begins");
    assert_eq!(upload.held().await.expect("none are held"), [0; 0]);
    let mut sent = 0;
    let refused = loop {
        match upload.send_chunk(&delta.chunks[0]).await {
            Ok(()) => sent += 1,
            Err(status) => break Err::<(), _>(status),
        }
        assert!(sent <= 7, "{sent} chunks are within the announced bytes of seven");
    };
    assert_refused(refused, Code::InvalidArgument, &["longer than its announced total_bytes"]);
    bank.complete_round(1).await;
}

#[tokio::test]
async fn a_delta_counts_only_if_it_is_whole_and_claims_no_more_than_was_assigned() {
    let federation = federation(&["bank"]);
    let [mut bank] = ready(&federation, ["bank"]).await;
    let delta = Delta::constant(&bank.assignment(1).await, 0.001);

    let mut upload = bank.begin(&delta.begin).await.expect("an upload begins");
    upload.held().await.expect("nothing is held");
    for chunk in &delta.chunks[..5] {
        upload.send_chunk(chunk).await.expect("the chunk is right");
    }
    let words = ["5 of 7 chunks", "chunk 5 is missing"];
    assert_refused(upload.finish(&delta.finish).await, Code::InvalidArgument, &words);

    type Case = (fn(&mut Delta), &'static [&'static str]);
    let cases: [Case; 7] = [
        (|d| d.finish.steps += 1, &["9 steps", "at most 8"]),
        (|d| d.finish.tokens += 1, &["1025 tokens", "at most 1024"]),
        (|d| d.finish.tokens = u64::MAX, &["tokens", "at most 1024"]),
        (|d| d.finish.train_loss = f64::NAN, &["train_loss", "finite"]),
        (|d| d.finish.train_loss = -1.0, &["train_loss", "not negative"]),
        (|d| d.finish.train_seconds = f64::INFINITY, &["train_seconds", "finite"]),
        (|d| d.finish.delta_norm = f64::NAN, &["delta_norm", "finite"]),
    ];
    for (spoil, words) in cases {
        assert_refused(bank.upload(&delta.with(spoil)).await, Code::InvalidArgument, words);
    }
    // The chunks are there all the same, and the round is not over.
    assert_eq!(federation.json(&["runs", "show", "pilot"])["version"], 0);
    let mut upload = bank.begin(&delta.begin).await.expect("an upload begins");
    assert_eq!(upload.held().await.expect("all are held"), [0, 1, 2, 3, 4, 5, 6]);
    assert!(!upload.finish(&delta.finish).await.expect("the delta is right"));
    bank.assignment(2).await;
}

#[tokio::test]
async fn nobody_uploads_for_another_sites_assignment() {
    let mut federation = TestFederation::new(&["bank", "clinic"]);
    federation.start_aggregator();
    let one_of_two = "minimum_clients = 2\nclients_per_round = 1";
    federation.start_run(&spec(&["bank", "clinic"]).replace("minimum_clients = 2", one_of_two));
    let sites = ready(&federation, ["bank", "clinic"]).await;
    let mut selected = None;
    let mut other = None;
    for mut site in sites {
        let train = site
            .instruction("the selection", |task| match task {
                Task::Train(train) => Some(Some(train.clone())),
                Task::Idle(idle) if idle.reason.contains("not selected") => Some(None),
                _ => None,
            })
            .await;
        match train {
            Some(train) => selected = Some((site, train)),
            None => other = Some(site),
        }
    }
    let ((mut selected, train), mut other) = (selected.expect("one is selected"), other.expect("one is not"));
    let (spec, ..) = other.describe("pilot").await.expect("the run is described");
    let assignment = Assignment { plan: spec.chunk_plan(), encoding: spec.wire.delta_encoding, train };
    let delta = Delta::constant(&assignment, 0.001);

    let words = ["has no assignment in round 1", "next instruction"];
    assert_refused(other.upload(&delta).await, Code::FailedPrecondition, &words);
    // Nor in the name of the one that is selected: who is calling follows from the certificate.
    let stolen = delta.with(|delta| delta.begin.session_id.clone_from(&selected.session));
    assert_refused(other.upload(&stolen).await, Code::Aborted, &["session", "unknown", "join"]);
    assert!(!federation.aggregator_state().join("spool/pilot").exists());

    assert!(!selected.upload(&delta).await.expect("the selected site may"));
    RawOperator::new(&federation).committed("pilot", 1).await;
}

#[tokio::test]
async fn a_late_upload_is_told_the_current_round() {
    let mut federation = TestFederation::new(&["bank", "clinic"]);
    federation.start_aggregator();
    let rules = "minimum_clients = 2\nquorum = 1\ndeadline_seconds = 2";
    federation.start_run(&spec(&["bank", "clinic"]).replace("minimum_clients = 2", rules));
    let [mut bank, mut clinic] = ready(&federation, ["bank", "clinic"]).await;
    let assignment = bank.assignment(1).await;
    clinic.assignment(1).await;
    let (first, second) = (Delta::constant(&assignment, 0.001), Delta::constant(&assignment, 0.002));
    let mut late = clinic.begin(&second.begin).await.expect("an upload begins");
    late.held().await.expect("nothing is held");
    late.send_chunk(&second.chunks[0]).await.expect("the round is open");
    assert!(!bank.upload(&first).await.expect("the delta is right"));
    bank.assignment(2).await;
    // In the middle of an upload, at the begin of one, and for what had been accepted.
    let words = ["round 1 takes no deltas", "at round 2", "next instruction"];
    assert_refused(late.send_chunk(&second.chunks[1]).await, Code::FailedPrecondition, &words);
    assert_refused(clinic.upload(&second).await, Code::FailedPrecondition, &words);
    assert_refused(bank.upload(&first).await, Code::FailedPrecondition, &words);
    clinic.assignment(2).await;
    assert_eq!(federation.contributions("pilot", 1), [("bank".to_owned(), 1.0)]);
}

#[tokio::test]
async fn a_repeated_upload_counts_once() {
    let federation = federation(&["bank", "clinic"]);
    let [mut bank, mut clinic] = ready(&federation, ["bank", "clinic"]).await;
    let assignment = bank.assignment(1).await;
    clinic.assignment(1).await;
    let base = bank.model(0).await.expect("the base is there");
    let delta = ramp(&assignment, 0.01);
    assert!(!bank.upload(&delta).await.expect("the delta is right"));
    assert!(bank.upload(&delta).await.expect("a repetition is no error"));
    // Nor does another delta of the site take the place of the accepted one.
    assert!(bank.upload(&ramp(&assignment, 99.0)).await.expect("a second delta is no error"));
    assert!(!clinic.upload(&delta).await.expect("the delta is right"));
    bank.assignment(2).await;
    assert_eq!(federation.contributions("pilot", 1), [("bank".to_owned(), 0.5), ("clinic".to_owned(), 0.5)]);
    // The mean of two equal deltas is the delta; the outer optimizer's default moves by 0.7 x 1.9 of it.
    let model = bank.model(1).await.expect("the version is there");
    for (index, (new, old)) in model.iter().zip(&base).enumerate() {
        let expected = f64::from(*old) + 0.7 * 1.9 * f64::from((index as f32).sin() * 0.01);
        assert!((f64::from(*new) - expected).abs() < 1e-6, "parameter {index}: {new}, not {expected}");
    }
}

#[tokio::test]
async fn an_interrupted_upload_goes_on_with_exactly_the_chunks_that_are_missing() {
    let federation = federation(&["bank"]);
    let [mut bank] = ready(&federation, ["bank"]).await;
    let delta = ramp(&bank.assignment(1).await, 0.01);
    let mut upload = bank.begin(&delta.begin).await.expect("an upload begins");
    assert!(upload.held().await.expect("an upload begins").is_empty());
    for index in [5, 0, 3] {
        upload.send_chunk(&delta.chunks[index]).await.expect("the chunk is right");
    }
    drop(upload);
    let mut upload = bank.begin(&delta.begin).await.expect("an upload begins");
    assert_eq!(upload.held().await.expect("some are held"), [0, 3, 5]);
    for index in [1, 2, 4, 6] {
        upload.send_chunk(&delta.chunks[index]).await.expect("the chunk is right");
    }
    assert!(!upload.finish(&delta.finish).await.expect("the delta is whole"));
    bank.assignment(2).await;
}

#[tokio::test]
async fn acknowledged_chunks_survive_a_sigkill_of_the_aggregator() {
    let mut federation = federation(&["bank"]);
    let [mut bank] = ready(&federation, ["bank"]).await;
    let delta = ramp(&bank.assignment(1).await, 0.01);
    let mut acknowledged = BTreeSet::new();
    for index in [6_u32, 2, 4] {
        let mut upload = bank.begin(&delta.begin).await.expect("an upload begins");
        assert!(upload.held().await.expect("chunks are held").into_iter().eq(acknowledged.iter().copied()));
        upload.send_chunk(&delta.chunks[index as usize]).await.expect("the chunk is right");
        acknowledged.insert(index);
        federation.kill_aggregator();
        federation.start_aggregator();
        bank = RawSite::ready(&federation, "bank", "pilot").await;
        bank.assignment(1).await;
    }
    assert!(!bank.upload(&delta).await.expect("the delta is right"));
    bank.assignment(2).await;
    // Accepted is committed, whatever comes.
    federation.kill_aggregator();
    federation.start_aggregator();
    assert_eq!(federation.json(&["runs", "show", "pilot"])["version"], 1);
}

#[tokio::test]
async fn chunks_of_two_deltas_are_never_mixed() {
    let federation = federation(&["bank", "clinic"]);
    let [mut bank, mut clinic] = ready(&federation, ["bank", "clinic"]).await;
    let assignment = bank.assignment(1).await;
    clinic.assignment(1).await;
    let (old, new) = (Delta::constant(&assignment, 9.0), Delta::constant(&assignment, 0.001));
    let mut upload = bank.begin(&old.begin).await.expect("an upload begins");
    upload.held().await.expect("nothing is held");
    for chunk in &old.chunks {
        upload.send_chunk(chunk).await.expect("the chunk is right");
    }
    // The site was killed, trained again, and has another delta now: it starts from nothing.
    let mut second = bank.begin(&new.begin).await.expect("an upload begins");
    assert!(second.held().await.expect("an upload begins").is_empty());
    // Should the old connection still be alive, nothing that it says counts any more.
    let words = ["another upload", "bank"];
    assert_refused(upload.finish(&old.finish).await, Code::Cancelled, &words);
    for chunk in &new.chunks {
        second.send_chunk(chunk).await.expect("the chunk is right");
    }
    assert!(!second.finish(&new.finish).await.expect("the delta is whole"));
    assert!(!clinic.upload(&new).await.expect("the delta is right"));
    let base = bank.model(0).await.expect("the base is there");
    bank.assignment(2).await;
    let model = bank.model(1).await.expect("the version is there");
    let moved = model.iter().zip(&base).map(|(new, old)| (new - old).abs()).fold(0.0, f32::max);
    assert!(moved < 0.01, "a parameter moved by {moved}");
}

#[tokio::test]
async fn of_two_uploads_of_one_delta_at_a_time_the_later_one_counts() {
    let federation = federation(&["bank"]);
    let [mut bank] = ready(&federation, ["bank"]).await;
    let delta = Delta::constant(&bank.assignment(1).await, 0.001);
    // The site's connection broke without the aggregator noticing, and the site came back.
    let mut lost = bank.begin(&delta.begin).await.expect("an upload begins");
    lost.held().await.expect("nothing is held");
    lost.send_chunk(&delta.chunks[0]).await.expect("the chunk is right");
    let mut upload = bank.begin(&delta.begin).await.expect("an upload begins");
    assert_eq!(upload.held().await.expect("one is held"), [0]);
    let lost_chunk = delta.with_payload(1, vec![0; 16384]).chunks[1].clone();
    assert_refused(lost.send_chunk(&lost_chunk).await, Code::Cancelled, &["another upload", "bank"]);
    for chunk in &delta.chunks[1..] {
        upload.send_chunk(chunk).await.expect("the chunk is right");
    }
    assert!(!upload.finish(&delta.finish).await.expect("the delta is whole"));
    bank.assignment(2).await;
}

#[tokio::test]
async fn one_sites_idle_transfers_do_not_take_the_others_places() {
    let mut federation = TestFederation::new(&["bank", "clinic"]);
    for limit in ["UPLOADS_MAX", "DOWNLOADS_MAX"] {
        federation.set_aggregator_environment(&format!("CONSORT_AGGREGATOR_LIMITS__{limit}"), "5");
    }
    federation.start_aggregator();
    let small_chunks =
        spec(&["bank", "clinic"]).replace("chunk_parameters = 4096", "chunk_parameters = 1024");
    federation.start_run(&small_chunks);
    let [mut bank, mut clinic] = ready(&federation, ["bank", "clinic"]).await;
    let delta = Delta::constant(&clinic.assignment(1).await, 0.001);
    // Windows so small that the model does not fit into them, unread.
    let config = client_config(&credentials(&federation.kit("site-bank")));
    let mut reader = FederationClient::new(channel_with(&federation, config));
    let (mut idle_uploads, mut idle_downloads) = (Vec::new(), Vec::new());
    for _ in 0..8 {
        idle_uploads.push(bank.open().await.expect("a call begins"));
        idle_uploads.push(bank.begin(&delta.begin).await.expect("a call begins"));
        idle_downloads.push(reader.download_model(bank.model_request(0)).await);
    }
    let refused = idle_downloads.iter().rposition(Result::is_err).expect("there is a bound");
    let refused = idle_downloads.swap_remove(refused);
    assert_refused(refused, Code::ResourceExhausted, &["downloads of site bank", "retry"]);
    clinic.model(0).await.expect("there is a place for the other site");
    assert!(!clinic.upload(&delta).await.expect("there is a place for the other site"));
    // The site itself is not locked out either.
    assert!(!bank.upload(&delta).await.expect("the last upload counts"));
    clinic.assignment(2).await;
}

#[tokio::test]
async fn a_silent_upload_is_cut_and_a_slow_one_lives() {
    const STALL_SECONDS: u32 = 3;
    const PAUSE: Duration = Duration::from_millis(250);

    let mut federation = TestFederation::new(&["bank", "clinic"]);
    let stall = STALL_SECONDS.to_string();
    federation.set_aggregator_environment("CONSORT_AGGREGATOR_LIMITS__STALL_SECONDS", &stall);
    federation.start_aggregator();
    let small_chunks =
        spec(&["bank", "clinic"]).replace("chunk_parameters = 4096", "chunk_parameters = 1024");
    federation.start_run(&small_chunks);
    let [mut bank, mut clinic] = ready(&federation, ["bank", "clinic"]).await;
    let assignment = bank.assignment(1).await;
    clinic.assignment(1).await;
    let delta = Delta::constant(&assignment, 0.001);
    assert!(PAUSE * delta.chunks.len() as u32 > Duration::from_secs(2 * u64::from(STALL_SECONDS)));

    let silent = async {
        let mut upload = clinic.begin(&delta.begin).await.expect("an upload begins");
        upload.held().await.expect("nothing is held");
        upload.send_chunk(&delta.chunks[0]).await.expect("the chunk is right");
        assert_refused(upload.answer().await, Code::Cancelled, &["nothing was received for 3 s", "resume"]);
        let mut upload = clinic.open().await.expect("a call begins");
        assert_refused(upload.answer().await, Code::Cancelled, &["nothing was received for 3 s"]);
        // What it had sent is there.
        let mut upload = clinic.begin(&delta.begin).await.expect("an upload begins");
        assert_eq!(upload.held().await.expect("one is held"), [0]);
    };
    let slow = async {
        let mut upload = bank.begin(&delta.begin).await.expect("an upload begins");
        upload.held().await.expect("nothing is held");
        for chunk in &delta.chunks {
            tokio::time::sleep(PAUSE).await;
            upload.send_chunk(chunk).await.expect("a slow upload lives");
        }
        assert!(!upload.finish(&delta.finish).await.expect("the delta is whole"));
    };
    tokio::join!(silent, slow);
    assert!(!clinic.upload(&delta).await.expect("the delta is right"));
    bank.assignment(2).await;
}

const RESERVE: &str = "CONSORT_AGGREGATOR_LIMITS__DISK_RESERVE_BYTES";

#[tokio::test]
async fn without_the_reserve_of_disk_space_uploads_are_refused_until_there_is_room() {
    let mut federation = federation(&["bank"]);
    let [mut bank] = ready(&federation, ["bank"]).await;
    let delta = Delta::constant(&bank.assignment(1).await, 0.001);
    let mut upload = bank.begin(&delta.begin).await.expect("an upload begins");
    upload.held().await.expect("nothing is held");
    for chunk in &delta.chunks[..3] {
        upload.send_chunk(chunk).await.expect("the chunk is right");
    }
    let restart = async |federation: &mut TestFederation, reserve: &str| {
        federation.kill_aggregator();
        federation.set_aggregator_environment(RESERVE, reserve);
        federation.start_aggregator();
        let mut bank = RawSite::ready(federation, "bank", "pilot").await;
        bank.assignment(1).await;
        bank
    };
    bank = restart(&mut federation, &i64::MAX.to_string()).await;
    let stored = federation.stored();
    let words = ["bank's delta for round 1", "disk has", "in reserve", "retry", "operator"];
    assert_refused(bank.upload(&delta).await, Code::ResourceExhausted, &words);
    assert_eq!(federation.stored(), stored);
    federation.aggregator().wait_for_output("are kept in reserve");
    assert_eq!(federation.json(&["runs", "show", "pilot"])["status"], "active");

    bank = restart(&mut federation, "0").await;
    let mut upload = bank.begin(&delta.begin).await.expect("an upload begins");
    assert_eq!(upload.held().await.expect("some are held"), [0, 1, 2]);
    assert!(!bank.upload(&delta).await.expect("there is room"));
    bank.assignment(2).await;
}

/// A small file system of its own for the aggregator's state.
struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    const BYTES: usize = 6 << 20;

    /// None where this user may not mount.
    fn mount(path: &Path) -> Option<Self> {
        fs::create_dir_all(path).expect("the mount point can be made");
        let size = format!("size={}", Self::BYTES);
        let mount =
            Command::new("mount").args(["-t", "tmpfs", "-o", &size, "consort-test"]).arg(path).output();
        let mounted = mount.is_ok_and(|output| output.status.success());
        mounted.then(|| Self { path: path.to_owned() })
    }

    /// Leaves no more than `left` bytes.
    fn fill(&self, left: usize) {
        let mut filler = File::create(self.path.join("filler")).expect("the disk can be written");
        while filler.write_all(&[0; 4096]).is_ok() {}
        let bytes = filler.metadata().expect("a file has a length").len();
        filler.set_len(bytes.saturating_sub(left as u64)).expect("a file can be shortened");
    }

    fn make_room(&self) {
        fs::remove_file(self.path.join("filler")).expect("the filler is there");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: the aggregator may still be in it.
        let _ = Command::new("umount").arg("--lazy").arg(&self.path).status();
    }
}

#[tokio::test]
async fn a_full_disk_stops_neither_the_aggregator_nor_the_run_once_there_is_room() {
    let mut federation = TestFederation::new(&["bank", "clinic"]);
    let Some(disk) = SmallDisk::mount(&federation.aggregator_state()) else {
        println!("SKIPPED: this user may not mount a file system, so none can be filled");
        return;
    };
    federation.set_aggregator_environment(RESERVE, "0");
    federation.start_aggregator();
    federation.start_run(&spec(&["bank"]));
    let [mut bank] = ready(&federation, ["bank"]).await;
    let delta = Delta::constant(&bank.assignment(1).await, 0.001);

    // Full before the upload begins.
    disk.fill(0);
    let words = ["bank's delta for round 1", "disk has", "retry", "operator"];
    assert_refused(bank.upload(&delta).await, Code::ResourceExhausted, &words);
    federation.aggregator().wait_for_output("was not stored: the aggregator's disk has");
    assert_eq!(federation.json(&["runs", "show", "pilot"])["version"], 0);
    // A site that comes now is told to come again, in words.
    let mut clinic = RawSite::new(&federation, "clinic");
    if let Err(status) = clinic.join().await {
        assert_refused(
            Err::<(), _>(status),
            Code::Unavailable,
            &["could not do this now", "could not record a client"],
        );
    }
    disk.make_room();
    clinic.join().await.expect("there is room");
    // Full while chunks arrive: their space was taken when the upload began.
    let mut upload = bank.begin(&delta.begin).await.expect("an upload begins");
    upload.held().await.expect("nothing is held");
    for chunk in &delta.chunks[..4] {
        upload.send_chunk(chunk).await.expect("there is room");
    }
    disk.fill(0);
    for chunk in &delta.chunks[4..] {
        upload.send_chunk(chunk).await.expect("its space was taken");
    }

    // Full when the delta is complete: whether it is accepted or not, it is not lost.
    if let Err(status) = upload.finish(&delta.finish).await {
        assert_refused(Err::<(), _>(status), Code::Unavailable, &["could not do this now", "full"]);
    }
    disk.make_room();
    // It may have been accepted, and counted, before it is sent again.
    if let Err(status) = bank.upload(&delta).await {
        assert_refused(Err::<(), _>(status), Code::FailedPrecondition, &["round 1 takes no deltas"]);
    }
    let delta = Delta::constant(&bank.assignment(2).await, 0.001);
    // What is deleted later would make room for the reduction.
    let spent = federation.aggregator_state().join("spool/pilot/1");
    wait_for("the first round's deltas to be deleted", || (!spent.exists()).then_some(()));

    // Full from before the round is folded, but for what the database needs.
    let mut upload = bank.begin(&delta.begin).await.expect("an upload begins");
    upload.held().await.expect("nothing is held");
    disk.fill(64 << 10);
    for chunk in &delta.chunks {
        upload.send_chunk(chunk).await.expect("its space was taken");
    }
    upload.finish(&delta.finish).await.expect("the database has room");
    federation.aggregator().wait_for_output("the reduction failed");
    disk.make_room();
    bank.assignment(3).await;
}

#[tokio::test]
async fn fedavg_commits_exactly_the_base_plus_the_weighted_mean() {
    let mut federation = TestFederation::new(&["bank", "clinic"]);
    federation.start_aggregator();
    federation.start_run(&(spec(&["bank", "clinic"]) + "\n[outer]\noptimizer = { kind = \"fedavg\" }\n"));
    let [mut bank, mut clinic] = ready(&federation, ["bank", "clinic"]).await;
    let assignment = bank.assignment(1).await;
    clinic.assignment(1).await;
    let base = bank.model(0).await.expect("the base is there");
    let (first, second) = (0.001_f32, -0.0075_f32);
    bank.upload(&Delta::constant(&assignment, first)).await.expect("the delta is right");
    clinic.upload(&Delta::constant(&assignment, second)).await.expect("the delta is right");
    let next = bank.assignment(2).await;
    let model = bank.model(1).await.expect("the version is there");
    assert_eq!(Digest::of(bytemuck::cast_slice(&model)).to_vec(), next.train.base_digest);
    let mean = (0.5 * f64::from(first) + 0.5 * f64::from(second)) as f32;
    for (new, old) in model.iter().zip(&base) {
        assert_eq!(*new, (f64::from(*old) + f64::from(mean)) as f32);
    }
}

/// The digest of version 1 when the sites' deltas are accepted in this order.
async fn digest_in_order(order: [(&str, f32); 3]) -> Vec<u8> {
    let federation = federation(&["bank", "clinic", "depot"]);
    let mut sites = ready(&federation, order.map(|(site, _)| site)).await;
    for (site, (_, slope)) in sites.iter_mut().zip(order) {
        let delta = ramp(&site.assignment(1).await, slope);
        assert!(!site.upload(&delta).await.expect("the delta is right"));
    }
    RawOperator::new(&federation).committed("pilot", 1).await.version_digest
}

#[tokio::test]
async fn the_order_in_which_deltas_arrive_does_not_change_a_bit_of_the_model() {
    // Sizes apart enough for sums in another order to differ.
    let (bank, clinic, depot) = (("bank", 1.0), ("clinic", 1e-5), ("depot", -0.9999));
    let digest = digest_in_order([bank, clinic, depot]).await;
    assert_eq!(digest_in_order([depot, clinic, bank]).await, digest);
    assert_eq!(digest_in_order([clinic, depot, bank]).await, digest);
    assert_ne!(digest_in_order([clinic, depot, ("bank", 0.5)]).await, digest);
}

/// The experiments alter deltas by a gateway: what it makes of them is what counts, and nothing else changes.
#[test]
fn what_a_gateway_makes_of_a_delta_is_what_is_averaged() {
    let mut federation = TestFederation::new(&["bank"]);
    federation.start_aggregator();
    let gateway = Gateway::start(&federation, "bank", Arc::new(|round, _, values| values.fill(round as f32)));
    federation.start_client_through("bank", gateway.endpoint());
    let fedavg = "[outer.optimizer]\nkind = \"fedavg\"\n";
    federation.start_run(&(tiny_spec("altered", 2, 1) + fedavg));
    federation.wait_for_run("altered", "the run to end", |run| (run["status"] == "finished").then_some(()));
    let parameters =
        RunSpec::parse(&tiny_spec("altered", 2, 1)).unwrap().model.manifest().parameters() as f64;
    for round in 1..=2_u32 {
        let record = federation.json(&["rounds", "show", "altered", &round.to_string()]);
        let norm = record["update_norm"].as_f64().expect("a round has a norm");
        let expected = f64::from(round) * parameters.sqrt();
        assert!((norm / expected - 1.0).abs() < 1e-4, "{norm} in round {round}, not {expected}");
    }
}
