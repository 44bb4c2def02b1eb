//! Data preparation beside Python's `tokenizers`: megabytes of text per second with a BPE tokenizer trained on the
//! same text, and the memory that it takes. Prints a table.
//!
//!     deploy/corpora && cargo bench -p consort-tests --bench data -- --megabytes 1000
//!
//! The corpus is made of the documents of the demo's sites: shuffled with a seed, and again until there is enough,
//! each behind a line of its own, so that none is a duplicate. Both sides read the same .jsonl files with all
//! cores. Ours is `consort-client data prepare` as a whole (reading, duplicates, hold-out, encoding, shards and
//! their digests, all made durable); Python's is reading and encoding alone. They take turns, and each side's best
//! turn counts. The tokens must be the same.

use std::{
    fs::{self, File},
    io::{BufWriter, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use clap::Parser;
use consort_tests::{Process, binaries};
use rand::{Rng, SeedableRng, seq::SliceRandom};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

/// Bytes of one file of the corpus.
const FILE_BYTES: usize = 50_000_000;
const MEGABYTE: f64 = 1e6;
/// Between two looks at a process's memory; the system keeps its peak.
const POLL: Duration = Duration::from_millis(20);

/// What to measure.
#[derive(Parser)]
struct Arguments {
    /// Megabytes of text.
    #[arg(long, default_value_t = 100)]
    megabytes: usize,
    /// Tokens of the tokenizer.
    #[arg(long, default_value_t = 32_768)]
    vocabulary: u32,
    /// Turns of both sides.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u32).range(1..))]
    turns: u32,
    /// Leave Python out: memory and our own speed.
    #[arg(long)]
    no_python: bool,
    /// Given by `cargo bench`.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() {
    let arguments = Arguments::parse();
    let (client, consort) = (binaries::client(), binaries::consort());
    let folder = tempfile::tempdir().expect("a temporary directory can be made");
    let path = |name: &str| folder.path().join(name);
    let corpora = root().join(".cache/corpora");
    let bytes = write_corpus(&corpora, &path("text"), arguments.megabytes * 1_000_000);
    let vocabulary = arguments.vocabulary.to_string();
    run(Command::new(&consort)
        .args(["tokenizer", "train", "--vocabulary", &vocabulary, "--data"])
        .arg(&corpora)
        .arg("--out")
        .arg(path("tokenizer.json")));
    let specification = format!(
        "name = \"data\"\nrounds = 1\n[model]\narchitecture = \"llama\"\nvocab_size = {vocabulary}\n[tokenizer]\nkind = \
         \"file\"\npath = \"tokenizer.json\"\nend_of_text = \"<|endoftext|>\"\n"
    );
    fs::write(path("run.toml"), specification).expect("the specification can be written");
    println!(
        "{:.0} MB of text in .jsonl files, a BPE tokenizer of {vocabulary} tokens",
        bytes as f64 / MEGABYTE
    );

    let python = if arguments.no_python { None } else { python() };
    let mut ours: Option<Ours> = None;
    let mut theirs: Option<Value> = None;
    for _ in 0..arguments.turns {
        let turn = prepare(&client, folder.path());
        println!("  turn: consort {:.1} MB/s", turn.rate(bytes));
        if ours.as_ref().is_none_or(|best| turn.seconds < best.seconds) {
            ours = Some(turn);
        }
        if let Some(python) = &python {
            let turn = encode_in_python(python, folder.path());
            println!("  turn: Python {:.1} MB/s", bytes as f64 / MEGABYTE / fastest(&turn));
            if theirs.as_ref().is_none_or(|best| fastest(&turn) < fastest(best)) {
                theirs = Some(turn);
            }
        }
    }
    let ours = ours.expect("there is a turn");
    println!("\n                                   MB/s   peak memory");
    println!(
        "consort-client data prepare     {:7.1}   {:8.0} MB",
        ours.rate(bytes),
        ours.peak_bytes as f64 / MEGABYTE
    );
    let Some(theirs) = theirs else { return };
    for way in ["encode_batch", "encode_batch_fast"] {
        let seconds = theirs[way]["seconds"].as_f64().expect("the script prints seconds");
        println!("Python {way:24} {:7.1}", bytes as f64 / MEGABYTE / seconds);
        // Ours ends every document with a token.
        let tokens = theirs[way]["tokens"].as_u64().expect("the script prints tokens");
        assert_eq!(ours.tokens, tokens + ours.documents, "both sides make the same tokens");
    }
    println!(
        "tokenizers {}; ratio to the faster one: {:.2}",
        theirs["version"].as_str().unwrap_or_default(),
        fastest(&theirs) / ours.seconds
    );
}

/// The checkout.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Runs a command that must succeed.
fn run(command: &mut Command) -> Vec<u8> {
    let output = command.stderr(Stdio::inherit()).output().expect("the command can be run");
    assert!(output.status.success(), "{command:?} failed");
    output.stdout
}

/// The documents of the demo's sites.
fn documents(corpora: &Path) -> Vec<String> {
    let mut documents = Vec::new();
    let sites = fs::read_dir(corpora).unwrap_or_else(|error| panic!("run deploy/corpora first: {error}"));
    let folders =
        sites.map(|entry| entry.expect("the corpora can be read").path()).filter(|path| path.is_dir());
    let files = folders.flat_map(|folder| fs::read_dir(folder).expect("a site's folder can be read"));
    let mut paths: Vec<PathBuf> =
        files.map(|entry| entry.expect("a site's folder can be read").path()).collect();
    paths.sort();
    for path in paths {
        let text = fs::read_to_string(&path).expect("the corpora are UTF-8");
        if path.extension().is_some_and(|extension| extension == "jsonl") {
            let texts = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("a line is JSON"));
            documents.extend(texts.filter_map(|line| line["text"].as_str().map(str::to_owned)));
        } else {
            documents.push(text);
        }
    }
    documents
}

/// Writes a corpus of about `bytes` of text; returns how many they are.
fn write_corpus(corpora: &Path, folder: &Path, bytes: usize) -> usize {
    fs::create_dir(folder).expect("the corpus can be written");
    let mut documents = documents(corpora);
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let (mut written, mut in_file, mut files) = (0, usize::MAX, 0);
    let mut file: Option<BufWriter<File>> = None;
    while written < bytes {
        documents.shuffle(&mut random);
        for document in &documents {
            if in_file >= FILE_BYTES {
                let path = folder.join(format!("{files:04}.jsonl"));
                file = Some(BufWriter::new(File::create(path).expect("the corpus can be written")));
                (in_file, files) = (0, files + 1);
            }
            let text = format!("Copy {:016x} of a document.\n{document}", random.random::<u64>());
            (written, in_file) = (written + text.len(), in_file + text.len());
            let line = json!({ "text": text }).to_string();
            let file = file.as_mut().expect("a file is open");
            writeln!(file, "{line}").expect("the corpus can be written");
            if written >= bytes {
                break;
            }
        }
    }
    written
}

/// A turn of ours.
struct Ours {
    seconds: f64,
    tokens: u64,
    documents: u64,
    peak_bytes: u64,
}

impl Ours {
    /// Megabytes of text per second.
    fn rate(&self, bytes: usize) -> f64 {
        bytes as f64 / MEGABYTE / self.seconds
    }
}

fn prepare(client: &Path, folder: &Path) -> Ours {
    let (cache, log) = (folder.join("cache"), folder.join("prepare.log"));
    for old in [&cache, &log] {
        let _ = fs::remove_dir_all(old).or_else(|_| fs::remove_file(old));
    }
    let began = Instant::now();
    let mut command = Command::new(client);
    command.args(["data", "prepare"]).arg(folder.join("run.toml")).arg("--data").arg(folder.join("text"));
    let mut process = Process::start(command.arg("--cache").arg(&cache).arg("--json"), &log);
    let mut peak_bytes = 0;
    while process.is_running() {
        peak_bytes = peak_memory_bytes(process.id()).unwrap_or(peak_bytes);
        std::thread::sleep(POLL);
    }
    let seconds = began.elapsed().as_secs_f64();
    let printed = process.output();
    let json = printed.lines().find(|line| line.starts_with('{')).unwrap_or_else(|| panic!("{printed}"));
    let total = &serde_json::from_str::<Value>(json).expect("--json prints JSON")["stats"]["total"];
    let number = |key: &str| total[key].as_u64().expect("statistics are numbers");
    assert_eq!((number("duplicates"), number("skipped"), number("blank")), (0, 0, 0));
    Ours { seconds, tokens: number("tokens"), documents: number("documents"), peak_bytes }
}

/// The most memory that a process had resident so far; nothing once it has ended.
fn peak_memory_bytes(id: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{id}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().trim_end_matches(" kB").parse::<u64>().ok()? * 1024)
}

/// The Python that has `tokenizers`; none where packages cannot be had.
fn python() -> Option<PathBuf> {
    let output = Command::new("python3")
        .arg(root().join("tests/interop/environment.py"))
        .arg(root().join(".cache/venv"))
        .stderr(Stdio::inherit())
        .output()
        .ok()?;
    output.status.success().then(|| PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()))
}

fn encode_in_python(python: &Path, folder: &Path) -> Value {
    let script = root().join("tests/benches/data.py");
    let printed =
        run(Command::new(python).arg(script).args([folder.join("tokenizer.json"), folder.join("text")]));
    serde_json::from_slice(&printed).expect("the script prints JSON")
}

fn fastest(turn: &Value) -> f64 {
    let seconds = |way: &str| turn[way]["seconds"].as_f64().expect("the script prints seconds");
    seconds("encode_batch").min(seconds("encode_batch_fast"))
}
