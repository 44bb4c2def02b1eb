//! A model that is arriving: a file that is always a prefix of the whole, in whole chunks but for the last
//! bytes of a write that was interrupted. Whatever form the chunks travel in, here they are fp32.

use std::{
    fs::File,
    io::{Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use consort_common::{atomic_file::sync_directory, chunk::ChunkPlan, ids::Digest};

use super::{TransferError, file_error};

/// The file, open at its end, and the digest of what it holds. Every call blocks.
pub(super) struct Part {
    path: PathBuf,
    file: File,
    hasher: blake3::Hasher,
    chunks: u32,
}

impl Part {
    /// Opens the file, or creates it, and hashes what is there; a chunk that was written in part is dropped.
    ///
    /// # Errors
    /// If the disk fails.
    pub(super) fn open(path: &Path, plan: ChunkPlan) -> Result<Self, TransferError> {
        let mut file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .read(true)
            .open(path)
            .map_err(file_error("open", path))?;
        // An attempt that was dropped may still be writing its last chunk.
        file.lock().map_err(file_error("lock", path))?;
        let held_bytes = file.metadata().map_err(file_error("read", path))?.len();
        let chunk_bytes = u64::from(plan.chunk_parameters()) * 4;
        let chunks = match u32::try_from(held_bytes / chunk_bytes) {
            _ if held_bytes == plan.parameters() * 4 => plan.chunks(),
            Ok(chunks) if chunks < plan.chunks() => chunks,
            // A file that is too long is not ours.
            _ => 0,
        };
        let bytes = (u64::from(chunks) * chunk_bytes).min(plan.parameters() * 4);
        file.set_len(bytes).map_err(file_error("shorten", path))?;
        file.seek(SeekFrom::Start(bytes)).map_err(file_error("write", path))?;
        let mut hasher = blake3::Hasher::new();
        hasher.update_mmap_rayon(path).map_err(file_error("read", path))?;
        Ok(Self { path: path.to_owned(), file, hasher, chunks })
    }

    /// Chunks that are there.
    pub(super) fn chunks(&self) -> u32 {
        self.chunks
    }

    /// Adds the next chunk.
    ///
    /// # Errors
    /// If the disk fails.
    pub(super) fn append(&mut self, values: &[f32]) -> Result<(), TransferError> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        self.hasher.update_rayon(bytes);
        self.file.write_all(bytes).map_err(file_error("write", &self.path))?;
        self.chunks += 1;
        Ok(())
    }

    /// Makes the file durable; the digest of what it holds.
    ///
    /// # Errors
    /// If the disk fails.
    pub(super) fn finish(self) -> Result<Digest, TransferError> {
        self.file.sync_all().map_err(file_error("write", &self.path))?;
        Ok(self.hasher.finalize().into())
    }
}

/// Gives the arrived model its name.
///
/// # Errors
/// If the disk fails.
pub(super) fn publish(part: &Path, path: &Path) -> Result<(), TransferError> {
    std::fs::rename(part, path).map_err(file_error("rename", part))?;
    path.parent().map_or(Ok(()), sync_directory).map_err(file_error("finish", path))
}
