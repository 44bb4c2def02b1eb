//! One delta as a file of its own: a table of entries, then a place for every chunk (see `layout`).

use std::{fs::File, io, os::unix::fs::FileExt};

use twox_hash::XxHash3_64;

use super::{
    chunks::Chunk,
    layout::{DeltaLayout, ENTRY_BYTES, Entry},
};

#[derive(Debug)]
pub(super) struct DeltaFile(File);

impl DeltaFile {
    /// Takes up what the file holds: each chunk is verified, and made durable once more, since the process
    /// that wrote it may have died before it had done so.
    pub(super) fn open(file: File, layout: DeltaLayout) -> io::Result<(Self, Vec<Chunk>)> {
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
        Ok((Self(file), chunks))
    }

    /// Writes both parts of a chunk; until both are there it is neither the old chunk nor the new one.
    pub(super) fn write(
        &self,
        layout: DeltaLayout,
        index: u32,
        entry: Entry,
        payload: &[u8],
    ) -> io::Result<()> {
        self.0.write_all_at(payload, layout.payload_offset(index))?;
        self.0.write_all_at(&entry.to_bytes(index, payload.len()), DeltaLayout::entry_offset(index))
    }

    /// Makes durable what was written before the call.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.0.sync_data()
    }

    pub(super) fn read(&self, layout: DeltaLayout, index: u32, payload: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(payload, layout.payload_offset(index))
    }
}

#[allow(clippy::cast_possible_truncation)] // a table of at most CHUNKS_MAX entries
fn usize_of(bytes: u64) -> usize {
    bytes as usize
}
