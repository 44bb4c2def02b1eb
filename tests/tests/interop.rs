//! Checkpoints are what others load as they are: here the `transformers` library, in Python.
//!
//! The only test that needs Python packages (600 MB, kept in `.cache/venv`). Where they cannot be had it
//! says so and passes.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use consort_tests::{binaries, texts};

/// What `environment.py` exits with where packages cannot be had.
const CANNOT_BE_HAD: i32 = 77;

/// Letters of one to four bytes, a combining one, a blank at both ends, a line's end.
const TEXT: &str = " Zürich, naïve e\u{301}tude: 東京 €5 🦀\n\tthe round ends ";

// Weights large enough for attention to matter to the logits.
const LLAMA: &str = r#"initializer_range = 0.1
architecture = "llama"
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 128"#;

const GPT2: &str = r#"initializer_range = 0.1
architecture = "gpt2"
n_embd = 32
n_layer = 2
n_head = 4
n_positions = 128"#;

/// The Python of an environment with `transformers`; none where it cannot be had, after saying so.
fn python() -> Option<PathBuf> {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = Command::new("python3")
        .arg(tests.join("interop/environment.py"))
        .arg(tests.parent().expect("the workspace holds this package").join(".cache/venv"))
        .stderr(Stdio::inherit())
        .output();
    let output = match output {
        Ok(output) => output,
        Err(error) => {
            eprintln!("SKIPPED: python3 cannot be run: {error}");
            return None;
        }
    };
    if output.status.code() == Some(CANNOT_BE_HAD) {
        eprintln!("SKIPPED: no Python environment with transformers (the reason is above)");
        return None;
    }
    assert!(output.status.success(), "the Python environment cannot be made");
    Some(PathBuf::from(String::from_utf8(output.stdout).expect("a path is text").trim()))
}

/// What a command prints; it must succeed.
#[track_caller]
fn printed(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// Trains `model` for a few steps and compares what both sides make of the checkpoint.
#[track_caller]
fn check(python: &Path, model: &str) {
    let folder = tempfile::tempdir().expect("a temporary directory can be made");
    let path = |name: &str| folder.path().join(name);
    texts::write(&path("data"), 1, 50);
    let training = "[training]\nlocal_steps = 3\nbatch_size = 2\nsequence_length = 64\n";
    let spec = format!("name = \"interop\"\nrounds = 1\n[model]\n{model}\n{training}");
    fs::write(path("spec.toml"), spec).expect("the specification can be written");
    let client = || {
        let mut client = Command::new(binaries::client());
        client.current_dir(folder.path());
        client
    };
    let device = ["--device", "cpu", "--threads", "1"];
    printed(
        client()
            .args(["train", "spec.toml", "--data", "data", "--out", "checkpoint", "--steps", "3"])
            .args(device),
    );
    let tokens: Vec<String> = TEXT.bytes().map(|byte| byte.to_string()).collect();
    let logits = printed(client().args(["logits", "checkpoint", "--tokens", &tokens.join(" ")]).args(device));
    fs::write(path("logits.json"), logits).expect("the logits can be written");
    let compared = printed(
        Command::new(python)
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("interop/compare.py"))
            .args([path("checkpoint").as_os_str(), TEXT.as_ref(), path("logits.json").as_os_str()])
            .envs([("HF_HUB_OFFLINE", "1"), ("OMP_NUM_THREADS", "1")]),
    );
    eprint!("{}", String::from_utf8_lossy(&compared));
}

#[test]
fn the_exported_checkpoint_loads_in_transformers_with_the_same_logits() {
    let Some(python) = python() else { return };
    for tied in [true, false] {
        check(&python, &format!("{LLAMA}\ntie_word_embeddings = {tied}"));
    }
    check(&python, GPT2);
}
