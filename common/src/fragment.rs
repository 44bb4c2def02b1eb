//! The part of a model that one round synchronises (Streaming DiLoCo, arXiv 2501.18512, section 2.1). The paper's
//! fragments are sets of layers, taken in strides; ours are sets of chunks, taken so: of P fragments, chunk c
//! belongs to fragment c mod P, and round r (from 1) synchronises fragment (r - 1) mod P. With one fragment a
//! round synchronises the whole model.
//!
//! A fragment's chunks, one after another, are a vector of their own, cut by a [`ChunkPlan`] of its own: deltas
//! are such vectors.

use crate::chunk::ChunkPlan;

/// The chunks of a model that one round synchronises.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fragment {
    model: ChunkPlan,
    index: u32,
    count: u32,
}

impl Fragment {
    /// What `round`, from 1, synchronises of a model that is cut by `model`, where there are `count` fragments, at
    /// least 1. Version `round` differs from the one before in this fragment only.
    pub fn of_round(model: ChunkPlan, count: u32, round: u32) -> Self {
        let count = count.max(1);
        Self { model, index: round.saturating_sub(1) % count, count }
    }

    /// All of the model.
    pub fn whole(model: ChunkPlan) -> Self {
        Self { model, index: 0, count: 1 }
    }

    /// How the model is cut.
    pub fn model(&self) -> ChunkPlan {
        self.model
    }

    /// How many fragments there are.
    pub fn count(&self) -> u32 {
        self.count
    }

    /// How the fragment's own vector is cut. Of its chunks only the last can be shorter, as of the model's.
    pub fn plan(&self) -> ChunkPlan {
        let chunks = self.model.chunks().saturating_sub(self.index).div_ceil(self.count);
        let last = chunks.checked_sub(1).and_then(|last| self.model.length(self.chunk(last)).ok());
        let whole = u64::from(chunks.saturating_sub(1)) * u64::from(self.model.chunk_parameters());
        ChunkPlan::new(whole + last.unwrap_or_default() as u64, self.model.chunk_parameters())
    }

    /// Which of the model's chunks is the fragment's chunk `index`.
    pub fn chunk(&self, index: u32) -> u32 {
        index.saturating_mul(self.count).saturating_add(self.index)
    }

    /// Which of the fragment's chunks is the model's chunk `chunk`; none if it belongs to another fragment.
    pub fn position(&self, chunk: u32) -> Option<u32> {
        (chunk % self.count == self.index).then_some(chunk / self.count)
    }

    /// The first chunk of the model, from `chunk` on, that belongs to the fragment. It may lie beyond the last.
    pub fn next_chunk(&self, chunk: u32) -> u32 {
        let ahead = (self.index + self.count - chunk % self.count) % self.count;
        chunk.saturating_add(ahead)
    }

    /// The fragment's chunks of `values`, the model's flat vector, in order.
    pub fn slices<'a>(&self, values: &'a [f32]) -> impl Iterator<Item = &'a [f32]> + use<'a> {
        let chunks = values.chunks(self.model.chunk_parameters() as usize);
        chunks.skip(self.index as usize).step_by(self.count as usize)
    }

    /// The same to be changed.
    pub fn slices_mut<'a>(&self, values: &'a mut [f32]) -> impl Iterator<Item = &'a mut [f32]> + use<'a> {
        let chunks = values.chunks_mut(self.model.chunk_parameters() as usize);
        chunks.skip(self.index as usize).step_by(self.count as usize)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn as_many_rounds_as_there_are_fragments_synchronise_every_chunk_once(
            parameters in 1u64..5_000,
            chunk in 1u32..200,
            count in 1u32..12,
            first_round in 1u32..100,
        ) {
            let model = ChunkPlan::new(parameters, chunk);
            prop_assume!(count <= model.chunks());
            let values: Vec<f32> = (0..parameters).map(|value| value as f32).collect();
            let mut seen = vec![0; model.chunks() as usize];
            for round in first_round..first_round + count {
                let fragment = Fragment::of_round(model, count, round);
                let plan = fragment.plan();
                prop_assert!(plan.chunks() > 0);
                let slices: Vec<&[f32]> = fragment.slices(&values).collect();
                prop_assert_eq!(slices.len(), plan.chunks() as usize);
                prop_assert_eq!(slices.concat().len() as u64, plan.parameters());
                for (index, slice) in (0..).zip(slices) {
                    let chunk = fragment.chunk(index);
                    let range = model.range(chunk).unwrap();
                    prop_assert_eq!(slice, &values[range.start as usize..range.end as usize]);
                    prop_assert_eq!(slice.len(), plan.length(index).unwrap());
                    prop_assert_eq!(fragment.position(chunk), Some(index));
                    seen[chunk as usize] += 1;
                }
            }
            prop_assert!(seen.iter().all(|times| *times == 1));
        }

        #[test]
        fn the_next_chunk_is_the_first_of_the_fragment(chunk in 0u32..1_000, count in 1u32..12, round in 1u32..50) {
            let fragment = Fragment::of_round(ChunkPlan::new(1_000, 1), count, round);
            let expected = (chunk..).find(|chunk| fragment.position(*chunk).is_some()).unwrap();
            prop_assert_eq!(fragment.next_chunk(chunk), expected);
        }
    }

    #[test]
    fn one_fragment_is_the_whole_model() {
        let model = ChunkPlan::new(25, 10);
        for round in 0..4 {
            assert_eq!(Fragment::of_round(model, 1, round), Fragment::whole(model));
        }
        assert_eq!(Fragment::whole(model).plan(), model);
    }
}
