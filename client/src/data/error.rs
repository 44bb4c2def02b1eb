//! Everything that can go wrong with a site's text, each with what to do about it.

use std::{
    io,
    path::{Path, PathBuf},
};

use consort_common::text::{Cancelled, STRETCH_BYTES_MAX, TextError};

/// Why a site's text cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The sources cannot be read, or hold no text.
    #[error(transparent)]
    Text(TextError),
    /// The sources do not go together.
    #[error("the data sources cannot be used: {}", problems.join("; "))]
    Sources {
        /// All that is wrong.
        problems: Vec<String>,
    },
    /// The text is too little to be split.
    #[error(
        "of {documents} documents {train} have text to train on and {held_out} have held-out text, and both need at \
         least one: provide more text (a .txt file is one document, held out whole or in stretches of {} KiB; of a \
         .jsonl file each line is one) or change evaluation.held_out_fraction",
        STRETCH_BYTES_MAX >> 10
    )]
    EmptySplit {
        /// Distinct documents.
        documents: u64,
        /// Of them with text to be trained on.
        train: u64,
        /// Of them with held-out text.
        held_out: u64,
    },
    /// A shard is shorter than one sequence.
    #[error(
        "the {what} text has {tokens} tokens and one sequence needs {}: provide more text or lower \
         training.sequence_length", sequence_length + 1
    )]
    TooShort {
        /// "training", with the name of its source where there are several, or "held-out".
        what: String,
        /// Tokens in the shard.
        tokens: u64,
        /// Tokens that a sequence predicts.
        sequence_length: usize,
    },
    /// A shard has more sequences than an epoch's order can number.
    #[error(
        "the training text has {windows} sequences, more than the {} that an epoch can order: raise \
             training.sequence_length or split the source over several sites",
        u32::MAX
    )]
    TooManyWindows {
        /// Sequences in the shard.
        windows: u64,
    },
    /// The held-out fraction is not a fraction.
    #[error("evaluation.held_out_fraction is {0}: expected at least 0 and less than 1")]
    HeldOutFraction(f64),
    /// The run's tokenizer cannot be used.
    #[error("the run's tokenizer.json cannot be used: {reason}; the run's operator must provide another")]
    Tokenizer {
        /// What the tokenizers library said, or what is missing.
        reason: String,
    },
    /// The tokenizer has ids that the model has no embedding for.
    #[error(
        "the run's tokenizer has {tokenizer} tokens but its model's vocabulary only {model}: the run's operator must \
         raise the model's vocabulary or choose another tokenizer"
    )]
    Vocabulary {
        /// One more than the tokenizer's largest id.
        tokenizer: usize,
        /// Rows of the model's embedding.
        model: usize,
    },
    /// The disk is full while shards are written.
    #[error(
        "no space left for tokens at {path} after {bytes_written} bytes: free disk space or move the state directory, then start again"
    )]
    DiskFull {
        /// The file or folder.
        path: PathBuf,
        /// Bytes of this file that were written.
        bytes_written: u64,
    },
    /// The cache cannot be read or written.
    #[error("cannot {action} {path}: {source}; check the folder's permissions")]
    Cache {
        /// "create", "write", "open".
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A cache has no prepared text.
    #[error(
        "no text was prepared in {path}: name the folder that `data prepare` was given as --cache, or `text` in a daemon's state directory"
    )]
    NothingPrepared {
        /// The cache.
        path: PathBuf,
    },
    /// Somebody else prepares data in the same cache.
    #[error(
        "another process is preparing data in {path}: stop it, or give each client a state directory of its own"
    )]
    Busy {
        /// The cache.
        path: PathBuf,
    },
    /// A shard is not what was written.
    #[error("{path} is damaged: {reason}; delete it and start again, and it is made anew")]
    Corrupt {
        /// The shard.
        path: PathBuf,
        /// What does not fit.
        reason: String,
    },
    /// Tokens were asked for that the shard does not have.
    #[error(
        "tokens {start} to {end} asked of a shard of {tokens}: a cursor or a window belongs to another shard"
    )]
    OutOfRange {
        /// First token.
        start: u64,
        /// One past the last.
        end: u64,
        /// Tokens in the shard.
        tokens: u64,
    },
    /// No batches are read ahead any more.
    #[error("the thread that reads the training text ahead {reason}; start again")]
    Feed {
        /// "has ended", or why it cannot be started.
        reason: String,
    },
    /// The caller asked to stop.
    #[error("preparing the data was cancelled; nothing was kept")]
    Cancelled,
}

impl From<TextError> for DataError {
    fn from(error: TextError) -> Self {
        match error {
            TextError::Cancelled(_) => Self::Cancelled,
            error => Self::Text(error),
        }
    }
}

impl From<Cancelled> for DataError {
    fn from(_: Cancelled) -> Self {
        Self::Cancelled
    }
}

impl DataError {
    /// Tells a full disk from every other fault of the cache.
    pub(super) fn cache(action: &'static str, path: &Path, bytes_written: u64, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::DiskFull { path, bytes_written }
            }
            _ => Self::Cache { action, path, source },
        }
    }
}
