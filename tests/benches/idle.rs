//! What sites cost that are connected and have nothing to do: rounds of some active sites, with and without
//! many idle ones beside them, on one aggregator. Real mTLS over loopback, and no training.
//!
//! An idle site has joined, over a connection of its own, and waits for an assignment that does not come: it
//! never says that it is ready. Rounds with and without them take turns in one aggregator, so that nothing
//! else differs; before the rounds of each kind the idle ones connect, or leave. Its processor shares the
//! machine with the sites', which live in this process.
//!
//!     cargo bench -p consort-tests --bench idle -- --clients 8 --idle 200

use std::{sync::Arc, time::Instant};

use clap::Parser;
use consort_common::{codec::Encoding, ids::Digest, spec::RunSpec};
use consort_proto::v1::Train;
use consort_tests::{
    TestFederation,
    federation::tiny_spec,
    load::{LoadSite, Payloads},
    process::wait_for,
    raw::RawSite,
};
use futures::future::join_all;

const RUN: &str = "idle";

/// Rounds with and without idle sites.
#[derive(Parser)]
struct Arguments {
    /// Active sites.
    #[arg(long, default_value_t = 8)]
    clients: u32,
    /// Idle sites.
    #[arg(long, default_value_t = 200)]
    idle: u32,
    /// Turns of one round without idle sites and one with them.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    turns: u32,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

/// One round.
struct Round {
    seconds: f64,
    /// The aggregator's memory before it, and the most during it.
    memory_bytes: u64,
    peak_bytes: u64,
}

fn main() {
    let arguments = Arguments::parse();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime can be made");
    runtime.block_on(measure(&arguments));
}

/// Four million parameters, 16 MB as fp32.
fn specification(arguments: &Arguments) -> String {
    // One warms up, and the last one ends as the others do, with the next one's instruction.
    tiny_spec(RUN, 2 * arguments.turns + 2, arguments.clients)
        .replace("hidden_size = 32", "hidden_size = 256")
        .replace("intermediate_size = 64", "intermediate_size = 1024")
        .replace("num_hidden_layers = 2", "num_hidden_layers = 4")
        .replace("chunk_parameters = 4096", "")
        .replace("tokens_max = 2000", "every_rounds = 0\n\n[checkpoints]\nevery_rounds = 0")
}

async fn measure(arguments: &Arguments) {
    let text = specification(arguments);
    let plan = RunSpec::parse(&text).expect("a valid specification").chunk_plan();
    let payloads = Arc::new(Payloads::new(plan, Encoding::Fp32, 7));
    let name = |kind: &str, count: u32| (0..count).map(|site| format!("{kind}{site}")).collect::<Vec<_>>();
    let (active, idle) = (name("active", arguments.clients), name("idle", arguments.idle));
    let mut federation =
        TestFederation::new(&active.iter().chain(&idle).map(String::as_str).collect::<Vec<_>>());
    federation.start_aggregator();
    federation.start_run(&text);
    let mut sites = Vec::new();
    for (shift, name) in active.iter().enumerate() {
        sites.push(LoadSite::ready(&federation, name, RUN, payloads.clone(), shift).await);
    }
    let mut trains = assignments(&mut sites, 1).await;
    (sites, trains) = round(sites, trains).await;

    let mut rounds = [Vec::new(), Vec::new()];
    for _ in 0..arguments.turns {
        for (kind, rounds) in rounds.iter_mut().enumerate() {
            let idle = connect(&federation, if kind == 0 { &[] } else { &idle }).await;
            wait_connected(&federation, arguments.clients as usize + idle.len());
            let memory_bytes = federation.aggregator().memory_bytes();
            federation.aggregator().forget_peak_memory();
            let begin = Instant::now();
            (sites, trains) = round(sites, trains).await;
            let seconds = begin.elapsed().as_secs_f64();
            let peak_bytes = federation.aggregator().peak_memory_bytes();
            rounds.push(Round { seconds, memory_bytes, peak_bytes });
        }
    }
    report(arguments, &rounds);
}

/// The idle sites, connected; they stay so until they are dropped.
async fn connect(federation: &TestFederation, names: &[String]) -> Vec<RawSite> {
    let mut sites = Vec::new();
    for name in names {
        let mut site = RawSite::new(federation, name);
        // Of one daemon each, however often it comes.
        site.instance = *Digest::of(name.as_bytes()).as_bytes().first_chunk().expect("16 bytes of 32");
        site.join().await.expect("the site may join");
        site.attend().await.expect("the site may attend");
        sites.push(site);
    }
    sites
}

/// Waits until the aggregator has so many sites connected: those that went are gone for it as well.
fn wait_connected(federation: &TestFederation, count: usize) {
    wait_for("the sites to come and go", || {
        let clients = federation.json(&["clients", "list"]);
        let clients = clients["clients"].as_array().expect("a list of clients");
        (clients.iter().filter(|client| client["connected"] == true).count() == count).then_some(())
    });
}

async fn assignments(sites: &mut [LoadSite], round: u32) -> Vec<Train> {
    join_all(sites.iter_mut().map(|site| site.assignment(round))).await
}

/// All active sites download, upload and wait for the next round.
async fn round(sites: Vec<LoadSite>, trains: Vec<Train>) -> (Vec<LoadSite>, Vec<Train>) {
    let next = trains[0].round + 1;
    let tasks = sites.into_iter().zip(trains).map(|(mut site, train)| {
        tokio::spawn(async move {
            site.download(&train).await.expect("the model can be had");
            site.upload(&train).await.expect("the delta is right");
            site
        })
    });
    let ended = join_all(tasks.collect::<Vec<_>>()).await;
    let mut sites: Vec<LoadSite> = ended.into_iter().map(|site| site.expect("a site ends well")).collect();
    let trains = assignments(&mut sites, next).await;
    (sites, trains)
}

fn median(rounds: &[Round], value: impl Fn(&Round) -> f64) -> f64 {
    let mut values: Vec<f64> = rounds.iter().map(value).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn report(arguments: &Arguments, rounds: &[Vec<Round>; 2]) {
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    type Value<'a> = &'a dyn Fn(&Round) -> f64;
    let columns: [(&str, Value<'_>); 3] = [
        ("round, s", &|round| round.seconds),
        ("RSS before, MB", &|round| megabytes(round.memory_bytes)),
        ("peak RSS, MB", &|round| megabytes(round.peak_bytes)),
    ];
    println!("\n{} active sites, medians of {} rounds each, in turns", arguments.clients, arguments.turns);
    let with = format!("{} idle", arguments.idle);
    println!("{:>16} {:>12} {with:>12} {:>9} {:>14}", "", "none idle", "growth", "best of each");
    for (name, value) in columns {
        let [alone, beside] = [0, 1].map(|kind| median(&rounds[kind], value));
        let [best_alone, best_beside] =
            [0, 1].map(|kind| rounds[kind].iter().map(value).fold(f64::INFINITY, f64::min));
        let growth = 100.0 * (beside / alone - 1.0);
        println!(
            "{name:>16} {alone:>12.3} {beside:>12.3} {growth:>+8.1}% {best_alone:>7.3} {best_beside:>7.3}"
        );
    }
}
