//! Cutting the flat parameter vector into chunks: the unit of transfer, hashing, resumption, spooling
//! and reduction on both sides.

use std::ops::Range;

use serde::{Deserialize, Serialize};

/// Most parameters in one chunk: 1 Mi, 4 MiB as fp32, half of the largest message.
pub const CHUNK_PARAMETERS_MAX: u32 = 1 << 20;
/// Fewest parameters in one chunk of a specification.
pub const CHUNK_PARAMETERS_MIN: u32 = 1 << 10;

/// How a vector of `parameters` is cut: every chunk has `chunk_parameters` but the last, which has the
/// rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunkPlan {
    parameters: u64,
    chunk_parameters: u32,
}

/// A chunk that the plan does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("chunk {index} does not exist: the model has {chunks} chunks, numbered from 0")]
pub struct NoSuchChunk {
    /// The index asked for.
    pub index: u32,
    /// How many there are.
    pub chunks: u32,
}

impl ChunkPlan {
    /// A plan for a vector of `parameters`, in chunks of `chunk_parameters` (at least 1).
    ///
    /// # Panics
    /// If `chunk_parameters` is 0 or the vector needs more than `u32::MAX` chunks; a validated
    /// specification allows neither.
    pub fn new(parameters: u64, chunk_parameters: u32) -> Self {
        assert!(chunk_parameters > 0, "a chunk holds at least one parameter");
        assert!(parameters.div_ceil(u64::from(chunk_parameters)) <= u64::from(u32::MAX), "too many chunks");
        Self { parameters, chunk_parameters }
    }

    /// Length of the vector.
    pub fn parameters(&self) -> u64 {
        self.parameters
    }

    /// Parameters in every chunk but the last.
    pub fn chunk_parameters(&self) -> u32 {
        self.chunk_parameters
    }

    /// Number of chunks.
    #[allow(clippy::cast_possible_truncation)] // `new` checked that it fits
    pub fn chunks(&self) -> u32 {
        self.parameters.div_ceil(u64::from(self.chunk_parameters)) as u32
    }

    /// The parameters of chunk `index`, as a range of the flat vector.
    pub fn range(&self, index: u32) -> Result<Range<u64>, NoSuchChunk> {
        let chunks = self.chunks();
        if index >= chunks {
            return Err(NoSuchChunk { index, chunks });
        }
        let start = u64::from(index) * u64::from(self.chunk_parameters);
        Ok(start..(start + u64::from(self.chunk_parameters)).min(self.parameters))
    }

    /// Number of parameters in chunk `index`.
    #[allow(clippy::cast_possible_truncation)] // at most chunk_parameters
    pub fn length(&self, index: u32) -> Result<usize, NoSuchChunk> {
        self.range(index).map(|range| (range.end - range.start) as usize)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn chunks_tile_the_vector(parameters in 0u64..100_000, chunk in 1u32..5_000) {
            let plan = ChunkPlan::new(parameters, chunk);
            let mut next = 0;
            for index in 0..plan.chunks() {
                let range = plan.range(index).unwrap();
                prop_assert_eq!(range.start, next);
                prop_assert!(range.end > range.start);
                prop_assert_eq!(plan.length(index).unwrap() as u64, range.end - range.start);
                next = range.end;
            }
            prop_assert_eq!(next, parameters);
            prop_assert!(plan.range(plan.chunks()).is_err());
        }

        #[test]
        fn any_index_of_any_plan_is_within_the_vector_or_refused(
            chunks in prop_oneof![0u32..100, any::<u32>()],
            chunk in prop_oneof![1u32..100, 1u32..],
            missing: u32,
            index in prop_oneof![0u32..100, any::<u32>()],
        ) {
            let parameters = (u64::from(chunks) * u64::from(chunk)).saturating_sub(u64::from(missing % chunk));
            let plan = ChunkPlan::new(parameters, chunk);
            prop_assert_eq!(plan.chunks(), chunks);
            for index in [index, chunks.wrapping_sub(1), chunks] {
                match plan.range(index) {
                    Ok(range) => {
                        prop_assert!(index < chunks && range.start < range.end && range.end <= parameters);
                        prop_assert!(plan.length(index).unwrap() <= chunk as usize);
                    }
                    Err(error) => prop_assert_eq!(error, NoSuchChunk { index, chunks }),
                }
            }
        }
    }
}
