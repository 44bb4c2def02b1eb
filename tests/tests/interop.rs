//! Checkpoints are what others load as they are, and theirs are what we load: here the `transformers`
//! library, in Python.
//!
//! The only tests that need Python packages (600 MB, kept in `.cache/venv`). Where they cannot be had they
//! say so and pass.

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use consort_common::{
    checkpoint,
    model::{
        Architecture, Gpt2Config, Init, LlamaConfig, MptAttentionConfig, MptConfig, RopeScaling, RopeType,
        TensorSpec,
    },
    tokenizer::{BYTE_END_OF_TEXT, BYTE_END_OF_TEXT_ID, byte_tokenizer_json},
};
use consort_tests::{binaries, python, texts};
use proptest::{
    prelude::*,
    strategy::ValueTree,
    test_runner::{RngAlgorithm, TestRng, TestRunner},
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Letters of one to four bytes, a combining one, a blank at both ends, a line's end.
const TEXT: &str = " Zürich, naïve e\u{301}tude: 東京 €5 🦀\n\tthe round ends ";

// Weights large enough for attention to matter to the logits.
const MODELS: [(&str, &str); 4] = [
    (
        "llama-tied",
        r#"initializer_range = 0.1
architecture = "llama"
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 128"#,
    ),
    (
        "llama-untied",
        r#"initializer_range = 0.1
tie_word_embeddings = false
architecture = "llama"
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 4
max_position_embeddings = 128"#,
    ),
    (
        "gpt2",
        r#"initializer_range = 0.1
architecture = "gpt2"
n_embd = 32
n_layer = 2
n_head = 4
n_positions = 128"#,
    ),
    (
        "mpt",
        r#"initializer_range = 0.1
architecture = "mpt"
d_model = 32
n_layers = 2
n_heads = 4
max_seq_len = 128"#,
    ),
];

/// What a command prints; it must succeed.
#[track_caller]
fn printed(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

fn client(folder: &Path) -> Command {
    let mut client = Command::new(binaries::client());
    client.current_dir(folder).env("CONSORT_LOG", "error");
    client
}

/// What our client prints about `tokens` and a checkpoint in `folder`.
#[track_caller]
fn our_logits(folder: &Path, checkpoint: &str, tokens: &[i64]) -> Vec<u8> {
    let tokens: Vec<String> = tokens.iter().map(ToString::to_string).collect();
    let tokens = tokens.join(" ");
    let device = ["--device", "cpu", "--threads", "1"];
    printed(client(folder).args(["logits", checkpoint, "--tokens", &tokens]).args(device))
}

/// Runs a script of `interop/`, shows what it prints.
#[track_caller]
fn run_script(python: &Path, script: &str, arguments: &[&std::ffi::OsStr]) {
    let printed = printed(
        Command::new(python)
            .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("interop").join(script))
            .args(arguments)
            .envs([("HF_HUB_OFFLINE", "1"), ("OMP_NUM_THREADS", "1")]),
    );
    eprint!("{}", String::from_utf8_lossy(&printed));
}

#[test]
fn the_exported_checkpoint_loads_in_transformers_with_the_same_logits() {
    let Some(python) = python::environment() else { return };
    let folder = tempfile::tempdir().expect("a temporary directory can be made");
    let path = |name: &str| folder.path().join(name);
    texts::write(&path("data"), 1, 50);
    fs::create_dir(path("checkpoints")).expect("a directory can be made");
    let tokens: Vec<i64> = TEXT.bytes().map(i64::from).collect();
    for (name, model) in MODELS {
        let training = "[training]\nlocal_steps = 3\nbatch_size = 2\nsequence_length = 64\n";
        let spec = format!("name = \"interop\"\nrounds = 1\n[model]\n{model}\n{training}");
        fs::write(path("spec.toml"), spec).expect("the specification can be written");
        let checkpoint = format!("checkpoints/{name}");
        printed(
            client(folder.path())
                .args(["train", "spec.toml", "--data", "data", "--out", &checkpoint, "--steps", "3"])
                .args(["--device", "cpu", "--threads", "1"]),
        );
        let logits = our_logits(folder.path(), &checkpoint, &tokens);
        fs::write(path(&checkpoint).with_extension("json"), logits).expect("the logits can be written");
    }
    run_script(&python, "compare.py", &[path("checkpoints").as_os_str(), TEXT.as_ref()]);
}

/// Random models that are compared.
const RANDOM_MODELS: u64 = 24;
/// Largest difference of a logit; their standard deviation is about 1.
const DIFFERENCE_MAX: f64 = 1e-4;

fn rope_scaling() -> impl Strategy<Value = Option<RopeScaling>> {
    let scaling = (1.5f64..16.0, 0.5f64..2.0, 2.5f64..8.0, 8usize..40);
    let scaling = scaling.prop_map(|(factor, low_freq_factor, high_freq_factor, context)| RopeScaling {
        rope_type: RopeType::Llama3,
        factor,
        low_freq_factor,
        high_freq_factor,
        original_max_position_embeddings: context,
    });
    prop::option::of(scaling)
}

fn llama() -> impl Strategy<Value = Architecture> {
    let heads = (1usize..4, 1usize..4, 1usize..8, prop::option::of(1usize..10));
    let rope = (rope_scaling(), prop::sample::select(vec![1e4, 5e5]));
    let flags = any::<[bool; 3]>();
    let sizes = (257usize..400, 1usize..40, 1usize..4);
    (heads, rope, flags, sizes).prop_map(
        |(
            (keys, group, half, other_half),
            (rope_scaling, rope_theta),
            flags,
            (vocab_size, inner, layers),
        )| {
            Architecture::Llama(LlamaConfig {
                vocab_size,
                hidden_size: keys * group * 2 * half,
                intermediate_size: inner,
                num_hidden_layers: layers,
                num_attention_heads: keys * group,
                num_key_value_heads: keys,
                head_dim: other_half.map(|half| 2 * half),
                attention_bias: flags[0],
                mlp_bias: flags[1],
                tie_word_embeddings: flags[2],
                max_position_embeddings: 48,
                rope_theta,
                rope_scaling,
                ..LlamaConfig::default()
            })
        },
    )
}

fn gpt2() -> impl Strategy<Value = Architecture> {
    (1usize..7, 1usize..9, prop::option::of(1usize..70), any::<bool>(), 257usize..400, 1usize..4).prop_map(
        |(n_head, head, n_inner, tie_word_embeddings, vocab_size, n_layer)| {
            let n_embd = n_head * head;
            Architecture::Gpt2(Gpt2Config {
                vocab_size,
                n_positions: 48,
                n_embd,
                n_layer,
                n_head,
                n_inner,
                tie_word_embeddings,
                ..Gpt2Config::default()
            })
        },
    )
}

fn mpt() -> impl Strategy<Value = Architecture> {
    let attention = (prop::option::of(0.2f64..2.0), prop::option::of(0.05f64..1.0));
    (1usize..8, 1usize..9, attention, any::<bool>(), 257usize..400, 1usize..4).prop_map(
        |(n_heads, head, (clip_qkv, softmax_scale), tie_word_embeddings, vocab_size, n_layers)| {
            Architecture::Mpt(MptConfig {
                vocab_size,
                max_seq_len: 48,
                d_model: n_heads * head,
                n_layers,
                n_heads,
                tie_word_embeddings,
                attn_config: MptAttentionConfig { clip_qkv, softmax_scale },
                ..MptConfig::default()
            })
        },
    )
}

/// Weights with which every tensor, gains and biases included, matters to logits of about unit size.
fn weights(architecture: &Architecture, generator: &mut ChaCha8Rng) -> Vec<f32> {
    let values = |tensor: &TensorSpec| {
        #[allow(clippy::cast_precision_loss)]
        let scale = match (tensor.init, tensor.shape.last()) {
            (Init::Normal(_), Some(inner)) => 1.7 / (*inner as f32).sqrt(),
            _ => 0.3,
        };
        let mean = if tensor.init == Init::Ones { 1.0 } else { 0.0 };
        (0..tensor.parameters())
            .map(|_| mean + scale * generator.random_range(-1.0f32..1.0))
            .collect::<Vec<_>>()
    };
    architecture.manifest().tensors().iter().flat_map(values).collect()
}

/// The logits in what `consort-client logits` printed, or in what the script wrote.
fn logits(json: &[u8]) -> Vec<Vec<f64>> {
    let mut json: serde_json::Value = serde_json::from_slice(json).expect("logits are JSON");
    serde_json::from_value(json["logits"].take()).expect("logits are rows of numbers")
}

#[test]
fn models_of_any_configuration_go_to_transformers_and_back_with_the_same_logits() {
    let Some(python) = python::environment() else { return };
    let folder = tempfile::tempdir().expect("a temporary directory can be made");
    let mut runner =
        TestRunner::new_with_rng(ProptestConfig::default(), TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let models = [llama().boxed(), gpt2().boxed(), mpt().boxed()];
    let mut tried = Vec::new();
    for index in 0..RANDOM_MODELS {
        let strategy = &models[(index % 3) as usize];
        let architecture = strategy.new_tree(&mut runner).expect("nothing is rejected").current();
        assert_eq!(architecture.problems(), [], "{architecture:?}");
        let mut generator = ChaCha8Rng::seed_from_u64(index);
        let flat = weights(&architecture, &mut generator);
        let directory = folder.path().join(format!("ours-{index}"));
        let (tokenizer, end, id) = (byte_tokenizer_json(), BYTE_END_OF_TEXT, BYTE_END_OF_TEXT_ID);
        checkpoint::write(&directory, &architecture, &flat, &tokenizer, end, id, &BTreeMap::new())
            .expect("a checkpoint can be written");
        let length = generator.random_range(1..=48);
        let vocabulary = architecture.vocab_size() as i64;
        let tokens: Vec<i64> = (0..length).map(|_| generator.random_range(0..vocabulary)).collect();
        let dtype = ["float32", "bfloat16", "float16"][generator.random_range(0..3)];
        // From a single tensor per file to all in one.
        let shard_bytes = [1, 20_000, 1_000_000_000][generator.random_range(0..3)];
        let plan = serde_json::json!({"tokens": tokens, "dtype": dtype, "shard_bytes": shard_bytes});
        fs::write(directory.join("plan.json"), plan.to_string()).expect("the plan can be written");
        tried.push((architecture, tokens));
    }
    run_script(&python, "agree.py", &[folder.path().as_os_str()]);

    for (index, (architecture, tokens)) in tried.iter().enumerate() {
        let theirs =
            fs::read(folder.path().join(format!("theirs-{index}.json"))).expect("logits were written");
        let theirs = logits(&theirs);
        let ours = logits(&our_logits(folder.path(), &format!("theirs-{index}"), tokens));
        assert_eq!((ours.len(), ours[0].len()), (tokens.len(), architecture.vocab_size()));
        let differences = ours.iter().flatten().zip(theirs.iter().flatten()).map(|(a, b)| (a - b).abs());
        let largest = differences.fold(0.0, f64::max);
        assert!(largest < DIFFERENCE_MAX, "the logits of {architecture:?} differ by {largest:e}");
    }
}
