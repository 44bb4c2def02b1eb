//! From sources to shards: reads, parses, drops duplicates, splits, tokenises and writes, batch by batch.
//!
//! The next batch is read while the current one is parsed, hashed and encoded on all cores; documents are
//! written in the order of the sources, so the shards are the same bytes whatever the number of threads.
//! Memory is two batches (each [`BATCH_BYTES`] and one piece more) with their tokens, and 10 to 21 bytes for
//! every distinct document (half as much again while the table of their digests grows). Rows of `.parquet` files keep
//! the pages that they lie in besides, and the file being read its dictionary: half a gigabyte each at most.

mod pass;

use std::path::PathBuf;

use consort_common::{
    ids::Digest,
    text::{Cancelled, Piece, Reader, Skipped, SourceFile, TextError, list},
};

use self::pass::Pass;
use super::{
    cache::{Cache, Prepared, Preparing},
    error::DataError,
    mixture::{self, Mixture, Source},
    shard::Shard,
    stats::{SourceStats, Stats},
    tokenizer::Tokenizer,
};

/// A batch ends with the piece that brings it to this size.
const BATCH_BYTES: usize = 16 << 20;
/// Or to this many pieces.
const BATCH_PIECES_MAX: usize = 1 << 16;
/// Changes whenever the same sources would give other shards.
const PREPARATION_VERSION: u32 = 3;

/// What to prepare, from where, into where.
#[derive(Clone)]
pub struct PrepareRequest {
    /// The site's text.
    pub sources: Vec<Source>,
    /// A folder of the client's state; made if needed.
    pub cache: PathBuf,
    /// The run's tokenizer.
    pub tokenizer: Tokenizer,
    /// Share of the text that is held out: at least 0, less than 1.
    pub held_out_fraction: f64,
    /// Tokens that the model knows.
    pub vocabulary_size: usize,
}

/// How far preparing is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PrepareProgress {
    /// Bytes of the sources' files that were read, as they are on disk.
    pub bytes_read: u64,
    /// Bytes of the sources' files.
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
    pub train: Mixture,
    /// What is measured on: of all sources in their order, as much as each has, whatever its share.
    pub held_out: Shard,
    /// What was found when they were made.
    pub stats: Stats,
    /// Identifies the text and the sources' shares: a [`super::Cursor`] belongs to one key.
    pub key: Digest,
    /// Names what was prepared, in the cache; other shares of the same text do not change it.
    pub cache_key: Digest,
    /// The token that ends every document.
    pub end_of_text: u32,
}

/// Prepares sources, or finds them prepared: by tokenizer, fraction, the sources' names and the files' names,
/// sizes and times. Shares change nothing in what is prepared.
///
/// A document is held out if the first 64 bits of its BLAKE3, as a fraction of 2^64, are less than
/// `held_out_fraction`: whichever other documents there are, and wherever it lies. A `.txt` file longer than
/// [`consort_common::text::STRETCH_BYTES_MAX`] is held out stretch by stretch in the same way. Should that hold out none of at
/// least two, the one with the smallest digest is.
///
/// Blocks until done; `progress` is told after each batch, `cancelled` asked before each piece of a file and within
/// a long one.
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
    let problems = mixture::problems(&request.sources);
    if !problems.is_empty() {
        return Err(DataError::Sources { problems });
    }
    request.tokenizer.check_vocabulary(request.vocabulary_size)?;
    let files = Files::list(&request.sources)?;
    let cache_key = cache_key(request, &files);
    let cache = Cache::open(&request.cache)?;
    let prepared = match cache.reuse(&cache_key, request.sources.len()) {
        Some(prepared) => prepared,
        None => Preparation { request, files: &files, progress, cancelled }.run(&cache, &cache_key)?,
    };
    let Prepared { train, held_out, stats } = prepared;
    let train = Mixture::new(&request.sources, train);
    let end_of_text = request.tokenizer.end_of_text();
    Ok(Dataset { key: key(&cache_key, &train), train, held_out, stats, cache_key, end_of_text })
}

/// The files of all sources, in the order of the sources.
struct Files {
    files: Vec<SourceFile>,
    /// By source: what could not be looked at.
    faults: Vec<Vec<Skipped>>,
}

impl Files {
    fn list(sources: &[Source]) -> Result<Self, DataError> {
        let mut all = Self { files: Vec::new(), faults: Vec::new() };
        for (index, source) in sources.iter().enumerate() {
            let listing = list(&source.path, index, &source.text_key)?;
            all.files.extend(listing.files);
            all.faults.push(listing.faults);
        }
        Ok(all)
    }
}

/// What the order of training follows from, as far as it is the text's business.
fn key(cache_key: &Digest, train: &Mixture) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(cache_key.as_bytes());
    for part in train.parts() {
        hasher.update(&part.share.to_le_bytes());
    }
    hasher.finalize().into()
}

/// What the shards' content follows from.
fn cache_key(request: &PrepareRequest, files: &Files) -> Digest {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&PREPARATION_VERSION.to_le_bytes());
    hasher.update(request.tokenizer.digest().as_bytes());
    hasher.update(&request.tokenizer.end_of_text().to_le_bytes());
    hasher.update(&request.held_out_fraction.to_le_bytes());
    hasher.update(&(request.vocabulary_size as u64).to_le_bytes());
    hasher.update(&(request.sources.len() as u64).to_le_bytes());
    let text = |hasher: &mut blake3::Hasher, text: &[u8]| {
        hasher.update(&(text.len() as u64).to_le_bytes()).update(text);
    };
    for source in &request.sources {
        text(&mut hasher, source.name.as_bytes());
        text(&mut hasher, source.text_key.as_bytes());
    }
    for file in &files.files {
        hasher.update(&(file.source as u64).to_le_bytes());
        text(&mut hasher, file.relative.as_os_str().as_encoded_bytes());
        hasher.update(&file.bytes.to_le_bytes()).update(&file.modified_ns.to_le_bytes());
    }
    hasher.finalize().into()
}

struct Preparation<'a> {
    request: &'a PrepareRequest,
    files: &'a Files,
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
        let found = pass.stats.total();
        if threshold > 0 && found.held_out.documents == 0 && pass.stretches > 1 {
            // So little is soon read again.
            let smallest = pass.smallest_digest;
            drop(pass);
            pass = self.pass(&preparing, smallest.saturating_add(1))?;
        }
        let Pass { writers, stats, .. } = pass;
        check_split(&self.request.sources, &stats, threshold > 0)?;
        preparing.commit(writers, &stats, key)
    }

    /// What is known before anything is read.
    fn empty_stats(&self) -> Stats {
        let named = |(index, source): (usize, &Source)| {
            let files = self.files.files.iter().filter(|file| file.source == index);
            let mut stats = SourceStats {
                name: source.name.clone(),
                files: files.clone().count() as u64,
                file_bytes: files.map(|file| file.bytes).sum(),
                ..SourceStats::default()
            };
            for fault in &self.files.faults[index] {
                stats.skip(fault.clone());
            }
            stats
        };
        Stats { sources: self.request.sources.iter().enumerate().map(named).collect() }
    }

    /// Reads all sources once.
    fn pass(&self, preparing: &Preparing<'_>, threshold: u64) -> Result<Pass<'_>, DataError> {
        let Self { request, files, .. } = self;
        let writers = preparing.writers(request.sources.len(), request.vocabulary_size)?;
        let mut pass = Pass::new(request, &files.files, threshold, writers, self.empty_stats());
        let bytes_total = files.files.iter().map(|file| file.bytes).sum();
        let mut reader = Reader::new(&files.files, self.cancelled);
        let mut batch = read_batch(&mut reader)?;
        while !batch.is_empty() {
            let (next, processed) = rayon::join(|| read_batch(&mut reader), || pass.process(batch));
            processed?;
            batch = next?;
            if batch.is_empty() {
                pass.end_document()?;
            }
            (self.progress)(PrepareProgress {
                bytes_read: reader.bytes_read(),
                bytes_total,
                documents: pass.documents,
                tokens: pass.tokens,
            });
        }
        Ok(pass)
    }
}

fn read_batch(reader: &mut Reader<'_>) -> Result<Vec<Piece>, Cancelled> {
    let mut batch = Vec::new();
    let mut bytes = 0;
    while bytes < BATCH_BYTES && batch.len() < BATCH_PIECES_MAX {
        let Some(piece) = reader.next().transpose()? else { break };
        bytes += piece.bytes();
        batch.push(piece);
    }
    Ok(batch)
}

fn check_split(sources: &[Source], stats: &Stats, holds_out: bool) -> Result<(), DataError> {
    let total = stats.total();
    if total.documents() == 0 {
        let first_fault = match stats.skipped().next() {
            Some((_, skipped)) => format!("the first of {} faults: {skipped}", total.skipped),
            None => "all are empty or blank".to_owned(),
        };
        let paths: Vec<String> = sources.iter().map(|source| source.path.display().to_string()).collect();
        return Err(
            TextError::NoDocuments { paths: paths.join(", "), files: total.files, first_fault }.into()
        );
    }
    let (train, held_out) = (total.train.documents, total.held_out.documents);
    if train == 0 || (holds_out && held_out == 0) {
        return Err(DataError::EmptySplit { documents: total.documents(), train, held_out });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
