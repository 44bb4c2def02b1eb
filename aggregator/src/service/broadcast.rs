//! Chunks of the global model on their way to many sites: each is read, verified and encoded once for all
//! that ask for it within a while, however many they are. Once nobody downloads, none is kept.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use consort_common::ids::{Digest, RunName};
use quick_cache::{OptionsBuilder, Weighter, sync::Cache};
use tokio::task::spawn_blocking;
use tonic::Status;

use crate::driver::{DriverError, ModelReader};

/// Bytes of chunks that are kept. Sites that begin a round together stay together: the round waits for all
/// of them. Those that fall behind further than this cost a read of their own, from the system's cache.
const CACHED_BYTES_MAX: u64 = 32 << 20;
/// A guess at their number, for the size of tables.
const CACHED_CHUNKS: usize = 64;

/// A chunk as it travels.
#[derive(Debug, Clone)]
pub(super) struct Chunk {
    pub payload: Bytes,
    pub digest: Digest,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    run: RunName,
    version: u32,
    update: bool,
    index: u32,
}

#[derive(Debug, Clone)]
struct PayloadBytes;

impl Weighter<Key, Chunk> for PayloadBytes {
    fn weight(&self, _: &Key, chunk: &Chunk) -> u64 {
        chunk.payload.len() as u64
    }
}

/// The chunks that are being sent.
#[derive(Debug)]
pub(super) struct Broadcast {
    chunks: Cache<Key, Chunk, PayloadBytes>,
    /// Downloads under way.
    audience: Mutex<usize>,
}

/// A download under way.
#[derive(Debug)]
pub(super) struct Listener(Arc<Broadcast>);

impl Listener {
    /// Chunk `index` of what `reader` reads; whoever asks first reads it, and the others wait for that.
    ///
    /// # Errors
    /// UNAVAILABLE if it cannot be read or is damaged.
    pub async fn chunk(&self, reader: &Arc<ModelReader>, index: u32) -> Result<Chunk, Status> {
        let run = reader.material.name.clone();
        let key = Key { run, version: reader.version(), update: reader.base_version().is_some(), index };
        let reader = reader.clone();
        let read = async {
            let read = spawn_blocking(move || reader.chunk(index)).await.map_err(|_| {
                Status::internal("the aggregator failed while it read the model; see its log")
            })?;
            let (payload, digest) = read.map_err(DriverError::from)?;
            Ok(Chunk { payload: payload.into(), digest })
        };
        self.0.chunks.get_or_insert_async(&key, read).await
    }
}

/// What is kept when the last one goes would be of a version that few will ask for again.
impl Drop for Listener {
    fn drop(&mut self) {
        let mut audience = self.0.audience();
        *audience -= 1;
        if *audience == 0 {
            self.0.chunks.clear();
        }
    }
}

impl Broadcast {
    pub fn new() -> Self {
        let options = OptionsBuilder::new()
            .estimated_items_capacity(CACHED_CHUNKS)
            .weight_capacity(CACHED_BYTES_MAX)
            // The bound holds for all chunks together, and they come far more slowly than one lock takes.
            .shards(1)
            .build();
        // Only a missing bound can make it fail, and both are there.
        let chunks = options.map_or_else(
            |_| Cache::with_weighter(CACHED_CHUNKS, CACHED_BYTES_MAX, PayloadBytes),
            |options| Cache::with_options(options, PayloadBytes, Default::default(), Default::default()),
        );
        Self { chunks, audience: Mutex::default() }
    }

    /// Begins a download.
    pub fn listen(self: &Arc<Self>) -> Listener {
        *self.audience() += 1;
        Listener(self.clone())
    }

    fn audience(&self) -> MutexGuard<'_, usize> {
        self.audience.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_kept_until_nobody_downloads() {
        let broadcast = Arc::new(Broadcast::new());
        let keep = |version| {
            let key = Key { run: "demo".parse().unwrap(), version, update: false, index: 0 };
            broadcast.chunks.insert(key, Chunk { payload: vec![0; 9].into(), digest: Digest::of(&[0; 9]) });
        };
        let first = broadcast.listen();
        keep(1);
        let second = broadcast.listen();
        keep(2);
        drop(first);
        assert_eq!(broadcast.chunks.weight(), 18);
        drop(second);
        assert_eq!((broadcast.chunks.weight(), broadcast.chunks.len()), (0, 0));
        drop(broadcast.listen());
    }
}
