//! The fast way through byte-level BPE tokenizers, the kind of GPT-2 and Llama 3: the text is cut into words by
//! the tokenizer's own regular expression, and each word's ids are remembered.
//!
//! The library's own way keeps for every word what it was made of, character by character, which takes most of
//! its time and is of no use here. The ids are the same: a word's depend on nothing but its bytes, and what a
//! word is, is decided by the same expression in the same engine. Tokenizers that change text first, or that
//! have tokens which are looked for in the text itself, are not of this kind.

use std::{collections::HashMap, sync::Mutex};

use consort_common::tokenizer::byte_characters;
use tokenizers::{
    Model, ModelWrapper, PreTokenizerWrapper, SplitDelimiterBehavior, Tokenizer,
    pre_tokenizers::split::{Split, SplitPattern},
};

/// How GPT-2 cuts text (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, and its
/// published encoder.py), as the tokenizers library has it in `ByteLevel`.
const GPT2_WORD: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
/// Words that one thread remembers. Text repeats its frequent words within any few pages, so that starting anew
/// when there are as many costs little.
const WORDS_MAX: usize = 1 << 16;
/// Longer words, in bytes, are not remembered: they hardly come again.
const WORD_BYTES_MAX: usize = 64;

/// Words with their ids.
type Known = HashMap<Box<str>, Box<[u32]>>;

/// What such a tokenizer does, and the words that each thread knows.
pub(super) struct Words {
    split: Split,
    /// The library's printable character for each byte.
    characters: [char; 256],
    /// One for each thread, so that none waits for another.
    known: Vec<Mutex<Known>>,
}

impl Words {
    /// Nothing if the tokenizer is of another kind.
    pub(super) fn of(tokenizer: &Tokenizer) -> Option<Self> {
        let plain = tokenizer.get_normalizer().is_none()
            && matches!(tokenizer.get_model(), ModelWrapper::BPE(_))
            && tokenizer.get_added_vocabulary().get_encode_special_tokens()
            && tokenizer.get_added_tokens_decoder().values().all(|token| token.special);
        if !plain {
            return None;
        }
        let split = match tokenizer.get_pre_tokenizer()? {
            PreTokenizerWrapper::ByteLevel(bytes) if bytes.use_regex && !bytes.add_prefix_space => {
                let pattern = SplitPattern::Regex(GPT2_WORD.to_owned());
                Split::new(pattern, SplitDelimiterBehavior::Isolated, false).ok()?
            }
            PreTokenizerWrapper::Sequence(steps) => match steps.as_ref() {
                [PreTokenizerWrapper::Split(split), PreTokenizerWrapper::ByteLevel(bytes)]
                    if split.behavior == SplitDelimiterBehavior::Isolated
                        && !split.invert
                        && !bytes.use_regex
                        && !bytes.add_prefix_space =>
                {
                    split.clone()
                }
                _ => return None,
            },
            _ => return None,
        };
        let threads = rayon::current_num_threads().max(1);
        let known = (0..threads).map(|_| Mutex::default()).collect();
        Some(Self { split, characters: byte_characters(), known })
    }

    /// Appends the ids of a text to `ids`.
    pub(super) fn encode(
        &self,
        model: &ModelWrapper,
        text: &str,
        ids: &mut Vec<u32>,
    ) -> tokenizers::Result<()> {
        let thread = rayon::current_thread_index().unwrap_or_default() % self.known.len();
        let mut known = self.known[thread].lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut end_of_last = 0;
        for (start, end) in self.split.regex.find_iter(text) {
            // What lies between two matches is a word as well.
            for word in [&text[end_of_last..start], &text[start..end]] {
                self.encode_word(model, &mut known, word, ids)?;
            }
            end_of_last = end;
        }
        self.encode_word(model, &mut known, &text[end_of_last..], ids)
    }

    fn encode_word(
        &self,
        model: &ModelWrapper,
        known: &mut Known,
        word: &str,
        ids: &mut Vec<u32>,
    ) -> tokenizers::Result<()> {
        if word.is_empty() {
            return Ok(());
        }
        if let Some(word_ids) = known.get(word) {
            ids.extend_from_slice(word_ids);
            return Ok(());
        }
        let characters: String = word.bytes().map(|byte| self.characters[usize::from(byte)]).collect();
        let word_ids: Box<[u32]> = model.tokenize(&characters)?.iter().map(|token| token.id).collect();
        ids.extend_from_slice(&word_ids);
        if word.len() <= WORD_BYTES_MAX {
            if known.len() >= WORDS_MAX {
                known.clear();
            }
            known.insert(word.into(), word_ids);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    /// A byte-level BPE with some merges, its text cut by `pre_tokenizer`.
    fn tokenizer(pre_tokenizer: Value) -> Tokenizer {
        let mut json: Value =
            serde_json::from_str(&consort_common::tokenizer::byte_tokenizer_json()).unwrap();
        let merges = [
            ("t", "h"),
            ("th", "e"),
            ("Ġ", "the"),
            ("Ġ", "a"),
            ("Ġ", "Ġ"),
            ("Ã", "¼"),
            ("1", "2"),
            ("'", "s"),
        ];
        for (index, (left, right)) in merges.iter().enumerate() {
            json["model"]["vocab"][format!("{left}{right}")] = (257 + index).into();
        }
        json["model"]["merges"] = merges.iter().map(|(left, right)| json!([left, right])).collect();
        json["pre_tokenizer"] = pre_tokenizer;
        let mut tokenizer = Tokenizer::from_bytes(json.to_string()).unwrap();
        tokenizer.set_encode_special_tokens(true);
        tokenizer
    }

    fn byte_level(add_prefix_space: bool, use_regex: bool) -> Value {
        json!({"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": true, "use_regex": use_regex})
    }

    fn split(pattern: &str) -> Value {
        let split =
            json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
        json!({"type": "Sequence", "pretokenizers": [split, byte_level(false, false)]})
    }

    /// How Llama 3 cuts text, as its tokenizer.json says.
    const LLAMA3_WORD: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

    proptest! {
        #[test]
        fn ids_are_those_of_the_library(
            texts in prop::collection::vec(
                "\\PC{0,40}|(the| the|'s|n't|12345|\n|\r|\t| |ü|東|🦀|a){0,30}|(.|\n){0,40}|(<\\|endoftext\\|>| ){0,4}", 1..6,
            ),
            kind in 0usize..3,
        ) {
            // The last one leaves gaps between its matches.
            let tokenizer = tokenizer([byte_level(false, true), split(LLAMA3_WORD), split("[a-z]+")][kind].clone());
            let words = Words::of(&tokenizer).unwrap();
            for text in &texts {
                let mut ids = Vec::new();
                words.encode(tokenizer.get_model(), text, &mut ids).unwrap();
                let expected = tokenizer.encode_fast(text.as_str(), false).unwrap();
                prop_assert_eq!(&ids[..], expected.get_ids());
            }
        }
    }

    #[test]
    fn more_words_than_are_remembered_are_encoded_all_the_same() {
        let tokenizer = tokenizer(byte_level(false, true));
        let words = Words::of(&tokenizer).unwrap();
        let text: String = (0..WORDS_MAX + 10).map(|word| format!(" a{word}")).collect();
        let mut ids = Vec::new();
        words.encode(tokenizer.get_model(), &text, &mut ids).unwrap();
        assert_eq!(ids, tokenizer.encode_fast(text, false).unwrap().get_ids());
    }

    #[test]
    fn tokenizers_of_another_kind_are_left_to_the_library() {
        for pre_tokenizer in
            [Value::Null, byte_level(true, true), byte_level(false, false), json!({"type": "Whitespace"})]
        {
            assert!(Words::of(&tokenizer(pre_tokenizer.clone())).is_none(), "{pre_tokenizer}");
        }
        let mut normalised = tokenizer(byte_level(false, true));
        normalised.with_normalizer(Some(tokenizers::normalizers::unicode::NFC));
        assert!(Words::of(&normalised).is_none());
        let mut added = tokenizer(byte_level(false, true));
        added.add_tokens(&[tokenizers::AddedToken::from("added", false)]);
        assert!(Words::of(&added).is_none());
    }
}
