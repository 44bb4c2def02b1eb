//! One delta as objects, one for each chunk: `<delta>/<index>`, an entry and its payload (see `layout`).
//!
//! Several chunks are on their way to the store at a time, since each takes it tens of milliseconds however
//! short it is. Memory: [`PUTS_MAX`] chunks over all uploads, [`PUTS_PER_DELTA_MAX`] per delta.
//!
//! A write that the aggregator gave up on may still arrive. It has the bytes that its successor has, for a
//! delta's id stands for one content; a site that breaks this is found out by the delta's digest.

use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::PutPayload;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use super::{
    chunks::{Chunk, Progress},
    layout::{DeltaLayout, ENTRY_BYTES, Entry},
};
use crate::storage::{Fault, Storage, StorageError};

/// Chunks on their way to the store, over all deltas.
pub(super) const PUTS_MAX: usize = 64;
/// Of one delta.
const PUTS_PER_DELTA_MAX: usize = 8;
/// Entries that are read at a time when a delta is taken up.
const READS_MAX: usize = 32;

#[derive(Debug)]
pub(super) struct DeltaObjects {
    storage: Storage,
    /// Name of the delta.
    name: String,
    /// Shared by all deltas.
    puts: Arc<Semaphore>,
    discarded: CancellationToken,
}

impl DeltaObjects {
    /// Finds what the store holds of the delta. An object that is there is there whole, so that its length
    /// and its entry tell what it is; its payload is verified when it is read.
    pub(super) async fn open(
        storage: Storage,
        name: String,
        puts: Arc<Semaphore>,
        layout: DeltaLayout,
    ) -> Result<(Self, Vec<Chunk>), StorageError> {
        let objects = Self { storage, name, puts, discarded: CancellationToken::new() };
        let stored: Vec<(String, u64)> = objects.storage.list(&objects.name).try_collect().await?;
        let stored = stored.iter().filter_map(|(name, bytes)| {
            let index: u32 = name.strip_prefix(&objects.name)?.strip_prefix('/')?.parse().ok()?;
            let length = layout.payload_bytes(index)?;
            // Numbers can be written in several ways; ours is one.
            let is_ours = *name == objects.object(index) && *bytes == object_bytes(length);
            is_ours.then_some((index, length))
        });
        let mut chunks = vec![Chunk::Missing; layout.chunks() as usize];
        let mut entries = futures::stream::iter(stored)
            .map(|(index, length)| {
                let entry = objects.entry(index, length);
                async move { entry.await.map(|entry| (index, entry)) }
            })
            .buffer_unordered(READS_MAX);
        while let Some((index, entry)) = entries.try_next().await? {
            if let Some(entry) = entry {
                chunks[index as usize] = Chunk::Durable(entry);
            }
        }
        drop(entries);
        Ok((objects, chunks))
    }

    async fn entry(&self, index: u32, length: usize) -> Result<Option<Entry>, StorageError> {
        match self.storage.get(&self.object(index), ENTRY_BYTES as u64).await {
            Ok(bytes) => Ok(Entry::from_bytes(&bytes, index, length)),
            // Discarded meanwhile.
            Err(error) if error.fault() == Fault::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Sends a chunk on its way, once few enough are; `progress` will tell what became of it. One caller at
    /// a time, and none for a chunk that is on its way: of two writes either could be the last.
    pub(super) fn send(&self, progress: &Arc<Progress>, index: u32, entry: Entry, payload: &[u8]) {
        drop(progress.state_after(|state| state.sent >= PUTS_PER_DELTA_MAX));
        let permit = self.storage.wait(self.puts.clone().acquire_owned()).ok();
        let head = Bytes::copy_from_slice(&entry.to_bytes(index, payload.len()));
        let object: PutPayload = [head, Bytes::copy_from_slice(payload)].into_iter().collect();
        let (storage, name, discarded) = (self.storage.clone(), self.object(index), self.discarded.clone());
        let unfinished = Err(StorageError::given_up(storage.name(&name)));
        let mut put = Put { progress: progress.clone(), index, entry, outcome: unfinished, _permit: permit };
        {
            let mut state = progress.state();
            state.sent += 1;
            state.failures.remove(&index);
            state.chunks[index as usize] = Chunk::Sent(entry);
        }
        self.storage.runtime().spawn(async move {
            if let Some(outcome) = discarded.run_until_cancelled(storage.put(&name, object)).await {
                put.end(outcome);
            }
        });
    }

    /// Reads an object, of at most the length that the chunk's has and one byte.
    pub(super) fn read(&self, index: u32, length: usize) -> Result<Bytes, StorageError> {
        self.storage.wait(self.storage.get(&self.object(index), object_bytes(length) + 1))
    }

    /// Gives up what is on its way.
    pub(super) fn discard(&self) {
        self.discarded.cancel();
    }

    fn object(&self, index: u32) -> String {
        format!("{}/{index}", self.name)
    }
}

/// Bytes of an object whose payload has this length.
fn object_bytes(length: usize) -> u64 {
    (ENTRY_BYTES + length) as u64
}

/// A chunk on its way. However its task ends, nobody waits for it in vain.
struct Put {
    progress: Arc<Progress>,
    index: u32,
    entry: Entry,
    outcome: Result<(), StorageError>,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Put {
    fn end(&mut self, outcome: Result<(), StorageError>) {
        self.outcome = outcome;
    }
}

impl Drop for Put {
    fn drop(&mut self) {
        self.progress.settle(self.index, self.entry, self.outcome.clone());
    }
}
