//! One reading of the sources: what of each batch is new, which side of the split it is on, and its tokens written
//! there.
//!
//! A document ends with one end-of-text token on each side of the split on which it has text, however many pieces
//! it was read in. Where a stretch of a long `.txt` file is held out, the text around it is joined on the training
//! side, and so are the held-out stretches of one file on theirs: the document does not end there.

use std::collections::HashSet;

use consort_common::text::{Parsed, Piece, Skipped, SourceFile, parse, parts};
use rayon::prelude::*;

use super::{
    super::{
        cache::Writers,
        error::DataError,
        shard::TokenWidth,
        stats::{SourceStats, SplitStats, Stats},
        tokenizer::ENCODE_BYTES_MAX,
    },
    PrepareRequest,
};

/// Documents that later ones are compared with: a table of 2^27 digests takes 2.4 GB (2^28 places of 9 bytes,
/// since at most 7 of 8 are filled), and 3.6 GB while it grows to that. Past it duplicates of later
/// documents go unnoticed, and are counted as not compared.
const DIGESTS_MAX: usize = 1 << 27;

/// One reading of the sources.
pub(super) struct Pass<'a> {
    request: &'a PrepareRequest,
    files: &'a [SourceFile],
    threshold: u64,
    pub(super) writers: Writers,
    pub(super) stats: Stats,
    /// Distinct documents that have ended so far, on both sides of the split.
    pub(super) documents: u64,
    /// Their stretches.
    pub(super) stretches: u64,
    /// Tokens so far.
    pub(super) tokens: u64,
    /// The document that was written last.
    unended: Option<Unended>,
    /// 64 bits tell documents apart: among 10^8 the chance of one false duplicate is 3 in 10,000.
    seen: HashSet<u64>,
    pub(super) smallest_digest: u64,
}

/// Which document a piece is of: the line or row of a file, or the whole file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct DocumentId {
    file: usize,
    line: Option<u64>,
}

/// A document of which something was written, but not its end.
struct Unended {
    id: DocumentId,
    /// Its tokens on either side of the split; nothing where it has no text.
    train: Option<u64>,
    held_out: Option<u64>,
}

/// Text to be encoded at once and written to one side of the split.
struct Part<'t> {
    id: DocumentId,
    is_held_out: bool,
    text: &'t str,
}

impl<'a> Pass<'a> {
    /// Nothing is read yet; `stats` are of what is known before. Digests below `threshold` are held out.
    pub(super) fn new(
        request: &'a PrepareRequest,
        files: &'a [SourceFile],
        threshold: u64,
        writers: Writers,
        stats: Stats,
    ) -> Self {
        Self {
            request,
            files,
            threshold,
            writers,
            stats,
            documents: 0,
            stretches: 0,
            tokens: 0,
            unended: None,
            seen: HashSet::new(),
            smallest_digest: u64::MAX,
        }
    }

    /// Reads, encodes and writes a batch.
    pub(super) fn process(&mut self, batch: Vec<Piece>) -> Result<(), DataError> {
        let files = self.files;
        let parse = |Piece { file, line, content }| {
            (DocumentId { file, line }, parse(content, &files[file].text_key))
        };
        let parsed: Vec<_> = batch.into_par_iter().map(parse).collect();
        let mut chosen = Vec::new();
        for (id, result) in &parsed {
            let file = &files[id.file];
            match result {
                Ok(parsed) => {
                    if self.is_new(file.source, parsed) {
                        chosen.extend(self.parts(*id, parsed));
                    }
                }
                Err(reason) => self.stats.sources[file.source].skip(Skipped {
                    file: file.relative.display().to_string(),
                    line: id.line,
                    reason: reason.clone(),
                }),
            }
        }
        let texts: Vec<&str> = chosen.iter().map(|part| part.text).collect();
        let encoded = self.request.tokenizer.encode_batch(&texts, self.width())?;
        for (part, encoded) in chosen.iter().zip(encoded) {
            self.write(part, &encoded)?;
        }
        Ok(())
    }

    fn width(&self) -> TokenWidth {
        TokenWidth::for_vocabulary(self.request.vocabulary_size)
    }

    /// Neighbouring stretches on the same side of the split together, as far as they can be encoded at once.
    fn parts<'t>(&self, id: DocumentId, parsed: &'t Parsed) -> impl Iterator<Item = Part<'t>> + use<'t> {
        let threshold = self.threshold;
        let runs =
            parsed.stretches.chunk_by(move |one, next| (one.digest < threshold) == (next.digest < threshold));
        runs.flat_map(move |run| {
            let is_held_out = run[0].digest < threshold;
            let text = &parsed.text[run[0].range.start..run[run.len() - 1].range.end];
            parts(text, ENCODE_BYTES_MAX).map(move |text| Part { id, is_held_out, text })
        })
    }

    /// Writes a part, after the end of the document before if it is another's.
    fn write(&mut self, part: &Part<'_>, encoded: &[u8]) -> Result<(), DataError> {
        if self.unended.as_ref().is_some_and(|document| document.id != part.id) {
            self.end_document()?;
        }
        let source = self.files[part.id.file].source;
        let stats = &mut self.stats.sources[source];
        let document = self.unended.get_or_insert(Unended { id: part.id, train: None, held_out: None });
        let (split, writer, of_document) = if part.is_held_out {
            (&mut stats.held_out, &mut self.writers.held_out, &mut document.held_out)
        } else {
            (&mut stats.train, &mut self.writers.train[source], &mut document.train)
        };
        let tokens = writer.append(encoded, part.text.len())?;
        split.add(SplitStats { documents: 0, tokens, text_bytes: part.text.len() as u64 });
        *of_document.get_or_insert(0) += tokens;
        self.tokens += tokens;
        Ok(())
    }

    /// Writes the end-of-text token behind what was written of the last document.
    pub(super) fn end_document(&mut self) -> Result<(), DataError> {
        let Some(Unended { id, train, held_out }) = self.unended.take() else { return Ok(()) };
        let end = self.width().encode(&[self.request.tokenizer.end_of_text()]);
        let source = self.files[id.file].source;
        let SourceStats { train: to_train, held_out: to_hold_out, lengths, .. } =
            &mut self.stats.sources[source];
        for (tokens, split, writer) in [
            (train, to_train, &mut self.writers.train[source]),
            (held_out, to_hold_out, &mut self.writers.held_out),
        ] {
            let Some(tokens) = tokens else { continue };
            writer.append(&end, 0)?;
            split.add(SplitStats { documents: 1, tokens: 1, text_bytes: 0 });
            lengths.add(tokens + 1);
            self.documents += 1;
            self.tokens += 1;
        }
        Ok(())
    }

    /// Whether a text is neither blank nor a repetition; counts it if it is.
    fn is_new(&mut self, source: usize, parsed: &Parsed) -> bool {
        let stats = &mut self.stats.sources[source];
        if parsed.text.trim().is_empty() {
            stats.blank += 1;
            return false;
        }
        if self.seen.contains(&parsed.digest) {
            stats.duplicates += 1;
            return false;
        }
        if self.seen.len() < DIGESTS_MAX {
            self.seen.insert(parsed.digest);
        } else {
            stats.not_compared += 1;
        }
        let digests = parsed.stretches.iter().map(|stretch| stretch.digest);
        self.smallest_digest = digests.fold(self.smallest_digest, u64::min);
        self.stretches += parsed.stretches.len() as u64;
        true
    }
}
