//! The files of one version: their names, sizes, digests and checksums.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use consort_common::{
    atomic_file,
    ids::{Digest, RunName},
};
use twox_hash::XxHash3_64;

use super::{ModelError, ModelLayout};

pub(super) const PARAMETERS_FILE: &str = "parameters.f32";
pub(super) const MOMENTUM_FILE: &str = "momentum.f32";
pub(super) const SECOND_MOMENT_FILE: &str = "second-moment.f32";
pub(super) const RESIDUAL_FILE: &str = "residual.f32";
pub(super) const UPDATE_FILE: &str = "update.bin";
pub(super) const DIGESTS_FILE: &str = "chunks.digests";
/// Bytes of one digest.
pub(super) const DIGEST_BYTES: usize = 32;
/// Bytes of one checksum.
const CHECKSUM_BYTES: usize = 8;

/// XXH3, 64 bits: tells what a disk or a memory chip did, not what somebody made up.
pub(super) fn checksum(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot(bytes)
}

/// One of each file of a version that is cut into chunks, in the order in which their checksums are recorded.
#[derive(Debug)]
pub(super) struct Parts<T> {
    pub(super) parameters: T,
    pub(super) momentum: Option<T>,
    pub(super) second_moment: Option<T>,
    pub(super) residual: Option<T>,
    pub(super) update: Option<T>,
}

impl<T> Parts<T> {
    /// Those that `version` of such a model has, from their names and sizes in bytes.
    pub(super) fn of<E>(
        layout: ModelLayout,
        version: u32,
        mut make: impl FnMut(&'static str, u64) -> Result<T, E>,
    ) -> Result<Self, E> {
        let vector_bytes = layout.vector_bytes();
        Ok(Self {
            parameters: make(PARAMETERS_FILE, vector_bytes)?,
            momentum: layout.momentum.then(|| make(MOMENTUM_FILE, vector_bytes)).transpose()?,
            second_moment: layout
                .second_moment
                .then(|| make(SECOND_MOMENT_FILE, vector_bytes))
                .transpose()?,
            residual: layout.has_residual().then(|| make(RESIDUAL_FILE, vector_bytes)).transpose()?,
            update: layout
                .update_of(version)
                .map(|_| make(UPDATE_FILE, layout.update_bytes()))
                .transpose()?,
        })
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        let Self { parameters, momentum, second_moment, residual, update } = self;
        [Some(parameters), momentum.as_ref(), second_moment.as_ref(), residual.as_ref(), update.as_ref()]
            .into_iter()
            .flatten()
    }
}

impl Parts<StoredPart> {
    /// The same with their checksums, one list for each part.
    pub(super) fn with_checksums(mut self, checksums: Vec<Vec<u64>>) -> Self {
        let Self { parameters, momentum, second_moment, residual, update } = &mut self;
        let parts =
            [Some(parameters), momentum.as_mut(), second_moment.as_mut(), residual.as_mut(), update.as_mut()];
        for (part, checksums) in parts.into_iter().flatten().zip(checksums) {
            part.checksums = checksums;
        }
        self
    }
}

/// A file of a complete version, with the checksum of each of its chunks.
#[derive(Debug)]
pub(super) struct StoredPart {
    pub(super) name: &'static str,
    pub(super) file: File,
    pub(super) checksums: Vec<u64>,
}

/// The files of a version that is being written, in a directory beside its place.
#[derive(Debug)]
pub(super) struct NewFiles {
    pub(super) partial: PathBuf,
    pub(super) parts: Arc<Parts<File>>,
}

impl NewFiles {
    pub(super) fn create(partial: PathBuf, layout: ModelLayout, version: u32) -> io::Result<Self> {
        match Parts::of(layout, version, |name, bytes| create_reserved(&partial.join(name), bytes)) {
            Ok(parts) => Ok(Self { partial, parts: Arc::new(parts) }),
            Err(error) => {
                // What was reserved before the disk was full is given back.
                let _ = atomic_file::remove_directory(&partial);
                Err(error)
            }
        }
    }

    pub(super) fn sync(&self) -> io::Result<()> {
        self.parts.iter().try_for_each(File::sync_all)
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
    /// Of its chunks as they are sent when the version is sent whole.
    pub(super) chunks: Vec<Digest>,
    /// Of the update's chunks; empty where there is none.
    pub(super) update: Vec<Digest>,
    /// Of the chunks of each part, in the order of [`Parts`].
    pub(super) checksums: Vec<Vec<u64>>,
}

impl Digests {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let digests = [&self.whole].into_iter().chain(&self.chunks).chain(&self.update);
        let checksums = self.checksums.iter().flatten().flat_map(|checksum| checksum.to_le_bytes());
        let mut bytes: Vec<u8> = digests.flat_map(|digest| *digest.as_bytes()).chain(checksums).collect();
        bytes.extend(checksum(&bytes).to_le_bytes());
        bytes
    }

    /// None unless these are the bytes of that many chunks and parts, one of them an update or not.
    pub(super) fn from_bytes(bytes: &[u8], chunks: usize, parts: usize, update: bool) -> Option<Self> {
        let (bytes, own) = bytes.split_last_chunk::<CHECKSUM_BYTES>()?;
        let digests_bytes = (1 + chunks * (1 + usize::from(update))) * DIGEST_BYTES;
        let expected = digests_bytes + parts * chunks * CHECKSUM_BYTES;
        if bytes.len() != expected || checksum(bytes) != u64::from_le_bytes(*own) {
            return None;
        }
        let (digests, checksums) = bytes.split_at(digests_bytes);
        let digests: Result<Vec<_>, _> = digests.chunks(DIGEST_BYTES).map(Digest::try_from).collect();
        let mut digests = digests.ok()?.into_iter();
        let mut checksums = checksums.as_chunks().0.iter().map(|bytes| u64::from_le_bytes(*bytes));
        Some(Self {
            whole: digests.next()?,
            chunks: digests.by_ref().take(chunks).collect(),
            update: digests.collect(),
            checksums: (0..parts).map(|_| checksums.by_ref().take(chunks).collect()).collect(),
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

    /// Opens a file that must be there, and checks its size.
    pub(super) fn open(&self, name: &str, expected_bytes: u64) -> Result<File, ModelError> {
        let file = match File::open(self.directory.join(name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(self.corrupt(name, "it is not there".to_owned()));
            }
            file => file?,
        };
        let actual_bytes = file.metadata()?.len();
        if actual_bytes != expected_bytes {
            return Err(self.corrupt(name, format!("it has {actual_bytes} bytes, not {expected_bytes}")));
        }
        Ok(file)
    }

    pub(super) fn read_digests(
        &self,
        chunks: u32,
        parts: usize,
        update: bool,
    ) -> Result<Digests, ModelError> {
        let bytes = fs::read(self.directory.join(DIGESTS_FILE))
            .map_err(|error| self.corrupt(DIGESTS_FILE, format!("it cannot be read: {error}")))?;
        Digests::from_bytes(&bytes, chunks as usize, parts, update).ok_or_else(|| {
            let reason = format!("its {} bytes are not the digests of {chunks} chunks", bytes.len());
            self.corrupt(DIGESTS_FILE, reason)
        })
    }
}
