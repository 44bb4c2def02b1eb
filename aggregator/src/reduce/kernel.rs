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
/// A value of a delta, as its payload or a decoder holds it.
pub(super) trait Value: Copy {
    /// The value, exactly.
    fn to_f64(self) -> f64;
}

impl Value for f32 {
    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
}

/// Four bytes of an fp32 payload.
impl Value for [u8; 4] {
    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(f32::from_le_bytes(self))
    }
}

/// Two bytes of a bf16 payload: the upper half of an fp32.
impl Value for [u8; 2] {
    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(f32::from_bits(u32::from(u16::from_le_bytes(self)) << 16))
    }
}

/// Adds weight x delta to `sums`, element by element, for one delta after another; all have the length of
/// `sums`. A value that is not finite makes its sum so.
pub(super) fn accumulate<'a, V: Value + 'a>(
    sums: &mut [f64],
    weighted: impl IntoIterator<Item = (f64, &'a [V])>,
) {
    // Several deltas in one pass over the sums: each sum's additions keep their order.
    let mut weighted = weighted.into_iter().fuse();
    loop {
        match std::array::from_fn(|_| weighted.next()) {
            [Some(a), Some(b), Some(c), Some(d)] => add(sums, [a, b, c, d]),
            [Some(a), Some(b), Some(c), None] => add(sums, [a, b, c]),
            [Some(a), Some(b), ..] => add(sums, [a, b]),
            [Some(a), ..] => add(sums, [a]),
            [None, ..] => return,
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn add<V: Value, const N: usize>(sums: &mut [f64], weighted: [(f64, &[V]); N]) {
    let weights = weighted.map(|(weight, _)| weight);
    let values = weighted.map(|(_, values)| &values[..sums.len()]);
    for (at, sum) in sums.iter_mut().enumerate() {
        for (weight, values) in weights.iter().zip(values) {
            *sum += weight * values[at].to_f64();
        }
    }
}

/// Rounds each sum to the nearest f32, and adds the squares of these to interleaved partial sums: that of value i
/// goes to lane i mod [`LANES`]. The lanes are then added in order. A function of the values alone, as long as all
/// pieces but the last have a multiple of [`LANES`].
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
pub(super) fn round(sums: &[f64], mean: &mut [f32], lanes: &mut [f64; LANES]) {
    let round = |sums: &[f64], mean: &mut [f32], lanes: &mut [f64; LANES]| {
        for ((value, sum), lane) in mean.iter_mut().zip(sums).zip(lanes) {
            #[allow(clippy::cast_possible_truncation)] // the rounding that is meant
            let rounded = *sum as f32;
            *value = rounded;
            *lane += f64::from(rounded) * f64::from(rounded);
        }
    };
    let (groups, rest) = sums.as_chunks::<LANES>();
    let (mean_groups, mean_rest) = mean.as_chunks_mut::<LANES>();
    for (sums, mean) in groups.iter().zip(mean_groups) {
        round(sums, mean, lanes);
    }
    round(rest, mean_rest, lanes);
}

#[cfg(test)]
mod tests {
    use consort_common::codec::Encoding;

    use super::*;

    #[test]
    fn a_mean_is_rounded_once() {
        // In f32, 1 + 2^-25 would be 1 after each addition; in f64 four of them are 2^-23, one unit.
        let tiny: &[f32] = &[2f32.powi(-25)];
        let mut sums = [1.0];
        for _ in 0..4 {
            accumulate(&mut sums, [(1.0, tiny)]);
        }
        let mut mean = [0.0];
        round(&sums, &mut mean, &mut [0.0; LANES]);
        assert_eq!(mean, [1.0 + f32::EPSILON]);
    }

    /// A fused product and sum would keep what the product's rounding drops.
    #[test]
    fn products_are_rounded_before_they_are_added() {
        let weight = 1.0 + f64::EPSILON;
        let value = 1.0f32 + f32::EPSILON;
        let product = std::hint::black_box(weight * f64::from(value));
        assert_ne!(weight.mul_add(f64::from(value), -1.0), product - 1.0, "the values tell the two apart");
        for length in 1..40 {
            let payload = value.to_le_bytes().repeat(length);
            let payload = payload.as_chunks::<4>().0;
            for deltas in 1..=7 {
                let mut expected = -1.0;
                (0..deltas).for_each(|_| expected += product);
                let mut sums = vec![-1.0; length];
                accumulate(&mut sums, vec![(weight, vec![value; length].as_slice()); deltas]);
                assert_eq!(sums, vec![expected; length]);
                let mut sums = vec![-1.0; length];
                accumulate(&mut sums, vec![(weight, payload); deltas]);
                assert_eq!(sums, vec![expected; length]);
            }
        }
    }

    #[test]
    fn deltas_are_added_in_their_order_however_many_there_are() {
        // In any other order the sums of these differ.
        let value = |delta: usize, at: usize| (0.1 + delta as f32).powi(at as i32 % 9 * 4 - 16);
        for deltas in 0..20 {
            let values: Vec<Vec<f32>> =
                (0..deltas).map(|delta| (0..50).map(|at| value(delta, at)).collect()).collect();
            let weighted: Vec<(f64, &[f32])> = values
                .iter()
                .enumerate()
                .map(|(delta, values)| (1.0 / (1.0 + delta as f64), &values[..]))
                .collect();
            let mut expected = vec![0.5; 50];
            for (weight, values) in &weighted {
                expected.iter_mut().zip(*values).for_each(|(sum, value)| *sum += weight * f64::from(*value));
            }
            let mut sums = vec![0.5; 50];
            accumulate(&mut sums, weighted);
            assert_eq!(sums, expected, "{deltas} deltas");
        }
    }

    #[test]
    fn squares_are_summed() {
        let check = |count: u8, expected: f64| {
            let values: Vec<f32> = (1..=count).map(f32::from).collect();
            let sums: Vec<f64> = values.iter().copied().map(f64::from).collect();
            let mut lanes = [0.0; LANES];
            round(&sums, &mut vec![0.0; values.len()], &mut lanes);
            assert_eq!(lanes.iter().sum::<f64>(), expected);
        };
        check(20, 2870.0);
        check(16, 1496.0);
        check(0, 0.0);
    }

    #[test]
    fn payloads_are_added_as_what_they_decode_to() {
        let values: Vec<f32> = (0..77u8).map(|at| (f32::from(at) - 38.5).powi(5) / 3.0).collect();
        for encoding in [Encoding::Fp32, Encoding::Bf16] {
            let payload = encoding.encode(&values);
            let mut decoded = vec![0.0; values.len()];
            encoding.codec().decode(&payload, &mut decoded).unwrap();
            let (mut sums, mut expected) = (vec![0.25; values.len()], vec![0.25; values.len()]);
            accumulate(&mut expected, [(0.3, &decoded[..])]);
            match encoding {
                Encoding::Fp32 => accumulate(&mut sums, [(0.3, payload.as_chunks::<4>().0)]),
                _ => accumulate(&mut sums, [(0.3, payload.as_chunks::<2>().0)]),
            }
            assert_eq!(sums, expected);
        }
    }

    #[test]
    fn a_value_that_is_not_finite_shows_in_the_squares() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut values = [1.0; 21];
            values[17] = bad;
            let mut sums = [0.0; 21];
            accumulate(
                &mut sums,
                [(1.0, &[f32::MAX; 21][..]), (0.5, &values), (0.5, &values.map(|value| -value))],
            );
            let mut lanes = [0.0; LANES];
            round(&sums, &mut [0.0; 21], &mut lanes);
            assert!(!lanes.iter().sum::<f64>().is_finite(), "{bad}");
        }
    }
}
