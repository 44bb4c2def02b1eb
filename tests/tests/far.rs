//! A site far from the aggregator keeps its line full: it has as much on its way as 1 Gbit/s carry in the 100 ms
//! that an answer takes. How fast that is in the end, `cargo bench -p consort-tests --bench line` measures.

use consort_common::spec::RunSpec;
use consort_tests::{
    TestFederation, federation::tiny_spec, line::Line, process::wait_closely_for, proxy::Direction,
};

const RUN: &str = "far";
/// 1 Gbit/s over 100 ms.
const ON_ITS_WAY_BYTES: u64 = 12_500_000;
/// More than passes besides a transfer, and far less than one.
const FIRST_BYTES: u64 = 256 << 10;

/// Seven million parameters, 29 MB as fp32, in chunks of the default size.
fn spec() -> String {
    tiny_spec(RUN, 1, 1)
        .replace("hidden_size = 32", "hidden_size = 256")
        .replace("intermediate_size = 64", "intermediate_size = 2048")
        .replace("num_hidden_layers = 2", "num_hidden_layers = 4")
        .replace("local_steps = 8", "local_steps = 1")
        .replace("chunk_parameters = 4096", "")
        .replace("tokens_max = 2000", "every_rounds = 0")
}

/// Once a transfer has begun, holds back all that its receiver says, until so much of it has come that the line
/// would have been full all the while.
fn fills_the_line(line: &Line, way: Direction, answers: Direction) {
    let before = line.carried(way);
    let came = |bytes| wait_closely_for("bytes", || (line.carried(way) - before >= bytes).then_some(()));
    came(FIRST_BYTES);
    line.hold_back(answers, true);
    came(ON_ITS_WAY_BYTES);
    line.hold_back(answers, false);
}

#[test]
fn a_site_100_ms_away_has_as_much_on_its_way_as_a_gigabit_per_second_carries_meanwhile() {
    let model_bytes = 4 * RunSpec::parse(&spec()).expect("a valid specification").chunk_plan().parameters();
    assert!(model_bytes > 2 * ON_ITS_WAY_BYTES);
    let mut federation = TestFederation::new(&["bank"]);
    federation.start_aggregator();
    federation.start_run(&spec());
    // Faster than that: what it would hold is not the limit.
    let line = Line::start(federation.endpoint(), "10000:100".parse().expect("a line"));
    federation.start_client_through("bank", line.endpoint());
    fills_the_line(&line, Direction::Down, Direction::Up);
    wait_closely_for("the model", || (line.carried(Direction::Down) > model_bytes).then_some(()));
    fills_the_line(&line, Direction::Up, Direction::Down);
    federation.wait_for_run(RUN, "the round", |run| (run["version"].as_u64()? >= 1).then_some(()));
}
