//! One chunk of a reduction.
//!
//! Each delta's payload is read whole and verified, into a vector that stays in the cache, and added to the
//! chunk's sums; decoding goes tile by tile, so that decoded values do not leave a core's first cache. Then
//! each tile of the sums goes through the outer step and the rounding, and the chunk is written.
//!
//! Sketch, for a chunk of 2^18 values in fp32: a MiB per delta comes from memory through the copy of a read
//! system call, at 12 to 19 GB/s per core; the checksum reads it from the cache at 50 GB/s, adding it at 25.
//! Once per chunk come reading the base, hashing the new version at 6 GB/s and copying it into the page cache
//! at 4. Reading several payloads before they are added together, with fewer passes over the sums, was no
//! faster.

use consort_common::{codec::Encoding, ids::Digest, spec::OuterOptimizer};

use super::{
    ReduceError, Share,
    broadcast::{self, Rounding},
    damaged, kernel,
    outer::{self, Moments},
    statistics::Sums,
};
use crate::models::{ChunkRecord, ModelError, ModelVersion, NewChunk, NewVersion};

/// Values of a tile where all encodings allow it: its sums, decoded values and payload, 16 KiB, fit a core's
/// first cache.
const TILE_PARAMETERS_MIN: usize = 1024;
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
    /// Sum of the weights, in canonical order.
    total_weight: f64,
    /// Values that are worked on at a time: a multiple of every encoding's block.
    tile_parameters: usize,
}

/// One core's vectors, kept from chunk to chunk. Those without a word have the chunk's length, or none.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    /// Of one delta.
    payload: Vec<u8>,
    sums: Vec<f64>,
    base: Vec<f32>,
    momentum: Vec<f32>,
    second_moment: Vec<f32>,
    residual: Vec<f32>,
    parameters: Vec<f32>,
    /// Of the version before the base.
    previous: Vec<f32>,
    /// What the new version's form sends.
    sent: Vec<u8>,
    /// A tile of one delta.
    decoded: Vec<f32>,
    /// A tile of their mean.
    delta: Vec<f32>,
}

/// What is kept of a folded chunk.
#[derive(Debug)]
pub(super) struct FoldedChunk {
    pub(super) record: ChunkRecord,
    /// Of the payloads that went in, in canonical order.
    pub(super) digests: Box<[Digest]>,
    pub(super) delta_square: f64,
    pub(super) update_square: f64,
    pub(super) sums: Sums,
}

/// Two sums of squares that grow tile by tile.
#[derive(Default)]
struct Squares {
    delta: [f64; kernel::LANES],
    update: [f64; kernel::LANES],
}

impl Inputs {
    pub(super) fn new(
        shares: Vec<Share>,
        base: ModelVersion,
        previous: Option<ModelVersion>,
        optimizer: OuterOptimizer,
    ) -> Self {
        let form = base.layout().encoding;
        let encodings = shares.iter().map(Share::encoding).chain(Rounding::new(form).encoding());
        let blocks = encodings.map(|encoding| encoding.codec().block_parameters());
        Self {
            // All are powers of two.
            tile_parameters: blocks.fold(TILE_PARAMETERS_MIN, usize::max),
            total_weight: shares.iter().map(|share| share.weight).sum(),
            rounding: Rounding::new(form),
            residual_decay: form.residual_decay().unwrap_or_default(),
            shares,
            base,
            previous,
            optimizer,
        }
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
        vectors * size_of::<f32>() * chunk + sent + payloads.max().unwrap_or_default()
    }

    /// Reads, averages, steps, rounds and writes chunk `index`.
    pub(super) fn fold(
        &self,
        index: u32,
        scratch: &mut Scratch,
        new: &NewVersion,
    ) -> Result<FoldedChunk, ReduceError> {
        let length = self.base.plan().length(index).map_err(ModelError::from)?;
        scratch.resize(length, self);
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

        scratch.sums.fill(0.0);
        let digests = self.shares.iter().map(|share| self.accumulate(index, share, scratch));
        let digests = digests.collect::<Result<_, _>>()?;
        let mut squares = Squares::default();
        for begin in (0..length).step_by(self.tile_parameters) {
            let end = (begin + self.tile_parameters).min(length);
            self.step(scratch, begin, end, &mut squares).map_err(|at| self.not_finite(index, at))?;
        }

        let update_square = squares.update.iter().sum::<f64>();
        // One value that is not finite makes the sum so. Momentum takes the parameters with it.
        if !update_square.is_finite() {
            let at = scratch.parameters.iter().position(|value| !value.is_finite());
            return Err(self.not_finite(index, at.unwrap_or_default()));
        }
        // A second moment that overflowed would stay so, and its parameter where it is.
        if let Some(at) = scratch.second_moment.iter().position(|value| !value.is_finite()) {
            return Err(self.not_finite(index, at));
        }
        let Scratch { parameters, base, momentum, previous, .. } = &*scratch;
        let sums = Sums::of_chunk(parameters, base, momentum, previous);
        let chunk = scratch.new_chunk(self.base.layout().update_of(new.version()).is_some());
        Ok(FoldedChunk {
            record: new.write(index, chunk)?,
            digests,
            delta_square: squares.delta.iter().sum(),
            update_square,
            sums,
        })
    }

    /// Reads a delta's chunk and adds it to the sums; gives the digest of what was added.
    fn accumulate(&self, index: u32, share: &Share, scratch: &mut Scratch) -> Result<Digest, ReduceError> {
        let Scratch { payload, sums, decoded, .. } = scratch;
        let key = share.delta.key();
        let digest = share.delta.read(index, payload).map_err(|error| damaged(key, index, error))?;
        let weight = share.weight / self.total_weight;
        let codec = share.encoding().codec();
        // Tiles begin at multiples of the encoding's block.
        let tiles = payload.chunks(codec.encoded_bytes(self.tile_parameters));
        for (at, (tile, sums)) in tiles.zip(sums.chunks_mut(self.tile_parameters)).enumerate() {
            // The encodings that take most to read are added without a decoded copy.
            let largest = match share.encoding() {
                Encoding::Fp32 => kernel::accumulate_fp32(sums, weight, tile),
                Encoding::Bf16 => kernel::accumulate_bf16(sums, weight, tile),
                _ => kernel::INFINITY,
            };
            if largest >= kernel::INFINITY {
                let decoded = &mut decoded[..sums.len()];
                let result = codec.decode(tile, decoded);
                result.map_err(|error| damaged(key, index, error.after(at * self.tile_parameters)))?;
                kernel::accumulate(sums, weight, decoded);
            }
        }
        Ok(digest)
    }

    /// Takes a tile from its sums to what the sites will hold; the error is the position of a value in the
    /// chunk that is not finite.
    fn step(
        &self,
        scratch: &mut Scratch,
        begin: usize,
        end: usize,
        squares: &mut Squares,
    ) -> Result<(), usize> {
        let Scratch { sums, base, momentum, second_moment, residual, parameters, sent, delta, .. } = scratch;
        let delta = &mut delta[..end - begin];
        let sums = &mut sums[begin..end];
        let base = &base[begin..end];
        let parameters = &mut parameters[begin..end];
        let moments = Moments {
            momentum: momentum.get_mut(begin..end).unwrap_or_default(),
            second: second_moment.get_mut(begin..end).unwrap_or_default(),
        };
        let residual = residual.get_mut(begin..end).unwrap_or_default();
        kernel::round(sums, delta, &mut squares.delta);
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
        kernel::add_squares(&mut squares.update, parameters, base);
        Ok(())
    }

    fn not_finite(&self, index: u32, position: usize) -> ReduceError {
        let start = self.base.plan().range(index).map_or(0, |range| range.start);
        ReduceError::NotFinite { version: self.base.version() + 1, parameter: start + position as u64 }
    }
}

impl Scratch {
    fn resize(&mut self, length: usize, inputs: &Inputs) {
        let layout = inputs.base.layout();
        self.sums.resize(length, 0.0);
        self.base.resize(length, 0.0);
        self.parameters.resize(length, 0.0);
        let optional = |there: bool| if there { length } else { 0 };
        self.momentum.resize(optional(layout.momentum), 0.0);
        self.second_moment.resize(optional(layout.second_moment), 0.0);
        self.residual.resize(optional(layout.has_residual()), 0.0);
        self.previous.resize(optional(inputs.previous.is_some()), 0.0);
        self.decoded.resize(inputs.tile_parameters, 0.0);
        self.delta.resize(inputs.tile_parameters, 0.0);
        let sent = inputs.rounding.encoding();
        self.sent.resize(sent.map_or(0, |encoding| encoding.codec().encoded_bytes(length)), 0);
    }

    fn new_chunk(&self, update: bool) -> NewChunk<'_> {
        let Self { parameters, momentum, second_moment, residual, sent, .. } = self;
        let (whole_payload, update_payload) =
            if update { (&[][..], &sent[..]) } else { (&sent[..], &[][..]) };
        NewChunk { parameters, momentum, second_moment, residual, whole_payload, update_payload }
    }
}
