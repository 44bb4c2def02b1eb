//! What README.md and the files that it points to say is so.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use consort_tests::{TestFederation, binaries};

/// A file of the checkout.
fn file(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

fn text(path: &str) -> String {
    fs::read_to_string(file(path)).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn binary(name: &str) -> Option<PathBuf> {
    match name {
        "consort" => Some(binaries::consort()),
        "consort-aggregator" => Some(binaries::aggregator()),
        "consort-client" => Some(binaries::client()),
        _ => None,
    }
}

fn run(program: &str, arguments: &[&str]) -> Output {
    let program = binary(program).unwrap_or_else(|| panic!("no program {program}"));
    Command::new(program).args(arguments).output().expect("a program can be run")
}

/// The command must succeed.
#[track_caller]
fn succeeds(command: &mut Command) {
    let output = command.output().expect("a program can be run");
    let [printed, errors] = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes));
    assert!(output.status.success(), "{command:?}: {}\n{printed}{errors}", output.status);
}

/// The commands of ours that a text names, in blocks of code and between backticks, each as its words.
fn commands(markdown: &str) -> Vec<Vec<String>> {
    let blocks = markdown.split("```").skip(1).step_by(2).filter_map(|block| block.strip_prefix("sh\n"));
    let lines = blocks.flat_map(str::lines);
    let prose: String = markdown.split("```").step_by(2).collect();
    let spans: Vec<&str> = prose.split('`').skip(1).step_by(2).collect();
    lines
        .chain(spans)
        .map(|line| {
            line.split(" #").next().unwrap_or_default().split_whitespace().map(str::to_owned).collect()
        })
        .filter(|words: &Vec<String>| words.first().is_some_and(|word| binary(word).is_some()))
        .collect()
}

#[test]
fn every_command_in_the_readme_exists_with_its_options() {
    let commands = commands(&text("README.md"));
    assert!(commands.len() > 10, "{commands:?}");
    for words in commands {
        // What comes before `--help` is parsed, and refused if it is unknown.
        let [program, arguments @ ..] = &words[..] else { continue };
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).chain(["--help"]).collect();
        let output = run(program, &arguments);
        assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn a_command_that_does_not_exist_would_be_noticed() {
    let markdown =
        "Text `consort runs sing` and\n```sh\nconsort runs list --loudly   # a comment\ncargo b\n```\n";
    let commands = commands(markdown);
    assert_eq!(commands, [vec!["consort", "runs", "list", "--loudly"], vec!["consort", "runs", "sing"]]);
    for words in commands {
        let arguments: Vec<&str> = words[1..].iter().map(String::as_str).chain(["--help"]).collect();
        assert!(!run(&words[0], &arguments).status.success(), "{words:?}");
    }
}

#[test]
fn the_programs_print_the_reference_files_that_the_readme_names() {
    let readme = text("README.md");
    for (path, command) in [
        ("common/src/spec/reference.toml", "consort runs reference"),
        ("aggregator/src/config.reference.toml", "consort-aggregator reference"),
        ("client/src/client.reference.toml", "consort-client reference"),
    ] {
        assert!(readme.contains(&format!("({path})")) && readme.contains(command), "{command}");
        let words: Vec<&str> = command.split(' ').collect();
        let output = run(words[0], &words[1..]);
        assert!(output.status.success(), "{command}");
        assert_eq!(String::from_utf8(output.stdout).expect("a reference is text"), text(path), "{command}");
    }
}

#[test]
fn the_specifications_that_come_along_are_valid() {
    for path in ["deploy/demo.toml", "common/src/spec/reference.toml"] {
        succeeds(Command::new(binaries::consort()).args(["runs", "check"]).arg(file(path)));
    }
}

#[test]
fn the_programs_take_the_configurations_of_the_kits_as_they_are() {
    let mut federation = TestFederation::new(&["bank"]);
    federation.start_aggregator();
    // The operator's is used by this, as written.
    federation.json(&["runs", "list"]);
    let mut check = Command::new(binaries::client());
    check.args(["check", "--config"]).arg(federation.kit("site-bank").join("client.toml"));
    succeeds(check.env("CONSORT_CLIENT_ENDPOINT", federation.endpoint()));
    federation.kill_aggregator();
    // Another aggregator may have the port that a kit names.
    let mut check = Command::new(binaries::aggregator());
    check.env("CONSORT_AGGREGATOR_LISTEN", "127.0.0.1:0");
    succeeds(
        check.arg("--check").arg("--config").arg(federation.kit("aggregator-main").join("aggregator.toml")),
    );
}
