//! `consort-client train`: whatever instant it is killed at, it goes on to the same losses and the same weights.
//!
//! CPU, one thread unless said otherwise. A checkpoint is under way nearly all the time, so that kills hit its writing.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use consort_tests::{
    Process, binaries,
    process::{wait_closely_for, wait_for},
    texts,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

const SPEC: &str = r#"
name = "alone"
seed = 5
rounds = 10

[model]
architecture = "llama"
hidden_size = 64
intermediate_size = 128
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
max_position_embeddings = 32

[training]
local_steps = 100
batch_size = 4
sequence_length = 32
schedule = { kind = "cosine", warmup_steps = 20 }

[evaluation]
held_out_fraction = 0.1
tokens_max = 640
"#;

/// A folder with a specification and a text, where trainings are made.
struct Workplace {
    folder: tempfile::TempDir,
    /// Of libtorch.
    threads: u32,
}

impl Workplace {
    fn with_threads(threads: u32) -> Self {
        // Built before anything is timed.
        binaries::client();
        let folder = tempfile::tempdir().expect("a temporary directory");
        fs::write(folder.path().join("spec.toml"), SPEC).expect("the specification can be written");
        texts::write(&folder.path().join("data"), 1, 300);
        Self { folder, threads }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The command that trains `name`, with further arguments.
    fn command(&self, name: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(binaries::client());
        command
            .current_dir(self.folder.path())
            .args(["train", "spec.toml", "--data", "data", "--out", name])
            .args(["--device", "cpu", "--checkpoint-seconds", "0"])
            .arg(format!("--threads={}", self.threads))
            .args(["--log-every", "1", "--evaluate-every", "100"])
            .args(arguments);
        command
    }

    fn start(&self, name: &str, arguments: &[&str]) -> Process {
        Process::start(&mut self.command(name, arguments), &self.path(&format!("{name}.log")))
    }

    /// Trains `name` to its end; how long that took.
    fn finish(&self, name: &str, arguments: &[&str]) -> Duration {
        let begin = Instant::now();
        let mut process = self.start(name, arguments);
        assert!(process.wait().success(), "{}", process.output());
        begin.elapsed()
    }

    /// The metrics' columns that do not tell of time.
    fn rows(&self, name: &str) -> Vec<Vec<String>> {
        let table = fs::read_to_string(self.path(&format!("{name}.training/metrics.csv")));
        let table = table.expect("the metrics are there");
        let columns: Vec<&str> =
            table.lines().next().expect("the metrics have a header").split(',').collect();
        let timed = ["tokens_per_second", "waited_share", "seconds"];
        let kept = |row: &str| {
            let values = row.split(',').zip(&columns).filter(|(_, column)| !timed.contains(column));
            values.map(|(value, _)| value.to_owned()).collect()
        };
        table.lines().skip(1).map(kept).collect()
    }

    /// Both must be what the other is.
    fn compare(&self, name: &str, expected: &str) {
        assert_eq!(self.rows(name), self.rows(expected));
        assert_eq!(digests(&self.path(name)), digests(&self.path(expected)));
    }
}

/// The files of a checkpoint with their digests, by name.
fn digests(checkpoint: &Path) -> Vec<(String, String)> {
    let entries = fs::read_dir(checkpoint).expect("the checkpoint is there");
    let mut files: Vec<(String, String)> = entries
        .map(|entry| {
            let entry = entry.expect("the checkpoint can be read");
            let bytes = fs::read(entry.path()).expect("the checkpoint can be read");
            (entry.file_name().to_string_lossy().into_owned(), blake3::hash(&bytes).to_string())
        })
        .collect();
    files.sort();
    files
}

/// Trains undisturbed, and again with so many kills, the first at the first checkpoint, each of the others within a share
/// of the time that the whole takes; both must come to the same.
fn check_random_kills(workplace: &Workplace, kills: u32, longest_share: f64) {
    let given = std::env::var("CONSORT_KILL_SEED").ok();
    let seed = given.map_or_else(rand::random, |seed| seed.parse().expect("CONSORT_KILL_SEED is a number"));
    println!("replay with CONSORT_KILL_SEED={seed}");
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let whole = workplace.finish("quiet", &[]);
    let checkpoint = workplace.path("killed.training/training.checkpoint");
    for kill in 1..=kills {
        let mut process = workplace.start("killed", &[]);
        if kill == 1 {
            wait_closely_for("the first checkpoint", || {
                assert!(checkpoint.exists() || process.is_running(), "{}", process.output());
                checkpoint.exists().then_some(())
            });
        } else {
            // The instant is the fault that is injected, not a wait for something. All such parts do not make
            // the whole, since each begins with the start of a process.
            std::thread::sleep(whole.mul_f64(random.random_range(0.0..longest_share)));
        }
        if !process.is_running() {
            // The machine was busier when it trained undisturbed.
            assert!(kill > kills / 2, "kill {kill} came too late to matter; make the training longer");
            assert!(process.wait().success(), "{}", process.output());
            break;
        }
        process.kill();
    }
    if !workplace.path("killed").exists() {
        workplace.finish("killed", &[]);
    }
    let log = fs::read_to_string(workplace.path("killed.log")).expect("the log is there");
    assert!(log.contains("going on after step"), "no kill hit a training with a checkpoint:\n{log}");
    workplace.compare("killed", "quiet");
    assert_eq!(workplace.rows("quiet").len(), 1 + 1000);
}

#[test]
fn ten_random_kills_of_local_training_change_no_loss_and_no_weight() {
    check_random_kills(&Workplace::with_threads(1), 10, 0.15);
}

#[test]
fn nor_do_random_kills_of_local_training_with_two_threads() {
    check_random_kills(&Workplace::with_threads(2), 5, 0.25);
}

#[test]
fn local_training_that_is_asked_to_stop_says_how_to_go_on_and_does() {
    let workplace = Workplace::with_threads(1);
    workplace.finish("quiet", &[]);
    let process = workplace.start("stopped", &[]);
    let metrics = workplace.path("stopped.training/metrics.csv");
    wait_for("some rows", || (fs::read_to_string(&metrics).ok()?.lines().count() > 50).then_some(()));
    assert_eq!(process.terminate().code(), Some(1));
    assert!(!workplace.path("stopped").exists(), "there is no model before the end");
    let log = fs::read_to_string(workplace.path("stopped.log")).expect("the log is there");
    let said = log.lines().last().unwrap_or_default();
    assert!(said.contains("stopped after step") && said.contains("the same command goes on"), "{log}");
    workplace.finish("stopped", &[]);
    workplace.compare("stopped", "quiet");
    // What it went on with has gone, and the next training of this name is a new one.
    let left = |name: &str| workplace.path("stopped.training").join(name).exists();
    assert_eq!(["training.checkpoint", "text", "metrics.csv"].map(left), [false, false, true]);
}

#[test]
fn a_training_starts_from_a_checkpoint_with_phases_of_its_own() {
    let workplace = Workplace::with_threads(1);
    workplace.finish("first", &["--steps", "100"]);
    workplace.finish("second", &["--steps", "100", "--from", "first"]);
    let (first, second) = (workplace.rows("first"), workplace.rows("second"));
    let number = |rows: &[Vec<String>], row: usize, column: usize| -> f64 {
        rows[row][column].parse().unwrap_or_else(|_| panic!("{:?}", rows[row]))
    };
    // step, tokens, loss, learning rate, gradient norm, held-out loss
    let ([rate, held_out], last) = ([3, 5], first.len() - 1);
    assert_eq!(
        number(&second, 0, held_out),
        number(&first, last, held_out),
        "it begins where the other ended"
    );
    assert!(number(&second, last, held_out) < number(&first, last, held_out));
    assert_eq!(number(&second, 1, rate), number(&first, 1, rate), "it is warmed up again");

    // What the specification leaves out is the checkpoint's.
    let (head, training) = (SPEC.split("[model]").next().unwrap_or_default(), SPEC.find("[training]"));
    let least = format!("{head}start.checkpoint = \"first\"\n{}", &SPEC[training.expect("a section")..]);
    fs::write(workplace.path("spec.toml"), least).expect("the specification can be written");
    workplace.finish("again", &["--steps", "0"]);
    assert_eq!(number(&workplace.rows("again"), 0, held_out), number(&first, last, held_out));

    let other = SPEC.replace("hidden_size = 64", "hidden_size = 32");
    fs::write(workplace.path("spec.toml"), other).expect("the specification can be written");
    let refused = workplace.command("third", &["--from", "first"]).output().expect("a program can be run");
    let errors = String::from_utf8_lossy(&refused.stderr);
    assert!(!refused.status.success() && errors.contains("first") && errors.contains("64"), "{errors}");
}

#[test]
fn what_is_measured_at_the_end_of_training_is_what_evaluate_measures() {
    for document_mask in [false, true] {
        let workplace = Workplace::with_threads(1);
        let mask = format!("document_mask = {document_mask}\n\n[evaluation]");
        fs::write(workplace.path("spec.toml"), SPEC.replace("[evaluation]", &mask))
            .expect("the specification can be written");
        // Documents so short that all sequences have several.
        let document = |number: u32| format!("{{\"text\": \"{number} is {number}.\"}}\n");
        let documents: String = (1000..4000).map(document).collect();
        fs::write(workplace.path("data/corpus.jsonl"), documents).expect("the text can be written");
        let trained = json(&mut workplace.command("model", &["--steps", "100", "--json"]));
        // Whether documents are kept apart, the checkpoint says.
        let evaluated = evaluate(&workplace, &[]);
        assert_eq!(
            (&trained["tokens"], &trained["text_bytes"]),
            (&evaluated["tokens"], &evaluated["text_bytes"])
        );
        assert!((loss(&trained) - loss(&evaluated)).abs() < 1e-4, "{trained} {evaluated}");
        let otherwise = evaluate(&workplace, &[&format!("--document-mask={}", !document_mask)]);
        assert!((loss(&otherwise) - loss(&evaluated)).abs() > 1e-4, "{otherwise} {evaluated}");
    }
}

/// What `evaluate` says of the checkpoint `model` on the text that training held out.
fn evaluate(workplace: &Workplace, arguments: &[&str]) -> Value {
    json(
        Command::new(binaries::client())
            .current_dir(workplace.folder.path())
            .args(["evaluate", "model", "data", "--held-out-only", "--held-out-fraction", "0.1"])
            .args([
                "--sequence-length",
                "32",
                "--tokens-max",
                "640",
                "--json",
                "--device",
                "cpu",
                "--threads",
                "1",
            ])
            .args(arguments),
    )
}

fn loss(value: &Value) -> f64 {
    value["loss"].as_f64().expect("a loss is a number")
}

/// The JSON document that a command prints.
fn json(command: &mut Command) -> Value {
    let output = command.output().expect("a program can be run");
    let errors = String::from_utf8_lossy(&output.stderr);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}\n{errors}"))
}
