//! What preparing a source found: the numbers that a site sees and reports, and the list of what was skipped.
//! Holds no text.

use serde::{Deserialize, Serialize};

/// Most faults listed one by one; the rest are only counted.
pub(super) const SKIPPED_LISTED_MAX: usize = 100;

/// What preparing a source found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Files read, whole or in part.
    pub files: u64,
    /// What is trained on.
    pub train: SplitStats,
    /// What is measured on.
    pub held_out: SplitStats,
    /// Documents dropped because the same text came before.
    pub duplicates: u64,
    /// Documents dropped because they are blank.
    pub blank: u64,
    /// Documents too late to be compared with all others: past the bound of the list of digests.
    pub not_compared: u64,
    /// Files, pieces of files and lines that were skipped.
    pub skipped: u64,
    /// The first of them, in the order of the source.
    pub skipped_listed: Vec<Skipped>,
}

/// One side of the split.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SplitStats {
    /// Distinct documents.
    pub documents: u64,
    /// Their tokens, with one end-of-text token each.
    pub tokens: u64,
    /// Their UTF-8 bytes.
    pub text_bytes: u64,
}

/// Something that was skipped, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Skipped {
    /// Path relative to the source.
    pub file: String,
    /// Line in the file, from 1; absent where a file or a piece of it was skipped.
    pub line: Option<u64>,
    /// What was wrong; never content.
    pub reason: String,
}

impl Stats {
    /// Distinct documents, trained on and held out.
    pub fn documents(&self) -> u64 {
        self.train.documents + self.held_out.documents
    }

    /// Tokens, trained on and held out.
    pub fn tokens(&self) -> u64 {
        self.train.tokens + self.held_out.tokens
    }

    pub(super) fn skip(&mut self, skipped: Skipped) {
        self.skipped += 1;
        if self.skipped_listed.len() < SKIPPED_LISTED_MAX {
            self.skipped_listed.push(skipped);
        }
    }
}

impl std::fmt::Display for Skipped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.line {
            Some(line) => write!(f, "{}, line {line}: {}", self.file, self.reason),
            None => write!(f, "{}: {}", self.file, self.reason),
        }
    }
}
