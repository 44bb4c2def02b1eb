//! Steps that are cancelled, skipped or refused: what they leave behind, and what they say.

use consort_common::{
    model::{Architecture, LlamaConfig},
    spec::TrainingSpec,
};

use super::{super::Moments, *};

#[test]
fn a_cancelled_step_leaves_no_trace() {
    let mut trainer = trainer(&llama(), &TrainingSpec { micro_batch_size: 1, ..training() });
    trainer.step(&batch(1), 0, &go_on).unwrap();
    let before = (trainer.parameters().unwrap(), trainer.moments().unwrap());
    for micro_batches_done in 0..4 {
        let asked = std::cell::Cell::new(0);
        let cancelled = || asked.replace(asked.get() + 1) == micro_batches_done;
        let result = trainer.step(&batch(2), 1, &cancelled);
        assert!(matches!(result, Err(TrainerError::Cancelled)));
        assert_eq!((trainer.parameters().unwrap(), trainer.moments().unwrap()), before);
    }
    let mut undisturbed = self::trainer(&llama(), &TrainingSpec { micro_batch_size: 1, ..training() });
    for step in 0..2 {
        undisturbed.step(&batch(step + 1), step as u64, &go_on).unwrap();
    }
    trainer.step(&batch(2), 1, &go_on).unwrap();
    assert_eq!(bits(&trainer.parameters().unwrap()), bits(&undisturbed.parameters().unwrap()));
    assert_eq!(trainer.take_results().unwrap(), undisturbed.take_results().unwrap());
}

#[test]
fn weights_that_are_not_numbers_stop_every_update_and_are_reported() {
    for poison in [f32::NAN, f32::INFINITY] {
        let mut trainer = trainer(&llama(), &training());
        let mut parameters = trainer.parameters().unwrap();
        parameters[0] = poison;
        trainer.load(&parameters).unwrap();
        let mut tokens = batch(1);
        tokens[0] = 0; // whose embedding begins with the poison
        for step in 40..43 {
            trainer.step(&tokens, step, &go_on).unwrap();
        }
        let updates: Vec<bool> = trainer.take_results().unwrap().iter().map(StepResult::is_update).collect();
        assert_eq!(updates, [false; 3]);
        assert_eq!(bits(&trainer.parameters().unwrap()), bits(&parameters));
        let moments = trainer.moments().unwrap();
        assert!(
            moments.steps == 0 && moments.first.iter().chain(&moments.second).all(|moment| *moment == 0.0)
        );
    }
}

#[test]
fn one_bad_step_among_good_ones_is_skipped_and_counted() {
    let mut trainer = trainer(&llama(), &training());
    let good = trainer.parameters().unwrap();
    trainer.load(&vec![f32::NAN; good.len()]).unwrap();
    trainer.step(&batch(1), 0, &go_on).unwrap();
    trainer.load(&good).unwrap();
    trainer.step(&batch(1), 1, &go_on).unwrap();
    let results = trainer.take_results().unwrap();
    assert_eq!(results.iter().map(StepResult::is_update).collect::<Vec<_>>(), [false, true]);
    let loss = f64::from(results[1].loss);
    assert!((loss - (VOCABULARY as f64).ln()).abs() < 0.05, "{loss}");
    assert_eq!(trainer.moments().unwrap().steps, 1);
}

#[test]
fn what_does_not_fit_the_model_is_refused_in_words() {
    let mut trainer = trainer(&llama(), &training());
    let before = trainer.parameters().unwrap();
    let check = |error: TrainerError, expected: &str| {
        let text = error.to_string();
        assert!(text.contains(expected), "{text}");
    };
    check(trainer.load(&before[1..]).unwrap_err(), "values, but the model has");
    check(trainer.parameters_into(&mut [0.0; 3]).unwrap_err(), "3 values, but the model has");
    let short = Moments { first: Vec::new(), ..trainer.moments().unwrap() };
    check(trainer.load_moments(&short).unwrap_err(), "0 values, but the model has");
    check(
        trainer.step(&batch(1)[1..], 0, &go_on).unwrap_err(),
        "the batch: 35 tokens, expected 4 sequences of 9",
    );
    for stranger in [-1, VOCABULARY as i64] {
        let mut tokens = batch(1);
        tokens[20] = stranger;
        check(trainer.step(&tokens, 0, &go_on).unwrap_err(), &format!("token {stranger} is outside"));
    }
    let model = model(&llama());
    check(model.logits(&[]).unwrap_err(), "0 tokens, expected 1 to the model's context of 16");
    check(model.logits(&[1; 17]).unwrap_err(), "17 tokens");
    let flat = &before[1..];
    check(
        LanguageModel::from_flat(&llama(), flat, test_device()).err().unwrap(),
        "values, but the model has",
    );
    check(trainer.evaluate([vec![1]], &go_on).unwrap_err(), "0 tokens");
    check(trainer.evaluate([vec![1; 18]], &go_on).unwrap_err(), "17 tokens");
    assert_eq!(trainer.parameters().unwrap(), before);
    assert_eq!(trainer.take_results().unwrap(), [], "no step was made");
}

#[test]
fn impossible_settings_are_refused_in_words() {
    let check = |architecture: &Architecture, training: &TrainingSpec, expected: &str| {
        let error =
            Trainer::new(architecture, training, 1, END_OF_TEXT, test_device()).err().unwrap().to_string();
        assert!(error.contains(expected), "{error}");
    };
    check(
        &llama(),
        &TrainingSpec { micro_batch_size: 3, ..training() },
        "micro_batch_size 3 does not divide",
    );
    check(
        &llama(),
        &TrainingSpec { sequence_length: 17, ..training() },
        "sequence_length is 17, allowed: 1 to",
    );
    let uneven = Architecture::Llama(LlamaConfig { num_attention_heads: 5, ..llama_config() });
    check(&uneven, &training(), "must divide hidden_size");
}
