//! A whole round without training: K sites download the model and upload a delta each, the aggregator reduces
//! and commits. Real mTLS over loopback against the real `consort-aggregator`, a process of its own, built
//! for release.
//!
//! What is measured is the aggregator and the wire. The sites live in this process and spend little: they
//! verify what they download and drop it, and send chunks that were drawn, encoded and hashed beforehand
//! (`consort_tests::load`). All sites wait for the slowest between download and upload, where they would
//! train, so that the phases' times and processor seconds are their own. A round lasts from the moment that
//! all have its instruction until all have the next one's, which the commit sends.
//!
//! Beside it stand the limits of this machine, measured in the same run: plain TLS for as many bytes as went
//! down and up, and the disk for as many as the round makes durable. The percentage is the time that the
//! slower of the two alone would take, of the time that the round took.
//!
//!     cargo bench -p consort-tests --bench round -- --clients 4 --megabytes 500

use std::{
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use clap::Parser;
use consort_aggregator::reduce::{has_momentum, initial_second_moment};
use consort_common::{
    chunk::ChunkPlan,
    codec::{Encoding, ModelEncoding},
    spec::RunSpec,
};
use consort_proto::v1::Train;
use consort_tests::{
    TestFederation, limits,
    load::{LoadSite, Payloads},
    raw::credentials,
};
use futures::future::join_all;

const RUN: &str = "load";

/// A whole round without training.
#[derive(Parser)]
struct Arguments {
    /// Sites; several rows for several numbers.
    #[arg(long, value_delimiter = ',', default_value = "2,4")]
    clients: Vec<u32>,
    /// Size of the model as fp32, in millions of bytes.
    #[arg(long, default_value_t = 64)]
    megabytes: u64,
    /// Encoding of the deltas.
    #[arg(long, default_value = "fp32", value_parser = encoding)]
    encoding: Encoding,
    /// How the model reaches the sites.
    #[arg(long, default_value_t)]
    model_encoding: ModelEncoding,
    /// Rounds per row.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Parameters per chunk.
    #[arg(long, default_value_t = 1 << 18)]
    chunk_parameters: u32,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn encoding(name: &str) -> Result<Encoding, String> {
    let names = Encoding::ALL.map(Encoding::name);
    Encoding::parse(name).ok_or_else(|| format!("the encodings are {}", names.join(", ")))
}

fn main() {
    let arguments = Arguments::parse();
    if std::env::var_os("TMPDIR").is_none() {
        // `/tmp` is memory on many machines; the disk is part of what is measured.
        fs::create_dir_all(env!("CARGO_TARGET_TMPDIR")).expect("the target directory can be written");
        tempfile::env::override_temp_dir(Path::new(env!("CARGO_TARGET_TMPDIR"))).expect("nobody did before");
    }
    let runtime = tokio::runtime::Runtime::new().expect("a runtime can be made");
    for clients in &arguments.clients {
        runtime.block_on(row(&arguments, *clients));
    }
}

/// Measures and prints one row.
async fn row(arguments: &Arguments, clients: u32) {
    let text = specification(arguments, clients);
    let spec = RunSpec::parse(&text).expect("a valid specification");
    let payloads = Arc::new(Payloads::new(spec.chunk_plan(), spec.wire.delta_encoding, 7));
    let names: Vec<String> = (0..clients).map(|site| format!("site{site}")).collect();
    let mut federation = TestFederation::new(&names.iter().map(String::as_str).collect::<Vec<_>>());
    federation.start_aggregator();
    federation.start_run(&text);
    let mut sites = Vec::new();
    for (shift, name) in names.iter().enumerate() {
        sites.push(LoadSite::ready(&federation, name, RUN, payloads.clone(), shift).await);
    }

    let aggregator = federation.aggregator().id();
    // The first round counts for nothing: all sites download the whole model, whatever its encoding.
    let mut trains = assignments(&mut sites, 1).await;
    sites = transfer(sites, &trains, Way::Down).await;
    sites = transfer(sites, &trains, Way::Up).await;
    trains = assignments(&mut sites, 2).await;
    let mut rounds = Vec::new();
    for round in 2..arguments.rounds + 2 {
        let mut watch = Watch::start(aggregator);
        let before = traffic(&sites);
        sites = transfer(sites, &trains, Way::Down).await;
        let download = watch.lap();
        sites = transfer(sites, &trains, Way::Up).await;
        let upload = watch.lap();
        trains = assignments(&mut sites, round + 1).await;
        let reduction = watch.lap();
        let after = traffic(&sites);
        rounds.push(Round {
            phases: [download, upload, reduction],
            wire: (after.0 - before.0, after.1 - before.1),
        });
    }
    let peak_bytes = federation.aggregator().peak_memory_bytes();

    let plan = spec.chunk_plan();
    let model_bytes = plan.parameters() * 4;
    let update_bytes = spec.wire.model_encoding.update().map(|encoding| encoded_bytes(plan, encoding));
    let optimizer = &spec.outer.optimizer;
    let moments = u64::from(has_momentum(optimizer)) + u64::from(initial_second_moment(optimizer).is_some());
    let sizes = Sizes {
        clients: u64::from(clients),
        model_bytes,
        download_bytes: update_bytes.unwrap_or(encoded_bytes(plan, spec.wire.model_encoding.whole())),
        delta_bytes: payloads.delta_bytes(),
        written_bytes: u64::from(clients) * payloads.delta_bytes()
            + model_bytes * (1 + moments)
            + update_bytes.unwrap_or_default(),
    };
    let state = federation.aggregator_state();
    let [server, client] = ["aggregator-main", "site-site0"].map(|kit| credentials(&federation.kit(kit)));
    drop(sites);
    federation.terminate_aggregator();
    let mut tls = Vec::new();
    for streams in [1, sizes.clients] {
        for write_bytes in [64 << 10, 1 << 20] {
            let took = limits::tls(&server, &client, streams, sizes.payload(), write_bytes, None).await;
            tls.push((streams, write_bytes, took.expect("loopback works")));
        }
    }
    let disk = limits::disk(&state, sizes.written_bytes).expect("the disk has room");
    report(arguments, &sizes, &rounds, peak_bytes, &tls, disk);
}

/// Waits until every site has its instruction for `round`.
async fn assignments(sites: &mut [LoadSite], round: u32) -> Vec<Train> {
    join_all(sites.iter_mut().map(|site| site.assignment(round))).await
}

#[derive(Clone, Copy)]
enum Way {
    Down,
    Up,
}

/// All sites at a time, each a task of its own.
async fn transfer(sites: Vec<LoadSite>, trains: &[Train], way: Way) -> Vec<LoadSite> {
    let tasks = sites.into_iter().zip(trains.to_vec()).map(|(mut site, train)| {
        tokio::spawn(async move {
            let result = match way {
                Way::Down => site.download(&train).await,
                Way::Up => site.upload(&train).await,
            };
            result.unwrap_or_else(|status| panic!("a transfer failed: {status}"));
            site
        })
    });
    join_all(tasks.collect::<Vec<_>>())
        .await
        .into_iter()
        .map(|site| site.expect("a site ends well"))
        .collect()
}

/// Bytes that the sites' connections carried so far, down and up.
fn traffic(sites: &[LoadSite]) -> (u64, u64) {
    let all = sites.iter().map(|site| site.traffic().down_up());
    all.fold((0, 0), |sum, site| (sum.0 + site.0, sum.1 + site.1))
}

/// Time, and processor time of both processes, lap by lap.
struct Watch {
    aggregator: u32,
    time: Instant,
    processor_seconds: [f64; 2],
}

/// What a phase took.
#[derive(Clone, Copy)]
struct Lap {
    seconds: f64,
    /// Of the aggregator and of this process.
    processor_seconds: [f64; 2],
}

impl Watch {
    fn start(aggregator: u32) -> Self {
        Self { aggregator, time: Instant::now(), processor_seconds: Self::processor_seconds(aggregator) }
    }

    fn processor_seconds(aggregator: u32) -> [f64; 2] {
        [aggregator, std::process::id()].map(processor_seconds)
    }

    fn lap(&mut self) -> Lap {
        let last = std::mem::replace(self, Self::start(self.aggregator));
        let [aggregator, ours] = self.processor_seconds;
        Lap {
            seconds: (self.time - last.time).as_secs_f64(),
            processor_seconds: [aggregator - last.processor_seconds[0], ours - last.processor_seconds[1]],
        }
    }
}

/// Processor time that a process has used, in the kernel and outside (proc(5), fields 14 and 15 of `stat`).
fn processor_seconds(process: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).expect("the process runs");
    // The second field is the program's name, in parentheses, with anything in it.
    let fields = stat.rsplit(')').next().expect("a split has a last part").split_whitespace();
    let ticks: f64 = fields.skip(11).take(2).map(|ticks| ticks.parse::<f64>().expect("a number")).sum();
    // SAFETY: sysconf(3) takes no pointers.
    ticks / unsafe { libc::sysconf(libc::_SC_CLK_TCK) } as f64
}

/// One round as it was: download, upload, reduction.
struct Round {
    phases: [Lap; 3],
    /// Bytes over the sites' sockets, down and up.
    wire: (u64, u64),
}

impl Round {
    fn seconds(&self) -> f64 {
        self.phases.iter().map(|phase| phase.seconds).sum()
    }

    fn processor_seconds(&self, process: usize) -> f64 {
        self.phases.iter().map(|phase| phase.processor_seconds[process]).sum()
    }
}

/// What a round moves.
struct Sizes {
    clients: u64,
    /// As fp32.
    model_bytes: u64,
    /// What a site downloads, encoded.
    download_bytes: u64,
    /// What it uploads.
    delta_bytes: u64,
    /// Made durable by the aggregator: the deltas, the new version with its momentum, and what it changed.
    written_bytes: u64,
}

impl Sizes {
    fn payload(&self) -> u64 {
        self.clients * (self.download_bytes + self.delta_bytes)
    }
}

fn report(
    arguments: &Arguments,
    sizes: &Sizes,
    rounds: &[Round],
    peak_bytes: u64,
    tls: &[(u64, usize, Duration)],
    disk: Duration,
) {
    let mut sorted: Vec<&Round> = rounds.iter().collect();
    sorted.sort_by(|a, b| a.seconds().total_cmp(&b.seconds()));
    let (best, median) = (sorted[0], sorted[sorted.len() / 2]);
    let payload = sizes.payload();
    println!(
        "\nK = {}, model {:.1} MB, {} down, {} up, chunks of {} parameters, {} rounds: {:.0} MB of payload a round",
        sizes.clients,
        megabytes(sizes.model_bytes),
        arguments.model_encoding,
        arguments.encoding.name(),
        arguments.chunk_parameters,
        rounds.len(),
        megabytes(payload),
    );
    println!(
        "{:>8} {:>9} {:>13} {:>10} {:>9} {:>9}   cpu s: aggregator, sites",
        "", "seconds", "payload MB/s", "download", "upload", "reduce"
    );
    for (name, round) in [("median", median), ("best", best)] {
        let [download, upload, reduction] = round.phases.map(|phase| phase.seconds);
        println!(
            "{name:>8} {:>9.3} {:>13.0} {download:>10.3} {upload:>9.3} {reduction:>9.3}   {:.2}, {:.2}",
            round.seconds(),
            megabytes(payload) / round.seconds(),
            round.processor_seconds(0),
            round.processor_seconds(1),
        );
    }
    for (name, phase) in ["download", "upload", "reduce"].iter().zip(&best.phases) {
        let [aggregator, ours] = phase.processor_seconds;
        println!(
            "    best round, {name}: {:.3} s; cpu s: aggregator {aggregator:.2}, sites {ours:.2}",
            phase.seconds
        );
    }
    let fp32 = (sizes.clients * sizes.model_bytes) as f64;
    println!(
        "    wire bytes: down {:.1} MB, up {:.1} MB; of fp32: down {:.4}, up {:.4}",
        megabytes(best.wire.0),
        megabytes(best.wire.1),
        best.wire.0 as f64 / fp32,
        best.wire.1 as f64 / fp32,
    );
    println!("    aggregator's peak memory: {:.1} MB", megabytes(peak_bytes));
    for (streams, write_bytes, took) in tls {
        println!(
            "    limit: plain TLS, {streams} streams, writes of {} KiB: {:.0} MB/s",
            write_bytes >> 10,
            megabytes(payload) / took.as_secs_f64()
        );
    }
    println!(
        "    limit: disk, {:.0} MB written and synced: {:.0} MB/s",
        megabytes(sizes.written_bytes),
        megabytes(sizes.written_bytes) / disk.as_secs_f64()
    );
    let fastest_tls = tls.iter().map(|(.., took)| *took).min().unwrap_or_default();
    let (limit, name) = if fastest_tls > disk { (fastest_tls, "TLS") } else { (disk, "the disk") };
    println!(
        "    {name} alone would take {:.3} s: {:.0} % of the median round, {:.0} % of the best",
        limit.as_secs_f64(),
        100.0 * limit.as_secs_f64() / median.seconds(),
        100.0 * limit.as_secs_f64() / best.seconds(),
    );
}

/// Bytes of as many values as the model has, encoded.
fn encoded_bytes(plan: ChunkPlan, encoding: Encoding) -> u64 {
    let length = |index| plan.length(index).expect("the plan has the chunk");
    (0..plan.chunks()).map(|index| encoding.codec().encoded_bytes(length(index)) as u64).sum()
}

fn megabytes(bytes: u64) -> f64 {
    bytes as f64 / 1e6
}

/// A run whose model is a LLaMA of about the size asked for. One round more than is run, so that the
/// last one ends as the others do: with the next one's instruction.
fn specification(arguments: &Arguments, clients: u32) -> String {
    let parameters = (arguments.megabytes * 1_000_000 / 4) as f64;
    // A layer has about 12 width^2 parameters; layers = width / 100 is the shape of published models.
    let width = (((parameters * 100.0 / 12.0).cbrt() / 64.0).round() * 64.0).max(64.0);
    let layers = (parameters / (12.0 * width * width)).round().max(1.0);
    let vocabulary = 257.0;
    // What the attention and the embedding leave over.
    let inner = (parameters - vocabulary * width - layers * 4.0 * width * width) / (3.0 * layers * width);
    format!(
        r#"
name = "{RUN}"
rounds = {rounds}

[model]
architecture = "llama"
vocab_size = {vocabulary}
hidden_size = {width}
intermediate_size = {inner}
num_hidden_layers = {layers}
num_attention_heads = {heads}
num_key_value_heads = {heads}
max_position_embeddings = 64

[training]
local_steps = 1
batch_size = 1
sequence_length = 64

[participation]
minimum_clients = {clients}

[wire]
delta_encoding = "{encoding}"
model_encoding = "{model_encoding}"
chunk_parameters = {chunk_parameters}

[evaluation]
every_rounds = 0

[checkpoints]
every_rounds = 0
"#,
        rounds = arguments.rounds + 2,
        inner = inner.round().max(1.0),
        heads = width / 64.0,
        encoding = arguments.encoding.name(),
        model_encoding = arguments.model_encoding,
        chunk_parameters = arguments.chunk_parameters,
    )
}
