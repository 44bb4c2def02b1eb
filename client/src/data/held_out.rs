//! The windows that every version of the model is measured on: always the same, spread over the whole
//! held-out text.

use super::{error::DataError, shard::Shard};

/// Deterministic windows over a held-out shard.
#[derive(Debug, Clone)]
pub struct HeldOut {
    shard: Shard,
    sequence_length: u64,
    /// How many are measured on.
    windows: u64,
    /// How many the shard has.
    windows_in_shard: u64,
}

impl HeldOut {
    /// The windows of `sequence_length + 1` tokens, at a stride of `sequence_length`, that together predict
    /// at most `tokens_max` tokens (but at least one window). If the shard has more, they are taken at equal
    /// distances: its order is that of the files, and its beginning would stand for the first ones only.
    ///
    /// # Errors
    /// [`DataError::TooShort`] if the shard has no whole window.
    pub fn new(shard: Shard, sequence_length: usize, tokens_max: u64) -> Result<Self, DataError> {
        let tokens = shard.tokens();
        let length = sequence_length as u64;
        if length == 0 || tokens <= length {
            return Err(DataError::TooShort { what: "held-out", tokens, sequence_length });
        }
        let windows_in_shard = (tokens - 1) / length;
        let windows = windows_in_shard.min((tokens_max / length).max(1));
        Ok(Self { shard, sequence_length: length, windows, windows_in_shard })
    }

    /// Tokens predicted.
    pub fn tokens(&self) -> u64 {
        self.windows * self.sequence_length
    }

    /// UTF-8 bytes of the text that those tokens encode, for bits per byte: the shard's text bytes in
    /// proportion to the tokens, since a shard does not say which token has how many bytes. Exact over the
    /// whole shard; of a part, as good as its text is even.
    pub fn text_bytes(&self) -> u64 {
        let bytes =
            u128::from(self.shard.text_bytes()) * u128::from(self.tokens()) / u128::from(self.shard.tokens());
        u64::try_from(bytes).unwrap_or(u64::MAX) // less than the shard's
    }

    /// The windows in batches of `sequences`, each `[rows, sequence_length + 1]` row by row; the last may
    /// have fewer rows. A batch is an error if the shard holds an impossible token.
    pub fn batches(&self, sequences: usize) -> impl Iterator<Item = Result<Vec<i64>, DataError>> + '_ {
        let rows = sequences.max(1) as u64;
        (0..self.windows.div_ceil(rows)).map(move |batch| {
            let mut out = Vec::new();
            for window in batch * rows..((batch + 1) * rows).min(self.windows) {
                let start = self.start(window);
                self.shard.copy(start..start + self.sequence_length + 1, &mut out)?;
            }
            Ok(out)
        })
    }

    /// First token of a window.
    fn start(&self, window: u64) -> u64 {
        let spread = u128::from(window) * u128::from(self.windows_in_shard) / u128::from(self.windows);
        u64::try_from(spread).unwrap_or(u64::MAX) * self.sequence_length // less than windows_in_shard
    }
}

#[cfg(test)]
mod tests {
    use super::{super::shard::tests::shard_of, *};

    fn held_out(tokens: u32, sequence_length: usize, tokens_max: u64) -> Result<HeldOut, DataError> {
        let ids: Vec<u32> = (0..tokens).collect();
        HeldOut::new(shard_of(&ids, 1 << 20), sequence_length, tokens_max)
    }

    fn check(tokens: u32, sequence_length: usize, tokens_max: u64, starts: &[i64]) {
        let held_out = held_out(tokens, sequence_length, tokens_max).unwrap();
        for sequences in [1, 2, 100] {
            let batches: Vec<Vec<i64>> = held_out.batches(sequences).map(Result::unwrap).collect();
            assert!(batches.iter().all(|batch| batch.len() <= sequences * (sequence_length + 1)));
            let rows: Vec<i64> = batches.concat();
            let found: Vec<i64> = rows.chunks(sequence_length + 1).map(|row| row[0]).collect();
            assert_eq!(found, starts);
            assert_eq!(rows.len(), starts.len() * (sequence_length + 1));
        }
        assert_eq!(held_out.tokens(), (starts.len() * sequence_length) as u64);
        assert_eq!(held_out.text_bytes(), 3 * held_out.tokens());
    }

    #[test]
    fn windows_cover_the_shard_or_are_spread_over_it() {
        check(11, 10, 1_000, &[0]);
        check(40, 10, 1_000, &[0, 10, 20]);
        check(41, 10, 1_000, &[0, 10, 20, 30]);
        check(101, 10, 59, &[0, 20, 40, 60, 80]);
        check(101, 10, 1, &[0]);
    }

    #[test]
    fn a_held_out_text_without_a_whole_window_is_an_error() {
        for (tokens, sequence_length) in [(0, 10), (10, 10), (10, 0)] {
            assert!(matches!(held_out(tokens, sequence_length, 100), Err(DataError::TooShort { .. })));
        }
    }
}
