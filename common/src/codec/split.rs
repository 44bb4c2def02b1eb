//! Two magnitudes for many: the quantiser of `2bit` and `topk`, which spend one bit on the sign of a value
//! and one on which of two magnitudes it has.
//!
//! The magnitudes are the means of those at most and of those above a threshold, which is where Lloyd's
//! method ("Least Squares Quantization in PCM", IEEE Trans. Inf. Theory 28, 1982) has got to: it starts at the
//! mean of all and moves, [`MOVES`] times, to the middle between the two means.

use super::scale;

/// How often the threshold moves. On Gaussian values the squared error is 1% above the least possible after
/// two moves and 0.2% after four; values with heavy tails gain more.
const MOVES: usize = 4;

/// Sums run in this many lanes, value i in lane i mod 16; then lane i + 8 is added to lane i, and so on with 4,
/// 2 and 1: the same bits on every machine, and vectors of any width serve.
const LANES: usize = 16;

/// Where magnitudes are split, and what stands for both sides.
pub(super) struct Split {
    /// Above it, a magnitude is high.
    pub threshold: f32,
    /// The scales of the low and of the high ones.
    pub scales: [[u8; scale::BYTES]; 2],
}

/// Splits the first `count` of `magnitudes`, whose others are zero; `N` is a multiple of 16.
///
/// A sum beyond the range of fp32 counts as infinite, its mean as the largest scale: finite, if far off,
/// for values above 1e36.
#[inline(always)]
pub(super) fn split<const N: usize>(magnitudes: &[f32; N], count: usize) -> Split {
    let (all, _) = means(magnitudes, count, f32::MAX);
    let mut threshold = all;
    for _ in 0..MOVES {
        let (low, high) = means(magnitudes, count, threshold);
        threshold = (low + high) / 2.0;
    }
    let (low, high) = means(magnitudes, count, threshold);
    Split { threshold, scales: [scale::nearest(low), scale::nearest(high)] }
}

/// The means of the magnitudes at most and above `threshold`; 0 where there are none.
#[inline(always)]
fn means<const N: usize>(magnitudes: &[f32; N], count: usize, threshold: f32) -> (f32, f32) {
    let (mut low, mut high, mut high_count) = ([0.0; LANES], [0.0; LANES], [0.0; LANES]);
    for magnitudes in magnitudes.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            let (magnitude, is_high) = (magnitudes[lane], magnitudes[lane] > threshold);
            low[lane] += if is_high { 0.0 } else { magnitude };
            high[lane] += if is_high { magnitude } else { 0.0 };
            high_count[lane] += if is_high { 1.0 } else { 0.0 };
        }
    }
    let high_count = add_lanes(&high_count);
    (add_lanes(&low) / (count as f32 - high_count).max(1.0), add_lanes(&high) / high_count.max(1.0))
}

/// Written out, so that it stays in vectors.
#[inline(always)]
fn add_lanes(lanes: &[f32; LANES]) -> f32 {
    let (mut eight, mut four, mut two) = ([0.0; 8], [0.0; 4], [0.0; 2]);
    for lane in 0..8 {
        eight[lane] = lanes[lane] + lanes[lane + 8];
    }
    for lane in 0..4 {
        four[lane] = eight[lane] + eight[lane + 4];
    }
    for lane in 0..2 {
        two[lane] = four[lane] + four[lane + 2];
    }
    two[0] + two[1]
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::super::{
        Encoding,
        tests::{gaussian, heavy_tailed, relative_square_error, round_trip},
    };

    /// In place of each value, the mean of those that share its bin of four.
    fn bin_means(values: &[f32], bin: impl Fn(usize) -> usize) -> Vec<f32> {
        let (mut sums, mut counts) = ([0.0; 4], [0.0; 4]);
        for (at, value) in values.iter().enumerate() {
            sums[bin(at)] += value;
            counts[bin(at)] += 1.0;
        }
        (0..values.len()).map(|at| sums[bin(at)] / counts[bin(at)]).collect()
    }

    /// Bins with as many values each.
    fn quantile_bins(values: &[f32]) -> Vec<f32> {
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
        let mut rank = vec![0; values.len()];
        order.iter().enumerate().for_each(|(at, value)| rank[*value] = at);
        bin_means(values, |at| rank[at] * 4 / values.len())
    }

    /// Bins of a quarter of the range each.
    fn even_bins(values: &[f32]) -> Vec<f32> {
        let least = values.iter().copied().fold(f32::MAX, f32::min);
        let most = values.iter().copied().fold(f32::MIN, f32::max);
        bin_means(values, |at| (((values[at] - least) / (most - least) * 4.0) as usize).min(3))
    }

    /// The bins of MuLoCo's code: 1.5 standard deviations wide, the third around the mean.
    fn bins_by_deviation(values: &[f32]) -> Vec<f32> {
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        let deviation = (values.iter().map(|value| (value - mean).powi(2)).sum::<f32>()
            / (values.len() - 1) as f32)
            .sqrt();
        bin_means(values, |at| {
            ((values[at] - mean) / (1.5 * deviation) + 2.0).round_ties_even().clamp(0.0, 3.0) as usize
        })
    }

    type Draw = fn(&mut ChaCha8Rng) -> f32;
    type Quantiser = fn(&[f32]) -> Vec<f32>;

    /// Mean relative square errors over blocks of `block` values that `draw` gives: of the encoding, for those that
    /// it does not make zero, and of the other ways to spend two bits on them.
    fn two_bits<const N: usize>(
        encoding: Encoding,
        block: usize,
        draw: Draw,
        others: [Quantiser; N],
    ) -> (f64, [f64; N]) {
        const BLOCKS: usize = 100;
        let mut random = ChaCha8Rng::seed_from_u64(4);
        let (mut ours, mut theirs) = (0.0, [0.0; N]);
        for _ in 0..BLOCKS {
            let values: Vec<f32> = (0..block).map(|_| draw(&mut random)).collect();
            let decoded = round_trip(encoding, &values);
            let (kept, decoded): (Vec<f32>, Vec<f32>) =
                values.iter().zip(&decoded).filter(|(_, decoded)| **decoded != 0.0).unzip();
            ours += relative_square_error(&kept, &decoded) / BLOCKS as f64;
            for (error, other) in theirs.iter_mut().zip(others) {
                *error += relative_square_error(&kept, &other(&kept)) / BLOCKS as f64;
            }
        }
        (ours, theirs)
    }

    fn laplace(random: &mut ChaCha8Rng) -> f32 {
        let magnitude = -libm::log(1.0 - random.random::<f64>()) as f32;
        if random.random() { magnitude } else { -magnitude }
    }

    #[test]
    fn signs_and_two_magnitudes_lose_less_than_four_bins() {
        // The most that may be lost is a little above the figures in the headers of topk.rs and two_bit.rs.
        let rows: [(Draw, f64, f64); 3] =
            [(gaussian, 0.004, 0.119), (laplace, 0.0125, 0.176), (heavy_tailed, 0.065, 0.3)];
        for (draw, topk_most, two_bit_most) in rows {
            let (topk, [quantiles, even]) = two_bits(Encoding::TopK, 4096, draw, [quantile_bins, even_bins]);
            assert!(
                topk < topk_most && topk < even && topk < quantiles,
                "{topk} against {even} and {quantiles}"
            );
            let (two_bit, [deviation]) = two_bits(Encoding::TwoBit, 256, draw, [bins_by_deviation]);
            println!(
                "topk {topk:.4} quantiles {quantiles:.4} even {even:.4}; 2bit {two_bit:.4} deviation {deviation:.4}"
            );
            assert!(two_bit < two_bit_most && two_bit < deviation, "{two_bit} against {deviation}");
        }
    }
}
