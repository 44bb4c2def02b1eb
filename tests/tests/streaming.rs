//! Streaming DiLoCo: rounds that synchronise a fragment of the model while the sites train on.

use consort_common::{codec::Encoding, spec::RunSpec};
use consort_tests::{TestFederation, federation::tiny_spec, process::wait_for};
use serde_json::Value;

const SITES: [&str; 2] = ["bank", "lab"];
const RUN: &str = "stream";

fn spec(rounds: u32, settings: &str) -> String {
    tiny_spec(RUN, rounds, 2) + settings
}

fn streaming(fragments: u32, overlap: u32, mixing: f64) -> String {
    format!("[outer.streaming]\nfragments = {fragments}\noverlap = {overlap}\nmixing = {mixing}\n")
}

/// Runs it to its end, and returns its rounds.
fn run(federation: &mut TestFederation, spec: &str) -> Vec<Value> {
    federation.start_aggregator();
    federation.start_run(spec);
    for site in SITES {
        federation.start_client(site);
    }
    federation.wait_for_run(RUN, "the run to finish", |run| (run["status"] == "finished").then_some(()));
    let rounds = federation.json(&["rounds", "list", RUN]);
    let rounds = rounds["rounds"].as_array().expect("a list of rounds").clone();
    // The sites' deltas differ, however they are encoded.
    let spreads: Vec<_> = rounds.iter().map(|round| round["spread"].as_f64()).collect();
    assert!(spreads.iter().all(|spread| spread.is_some_and(|spread| spread > 0.0)), "{spreads:?}");
    rounds
}

fn numbers(rounds: &[Value], name: &str) -> Vec<u64> {
    rounds.iter().map(|round| round[name].as_u64().expect("a number")).collect()
}

#[test]
fn with_one_fragment_and_nothing_kept_or_overlapped_it_is_diloco_bit_for_bit() {
    let digests = |settings: &str| -> Vec<Value> {
        let rounds = run(&mut TestFederation::new(&SITES), &spec(3, settings));
        rounds.iter().map(|round| round["digest"].clone()).collect()
    };
    let plain = digests("");
    assert_eq!(digests(&streaming(1, 0, 0.0)), plain);
    assert_ne!(digests(&streaming(1, 0, 0.5)), plain);
}

/// Over mutual TLS, with deltas and versions in encodings that lose much: each round moves its fragment and no more.
#[test]
fn a_round_of_a_fragment_moves_the_bytes_of_the_fragment() {
    for (delta, model) in [(Encoding::Int8, "fp32"), (Encoding::E3m0, "e3m0-update")] {
        let wire = format!("[wire]\ndelta_encoding = \"{}\"\nmodel_encoding = \"{model}\"\n", delta.name());
        let text = spec(7, &streaming(3, 3, 0.5)).replace("[wire]\n", &wire);
        let parsed = RunSpec::parse(&text).expect("a valid specification");
        let rounds = run(&mut TestFederation::new(&SITES), &text);

        let bytes = |encoding: Encoding, round: u32| -> u64 {
            let plan = parsed.fragment(round).plan();
            let lengths = (0..plan.chunks()).map(|index| plan.length(index).expect("a chunk"));
            lengths.map(|length| encoding.codec().encoded_bytes(length) as u64).sum()
        };
        let sites = SITES.len() as u64;
        let up: Vec<u64> = (1..=7).map(|round| sites * bytes(delta, round)).collect();
        assert_eq!(numbers(&rounds, "bytes_up"), up);
        // Version 0 comes whole, each later one as the fragment that the round before it changed.
        let sent = if model == "fp32" { Encoding::Fp32 } else { delta };
        let whole = parsed.chunk_plan().parameters() * 4;
        let down = (2..=7).map(|round| sites * bytes(sent, round - 1));
        let down: Vec<u64> = std::iter::once(sites * whole).chain(down).collect();
        assert_eq!(numbers(&rounds, "bytes_down"), down);
        let thirds = up[..3].iter().sum::<u64>();
        assert!(up.iter().all(|round| *round < thirds / 2), "a round is about a third: {up:?}");

        let losses: Vec<f64> = rounds.iter().filter_map(|round| round["train_loss"].as_f64()).collect();
        assert!(losses.len() == 7 && losses[6] < losses[0] - 0.1, "it learns: {losses:?}");
    }
}

/// The steps that `site` says it took in each round from the second on while a fragment was on its way.
fn steps_ahead(federation: &mut TestFederation, site: &str) -> Vec<u32> {
    let output = federation.client(site).output();
    let said = output.lines().filter_map(|line| {
        let (before, _) = line.split_once(" of the steps while the fragment of round ")?;
        before.rsplit(' ').next()?.parse().ok()
    });
    said.collect()
}

/// A fragment of some 440 kB takes the bank two seconds, in which both sites take every step that they may.
#[test]
fn sites_train_on_while_a_slow_line_takes_its_time() {
    for overlap in [0, 5] {
        let mut federation = TestFederation::new(&SITES);
        let path = federation.kit("site-bank").join("client.toml");
        let mut config = std::fs::read_to_string(&path).expect("the kit has a configuration");
        config += "\n[transfer]\nupload_bytes_per_second = 200_000\n";
        std::fs::write(&path, config).expect("the configuration can be written");
        let text = spec(3, &streaming(3, overlap, 0.5))
            .replace("hidden_size = 32", "hidden_size = 128")
            .replace("intermediate_size = 64", "intermediate_size = 256");
        run(&mut federation, &text);
        for site in SITES {
            assert_eq!(steps_ahead(&mut federation, site), [overlap; 2], "{site}");
            println!("{site}:\n{}", federation.client(site).output());
        }
    }
}

#[test]
fn a_site_that_joins_late_begins_with_the_global_model_and_goes_on_with_its_own() {
    let mut federation = TestFederation::new(&SITES);
    federation.start_aggregator();
    // Long enough rounds for the run to be paused in one of them.
    let text = spec(6, &streaming(3, 3, 0.5)).replace("local_steps = 8", "local_steps = 120");
    federation.start_run(&text.replace("minimum_clients = 2", "minimum_clients = 1"));
    federation.start_client("bank");
    federation.wait_for_run(RUN, "a committed round", |run| (run["version"].as_u64()? >= 1).then_some(()));
    federation.json(&["runs", "pause", RUN]);
    federation.start_client("lab");
    // The aggregator knows; the site's own log may not say so, since the pause can reach it before the answer.
    wait_for("the lab to be ready", || {
        let clients = federation.json(&["clients", "list"]);
        let clients = clients["clients"].as_array().expect("a list of clients");
        clients.iter().any(|client| client["site"] == "lab" && client["ready"] == true).then_some(())
    });
    federation.json(&["runs", "resume", RUN]);
    federation.wait_for_run(RUN, "the run to finish", |run| (run["status"] == "finished").then_some(()));
    let with_lab = |round: &u32| federation.contributions(RUN, *round).iter().any(|(site, _)| site == "lab");
    let rounds: Vec<u32> = (1..=6).filter(with_lab).collect();
    assert!(rounds.len() > 1 && rounds[0] > 1, "{rounds:?}");
    assert_eq!(steps_ahead(&mut federation, "lab").len(), rounds.len() - 1, "{rounds:?}");
    // The round that was paused goes on from its checkpoint, and says nothing.
    assert!(steps_ahead(&mut federation, "bank").len() >= 4);
}
