//! What a delta costs on the wire, counted at the socket: TLS with its handshake, HTTP/2, and every answer.
//!
//! The site waits for each chunk's acknowledgement, which costs more on the wire than the daemon's way of
//! having several chunks acknowledged at once.

use consort_common::{codec::Encoding, spec::RunSpec};
use consort_tests::{
    TestFederation,
    federation::tiny_spec,
    proxy::{Passed, Proxy},
    raw::{Delta, RawSite, channel_to},
};

/// Four million parameters in chunks of the default size.
fn spec(encoding: Encoding) -> String {
    tiny_spec("wire", 1, 1)
        .replace("hidden_size = 32", "hidden_size = 256")
        .replace("intermediate_size = 64", "intermediate_size = 1024")
        .replace("num_hidden_layers = 2", "num_hidden_layers = 4")
        .replace("chunk_parameters = 4096", &format!("delta_encoding = \"{}\"", encoding.name()))
}

/// Values of a delta's size with all bits in use; every encoding has a fixed rate, whatever they are.
fn values(parameters: u64) -> Vec<f32> {
    (0..parameters).map(|index| (index as f32).sin() * 1e-3).collect()
}

/// All that passes for one site's upload of one round: from the first byte of its connection's handshake to
/// the acceptance.
async fn upload(encoding: Encoding) -> Passed {
    let mut federation = TestFederation::new(&["bank"]);
    federation.start_aggregator();
    federation.start_run(&spec(encoding));
    let mut bank = RawSite::ready(&federation, "bank", "wire").await;
    let assignment = bank.assignment(1).await;
    assert_eq!(assignment.encoding, encoding);
    let delta = Delta::new(&assignment, &values(assignment.plan.parameters()));

    let proxy = Proxy::start(federation.endpoint());
    let mut counted = RawSite::over(channel_to(proxy.endpoint(), &federation.kit("site-bank")));
    counted.session.clone_from(&bank.session);
    assert!(!counted.upload(&delta).await.expect("the delta is right"));
    proxy.passed()
}

#[tokio::test]
async fn every_encoding_saves_on_the_wire_what_it_promises() {
    let plan = RunSpec::parse(&spec(Encoding::Fp32)).expect("a valid specification").chunk_plan();
    println!("{} parameters in {} chunks", plan.parameters(), plan.chunks());
    println!("{:>8} {:>12} {:>8} {:>12} {:>8}", "encoding", "bytes up", "ratio", "both ways", "ratio");
    let mut fp32 = Passed::default();
    for (encoding, least) in [
        (Encoding::Fp32, 1.0),
        (Encoding::Bf16, 1.95),
        (Encoding::Fp16, 1.95),
        (Encoding::Int8, 3.8),
        (Encoding::E3m0, 7.5),
        (Encoding::TwoBit, 14.0),
        (Encoding::TopK, 130.0),
    ] {
        let passed = upload(encoding).await;
        if encoding == Encoding::Fp32 {
            fp32 = passed;
        }
        let both = |passed: &Passed| passed.up + passed.down;
        let ratio = fp32.up as f64 / passed.up as f64;
        let ratio_both = both(&fp32) as f64 / both(&passed) as f64;
        println!(
            "{:>8} {:>12} {ratio:>8.2} {:>12} {ratio_both:>8.2}",
            encoding.name(),
            passed.up,
            both(&passed)
        );
        assert!(ratio >= least, "{}: {ratio:.2}, not {least}", encoding.name());
    }
}
