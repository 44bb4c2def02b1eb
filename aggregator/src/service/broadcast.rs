//! Chunks of the global model on their way to many sites: each is read, verified and encoded once for all
//! that ask for it within a while, however many they are.

use std::sync::Arc;

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
        Self { chunks }
    }

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
        self.chunks.get_or_insert_async(&key, read).await
    }
}
