//! Two magnitudes for many: the quantiser of `2bit` and `topk`, which spend one bit on the sign of a value
//! and one on which of two magnitudes it has.
//!
//! The magnitudes are the means of those at most and of those above a threshold, which is where Lloyd's
//! method ("Least Squares Quantization in PCM", IEEE Trans. Inf. Theory 28, 1982) has got to: it starts at the
//! mean of all and moves, [`MOVES`] times, to the middle between the two means.

use super::scale;

/// How often the threshold moves. On Gaussian values the squared error is 1% above the least possible after
/// two moves and 0.1% after four; values with heavy tails gain more.
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
    let (mut low, mut high, mut high_count) = ([0.0; LANES], [0.0; LANES], [0; LANES]);
    for magnitudes in magnitudes.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            let (magnitude, is_high) = (magnitudes[lane], magnitudes[lane] > threshold);
            low[lane] += if is_high { 0.0 } else { magnitude };
            high[lane] += if is_high { magnitude } else { 0.0 };
            high_count[lane] += u32::from(is_high);
        }
    }
    let high_count = high_count.iter().sum::<u32>() as usize;
    (mean(low, count - high_count), mean(high, high_count))
}

#[inline(always)]
fn mean(mut sums: [f32; LANES], count: usize) -> f32 {
    for half in [8, 4, 2, 1] {
        for lane in 0..half {
            sums[lane] += sums[lane + half];
        }
    }
    sums[0] / count.max(1) as f32
}
