//! A version that is being written: chunks in any order, then made durable as a whole.

use std::{
    fs::File,
    io::{self, Write},
    os::unix::fs::FileExt,
    thread,
};

use consort_common::{atomic_file, chunk::ChunkPlan, ids::Digest};

use super::{
    ModelError, ModelFiles, ModelVersion, VALUE_BYTES,
    files::{DIGESTS_FILE, Digests, NewFiles, Place, checksum},
};

/// Bytes of a vector that are read and hashed at a time.
const HASH_BLOCK_BYTES: u64 = 4 << 20;

/// What is recorded of one written chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChunkRecord {
    digest: Digest,
    parameters: u64,
    momentum: Option<u64>,
}

/// A version that is being written. Dropped unfinished, it leaves nothing.
#[derive(Debug)]
pub struct NewVersion {
    pub(super) models: ModelFiles,
    pub(super) place: Place,
    pub(super) plan: ChunkPlan,
    pub(super) files: NewFiles,
}

impl NewVersion {
    /// Writes chunk `index`, once; several threads may write different chunks at a time. `momentum` is there
    /// if the version has one.
    pub(crate) fn write(
        &self,
        index: u32,
        parameters: &[f32],
        momentum: Option<&[f32]>,
    ) -> Result<ChunkRecord, ModelError> {
        let offset = self.plan.range(index)?.start * VALUE_BYTES;
        let write = |file: &File, values: &[f32]| {
            let bytes = bytemuck::cast_slice(values);
            // What is reserved and not written reads as zeros: an initial momentum takes no writing.
            if values.iter().any(|value| value.to_bits() != 0) {
                file.write_all_at(bytes, offset).map_err(|error| self.explain(error))?;
            }
            Ok::<_, ModelError>(checksum(bytes))
        };
        Ok(ChunkRecord {
            digest: Digest::of(bytemuck::cast_slice(parameters)),
            parameters: write(&self.files.parameters, parameters)?,
            momentum: match (&self.files.momentum, momentum) {
                (Some(file), Some(values)) => Some(write(file, values)?),
                _ => None,
            },
        })
    }

    /// Makes the version durable and puts it in its place, with the records of its chunks in order.
    pub(crate) fn finish(self, chunks: &[ChunkRecord]) -> Result<ModelVersion, ModelError> {
        // The whole vector is hashed while the disk is busy. It is read back for that, which costs a pass
        // over cached pages: chunks may have been written in any order.
        let whole = thread::scope(|scope| {
            let sync = scope.spawn(|| self.files.sync());
            let whole = hash(&self.files.parameters, self.files.vector_bytes);
            let synced =
                sync.join().unwrap_or_else(|_| Err(io::Error::other("the thread that syncs failed")));
            synced.and(whole)
        });
        let whole = whole.map_err(|error| self.explain(error))?;
        let mut checksums = vec![chunks.iter().map(|chunk| chunk.parameters).collect()];
        if self.files.momentum.is_some() {
            checksums.push(chunks.iter().filter_map(|chunk| chunk.momentum).collect());
        }
        let digests = Digests { whole, chunks: chunks.iter().map(|chunk| chunk.digest).collect(), checksums };
        atomic_file::write_durably(&self.files.partial.join(DIGESTS_FILE), |file| {
            file.write_all(&digests.to_bytes())
        })
        .map_err(|error| self.explain(error))?;
        atomic_file::rename_directory_into_place(&self.files.partial, &self.place.directory)?;
        // The run's directory, and the first time the root, are new entries too.
        let ancestors = self.place.directory.ancestors().skip(2).take(2);
        ancestors
            .filter(|ancestor| !ancestor.as_os_str().is_empty())
            .try_for_each(atomic_file::sync_directory)?;
        self.models.open(&self.place.run, self.place.version, self.plan)
    }

    fn explain(&self, error: io::Error) -> ModelError {
        self.models.explain(&self.place, self.files.bytes(), error)
    }
}

/// BLAKE3 of a file of `bytes`, a block in memory at a time.
fn hash(file: &File, bytes: u64) -> io::Result<Digest> {
    let mut hasher = blake3::Hasher::new();
    let mut block = vec![0; HASH_BLOCK_BYTES.min(bytes) as usize];
    let mut offset = 0;
    while offset < bytes {
        let piece = &mut block[..HASH_BLOCK_BYTES.min(bytes - offset) as usize];
        file.read_exact_at(piece, offset)?;
        hasher.update_rayon(piece);
        offset += piece.len() as u64;
    }
    Ok(hasher.finalize().into())
}
