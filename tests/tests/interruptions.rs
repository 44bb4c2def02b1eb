//! A daemon whose connection breaks again and again, in the middle of its transfers, sends next to nothing
//! twice, and the result is the same bits.

use consort_common::spec::RunSpec;
use consort_tests::{
    TestFederation,
    federation::tiny_spec,
    process::wait_closely_for,
    proxy::{Direction, Passed, Proxy},
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const RUN: &str = "broken";
/// Interruptions of each transfer.
const CUTS: usize = 20;
/// Most that the interruptions may cost, of the transfer's own length.
const RESENT_MAX: f64 = 0.02;

/// Twenty-eight million parameters in 14 thousand chunks of 8 KiB: 114 MB each way.
fn spec() -> String {
    tiny_spec(RUN, 1, 1)
        .replace("hidden_size = 32", "hidden_size = 512")
        .replace("intermediate_size = 64", "intermediate_size = 4096")
        .replace("num_hidden_layers = 2", "num_hidden_layers = 4")
        .replace("local_steps = 8", "local_steps = 1")
        .replace("chunk_parameters = 4096", "chunk_parameters = 2048")
        .replace("tokens_max = 2000", "every_rounds = 0")
}

/// One round of one site through a proxy.
struct Outcome {
    /// Bytes that came from the aggregator until the site had the model.
    downloaded: u64,
    /// Bytes that went to it until the round was committed.
    uploaded: u64,
    passed: Passed,
    /// Bytes of chunks that the aggregator took.
    received: u64,
    digest: String,
}

fn round(cuts: &[(Direction, Vec<u64>)]) -> Outcome {
    let mut federation = TestFederation::new(&["bank"]);
    federation.start_aggregator();
    federation.start_run(&spec());
    let proxy = Proxy::start(federation.endpoint());
    for (direction, counts) in cuts {
        proxy.cut_at(*direction, counts.clone());
    }
    federation.start_client_through("bank", proxy.endpoint());
    let model = federation.site_state("bank").join("runs").join(RUN).join("model-0.f32");
    let downloaded = wait_closely_for("the model", || model.exists().then(|| proxy.passed().down));
    let run =
        federation.wait_for_run(RUN, "the round", |run| (run["version"].as_u64()? >= 1).then(|| run.clone()));
    let passed = proxy.passed();
    let text = |name: &str| run[name].as_str().expect("a text").to_owned();
    Outcome {
        downloaded,
        uploaded: passed.up,
        passed,
        received: run["bytes_up"].as_u64().expect("a number"),
        digest: text("version_digest"),
    }
}

/// Ascending counts at which to cut: anywhere in a transfer of so many bytes, but for its first part, in which
/// the connection is set up and the text prepared.
fn moments(random: &mut ChaCha8Rng, transfer_bytes: u64) -> Vec<u64> {
    let mut counts: Vec<u64> =
        (0..CUTS).map(|_| random.random_range(transfer_bytes / 100..transfer_bytes)).collect();
    counts.sort_unstable();
    counts
}

#[test]
fn a_transfer_that_is_interrupted_twenty_times_sends_next_to_nothing_again() {
    let given = std::env::var("CONSORT_CUT_SEED").ok();
    let seed = given.map_or_else(rand::random, |seed| seed.parse().expect("CONSORT_CUT_SEED is a number"));
    println!("replay with CONSORT_CUT_SEED={seed}");
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let plan = RunSpec::parse(&spec()).expect("a valid specification").chunk_plan();
    let transfer_bytes = plan.parameters() * 4;

    let quiet = round(&[]);
    assert_eq!(quiet.received, transfer_bytes);
    let cuts = [Direction::Down, Direction::Up].map(|way| (way, moments(&mut random, transfer_bytes)));
    let broken = round(&cuts);
    assert_eq!(broken.passed.cuts, 2 * CUTS as u64);
    assert_eq!(broken.digest, quiet.digest);

    // Of all that passed, so with the new connections' handshakes.
    let chunks = f64::from(plan.chunks());
    let share = |more: u64| more as f64 / transfer_bytes as f64;
    let lines = [
        ("download, on the wire", broken.downloaded.saturating_sub(quiet.downloaded)),
        ("upload, on the wire", broken.uploaded.saturating_sub(quiet.uploaded)),
        ("upload, taken twice", broken.received - quiet.received),
    ];
    println!("{} chunks, {transfer_bytes} bytes, {CUTS} cuts of each transfer", plan.chunks());
    for (what, more) in lines {
        println!(
            "{what}: {more} bytes again, {:.1} chunks, {:.2} %",
            share(more) * chunks,
            100.0 * share(more)
        );
    }
    for (what, more) in lines {
        assert!(share(more) < RESENT_MAX, "{what}: {more} of {transfer_bytes} bytes went again");
    }
}
