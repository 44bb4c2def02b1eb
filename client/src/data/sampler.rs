//! The order in which a site's text is trained on: a seed determines it, a cursor resumes it.
//!
//! Each source's shard has an order of its own. In each epoch it is cut into windows of `sequence_length + 1`
//! tokens at a stride of `sequence_length`, so that every token is predicted once (the last token of a window
//! is the first of the next). The first cut lies at an offset drawn anew for each epoch, below
//! `sequence_length`: the same text is then seen behind other beginnings. What is left over at both ends, less
//! than a window each, is not used in that epoch. Windows cross documents; the end-of-text token is what parts
//! them. Which source comes next is decided in [`super::mixture`]; a source that is used up begins its next
//! epoch, whatever the others do.

use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::{
    error::DataError,
    mixture::{Chooser, Mixture, Part},
    shard::Shard,
};

/// Keeps the order's generator apart from every other use of the run's seed.
const KEY_CONTEXT: &str = "consort 2026-11 order of training windows";
/// The same for the beginning of the mixture's sequence.
const MIXTURE_KEY_CONTEXT: &str = "consort 2026-11 order of sources";

/// How far training has come; kept with the local checkpoint. It is valid for one text, seed, site and
/// sequence length. The default is the beginning.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cursor {
    /// One for each source; none at the beginning.
    pub sources: Vec<SourceCursor>,
}

/// How much of one source was used.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceCursor {
    /// Times that its whole shard was used.
    pub epoch: u64,
    /// Windows of this epoch that were used.
    pub position: u64,
    /// Sequences taken from it since the beginning, all epochs.
    pub sequences: u64,
}

impl Cursor {
    /// Sequences taken since the beginning, from all sources.
    pub fn sequences(&self) -> u64 {
        self.sources.iter().fold(0, |sum, source| sum.wrapping_add(source.sequences))
    }
}

/// Hands out training sequences.
#[derive(Debug)]
pub struct Sampler {
    sources: Vec<Ordered>,
    chooser: Chooser,
    /// Sequences taken, from all sources.
    sequences: u64,
}

/// One source's windows in their order.
#[derive(Debug)]
struct Ordered {
    shard: Shard,
    plan: Plan,
    cursor: SourceCursor,
    /// Made where it is first needed, so that whoever reads ahead makes it; see [`Ordered::order`].
    order: Option<EpochOrder>,
}

/// What every epoch's order follows from.
#[derive(Debug, Clone)]
struct Plan {
    tokens: u64,
    sequence_length: u64,
    seed: u64,
    site: String,
}

#[derive(Debug)]
struct EpochOrder {
    epoch: u64,
    /// First token of window 0.
    offset: u64,
    /// A permutation of the windows.
    windows: Vec<u32>,
}

impl Plan {
    fn order(&self, epoch: u64) -> EpochOrder {
        let mut hasher = blake3::Hasher::new_derive_key(KEY_CONTEXT);
        hasher.update(&self.seed.to_le_bytes()).update(&epoch.to_le_bytes()).update(self.site.as_bytes());
        let mut generator = ChaCha8Rng::from_seed(*hasher.finalize().as_bytes());
        // A shard of little more than a sequence cannot be cut anywhere: at least one window must be left.
        let offset = below(&mut generator, self.sequence_length.min(self.tokens - self.sequence_length));
        let windows = (self.tokens - 1 - offset) / self.sequence_length;
        #[allow(clippy::cast_possible_truncation)] // `Sampler::new` checked the largest, that of offset 0
        let mut windows: Vec<u32> = (0..windows as u32).collect();
        // Fisher and Yates, in Durstenfeld's form (Communications of the ACM 7(7), 1964, algorithm 235).
        for last in (1..windows.len()).rev() {
            #[allow(clippy::cast_possible_truncation)] // at most `last`
            windows.swap(last, below(&mut generator, last as u64 + 1) as usize);
        }
        EpochOrder { epoch, offset, windows }
    }
}

/// A uniform number below `bound` (at least 1), by rejection. Written out because the order must stay the
/// same when a library changes its way of drawing.
fn below(generator: &mut ChaCha8Rng, bound: u64) -> u64 {
    // The largest multiple of `bound` in 64 bits; beyond it the remainders are not uniform.
    let limit = u64::MAX - u64::MAX % bound;
    loop {
        let drawn = generator.next_u64();
        if drawn < limit {
            return drawn % bound;
        }
    }
}

impl Sampler {
    /// A sampler at the beginning. `site` makes two sites with the same text and seed go different ways.
    ///
    /// # Errors
    /// [`DataError::TooShort`] if a source's shard has no whole sequence, [`DataError::TooManyWindows`] if it
    /// has 2^32 or more.
    pub fn new(mixture: Mixture, sequence_length: usize, seed: u64, site: &str) -> Result<Self, DataError> {
        let parts = mixture.into_parts();
        let alone = parts.len() == 1;
        let chooser = Chooser::new(parts.iter().map(|part| part.share), mixture_start(seed, site));
        let sources = parts.into_iter().map(|Part { name, shard, .. }| {
            let what = if alone { "training".to_owned() } else { format!("training (source {name:?})") };
            Ordered::new(shard, sequence_length, seed, site, what)
        });
        Ok(Self { sources: sources.collect::<Result<_, _>>()?, chooser, sequences: 0 })
    }

    /// Where the next batch begins.
    pub fn cursor(&self) -> Cursor {
        Cursor { sources: self.sources.iter().map(|source| source.cursor).collect() }
    }

    /// Goes on at a cursor that was saved; at the beginning if it has another number of sources. If a source's
    /// epoch has fewer windows than the cursor says, because it belonged to another shard, the next epoch
    /// begins.
    pub fn seek(&mut self, cursor: &Cursor) {
        let beginning = vec![SourceCursor::default(); self.sources.len()];
        let same = cursor.sources.len() == self.sources.len();
        let cursors = if same { &cursor.sources } else { &beginning };
        for (source, cursor) in self.sources.iter_mut().zip(cursors) {
            source.cursor = *cursor;
        }
        self.sequences = self.cursor().sequences();
    }

    /// Fills `out` with the next `sequences` windows, `[sequences, sequence_length + 1]` row by row; an epoch
    /// may end anywhere in them.
    ///
    /// # Errors
    /// [`DataError::Corrupt`] if a shard holds an impossible token.
    pub fn next_batch(&mut self, sequences: usize, out: &mut Vec<i64>) -> Result<(), DataError> {
        out.clear();
        for _ in 0..sequences {
            let source = self.chooser.source(self.sequences);
            self.sources[source].next_sequence(out)?;
            self.sequences = self.sequences.wrapping_add(1);
        }
        Ok(())
    }
}

/// Where the mixture's sequence begins.
fn mixture_start(seed: u64, site: &str) -> u64 {
    let mut hasher = blake3::Hasher::new_derive_key(MIXTURE_KEY_CONTEXT);
    hasher.update(&seed.to_le_bytes()).update(site.as_bytes());
    ChaCha8Rng::from_seed(*hasher.finalize().as_bytes()).next_u64()
}

impl Ordered {
    fn new(
        shard: Shard,
        sequence_length: usize,
        seed: u64,
        site: &str,
        what: String,
    ) -> Result<Self, DataError> {
        let tokens = shard.tokens();
        let length = sequence_length as u64;
        if length == 0 || tokens <= length {
            return Err(DataError::TooShort { what, tokens, sequence_length });
        }
        let windows = (tokens - 1) / length;
        if windows > u64::from(u32::MAX) {
            return Err(DataError::TooManyWindows { windows });
        }
        let plan = Plan { tokens, sequence_length: length, seed, site: site.to_owned() };
        Ok(Self { shard, plan, cursor: SourceCursor::default(), order: None })
    }

    /// The order of the cursor's epoch.
    fn order(&mut self) -> &EpochOrder {
        let epoch = self.cursor.epoch;
        if self.order.as_ref().is_some_and(|order| order.epoch != epoch) {
            self.order = None;
        }
        self.order.get_or_insert_with(|| self.plan.order(epoch))
    }

    /// Appends the window at the cursor to `out`.
    fn next_sequence(&mut self, out: &mut Vec<i64>) -> Result<(), DataError> {
        let start = self.next_start();
        self.shard.copy(start..start + self.plan.sequence_length + 1, out)?;
        self.cursor.position += 1;
        self.cursor.sequences = self.cursor.sequences.wrapping_add(1);
        Ok(())
    }

    /// First token of the window at the cursor, of the next epoch if this one is used up.
    fn next_start(&mut self) -> u64 {
        let is_used_up = self.order().windows.len() as u64 <= self.cursor.position;
        if is_used_up {
            self.cursor.epoch = self.cursor.epoch.wrapping_add(1);
            self.cursor.position = 0;
        }
        let SourceCursor { position, .. } = self.cursor;
        let length = self.plan.sequence_length;
        let order = self.order();
        #[allow(clippy::cast_possible_truncation)] // an index below the length; every epoch has a window
        let window = order.windows[position as usize];
        order.offset + u64::from(window) * length
    }
}

#[cfg(test)]
pub(super) mod tests;
