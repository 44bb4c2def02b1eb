//! The windows that a model is measured on: always the same, spread over the whole text, or all of it.

use super::{error::DataError, shard::Shard};

/// Deterministic windows over a shard.
#[derive(Debug, Clone)]
pub struct HeldOut {
    shard: Shard,
    sequence_length: u64,
    /// How many are measured on.
    windows: u64,
    /// How many the shard has.
    windows_in_shard: u64,
    /// The end-of-text token, if every token is predicted: what comes before the first one.
    before_first: Option<i64>,
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
            return Err(DataError::TooShort { what: "held-out".to_owned(), tokens, sequence_length });
        }
        let windows_in_shard = (tokens - 1) / length;
        let windows = windows_in_shard.min((tokens_max / length).max(1));
        Ok(Self { shard, sequence_length: length, windows, windows_in_shard, before_first: None })
    }

    /// Windows in which every token of the shard is predicted once, those that end a document too: the first
    /// from the end-of-text token, as every document's first is, the last in a window that may be shorter. So
    /// the bytes that were predicted are exactly those of the text, in however many tokens a tokenizer cuts it.
    ///
    /// # Errors
    /// [`DataError::TooShort`] if the shard has no token.
    pub fn whole(shard: Shard, sequence_length: usize, end_of_text: u32) -> Result<Self, DataError> {
        let tokens = shard.tokens();
        let length = sequence_length as u64;
        if length == 0 || tokens == 0 {
            return Err(DataError::TooShort { what: "measured".to_owned(), tokens, sequence_length });
        }
        let windows = tokens.div_ceil(length);
        let before_first = Some(i64::from(end_of_text));
        Ok(Self { shard, sequence_length: length, windows, windows_in_shard: windows, before_first })
    }

    /// Tokens that a window predicts, at most.
    pub fn sequence_length(&self) -> u64 {
        self.sequence_length
    }

    /// Tokens predicted.
    pub fn tokens(&self) -> u64 {
        match self.before_first {
            None => self.windows * self.sequence_length,
            Some(_) => self.shard.tokens(),
        }
    }

    /// UTF-8 bytes of the text that those tokens encode, for bits per byte: the shard's text bytes in
    /// proportion to the tokens, since a shard does not say which token has how many bytes. Exact over the
    /// whole shard; of a part, as good as its text is even.
    pub fn text_bytes(&self) -> u64 {
        let bytes =
            u128::from(self.shard.text_bytes()) * u128::from(self.tokens()) / u128::from(self.shard.tokens());
        u64::try_from(bytes).unwrap_or(u64::MAX) // less than the shard's
    }

    /// The windows, each the tokens to be predicted with the one before them: `sequence_length + 1`, or fewer
    /// in the last one of a whole shard. A window is an error if the shard holds an impossible token.
    pub fn windows(&self) -> impl Iterator<Item = Result<Vec<i64>, DataError>> + '_ {
        (0..self.windows).map(|window| {
            let mut out = Vec::new();
            let start = self.start(window);
            let Some(before_first) = self.before_first else {
                self.shard.copy(start..start + self.sequence_length + 1, &mut out)?;
                return Ok(out);
            };
            if start == 0 {
                out.push(before_first);
            }
            let end = (start + self.sequence_length).min(self.shard.tokens());
            self.shard.copy(start.saturating_sub(1)..end, &mut out)?;
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
        let windows: Vec<Vec<i64>> = held_out.windows().map(Result::unwrap).collect();
        assert!(windows.iter().all(|window| window.len() == sequence_length + 1));
        assert_eq!(windows.iter().map(|window| window[0]).collect::<Vec<_>>(), starts);
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
    fn over_the_whole_shard_every_token_is_predicted_once_from_the_one_before() {
        for (tokens, sequence_length) in [(1, 10), (9, 10), (10, 10), (11, 10), (40, 10), (41, 1)] {
            let ids: Vec<u32> = (0..tokens).collect();
            let whole = HeldOut::whole(shard_of(&ids, 1 << 20), sequence_length, 77).unwrap();
            let mut predicted = Vec::new();
            let mut before = 77;
            for window in whole.windows() {
                let window = window.unwrap();
                assert!((2..=sequence_length + 1).contains(&window.len()));
                assert_eq!(window[0], before);
                predicted.extend_from_slice(&window[1..]);
                before = *window.last().unwrap();
            }
            assert_eq!(predicted, (0..i64::from(tokens)).collect::<Vec<_>>());
            assert_eq!((whole.tokens(), whole.text_bytes()), (u64::from(tokens), 3 * u64::from(tokens)));
        }
        assert!(matches!(HeldOut::whole(shard_of(&[], 10), 10, 7), Err(DataError::TooShort { .. })));
    }

    #[test]
    fn a_held_out_text_without_a_whole_window_is_an_error() {
        for (tokens, sequence_length) in [(0, 10), (10, 10), (10, 0)] {
            assert!(matches!(held_out(tokens, sequence_length, 100), Err(DataError::TooShort { .. })));
        }
    }
}
