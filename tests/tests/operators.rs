//! What an operator is told: every problem of a specification at once, and exit codes that a script can use.

use std::{fs, process::Output};

use consort_tests::{
    TestFederation,
    federation::tiny_spec,
    raw::{RawOperator, assert_refused},
};
use tonic::Code;

fn federation() -> TestFederation {
    let mut federation = TestFederation::new(&[]);
    federation.start_aggregator();
    federation
}

/// The command ends with `code`, and its last words have all of `words` in them.
#[track_caller]
fn assert_exit(output: &Output, code: i32, words: &[&str]) {
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{errors}");
    for word in words {
        assert!(errors.contains(word), "{word:?} is not in {errors:?}");
    }
}

/// A specification with five problems, and the words by which each is to be known.
fn wrong_spec() -> (String, [&'static str; 5]) {
    let spec = tiny_spec("pilot", 3, 1)
        .replace("rounds = 3", "rounds = 0")
        .replace("hidden_size = 32", "hidden_size = 33")
        .replace("local_steps = 8", "local_steps = \"many\"")
        .replace("micro_batch_size = 2", "micro_batch_size = 3")
        .replace("[wire]", "[wire]\ncolour = 1");
    (
        spec,
        [
            "rounds",
            "model.num_attention_heads",
            "training.local_steps",
            "training.micro_batch_size",
            "wire.colour",
        ],
    )
}

#[tokio::test]
async fn an_unreadable_specification_is_refused_with_all_its_problems_at_once() {
    let federation = federation();
    let (spec, words) = wrong_spec();
    let path = federation.path().join("wrong.toml");
    fs::write(&path, &spec).expect("the specification can be written");
    assert_exit(&federation.consort(&["runs", "create", path.to_str().expect("a path is text")]), 2, &words);
    // The aggregator does not rely on the tool.
    let mut operator = RawOperator::new(&federation);
    assert_refused(operator.create(&spec).await, Code::InvalidArgument, &words);
    assert_refused(operator.create("no = [TOML").await, Code::InvalidArgument, &["TOML"]);
    assert_refused(operator.create("").await, Code::InvalidArgument, &["name", "rounds", "model"]);
    let long = format!("# {}\n{}", "x".repeat(1 << 20), tiny_spec("pilot", 3, 1));
    assert_refused(operator.create(&long).await, Code::InvalidArgument, &["longer than 1048576 bytes"]);
    assert!(federation.stored().is_empty());
    operator.create(&tiny_spec("pilot", 3, 1)).await.expect("a right one is taken");
}

#[test]
fn exit_codes_tell_a_script_what_happened() {
    let mut federation = federation();
    federation.start_run(&tiny_spec("pilot", 3, 1));
    assert_exit(&federation.consort(&["runs", "show", "pilot"]), 0, &[]);
    assert_exit(&federation.consort(&["runs", "start", "pilot"]), 1, &["cannot be started", "is active"]);
    assert_exit(&federation.consort(&["runs", "resume", "pilot"]), 1, &["cannot be resumed", "is active"]);
    assert_exit(&federation.consort(&["runs", "frobnicate"]), 2, &["frobnicate"]);
    for missing in [
        &["runs", "show", "other"][..],
        &["runs", "start", "other"],
        &["rounds", "list", "other"],
        &["rounds", "show", "pilot", "1"],
        &["clients", "show", "nobody"],
        &["checkpoints", "list", "other"],
    ] {
        assert_exit(&federation.consort(missing), 4, &["consort: "]);
    }
    // Two runs cannot be active; the second waits for the first to end.
    let path = federation.path().join("second.toml");
    fs::write(&path, tiny_spec("second", 3, 1)).expect("the specification can be written");
    assert_exit(&federation.consort(&["runs", "create", path.to_str().expect("a path is text")]), 0, &[]);
    assert_exit(
        &federation.consort(&["runs", "create", path.to_str().expect("a path is text")]),
        1,
        &["exists"],
    );
    assert_exit(&federation.consort(&["runs", "start", "second"]), 1, &["run pilot is active"]);
    assert_exit(&federation.consort(&["runs", "abort", "pilot", "--reason", "done", "--yes"]), 0, &[]);
    assert_exit(&federation.consort(&["runs", "start", "pilot"]), 1, &["aborted"]);
    assert_exit(&federation.consort(&["runs", "start", "second"]), 0, &[]);
    assert!(federation.aggregator().is_running());
    federation.kill_aggregator();
    assert_exit(&federation.consort(&["runs", "list"]), 3, &["cannot", "check"]);
}
