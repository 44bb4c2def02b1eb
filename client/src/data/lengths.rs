//! How long documents are: a histogram of bounded size with percentiles to about 6 %.
//!
//! A bucket for each length below 16, then 16 for every power of two: a length lies less than a sixteenth
//! above the least of its bucket.

use serde::{Deserialize, Serialize};

/// Buckets for each power of two, as a power of two.
const STEP_BITS: u32 = 4;

/// Counts of lengths.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lengths {
    /// By bucket; buckets after the last one that is not empty are left out.
    counts: Vec<u64>,
    /// The greatest length.
    max: u64,
}

impl Lengths {
    pub(super) fn add(&mut self, length: u64) {
        let bucket = bucket(length);
        if self.counts.len() <= bucket {
            self.counts.resize(bucket + 1, 0);
        }
        self.counts[bucket] += 1;
        self.max = self.max.max(length);
    }

    pub(super) fn plus(&self, other: &Self) -> Self {
        let mut counts = vec![0u64; self.counts.len().max(other.counts.len())];
        for lengths in [self, other] {
            for (sum, count) in counts.iter_mut().zip(&lengths.counts) {
                *sum = count.saturating_add(*sum);
            }
        }
        Self { counts, max: self.max.max(other.max) }
    }

    /// The greatest length; 0 if there is none.
    pub fn max(&self) -> u64 {
        self.max
    }

    /// The length that `percent` of all are not longer than, rounded down to its bucket; 0 if there is none.
    pub fn percentile(&self, percent: u64) -> u64 {
        let total: u128 = self.counts.iter().map(|count| u128::from(*count)).sum();
        let wanted = (total * u128::from(percent)).div_ceil(100).max(1);
        let mut sum = 0;
        let reaches = |count: &u64| {
            sum += u128::from(*count);
            sum >= wanted
        };
        self.counts.iter().position(reaches).map_or(0, least)
    }
}

fn bucket(length: u64) -> usize {
    let bits = u64::BITS - length.leading_zeros();
    let shift = bits.saturating_sub(STEP_BITS + 1);
    ((shift as usize) << STEP_BITS) + usize::try_from(length >> shift).unwrap_or_default() // below 32
}

/// The least length of a bucket.
fn least(bucket: usize) -> u64 {
    let shift = (bucket >> STEP_BITS).saturating_sub(1);
    let steps = (bucket - (shift << STEP_BITS)) as u64;
    // A list that was tampered with may have more buckets than there are lengths.
    u32::try_from(shift).ok().and_then(|shift| steps.checked_shl(shift)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_bucket_begins_less_than_a_sixteenth_below_its_lengths(bits in 0u32..64, length: u64) {
            let length = length >> bits;
            let least = least(bucket(length));
            prop_assert!(least <= length && length - least <= least / 16, "{length} is in the bucket of {least}");
            prop_assert_eq!(bucket(least), bucket(length));
        }

        #[test]
        fn percentiles_are_those_of_the_sorted_lengths(
            mut lengths in prop::collection::vec(0u64..5_000, 1..200), percent in 0u64..=100, cut in 0usize..200,
        ) {
            let (mut first, mut second) = (Lengths::default(), Lengths::default());
            for (index, length) in lengths.iter().enumerate() {
                if index < cut { first.add(*length) } else { second.add(*length) }
            }
            let all = first.plus(&second);
            lengths.sort_unstable();
            let rank = (lengths.len() * usize::try_from(percent).unwrap()).div_ceil(100).max(1);
            prop_assert_eq!(all.percentile(percent), least(bucket(lengths[rank - 1])));
            prop_assert_eq!(all.max(), *lengths.last().unwrap());
        }
    }

    #[test]
    fn no_lengths_have_no_percentiles() {
        assert_eq!((Lengths::default().percentile(50), Lengths::default().max()), (0, 0));
    }
}
