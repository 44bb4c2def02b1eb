//! One chunk of a reduction.
//!
//! The payloads of a few deltas are read whole and verified, and then added to the chunk's sums together, tile
//! by tile, so that the sums and decoded values do not leave a core's first cache meanwhile. Then each tile of
//! the sums goes through the outer step and the rounding, and the chunk is written.
//!
//! Sketch, for 8 fp32 deltas of 125 million values in chunks of 2^18, by a prototype on two threads that copied 39
//! to 50 GB/s in memory: reads of a MiB bring the deltas in 130 to 175 ms (of 256 KiB, which would stay in the
//! second cache, in 180 to 205), and the base with them; writing the new version's pages takes 40 to 55. So 5 GB
//! would move at 20 to 27 GB/s if there were nothing to compute. Of what is in a cache, the checksums take 40 ms,
//! the sums 50, the step with its norms 40: 340 to 370 ms in all.
//!
//! Maps of the deltas save the copies and were no faster. Populated before use (`MADV_POPULATE_READ`, which returns
//! a disk's error where a load would end the process) and dropped after, they took 470 ms in all where reads took
//! 350; 400 to 430 where reads took 340 to 370, if one page in 16 was populated and `mincore` asked whether the
//! others had come with it. With bf16 deltas that took 295 to 300 against 250 to 255, and 245 at best, with
//! prefetches and four chunks dropped at a time. Page tables are filled 4 KiB at a time and emptied on both cores,
//! under a hypervisor; and what is added then comes from memory, not from a cache. Of a file that was written 2 MiB at
//! a time, which ext4 of Linux 6.18 keeps in pages of 2 MiB, 512 MiB were populated in 0.4 ms; of one written by the
//! MiB, as chunks of deltas are, in 44, and by 4 KiB in 117. A prototype of the whole fold, where memory was copied at
//! 30 to 36 GB/s, moved 18 GB/s with reads; with maps of such files 22 to 25, and 16 to 19 with bf16 deltas, whose
//! sums, checksums and step take the rest. Nothing makes use of that: chunks would have to be written 2 MiB at a time
//! (faulting the pages in before they are written took 1.1 s for 512 MB), and be guarded while they are mapped.
//!
//! Digests of the new version are left to `models`, which takes them while the disk is busy.

use std::ops::Range;

use consort_common::{codec::Encoding, fragment::Fragment, ids::Digest, spec::OuterOptimizer};

use super::{
    ReduceError, Share,
    broadcast::{self, Rounding},
    damaged,
    gather::Gather,
    kernel,
    outer::{self, Moments},
    robust::Combination,
    statistics::{Lanes, Sums},
    survey,
    tensors::{Piece, TensorPlan, within},
};
use crate::{
    aligned::AlignedVec,
    models::{ChunkRecord, ModelError, ModelVersion, NewChunk, NewVersion},
};

/// Values of a tile where all encodings allow it: its sums, decoded values and payload, 16 KiB, fit a core's
/// first cache.
const TILE_PARAMETERS_MIN: usize = 1024;
/// Deltas whose payloads are in memory together, on each core.
const GROUP_DELTAS: usize = 2;

/// What a round's reduction works on.
#[derive(Debug)]
pub(super) struct Inputs {
    /// In canonical order.
    pub(super) shares: Vec<Share>,
    pub(super) base: ModelVersion,
    /// The version before the base, where it is still there: by it successive updates are compared.
    previous: Option<ModelVersion>,
    optimizer: OuterOptimizer,
    rounding: Rounding,
    residual_decay: f32,
    combination: Combination,
    pub(super) tensors: TensorPlan,
    /// What the round synchronises.
    fragment: Fragment,
    /// Values that are worked on at a time: a multiple of every encoding's block.
    tile_parameters: usize,
}

/// One core's vectors, kept from chunk to chunk. Those without a word have the chunk's length, or none.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// Of the deltas of one group.
    payloads: [AlignedVec<u8>; GROUP_DELTAS],
    sums: AlignedVec<f64>,
    base: AlignedVec<f32>,
    momentum: AlignedVec<f32>,
    second_moment: AlignedVec<f32>,
    residual: AlignedVec<f32>,
    parameters: AlignedVec<f32>,
    /// Of the version before the base.
    previous: AlignedVec<f32>,
    /// What the new version's form sends.
    sent: AlignedVec<u8>,
    /// A tile of each delta of one group.
    decoded: [AlignedVec<f32>; GROUP_DELTAS],
    /// A tile of their mean.
    delta: AlignedVec<f32>,
    /// For trimmed means: the same piece of all deltas, and what is sorted of it.
    gather: Gather,
    keys: AlignedVec<i32>,
}

/// What is kept of a folded chunk.
#[derive(Debug)]
pub(super) struct FoldedChunk {
    pub(super) record: ChunkRecord,
    /// Of the payloads that went in, in canonical order.
    pub(super) digests: Box<[Digest]>,
    /// Sums of the squares of each delta's values, in canonical order; none where a weighted mean adds them as
    /// they are encoded.
    pub(super) squares: Box<[Option<f64>]>,
    /// Of each tensor that has values in the chunk, with its place in the manifest.
    pub(super) sums: Box<[(usize, Sums)]>,
}

/// Values of a tile for these encodings: a multiple of every block, all of which are powers of two.
pub(super) fn tile_parameters(encodings: impl Iterator<Item = Encoding>) -> usize {
    encodings.map(|encoding| encoding.codec().block_parameters()).fold(TILE_PARAMETERS_MIN, usize::max)
}

impl Inputs {
    pub(super) fn new(
        shares: Vec<Share>,
        base: ModelVersion,
        previous: Option<ModelVersion>,
        optimizer: OuterOptimizer,
        combination: Combination,
        tensors: TensorPlan,
    ) -> Self {
        let form = base.layout().encoding;
        let encodings = shares.iter().map(Share::encoding).chain(Rounding::new(form).encoding());
        Self {
            tile_parameters: tile_parameters(encodings),
            combination,
            tensors,
            rounding: Rounding::new(form),
            residual_decay: form.residual_decay().unwrap_or_default(),
            fragment: base.layout().fragment(base.version() + 1),
            shares,
            base,
            previous,
            optimizer,
        }
    }

    /// What the round synchronises.
    pub(super) fn fragment(&self) -> Fragment {
        self.fragment
    }

    /// Bytes of one core's vectors, about.
    pub(super) fn scratch_bytes(&self) -> usize {
        let layout = self.base.layout();
        let optional =
            [layout.momentum, layout.second_moment, layout.has_residual(), self.previous.is_some()];
        let vectors = 4 + optional.into_iter().map(usize::from).sum::<usize>();
        let chunk = self.base.plan().chunk_parameters() as usize;
        let sent = self.rounding.encoding().map_or(0, |encoding| encoding.codec().encoded_bytes(chunk));
        let payloads = self.shares.iter().map(|share| share.encoding().codec().encoded_bytes(chunk));
        let payload = payloads.max().unwrap_or_default();
        let read = match self.combination {
            Combination::WeightedMean { .. } => self.shares.len().min(GROUP_DELTAS) * payload,
            Combination::TrimmedMean(_) => Gather::bytes(&self.shares, chunk, self.tile_parameters),
        };
        vectors * size_of::<f32>() * chunk + sent + read
    }

    /// Reads, averages, steps, rounds and writes the model's chunk `index`; or writes it as the base has it, if the
    /// round does not synchronise it.
    pub(super) fn fold(
        &self,
        index: u32,
        scratch: &mut Scratch,
        new: &NewVersion,
    ) -> Result<FoldedChunk, ReduceError> {
        self.read(index, scratch)?;
        match self.fragment.position(index) {
            Some(position) => self.average(index, position, scratch, new),
            None => self.carry(index, scratch, new),
        }
    }

    /// Reads what the base has of chunk `index`.
    fn read(&self, index: u32, scratch: &mut Scratch) -> Result<(), ReduceError> {
        scratch.resize(self.base.plan().length(index).map_err(ModelError::from)?, self);
        self.base.read_parameters(index, &mut scratch.base)?;
        if !scratch.momentum.is_empty() {
            self.base.read_momentum(index, &mut scratch.momentum)?;
        }
        if !scratch.second_moment.is_empty() {
            match outer::initial_second_moment(&self.optimizer).filter(|_| self.base.version() == 0) {
                Some(initial) => scratch.second_moment.fill(initial),
                None => self.base.read_second_moment(index, &mut scratch.second_moment)?,
            }
        }
        if !scratch.residual.is_empty() {
            self.base.read_residual(index, &mut scratch.residual)?;
        }
        if let Some(previous) = &self.previous {
            previous.read_parameters(index, &mut scratch.previous)?;
        }
        Ok(())
    }

    /// Writes chunk `index` as it is: nothing of it changes, and what an update says of it is zero.
    fn carry(&self, index: u32, scratch: &mut Scratch, new: &NewVersion) -> Result<FoldedChunk, ReduceError> {
        let update = self.base.layout().update_of(new.version()).is_some();
        let Scratch { parameters, base, momentum, previous, sent, .. } = scratch;
        if let Some(codec) = self.rounding.encoding().map(Encoding::codec) {
            parameters.fill(0.0);
            codec.encode(if update { &parameters[..] } else { &base[..] }, sent);
        }
        parameters.copy_from_slice(base);
        let pieces = self.pieces(index)?;
        let mut lanes: Vec<Lanes> = pieces.iter().map(|_| Lanes::default()).collect();
        for (at, lanes) in within(&pieces, &mut lanes, 0..base.len()) {
            let momentum = momentum.get(at.clone()).unwrap_or_default();
            let previous = previous.get(at.clone()).unwrap_or_default();
            lanes.add(&parameters[at.clone()], &base[at], momentum, previous);
        }
        Ok(FoldedChunk {
            record: new.write(index, scratch.new_chunk(update))?,
            digests: Box::default(),
            squares: Box::default(),
            sums: sums(&pieces, &lanes),
        })
    }

    /// What of each tensor lies in chunk `index`.
    fn pieces(&self, index: u32) -> Result<Vec<Piece>, ReduceError> {
        Ok(self.tensors.pieces(self.base.plan().range(index).map_err(ModelError::from)?))
    }

    /// Averages chunk `index` of the model, which is chunk `position` of the deltas, and writes what the outer step
    /// makes of it.
    fn average(
        &self,
        index: u32,
        position: u32,
        scratch: &mut Scratch,
        new: &NewVersion,
    ) -> Result<FoldedChunk, ReduceError> {
        let length = scratch.base.len();
        let (digests, delta_squares) = self.combine(position, scratch)?;
        let pieces = self.pieces(index)?;
        let mut lanes: Vec<Lanes> = pieces.iter().map(|_| Lanes::default()).collect();
        let mut tiles = (0..length).step_by(self.tile_parameters);
        let stepped = tiles.try_for_each(|begin| {
            let end = (begin + self.tile_parameters).min(length);
            self.step(scratch, begin..end, &pieces, &mut lanes)
        });

        // One value that is not finite makes a sum of squares so.
        let sums = sums(&pieces, &lanes);
        if !sums.iter().all(|(_, sums)| sums.delta_squares.is_finite()) {
            self.find_not_finite(position, scratch)?;
        }
        stepped.map_err(|at| self.not_finite(index, at))?;
        // Momentum takes the parameters with it.
        if !sums.iter().all(|(_, sums)| sums.update_squares.is_finite()) {
            let at = scratch.parameters.iter().position(|value| !value.is_finite());
            return Err(self.not_finite(index, at.unwrap_or_default()));
        }
        // A second moment that overflowed would stay so, and its parameter where it is.
        if let Some(at) = scratch.second_moment.iter().position(|value| !value.is_finite()) {
            return Err(self.not_finite(index, at));
        }
        let chunk = scratch.new_chunk(self.base.layout().update_of(new.version()).is_some());
        Ok(FoldedChunk {
            record: new.write(index, chunk)?,
            digests: digests.into(),
            squares: delta_squares.into(),
            sums,
        })
    }

    /// Reads the chunk of each delta and makes their sums or trimmed means of them; gives the payloads' digests
    /// and what [`FoldedChunk::squares`] holds.
    fn combine(
        &self,
        index: u32,
        scratch: &mut Scratch,
    ) -> Result<(Vec<Digest>, Vec<Option<f64>>), ReduceError> {
        match &self.combination {
            Combination::WeightedMean { total_weight } => {
                let mut digests = Vec::with_capacity(self.shares.len());
                let mut squares = Vec::with_capacity(self.shares.len());
                for group in self.shares.chunks(GROUP_DELTAS) {
                    let found = self.accumulate(index, group, *total_weight, scratch, &mut digests)?;
                    squares.extend(&found[..group.len()]);
                }
                Ok((digests, squares))
            }
            Combination::TrimmedMean(trimmed) => {
                let Scratch { gather, keys, sums, .. } = scratch;
                let mut squares = vec![0.0; self.shares.len()];
                let digests =
                    gather.tiles(&self.shares, index, sums.len(), self.tile_parameters, |begin, rows| {
                        for (square, row) in squares.iter_mut().zip(rows) {
                            *square += survey::square(row);
                        }
                        trimmed.combine(rows, keys, &mut sums[begin..begin + rows[0].len()]);
                    })?;
                Ok((digests, squares.into_iter().map(Some).collect()))
            }
        }
    }

    /// Reads chunk `index` of each delta of a group and adds them to the sums; adds the digests of what was added
    /// to `digests`. Gives the sum of the squares of each delta's values, if they were decoded.
    fn accumulate(
        &self,
        index: u32,
        group: &[Share],
        total_weight: f64,
        scratch: &mut Scratch,
        digests: &mut Vec<Digest>,
    ) -> Result<[Option<f64>; GROUP_DELTAS], ReduceError> {
        let is_first = digests.is_empty();
        let Scratch { payloads, sums, decoded, .. } = scratch;
        for (share, payload) in group.iter().zip(&mut *payloads) {
            let digest = share.delta.read(index, payload);
            digests.push(digest.map_err(|error| damaged(share.delta.key(), index, error))?);
        }
        let all_are = |encoding| group.iter().all(|share| share.encoding() == encoding);
        let (all_fp32, all_bf16) = (all_are(Encoding::Fp32), all_are(Encoding::Bf16));
        let mut squares = [0.0; GROUP_DELTAS];
        for (at, sums) in sums.chunks_mut(self.tile_parameters).enumerate() {
            let (begin, length) = (at * self.tile_parameters, sums.len());
            if is_first {
                sums.fill(0.0);
            }
            let weights = group.iter().map(|share| share.weight / total_weight);
            // Tiles begin at multiples of the encoding's block.
            let tiles = group.iter().zip(&*payloads).map(|(share, payload)| {
                let codec = share.encoding().codec();
                &payload[codec.encoded_bytes(begin)..][..codec.encoded_bytes(length)]
            });
            // The encodings that take most to read are added without a decoded copy.
            if all_fp32 {
                kernel::accumulate(sums, weights.zip(tiles.map(|tile| tile.as_chunks::<4>().0)));
            } else if all_bf16 {
                kernel::accumulate(sums, weights.zip(tiles.map(|tile| tile.as_chunks::<2>().0)));
            } else {
                let decoding = group.iter().zip(tiles).zip(&mut *decoded).zip(&mut squares);
                for (((share, tile), decoded), square) in decoding {
                    let result = share.encoding().codec().decode(tile, &mut decoded[..length]);
                    result.map_err(|error| damaged(share.delta.key(), index, error.after(begin)))?;
                    *square += survey::square(&decoded[..length]);
                }
                kernel::accumulate(sums, weights.zip(decoded.iter().map(|decoded| &decoded[..length])));
            }
        }
        Ok(squares.map(|square| (!all_fp32 && !all_bf16).then_some(square)))
    }

    /// The error of the first delta that has a value that is not finite.
    fn find_not_finite(&self, index: u32, scratch: &mut Scratch) -> Result<(), ReduceError> {
        for share in &self.shares {
            let (key, payload) = (share.delta.key(), &mut scratch.payloads[0]);
            share.delta.read(index, payload).map_err(|error| damaged(key, index, error))?;
            let decoded = share.encoding().codec().decode(payload, &mut scratch.parameters);
            decoded.map_err(|error| damaged(key, index, error))?;
        }
        Ok(())
    }

    /// Takes a tile from its sums to what the sites will hold; the error is the position of a value in the
    /// chunk that is not finite.
    fn step(
        &self,
        scratch: &mut Scratch,
        tile: Range<usize>,
        pieces: &[Piece],
        lanes: &mut [Lanes],
    ) -> Result<(), usize> {
        let (begin, end) = (tile.start, tile.end);
        let Scratch {
            sums, base, momentum, second_moment, residual, parameters, previous, sent, delta, ..
        } = scratch;
        let delta = &mut delta[..end - begin];
        let sums = &mut sums[begin..end];
        let base = &base[begin..end];
        let parameters = &mut parameters[begin..end];
        let previous = previous.get(begin..end).unwrap_or_default();
        let momentum = momentum.get_mut(begin..end).unwrap_or_default();
        let moments = Moments {
            momentum: &mut *momentum,
            second: second_moment.get_mut(begin..end).unwrap_or_default(),
        };
        let residual = residual.get_mut(begin..end).unwrap_or_default();
        for (at, lanes) in within(pieces, lanes, tile.clone()) {
            kernel::round(&sums[at.clone()], &mut delta[at], &mut lanes.delta);
        }
        if residual.is_empty() {
            outer::step(&self.optimizer, delta, base, parameters, moments);
        } else {
            let start = sums; // The mean is taken; its place is free.
            broadcast::add_residual(base, residual, self.residual_decay, start);
            outer::step(&self.optimizer, delta, start, parameters, moments);
        }
        let sent = match self.rounding.encoding().map(Encoding::codec) {
            Some(codec) => {
                let begin_bytes = codec.encoded_bytes(begin);
                &mut sent[begin_bytes..begin_bytes + codec.encoded_bytes(end - begin)]
            }
            None => &mut [],
        };
        if self.rounding.apply(base, parameters, residual, sent).is_err() {
            let at = parameters.iter().position(|value| !value.is_finite());
            return Err(begin + at.unwrap_or_default());
        }
        for (at, lanes) in within(pieces, lanes, tile) {
            let momentum = momentum.get(at.clone()).unwrap_or_default();
            let previous = previous.get(at.clone()).unwrap_or_default();
            lanes.add(&parameters[at.clone()], &base[at], momentum, previous);
        }
        Ok(())
    }

    fn not_finite(&self, index: u32, position: usize) -> ReduceError {
        let start = self.base.plan().range(index).map_or(0, |range| range.start);
        ReduceError::NotFinite { version: self.base.version() + 1, parameter: start + position as u64 }
    }
}

/// The sums of each piece, with the tensor that it is of.
fn sums(pieces: &[Piece], lanes: &[Lanes]) -> Box<[(usize, Sums)]> {
    pieces.iter().zip(lanes).map(|(piece, lanes)| (piece.tensor, lanes.sums())).collect()
}

impl Scratch {
    fn resize(&mut self, length: usize, inputs: &Inputs) {
        let layout = inputs.base.layout();
        self.sums.resize(length);
        self.base.resize(length);
        self.parameters.resize(length);
        let optional = |there: bool| if there { length } else { 0 };
        self.momentum.resize(optional(layout.momentum));
        self.second_moment.resize(optional(layout.second_moment));
        self.residual.resize(optional(layout.has_residual()));
        self.previous.resize(optional(inputs.previous.is_some()));
        self.decoded.iter_mut().for_each(|decoded| decoded.resize(inputs.tile_parameters));
        self.delta.resize(inputs.tile_parameters);
        let sent = inputs.rounding.encoding();
        self.sent.resize(sent.map_or(0, |encoding| encoding.codec().encoded_bytes(length)));
    }

    fn new_chunk(&self, update: bool) -> NewChunk<'_> {
        let Self { parameters, momentum, second_moment, residual, sent, .. } = self;
        let (whole_payload, update_payload) =
            if update { (&[][..], &sent[..]) } else { (&sent[..], &[][..]) };
        NewChunk { parameters, momentum, second_moment, residual, whole_payload, update_payload }
    }
}
