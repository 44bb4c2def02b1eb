//! One delta in the spool: a file with a table and a place for every chunk.
//!
//! Layout: a table of one 64-byte entry per chunk, padded with zeros to a multiple of 4096 bytes, then the
//! payloads at fixed distances. An entry, little-endian: `magic` u32, `index` u32, `length` u64, XXH3-64 of
//! the payload u64, XXH3-64 of the entry's other bytes u64, BLAKE3 of the payload 32 bytes. An entry whose
//! checksums do not fit is a chunk that was never stored whole: no order of writes needs to be kept.
//!
//! BLAKE3 says what a chunk is, and is checked when the chunk comes; the checksum, several times as fast,
//! finds what a disk has done to it, whenever it is read.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{Mutex, MutexGuard, PoisonError},
};

use consort_common::{chunk::ChunkPlan, codec::Encoding, ids::Digest};
use twox_hash::XxHash3_64;

use super::{Bound, ContributionKey, DeltaSummary, SpoolError, is_full};

/// Bytes of one entry of the table.
const ENTRY_BYTES: usize = 64;
/// Payloads begin at a multiple of this.
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

    /// Bytes of the file.
    pub fn file_bytes(&self) -> u64 {
        self.payload_offset(0) + self.delta_bytes()
    }

    fn stride(&self) -> u64 {
        self.encoding.codec().encoded_bytes(self.plan.chunk_parameters() as usize) as u64
    }

    fn entry_offset(index: u32) -> u64 {
        u64::from(index) * ENTRY_BYTES as u64
    }

    fn payload_offset(&self, index: u32) -> u64 {
        Self::entry_offset(self.chunks()).next_multiple_of(ALIGNMENT) + u64::from(index) * self.stride()
    }
}

/// What is known of one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Chunk {
    /// Not there, or damaged.
    Missing,
    /// Written; a power failure could still take it.
    Written(Entry),
    /// There for good.
    Durable(Entry),
}

/// A chunk's entry in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    digest: Digest,
    checksum: u64,
}

impl Entry {
    fn of(payload: &[u8], digest: Digest) -> Self {
        Self { digest, checksum: XxHash3_64::oneshot(payload) }
    }

    fn to_bytes(self, index: u32, length: usize) -> [u8; ENTRY_BYTES] {
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
    fn from_bytes(bytes: &[u8], index: u32, length: usize) -> Option<Self> {
        let digest = Digest::try_from(bytes.get(32..64)?).ok()?;
        let checksum = u64::from_le_bytes(*bytes.get(16..24)?.first_chunk()?);
        let entry = Self { digest, checksum };
        (entry.to_bytes(index, length) == bytes).then_some(entry)
    }
}

/// A delta that is being received, or waits to be averaged. Several threads may use it at a time.
#[derive(Debug)]
pub struct SpooledDelta {
    key: ContributionKey,
    layout: DeltaLayout,
    file: File,
    state: Mutex<State>,
    /// Held while a chunk's two parts are written, so that they belong together.
    writer: Mutex<()>,
}

#[derive(Debug)]
struct State {
    chunks: Vec<Chunk>,
    /// Written since the last sync.
    unsynced: Vec<u32>,
    /// Whether the delta is accepted: it does not change any more.
    sealed: bool,
}

impl SpooledDelta {
    /// Takes up what the file holds: each chunk is verified, and made durable once more, since the process
    /// that wrote it may have died before it had done so.
    pub(super) fn open(key: ContributionKey, layout: DeltaLayout, file: File) -> Result<Self, SpoolError> {
        let mut table = vec![0; usize_of(DeltaLayout::entry_offset(layout.chunks()))];
        file.read_exact_at(&mut table, 0)?;
        let mut payload = Vec::new();
        let mut chunks = Vec::with_capacity(layout.chunks() as usize);
        for (index, bytes) in (0..).zip(table.chunks_exact(ENTRY_BYTES)) {
            let length = layout.payload_bytes(index).unwrap_or_default();
            let chunk = Entry::from_bytes(bytes, index, length).filter(|entry| {
                payload.resize(length, 0);
                let read = file.read_exact_at(&mut payload, layout.payload_offset(index));
                read.is_ok() && XxHash3_64::oneshot(&payload) == entry.checksum
            });
            chunks.push(chunk.map_or(Chunk::Missing, Chunk::Durable));
        }
        if chunks.iter().any(|chunk| *chunk != Chunk::Missing) {
            file.sync_data()?;
        }
        let state = Mutex::new(State { chunks, unsynced: Vec::new(), sealed: false });
        Ok(Self { key, layout, file, state, writer: Mutex::new(()) })
    }

    /// Whose it is.
    pub fn key(&self) -> &ContributionKey {
        &self.key
    }

    /// How it is cut and encoded.
    pub fn layout(&self) -> DeltaLayout {
        self.layout
    }

    /// Indices of the chunks that are durable, ascending.
    pub fn held(&self) -> Vec<u32> {
        let state = self.state();
        let chunks = (0..).zip(&state.chunks);
        chunks.filter(|(_, chunk)| matches!(chunk, Chunk::Durable(_))).map(|(index, _)| index).collect()
    }

    /// Writes a chunk, whose digest the caller has compared with its payload. It is durable after the next
    /// [`SpooledDelta::sync`]. The same chunk again changes nothing; another payload replaces it.
    ///
    /// # Errors
    /// [`SpoolError::Sealed`], [`SpoolError::Full`] or the system's refusal. The chunk is not there then.
    ///
    /// # Panics
    /// If the chunk does not exist or the payload's length is not the layout's: callers have checked both.
    pub fn write(&self, index: u32, payload: &[u8], digest: Digest) -> Result<(), SpoolError> {
        assert_eq!(self.layout.payload_bytes(index), Some(payload.len()), "the length was checked");
        let entry = Entry::of(payload, digest);
        let _writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let mut state = self.state();
            if state.sealed {
                return Err(SpoolError::Sealed { key: Box::new(self.key.clone()) });
            }
            match state.chunks[index as usize] {
                Chunk::Durable(held) if held == entry => {
                    // Acknowledged with the next sync, as if it had been written.
                    state.unsynced.push(index);
                    return Ok(());
                }
                // Until both parts are written it is neither the old chunk nor the new one.
                _ => state.chunks[index as usize] = Chunk::Missing,
            }
        }
        let table_entry = entry.to_bytes(index, payload.len());
        self.file
            .write_all_at(payload, self.layout.payload_offset(index))
            .and_then(|()| self.file.write_all_at(&table_entry, DeltaLayout::entry_offset(index)))
            .map_err(|error| self.failed(error))?;
        let mut state = self.state();
        state.chunks[index as usize] = Chunk::Written(entry);
        state.unsynced.push(index);
        Ok(())
    }

    /// Makes what was written before the call durable, and says which chunks of those that are `wanted` that
    /// were. One call covers all of them: the faster chunks come, the more share one wait for the disk.
    ///
    /// # Errors
    /// The system's refusal. What was not durable is then lost, also where it can still be read: the
    /// system does not say which pages it dropped.
    pub fn sync(&self, wanted: impl Fn(u32) -> bool) -> Result<Vec<u32>, SpoolError> {
        // Others are left to those who will acknowledge them.
        let synced: Vec<u32> = self.state().unsynced.extract_if(.., |index| wanted(*index)).collect();
        if synced.is_empty() {
            return Ok(synced);
        }
        let result = self.file.sync_data();
        let mut state = self.state();
        for index in &synced {
            let chunk = &mut state.chunks[*index as usize];
            *chunk = match (*chunk, &result) {
                (Chunk::Written(entry), Ok(())) => Chunk::Durable(entry),
                (Chunk::Written(_), Err(_)) => Chunk::Missing,
                (other, _) => other,
            };
        }
        result.map(|()| synced).map_err(|error| self.failed(error))
    }

    /// The delta does not change any more: it is about to be accepted.
    pub fn seal(&self) {
        // A chunk that is being written is written first.
        let _writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        self.state().sealed = true;
    }

    /// The delta was not accepted after all.
    pub fn unseal(&self) {
        self.state().sealed = false;
    }

    /// Reads a chunk's payload into `payload`, replacing what that holds, and returns its digest.
    ///
    /// # Errors
    /// [`SpoolError::Missing`], or [`SpoolError::Corrupt`] if it is not what was stored.
    pub fn read(&self, index: u32, payload: &mut Vec<u8>) -> Result<Digest, SpoolError> {
        let entry = self.entry(index)?;
        payload.resize(self.layout.payload_bytes(index).unwrap_or_default(), 0);
        self.file
            .read_exact_at(payload, self.layout.payload_offset(index))
            .map_err(|error| self.corrupt(index, format!("it cannot be read: {error}")))?;
        if XxHash3_64::oneshot(payload) == entry.checksum {
            return Ok(entry.digest);
        }
        Err(self.corrupt(index, format!("its {} bytes do not have their checksum", payload.len())))
    }

    /// What identifies the delta, and its size.
    ///
    /// # Errors
    /// [`SpoolError::Missing`] if a chunk is not durable.
    pub fn summary(&self) -> Result<DeltaSummary, SpoolError> {
        let mut hasher = blake3::Hasher::new();
        for index in 0..self.layout.chunks() {
            hasher.update(self.entry(index)?.digest.as_bytes());
        }
        Ok(DeltaSummary { digest: hasher.finalize().into(), bytes: self.layout.delta_bytes() })
    }

    /// The entry of a chunk that is durable.
    fn entry(&self, index: u32) -> Result<Entry, SpoolError> {
        match self.state().chunks.get(index as usize) {
            Some(Chunk::Durable(entry)) => Ok(*entry),
            _ => Err(SpoolError::Missing { key: Box::new(self.key.clone()), index }),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn corrupt(&self, index: u32, reason: String) -> SpoolError {
        SpoolError::Corrupt { key: Box::new(self.key.clone()), index, reason }
    }

    fn failed(&self, error: io::Error) -> SpoolError {
        if is_full(&error) {
            // Where the system could not reserve the space beforehand.
            let bound = Bound::Disk { available_bytes: 0, reserve_bytes: 0 };
            return SpoolError::Full { key: Box::new(self.key.clone()), bound };
        }
        error.into()
    }
}

#[allow(clippy::cast_possible_truncation)] // a table of at most CHUNKS_MAX entries
fn usize_of(bytes: u64) -> usize {
    bytes as usize
}
