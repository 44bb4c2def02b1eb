//! What one machine does with checkpoints: measure, question and continue them, with the same engine as in a
//! federation, so that the numbers compare.
//!
//! No network here. All tensors belong to the thread that calls.

use std::{
    ops::ControlFlow,
    path::Path,
    time::{Duration, Instant},
};

use consort_common::checkpoint::{CheckpointError, CheckpointReader};

use crate::{
    data::{DataError, HeldOut, Tokenizer},
    steps,
    trainer::{Device, EvaluationSum, LanguageModel, Sampling, TrainerError},
};

/// Tokens of a forward pass when nothing is trained, in as many sequences as fit but at least one: memory grows with
/// them, not with the vocabulary, since logits are made some rows at a time.
const EVALUATION_TOKENS: usize = 8192;

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

/// The model of a checkpoint, piece by piece onto the device.
///
/// # Errors
/// The weights cannot be read, or the device's memory does not suffice.
pub fn load(checkpoint: &CheckpointReader, device: Device) -> Result<LanguageModel, LocalError> {
    LanguageModel::load(checkpoint.architecture(), device, |start, piece| Ok(checkpoint.fill(start, piece)?))
}

/// The loss of `model` on held-out text. `tell` is told how many tokens were handed out.
///
/// # Errors
/// The model's context is shorter than the text's windows, the text has tokens that it does not know, or the
/// evaluation was cancelled.
pub fn evaluate(
    model: &LanguageModel,
    held_out: &HeldOut,
    tell: &dyn Fn(u64),
    cancelled: &dyn Fn() -> bool,
) -> Result<EvaluationSum, LocalError> {
    let sequences = sequences_at_once(held_out.sequence_length());
    let evaluate =
        |windows: &mut dyn Iterator<Item = Vec<i64>>| model.evaluate(windows, sequences, cancelled);
    steps::held_out_loss(held_out, tell, evaluate)
}

fn sequences_at_once(sequence_length: u64) -> usize {
    let sequence_length = usize::try_from(sequence_length).unwrap_or(usize::MAX);
    (EVALUATION_TOKENS / sequence_length.max(1)).max(1)
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
    Ok(load(&CheckpointReader::open(directory)?, device)?.logits(tokens)?)
}

/// What generating text took, the reading of the prompt included.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Generated {
    /// Tokens drawn.
    pub tokens: u64,
    /// Time from the prompt to the last of them; the model was loaded before.
    pub time: Duration,
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
) -> Result<Generated, LocalError> {
    let checkpoint = CheckpointReader::open(directory)?;
    let tokenizer = Tokenizer::from_json(checkpoint.tokenizer_json().as_bytes(), checkpoint.end_of_text())?;
    tokenizer.check_vocabulary(checkpoint.architecture().vocab_size())?;
    let model = load(&checkpoint, device)?;
    let end_of_text = i64::from(tokenizer.end_of_text());
    let mut tokens: Vec<i64> = tokenizer.encode(prompt)?.into_iter().map(i64::from).collect();
    if tokens.is_empty() {
        tokens.push(end_of_text);
    }

    let mut shown = Shown { tokenizer: &tokenizer, tokens: Vec::new(), bytes: 0 };
    let mut failure = None;
    let begun = Instant::now();
    let mut drawn = 0;
    model.generate(&tokens, tokens_max, sampling, |token| {
        drawn += 1;
        if token == end_of_text {
            return ControlFlow::Break(());
        }
        match shown.push(token) {
            Ok(text) => on_text(&text),
            Err(error) => failure = Some(error),
        }
        if failure.is_some() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    })?;
    let time = begun.elapsed();
    on_text(&shown.rest()?);
    failure.map_or(Ok(Generated { tokens: drawn, time }), |error| Err(error.into()))
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use consort_common::{
        checkpoint,
        tokenizer::{BYTE_END_OF_TEXT, BYTE_END_OF_TEXT_ID, byte_tokenizer_json},
    };

    use super::*;
    use crate::local_training::tests::{Site, test_device};

    fn go_on() -> bool {
        false
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
    fn a_checkpoint_is_measured_and_continued_as_the_model_that_it_holds() {
        let site = Site::new();
        let flat = site.train(60);
        let folder = checkpoint_of(&site, &flat);
        let directory = folder.path().join("x");
        let read = load(&CheckpointReader::open(&directory).unwrap(), test_device()).unwrap();
        let held = LanguageModel::from_flat(&site.spec.model, &flat, test_device()).unwrap();
        assert_eq!(
            evaluate(&read, &site.held_out, &|_| (), &go_on).unwrap(),
            evaluate(&held, &site.held_out, &|_| (), &go_on).unwrap()
        );
        let logits = logits_of_checkpoint(&directory, &[84, 104, 101], test_device()).unwrap();
        assert_eq!(logits.len(), 3 * 257);

        let text = |prompt: &str| {
            let mut text = String::new();
            let sampling = Sampling { temperature: 0.0, top_p: 1.0, seed: 1 };
            let mut keep = |piece: &str| text.push_str(piece);
            let generated =
                generate_from_checkpoint(&directory, prompt, 40, sampling, test_device(), &mut keep).unwrap();
            assert!((1..=40).contains(&generated.tokens), "{generated:?}");
            text
        };
        assert!(text("rang. The 3 be").starts_with("lls of the"), "{}", text("rang. The 3 be"));
        assert!(!text("").is_empty(), "a document is begun without a prompt");
    }

    #[test]
    fn tokens_at_once_are_bounded_however_long_the_sequences() {
        for (sequence_length, sequences) in [(32, 256), (4096, 2), (5000, 1), (131_072, 1)] {
            assert_eq!(sequences_at_once(sequence_length), sequences, "{sequence_length}");
        }
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
