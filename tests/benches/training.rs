//! The training step beside PyTorch's, in eager mode, of the same model written plainly
//! (`training/reference.py`): prints a table.
//!
//! `cargo bench --profile dev -p consort-tests --bench training [-- THREADS] [--bf16]`. With the dev profile, as the
//! bindings of libtorch take minutes to compile for another one, and what is measured happens in libtorch: the same
//! version on both sides, with the same threads and `OMP_WAIT_POLICY=passive`. Both programs stay loaded and take
//! turns, a few steps each, so that both see the same machine; a ratio is the median over turns of ours to theirs.
//! Memory is the most that each process held, in all. A last row, in fp32, is ours with attention kept within documents
//! beside ours without. `--bf16` measures in bf16 beside PyTorch's autocast instead; on the CPU one small model: one
//! without products in bf16 crawls.
//!
//! `CONSORT_TEST_DEVICE=cuda` measures larger models on a GPU, where memory is the most that tensors held of the GPU's,
//! the utilisation of its peak (MFU) is printed, and the last row is in bf16. The Python that the tests make has no
//! CUDA: name one that has, with torch, in `CONSORT_TEST_PYTHON`.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};

use consort_tests::{binaries, python};
use serde_json::Value;

const TURNS: usize = 7;

struct Case {
    name: &'static str,
    /// Steps of a turn.
    steps: u32,
    model: Model,
    batch_size: u32,
    sequence_length: u32,
    /// Further lines of the specification's `[training]`.
    training: &'static str,
}

enum Model {
    Llama { vocab_size: u32, hidden_size: u32, intermediate_size: u32, layers: u32, heads: u32 },
    Gpt2 { vocab_size: u32, hidden_size: u32, layers: u32, heads: u32 },
}

const LLAMA_7M: Model =
    Model::Llama { vocab_size: 4096, hidden_size: 288, intermediate_size: 768, layers: 6, heads: 6 };
const LLAMA_124M: Model =
    Model::Llama { vocab_size: 50257, hidden_size: 768, intermediate_size: 2048, layers: 12, heads: 12 };
const LLAMA_360M: Model =
    Model::Llama { vocab_size: 50257, hidden_size: 1024, intermediate_size: 2816, layers: 24, heads: 16 };
const GPT2_124M: Model = Model::Gpt2 { vocab_size: 50257, hidden_size: 768, layers: 12, heads: 12 };

impl Model {
    /// The specification's `[model]`, for sequences of `length`.
    fn table(&self, length: u32) -> String {
        match self {
            Self::Llama { vocab_size, hidden_size, intermediate_size, layers, heads } => format!(
                "architecture = \"llama\"\nvocab_size = {vocab_size}\nhidden_size = {hidden_size}\n\
                 intermediate_size = {intermediate_size}\nnum_hidden_layers = {layers}\n\
                 num_attention_heads = {heads}\nnum_key_value_heads = {heads}\n\
                 max_position_embeddings = {length}\nrope_theta = 10000.0\nrms_norm_eps = 1e-5\n\
                 tie_word_embeddings = true"
            ),
            Self::Gpt2 { vocab_size, hidden_size, layers, heads } => format!(
                "architecture = \"gpt2\"\nvocab_size = {vocab_size}\nn_positions = {length}\n\
                 n_embd = {hidden_size}\nn_layer = {layers}\nn_head = {heads}\nlayer_norm_epsilon = 1e-5"
            ),
        }
    }
}

const BF16: &str = "precision = \"bf16\"\n";

const CASES_CPU: [Case; 3] = [
    Case { name: "llama, 7M", steps: 3, model: LLAMA_7M, batch_size: 8, sequence_length: 256, training: "" },
    Case {
        name: "llama, 124M",
        steps: 1,
        model: LLAMA_124M,
        batch_size: 2,
        sequence_length: 256,
        training: "",
    },
    Case {
        name: "gpt2, 124M",
        steps: 1,
        model: GPT2_124M,
        batch_size: 2,
        sequence_length: 256,
        training: "",
    },
];

/// Small enough for a CPU without products in bf16.
const CASES_CPU_BF16: [Case; 1] = [Case {
    name: "llama, 0.7M",
    steps: 1,
    model: Model::Llama { vocab_size: 1024, hidden_size: 128, intermediate_size: 384, layers: 2, heads: 4 },
    batch_size: 4,
    sequence_length: 128,
    training: BF16,
}];

const CASES_GPU: [Case; 1] = [Case {
    name: "llama, 124M",
    steps: 5,
    model: LLAMA_124M,
    batch_size: 16,
    sequence_length: 1024,
    training: "",
}];

const CASES_GPU_BF16: [Case; 3] = [
    Case {
        name: "llama, 124M",
        steps: 10,
        model: LLAMA_124M,
        batch_size: 16,
        sequence_length: 1024,
        training: BF16,
    },
    Case {
        name: "gpt2, 124M",
        steps: 10,
        model: GPT2_124M,
        batch_size: 16,
        sequence_length: 1024,
        training: BF16,
    },
    Case {
        name: "llama, 360M",
        steps: 5,
        model: LLAMA_360M,
        batch_size: 8,
        sequence_length: 1024,
        training: BF16,
    },
];

fn main() {
    // cargo hands its own arguments on.
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let threads = arguments.iter().find_map(|argument| argument.parse::<usize>().ok()).unwrap_or(2);
    let bf16 = arguments.iter().any(|argument| argument == "--bf16");
    let device = std::env::var("CONSORT_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned());
    let Some(python) = python::environment() else { return };
    let place = Place { device, threads: threads.to_string() };
    println!("{}, {threads} threads, {TURNS} turns, {}", place.device, if bf16 { "bf16" } else { "fp32" });
    println!("                    tokens/s             ratio                  peak memory, GB       MFU");
    println!("model            ours  PyTorch   median (least to most)          ours  PyTorch      ours");
    let cases: &[Case] = match (place.device.as_str(), bf16) {
        ("cpu", false) => &CASES_CPU,
        ("cpu", true) => &CASES_CPU_BF16,
        (_, false) => &CASES_GPU,
        (_, true) => &CASES_GPU_BF16,
    };
    let medians: Vec<f64> = cases.iter().map(|case| beside_pytorch(case, &python, &place)).collect();
    println!("mean of the medians: {:.3}", medians.iter().sum::<f64>() / medians.len() as f64);
    // In the precision that one trains in on such a device.
    if bf16 == (place.device != "cpu") {
        documents_apart(&cases[0], &place);
    }
}

/// Where both sides compute.
struct Place {
    device: String,
    threads: String,
}

impl Case {
    /// Writes its specification into `folder`, with these further lines of `[training]`.
    fn write(&self, folder: &Path, name: &str, training: &str) -> PathBuf {
        let Self { model, batch_size, sequence_length, .. } = self;
        let model = model.table(*sequence_length);
        let text = format!(
            "name = \"bench\"\nrounds = 1\n[model]\n{model}\n[training]\nbatch_size = {batch_size}\n\
             sequence_length = {sequence_length}\ngradient_clip = 1.0\n{training}"
        );
        let path = folder.join(name);
        fs::write(&path, text).expect("the specification can be written");
        path
    }
}

/// Prints the row of a case, and returns the median of its ratios.
fn beside_pytorch(case: &Case, python: &Path, place: &Place) -> f64 {
    let folder = tempfile::tempdir().expect("a temporary directory can be made");
    let specification = case.write(folder.path(), "bench.toml", case.training);
    let steps = case.steps.to_string();
    let theirs = Program::start(python::script(python, "training/bench.py").arg(&specification).args([
        &place.device,
        &place.threads,
        &steps,
    ]));
    measure(case.name, Program::ours(&specification, &steps, place), theirs)
}

/// Prints what a mask that keeps documents apart costs: ours with it, beside ours without.
fn documents_apart(case: &Case, place: &Place) {
    let folder = tempfile::tempdir().expect("a temporary directory can be made");
    let programs = ["document_mask = true\n", ""].map(|training| {
        let training = format!("{}{training}", case.training);
        let specification = case.write(folder.path(), &format!("{}.toml", training.len()), &training);
        Program::ours(&specification, &case.steps.to_string(), place)
    });
    let [with, without] = programs;
    println!("{}, documents apart (left) beside not (right):", case.name);
    measure("document_mask", with, without);
}

/// Prints a row about two programs that take turns, and returns the median of the ratios of the first to the second.
fn measure(name: &str, mut left: Program, mut right: Program) -> f64 {
    let mut turns: Vec<(Value, Value)> = (0..TURNS).map(|_| (left.turn(), right.turn())).collect();
    let number = |value: &Value, key: &str| value[key].as_f64().expect("a measurement has its numbers");
    let ratio =
        |turn: &(Value, Value)| number(&turn.0, "tokens_per_second") / number(&turn.1, "tokens_per_second");
    turns.sort_by(|left, right| ratio(left).total_cmp(&ratio(right)));
    let (left, right) = &turns[TURNS / 2];
    let gigabytes = |value: &Value| number(value, "peak_memory_bytes") / 1e9;
    let utilisation = left["model_flops_utilisation"]
        .as_f64()
        .map_or("-".to_owned(), |utilisation| format!("{:.1} %", utilisation * 100.0));
    println!(
        "{name:13} {:7.0}  {:7.0}    {:5.3} ({:.3} to {:.3})             {:5.2}    {:5.2}    {utilisation:>6}",
        number(left, "tokens_per_second"),
        number(right, "tokens_per_second"),
        ratio(&turns[TURNS / 2]),
        ratio(&turns[0]),
        ratio(&turns[TURNS - 1]),
        gigabytes(left),
        gigabytes(right),
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
    /// Our side of a specification, so many steps at a time.
    fn ours(specification: &Path, steps: &str, place: &Place) -> Self {
        let arguments =
            ["--json", "--on-line", "--steps", steps, "--device", &place.device, "--threads", &place.threads];
        Self::start(Command::new(binaries::client()).arg("bench").arg(specification).args(arguments))
    }

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
