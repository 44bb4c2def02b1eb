//! The same values of all deltas beside each other, for rules that compare what sites send.
//!
//! Of each delta a whole chunk is read and verified, and a piece of it kept, as it is encoded, until the same
//! piece of all others is there; then they are decoded together, tile by tile. Pieces are as long as
//! [`PIECES_BYTES_MAX`] allows. Memory on a core: that, one payload, and a tile of each delta, whatever the
//! model's size; the distances of Krum come on top (see `survey`). Beyond 32 deltas in fp32 with the default chunk, a
//! chunk has several pieces, for each of which it is read and verified again: reading is far from what such rules
//! cost, but where the spool is an object store, each reading is a request.

use consort_common::ids::Digest;

use super::{ReduceError, Share, damaged};
use crate::aligned::AlignedVec;

/// Most that the pieces of all deltas take on a core, but for one tile of each.
const PIECES_BYTES_MAX: usize = 32 << 20;

/// One core's vectors, kept from chunk to chunk.
#[derive(Debug, Default)]
pub(super) struct Gather {
    payload: AlignedVec<u8>,
    /// Of each delta.
    pieces: Vec<AlignedVec<u8>>,
    /// A tile of each delta, one after the other.
    rows: AlignedVec<f32>,
}

impl Gather {
    /// Bytes of the vectors, about.
    pub(super) fn bytes(shares: &[Share], chunk_parameters: usize, tile_parameters: usize) -> usize {
        let most = |parameters| {
            let bytes = shares.iter().map(|share| share.encoding().codec().encoded_bytes(parameters));
            bytes.max().unwrap_or_default()
        };
        let piece = piece_parameters(shares, chunk_parameters, tile_parameters);
        let rows = tile_parameters * size_of::<f32>();
        most(chunk_parameters) + shares.len() * (most(piece) + rows)
    }

    /// Calls `work` with each tile of chunk `index`, which has `length` values, in order: its position in the chunk
    /// and the values of each delta there, in the order of the shares. Returns the digests of the deltas' payloads.
    ///
    /// # Errors
    /// The first delta's that cannot be read, is damaged, or has a value that is not finite.
    pub(super) fn tiles(
        &mut self,
        shares: &[Share],
        index: u32,
        length: usize,
        tile_parameters: usize,
        mut work: impl FnMut(usize, &[&[f32]]),
    ) -> Result<Vec<Digest>, ReduceError> {
        let Self { payload, pieces, rows } = self;
        pieces.resize_with(shares.len(), AlignedVec::default);
        let piece = piece_parameters(shares, length, tile_parameters);
        let mut digests = Vec::with_capacity(shares.len());
        for begin in (0..length).step_by(piece) {
            let end = (begin + piece).min(length);
            for (share, kept) in shares.iter().zip(&mut *pieces) {
                let digest = share.delta.read(index, payload);
                let digest = digest.map_err(|error| damaged(share.delta.key(), index, error))?;
                if begin == 0 {
                    digests.push(digest);
                }
                // Pieces and tiles begin at multiples of the encoding's block.
                let codec = share.encoding().codec();
                let (at, bytes) = (codec.encoded_bytes(begin), codec.encoded_bytes(end - begin));
                kept.resize(bytes);
                kept.copy_from_slice(&payload[at..at + bytes]);
            }
            for tile in (begin..end).step_by(tile_parameters) {
                let count = tile_parameters.min(end - tile);
                rows.resize(shares.len() * count);
                for ((share, kept), row) in shares.iter().zip(&*pieces).zip(rows.chunks_mut(count)) {
                    let codec = share.encoding().codec();
                    let at = codec.encoded_bytes(tile - begin);
                    let decoded = codec.decode(&kept[at..at + codec.encoded_bytes(count)], row);
                    decoded.map_err(|error| damaged(share.delta.key(), index, error.after(tile)))?;
                }
                work(tile, &rows.chunks(count).collect::<Vec<_>>());
            }
        }
        Ok(digests)
    }
}

/// Values of a piece: whole tiles, at least one.
fn piece_parameters(shares: &[Share], length: usize, tile_parameters: usize) -> usize {
    let tile = shares.iter().map(|share| share.encoding().codec().encoded_bytes(tile_parameters));
    let tiles = PIECES_BYTES_MAX / tile.sum::<usize>().max(1);
    (tiles.max(1) * tile_parameters).min(length.next_multiple_of(tile_parameters))
}
