//! Losses beside PyTorch's: the same data in the same order, the same initial weights, the plainly written model of
//! `tests/training/reference.py` and the optimizers and schedules of PyTorch, or of the papers where it has none.
//!
//! Needs the Python environment of the interoperability test (600 MB, kept in `.cache/venv`); where that cannot be
//! had, the tests say so and pass.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use consort_common::{
    model::{Architecture, Gpt2Config, LlamaConfig},
    schedule::Schedule,
    spec::{OptimizerSpec, Precision, TrainingSpec},
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::json;

use super::{Device, Trainer, test_device};

const STEPS: u64 = 200;
const VOCABULARY: usize = 64;

fn workspace() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// The environment's Python; none where it cannot be had, after saying so.
fn python() -> Option<PathBuf> {
    const CANNOT_BE_HAD: i32 = 77;
    let output = Command::new("python3")
        .arg(workspace().join("tests/interop/environment.py"))
        .arg(workspace().join(".cache/venv"))
        .stderr(Stdio::inherit())
        .output();
    match output {
        Ok(output) if output.status.success() => {
            Some(PathBuf::from(String::from_utf8(output.stdout).unwrap().trim()))
        }
        Ok(output) if output.status.code() != Some(CANNOT_BE_HAD) => {
            panic!("the Python environment cannot be made")
        }
        _ => {
            eprintln!("SKIPPED: no Python environment with torch (the reason is above)");
            None
        }
    }
}

fn llama() -> Architecture {
    Architecture::Llama(LlamaConfig {
        vocab_size: VOCABULARY,
        hidden_size: 48,
        intermediate_size: 96,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        max_position_embeddings: 32,
        ..LlamaConfig::default()
    })
}

fn gpt2() -> Architecture {
    let sizes = Gpt2Config { vocab_size: VOCABULARY, n_positions: 32, n_embd: 48, ..Gpt2Config::default() };
    Architecture::Gpt2(Gpt2Config { n_layer: 2, n_head: 4, ..sizes })
}

fn schedule(keys: serde_json::Value) -> Schedule {
    serde_json::from_value(keys).unwrap()
}

fn cosine() -> Schedule {
    schedule(json!({"kind": "cosine", "warmup_steps": 20, "final_fraction": 0.1}))
}

/// What the reference prints, each of all steps.
#[derive(serde::Deserialize)]
struct Reference {
    losses: Vec<f64>,
    rates: Vec<f64>,
}

/// Trains with both, and returns the largest relative difference of the losses of all steps. Learning rates must be
/// the same but for rounding.
fn largest_difference(python: &Path, architecture: &Architecture, training: &TrainingSpec) -> f64 {
    let device = test_device();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let manifest = architecture.manifest();
    let initial = manifest.initialise(5);
    let tokens = tokens(training);
    fs::write(path("parameters"), bytemuck::cast_slice(&initial)).unwrap();
    fs::write(path("tokens"), bytemuck::cast_slice(&tokens)).unwrap();
    let tensors: Vec<_> = manifest.tensors().iter().map(|tensor| (&tensor.name, &tensor.shape)).collect();
    let case = json!({
        "model": architecture,
        "tensors": tensors,
        "parameters": path("parameters"),
        "tokens": path("tokens"),
        "batch_size": training.batch_size,
        "sequence_length": training.sequence_length,
        "optimizer": training.optimizer,
        "schedule": training.schedule,
        "precision": training.precision,
        "clip": training.gradient_clip,
        "device": if device == Device::Cpu { "cpu" } else { "cuda" },
    });
    fs::write(path("case.json"), case.to_string()).unwrap();
    let theirs = Command::new(python)
        .arg(workspace().join("tests/training/parity.py"))
        .arg(path("case.json"))
        .stderr(Stdio::inherit())
        .output()
        .unwrap();
    assert!(theirs.status.success(), "the reference failed: the reason is above");
    let Reference { losses: theirs, rates } = serde_json::from_slice(&theirs.stdout).unwrap();

    let mut trainer = Trainer::new(architecture, training, STEPS, 0, device).unwrap();
    trainer.load(&initial).unwrap();
    let length = (training.batch_size * (training.sequence_length + 1)) as usize;
    for (step, batch) in tokens.chunks(length).enumerate() {
        let rate = trainer.step(batch, step as u64, &|| false).unwrap().learning_rate;
        assert!((rate - rates[step]).abs() < 1e-9, "step {step}: {rate}, not {}", rates[step]);
    }
    let ours = trainer.take_results().unwrap();
    assert_eq!(ours.len(), theirs.len());
    assert!(theirs[theirs.len() - 1] < 0.8 * theirs[0], "the reference learns: {theirs:?}");
    let differences =
        ours.iter().zip(&theirs).map(|(ours, theirs)| (f64::from(ours.loss) / theirs - 1.0).abs());
    differences.fold(0.0, f64::max)
}

/// Batches of all steps: each token follows from the one before it and a little chance.
fn tokens(training: &TrainingSpec) -> Vec<i64> {
    let mut random = ChaCha8Rng::seed_from_u64(11);
    let mut tokens = Vec::new();
    for _ in 0..STEPS * u64::from(training.batch_size) {
        let mut token = random.random_range(0..VOCABULARY as i64);
        for _ in 0..=training.sequence_length {
            tokens.push(token);
            token = (5 * token + random.random_range(0..4)) % VOCABULARY as i64;
        }
    }
    tokens
}

fn training(optimizer: &str, schedule: Schedule) -> TrainingSpec {
    let optimizer = json!({"kind": optimizer, "learning_rate": 0.003});
    TrainingSpec {
        batch_size: 8,
        sequence_length: 32,
        optimizer: serde_json::from_value::<OptimizerSpec>(optimizer).unwrap(),
        schedule,
        ..TrainingSpec::default()
    }
}

#[track_caller]
fn check(name: &str, architecture: &Architecture, training: &TrainingSpec, allowed: f64) {
    let Some(python) = python() else { return };
    let difference = largest_difference(&python, architecture, training);
    eprintln!("{name}: losses of {STEPS} steps differ by at most {difference:.1e} of themselves");
    assert!(difference < allowed, "{name}: {difference:e}");
}

#[test]
fn adamw_with_a_cosine_has_pytorchs_losses() {
    check("llama, adamw, cosine", &llama(), &training("adamw", cosine()), 1e-3);
    check("gpt2, adamw, cosine", &gpt2(), &training("adamw", cosine()), 1e-3);
}

#[test]
fn adamw_at_a_constant_rate_and_with_a_stable_phase_has_pytorchs_losses() {
    let constant = schedule(json!({"kind": "constant", "warmup_steps": 20}));
    check("llama, adamw, constant", &llama(), &training("adamw", constant), 1e-3);
    let stable = schedule(json!({"kind": "warmup-stable-decay", "decay_steps": 50}));
    check("llama, adamw, stable and decay", &llama(), &training("adamw", stable), 1e-3);
}

#[test]
fn adamw_with_the_infinite_schedule_and_warmed_up_again_has_pytorchs_losses() {
    let infinite = schedule(json!({
        "kind": "infinite", "warmup_steps": 20, "cooldown_steps": 60, "constant_fraction": 0.5,
        "annealing_steps": 60, "final_fraction": 0.05,
    }));
    check("llama, adamw, infinite", &llama(), &training("adamw", infinite), 1e-3);
    let warmed_up_again = schedule(json!({
        "kind": "cosine", "warmup_steps": 20, "warmup_from": 0.1, "final_fraction": 0.1,
    }));
    check("llama, adamw, re-warmed cosine", &llama(), &training("adamw", warmed_up_again), 1e-3);
}

#[test]
fn adopt_has_the_losses_of_its_algorithm() {
    check("llama, adopt, cosine", &llama(), &training("adopt", cosine()), 1e-3);
}

#[test]
fn muon_has_pytorchs_losses() {
    check("llama, muon, cosine", &llama(), &training("muon", cosine()), 1e-3);
}

#[test]
fn bf16_has_the_losses_of_pytorchs_autocast() {
    for (name, architecture) in [("llama", llama()), ("gpt2", gpt2())] {
        let training = TrainingSpec { precision: Precision::Bf16, ..training("adamw", cosine()) };
        check(&format!("{name}, adamw, cosine, bf16"), &architecture, &training, 1e-2);
    }
}
