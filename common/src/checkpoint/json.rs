//! The JSON files of a checkpoint.

use std::{fs::File, io::Read, path::Path};

use serde::de::DeserializeOwned;

use super::CheckpointError;
use crate::atomic_file::named;

/// Longest JSON file of a checkpoint that is read, in bytes: the tokenizers of large vocabularies have
/// 10 to 35 MB.
pub(super) const BYTES_MAX: u64 = 256 << 20;

pub(super) fn read<T: DeserializeOwned>(path: &Path) -> Result<T, CheckpointError> {
    parse(path, &read_text(path)?)
}

/// `text` was read from `path`.
pub(super) fn parse<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T, CheckpointError> {
    serde_json::from_str(text).map_err(|source| CheckpointError::Json { path: path.to_owned(), source })
}

pub(super) fn read_text(path: &Path) -> Result<String, CheckpointError> {
    let file = named("open", path, File::open(path))?;
    let mut text = String::new();
    named("read", path, file.take(BYTES_MAX + 1).read_to_string(&mut text))?;
    if text.len() as u64 > BYTES_MAX {
        return Err(CheckpointError::JsonTooLong { path: path.to_owned() });
    }
    Ok(text)
}
