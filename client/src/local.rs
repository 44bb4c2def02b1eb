//! What one machine does without a federation: train alone on a site's text, and measure, question and
//! continue checkpoints. The same engine, initial weights and order of data as in a federation, so that the
//! numbers compare.
//!
//! No network here. All tensors belong to the thread that calls.

use std::{ops::ControlFlow, path::Path, time::Instant};

use consort_common::{
    checkpoint::{self, CheckpointError},
    model::Architecture,
    spec::{RunSpec, TrainingSpec},
};

use crate::{
    data::{DataError, Dataset, Feed, HeldOut, Sampler, Tokenizer},
    trainer::{Device, EvaluationSum, Sampling, Trainer, TrainerError},
};

/// Steps between two readings of the loss. Each waits for the device, and fails if none of the steps made an
/// update.
const REPORT_STEPS: u64 = 20;
/// Sequences of a forward pass when nothing is trained.
const EVALUATION_SEQUENCES: u32 = 16;

/// Why it could not be done.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// The checkpoint cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The text cannot be read or is too short.
    #[error(transparent)]
    Data(#[from] DataError),
    /// Training or evaluation failed, or was cancelled.
    #[error(transparent)]
    Trainer(#[from] TrainerError),
}

/// How far local training is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LocalProgress {
    /// Steps done.
    pub step: u64,
    /// Steps to do.
    pub steps: u64,
    /// Tokens trained so far.
    pub tokens: u64,
    /// Since the last report.
    pub tokens_per_second: f64,
    /// Mean training loss since the last report, nats per token.
    pub loss: f64,
    /// Share of the time since the last report that was spent waiting for batches.
    pub waited_share: f64,
}

/// Trains the specification's model on one dataset alone for `steps` optimizer steps, over which the learning
/// rate's schedule extends, and returns the flat vector. `site` chooses the order of the data, as in a
/// federation.
///
/// # Errors
/// The text is shorter than a sequence, training diverged or was cancelled, or the device failed.
pub fn train_locally(
    spec: &RunSpec,
    dataset: &Dataset,
    site: &str,
    steps: u64,
    device: Device,
    progress: &mut dyn FnMut(LocalProgress),
    cancelled: &dyn Fn() -> bool,
) -> Result<Vec<f32>, LocalError> {
    let training = &spec.training;
    let sampler = Sampler::new(dataset.train.clone(), training.sequence_length as usize, spec.seed, site)?;
    let mut feed = Feed::new(sampler, training.batch_size as usize)?;
    let mut trainer = Trainer::new(&spec.model, training, steps, device)?;
    trainer.load(&spec.model.manifest().initialise(spec.seed))?;

    let (mut reported, mut tokens_reported, mut waited_reported) = (Instant::now(), 0, feed.waited());
    let mut tokens = 0;
    for step in 0..steps {
        tokens += trainer.step(feed.next_batch()?, step, cancelled)?.tokens;
        let done = step + 1;
        if (done.is_multiple_of(REPORT_STEPS) || done == steps)
            && let Some(loss) = trainer.take_loss()?
        {
            let seconds = reported.elapsed().as_secs_f64().max(1e-9);
            #[allow(clippy::cast_precision_loss)]
            let tokens_per_second = (tokens - tokens_reported) as f64 / seconds;
            let waited_share = (feed.waited() - waited_reported).as_secs_f64() / seconds;
            progress(LocalProgress { step: done, steps, tokens, tokens_per_second, loss, waited_share });
            (reported, tokens_reported, waited_reported) = (Instant::now(), tokens, feed.waited());
        }
    }
    Ok(trainer.parameters()?)
}

/// The loss of the model `flat` on held-out text.
///
/// # Errors
/// `flat` is not the architecture's, its context is shorter than the text's windows, the text has tokens that
/// it does not know, or the evaluation was cancelled.
pub fn evaluate(
    architecture: &Architecture,
    flat: &[f32],
    held_out: &HeldOut,
    device: Device,
    cancelled: &dyn Fn() -> bool,
) -> Result<EvaluationSum, LocalError> {
    let model = model(architecture, flat, device)?;
    let mut damage = None;
    let windows = held_out.batches(1).map_while(|window| window.map_err(|error| damage = Some(error)).ok());
    let sum = model.evaluate(windows, cancelled)?;
    damage.map_or(Ok(sum), |error| Err(error.into()))
}

/// The loss of the checkpoint in `directory` on held-out text, which must have been tokenised with the
/// checkpoint's tokenizer.
///
/// # Errors
/// The checkpoint cannot be read, or as [`evaluate`].
pub fn evaluate_checkpoint(
    directory: &Path,
    held_out: &HeldOut,
    device: Device,
    cancelled: &dyn Fn() -> bool,
) -> Result<EvaluationSum, LocalError> {
    let checkpoint = checkpoint::read(directory)?;
    evaluate(&checkpoint.architecture, &checkpoint.flat, held_out, device, cancelled)
}

/// The logits `[tokens, vocabulary]`, row by row, that the checkpoint in `directory` gives after each of
/// `tokens`.
///
/// # Errors
/// The checkpoint cannot be read, or there are no tokens, more than its context, or such as it does not know.
pub fn logits_of_checkpoint(
    directory: &Path,
    tokens: &[i64],
    device: Device,
) -> Result<Vec<f32>, LocalError> {
    let checkpoint = checkpoint::read(directory)?;
    Ok(model(&checkpoint.architecture, &checkpoint.flat, device)?.logits(tokens)?)
}

/// Continues `prompt` with the checkpoint in `directory` by up to `tokens_max` tokens, or to the end of the
/// document. `on_text` gets each piece of text as it comes; without a prompt, a document is begun.
///
/// # Errors
/// The checkpoint cannot be read, or its tokenizer cannot encode the prompt or is not the model's.
pub fn generate_from_checkpoint(
    directory: &Path,
    prompt: &str,
    tokens_max: usize,
    sampling: Sampling,
    device: Device,
    on_text: &mut dyn FnMut(&str),
) -> Result<(), LocalError> {
    let checkpoint = checkpoint::read(directory)?;
    let tokenizer = Tokenizer::from_json(checkpoint.tokenizer_json.as_bytes(), &checkpoint.end_of_text)?;
    tokenizer.check_vocabulary(checkpoint.architecture.vocab_size())?;
    let model = model(&checkpoint.architecture, &checkpoint.flat, device)?;
    let end_of_text = i64::from(tokenizer.end_of_text());
    let mut tokens: Vec<i64> = tokenizer.encode(prompt)?.into_iter().map(i64::from).collect();
    if tokens.is_empty() {
        tokens.push(end_of_text);
    }

    let mut shown = Shown { tokenizer: &tokenizer, tokens: Vec::new(), bytes: 0 };
    let mut failure = None;
    model.generate(&tokens, tokens_max, sampling, |token| {
        if token == end_of_text {
            return ControlFlow::Break(());
        }
        match shown.push(token) {
            Ok(text) => on_text(&text),
            Err(error) => failure = Some(error),
        }
        if failure.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    on_text(&shown.rest()?);
    failure.map_or(Ok(()), |error| Err(error.into()))
}

/// Generated tokens as text that grows. A character may take several tokens: until it is whole, decoding
/// ends in a replacement character, and nothing new is shown.
struct Shown<'a> {
    tokenizer: &'a Tokenizer,
    tokens: Vec<u32>,
    /// Length of the text that was shown.
    bytes: usize,
}

impl Shown<'_> {
    /// The new text.
    fn push(&mut self, token: i64) -> Result<String, DataError> {
        self.tokens.extend(u32::try_from(token)); // the model's tokens are rows of its embedding
        let text = self.tokenizer.decode(&self.tokens)?;
        if text.ends_with(char::REPLACEMENT_CHARACTER) {
            return Ok(String::new());
        }
        Ok(self.show(&text))
    }

    /// What was held back.
    fn rest(&mut self) -> Result<String, DataError> {
        let text = self.tokenizer.decode(&self.tokens)?;
        Ok(self.show(&text))
    }

    fn show(&mut self, text: &str) -> String {
        let new = text.get(self.bytes..).unwrap_or_default().to_owned();
        self.bytes = text.len();
        new
    }
}

/// A model that is not to be trained.
fn model(architecture: &Architecture, flat: &[f32], device: Device) -> Result<Trainer, TrainerError> {
    let settings =
        TrainingSpec { batch_size: EVALUATION_SEQUENCES, sequence_length: 1, ..TrainingSpec::default() };
    let mut model = Trainer::new(architecture, &settings, 1, device)?;
    model.load(flat)?;
    Ok(model)
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, fs};

    use consort_common::tokenizer::{BYTE_END_OF_TEXT, BYTE_END_OF_TEXT_ID, byte_tokenizer_json};

    use super::*;
    use crate::{
        data::{PrepareRequest, prepare},
        trainer::{DeviceChoice, set_threads},
    };

    const SPEC: &str = r#"
        name = "alone"
        seed = 3
        rounds = 2
        [model]
        architecture = "llama"
        hidden_size = 32
        intermediate_size = 64
        num_hidden_layers = 1
        num_attention_heads = 2
        num_key_value_heads = 1
        max_position_embeddings = 32
        [training]
        local_steps = 30
        batch_size = 8
        sequence_length = 32
        optimizer = { kind = "adamw", learning_rate = 0.01 }
    "#;

    fn test_device() -> Device {
        set_threads(1);
        let name = std::env::var("CONSORT_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned());
        name.parse::<DeviceChoice>().unwrap().open().unwrap()
    }

    struct Site {
        _folder: tempfile::TempDir,
        spec: RunSpec,
        dataset: Dataset,
        held_out: HeldOut,
    }

    /// A text of repeating phrases, easy to learn.
    fn site() -> Site {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("text");
        fs::create_dir(&source).unwrap();
        for document in 0..20 {
            let phrase = format!("The {document} bells of the harbour rang. ");
            fs::write(source.join(format!("{document}.txt")), phrase.repeat(20)).unwrap();
        }
        let request = PrepareRequest {
            source,
            cache: folder.path().join("cache"),
            tokenizer: Tokenizer::byte(),
            held_out_fraction: 0.2,
            vocabulary_size: 257,
        };
        let dataset = prepare(&request, &|_| {}, &|| false).unwrap();
        let held_out = HeldOut::new(dataset.held_out.clone(), 32, 10_000).unwrap();
        Site { _folder: folder, spec: RunSpec::parse(SPEC).unwrap(), dataset, held_out }
    }

    fn go_on() -> bool {
        false
    }

    fn train(site: &Site) -> Vec<f32> {
        train_locally(&site.spec, &site.dataset, "a", 60, test_device(), &mut |_| {}, &go_on).unwrap()
    }

    /// Writes `flat` as a checkpoint of the byte tokenizer.
    fn checkpoint_of(site: &Site, flat: &[f32]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let (json, id) = (byte_tokenizer_json(), BYTE_END_OF_TEXT_ID);
        let (model, metadata) = (&site.spec.model, BTreeMap::new());
        checkpoint::write(&folder.path().join("x"), model, flat, &json, BYTE_END_OF_TEXT, id, &metadata)
            .unwrap();
        folder
    }

    #[test]
    fn training_alone_learns_the_text_and_gives_the_same_bits_again() {
        let site = site();
        let mut reports = Vec::new();
        let flat = train_locally(
            &site.spec,
            &site.dataset,
            "a",
            60,
            test_device(),
            &mut |report| reports.push(report),
            &go_on,
        )
        .unwrap();
        assert_eq!(reports.iter().map(|report| report.step).collect::<Vec<_>>(), [20, 40, 60]);
        assert_eq!(reports[2].tokens, 60 * 8 * 32);
        assert!(reports[2].loss < reports[0].loss / 2.0, "{reports:?}");

        let loss = |flat: &[f32]| {
            evaluate(&site.spec.model, flat, &site.held_out, test_device(), &go_on).unwrap().loss()
        };
        let untrained = loss(&site.spec.model.manifest().initialise(site.spec.seed));
        assert!((untrained - 257f64.ln()).abs() < 0.05, "{untrained}");
        assert!(loss(&flat) < 1.5, "{}", loss(&flat));

        let again: Vec<u32> = train(&site).iter().map(|value| value.to_bits()).collect();
        assert_eq!(again, flat.iter().map(|value| value.to_bits()).collect::<Vec<_>>());
    }

    #[test]
    fn training_alone_can_be_cancelled() {
        let site = site();
        let result = train_locally(&site.spec, &site.dataset, "a", 60, test_device(), &mut |_| {}, &|| true);
        assert!(matches!(result, Err(LocalError::Trainer(TrainerError::Cancelled))));
    }

    #[test]
    fn a_checkpoint_is_measured_and_continued_as_the_model_that_it_holds() {
        let site = site();
        let flat = train(&site);
        let folder = checkpoint_of(&site, &flat);
        let directory = folder.path().join("x");
        assert_eq!(
            evaluate_checkpoint(&directory, &site.held_out, test_device(), &go_on).unwrap(),
            evaluate(&site.spec.model, &flat, &site.held_out, test_device(), &go_on).unwrap()
        );
        let logits = logits_of_checkpoint(&directory, &[84, 104, 101], test_device()).unwrap();
        assert_eq!(logits.len(), 3 * 257);

        let text = |prompt: &str| {
            let mut text = String::new();
            let sampling = Sampling { temperature: 0.0, top_p: 1.0, seed: 1 };
            let mut keep = |piece: &str| text.push_str(piece);
            generate_from_checkpoint(&directory, prompt, 40, sampling, test_device(), &mut keep).unwrap();
            text
        };
        assert!(text("rang. The 3 be").starts_with("lls of the"), "{}", text("rang. The 3 be"));
        assert!(!text("").is_empty(), "a document is begun without a prompt");
    }

    #[test]
    fn a_character_is_shown_once_it_is_whole() {
        let tokenizer = Tokenizer::byte();
        let mut shown = Shown { tokenizer: &tokenizer, tokens: Vec::new(), bytes: 0 };
        let pieces: Vec<String> = "a\u{e9}b".bytes().map(|byte| shown.push(byte.into()).unwrap()).collect();
        assert_eq!(pieces, ["a", "", "\u{e9}", "b"]);
        assert_eq!(shown.push(0xC3).unwrap() + &shown.rest().unwrap(), "\u{FFFD}");
    }

    #[test]
    fn a_checkpoint_that_is_missing_is_an_error_that_names_it() {
        let error = logits_of_checkpoint(Path::new("/missing/x"), &[1], test_device()).unwrap_err();
        assert!(error.to_string().contains("/missing/x"), "{error}");
    }
}
