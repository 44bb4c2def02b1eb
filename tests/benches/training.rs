//! The training step beside PyTorch's, in eager mode, of the same model written plainly
//! (`training/reference.py`): prints a table.
//!
//! `cargo bench --profile dev -p consort-tests --bench training [-- THREADS]`. With the dev profile, as the bindings of
//! libtorch take minutes to compile for another one, and what is measured happens in libtorch: the same version
//! on both sides, with the same threads and `OMP_WAIT_POLICY=passive`. Both programs stay loaded and take turns, a
//! few steps each, so that both see the same machine; a ratio is the median over turns of ours to theirs. Memory
//! is the most that each process held, in all. `CONSORT_TEST_DEVICE` chooses the device; on a GPU the
//! utilisation of its peak (MFU) is printed too.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use consort_tests::{binaries, python};
use serde_json::Value;

const TURNS: usize = 7;

struct Case {
    name: &'static str,
    /// Steps of a turn.
    steps: u32,
    model: &'static str,
    batch_size: u32,
    sequence_length: u32,
}

const CASES: [Case; 3] = [
    Case {
        name: "llama, 7M",
        steps: 3,
        model: r#"architecture = "llama"
vocab_size = 4096
hidden_size = 288
intermediate_size = 768
num_hidden_layers = 6
num_attention_heads = 6
num_key_value_heads = 6
max_position_embeddings = 256
rope_theta = 10000.0
rms_norm_eps = 1e-5
tie_word_embeddings = true"#,
        batch_size: 8,
        sequence_length: 256,
    },
    Case {
        name: "llama, 124M",
        steps: 1,
        model: r#"architecture = "llama"
vocab_size = 50257
hidden_size = 768
intermediate_size = 2048
num_hidden_layers = 12
num_attention_heads = 12
num_key_value_heads = 12
max_position_embeddings = 256
rope_theta = 10000.0
rms_norm_eps = 1e-5
tie_word_embeddings = true"#,
        batch_size: 2,
        sequence_length: 256,
    },
    Case {
        name: "gpt2, 124M",
        steps: 1,
        model: r#"architecture = "gpt2"
vocab_size = 50257
n_positions = 256
n_embd = 768
n_layer = 12
n_head = 12
layer_norm_epsilon = 1e-5"#,
        batch_size: 2,
        sequence_length: 256,
    },
];

fn main() {
    // cargo hands its own arguments on.
    let threads = std::env::args().skip(1).find_map(|argument| argument.parse::<usize>().ok()).unwrap_or(2);
    let device = std::env::var("CONSORT_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned());
    let Some(python) = python::environment() else { return };
    println!("{device}, {threads} threads, {TURNS} turns");
    println!("                    tokens/s             ratio                  peak memory, GB       MFU");
    println!("model            ours  PyTorch   median (least to most)          ours  PyTorch      ours");
    let mut medians = Vec::new();
    for case in &CASES {
        medians.push(measure(case, &python, &device, threads));
    }
    println!("mean of the medians: {:.3}", medians.iter().sum::<f64>() / medians.len() as f64);
}

/// Prints the row of a case, and returns the median of its ratios.
fn measure(case: &Case, python: &Path, device: &str, threads: usize) -> f64 {
    let folder = tempfile::tempdir().expect("a temporary directory can be made");
    let specification = folder.path().join("bench.toml");
    let Case { model, batch_size, sequence_length, .. } = case;
    let text = format!(
        "name = \"bench\"\nrounds = 1\n[model]\n{model}\n[training]\nbatch_size = {batch_size}\n\
         sequence_length = {sequence_length}\ngradient_clip = 1.0\n"
    );
    fs::write(&specification, text).expect("the specification can be written");
    let (threads, steps) = (threads.to_string(), case.steps.to_string());
    let mut ours = Program::start(Command::new(binaries::client()).arg("bench").arg(&specification).args([
        "--json",
        "--on-line",
        "--steps",
        &steps,
        "--device",
        device,
        "--threads",
        &threads,
    ]));
    let mut theirs = Program::start(
        python::script(python, "training/bench.py").arg(&specification).args([device, &threads, &steps]),
    );
    let mut turns: Vec<(Value, Value)> = (0..TURNS).map(|_| (ours.turn(), theirs.turn())).collect();
    let number = |value: &Value, key: &str| value[key].as_f64().expect("a measurement has its numbers");
    let ratio =
        |turn: &(Value, Value)| number(&turn.0, "tokens_per_second") / number(&turn.1, "tokens_per_second");
    turns.sort_by(|left, right| ratio(left).total_cmp(&ratio(right)));
    let (ours, theirs) = &turns[TURNS / 2];
    let gigabytes = |value: &Value| number(value, "peak_memory_bytes") / 1e9;
    let utilisation = ours["model_flops_utilisation"]
        .as_f64()
        .map_or("-".to_owned(), |utilisation| format!("{:.1} %", utilisation * 100.0));
    println!(
        "{:12}  {:7.0}  {:7.0}    {:5.3} ({:.3} to {:.3})             {:5.2}    {:5.2}    {utilisation:>6}",
        case.name,
        number(ours, "tokens_per_second"),
        number(theirs, "tokens_per_second"),
        ratio(&turns[TURNS / 2]),
        ratio(&turns[0]),
        ratio(&turns[TURNS - 1]),
        gigabytes(ours),
        gigabytes(theirs),
    );
    ratio(&turns[TURNS / 2])
}

/// A program that measures once for each line that it is sent.
struct Program {
    child: Child,
    input: Option<ChildStdin>,
    output: BufReader<ChildStdout>,
}

impl Program {
    fn start(command: &mut Command) -> Self {
        let mut child = command
            .env("OMP_WAIT_POLICY", "passive")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error}"));
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().expect("its output is piped"));
        Self { child, input, output }
    }

    fn turn(&mut self) -> Value {
        let input = self.input.as_mut().expect("it was not told to end");
        writeln!(input).expect("the program reads");
        let mut line = String::new();
        self.output.read_line(&mut line).expect("the program's output is text");
        serde_json::from_str(&line).expect("a measurement is one line of JSON: the reason is above")
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // The end of its input ends it.
        self.input = None;
        let _ = self.child.wait();
    }
}
