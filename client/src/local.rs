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

    let mut shown = Shown::new(&tokenizer);
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

/// Tokens that are held back at most. A character has four bytes at most, each of which may be a token: where more
/// are held back, the model writes what is no text.
const HELD_BACK_MAX: usize = 32;
/// Tokens that stay held back then: a character may have begun in them.
const BEGUN_MAX: usize = 3;

/// Generated tokens as text that grows, each decoded a few times however long the text is. A character may take
/// several tokens: until it is whole, decoding ends in a replacement character, and nothing new is shown.
struct Shown<'a> {
    tokenizer: &'a Tokenizer,
    /// What was shown last, and what is held back. A decoder may treat the first token of a text in its own way
    /// (it strips a blank), so what is new is decoded behind what is known.
    tokens: Vec<u32>,
    /// How many of them were shown.
    shown: usize,
    /// Bytes of text that these decode to.
    bytes: usize,
}

impl<'a> Shown<'a> {
    fn new(tokenizer: &'a Tokenizer) -> Self {
        Self { tokenizer, tokens: Vec::new(), shown: 0, bytes: 0 }
    }

    /// The new text.
    fn push(&mut self, token: i64) -> Result<String, DataError> {
        self.tokens.extend(u32::try_from(token)); // the model's tokens are rows of its embedding
        let mut text = self.tokenizer.decode(&self.tokens)?;
        let mut known = self.tokens.len();
        let is_whole = text.len() > self.bytes && !text.ends_with(char::REPLACEMENT_CHARACTER);
        if !is_whole {
            if known - self.shown < HELD_BACK_MAX {
                return Ok(String::new());
            }
            // One that began before would be whole by now.
            known -= BEGUN_MAX;
            text = self.tokenizer.decode(&self.tokens[..known])?;
        }
        let new = self.behind_what_was_shown(&text);
        self.tokens.drain(..self.shown);
        self.shown = known - self.shown;
        self.bytes = self.tokenizer.decode(&self.tokens[..self.shown])?.len();
        Ok(new)
    }

    /// What was held back.
    fn rest(&self) -> Result<String, DataError> {
        Ok(self.behind_what_was_shown(&self.tokenizer.decode(&self.tokens)?))
    }

    fn behind_what_was_shown(&self, text: &str) -> String {
        // What was shown stays as it is, even if the decoder now has other characters there.
        text[text.ceil_char_boundary(self.bytes)..].to_owned()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use consort_common::{
        checkpoint,
        tokenizer::{BYTE_END_OF_TEXT, BYTE_END_OF_TEXT_ID, byte_tokenizer_json},
    };
    use proptest::prelude::*;

    use super::*;
    use crate::{local_training::tests::Site, trainer::test_device};

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
        let mut shown = Shown::new(&tokenizer);
        let pieces: Vec<String> = "a\u{e9}b".bytes().map(|byte| shown.push(byte.into()).unwrap()).collect();
        assert_eq!(pieces, ["a", "", "\u{e9}", "b"]);
        assert_eq!(shown.push(0xC3).unwrap() + &shown.rest().unwrap(), "\u{FFFD}");
    }

    /// A tokenizer as LLaMA 2 has it: words begin with U+2581, the first blank of a text is stripped, and characters
    /// that are no tokens are written as bytes. Of its 9 tokens, 0 ends a document.
    fn words_and_bytes() -> Tokenizer {
        let tokens =
            ["</s>", "\u{2581}", "\u{2581}the", "\u{2581}a", "n", "\u{e9}", "<0xC3>", "<0xA9>", "<0xF0>"];
        let vocabulary: serde_json::Map<_, _> =
            tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), id.into())).collect();
        let json = serde_json::json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": [{
                "id": 0, "content": "</s>", "special": true, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false,
            }],
            "normalizer": null,
            "pre_tokenizer": null,
            "post_processor": null,
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "\u{2581}"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ]},
            "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
        });
        Tokenizer::from_json(json.to_string().as_bytes(), "</s>").unwrap()
    }

    fn check_shown(tokenizer: &Tokenizer, tokens: &[u32]) {
        let mut shown = Shown::new(tokenizer);
        let mut text = String::new();
        for token in tokens {
            text += &shown.push((*token).into()).unwrap();
            assert!(shown.tokens.len() <= 2 * HELD_BACK_MAX, "the whole text is decoded anew");
        }
        assert_eq!(text + &shown.rest().unwrap(), tokenizer.decode(tokens).unwrap(), "{tokens:?}");
    }

    /// Tokens of [`words_and_bytes`], those of a character together.
    const WORDS: [&[u32]; 7] = [&[0], &[1], &[2], &[3], &[4], &[5], &[6, 7]];

    proptest! {
        #[test]
        fn what_is_shown_piece_by_piece_is_the_text_of_all_tokens(
            // Bytes of whole characters: the library's decoder takes back such as it gave, when others follow.
            words in prop::collection::vec(prop::sample::select(WORDS.to_vec()), 0..100),
            bytes in prop::collection::vec(prop::sample::select(vec![0x41, 0xC3, 0xA9, 0xF0, 0x9F, 0x98, 0x80]), 0..200),
        ) {
            check_shown(&words_and_bytes(), &words.concat());
            check_shown(&Tokenizer::byte(), &bytes);
        }
    }

    #[test]
    fn what_is_no_text_is_not_held_back_for_ever() {
        check_shown(&Tokenizer::byte(), &[0x80; 100]);
        check_shown(&words_and_bytes(), &[7; 100]);
    }

    #[test]
    fn a_character_behind_what_is_no_text_is_not_cut() {
        for noise in 25..=35 {
            for character in ["\u{e9}", "\u{20ac}", "\u{1f600}"] {
                let bytes = format!("{character}AA").into_bytes();
                let tokens: Vec<u32> = std::iter::repeat_n(0x80, noise).chain(bytes).map(u32::from).collect();
                check_shown(&Tokenizer::byte(), &tokens);
                assert!(Tokenizer::byte().decode(&tokens).unwrap().ends_with(&format!("{character}AA")));
            }
        }
    }

    #[test]
    fn a_checkpoint_that_is_missing_is_an_error_that_names_it() {
        let error = logits_of_checkpoint(Path::new("/missing/x"), &[1], test_device()).unwrap_err();
        assert!(error.to_string().contains("/missing/x"), "{error}");
    }
}
