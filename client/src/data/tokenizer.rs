//! Text to token ids and back: any Hugging Face `tokenizer.json`, with a path of its own for the built-in byte
//! tokenizer.
//!
//! Text never becomes one of the file's special tokens: `<|endoftext|>` inside a document is encoded as the
//! characters that it consists of, so no document can end itself or pose as several.

use std::sync::Arc;

use consort_common::{
    ids::Digest,
    spec::TokenizerSpec,
    text::parts,
    tokenizer::{BYTE_END_OF_TEXT, BYTE_END_OF_TEXT_ID, BYTE_VOCABULARY, byte_tokenizer_json},
};
use rayon::prelude::*;
use tokenizers::ModelWrapper;

use super::{error::DataError, shard::TokenWidth, words::Words};

/// Longest text given to the tokenizers library at once, in bytes: it needs some hundred bytes of memory per
/// token. Longer documents are encoded in parts, cut where paragraphs end; a token never spans a cut.
pub(super) const ENCODE_BYTES_MAX: usize = 1 << 20;

/// A run's tokenizer; clones share it.
#[derive(Clone)]
pub struct Tokenizer {
    kind: Kind,
    end_of_text: u32,
    vocabulary: usize,
    digest: Digest,
}

#[derive(Clone)]
enum Kind {
    /// Token = byte.
    Byte,
    HuggingFace(Arc<HuggingFace>),
}

struct HuggingFace {
    tokenizer: tokenizers::Tokenizer,
    /// A faster way to the same ids, where there is one.
    words: Option<Words>,
}

impl HuggingFace {
    fn new(tokenizer: tokenizers::Tokenizer) -> Self {
        let words = Words::of(&tokenizer);
        Self { tokenizer, words }
    }

    fn encode(&self, text: &str, ids: &mut Vec<u32>) -> tokenizers::Result<()> {
        if let Some(words) = &self.words {
            return words.encode(self.tokenizer.get_model(), text, ids);
        }
        ids.extend_from_slice(self.tokenizer.encode_fast(text, false)?.get_ids());
        Ok(())
    }
}

impl Tokenizer {
    /// The built-in byte tokenizer.
    pub fn byte() -> Self {
        Self {
            kind: Kind::Byte,
            end_of_text: BYTE_END_OF_TEXT_ID,
            vocabulary: BYTE_VOCABULARY,
            digest: Digest::of(byte_tokenizer_json().as_bytes()),
        }
    }

    /// The tokenizer of a run; `json` is only looked at where the specification names a file.
    ///
    /// # Errors
    /// As [`Tokenizer::from_json`].
    pub fn for_run(spec: &TokenizerSpec, json: &[u8]) -> Result<Self, DataError> {
        match spec {
            TokenizerSpec::Byte {} => Ok(Self::byte()),
            TokenizerSpec::File { end_of_text, .. } => Self::from_json(json, end_of_text),
        }
    }

    /// Reads a `tokenizer.json`; `end_of_text` is the token that ends a document, as text. Truncation, padding
    /// and dropout in the file are switched off: training text is encoded whole, and always the same.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] if the file is not one, or lacks the token.
    pub fn from_json(json: &[u8], end_of_text: &str) -> Result<Self, DataError> {
        if json == byte_tokenizer_json().as_bytes() && end_of_text == BYTE_END_OF_TEXT {
            return Ok(Self::byte());
        }
        let tokenizer = deterministic(json)
            .map_err(|error| DataError::Tokenizer { reason: format!("it cannot be read: {error}") })?;
        let end_of_text = tokenizer.token_to_id(end_of_text).ok_or_else(|| DataError::Tokenizer {
            reason: format!(
                "it has no token {end_of_text:?}, which the specification names as tokenizer.end_of_text"
            ),
        })?;
        // Ids may have gaps: what the model must have is a row for the largest.
        let largest = tokenizer.get_vocab(true).into_values().max().unwrap_or_default();
        Ok(Self {
            kind: Kind::HuggingFace(Arc::new(HuggingFace::new(tokenizer))),
            end_of_text,
            vocabulary: largest as usize + 1,
            digest: Digest::of(json),
        })
    }

    /// Id of the token that ends a document.
    pub fn end_of_text(&self) -> u32 {
        self.end_of_text
    }

    /// One more than the largest id.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// BLAKE3 of the `tokenizer.json`.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// Checks that a model with `vocabulary` embeddings knows every token.
    ///
    /// # Errors
    /// [`DataError::Vocabulary`] if it does not.
    pub fn check_vocabulary(&self, vocabulary: usize) -> Result<(), DataError> {
        if self.vocabulary <= vocabulary {
            return Ok(());
        }
        Err(DataError::Vocabulary { tokenizer: self.vocabulary, model: vocabulary })
    }

    /// The ids of a text, without special tokens.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] if the text has something that the tokenizer cannot express.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, DataError> {
        let tokenizer = match &self.kind {
            Kind::Byte => return Ok(text.bytes().map(u32::from).collect()),
            Kind::HuggingFace(tokenizer) => tokenizer,
        };
        let mut ids = Vec::new();
        for part in parts(text, ENCODE_BYTES_MAX) {
            tokenizer.encode(part, &mut ids).map_err(|error| DataError::Tokenizer {
                reason: format!("it cannot encode some text: {error}"),
            })?;
        }
        Ok(ids)
    }

    /// The text of ids, without special tokens; bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`DataError::Tokenizer`] if the ids cannot be decoded.
    pub fn decode(&self, ids: &[u32]) -> Result<String, DataError> {
        match &self.kind {
            Kind::Byte => {
                let bytes: Vec<u8> = ids.iter().filter_map(|id| u8::try_from(*id).ok()).collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            Kind::HuggingFace(tokenizer) => tokenizer.tokenizer.decode(ids, true).map_err(|error| {
                DataError::Tokenizer { reason: format!("it cannot decode tokens: {error}") }
            }),
        }
    }

    /// Encodes texts on all cores, as shards hold them: ids of `width`. The result is in the order of `texts`,
    /// whatever the number of threads.
    pub(super) fn encode_batch(&self, texts: &[&str], width: TokenWidth) -> Result<Vec<Vec<u8>>, DataError> {
        let encode = |text: &&str| match (&self.kind, width) {
            (Kind::Byte, TokenWidth::U16) => Ok(widen(text.as_bytes())),
            _ => Ok(width.encode(&self.encode(text)?)),
        };
        texts.par_iter().map(encode).collect()
    }
}

/// Bytes as little-endian 16-bit ids.
fn widen(bytes: &[u8]) -> Vec<u8> {
    let mut ids = vec![0; 2 * bytes.len()];
    for (id, byte) in ids.chunks_exact_mut(2).zip(bytes) {
        id[0] = *byte;
    }
    ids
}

/// Loads a tokenizer that gives each text the same ids, whole and without special tokens.
fn deterministic(json: &[u8]) -> tokenizers::Result<tokenizers::Tokenizer> {
    let mut tokenizer = tokenizers::Tokenizer::from_bytes(json)?;
    tokenizer.with_truncation(None)?;
    tokenizer.with_padding(None);
    tokenizer.set_encode_special_tokens(true);
    if let ModelWrapper::BPE(model) = tokenizer.get_model()
        && model.dropout.is_some()
    {
        let mut model = model.clone();
        model.dropout = None;
        tokenizer.with_model(ModelWrapper::BPE(model));
    }
    Ok(tokenizer)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The byte tokenizer as the tokenizers library runs it.
    fn byte_through_library() -> Tokenizer {
        let tokenizer = deterministic(byte_tokenizer_json().as_bytes()).unwrap();
        Tokenizer { kind: Kind::HuggingFace(Arc::new(HuggingFace::new(tokenizer))), ..Tokenizer::byte() }
    }

    /// A small BPE with the merge "ab", dropout, padding and truncation, and a gap in its ids.
    fn small_json() -> String {
        let mut json: serde_json::Value = serde_json::from_str(&byte_tokenizer_json()).unwrap();
        json["model"]["vocab"]["ab"] = 300.into();
        json["model"]["merges"] = serde_json::json!([["a", "b"]]);
        json["model"]["dropout"] = 0.5.into();
        json["truncation"] = serde_json::json!({"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"});
        json.to_string()
    }

    proptest! {
        #[test]
        fn byte_path_gives_the_ids_of_the_library(text in "\\PC{0,60}|(.|\n|\r|\t| ){0,60}|(<\\|endoftext\\|>|a| ){0,8}") {
            let (fast, library) = (Tokenizer::byte(), byte_through_library());
            let ids = fast.encode(&text).unwrap();
            prop_assert_eq!(&ids, &library.encode(&text).unwrap());
            prop_assert_eq!(fast.decode(&ids).unwrap(), text.as_str());
            prop_assert_eq!(library.decode(&ids).unwrap(), text.as_str());
            for width in [TokenWidth::U16, TokenWidth::U32] {
                prop_assert_eq!(
                    fast.encode_batch(&[&text, "x"], width).unwrap(),
                    library.encode_batch(&[&text, "x"], width).unwrap()
                );
            }
        }
    }

    #[test]
    fn byte_tokenizer_is_recognised_by_its_file() {
        let json = byte_tokenizer_json();
        let tokenizer = Tokenizer::from_json(json.as_bytes(), BYTE_END_OF_TEXT).unwrap();
        assert!(matches!(tokenizer.kind, Kind::Byte));
        assert_eq!(tokenizer.digest(), Digest::of(json.as_bytes()));
        assert_eq!(Tokenizer::for_run(&TokenizerSpec::Byte {}, b"").unwrap().digest(), tokenizer.digest());
    }

    #[test]
    fn a_file_is_encoded_whole_and_always_the_same() {
        let tokenizer = Tokenizer::from_json(small_json().as_bytes(), BYTE_END_OF_TEXT).unwrap();
        assert_eq!(tokenizer.end_of_text(), 256);
        for _ in 0..20 {
            assert_eq!(tokenizer.encode("abab c").unwrap(), [300, 300, 32, 99]);
        }
        assert_eq!(tokenizer.decode(&[300, 256, 99]).unwrap(), "abc");
    }

    #[test]
    fn long_documents_are_encoded_in_parts() {
        let tokenizer = Tokenizer::from_json(small_json().as_bytes(), BYTE_END_OF_TEXT).unwrap();
        let text = "ab\n".repeat(ENCODE_BYTES_MAX / 2);
        assert_eq!(tokenizer.encode(&text).unwrap(), [300, 10].repeat(ENCODE_BYTES_MAX / 2));
    }

    #[test]
    fn a_tokenizer_larger_than_the_model_is_refused() {
        let tokenizer = Tokenizer::from_json(small_json().as_bytes(), BYTE_END_OF_TEXT).unwrap();
        assert!(tokenizer.check_vocabulary(301).is_ok());
        let error = tokenizer.check_vocabulary(300).unwrap_err();
        assert!(matches!(error, DataError::Vocabulary { tokenizer: 301, model: 300 }), "{error}");
    }

    #[test]
    fn an_unusable_file_is_an_error() {
        for (json, end_of_text, part) in [
            ("{}", "</s>", "cannot be read"),
            ("\u{0}", "</s>", "cannot be read"),
            (small_json().as_str(), "</s>", "no token \"</s>\""),
        ] {
            let error = Tokenizer::from_json(json.as_bytes(), end_of_text).err().unwrap().to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
