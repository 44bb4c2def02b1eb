//! The arithmetic of the weighted mean over one chunk. Knows no files, sites or threads.
//!
//! Order and precision: contributions are added in the order of the calls, each product and sum in f64
//! without fused operations (Rust never contracts them), and the sum is rounded to f32 once. The result
//! depends on nothing else: not on how the vector is cut, nor on the machine.
//!
//! Sketch: an element costs one decode, one widening, one multiplication and one addition per
//! contribution; with the default chunk (2^18 values: 1 MiB decoded, 2 MiB of sums) that stays in a
//! core's share of the cache, and reading the spool is what takes the time.

/// Adds `weight` x `delta` to `sums`, element by element.
pub(super) fn accumulate(sums: &mut [f64], weight: f64, delta: &[f32]) {
    for (sum, value) in sums.iter_mut().zip(delta) {
        *sum += weight * f64::from(*value);
    }
}

/// Rounds each sum to the nearest f32.
pub(super) fn round(sums: &[f64], mean: &mut [f32]) {
    for (value, sum) in mean.iter_mut().zip(sums) {
        #[allow(clippy::cast_possible_truncation)] // the rounding that is meant
        let rounded = *sum as f32;
        *value = rounded;
    }
}

/// Sum of squares in f64: eight interleaved partial sums, which a processor adds at a time, then these in
/// order. A function of the values alone.
pub(super) fn sum_of_squares(values: impl Iterator<Item = f64>) -> f64 {
    const LANES: usize = 8;
    let mut sums = [0.0; LANES];
    for (position, value) in values.enumerate() {
        sums[position % LANES] += value * value;
    }
    sums.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_is_rounded_once() {
        // In f32, 1 + 2^-25 would be 1 after each addition; in f64 four of them are 2^-23, one unit.
        let tiny = 2f32.powi(-25);
        let mut sums = [1.0];
        for _ in 0..4 {
            accumulate(&mut sums, 1.0, &[tiny]);
        }
        let mut mean = [0.0];
        round(&sums, &mut mean);
        assert_eq!(mean, [1.0 + f32::EPSILON]);
    }

    #[test]
    fn squares_are_summed() {
        assert_eq!(sum_of_squares((1..=20).map(f64::from)), 2870.0);
        assert_eq!(sum_of_squares([].into_iter()), 0.0);
    }
}
