//! A pass over all deltas before any is averaged: their norms and, where a rule asks, their distances.
//!
//! With a, b two deltas: |a|^2 and |a - b|^2, differences, products and sums in f64. Values are added in
//! interleaved lanes (see `kernel`) tile by tile, tiles and then chunks in their order: the same bits whatever
//! order deltas arrived in, and for any number of threads. The lengths of tiles and chunks show in the last digits.
//!
//! Sketch: n deltas of d values have n^2/2 distances, d subtractions, products and sums each. On one core that is
//! some 2 values a nanosecond: for 16 deltas of 125 million values 8 s, for 100 of them 5 minutes; the round waits
//! for that. Memory: `gather`'s on each core, and 4 n^2 bytes on each core and once more; fewer cores work where that
//! would be more than `fold` allows.

use std::sync::{Mutex, PoisonError};

use consort_common::{chunk::ChunkPlan, ids::Digest};
use multiversion::multiversion;
use rayon::prelude::*;

use super::{ReduceError, Share, gather::Gather, kernel::LANES};
use crate::models::ModelError;

/// What is known of all deltas together.
#[derive(Debug)]
pub(super) struct Survey {
    /// |a|^2 of each delta.
    pub(super) squares: Vec<f64>,
    /// None unless they were asked for.
    pub(super) distances: Option<Distances>,
    /// Digest over each delta's chunk digests.
    pub(super) digests: Vec<Digest>,
}

/// |a - b|^2 for each pair of deltas.
#[derive(Debug)]
pub(super) struct Distances {
    deltas: usize,
    /// Those of a delta to the ones after it, delta by delta.
    squares: Vec<f64>,
}

impl Distances {
    /// `squares` are those of the pairs (0, 1), (0, 2), ..., (1, 2), ....
    pub(super) fn new(deltas: usize, squares: Vec<f64>) -> Self {
        Self { deltas, squares }
    }

    /// How many deltas.
    pub(super) fn deltas(&self) -> usize {
        self.deltas
    }

    /// Of two different deltas.
    pub(super) fn square(&self, a: usize, b: usize) -> f64 {
        let (first, second) = (a.min(b), a.max(b));
        let before = first * (2 * self.deltas - first - 1) / 2;
        self.squares[before + second - first - 1]
    }
}

/// The sums of one chunk.
#[derive(Debug)]
struct ChunkSums {
    squares: Vec<f64>,
    pairs: Vec<f64>,
    digests: Vec<Digest>,
}

impl Survey {
    /// Bytes of the sums that a core keeps of a chunk.
    pub(super) fn bytes(deltas: usize, distances: bool) -> usize {
        (deltas + pairs(deltas, distances)) * size_of::<f64>()
    }

    /// Reads all of `shares`, on at most `workers` cores of the current rayon pool.
    ///
    /// # Errors
    /// See [`Gather::tiles`].
    pub(super) fn of(
        shares: &[Share],
        plan: ChunkPlan,
        tile_parameters: usize,
        distances: bool,
        workers: usize,
    ) -> Result<Self, ReduceError> {
        let idle: Mutex<Vec<Gather>> = Mutex::default();
        let chunk = |index: u32| {
            let lock = || idle.lock().unwrap_or_else(PoisonError::into_inner);
            let mut gather = lock().pop().unwrap_or_default();
            let length = plan.length(index).map_err(ModelError::from)?;
            let sums = chunk_sums(shares, index, length, tile_parameters, distances, &mut gather);
            lock().push(gather);
            sums
        };
        let mut squares = vec![0.0; shares.len()];
        let mut pairs = vec![0.0; pairs(shares.len(), distances)];
        let mut hashers = vec![blake3::Hasher::new(); shares.len()];
        // As many chunks at a time as are worked on: their sums need not wait for each other.
        let mut next = 0;
        while next < plan.chunks() {
            let end = plan.chunks().min(next.saturating_add(u32::try_from(workers).unwrap_or(1)));
            let batch: Vec<ChunkSums> = (next..end).into_par_iter().map(chunk).collect::<Result<_, _>>()?;
            for sums in batch {
                squares.iter_mut().zip(sums.squares).for_each(|(sum, value)| *sum += value);
                pairs.iter_mut().zip(sums.pairs).for_each(|(sum, value)| *sum += value);
                for (hasher, digest) in hashers.iter_mut().zip(sums.digests) {
                    hasher.update(digest.as_bytes());
                }
            }
            next = end;
        }
        Ok(Self {
            squares,
            distances: distances.then(|| Distances::new(shares.len(), pairs)),
            digests: hashers.iter().map(|hasher| hasher.finalize().into()).collect(),
        })
    }
}

/// Pairs of deltas of which the distance is found.
fn pairs(deltas: usize, distances: bool) -> usize {
    if distances { deltas * deltas.saturating_sub(1) / 2 } else { 0 }
}

fn chunk_sums(
    shares: &[Share],
    index: u32,
    length: usize,
    tile_parameters: usize,
    distances: bool,
    gather: &mut Gather,
) -> Result<ChunkSums, ReduceError> {
    let mut sums = vec![0.0; shares.len()];
    let mut pairs = vec![0.0; pairs(shares.len(), distances)];
    let digests = gather.tiles(shares, index, length, tile_parameters, |_, rows| {
        for (sum, row) in sums.iter_mut().zip(rows) {
            *sum += square(row);
        }
        let mut pair = pairs.iter_mut();
        for (at, row) in rows.iter().enumerate() {
            for (other, sum) in rows[at + 1..].iter().zip(&mut pair) {
                *sum += square_distance(row, other);
            }
        }
    })?;
    Ok(ChunkSums { squares: sums, pairs, digests })
}

/// |a|^2.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
pub(super) fn square(values: &[f32]) -> f64 {
    let mut lanes = [0.0; LANES];
    let add = |lanes: &mut [f64; LANES], values: &[f32]| {
        for (lane, value) in lanes.iter_mut().zip(values) {
            *lane += f64::from(*value) * f64::from(*value);
        }
    };
    let (groups, rest) = values.as_chunks::<LANES>();
    groups.iter().for_each(|values| add(&mut lanes, values));
    add(&mut lanes, rest);
    lanes.iter().sum()
}

/// |a - b|^2.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn square_distance(a: &[f32], b: &[f32]) -> f64 {
    let mut lanes = [0.0; LANES];
    let add = |lanes: &mut [f64; LANES], a: &[f32], b: &[f32]| {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            let difference = f64::from(*a) - f64::from(*b);
            *lane += difference * difference;
        }
    };
    let (groups, rest) = a.as_chunks::<LANES>();
    let (other_groups, other_rest) = b.as_chunks::<LANES>();
    for (a, b) in groups.iter().zip(other_groups) {
        add(&mut lanes, a, b);
    }
    add(&mut lanes, rest, other_rest);
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn squares_are_those_of_all_values() {
        for length in 0..40u16 {
            let a: Vec<f32> = (0..length).map(f32::from).collect();
            let b: Vec<f32> = a.iter().map(|value| 3.0 * value).collect();
            let expected: f64 = (0..length).map(|value| f64::from(value).powi(2)).sum();
            assert_eq!((square(&a), square_distance(&a, &b)), (expected, 4.0 * expected));
        }
    }

    #[test]
    fn distances_take_half_a_square_of_sums() {
        assert_eq!(Survey::bytes(100, false), 800);
        assert_eq!(Survey::bytes(100, true), 800 + 100 * 99 / 2 * 8);
        assert_eq!((pairs(0, true), pairs(1, true), pairs(2, true)), (0, 0, 1));
    }

    #[test]
    fn distances_are_found_by_their_pair() {
        for deltas in 2..9 {
            let pairs = (0..deltas).flat_map(|a| (a + 1..deltas).map(move |b| (a * 100 + b) as f64));
            let distances = Distances::new(deltas, pairs.collect());
            for a in 0..deltas {
                for b in (0..deltas).filter(|b| *b != a) {
                    assert_eq!(distances.square(a, b), (a.min(b) * 100 + a.max(b)) as f64);
                }
            }
        }
    }
}
