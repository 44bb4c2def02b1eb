//! What can go wrong with text in files, each with what to do about it.

use std::{io, path::PathBuf};

use super::documents::Cancelled;

/// Why text cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum TextError {
    /// The source is missing or unreadable.
    #[error("cannot read the data source {path}: {source}; name a file or directory that this user can read")]
    Source {
        /// The source as configured.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The source holds no file of a known kind.
    #[error(
        "no text in {path}: expected files ending in .txt or .jsonl, optionally with .gz or .zst after it, or in \
         .parquet, and found {other_files} other files; put text there or name another directory"
    )]
    NoFiles {
        /// The source as configured.
        path: PathBuf,
        /// Files whose names end otherwise.
        other_files: u64,
    },
    /// There are more files than the listing holds.
    #[error(
        "more than {limit} files in {path}: join small documents into .jsonl files, one document per line"
    )]
    TooManyFiles {
        /// The source as configured.
        path: PathBuf,
        /// The most that are listed.
        limit: usize,
    },
    /// Files are there, but not one usable document.
    #[error("no usable document in the {files} files of {paths}; {first_fault}")]
    NoDocuments {
        /// The sources as configured.
        paths: String,
        /// Files read.
        files: u64,
        /// The first thing that was wrong, in words.
        first_fault: String,
    },
    /// No tokenizer can be made.
    #[error("a tokenizer cannot be made: {reason}")]
    TokenizerTraining {
        /// What is asked too much, or what the tokenizers library said.
        reason: String,
    },
    /// The caller asked to stop.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
}
