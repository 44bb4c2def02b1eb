//! The files of one version: their names, sizes and digests.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use consort_common::{
    atomic_file,
    chunk::ChunkPlan,
    codec::Encoding,
    ids::{Digest, RunName},
};

use super::{ModelError, VALUE_BYTES};

pub(super) const PARAMETERS_FILE: &str = "parameters.f32";
pub(super) const MOMENTUM_FILE: &str = "momentum.f32";
pub(super) const DIGESTS_FILE: &str = "chunks.blake3";
/// Bytes of one digest.
pub(super) const DIGEST_BYTES: usize = 32;

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

/// The digests of a version, as stored beside it.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Digests {
    pub(super) whole: Digest,
    pub(super) parameters: Vec<Digest>,
    /// Empty without momentum.
    pub(super) momentum: Vec<Digest>,
}

impl Digests {
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let all = [&self.whole].into_iter().chain(&self.parameters).chain(&self.momentum);
        all.flat_map(|digest| *digest.as_bytes()).collect()
    }

    pub(super) fn from_bytes(bytes: &[u8], chunks: usize, momentum: bool) -> Option<Self> {
        let all: Result<Vec<_>, _> = bytes.chunks(DIGEST_BYTES).map(Digest::try_from).collect();
        let mut all =
            all.ok().filter(|all| all.len() == 1 + chunks * (1 + usize::from(momentum)))?.into_iter();
        let whole = all.next()?;
        Some(Self { whole, parameters: all.by_ref().take(chunks).collect(), momentum: all.collect() })
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
        Digests::from_bytes(&bytes, plan.chunks() as usize, momentum).ok_or_else(|| {
            let reason = format!("its {} bytes are not the digests of {} chunks", bytes.len(), plan.chunks());
            self.corrupt(DIGESTS_FILE, reason)
        })
    }

    pub(super) fn decode(&self, name: &str, bytes: &[u8], values: &mut [f32]) -> Result<(), ModelError> {
        Encoding::Fp32.codec().decode(bytes, values).map_err(|error| self.corrupt(name, error.to_string()))
    }
}
