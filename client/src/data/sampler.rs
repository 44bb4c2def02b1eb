//! The order in which a shard is trained on: a seed determines it, a cursor resumes it.
//!
//! In each epoch the shard is cut into windows of `sequence_length + 1` tokens at a stride of
//! `sequence_length`, so that every token is predicted once (the last token of a window is the first of the
//! next). The first cut lies at an offset drawn anew for each epoch, below `sequence_length`: the same text is
//! then seen behind other beginnings. What is left over at both ends, less than a window each, is not used in
//! that epoch. Windows cross documents; the end-of-text token is what parts them.

use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::{error::DataError, shard::Shard};

/// Keeps the order's generator apart from every other use of the run's seed.
const KEY_CONTEXT: &str = "consort 2026-11 order of training windows";

/// How far training has come; kept with the local checkpoint. It is valid for one shard, seed, site and
/// sequence length.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cursor {
    /// Times that the whole shard was used.
    pub epoch: u64,
    /// Windows of this epoch that were used.
    pub position: u64,
    /// Tokens predicted since the beginning, all epochs.
    pub tokens: u64,
}

/// Hands out training sequences.
#[derive(Debug)]
pub struct Sampler {
    shard: Shard,
    plan: Plan,
    cursor: Cursor,
    /// Of the cursor's epoch.
    order: EpochOrder,
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
    /// [`DataError::TooShort`] if the shard has no whole sequence, [`DataError::TooManyWindows`] if it has
    /// 2^32 or more.
    pub fn new(shard: Shard, sequence_length: usize, seed: u64, site: &str) -> Result<Self, DataError> {
        let tokens = shard.tokens();
        let length = sequence_length as u64;
        if length == 0 || tokens <= length {
            return Err(DataError::TooShort { what: "training", tokens, sequence_length });
        }
        let windows = (tokens - 1) / length;
        if windows > u64::from(u32::MAX) {
            return Err(DataError::TooManyWindows { windows });
        }
        let plan = Plan { tokens, sequence_length: length, seed, site: site.to_owned() };
        let order = plan.order(0);
        Ok(Self { shard, plan, cursor: Cursor::default(), order })
    }

    /// Where the next batch begins.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// Goes on at a cursor that was saved. If its epoch has fewer windows than it says, because it belonged
    /// to another shard, the next epoch begins.
    pub fn seek(&mut self, cursor: Cursor) {
        self.cursor = cursor;
        if self.order.epoch != cursor.epoch {
            self.order = self.plan.order(cursor.epoch);
        }
    }

    /// Fills `out` with the next `sequences` windows, `[sequences, sequence_length + 1]` row by row; an epoch
    /// may end anywhere in them.
    ///
    /// # Errors
    /// [`DataError::Corrupt`] if the shard holds an impossible token.
    pub fn next_batch(&mut self, sequences: usize, out: &mut Vec<i64>) -> Result<(), DataError> {
        out.clear();
        for _ in 0..sequences {
            let window = self.next_window();
            let start = self.order.offset + u64::from(window) * self.plan.sequence_length;
            self.shard.copy(start..start + self.plan.sequence_length + 1, out)?;
            self.cursor.position += 1;
            self.cursor.tokens += self.plan.sequence_length;
        }
        Ok(())
    }

    /// The window at the cursor, of the next epoch if this one is used up.
    fn next_window(&mut self) -> u32 {
        let at_cursor = |sampler: &Self| {
            usize::try_from(sampler.cursor.position)
                .ok()
                .and_then(|position| sampler.order.windows.get(position).copied())
        };
        at_cursor(self).unwrap_or_else(|| {
            self.cursor.epoch += 1;
            self.cursor.position = 0;
            self.order = self.plan.order(self.cursor.epoch);
            self.order.windows[0] // every epoch has a window
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::{super::shard::tests::shard_of, *};

    /// A sampler over the tokens 0, 1, 2, ...: a window shows where it lies.
    fn sampler(tokens: u32, sequence_length: usize, seed: u64, site: &str) -> Sampler {
        let ids: Vec<u32> = (0..tokens).collect();
        Sampler::new(shard_of(&ids, 1 << 20), sequence_length, seed, site).unwrap()
    }

    /// The same sampler at its beginning.
    fn again(sampler: &Sampler) -> Sampler {
        let order = sampler.plan.order(0);
        Sampler { shard: sampler.shard.clone(), plan: sampler.plan.clone(), cursor: Cursor::default(), order }
    }

    fn draw(sampler: &mut Sampler, sequences: usize) -> Vec<i64> {
        let mut out = Vec::new();
        sampler.next_batch(sequences, &mut out).unwrap();
        out
    }

    /// First tokens of the windows of the sampler's current epoch.
    fn epoch(sampler: &mut Sampler) -> Vec<i64> {
        let windows = sampler.order.windows.len();
        let length = usize::try_from(sampler.plan.sequence_length).unwrap();
        draw(sampler, windows).chunks(length + 1).map(|window| window[0]).collect()
    }

    proptest! {
        #[test]
        fn every_token_is_predicted_once_per_epoch(length in 1usize..20, more in 1u32..200, seed: u64) {
            let tokens = u32::try_from(length).unwrap() + more;
            let mut sampler = sampler(tokens, length, seed, "a");
            for _ in 0..3 {
                let offset = i64::try_from(sampler.order.offset).unwrap();
                let windows = sampler.order.windows.len();
                prop_assert!(offset < i64::try_from(length).unwrap());
                let batch = draw(&mut sampler, windows);
                let mut predicted = Vec::new();
                for window in batch.chunks(length + 1) {
                    prop_assert!(window.windows(2).all(|pair| pair[1] == pair[0] + 1));
                    predicted.extend_from_slice(&window[1..]);
                }
                predicted.sort_unstable();
                let last = offset + i64::try_from(windows * length).unwrap();
                prop_assert_eq!(predicted, (offset + 1..=last).collect::<Vec<_>>());
                prop_assert!(i64::from(tokens) - 1 - last < i64::try_from(length).unwrap());
                draw(&mut sampler, 1); // steps into the next epoch
                sampler.seek(Cursor { position: 0, ..sampler.cursor() });
            }
        }

        #[test]
        fn a_saved_cursor_continues_the_sequence(
            batches in prop::collection::vec(0usize..9, 1..12), stop in 0usize..12, seed: u64,
        ) {
            let mut whole = sampler(57, 5, seed, "a");
            let expected: Vec<_> = batches.iter().map(|sequences| draw(&mut whole, *sequences)).collect();
            let stop = stop.min(batches.len());
            let mut before = again(&whole);
            for sequences in &batches[..stop] {
                draw(&mut before, *sequences);
            }
            let saved = serde_json::to_string(&before.cursor()).unwrap();
            let mut after = again(&whole);
            after.seek(serde_json::from_str(&saved).unwrap());
            for (sequences, expected) in batches.iter().zip(&expected).skip(stop) {
                prop_assert_eq!(&draw(&mut after, *sequences), expected);
            }
            prop_assert_eq!(after.cursor(), whole.cursor());
            prop_assert_eq!(whole.cursor().tokens, 5 * batches.iter().sum::<usize>() as u64);
        }

        #[test]
        fn batch_size_does_not_change_the_sequence(first in 1usize..40, seed: u64) {
            let mut whole = sampler(100, 7, seed, "a");
            let expected = draw(&mut whole, 40);
            let mut split = again(&whole);
            let mut drawn = draw(&mut split, first);
            drawn.extend(draw(&mut split, 40 - first));
            prop_assert_eq!(drawn, expected);
        }
    }

    #[test]
    fn order_differs_between_epochs_seeds_and_sites() {
        let mut first = sampler(2_000, 10, 1, "a");
        let orders = [
            epoch(&mut first),
            {
                draw(&mut first, 1);
                first.seek(Cursor { position: 0, ..first.cursor() });
                epoch(&mut first)
            },
            epoch(&mut sampler(2_000, 10, 2, "a")),
            epoch(&mut sampler(2_000, 10, 1, "b")),
        ];
        assert_eq!(orders.iter().collect::<HashSet<_>>().len(), orders.len());
        assert_eq!(orders[0], epoch(&mut sampler(2_000, 10, 1, "a")));
    }

    #[test]
    fn windows_are_cut_at_every_offset() {
        let plan = Plan { tokens: 1_000, sequence_length: 4, seed: 9, site: "a".to_owned() };
        let offsets: HashSet<u64> = (0..100).map(|epoch| plan.order(epoch).offset).collect();
        assert_eq!(offsets, HashSet::from([0, 1, 2, 3]));
    }

    /// A change here silently changes what every resumed run trains on.
    #[test]
    fn order_is_the_same_in_every_version() {
        let order =
            Plan { tokens: 100, sequence_length: 10, seed: 7, site: "literature".to_owned() }.order(3);
        assert_eq!((order.offset, order.windows), (0, vec![4, 3, 6, 5, 1, 2, 0, 7, 8]));
    }

    #[test]
    fn permutations_are_uniform() {
        let mut counts = std::collections::HashMap::new();
        for seed in 0..6_000 {
            let plan = Plan { tokens: 4, sequence_length: 1, seed, site: "a".to_owned() };
            *counts.entry(plan.order(0).windows).or_insert(0) += 1;
        }
        // Six permutations, 1,000 each expected with a deviation of 29.
        assert_eq!(counts.len(), 6);
        assert!(counts.values().all(|count| (850..1_150).contains(count)), "{counts:?}");
    }

    #[test]
    fn the_shortest_shard_has_one_window() {
        let mut sampler = sampler(11, 10, 3, "a");
        for _ in 0..5 {
            assert_eq!(draw(&mut sampler, 1), (0..11).collect::<Vec<_>>());
        }
        assert_eq!(sampler.cursor(), Cursor { epoch: 4, position: 1, tokens: 50 });
    }

    #[test]
    fn a_shard_without_a_whole_sequence_is_an_error() {
        for (tokens, sequence_length) in [(0, 10), (10, 10), (10, 0)] {
            let shard = shard_of(&vec![1; tokens], 10);
            let error = Sampler::new(shard, sequence_length, 0, "a").unwrap_err();
            assert!(matches!(error, DataError::TooShort { .. }), "{error}");
        }
    }

    #[test]
    fn a_cursor_of_another_shard_begins_the_next_epoch() {
        let mut sampler = sampler(100, 10, 3, "a");
        sampler.seek(Cursor { epoch: 2, position: u64::MAX, tokens: 5 });
        draw(&mut sampler, 1);
        assert_eq!(sampler.cursor(), Cursor { epoch: 3, position: 1, tokens: 15 });
    }
}
