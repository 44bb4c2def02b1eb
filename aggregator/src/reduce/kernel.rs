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
/// The bits of an fp32 without its sign. They order as the magnitudes do, infinity and NaN last.
const MAGNITUDE: u32 = 0x7fff_ffff;
/// The bits of infinity: those of a finite magnitude are below.
pub(super) const INFINITY: u32 = 0x7f80_0000;

/// Adds `weight` x `delta` to `sums`, element by element.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
pub(super) fn accumulate(sums: &mut [f64], weight: f64, delta: &[f32]) {
    for (sum, value) in sums.iter_mut().zip(delta) {
        *sum += weight * f64::from(*value);
    }
}

/// Like [`accumulate`] for the payload of a delta in fp32, without a decoded copy. Gives the bits of the
/// largest magnitude, by which the caller sees whether all values are finite.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
pub(super) fn accumulate_fp32(sums: &mut [f64], weight: f64, payload: &[u8]) -> u32 {
    let mut largest = 0;
    for (sum, bytes) in sums.iter_mut().zip(payload.as_chunks().0) {
        let bits = u32::from_le_bytes(*bytes);
        largest = largest.max(bits & MAGNITUDE);
        *sum += weight * f64::from(f32::from_bits(bits));
    }
    largest
}

/// Like [`accumulate_fp32`] for a delta in bf16.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
pub(super) fn accumulate_bf16(sums: &mut [f64], weight: f64, payload: &[u8]) -> u32 {
    let mut largest = 0;
    for (sum, bytes) in sums.iter_mut().zip(payload.as_chunks().0) {
        let bits = u32::from(u16::from_le_bytes(*bytes)) << 16;
        largest = largest.max(bits & MAGNITUDE);
        *sum += weight * f64::from(f32::from_bits(bits));
    }
    largest
}

/// Rounds each sum to the nearest f32, and adds the squares of these as [`add_squares`] does.
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

/// Adds the squares of `new` - `old`, in f64, to interleaved partial sums: value i goes to lane i mod
/// [`LANES`]. The lanes are then added in order. A function of the values alone, as long as all pieces but the
/// last have a multiple of [`LANES`].
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
pub(super) fn add_squares(lanes: &mut [f64; LANES], new: &[f32], old: &[f32]) {
    let add = |lanes: &mut [f64; LANES], new: &[f32], old: &[f32]| {
        for ((lane, new), old) in lanes.iter_mut().zip(new).zip(old) {
            let difference = f64::from(*new) - f64::from(*old);
            *lane += difference * difference;
        }
    };
    let (groups, rest) = new.as_chunks::<LANES>();
    let (old_groups, old_rest) = old.as_chunks::<LANES>();
    for (new, old) in groups.iter().zip(old_groups) {
        add(lanes, new, old);
    }
    add(lanes, rest, old_rest);
}

#[cfg(test)]
mod tests {
    use consort_common::codec::Encoding;

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
        round(&sums, &mut mean, &mut [0.0; LANES]);
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
            let mut from_payload = vec![-1.0; length];
            assert_eq!(
                accumulate_fp32(&mut from_payload, weight, &value.to_le_bytes().repeat(length)),
                value.to_bits()
            );
            assert_eq!(sums, from_payload);
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
            let sums: Vec<f64> = values.iter().copied().map(f64::from).collect();
            let mut lanes = [0.0; LANES];
            round(&sums, &mut vec![0.0; values.len()], &mut lanes);
            assert_eq!(lanes.iter().sum::<f64>(), expected);
            let mut lanes = [0.0; LANES];
            let old: Vec<f32> = values.iter().map(|value| value * 3.0).collect();
            add_squares(&mut lanes, &values, &old);
            assert_eq!(lanes.iter().sum::<f64>(), expected * 4.0);
        };
        check(20, 2870.0);
        check(16, 1496.0);
        check(0, 0.0);
    }

    #[test]
    fn payloads_are_added_as_what_they_decode_to() {
        for (encoding, add) in [
            (Encoding::Fp32, accumulate_fp32 as fn(&mut [f64], f64, &[u8]) -> u32),
            (Encoding::Bf16, accumulate_bf16),
        ] {
            let values: Vec<f32> = (0..77u8).map(|at| (f32::from(at) - 38.5).powi(5) / 3.0).collect();
            let payload = encoding.encode(&values);
            let mut decoded = vec![0.0; values.len()];
            encoding.codec().decode(&payload, &mut decoded).unwrap();
            let (mut sums, mut expected) = (vec![0.25; values.len()], vec![0.25; values.len()]);
            accumulate(&mut expected, 0.3, &decoded);
            assert_eq!(add(&mut sums, 0.3, &payload), decoded[0].abs().to_bits());
            assert_eq!(sums, expected);
        }
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(
                accumulate_fp32(&mut [0.0; 3], 1.0, &Encoding::Fp32.encode(&[0.0, bad, 1.0])) >= INFINITY
            );
            assert!(
                accumulate_bf16(&mut [0.0; 3], 1.0, &Encoding::Bf16.encode(&[0.0, bad, 1.0])) >= INFINITY
            );
        }
    }
}
