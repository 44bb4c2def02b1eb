//! Trimmed mean and median, coordinate by coordinate (Yin et al., arXiv 1803.01498, definitions 1 and 2).
//!
//! With x the values of one coordinate in ascending order, n of them, and b the number that is left out at each
//! end: (x[b] + ... + x[n-b-1]) / (n - 2b), added in that order in f64. The median is the one with the largest b:
//! the middle value, or the mean of the middle two. So the result does not depend on the order of the deltas.
//! The paper knows no weights: every delta counts alike.
//!
//! Many coordinates are sorted at a time by one network of comparisons, which is the same for all of them (merge
//! exchange: Knuth, The Art of Computer Programming, volume 3, section 5.2.2, algorithm M), so that a comparison is
//! one instruction for a vector of coordinates. Values are compared as integers that order as they do; they are
//! finite.

use std::ops::Range;

use multiversion::multiversion;

use crate::aligned::AlignedVec;

/// Values that are sorted together, about, 24 KiB of keys: they stay in a core's first cache.
const SORTED_VALUES: usize = 6 << 10;
/// Coordinates that are sorted together at least, however many deltas there are: some vectors of them.
const SORTED_COORDINATES_MIN: usize = 128;

/// How so many values become one.
#[derive(Debug)]
pub(super) struct TrimmedMean {
    values: usize,
    /// What is averaged of the sorted values.
    kept: Range<usize>,
    /// Positions to compare, in order; the smaller value goes to the first.
    comparisons: Vec<(usize, usize)>,
}

impl TrimmedMean {
    /// Of `values` values without `trimmed` at each end; something is left.
    pub(super) fn new(values: usize, trimmed: usize) -> Self {
        let kept = trimmed..values - trimmed;
        let mut comparisons = merge_exchange(values);
        // What no kept position comes from need not be compared.
        let mut needed: Vec<bool> = (0..values).map(|position| kept.contains(&position)).collect();
        let mut useful: Vec<_> = comparisons
            .iter()
            .rev()
            .map(|&(low, high)| {
                let useful = needed[low] || needed[high];
                needed[low] |= useful;
                needed[high] |= useful;
                useful
            })
            .collect();
        comparisons.retain(|_| useful.pop().unwrap_or(true));
        Self { values, kept, comparisons }
    }

    /// The trimmed means of `rows`, one per delta, into `means`; all have the same length.
    pub(super) fn combine(&self, rows: &[&[f32]], keys: &mut AlignedVec<i32>, means: &mut [f64]) {
        // Rows lie side by side: at the distance of whole pages they would fight for the same lines of the cache.
        let width = (SORTED_VALUES / self.values).max(SORTED_COORDINATES_MIN);
        let count = self.kept.len();
        for (at, means) in means.chunks_mut(width).enumerate() {
            let length = means.len();
            keys.resize(self.values * length);
            for (row, keys) in rows.iter().zip(keys.chunks_mut(length)) {
                to_keys(&row[at * width..][..length], keys);
            }
            sort(keys, length, &self.comparisons);
            means.fill(0.0);
            for kept in keys.chunks(length).take(self.kept.end).skip(self.kept.start) {
                add_keys(kept, means);
            }
            #[allow(clippy::cast_precision_loss)] // there are at most thousands
            means.iter_mut().for_each(|mean| *mean /= count as f64);
        }
    }
}

/// Comparisons that sort `values` values.
fn merge_exchange(values: usize) -> Vec<(usize, usize)> {
    let mut comparisons = Vec::new();
    let top = values.next_power_of_two() / 2;
    let mut p = top;
    while p > 0 {
        let (mut q, mut r, mut distance) = (top, 0, p);
        loop {
            let pairs = (0..values.saturating_sub(distance)).filter(|i| i & p == r);
            comparisons.extend(pairs.map(|i| (i, i + distance)));
            if q == p {
                break;
            }
            (distance, q, r) = (q - p, q / 2, p);
        }
        p /= 2;
    }
    comparisons
}

/// The bits of an fp32 as an integer that orders as the value does, and back: those of a negative one are turned
/// around, all but the sign. -0 comes before 0.
#[inline(always)]
fn turn(bits: i32) -> i32 {
    bits ^ ((bits >> 31).cast_unsigned() >> 1).cast_signed()
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn to_keys(values: &[f32], keys: &mut [i32]) {
    for (key, value) in keys.iter_mut().zip(values) {
        *key = turn(value.to_bits().cast_signed());
    }
}

/// Makes the comparisons in rows of `length` keys.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn sort(keys: &mut [i32], length: usize, comparisons: &[(usize, usize)]) {
    for &(low, high) in comparisons {
        let (before, from) = keys.split_at_mut(high * length);
        let (low, high) = (&mut before[low * length..][..length], &mut from[..length]);
        for (low, high) in low.iter_mut().zip(high) {
            (*low, *high) = ((*low).min(*high), (*low).max(*high));
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn add_keys(keys: &[i32], sums: &mut [f64]) {
    for (sum, key) in sums.iter_mut().zip(keys) {
        *sum += f64::from(f32::from_bits(turn(*key).cast_unsigned()));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn combine(rows: &[Vec<f32>], trimmed: usize) -> Vec<f64> {
        let rows: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
        let mut means = vec![f64::NAN; rows[0].len()];
        TrimmedMean::new(rows.len(), trimmed).combine(&rows, &mut AlignedVec::default(), &mut means);
        means
    }

    /// As the definition says it.
    fn reference(mut values: Vec<f32>, trimmed: usize) -> f64 {
        values.sort_by(f32::total_cmp);
        let kept = &values[trimmed..values.len() - trimmed];
        kept.iter().map(|value| f64::from(*value)).sum::<f64>() / kept.len() as f64
    }

    /// Values of every size and sign, with many that are equal, zeros of both signs and the extremes.
    fn value(row: usize, column: usize) -> f32 {
        match (row * 7 + column * 13) % 11 {
            0 => 0.0,
            1 => -0.0,
            2 => f32::MAX,
            3 => f32::MIN,
            4 => f32::MIN_POSITIVE / 2.0,
            other => (other as f32 - 7.5) * 2f32.powi(((row * row + column) % 60) as i32 - 30),
        }
    }

    #[test]
    fn every_number_of_deltas_and_of_trimmed_ones_gives_what_the_definition_says() {
        for deltas in (1..=20).chain([33, 64, 100, 257]) {
            let rows: Vec<Vec<f32>> =
                (0..deltas).map(|row| (0..67).map(|column| value(row, column)).collect()).collect();
            let least = if deltas < 20 { 0 } else { (deltas - 1) / 2 - 2 };
            for trimmed in least..=(deltas - 1) / 2 {
                let found = combine(&rows, trimmed);
                for (column, found) in found.iter().enumerate() {
                    let expected = reference(rows.iter().map(|row| row[column]).collect(), trimmed);
                    assert_eq!(*found, expected, "{deltas} deltas, {trimmed} trimmed, column {column}");
                }
            }
        }
    }

    #[test]
    fn a_median_takes_fewer_comparisons_than_sorting() {
        assert!(TrimmedMean::new(32, 15).comparisons.len() < TrimmedMean::new(32, 0).comparisons.len());
        assert_eq!(TrimmedMean::new(1, 0).comparisons, []);
    }

    proptest! {
        /// Yin et al. rest on this: with at most as many hostile values as are trimmed at an end, every honest one
        /// being finite, the result is within the honest ones' range.
        #[test]
        fn the_result_is_within_the_range_of_the_honest_values_and_no_order_changes_it(
            honest in prop::collection::vec(-1e3f32..1e3, 1..40),
            hostile in prop::collection::vec(any::<f32>().prop_filter("finite", |value| value.is_finite()), 0..20),
            turn in any::<prop::sample::Index>(),
        ) {
            let deltas = honest.len() + hostile.len();
            prop_assume!(hostile.len() <= (deltas - 1) / 2);
            let mut values: Vec<f32> = honest.iter().chain(&hostile).copied().collect();
            let least = honest.iter().copied().fold(f32::MAX, f32::min);
            let most = honest.iter().copied().fold(f32::MIN, f32::max);
            for trimmed in [hostile.len(), (deltas - 1) / 2] {
                let column = |values: &[f32]| -> Vec<Vec<f32>> { values.iter().map(|value| vec![*value]).collect() };
                let found = combine(&column(&values), trimmed)[0];
                let rounded = found as f32;
                prop_assert!(least <= rounded && rounded <= most, "{rounded} is not in {least}..{most}");
                let by = turn.index(deltas);
                values.rotate_left(by);
                values.reverse();
                prop_assert_eq!(combine(&column(&values), trimmed)[0].to_bits(), found.to_bits());
            }
        }

        #[test]
        fn identical_values_give_that_value(value in any::<f32>(), deltas in 1usize..50) {
            prop_assume!(value.is_finite());
            for trimmed in [0, (deltas - 1) / 2] {
                let found = combine(&vec![vec![value]; deltas], trimmed)[0];
                prop_assert_eq!((found as f32) + 0.0, value + 0.0);
            }
        }
    }
}
