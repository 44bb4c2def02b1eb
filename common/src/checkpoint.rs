//! Checkpoints: a model as a Hugging Face directory that `AutoModelForCausalLM` and `AutoTokenizer` load as
//! it is, and the way back.
//!
//! A directory is prepared beside its place and renamed: under its own name it is whole or not there. Writing
//! holds a block of the model at a time, reading the one vector that it gives.

mod tensor_file;

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

pub use self::tensor_file::TensorFileError;
use crate::{
    atomic_file::{
        create_partial_directory, named, remove_directory, rename_directory_into_place, write_durably,
    },
    model::{Architecture, ConfigError},
};

const MODEL_FILE: &str = "model.safetensors";
const CONFIG_FILE: &str = "config.json";
const TOKENIZER_FILE: &str = "tokenizer.json";
const TOKENIZER_CONFIG_FILE: &str = "tokenizer_config.json";
const SPECIAL_TOKENS_FILE: &str = "special_tokens_map.json";
const GENERATION_CONFIG_FILE: &str = "generation_config.json";

/// Longest JSON file of a checkpoint that is read, in bytes: the tokenizers of large vocabularies have
/// 10 to 35 MB.
const JSON_BYTES_MAX: u64 = 256 << 20;

/// Why a checkpoint could not be written or read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The flat vector is not the architecture's.
    #[error("the flat vector has {actual} values where the architecture has {expected} parameters")]
    Length {
        /// Parameters of the architecture.
        expected: u64,
        /// Values given.
        actual: u64,
    },
    /// The file system refused.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// A file is not the JSON that it should be.
    #[error("{} is not JSON: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: serde_json::Error,
    },
    /// A JSON file is larger than any tokenizer.
    #[error("{} has more than {JSON_BYTES_MAX} bytes", path.display())]
    JsonTooLong {
        /// The file.
        path: PathBuf,
    },
    /// The model is not one that can be trained here.
    #[error("{}: {source}", path.display())]
    Config {
        /// The `config.json`.
        path: PathBuf,
        /// What in it.
        source: ConfigError,
    },
    /// The weights are not those of the configuration.
    #[error("{}: {source}", path.display())]
    Tensors {
        /// The `model.safetensors`.
        path: PathBuf,
        /// What in it.
        source: TensorFileError,
    },
    /// There are weights, but not in one safetensors file.
    #[error(
        "{} holds no {MODEL_FILE}, but {found}: load it with transformers and save it with \
         save_pretrained(path, max_shard_size=\"1TB\")", directory.display()
    )]
    OtherFormat {
        /// The checkpoint.
        directory: PathBuf,
        /// The file that was found instead.
        found: &'static str,
    },
    /// No file tells which token ends a document.
    #[error(
        "{}: no end-of-text token: set \"eos_token\" in {TOKENIZER_CONFIG_FILE} or {SPECIAL_TOKENS_FILE}",
        directory.display()
    )]
    EndOfText {
        /// The checkpoint.
        directory: PathBuf,
    },
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CheckpointSummary {
    /// Size of all files, in bytes.
    pub bytes: u64,
}

/// A checkpoint in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadedCheckpoint {
    /// The model's shape.
    pub architecture: Architecture,
    /// Its parameters as fp32 in the manifest's order.
    pub flat: Vec<f32>,
    /// Its `tokenizer.json`.
    pub tokenizer_json: String,
    /// The token that ends a document, as text.
    pub end_of_text: String,
}

/// Writes the model `flat` (the manifest's order, fp32) like [`write_from`].
///
/// # Errors
/// If `flat` has not the architecture's length, or as [`write_from`].
pub fn write(
    directory: &Path,
    architecture: &Architecture,
    flat: &[f32],
    tokenizer_json: &str,
    end_of_text: &str,
    end_of_text_id: u32,
    metadata: &BTreeMap<String, String>,
) -> Result<CheckpointSummary, CheckpointError> {
    let (expected, actual) = (architecture.manifest().parameters(), flat.len() as u64);
    if expected != actual {
        return Err(CheckpointError::Length { expected, actual });
    }
    let mut values = bytemuck::cast_slice(flat);
    write_from(directory, architecture, &mut values, tokenizer_json, end_of_text, end_of_text_id, metadata)
}

/// Writes the model whose flat vector (the manifest's order, fp32 little-endian) `values` gives as the
/// Hugging Face directory `directory`, replacing one that is there; durable on return. `metadata` goes into
/// the header of `model.safetensors`. Takes a block of memory, whatever the model's size.
///
/// The same arguments give the same bytes on every machine.
///
/// # Errors
/// If `values` fails or ends early, or the file system refuses; `directory` is then as before, or absent if
/// the failure was the last step of replacing it.
pub fn write_from(
    directory: &Path,
    architecture: &Architecture,
    values: &mut dyn Read,
    tokenizer_json: &str,
    end_of_text: &str,
    end_of_text_id: u32,
    metadata: &BTreeMap<String, String>,
) -> Result<CheckpointSummary, CheckpointError> {
    let partial = create_partial_directory(directory)?;
    let mut write = || -> io::Result<u64> {
        let mut bytes = 0;
        write_durably(&partial.join(MODEL_FILE), |file| {
            bytes += tensor_file::write(file, &architecture.manifest(), values, metadata)?;
            Ok(())
        })?;
        let texts = [
            (CONFIG_FILE, pretty(&config(architecture, end_of_text_id))),
            (GENERATION_CONFIG_FILE, pretty(&generation_config(end_of_text_id))),
            (TOKENIZER_FILE, tokenizer_json.to_owned()),
            (TOKENIZER_CONFIG_FILE, pretty(&tokenizer_config(architecture, end_of_text))),
            (SPECIAL_TOKENS_FILE, pretty(&special_tokens(end_of_text))),
        ];
        for (name, text) in texts {
            write_durably(&partial.join(name), |file| file.write_all(text.as_bytes()))?;
            bytes += text.len() as u64;
        }
        rename_directory_into_place(&partial, directory)?;
        Ok(bytes)
    };
    match write() {
        Ok(bytes) => Ok(CheckpointSummary { bytes }),
        Err(error) => {
            // Space is what is missing most often: give it back. The first error is the one to report.
            let _ = remove_directory(&partial);
            Err(error.into())
        }
    }
}

fn config(architecture: &Architecture, end_of_text_id: u32) -> Value {
    let mut config = architecture.hugging_face_config();
    config["bos_token_id"] = end_of_text_id.into();
    config["eos_token_id"] = end_of_text_id.into();
    config
}

fn generation_config(end_of_text_id: u32) -> Value {
    json!({"_from_model_config": true, "bos_token_id": end_of_text_id, "eos_token_id": end_of_text_id})
}

/// The class is spelt out: else `AutoTokenizer` would take the architecture's own, whose rules (LLaMA's
/// leading blank, for one) are not those that the run trained with.
fn tokenizer_config(architecture: &Architecture, end_of_text: &str) -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "clean_up_tokenization_spaces": false,
        "model_max_length": architecture.context_length(),
    })
}

fn special_tokens(end_of_text: &str) -> Value {
    json!({"bos_token": end_of_text, "eos_token": end_of_text})
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}

/// Reads a Hugging Face directory: one of ours, or any LLaMA or GPT-2 checkpoint in a single safetensors
/// file of fp32, bf16 or fp16 values.
///
/// # Errors
/// If a file is missing or malformed, the architecture has features that are not supported, or the tensors
/// are not exactly those of the architecture, finite throughout.
pub fn read(directory: &Path) -> Result<LoadedCheckpoint, CheckpointError> {
    let path = directory.join(CONFIG_FILE);
    let config = read_json(&path)?;
    let architecture = Architecture::from_hugging_face_config(&config)
        .map_err(|source| CheckpointError::Config { path, source })?;
    let tokenizer_json = read_text(&directory.join(TOKENIZER_FILE))?;
    let tokenizer: Value = serde_json::from_str(&tokenizer_json)
        .map_err(|source| CheckpointError::Json { path: directory.join(TOKENIZER_FILE), source })?;
    let end_of_text = end_of_text(directory, &config, &tokenizer)?
        .ok_or_else(|| CheckpointError::EndOfText { directory: directory.to_owned() })?;
    let path = model_file(directory)?;
    let file = named("open", &path, File::open(&path))?;
    let flat = tensor_file::read(&file, &architecture)
        .map_err(|source| CheckpointError::Tensors { path, source })?;
    Ok(LoadedCheckpoint { architecture, flat, tokenizer_json, end_of_text })
}

/// The file of the weights, or which other one there is.
fn model_file(directory: &Path) -> Result<PathBuf, CheckpointError> {
    let path = directory.join(MODEL_FILE);
    let others = ["model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json"];
    match others.into_iter().find(|name| directory.join(name).exists()) {
        Some(found) if !path.exists() => {
            Err(CheckpointError::OtherFormat { directory: directory.to_owned(), found })
        }
        _ => Ok(path),
    }
}

/// The end-of-text token as the tokenizer's own files name it, else by the id in `config.json`.
fn end_of_text(
    directory: &Path,
    config: &Value,
    tokenizer: &Value,
) -> Result<Option<String>, CheckpointError> {
    for name in [TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE] {
        let path = directory.join(name);
        if !path.exists() {
            continue;
        }
        let file = read_json(&path)?;
        // A text, or an object that describes the token.
        let token = file.get("eos_token").and_then(|token| token.get("content").unwrap_or(token).as_str());
        if let Some(token) = token {
            return Ok(Some(token.to_owned()));
        }
    }
    let eos_token_id = config.get("eos_token_id").and_then(Value::as_u64);
    Ok(eos_token_id.and_then(|id| token_of_id(tokenizer, id)))
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

fn read_json(path: &Path) -> Result<Value, CheckpointError> {
    let text = read_text(path)?;
    serde_json::from_str(&text).map_err(|source| CheckpointError::Json { path: path.to_owned(), source })
}

fn read_text(path: &Path) -> Result<String, CheckpointError> {
    let file = named("open", path, File::open(path))?;
    let mut text = String::new();
    named("read", path, file.take(JSON_BYTES_MAX + 1).read_to_string(&mut text))?;
    if text.len() as u64 > JSON_BYTES_MAX {
        return Err(CheckpointError::JsonTooLong { path: path.to_owned() });
    }
    Ok(text)
}

#[cfg(test)]
mod tests;
