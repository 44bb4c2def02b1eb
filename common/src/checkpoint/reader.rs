//! A Hugging Face directory, opened: one of ours, or any checkpoint of the supported architectures.

use std::path::Path;

use serde_json::Value;

use super::{
    CONFIG_FILE, CheckpointError, DOCUMENT_MASK, GENERATION_CONFIG_FILE, SPECIAL_TOKENS_FILE,
    TOKENIZER_CONFIG_FILE, TOKENIZER_FILE, json, weights::Weights,
};
use crate::model::Architecture;

/// A checkpoint whose weights stay in their files until they are asked for.
#[derive(Debug)]
pub struct CheckpointReader {
    architecture: Architecture,
    tokenizer_json: String,
    end_of_text: String,
    weights: Weights,
}

impl CheckpointReader {
    /// Opens the checkpoint in `directory`: `config.json`, `tokenizer.json` and the weights, in
    /// `model.safetensors` or in the files that `model.safetensors.index.json` lists, as fp32, bf16 or fp16.
    /// Takes no memory of the model's size.
    ///
    /// # Errors
    /// If a file is missing or malformed, the architecture has features that are not supported, the tensors
    /// are not exactly those of the architecture, or no file names the token that ends a document.
    pub fn open(directory: &Path) -> Result<Self, CheckpointError> {
        let path = directory.join(CONFIG_FILE);
        let config: Value = json::read(&path)?;
        let architecture = Architecture::from_hugging_face_config(&config)
            .map_err(|source| CheckpointError::Config { path, source })?;
        let path = directory.join(TOKENIZER_FILE);
        if !path.exists() {
            return Err(CheckpointError::Tokenizer { directory: directory.to_owned() });
        }
        let tokenizer_json = json::read_text(&path)?;
        let tokenizer: Value = json::parse(&path, &tokenizer_json)?;
        let end_of_text = end_of_text(directory, &config, &tokenizer)?
            .ok_or_else(|| CheckpointError::EndOfText { directory: directory.to_owned() })?;
        let weights = Weights::open(directory, &architecture)?;
        Ok(Self { architecture, tokenizer_json, end_of_text, weights })
    }

    /// The model's shape.
    pub fn architecture(&self) -> &Architecture {
        &self.architecture
    }

    /// The text of its `tokenizer.json`.
    pub fn tokenizer_json(&self) -> &str {
        &self.tokenizer_json
    }

    /// The token that ends a document, as text.
    pub fn end_of_text(&self) -> &str {
        &self.end_of_text
    }

    /// Whether attention was kept within documents when the model was trained; nothing where the checkpoint does not
    /// say so, as of others' training.
    pub fn document_mask(&self) -> Option<bool> {
        self.weights.metadata(DOCUMENT_MASK)?.parse().ok()
    }

    /// Fills `values` with the flat vector's (fp32 in the manifest's order) from the position `start` on, for
    /// a vector that is taken piece by piece. All that were filled are finite.
    ///
    /// # Errors
    /// If `values` goes beyond the vector's end, a value is NaN or infinite, or a file cannot be read.
    pub fn fill(&self, start: u64, values: &mut [f32]) -> Result<(), CheckpointError> {
        self.weights.fill(start, values)
    }
}

/// The end-of-text token as the tokenizer's own files name it, else by the id that the model's name.
fn end_of_text(
    directory: &Path,
    config: &Value,
    tokenizer: &Value,
) -> Result<Option<String>, CheckpointError> {
    let read_if_there = |name: &str| -> Result<Option<Value>, CheckpointError> {
        let path = directory.join(name);
        path.exists().then(|| json::read(&path)).transpose()
    };
    for name in [TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE] {
        let file = read_if_there(name)?.unwrap_or_default();
        // A text, or an object that describes the token.
        let token = file.get("eos_token").and_then(|token| token.get("content").unwrap_or(token).as_str());
        if let Some(token) = token {
            return Ok(Some(token.to_owned()));
        }
    }
    let generation_config = read_if_there(GENERATION_CONFIG_FILE)?.unwrap_or_default();
    let id = [&generation_config, config].into_iter().find_map(end_of_text_id);
    Ok(id.and_then(|id| token_of_id(tokenizer, id)))
}

/// A number, or a list whose first one ends a document; further ones end the turns of a chat.
fn end_of_text_id(config: &Value) -> Option<u64> {
    let id = config.get("eos_token_id")?;
    id.as_array().map_or(Some(id), |ids| ids.first())?.as_u64()
}

/// The text of a token in a `tokenizer.json`.
fn token_of_id(tokenizer: &Value, id: u64) -> Option<String> {
    let added = tokenizer.get("added_tokens").and_then(Value::as_array).into_iter().flatten();
    let added =
        added.filter(|token| token["id"].as_u64() == Some(id)).filter_map(|token| token["content"].as_str());
    let vocabulary = tokenizer["model"]["vocab"].as_object().into_iter().flatten();
    let vocabulary =
        vocabulary.filter(|(_, value)| value.as_u64() == Some(id)).map(|(token, _)| token.as_str());
    added.chain(vocabulary).next().map(str::to_owned)
}
