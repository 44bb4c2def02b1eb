//! One delta in the spool: which of its chunks are there, and the rules by which they come and stay.

use std::{
    io,
    sync::{Arc, Mutex, PoisonError},
};

use consort_common::ids::Digest;
use twox_hash::XxHash3_64;

use super::{
    ContributionKey, DeltaSummary, SpoolError,
    chunks::{Chunk, Progress},
    delta_file::DeltaFile,
    delta_objects::DeltaObjects,
    layout::{DeltaLayout, ENTRY_BYTES, Entry},
};
use crate::{aligned::AlignedVec, storage::Fault};

/// Where a delta's chunks are.
#[derive(Debug)]
pub(super) enum Medium {
    File(DeltaFile),
    Objects(DeltaObjects),
}

/// A delta that is being received, or waits to be averaged. Several threads may use it at a time.
#[derive(Debug)]
pub struct SpooledDelta {
    key: ContributionKey,
    layout: DeltaLayout,
    medium: Medium,
    progress: Arc<Progress>,
    /// Held while a chunk is written, so that its parts belong together.
    writer: Mutex<()>,
}

impl SpooledDelta {
    /// The delta of which `medium` holds `chunks`.
    pub(super) fn new(
        key: ContributionKey,
        layout: DeltaLayout,
        (medium, chunks): (Medium, Vec<Chunk>),
    ) -> Self {
        Self { key, layout, medium, progress: Arc::new(Progress::new(chunks)), writer: Mutex::new(()) }
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
        let state = self.progress.state();
        let chunks = (0..).zip(&state.chunks);
        chunks.filter(|(_, chunk)| matches!(chunk, Chunk::Durable(_))).map(|(index, _)| index).collect()
    }

    /// Writes a chunk, or sends it on its way to the object store; its digest the caller has compared with
    /// its payload. It is durable after the next [`SpooledDelta::sync`]. The same chunk again changes
    /// nothing; another payload replaces it.
    ///
    /// # Errors
    /// [`SpoolError::Sealed`], [`SpoolError::Full`], the system's refusal, or [`SpoolError::Missing`] if the
    /// delta was discarded. The chunk is not there then.
    ///
    /// # Panics
    /// If the chunk does not exist or the payload's length is not the layout's: callers have checked both.
    pub fn write(&self, index: u32, payload: &[u8], digest: Digest) -> Result<(), SpoolError> {
        assert_eq!(self.layout.payload_bytes(index), Some(payload.len()), "the length was checked");
        let entry = Entry::of(payload, digest);
        let _writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        {
            let on_its_way = |chunk| matches!(chunk, Chunk::Sent(_));
            let mut state = self.progress.state_after(|state| on_its_way(state.chunks[index as usize]));
            if state.sealed {
                return Err(SpoolError::Sealed { key: Box::new(self.key.clone()) });
            }
            if state.discarded {
                return Err(self.missing(index));
            }
            match state.chunks[index as usize] {
                Chunk::Durable(held) if held == entry => {
                    // Acknowledged with the next sync, as if it had been written.
                    state.unsynced.push(index);
                    return Ok(());
                }
                // Until it is written it is neither the old chunk nor the new one.
                _ => state.chunks[index as usize] = Chunk::Missing,
            }
        }
        match &self.medium {
            Medium::File(file) => {
                file.write(self.layout, index, entry, payload)
                    .map_err(|error| SpoolError::of_system(&self.key, error))?;
                self.progress.state().chunks[index as usize] = Chunk::Written(entry);
            }
            Medium::Objects(objects) => objects.send(&self.progress, index, entry, payload),
        }
        self.progress.state().unsynced.push(index);
        Ok(())
    }

    /// Makes what was written before the call durable, and says which chunks of those that are `wanted` that
    /// were. One call covers all of them: the faster chunks come, the more share one wait for the disk or
    /// the object store.
    ///
    /// # Errors
    /// The system's or the store's refusal. What of a file was not durable is then lost, also where it can
    /// still be read: the system does not say which pages it dropped. Objects that arrived are held.
    pub fn sync(&self, wanted: impl Fn(u32) -> bool) -> Result<Vec<u32>, SpoolError> {
        // Others are left to those who will acknowledge them.
        let covered: Vec<u32> =
            self.progress.state().unsynced.extract_if(.., |index| wanted(*index)).collect();
        if covered.is_empty() {
            return Ok(covered);
        }
        match &self.medium {
            Medium::File(file) => self.settle_written(&covered, file.sync())?,
            Medium::Objects(_) => self.wait_for_sent(&covered)?,
        }
        Ok(covered)
    }

    fn settle_written(&self, covered: &[u32], result: io::Result<()>) -> Result<(), SpoolError> {
        let mut state = self.progress.state();
        for index in covered {
            let chunk = &mut state.chunks[*index as usize];
            *chunk = match (*chunk, &result) {
                (Chunk::Written(entry), Ok(())) => Chunk::Durable(entry),
                (Chunk::Written(_), Err(_)) => Chunk::Missing,
                (other, _) => other,
            };
        }
        result.map_err(|error| SpoolError::of_system(&self.key, error))
    }

    fn wait_for_sent(&self, covered: &[u32]) -> Result<(), SpoolError> {
        let mut state = self.progress.state_after(|state| {
            covered.iter().any(|index| matches!(state.chunks[*index as usize], Chunk::Sent(_)))
        });
        let failures = covered.iter().filter_map(|index| state.failures.remove(index));
        if let Some(error) = failures.last() {
            return Err(SpoolError::of_storage(&self.key, error));
        }
        let durable = |index: &&u32| matches!(state.chunks[**index as usize], Chunk::Durable(_));
        match covered.iter().find(|index| !durable(index)) {
            None => Ok(()),
            // Another call has told why.
            Some(index) => Err(self.missing(*index)),
        }
    }

    /// The delta does not change any more: it is about to be accepted.
    pub fn seal(&self) {
        // A chunk that is being written is written first.
        let _writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        self.progress.state().sealed = true;
    }

    /// The delta was not accepted after all.
    pub fn unseal(&self) {
        self.progress.state().sealed = false;
    }

    /// The delta is no longer wanted. What is on its way to the object store is given up, and nothing more
    /// is sent there. A file needs no such care: it loses its name, and goes with its last user.
    pub(super) fn discard(&self) {
        if let Medium::Objects(objects) = &self.medium {
            self.progress.state().discarded = true;
            objects.discard();
            drop(self.progress.state_after(|state| state.sent > 0));
        }
    }

    /// Reads a chunk's payload into `payload`, replacing what that holds, and returns its digest.
    ///
    /// # Errors
    /// [`SpoolError::Missing`]; [`SpoolError::Corrupt`] if it is not what was stored; the object store's
    /// refusal.
    pub fn read(&self, index: u32, payload: &mut AlignedVec<u8>) -> Result<Digest, SpoolError> {
        let entry = self.entry(index)?;
        let length = self.layout.payload_bytes(index).unwrap_or_default();
        payload.resize(length);
        match &self.medium {
            Medium::File(file) => {
                file.read(self.layout, index, payload)
                    .map_err(|error| self.corrupt(index, format!("it cannot be read: {error}")))?;
            }
            Medium::Objects(objects) => {
                let object = objects.read(index, length).map_err(|error| match error.fault() {
                    Fault::NotFound => self.missing(index),
                    _ => SpoolError::of_storage(&self.key, error),
                })?;
                let (head, body) = object.split_at(ENTRY_BYTES.min(object.len()));
                if head != entry.to_bytes(index, length) || body.len() != length {
                    let reason = format!("its object of {} bytes is not the one stored", object.len());
                    return Err(self.corrupt(index, reason));
                }
                payload.copy_from_slice(body);
            }
        }
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
        match self.progress.state().chunks.get(index as usize) {
            Some(Chunk::Durable(entry)) => Ok(*entry),
            _ => Err(self.missing(index)),
        }
    }

    fn missing(&self, index: u32) -> SpoolError {
        SpoolError::Missing { key: Box::new(self.key.clone()), index }
    }

    fn corrupt(&self, index: u32, reason: String) -> SpoolError {
        SpoolError::Corrupt { key: Box::new(self.key.clone()), index, reason }
    }
}
