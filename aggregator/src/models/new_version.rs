//! A version that is being written: chunks in any order, then made durable as a whole.

use std::{
    fs::File,
    io::{self, Write},
    iter::repeat,
    os::unix::fs::FileExt,
    thread,
};

use consort_common::{atomic_file, ids::Digest};
use rayon::prelude::*;

use super::{
    ModelError, ModelFiles, ModelLayout, ModelVersion, VALUE_BYTES,
    files::{
        DIGESTS_FILE, Digests, MOMENTUM_FILE, NewFiles, PARAMETERS_FILE, Place, RESIDUAL_FILE,
        SECOND_MOMENT_FILE, UPDATE_FILE, checksum,
    },
    writeback::Writeback,
};
use crate::aligned::AlignedVec;

/// Bytes of a vector that are read and hashed at a time, about.
const HASH_BLOCK_BYTES: u64 = 4 << 20;

/// What a version holds of one chunk; what its layout does not have is empty.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct NewChunk<'a> {
    /// What the sites hold.
    pub parameters: &'a [f32],
    /// Of the outer optimizer.
    pub momentum: &'a [f32],
    /// Of the same.
    pub second_moment: &'a [f32],
    /// What rounding dropped.
    pub residual: &'a [f32],
    /// The parameters as they are sent, where that is not as they lie in memory.
    pub whole_payload: &'a [u8],
    /// What the round changed, as it is sent.
    pub update_payload: &'a [u8],
}

/// What is recorded of one written chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChunkRecord {
    /// None: that of the parameters as they lie in the file, which [`NewVersion::finish`] takes.
    whole: Option<Digest>,
    update: Option<Digest>,
    /// In the order of the parts.
    checksums: [Option<u64>; 5],
}

/// A version that is being written. Dropped unfinished, it leaves nothing.
#[derive(Debug)]
pub struct NewVersion {
    models: ModelFiles,
    place: Place,
    layout: ModelLayout,
    files: NewFiles,
    writeback: Writeback,
}

impl NewVersion {
    pub(super) fn new(
        models: ModelFiles,
        place: Place,
        layout: ModelLayout,
        files: NewFiles,
        writeback: Writeback,
    ) -> Self {
        Self { models, place, layout, files, writeback }
    }

    /// What it consists of.
    pub(crate) fn layout(&self) -> ModelLayout {
        self.layout
    }

    /// Which it will be.
    pub(crate) fn version(&self) -> u32 {
        self.place.version
    }

    /// Writes chunk `index`, once; several threads may write different chunks at a time.
    pub(crate) fn write(&self, index: u32, chunk: NewChunk<'_>) -> Result<ChunkRecord, ModelError> {
        let parameters: &[u8] = bytemuck::cast_slice(chunk.parameters);
        let whole_payload = Some(chunk.whole_payload).filter(|payload| !payload.is_empty());
        let parts = &self.files.parts;
        let optional = |file: &Option<File>, name, bytes| {
            file.as_ref().map(|file| self.write_part(file, name, index, bytes)).transpose()
        };
        Ok(ChunkRecord {
            whole: whole_payload.map(Digest::of),
            update: parts.update.as_ref().map(|_| Digest::of(chunk.update_payload)),
            checksums: [
                Some(self.write_part(&parts.parameters, PARAMETERS_FILE, index, parameters)?),
                optional(&parts.momentum, MOMENTUM_FILE, bytemuck::cast_slice(chunk.momentum))?,
                optional(
                    &parts.second_moment,
                    SECOND_MOMENT_FILE,
                    bytemuck::cast_slice(chunk.second_moment),
                )?,
                optional(&parts.residual, RESIDUAL_FILE, bytemuck::cast_slice(chunk.residual))?,
                optional(&parts.update, UPDATE_FILE, chunk.update_payload)?,
            ],
        })
    }

    /// Writes one part's chunk and gives its checksum.
    fn write_part(&self, file: &File, name: &str, index: u32, bytes: &[u8]) -> Result<u64, ModelError> {
        // What is reserved and not written reads as zeros: an initial momentum takes no writing.
        if bytes.iter().any(|byte| *byte != 0) {
            file.write_all_at(bytes, self.layout.offset(name, index)?)
                .map_err(|error| self.explain(error))?;
            self.writeback.written(bytes.len() as u64);
        }
        Ok(checksum(bytes))
    }

    /// Makes the version durable and puts it in its place, with the records of its chunks in order.
    pub(crate) fn finish(self, chunks: &[ChunkRecord]) -> Result<ModelVersion, ModelError> {
        let Self { models, place, layout, files, writeback } = self;
        let explain = |error| models.explain(&place, layout.version_bytes(place.version), error);
        // The parameters are hashed while the disk is busy, and not by those who write them. They are read back
        // for that, which costs a pass over cached pages: chunks may have been written in any order.
        let hashed = thread::scope(|scope| {
            let sync = scope.spawn(|| writeback.finish().and_then(|()| files.sync()));
            let unknown = chunks.iter().any(|chunk| chunk.whole.is_none());
            let hashed = hash(&files.parts.parameters, layout, unknown);
            let synced =
                sync.join().unwrap_or_else(|_| Err(io::Error::other("the thread that syncs failed")));
            synced.and(hashed)
        });
        let (whole, of_chunks) = hashed.map_err(explain)?;
        let of_chunks = of_chunks.into_iter().map(Some).chain(repeat(None));
        let checksums = (0..5).map(|part| chunks.iter().filter_map(|chunk| chunk.checksums[part]).collect());
        let digests = Digests {
            whole,
            chunks: chunks.iter().zip(of_chunks).filter_map(|(chunk, found)| chunk.whole.or(found)).collect(),
            update: chunks.iter().filter_map(|chunk| chunk.update).collect(),
            checksums: checksums.collect(),
        };
        atomic_file::write_durably(&files.partial.join(DIGESTS_FILE), |file| {
            file.write_all(&digests.to_bytes())
        })
        .map_err(explain)?;
        atomic_file::rename_directory_into_place(&files.partial, &place.directory)?;
        // The run's directory, and the first time the root, are new entries too.
        let ancestors = place.directory.ancestors().skip(2).take(2);
        ancestors
            .filter(|ancestor| !ancestor.as_os_str().is_empty())
            .try_for_each(atomic_file::sync_directory)?;
        models.open(&place.run, place.version, layout)
    }

    fn explain(&self, error: io::Error) -> ModelError {
        self.models.explain(&self.place, self.layout.version_bytes(self.place.version), error)
    }
}

/// BLAKE3 of the vector in `file`, and that of each of its chunks if `of_chunks`; some chunks in memory at a
/// time.
#[allow(clippy::cast_possible_truncation)] // at most a chunk or a block
fn hash(file: &File, layout: ModelLayout, of_chunks: bool) -> io::Result<(Digest, Vec<Digest>)> {
    let bytes = layout.vector_bytes();
    let chunk_bytes = u64::from(layout.plan.chunk_parameters()) * VALUE_BYTES;
    let block_bytes = HASH_BLOCK_BYTES.next_multiple_of(chunk_bytes);
    let mut hasher = blake3::Hasher::new();
    let mut digests = Vec::new();
    let mut block = AlignedVec::default();
    let mut offset = 0;
    while offset < bytes {
        block.resize(block_bytes.min(bytes - offset) as usize);
        file.read_exact_at(&mut block, offset)?;
        hasher.update_rayon(&block);
        if of_chunks {
            digests.par_extend(block.par_chunks(chunk_bytes as usize).map(Digest::of));
        }
        offset += block.len() as u64;
    }
    Ok((hasher.finalize().into(), digests))
}
