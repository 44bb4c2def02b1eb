//! How a delta's chunks are cut and what is stored with each.
//!
//! A chunk is stored with an entry of 64 bytes, little-endian: `magic` u32, `index` u32, `length` u64, XXH3-64
//! of the payload u64, XXH3-64 of the entry's other bytes u64, BLAKE3 of the payload 32 bytes. An entry whose
//! checksums do not fit is a chunk that was never stored whole: no order of writes needs to be kept.
//!
//! In a file the entries are a table, padded with zeros to a multiple of 4096 bytes, and the payloads follow
//! at fixed distances. An object is one entry and its payload.
//!
//! BLAKE3 says what a chunk is, and is checked when the chunk comes; the checksum, several times as fast,
//! finds what a disk has done to it, whenever it is read.

use consort_common::{chunk::ChunkPlan, codec::Encoding, ids::Digest};
use twox_hash::XxHash3_64;

/// Bytes of one entry.
pub(super) const ENTRY_BYTES: usize = 64;
/// Payloads in a file begin at a multiple of this.
const ALIGNMENT: u64 = 4096;
/// Begins every entry: "chnk".
const MAGIC: u32 = u32::from_le_bytes(*b"chnk");

/// How long a delta's chunks are, and where they lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeltaLayout {
    plan: ChunkPlan,
    encoding: Encoding,
}

impl DeltaLayout {
    /// Of a delta that is cut by `plan` and encoded with `encoding`.
    pub fn new(plan: ChunkPlan, encoding: Encoding) -> Self {
        Self { plan, encoding }
    }

    /// How the delta is cut.
    pub fn plan(&self) -> ChunkPlan {
        self.plan
    }

    /// Number of chunks.
    pub fn chunks(&self) -> u32 {
        self.plan.chunks()
    }

    /// How the chunks are encoded.
    pub fn encoding(&self) -> Encoding {
        self.encoding
    }

    /// Bytes of a chunk's payload; none if there is no such chunk.
    pub fn payload_bytes(&self, index: u32) -> Option<usize> {
        let length = self.plan.length(index).ok()?;
        Some(self.encoding.codec().encoded_bytes(length))
    }

    /// Bytes of all payloads.
    pub fn delta_bytes(&self) -> u64 {
        let last = self.chunks().saturating_sub(1);
        u64::from(last) * self.stride() + self.payload_bytes(last).unwrap_or_default() as u64
    }

    /// Bytes of the delta as a file.
    pub fn file_bytes(&self) -> u64 {
        self.payload_offset(0) + self.delta_bytes()
    }

    /// Bytes of the delta as objects, one per chunk.
    pub fn objects_bytes(&self) -> u64 {
        Self::entry_offset(self.chunks()) + self.delta_bytes()
    }

    fn stride(&self) -> u64 {
        self.encoding.codec().encoded_bytes(self.plan.chunk_parameters() as usize) as u64
    }

    pub(super) fn entry_offset(index: u32) -> u64 {
        u64::from(index) * ENTRY_BYTES as u64
    }

    pub(super) fn payload_offset(&self, index: u32) -> u64 {
        Self::entry_offset(self.chunks()).next_multiple_of(ALIGNMENT) + u64::from(index) * self.stride()
    }
}

/// What is stored with a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) digest: Digest,
    pub(super) checksum: u64,
}

impl Entry {
    pub(super) fn of(payload: &[u8], digest: Digest) -> Self {
        Self { digest, checksum: XxHash3_64::oneshot(payload) }
    }

    pub(super) fn to_bytes(self, index: u32, length: usize) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        bytes[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[4..8].copy_from_slice(&index.to_le_bytes());
        bytes[8..16].copy_from_slice(&(length as u64).to_le_bytes());
        bytes[16..24].copy_from_slice(&self.checksum.to_le_bytes());
        bytes[32..64].copy_from_slice(self.digest.as_bytes());
        let checksum = XxHash3_64::oneshot(&bytes);
        bytes[24..32].copy_from_slice(&checksum.to_le_bytes());
        bytes
    }

    /// None unless these are the bytes of the entry of that chunk.
    pub(super) fn from_bytes(bytes: &[u8], index: u32, length: usize) -> Option<Self> {
        let digest = Digest::try_from(bytes.get(32..64)?).ok()?;
        let checksum = u64::from_le_bytes(*bytes.get(16..24)?.first_chunk()?);
        let entry = Self { digest, checksum };
        (entry.to_bytes(index, length) == bytes).then_some(entry)
    }
}
