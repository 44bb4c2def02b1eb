//! The arithmetic of the weighted mean. Knows no files, sites or threads.
//!
//! Order and precision: contributions are added in the order of the calls, each product and sum in f64
//! without fused operations (Rust never contracts them), and the sum is rounded to f32 once. The result
//! depends on nothing else: not on how the vector is cut, nor on the machine or the width of its vectors.
//!
//! Each function is compiled for several widths of vectors, of which the processor's is taken when it is
//! called.

use multiversion::multiversion;

/// Partial sums of a sum of squares, which a processor adds at a time.
pub(super) const LANES: usize = 8;

/// Adds `weight` x `delta` to `sums`, element by element.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
pub(super) fn accumulate(sums: &mut [f64], weight: f64, delta: &[f32]) {
    for (sum, value) in sums.iter_mut().zip(delta) {
        *sum += weight * f64::from(*value);
    }
}

/// Rounds each sum to the nearest f32.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
pub(super) fn round(sums: &[f64], mean: &mut [f32]) {
    for (value, sum) in mean.iter_mut().zip(sums) {
        #[allow(clippy::cast_possible_truncation)] // the rounding that is meant
        let rounded = *sum as f32;
        *value = rounded;
    }
}

/// Adds the squares of `values`, in f64, to interleaved partial sums: value i goes to lane i mod [`LANES`]. The
/// lanes are then added in order. A function of the values alone, as long as all pieces but the last have a
/// multiple of [`LANES`].
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
pub(super) fn add_squares(lanes: &mut [f64; LANES], values: &[f32]) {
    let (groups, rest) = values.as_chunks::<LANES>();
    for group in groups {
        for (lane, value) in lanes.iter_mut().zip(group) {
            *lane += f64::from(*value) * f64::from(*value);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane += f64::from(*value) * f64::from(*value);
    }
}

/// Like [`add_squares`] for `new` - `old`, the differences in f64.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
pub(super) fn add_squares_of_differences(lanes: &mut [f64; LANES], new: &[f32], old: &[f32]) {
    let (groups, rest) = new.as_chunks::<LANES>();
    let (old_groups, old_rest) = old.as_chunks::<LANES>();
    for (group, old_group) in groups.iter().zip(old_groups) {
        for ((lane, value), old) in lanes.iter_mut().zip(group).zip(old_group) {
            let difference = f64::from(*value) - f64::from(*old);
            *lane += difference * difference;
        }
    }
    for ((lane, value), old) in lanes.iter_mut().zip(rest).zip(old_rest) {
        let difference = f64::from(*value) - f64::from(*old);
        *lane += difference * difference;
    }
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

    /// A fused product and sum would keep what the product's rounding drops.
    #[test]
    fn products_are_rounded_before_they_are_added() {
        let weight = 1.0 + f64::EPSILON;
        let value = 1.0f32 + f32::EPSILON;
        for length in 1..40 {
            let mut sums = vec![-1.0; length];
            accumulate(&mut sums, weight, &vec![value; length]);
            let product = std::hint::black_box(weight * f64::from(value));
            assert_eq!(sums, vec![product - 1.0; length]);
            assert_ne!(
                weight.mul_add(f64::from(value), -1.0),
                product - 1.0,
                "the values tell the two apart"
            );
        }
    }

    #[test]
    fn squares_are_summed() {
        let check = |count: u8, expected: f64| {
            let values: Vec<f32> = (1..=count).map(f32::from).collect();
            let mut lanes = [0.0; LANES];
            add_squares(&mut lanes, &values);
            assert_eq!(lanes.iter().sum::<f64>(), expected);
            let mut lanes = [0.0; LANES];
            let old: Vec<f32> = values.iter().map(|value| value * 3.0).collect();
            add_squares_of_differences(&mut lanes, &values, &old);
            assert_eq!(lanes.iter().sum::<f64>(), expected * 4.0);
        };
        check(20, 2870.0);
        check(16, 1496.0);
        check(0, 0.0);
    }
}
