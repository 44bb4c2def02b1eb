//! The model's tensors as pieces of the flat vector, for what is recorded of each. What they are is nobody's business
//! here.

use std::{ops::Range, sync::Arc};

use consort_common::model::Manifest;

use super::statistics::{Lanes, Sums};
use crate::engine::TensorNorms;

/// Where each tensor of a model ends, in the order of the flat vector.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorPlan {
    ends: Arc<[u64]>,
}

/// A tensor, or what of one lies in a chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Piece {
    /// Its place in the manifest.
    pub(super) tensor: usize,
    /// Positions in the chunk.
    pub(super) range: Range<usize>,
}

impl TensorPlan {
    /// Of the model with that manifest.
    pub fn new(manifest: &Manifest) -> Self {
        Self::with_ends(manifest.tensors().iter().scan(0, |end, tensor| {
            *end += tensor.parameters() as u64;
            Some(*end)
        }))
    }

    /// Of tensors that end there, ascending; the last end is the length of the flat vector.
    pub fn with_ends(ends: impl IntoIterator<Item = u64>) -> Self {
        Self { ends: ends.into_iter().collect() }
    }

    /// What lies in a range of the flat vector: in order, not empty.
    #[allow(clippy::cast_possible_truncation)] // a chunk's positions fit
    pub(super) fn pieces(&self, range: Range<u64>) -> Vec<Piece> {
        let first = self.ends.partition_point(|end| *end <= range.start);
        let mut begin = range.start;
        let mut pieces = Vec::new();
        for (tensor, end) in self.ends.iter().enumerate().skip(first) {
            if begin == range.end {
                break;
            }
            let end = range.end.min(*end);
            if begin < end {
                let range = (begin - range.start) as usize..(end - range.start) as usize;
                pieces.push(Piece { tensor, range });
            }
            begin = end;
        }
        pieces
    }

    /// Norms of all tensors, from the sums of their pieces in the order of the flat vector.
    pub(super) fn norms(
        &self,
        pieces: impl IntoIterator<Item = (usize, Sums)>,
        has_momentum: bool,
    ) -> Vec<TensorNorms> {
        let mut sums = vec![Sums::default(); self.ends.len()];
        pieces.into_iter().for_each(|(tensor, piece)| sums[tensor].add(piece));
        sums.into_iter().map(|sums| sums.norms(has_momentum)).collect()
    }
}

/// Of the pieces that a range of a chunk's positions touches: which positions of the range are theirs, and their sums.
pub(super) fn within<'a>(
    pieces: &'a [Piece],
    lanes: &'a mut [Lanes],
    range: Range<usize>,
) -> impl Iterator<Item = (Range<usize>, &'a mut Lanes)> {
    let first = pieces.partition_point(|piece| piece.range.end <= range.start);
    let (begin, end) = (range.start, range.end);
    let touched = pieces[first..].iter().zip(&mut lanes[first..]);
    touched.take_while(move |(piece, _)| piece.range.start < end).map(move |(piece, lanes)| {
        (piece.range.start.max(begin) - begin..piece.range.end.min(end) - begin, lanes)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pieces_of_chunks_and_tiles_tile_the_tensors(
            lengths in prop::collection::vec(0u64..40, 1..12),
            chunk in 1u64..50,
            tile in 1usize..20,
        ) {
            let ends: Vec<u64> = lengths.iter().scan(0, |end, length| { *end += length; Some(*end) }).collect();
            let total = *ends.last().unwrap();
            let plan = TensorPlan::with_ends(ends);
            let mut counted = vec![0; lengths.len()];
            for begin in (0..total).step_by(chunk as usize) {
                let end = (begin + chunk).min(total);
                let pieces = plan.pieces(begin..end);
                let mut next = 0;
                for piece in &pieces {
                    prop_assert_eq!(piece.range.start, next);
                    prop_assert!(piece.range.end > next);
                    next = piece.range.end;
                    counted[piece.tensor] += piece.range.len() as u64;
                }
                let length = (end - begin) as usize;
                prop_assert_eq!(next, length);
                let mut sums: Vec<Lanes> = pieces.iter().map(|_| Lanes::default()).collect();
                for at in (0..length).step_by(tile) {
                    let stop = (at + tile).min(length);
                    let mut reached = 0;
                    for (range, lanes) in within(&pieces, &mut sums, at..stop) {
                        prop_assert_eq!(range.start, reached);
                        reached = range.end;
                        lanes.delta[0] += range.len() as f64;
                    }
                    prop_assert_eq!(reached, stop - at);
                }
                for (piece, lanes) in pieces.iter().zip(&sums) {
                    prop_assert_eq!(piece.range.len() as f64, lanes.delta[0]);
                }
            }
            prop_assert_eq!(counted, lengths);
        }
    }
}
