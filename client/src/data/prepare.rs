//! From a source to shards: reads, parses, drops duplicates, splits, tokenises and writes, batch by batch.
//!
//! The next batch is read while the current one is parsed, hashed and encoded on all cores; documents are
//! written in the order of the source, so the shards are the same bytes whatever the number of threads.
//! Memory is two batches (each [`BATCH_BYTES`] and one piece more) with their tokens, and eight bytes for
//! every distinct document.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

use consort_common::ids::Digest;
use rayon::prelude::*;

use super::{
    cache::{Cache, Prepared, Preparing, Writers},
    documents::{self, Parsed, Piece, Reader},
    error::DataError,
    shard::{Shard, ShardWriter, TokenWidth},
    source::{self, Listing},
    stats::{Skipped, SplitStats, Stats},
    tokenizer::Tokenizer,
};

/// A batch ends with the piece that brings it to this size.
const BATCH_BYTES: usize = 16 << 20;
/// Or to this many pieces.
const BATCH_PIECES_MAX: usize = 1 << 16;
/// Documents that later ones are compared with: 2^27 digests take some 2 GB. Past it duplicates of later
/// documents go unnoticed, and are counted as not compared.
const DIGESTS_MAX: usize = 1 << 27;
/// Changes whenever the same source would give other shards.
const PREPARATION_VERSION: u32 = 1;

/// What to prepare, from where, into where.
#[derive(Clone)]
pub struct PrepareRequest {
    /// A directory or a file with the site's text.
    pub source: PathBuf,
    /// A folder of the client's state; made if needed.
    pub cache: PathBuf,
    /// The run's tokenizer.
    pub tokenizer: Tokenizer,
    /// Share of the documents that is held out: at least 0, less than 1.
    pub held_out_fraction: f64,
    /// Tokens that the model knows.
    pub vocabulary_size: usize,
}

/// How far preparing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrepareProgress {
    /// Bytes of the source's files that were read, as they are on disk.
    pub bytes_read: u64,
    /// Bytes of the source's files.
    pub bytes_total: u64,
    /// Distinct documents so far.
    pub documents: u64,
    /// Tokens so far.
    pub tokens: u64,
}

/// A site's text, ready for training.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// What is trained on.
    pub train: Shard,
    /// What is measured on.
    pub held_out: Shard,
    /// What was found when they were made.
    pub stats: Stats,
    /// Identifies the content: a [`super::Cursor`] belongs to one key.
    pub key: Digest,
}

/// Prepares a source, or finds it prepared: by tokenizer, fraction and the files' names, sizes and times.
///
/// A document is held out if the first 64 bits of its BLAKE3, as a fraction of 2^64, are less than
/// `held_out_fraction`: whichever other documents there are, and wherever it lies. Should that hold out none
/// of at least two documents, the one with the smallest digest is.
///
/// Blocks until done; `progress` is told after each batch, `cancelled` asked before each piece.
///
/// # Errors
/// See [`DataError`]. After an error the cache is as it was before.
pub fn prepare(
    request: &PrepareRequest,
    progress: &(dyn Fn(PrepareProgress) + Sync),
    cancelled: &(dyn Fn() -> bool + Sync),
) -> Result<Dataset, DataError> {
    if !(0.0..1.0).contains(&request.held_out_fraction) {
        return Err(DataError::HeldOutFraction(request.held_out_fraction));
    }
    request.tokenizer.check_vocabulary(request.vocabulary_size)?;
    let listing = source::list(&request.source)?;
    let key = key(request, &listing);
    let cache = Cache::open(&request.cache)?;
    let prepared = match cache.reuse(&key) {
        Some(prepared) => prepared,
        None => Preparation { request, listing: &listing, progress, cancelled }.run(&cache, &key)?,
    };
    let Prepared { train, held_out, stats } = prepared;
    Ok(Dataset { train, held_out, stats, key })
}

/// What the shards' content follows from.
fn key(request: &PrepareRequest, listing: &Listing) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&PREPARATION_VERSION.to_le_bytes());
    hasher.update(request.tokenizer.digest().as_bytes());
    hasher.update(&request.tokenizer.end_of_text().to_le_bytes());
    hasher.update(&request.held_out_fraction.to_le_bytes());
    hasher.update(&(request.vocabulary_size as u64).to_le_bytes());
    for file in &listing.files {
        let name = file.relative.as_os_str().as_encoded_bytes();
        hasher.update(&(name.len() as u64).to_le_bytes()).update(name);
        hasher.update(&file.bytes.to_le_bytes()).update(&file.modified_ns.to_le_bytes());
    }
    hasher.finalize().into()
}

struct Preparation<'a> {
    request: &'a PrepareRequest,
    listing: &'a Listing,
    progress: &'a (dyn Fn(PrepareProgress) + Sync),
    cancelled: &'a (dyn Fn() -> bool + Sync),
}

impl Preparation<'_> {
    fn run(&self, cache: &Cache, key: &Digest) -> Result<Prepared, DataError> {
        let preparing = cache.prepare()?;
        // Exact: a power of two times a fraction. A digest below it is held out.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let threshold = (self.request.held_out_fraction * 2f64.powi(64)) as u64;
        let mut pass = self.pass(&preparing, threshold)?;
        if threshold > 0 && pass.stats.held_out.documents == 0 && pass.stats.train.documents > 1 {
            // A source that small is soon read again.
            let smallest = pass.smallest_digest;
            drop(pass);
            pass = self.pass(&preparing, smallest.saturating_add(1))?;
        }
        let Pass { writers, stats, .. } = pass;
        check_split(&self.request.source, &stats, threshold > 0)?;
        preparing.commit(writers, &stats, key)
    }

    /// Reads the whole source once.
    fn pass(&self, preparing: &Preparing<'_>, threshold: u64) -> Result<Pass<'_>, DataError> {
        let mut pass = Pass {
            request: self.request,
            listing: self.listing,
            threshold,
            writers: preparing.writers(self.request.vocabulary_size)?,
            stats: Stats { files: self.listing.files.len() as u64, ..Stats::default() },
            seen: HashSet::new(),
            smallest_digest: u64::MAX,
        };
        for fault in &self.listing.faults {
            pass.stats.skip(fault.clone());
        }
        let bytes_total = self.listing.files.iter().map(|file| file.bytes).sum();
        let mut reader = Reader::new(&self.listing.files);
        let mut batch = self.read_batch(&mut reader)?;
        while !batch.is_empty() {
            let (next, processed) = rayon::join(|| self.read_batch(&mut reader), || pass.process(batch));
            processed?;
            batch = next?;
            (self.progress)(PrepareProgress {
                bytes_read: reader.bytes_read(),
                bytes_total,
                documents: pass.stats.documents(),
                tokens: pass.writers.train.tokens() + pass.writers.held_out.tokens(),
            });
        }
        pass.stats.train = split_stats(pass.stats.train, &pass.writers.train);
        pass.stats.held_out = split_stats(pass.stats.held_out, &pass.writers.held_out);
        Ok(pass)
    }

    fn read_batch(&self, reader: &mut Reader<'_>) -> Result<Vec<Piece>, DataError> {
        let mut batch = Vec::new();
        let mut bytes = 0;
        while bytes < BATCH_BYTES && batch.len() < BATCH_PIECES_MAX {
            if (self.cancelled)() {
                return Err(DataError::Cancelled);
            }
            let Some(piece) = reader.next() else { break };
            bytes += piece.bytes();
            batch.push(piece);
        }
        Ok(batch)
    }
}

/// One reading of the source.
struct Pass<'a> {
    request: &'a PrepareRequest,
    listing: &'a Listing,
    threshold: u64,
    writers: Writers,
    stats: Stats,
    /// 64 bits tell documents apart: among 10^8 the chance of one false duplicate is 3 in 10,000.
    seen: HashSet<u64>,
    smallest_digest: u64,
}

impl Pass<'_> {
    fn process(&mut self, batch: Vec<Piece>) -> Result<(), DataError> {
        let parsed: Vec<_> = batch
            .into_par_iter()
            .map(|piece| (piece.file, piece.line, documents::parse(piece.content)))
            .collect();
        let mut chosen = Vec::new();
        for (file, line, result) in &parsed {
            match result {
                Ok(Parsed { text, documents }) => chosen.extend(
                    documents
                        .iter()
                        .map(|document| (document.digest, &text[document.range.clone()]))
                        .filter(|(digest, text)| self.is_new(*digest, text)),
                ),
                Err(reason) => {
                    let file = self.listing.files[*file].relative.display().to_string();
                    self.stats.skip(Skipped { file, line: *line, reason: reason.clone() });
                }
            }
        }
        let texts: Vec<&str> = chosen.iter().map(|(_, text)| *text).collect();
        let width = TokenWidth::for_vocabulary(self.request.vocabulary_size);
        let encoded = self.request.tokenizer.encode_batch(&texts, width)?;
        for ((digest, text), encoded) in chosen.into_iter().zip(encoded) {
            let (split, writer) = if digest < self.threshold {
                (&mut self.stats.held_out, &mut self.writers.held_out)
            } else {
                (&mut self.stats.train, &mut self.writers.train)
            };
            split.documents += 1;
            writer.append(&encoded, text.len())?;
        }
        Ok(())
    }

    /// Whether a document is neither blank nor a repetition; counts it if it is.
    fn is_new(&mut self, digest: u64, text: &str) -> bool {
        if text.trim().is_empty() {
            self.stats.blank += 1;
            return false;
        }
        if self.seen.contains(&digest) {
            self.stats.duplicates += 1;
            return false;
        }
        if self.seen.len() < DIGESTS_MAX {
            self.seen.insert(digest);
        } else {
            self.stats.not_compared += 1;
        }
        self.smallest_digest = self.smallest_digest.min(digest);
        true
    }
}

fn split_stats(counted: SplitStats, writer: &ShardWriter) -> SplitStats {
    SplitStats { tokens: writer.tokens(), text_bytes: writer.text_bytes(), ..counted }
}

fn check_split(source: &Path, stats: &Stats, holds_out: bool) -> Result<(), DataError> {
    if stats.documents() == 0 {
        let first_fault = match stats.skipped_listed.first() {
            Some(skipped) => format!("the first of {} faults: {skipped}", stats.skipped),
            None => "all are empty or blank".to_owned(),
        };
        return Err(DataError::NoDocuments { path: source.to_owned(), files: stats.files, first_fault });
    }
    let (train, held_out) = (stats.train.documents, stats.held_out.documents);
    if train == 0 || (holds_out && held_out == 0) {
        return Err(DataError::EmptySplit { documents: stats.documents(), train, held_out });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
