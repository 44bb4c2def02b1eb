//! The files of one version: their names, sizes and digests.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use consort_common::{
    atomic_file,
    chunk::ChunkPlan,
    ids::{Digest, RunName},
};

use twox_hash::XxHash3_64;

use super::{ModelError, VALUE_BYTES};

pub(super) const PARAMETERS_FILE: &str = "parameters.f32";
pub(super) const MOMENTUM_FILE: &str = "momentum.f32";
pub(super) const DIGESTS_FILE: &str = "chunks.digests";
/// Bytes of one digest.
pub(super) const DIGEST_BYTES: usize = 32;
/// Bytes of one checksum.
const CHECKSUM_BYTES: usize = 8;

/// XXH3, 64 bits: tells what a disk or a memory chip did, not what somebody made up.
pub(super) fn checksum(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot(bytes)
}

/// A vector of a complete version, with the checksum of each of its chunks.
#[derive(Debug)]
pub(super) struct StoredVector {
    pub(super) name: &'static str,
    pub(super) file: File,
    pub(super) checksums: Vec<u64>,
}

/// The files of a version that is being written, in a directory beside its place.
#[derive(Debug)]
pub(super) struct NewFiles {
    pub(super) partial: PathBuf,
    pub(super) vector_bytes: u64,
    pub(super) parameters: File,
    pub(super) momentum: Option<File>,
}

impl NewFiles {
    pub(super) fn create(partial: PathBuf, vector_bytes: u64, momentum: bool) -> io::Result<Self> {
        let create = || {
            let parameters = create_reserved(&partial.join(PARAMETERS_FILE), vector_bytes)?;
            let momentum = momentum.then(|| create_reserved(&partial.join(MOMENTUM_FILE), vector_bytes));
            Ok((parameters, momentum.transpose()?))
        };
        match create() {
            Ok((parameters, momentum)) => Ok(Self { partial, vector_bytes, parameters, momentum }),
            Err(error) => {
                // What was reserved before the disk was full is given back.
                let _ = atomic_file::remove_directory(&partial);
                Err(error)
            }
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.vector_bytes * (1 + u64::from(self.momentum.is_some()))
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        self.parameters.sync_all()?;
        self.momentum.as_ref().map_or(Ok(()), File::sync_all)
    }
}

impl Drop for NewFiles {
    fn drop(&mut self) {
        // Gone already when the version was finished; what stays otherwise is overwritten by the retry.
        let _ = atomic_file::remove_directory(&self.partial);
    }
}

fn create_reserved(path: &Path, bytes: u64) -> io::Result<File> {
    let file = File::options().read(true).write(true).create_new(true).open(path)?;
    if bytes > 0 {
        match fs4::FileExt::allocate(&file, bytes) {
            // Some network filesystems cannot reserve; the writes then find out.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
            allocated => allocated?,
        }
    }
    file.set_len(bytes)?;
    Ok(file)
}

/// What is recorded of a version, as stored beside it: the digests, the checksums (little-endian), and last a
/// checksum of all this.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Digests {
    /// Of the whole vector.
    pub(super) whole: Digest,
    /// Of its chunks.
    pub(super) chunks: Vec<Digest>,
    /// Of each vector's chunks: the parameters first, then the momentum if there is one.
    pub(super) checksums: Vec<Vec<u64>>,
}

impl Digests {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let digests = [&self.whole].into_iter().chain(&self.chunks).flat_map(|digest| *digest.as_bytes());
        let checksums = self.checksums.iter().flatten().flat_map(|checksum| checksum.to_le_bytes());
        let mut bytes: Vec<u8> = digests.chain(checksums).collect();
        bytes.extend(checksum(&bytes).to_le_bytes());
        bytes
    }

    pub(super) fn from_bytes(bytes: &[u8], chunks: usize, vectors: usize) -> Option<Self> {
        let (bytes, own) = bytes.split_last_chunk::<CHECKSUM_BYTES>()?;
        let digests_bytes = (1 + chunks) * DIGEST_BYTES;
        let expected = digests_bytes + vectors * chunks * CHECKSUM_BYTES;
        if bytes.len() != expected || checksum(bytes) != u64::from_le_bytes(*own) {
            return None;
        }
        let (digests, checksums) = bytes.split_at(digests_bytes);
        let digests: Result<Vec<_>, _> = digests.chunks(DIGEST_BYTES).map(Digest::try_from).collect();
        let mut digests = digests.ok()?.into_iter();
        let mut checksums = checksums.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes));
        Some(Self {
            whole: digests.next()?,
            chunks: digests.collect(),
            checksums: (0..vectors).map(|_| checksums.by_ref().take(chunks).collect()).collect(),
        })
    }
}

/// Which version, and where it is.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) run: RunName,
    pub(super) version: u32,
    pub(super) directory: PathBuf,
}

impl Place {
    pub(super) fn missing(&self) -> ModelError {
        ModelError::Missing { run: self.run.clone(), version: self.version }
    }

    pub(super) fn corrupt(&self, name: &str, reason: String) -> ModelError {
        let path = self.directory.join(name);
        ModelError::Corrupt { run: self.run.clone(), version: self.version, path, reason }
    }

    /// Opens a vector and checks its size; none if it is not there.
    pub(super) fn open(&self, name: &str, plan: ChunkPlan) -> Result<Option<File>, ModelError> {
        let file = match File::open(self.directory.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let (expected, actual) = (plan.parameters() * VALUE_BYTES, file.metadata()?.len());
        if actual != expected {
            return Err(self.corrupt(name, format!("it has {actual} bytes, not {expected}")));
        }
        Ok(Some(file))
    }

    pub(super) fn read_digests(&self, plan: ChunkPlan, momentum: bool) -> Result<Digests, ModelError> {
        let bytes = fs::read(self.directory.join(DIGESTS_FILE))
            .map_err(|error| self.corrupt(DIGESTS_FILE, format!("it cannot be read: {error}")))?;
        let vectors = 1 + usize::from(momentum);
        Digests::from_bytes(&bytes, plan.chunks() as usize, vectors).ok_or_else(|| {
            let reason = format!("its {} bytes are not the digests of {} chunks", bytes.len(), plan.chunks());
            self.corrupt(DIGESTS_FILE, reason)
        })
    }
}
