//! What preparing found, source by source: the numbers that a site sees and reports, and the list of what was
//! skipped. Holds no text.

use consort_common::text::Skipped;
use serde::{Deserialize, Serialize};

use super::lengths::Lengths;

/// Most faults of one source listed one by one; the rest are only counted.
pub(super) const SKIPPED_LISTED_MAX: usize = 100;

/// What preparing found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Source by source, in the order in which they were named.
    pub sources: Vec<SourceStats>,
}

/// What preparing found in one source, or in all together.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SourceStats {
    /// The source's name; empty for all together.
    pub name: String,
    /// Files read, whole or in part.
    pub files: u64,
    /// Their bytes on disk.
    pub file_bytes: u64,
    /// What is trained on.
    pub train: SplitStats,
    /// What is measured on.
    pub held_out: SplitStats,
    /// How many tokens the documents have on either side of the split, the end-of-text token included.
    pub lengths: Lengths,
    /// Documents dropped because the same text came before, in this source or in one named before it; or pieces of
    /// a `.txt` file too long to be compared whole.
    pub duplicates: u64,
    /// Documents dropped because they are blank.
    pub blank: u64,
    /// Documents too late to be compared with all others: past the bound of the list of digests.
    pub not_compared: u64,
    /// Files, pieces of files, lines and rows that were skipped.
    pub skipped: u64,
    /// The first of them, in the order of the source.
    pub skipped_listed: Vec<Skipped>,
}

/// One side of the split.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SplitStats {
    /// Distinct documents with text on this side: a long `.txt` file may have some on both.
    pub documents: u64,
    /// Tokens of that text, with one end-of-text token for each document.
    pub tokens: u64,
    /// Its UTF-8 bytes.
    pub text_bytes: u64,
}

impl Stats {
    /// All sources together, without a name and without the list of what was skipped.
    pub fn total(&self) -> SourceStats {
        self.sources.iter().fold(SourceStats::default(), |sum, source| SourceStats {
            name: String::new(),
            files: sum.files.saturating_add(source.files),
            file_bytes: sum.file_bytes.saturating_add(source.file_bytes),
            train: sum.train.plus(source.train),
            held_out: sum.held_out.plus(source.held_out),
            lengths: sum.lengths.plus(&source.lengths),
            duplicates: sum.duplicates.saturating_add(source.duplicates),
            blank: sum.blank.saturating_add(source.blank),
            not_compared: sum.not_compared.saturating_add(source.not_compared),
            skipped: sum.skipped.saturating_add(source.skipped),
            skipped_listed: Vec::new(),
        })
    }

    /// What was skipped, as far as it is listed, each with its source's name.
    pub fn skipped(&self) -> impl Iterator<Item = (&str, &Skipped)> {
        self.sources
            .iter()
            .flat_map(|source| source.skipped_listed.iter().map(|skipped| (source.name.as_str(), skipped)))
    }
}

impl SourceStats {
    /// Distinct documents, trained on and held out; one that is both counts twice.
    pub fn documents(&self) -> u64 {
        self.all().documents
    }

    /// Tokens, trained on and held out.
    pub fn tokens(&self) -> u64 {
        self.all().tokens
    }

    /// Both sides of the split.
    pub fn all(&self) -> SplitStats {
        self.train.plus(self.held_out)
    }

    pub(super) fn skip(&mut self, skipped: Skipped) {
        self.skipped += 1;
        if self.skipped_listed.len() < SKIPPED_LISTED_MAX {
            self.skipped_listed.push(skipped);
        }
    }
}

impl SplitStats {
    /// Both together.
    fn plus(self, other: Self) -> Self {
        Self {
            documents: self.documents.saturating_add(other.documents),
            tokens: self.tokens.saturating_add(other.tokens),
            text_bytes: self.text_bytes.saturating_add(other.text_bytes),
        }
    }

    pub(super) fn add(&mut self, more: Self) {
        *self = self.plus(more);
    }
}
