//! The trainer through its outer interface. `CONSORT_TEST_DEVICE` (default: cpu) says where.

mod failures;

use consort_common::{
    model::{Architecture, Gpt2Config, LlamaConfig, MptConfig},
    schedule::Schedule,
    spec::{OptimizerSpec, TrainingSpec},
};

use super::{LanguageModel, StepResult, Trainer, TrainerError, be_deterministic, test_device};

pub(super) const VOCABULARY: usize = 50;
/// The token that parts documents.
pub(super) const END_OF_TEXT: u32 = 49;
const RUN_STEPS: u64 = 100;

pub(super) fn llama_config() -> LlamaConfig {
    LlamaConfig {
        vocab_size: VOCABULARY,
        hidden_size: 32,
        intermediate_size: 48,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        max_position_embeddings: 16,
        ..LlamaConfig::default()
    }
}

pub(super) fn llama() -> Architecture {
    Architecture::Llama(llama_config())
}

pub(super) fn gpt2() -> Architecture {
    Architecture::Gpt2(Gpt2Config {
        vocab_size: VOCABULARY,
        n_positions: 16,
        n_embd: 32,
        n_layer: 2,
        n_head: 4,
        ..Gpt2Config::default()
    })
}

pub(super) fn mpt() -> Architecture {
    Architecture::Mpt(MptConfig {
        vocab_size: VOCABULARY,
        max_seq_len: 16,
        d_model: 32,
        n_layers: 2,
        n_heads: 4,
        ..MptConfig::default()
    })
}

pub(super) fn all() -> [Architecture; 3] {
    [llama(), gpt2(), mpt()]
}

/// A model that is only asked.
pub(super) fn model(architecture: &Architecture) -> LanguageModel {
    LanguageModel::from_flat(architecture, &architecture.manifest().initialise(7), test_device()).unwrap()
}

pub(super) fn training() -> TrainingSpec {
    TrainingSpec {
        batch_size: 4,
        sequence_length: 8,
        schedule: Schedule::Constant { warmup_steps: 0, warmup_from: 0.0, fraction: 1.0 },
        ..TrainingSpec::default()
    }
}

pub(super) fn trainer(architecture: &Architecture, training: &TrainingSpec) -> Trainer {
    let mut trainer = Trainer::new(architecture, training, RUN_STEPS, END_OF_TEXT, test_device()).unwrap();
    trainer.load(&architecture.manifest().initialise(7)).unwrap();
    trainer
}

/// Mean loss of the updates since the last reading.
pub(super) fn take_loss(trainer: &mut Trainer) -> f64 {
    let results = trainer.take_results().unwrap();
    let losses: Vec<f64> =
        results.iter().filter(|result| result.is_update()).map(|result| f64::from(result.loss)).collect();
    losses.iter().sum::<f64>() / losses.len() as f64
}

/// A batch for `training()`, different for each `seed`.
pub(super) fn batch(seed: i64) -> Vec<i64> {
    (0..4 * 9).map(|index| (index * index * 7 + index * 3 + seed * 11) % VOCABULARY as i64).collect()
}

pub(super) fn go_on() -> bool {
    false
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

pub(super) fn largest_difference(left: &[f32], right: &[f32]) -> f32 {
    assert_eq!(left.len(), right.len());
    left.iter().zip(right).map(|(left, right)| (left - right).abs()).fold(0.0, f32::max)
}

/// Values of the tensor `name` in a flat vector.
pub(super) fn tensor<'a>(architecture: &Architecture, flat: &'a [f32], name: &str) -> &'a [f32] {
    let mut offset = 0;
    for tensor in architecture.manifest().tensors() {
        if tensor.name == name {
            return &flat[offset..offset + tensor.parameters()];
        }
        offset += tensor.parameters();
    }
    panic!("no tensor {name}");
}

#[test]
fn the_untrained_model_knows_nothing() {
    for architecture in all() {
        let mut trainer = trainer(&architecture, &training());
        trainer.step(&batch(1), 0, &go_on).unwrap();
        let loss = take_loss(&mut trainer);
        assert!((loss - (VOCABULARY as f64).ln()).abs() < 0.05, "{}: {loss}", architecture.name());
        assert_eq!(trainer.take_results().unwrap(), [], "no step since");
    }
}

#[test]
fn a_tiny_batch_is_learnt_by_heart() {
    for architecture in all() {
        let optimizer = OptimizerSpec::AdamW {
            learning_rate: 1e-2,
            beta1: 0.9,
            beta2: 0.95,
            epsilon: 1e-8,
            weight_decay: 0.0,
        };
        let mut trainer = trainer(&architecture, &TrainingSpec { optimizer, ..training() });
        for step in 0..100 {
            trainer.step(&batch(1), step, &go_on).unwrap();
            if step == 89 {
                take_loss(&mut trainer);
            }
        }
        let loss = take_loss(&mut trainer);
        assert!(loss < 0.1, "{}: {loss}", architecture.name());
    }
}

#[test]
fn every_tensor_has_a_gradient() {
    let untied = LlamaConfig { tie_word_embeddings: false, ..llama_config() };
    let with_biases = LlamaConfig { attention_bias: true, mlp_bias: true, ..llama_config() };
    for architecture in all().into_iter().chain([untied, with_biases].map(Architecture::Llama)) {
        let mut trainer = trainer(&architecture, &training());
        trainer.step(&batch(1), 0, &go_on).unwrap();
        let gradient = trainer.gradient();
        for spec in architecture.manifest().tensors() {
            let values = tensor(&architecture, &gradient, &spec.name);
            assert!(values.iter().any(|value| *value != 0.0), "{}", spec.name);
        }
    }
}

#[test]
fn the_gradient_is_that_of_the_loss() {
    for architecture in all() {
        let unclipped = TrainingSpec { gradient_clip: 0.0, ..training() };
        let mut trainer = trainer(&architecture, &unclipped);
        let parameters = trainer.parameters().unwrap();
        trainer.step(&batch(1), 0, &go_on).unwrap();
        let gradient = trainer.gradient();
        // Along the gradient, the loss changes by its squared norm per unit.
        let mut loss_at = |scale: f32| {
            let moved: Vec<f32> =
                parameters.iter().zip(&gradient).map(|(value, slope)| value + scale * slope).collect();
            trainer.load(&moved).unwrap();
            let windows: Vec<Vec<i64>> = batch(1).chunks(9).map(<[i64]>::to_vec).collect();
            trainer.evaluate(windows, &go_on).unwrap().loss()
        };
        let squared_norm: f64 = gradient.iter().map(|slope| f64::from(*slope).powi(2)).sum();
        let slope = (loss_at(0.001) - loss_at(-0.001)) / 0.002;
        assert!((slope / squared_norm - 1.0).abs() < 0.01, "{}: {slope} {squared_norm}", architecture.name());
    }
}

#[test]
fn micro_batches_make_the_same_step_as_the_whole_batch() {
    for architecture in all() {
        let mut whole = trainer(&architecture, &training());
        let mut parts = trainer(&architecture, &TrainingSpec { micro_batch_size: 1, ..training() });
        for trainer in [&mut whole, &mut parts] {
            trainer.step(&batch(1), 0, &go_on).unwrap();
        }
        assert!(largest_difference(&whole.gradient(), &parts.gradient()) < 1e-5);
        let losses = [&mut whole, &mut parts].map(take_loss);
        assert!((losses[0] - losses[1]).abs() < 1e-5, "{losses:?}");
    }
}

#[test]
fn the_same_steps_give_the_same_bits() {
    be_deterministic(test_device()).unwrap();
    for architecture in all() {
        let run = || {
            let mut trainer = trainer(&architecture, &training());
            for step in 0..5 {
                trainer.step(&batch(step), step as u64, &go_on).unwrap();
            }
            bits(&trainer.parameters().unwrap())
        };
        assert_eq!(run(), run());
    }
}

#[test]
fn training_goes_on_from_saved_parameters_and_moments_as_if_never_stopped() {
    be_deterministic(test_device()).unwrap();
    // A new trainer on a GPU would begin with fewer at once.
    let training = TrainingSpec { micro_batch_size: 2, ..training() };
    for architecture in all() {
        let mut undisturbed = trainer(&architecture, &training);
        for step in 0..3 {
            undisturbed.step(&batch(step), step as u64, &go_on).unwrap();
        }
        let (parameters, moments) = (undisturbed.parameters().unwrap(), undisturbed.moments().unwrap());
        assert_eq!(moments.steps, 3);
        let mut resumed =
            Trainer::new(&architecture, &training, RUN_STEPS, END_OF_TEXT, test_device()).unwrap();
        resumed.load(&parameters).unwrap();
        resumed.load_moments(&moments).unwrap();
        for trainer in [&mut undisturbed, &mut resumed] {
            for step in 3..6 {
                trainer.step(&batch(step), step as u64, &go_on).unwrap();
            }
        }
        assert_eq!(bits(&undisturbed.parameters().unwrap()), bits(&resumed.parameters().unwrap()));
        assert_eq!(undisturbed.moments().unwrap(), resumed.moments().unwrap());
    }
}

#[test]
fn reset_moments_are_those_of_a_new_trainer() {
    let mut trainer = trainer(&llama(), &training());
    let fresh = trainer.moments().unwrap();
    trainer.step(&batch(1), 0, &go_on).unwrap();
    assert_ne!(trainer.moments().unwrap(), fresh);
    trainer.reset_moments().unwrap();
    assert_eq!(trainer.moments().unwrap(), fresh);
}

#[test]
fn clipping_scales_the_gradient_to_the_norm_and_keeps_its_direction() {
    let gradient = |gradient_clip| {
        let mut trainer = trainer(&llama(), &TrainingSpec { gradient_clip, ..training() });
        trainer.step(&batch(1), 0, &go_on).unwrap();
        (trainer.gradient(), f64::from(trainer.take_results().unwrap()[0].gradient_norm))
    };
    let norm = |gradient: &[f32]| gradient.iter().map(|slope| f64::from(*slope).powi(2)).sum::<f64>().sqrt();
    let (free, reported) = gradient(0.0);
    assert!((norm(&free) / reported - 1.0).abs() < 1e-5);
    let limit = norm(&free) / 3.0;
    let (clipped, reported) = gradient(limit);
    assert!((norm(&free) / reported - 1.0).abs() < 1e-5, "the norm is that before clipping");
    assert!((norm(&clipped) / limit - 1.0).abs() < 1e-4);
    let thrice: Vec<f32> = clipped.iter().map(|slope| 3.0 * slope).collect();
    assert!(largest_difference(&thrice, &free) < 1e-5);
    assert_eq!(bits(&gradient(10.0 * limit).0), bits(&free), "a gradient below the limit is left alone");
}

#[test]
fn weight_decay_spares_gains_and_biases() {
    for architecture in all() {
        let after = |weight_decay| {
            let optimizer = OptimizerSpec::AdamW {
                learning_rate: 1e-2,
                beta1: 0.9,
                beta2: 0.95,
                epsilon: 1e-8,
                weight_decay,
            };
            let mut trainer = trainer(&architecture, &TrainingSpec { optimizer, ..training() });
            trainer.step(&batch(1), 0, &go_on).unwrap();
            trainer.parameters().unwrap()
        };
        let (with, without) = (after(0.5), after(0.0));
        for spec in architecture.manifest().tensors() {
            let same =
                tensor(&architecture, &with, &spec.name) == tensor(&architecture, &without, &spec.name);
            assert_eq!(same, !spec.decays(), "{}", spec.name);
        }
    }
}

#[test]
fn the_learning_rate_follows_the_schedule_over_the_run() {
    let schedule =
        Schedule::Cosine { warmup_steps: 10, warmup_from: 0.0, total_steps: None, final_fraction: 0.0 };
    let mut trainer = trainer(&llama(), &TrainingSpec { schedule, ..training() });
    for (step, expected) in [(0, 1e-4), (9, 1e-3), (55, 5e-4), (100, 0.0)] {
        let outcome = trainer.step(&batch(1), step, &go_on).unwrap();
        assert!((outcome.learning_rate - expected).abs() < 1e-9, "step {step}: {outcome:?}");
        assert_eq!(outcome.tokens, 32);
    }
}
