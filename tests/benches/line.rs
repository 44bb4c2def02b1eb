//! What a site far away makes of its line: rounds of the real daemon and the real aggregator, over one connection
//! through `consort_tests::line`.
//!
//! A transfer lasts from the first bytes of the model, or of the delta, that come out of the line's other end to
//! the last ones, until as many have come as the model has, in which is the little that TLS and HTTP/2 add. Beside it
//! stands plain TLS for as many bytes over the same line in the same run, from end to end. All of it shares this machine's cores: the line, and the ends that encrypt, hash and store.
//!
//!     cargo bench -p consort-tests --bench line -- --line 1000:100

use std::time::{Duration, Instant};

use clap::Parser;
use consort_common::spec::RunSpec;
use consort_tests::{
    TestFederation,
    federation::tiny_spec,
    limits,
    line::{Length, Line},
    process::wait_closely_for,
    proxy::Direction,
    raw::credentials,
};

const RUN: &str = "far";
/// What passes besides a transfer is far less.
const FIRST_BYTES: u64 = 128 << 10;
const TLS_WRITE_BYTES: usize = 64 << 10;

/// Rounds of a site far away.
#[derive(Parser)]
struct Arguments {
    /// The line: Mbit/s, and milliseconds there and back.
    #[arg(long, default_value = "1000:100")]
    line: Length,
    /// Rounds.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let arguments = Arguments::parse();
    let text = specification(arguments.rounds);
    let spec = RunSpec::parse(&text).expect("a valid specification");
    // Both ways travel as fp32.
    let payload = spec.chunk_plan().parameters() * 4;
    let mut federation = TestFederation::new(&["bank"]);
    federation.start_aggregator();
    federation.start_run(&text);
    let (mut downloads, mut uploads) = (Vec::new(), Vec::new());
    {
        let line = Line::start(federation.endpoint(), arguments.line);
        federation.start_client_through("bank", line.endpoint());
        for _ in 0..arguments.rounds {
            downloads.push(transfer(&line, Direction::Down, payload));
            uploads.push(transfer(&line, Direction::Up, payload));
        }
        federation.terminate_client("bank");
    }
    federation.terminate_aggregator();

    let [server, client] = ["aggregator-main", "site-bank"].map(|kit| credentials(&federation.kit(kit)));
    let runtime = tokio::runtime::Runtime::new().expect("a runtime can be made");
    let tls = |_| {
        let transfer = limits::tls(&server, &client, 1, payload, TLS_WRITE_BYTES, Some(arguments.line));
        let took = runtime.block_on(transfer).expect("loopback works");
        payload as f64 / (took - arguments.line.one_way()).as_secs_f64()
    };
    let tls: Vec<f64> = (0..arguments.rounds).map(tls).collect();

    let carries = arguments.line.bytes_per_second;
    println!(
        "\n{}, which is {:.1} MB/s: {:.1} MB each way, one connection, {} times",
        arguments.line,
        carries / 1e6,
        payload as f64 / 1e6,
        arguments.rounds
    );
    println!("{:>10} {:>12} {:>12}   least and most", "", "median MB/s", "of the line");
    for (name, mut rates) in [("plain TLS", tls), ("download", downloads), ("upload", uploads)] {
        rates.sort_by(f64::total_cmp);
        let [least, median, most] = [0, rates.len() / 2, rates.len() - 1].map(|place| rates[place]);
        let share = |rate: f64| 100.0 * rate / carries;
        println!(
            "{name:>10} {:>12.1} {:>10.0} %   {:.0} and {:.0} %",
            median / 1e6,
            share(median),
            share(least),
            share(most)
        );
    }
}

/// Twenty-eight million parameters, 114 MB as fp32, in chunks of the default size.
fn specification(rounds: u32) -> String {
    tiny_spec(RUN, rounds, 1)
        .replace("hidden_size = 32", "hidden_size = 512")
        .replace("intermediate_size = 64", "intermediate_size = 4096")
        .replace("num_hidden_layers = 2", "num_hidden_layers = 4")
        .replace("local_steps = 8", "local_steps = 1")
        .replace("batch_size = 4\nmicro_batch_size = 2", "batch_size = 1")
        .replace("chunk_parameters = 4096", "")
        .replace("tokens_max = 2000", "every_rounds = 0\n\n[checkpoints]\nevery_rounds = 0")
}

/// Waits for the next `payload` bytes in that direction. Returns how many came per second, from the first to the
/// last.
fn transfer(line: &Line, direction: Direction, payload: u64) -> f64 {
    let before = line.carried(direction);
    let mut began = (Instant::now(), 0);
    let took: Duration = wait_closely_for("a transfer", || {
        let (now, came) = (Instant::now(), line.carried(direction) - before);
        if came < FIRST_BYTES {
            began = (now, came);
        }
        (came >= payload).then(|| now - began.0)
    });
    (payload - began.1) as f64 / took.as_secs_f64()
}
