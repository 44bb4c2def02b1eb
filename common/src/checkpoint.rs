//! Checkpoints: a model as a Hugging Face directory that `AutoModelForCausalLM` and `AutoTokenizer` load as
//! it is, and the way back.
//!
//! A directory is prepared beside its place and renamed: under its own name it is whole or not there. Writing
//! and reading hold a block of the model at a time.

mod json;
mod reader;
mod tensor_file;
mod weights;

use std::{
    collections::BTreeMap,
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use serde_json::{Value, json};

pub use self::{reader::CheckpointReader, tensor_file::TensorFileError, weights::WeightsError};
use crate::{
    atomic_file::{create_partial_directory, remove_directory, rename_directory_into_place, write_durably},
    model::{Architecture, ConfigError},
};

const MODEL_FILE: &str = "model.safetensors";
const CONFIG_FILE: &str = "config.json";
const TOKENIZER_FILE: &str = "tokenizer.json";
const TOKENIZER_CONFIG_FILE: &str = "tokenizer_config.json";
const SPECIAL_TOKENS_FILE: &str = "special_tokens_map.json";
const GENERATION_CONFIG_FILE: &str = "generation_config.json";

/// The key, in the header of the weights, of whether attention was kept within documents in training:
/// `training.document_mask` of the specification, "true" or "false". `transformers` ignores it.
pub const DOCUMENT_MASK: &str = "consort_document_mask";

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
    #[error("{} has more than {} bytes", path.display(), json::BYTES_MAX)]
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
    Weights {
        /// The file of weights, or the index that lists several.
        path: PathBuf,
        /// What in it.
        source: WeightsError,
    },
    /// There are weights, but not as safetensors.
    #[error(
        "{} holds no {MODEL_FILE}, but {found}: load it with transformers and save it with \
         save_pretrained(path)", directory.display()
    )]
    OtherFormat {
        /// The checkpoint.
        directory: PathBuf,
        /// The file that was found instead.
        found: &'static str,
    },
    /// There is no tokenizer of the kind that is read.
    #[error(
        "{} holds no {TOKENIZER_FILE}: load its tokenizer with transformers' AutoTokenizer and save it with \
         save_pretrained(path)", directory.display()
    )]
    Tokenizer {
        /// The checkpoint.
        directory: PathBuf,
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

/// Reads a checkpoint whole; see [`CheckpointReader`], which does it piece by piece.
///
/// # Errors
/// As [`CheckpointReader::open`] and [`CheckpointReader::fill`].
pub fn read(directory: &Path) -> Result<LoadedCheckpoint, CheckpointError> {
    let reader = CheckpointReader::open(directory)?;
    let parameters = reader.architecture().manifest().parameters();
    let mut flat = vec![0.0; usize::try_from(parameters).expect("a vector fits the address space")];
    reader.fill(0, &mut flat)?;
    Ok(LoadedCheckpoint {
        architecture: reader.architecture().clone(),
        flat,
        tokenizer_json: reader.tokenizer_json().to_owned(),
        end_of_text: reader.end_of_text().to_owned(),
    })
}

#[cfg(test)]
mod tests;
