//! The versions of the global model on disk.
//!
//! `<root>/<run>/<version>/` holds `parameters.f32` (the flat vector, fp32 little-endian),
//! `momentum.f32` (the outer optimizer's, where it has one) and `chunks.digests`: BLAKE3 of the whole vector
//! and of each of its chunks, which are what others compare, and an XXH3 checksum of each chunk of each
//! vector, by which every chunk is verified whenever it is read (a tenth of BLAKE3's time). A version is
//! there whole or not at all; which versions are *committed* is the database's to say: one above the newest
//! committed is an orphan of a crash, and writing it again replaces it.
//!
//! Nothing here computes a model, and nothing holds more of one than a chunk, or maps it. Calls block: async
//! callers use `spawn_blocking`.

mod files;
mod new_version;

use std::{
    fs,
    io::{self, Read},
    os::unix::fs::FileExt,
    path::PathBuf,
};

use consort_common::{
    atomic_file,
    chunk::{ChunkPlan, NoSuchChunk},
    ids::{Digest, RunName},
    units,
};
use rayon::prelude::*;

use self::files::{DIGESTS_FILE, MOMENTUM_FILE, NewFiles, PARAMETERS_FILE, Place, StoredVector, checksum};
pub(crate) use self::new_version::ChunkRecord;
pub use self::new_version::NewVersion;

// Vectors are little-endian and are written as they lie in memory.
const _: () = assert!(cfg!(target_endian = "little"), "models are written on little-endian machines");

/// Bytes of one value.
const VALUE_BYTES: u64 = 4;

/// Why a model could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// It was never written, or is retired.
    #[error("version {version} of run {run} is not on the aggregator's disk")]
    Missing {
        /// The run.
        run: RunName,
        /// The version.
        version: u32,
    },
    /// The files are not what was written.
    #[error("version {version} of run {run} is damaged on the aggregator's disk ({reason}); restore {} from a backup", path.display())]
    Corrupt {
        /// The run.
        run: RunName,
        /// The version.
        version: u32,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// There is no room for a new version.
    #[error("version {version} of run {run} could not be written: it takes {} and the aggregator's disk has {} left; make room, the reduction is then tried again", units::bytes(*needed_bytes), units::bytes(*available_bytes))]
    Full {
        /// The run.
        run: RunName,
        /// The version.
        version: u32,
        /// What the version takes.
        needed_bytes: u64,
        /// What the filesystem has left.
        available_bytes: u64,
    },
    /// The chunk does not exist.
    #[error(transparent)]
    NoSuchChunk(#[from] NoSuchChunk),
    /// The system refused an operation; the error names it and the path.
    #[error("the model files failed: {0}")]
    Io(#[from] io::Error),
}

/// The versions of all runs.
#[derive(Debug, Clone)]
pub struct ModelFiles {
    root: PathBuf,
}

impl ModelFiles {
    /// The versions under `root`, which is created with the first of them.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into() }
    }

    /// Writes version 0, and a momentum of zeros if the outer optimizer has one: `fill` is called with a
    /// position and a piece of the flat vector that begins there, by several threads at a time. To be called
    /// before the run is recorded, never after: it replaces a version 0 that is there.
    ///
    /// # Errors
    /// [`ModelError::Full`], before anything is filled; or the system's.
    pub fn create_initial(
        &self,
        run: &RunName,
        plan: ChunkPlan,
        momentum: bool,
        fill: impl Fn(u64, &mut [f32]) + Sync,
    ) -> Result<ModelVersion, ModelError> {
        let version = self.begin(run, 0, plan, momentum)?;
        let write = |(values, zeros): &mut (Vec<f32>, Vec<f32>), index| {
            let range = plan.range(index)?;
            let length = plan.length(index)?;
            values.resize(length, 0.0);
            zeros.resize(if momentum { length } else { 0 }, 0.0);
            fill(range.start, values);
            version.write(index, values, momentum.then_some(zeros.as_slice()))
        };
        let chunks = (0..plan.chunks()).into_par_iter().map_init(Default::default, write);
        let chunks = chunks.collect::<Result<Vec<_>, _>>()?;
        version.finish(&chunks)
    }

    /// Opens a version. What it holds is verified chunk by chunk as it is read.
    ///
    /// # Errors
    /// [`ModelError::Missing`]; [`ModelError::Corrupt`] if its files do not have the sizes of `plan`.
    pub fn open(&self, run: &RunName, version: u32, plan: ChunkPlan) -> Result<ModelVersion, ModelError> {
        let directory = self.directory(run, version);
        let place = Place { run: run.clone(), version, directory };
        let parameters = place.open(PARAMETERS_FILE, plan)?.ok_or_else(|| place.missing())?;
        let momentum = place.open(MOMENTUM_FILE, plan)?;
        let digests = place.read_digests(plan, momentum.is_some())?;
        let mut checksums = digests.checksums.into_iter();
        let mut vector =
            |name, file| StoredVector { name, file, checksums: checksums.next().unwrap_or_default() };
        Ok(ModelVersion {
            digest: digests.whole,
            chunk_digests: digests.chunks,
            parameters: vector(PARAMETERS_FILE, parameters),
            momentum: momentum.map(|file| vector(MOMENTUM_FILE, file)),
            place,
            plan,
        })
    }

    /// Starts to write a version, beside its place until [`NewVersion::finish`]. Its space is reserved, so
    /// that a full disk is found here and not half-way. A version has one writer at a time.
    pub fn begin(
        &self,
        run: &RunName,
        version: u32,
        plan: ChunkPlan,
        momentum: bool,
    ) -> Result<NewVersion, ModelError> {
        let place = Place { run: run.clone(), version, directory: self.directory(run, version) };
        let vector_bytes = plan.parameters() * VALUE_BYTES;
        let needed_bytes = vector_bytes * (1 + u64::from(momentum));
        let files = atomic_file::create_partial_directory(&place.directory).and_then(|partial| {
            // Some filesystems fill up before they find that there is not enough.
            if fs4::available_space(&partial)? < needed_bytes {
                let _ = atomic_file::remove_directory(&partial);
                return Err(io::ErrorKind::StorageFull.into());
            }
            NewFiles::create(partial, vector_bytes, momentum)
        });
        match files {
            Ok(files) => Ok(NewVersion { models: self.clone(), place, plan, files }),
            Err(error) => Err(self.explain(&place, needed_bytes, error)),
        }
    }

    /// Removes the run's versions but those to keep. Versions above all of these are left alone: one may
    /// be about to be committed.
    pub fn retain(&self, run: &RunName, versions_to_keep: &[u32]) -> Result<(), ModelError> {
        let newest = versions_to_keep.iter().max().copied().unwrap_or_default();
        for version in self.versions(run)? {
            if version < newest && !versions_to_keep.contains(&version) {
                atomic_file::remove_directory(&self.directory(run, version))?;
            }
        }
        Ok(())
    }

    /// The versions that are on disk, committed or not, ascending.
    pub fn versions(&self, run: &RunName) -> Result<Vec<u32>, ModelError> {
        let entries = match fs::read_dir(self.root.join(run.as_str())) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut versions = Vec::new();
        for entry in entries {
            versions.extend(entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()));
        }
        versions.sort_unstable();
        Ok(versions)
    }

    fn directory(&self, run: &RunName, version: u32) -> PathBuf {
        self.root.join(run.as_str()).join(version.to_string())
    }

    fn explain(&self, place: &Place, needed_bytes: u64, error: io::Error) -> ModelError {
        if !matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            return error.into();
        }
        let available_bytes = fs4::available_space(&self.root).unwrap_or_default();
        ModelError::Full { run: place.run.clone(), version: place.version, needed_bytes, available_bytes }
    }
}

/// A version that is complete. It stays readable while it is open, even when it is retired meanwhile.
#[derive(Debug)]
pub struct ModelVersion {
    place: Place,
    plan: ChunkPlan,
    digest: Digest,
    chunk_digests: Vec<Digest>,
    parameters: StoredVector,
    momentum: Option<StoredVector>,
}

impl ModelVersion {
    /// The run.
    pub fn run(&self) -> &RunName {
        &self.place.run
    }

    /// How it is cut.
    pub fn plan(&self) -> ChunkPlan {
        self.plan
    }

    /// The version: the round that made it, 0 for the initial one.
    pub fn version(&self) -> u32 {
        self.place.version
    }

    /// BLAKE3 over the flat fp32 little-endian vector, as recorded when it was written: the same however
    /// the vector is cut.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The file that is the flat fp32 little-endian vector and nothing else.
    pub fn parameters_path(&self) -> PathBuf {
        self.place.directory.join(PARAMETERS_FILE)
    }

    /// Whether the outer optimizer's momentum is beside the parameters.
    pub fn has_momentum(&self) -> bool {
        self.momentum.is_some()
    }

    /// The parameters of chunk `index`, fp32 little-endian, verified, and their BLAKE3 digest.
    ///
    /// # Errors
    /// If the chunk does not exist or is not what was written.
    pub fn chunk(&self, index: u32) -> Result<(Vec<u8>, Digest), ModelError> {
        let mut payload = vec![0; self.plan.length(index)? * VALUE_BYTES as usize];
        self.read(&self.parameters, index, &mut payload)?;
        Ok((payload, self.chunk_digests[index as usize]))
    }

    /// The whole flat vector, from its beginning, a chunk in memory at a time.
    pub fn reader(&self) -> ModelBytes<'_> {
        ModelBytes {
            version: self,
            next_chunk: 0,
            chunk: Vec::new(),
            taken: 0,
            hasher: blake3::Hasher::new(),
            fault: None,
        }
    }

    /// Reads the parameters of chunk `index` into `values`, which has its length, and verifies them.
    pub(crate) fn read_parameters(&self, index: u32, values: &mut [f32]) -> Result<(), ModelError> {
        self.read(&self.parameters, index, bytemuck::cast_slice_mut(values))
    }

    /// Like [`ModelVersion::read_parameters`] for the momentum.
    pub(crate) fn read_momentum(&self, index: u32, values: &mut [f32]) -> Result<(), ModelError> {
        match &self.momentum {
            Some(momentum) => self.read(momentum, index, bytemuck::cast_slice_mut(values)),
            None => {
                let reason = "the outer optimizer's state is not there".to_owned();
                Err(self.place.corrupt(MOMENTUM_FILE, reason))
            }
        }
    }

    /// Reads chunk `index` of a vector into `bytes`, which has its length.
    fn read(&self, vector: &StoredVector, index: u32, bytes: &mut [u8]) -> Result<(), ModelError> {
        let StoredVector { name, file, checksums } = vector;
        let offset = self.plan.range(index)?.start * VALUE_BYTES;
        file.read_exact_at(bytes, offset)
            .map_err(|error| self.place.corrupt(name, format!("chunk {index} cannot be read: {error}")))?;
        let (expected, actual) = (checksums[index as usize], checksum(bytes));
        if actual != expected {
            let reason = format!("chunk {index} has the checksum {actual:016x}, not {expected:016x}");
            return Err(self.place.corrupt(name, reason));
        }
        Ok(())
    }
}

/// The bytes of a version's flat vector, in order. Every chunk is verified before any of it is given, and
/// the last one is given only if all of them together have the version's digest.
#[derive(Debug)]
pub struct ModelBytes<'a> {
    version: &'a ModelVersion,
    next_chunk: u32,
    chunk: Vec<u8>,
    /// How much of `chunk` was given.
    taken: usize,
    hasher: blake3::Hasher,
    fault: Option<ModelError>,
}

impl ModelBytes<'_> {
    /// Why reading failed, if it did: the error of [`Read`] says no more than that.
    pub fn into_fault(self) -> Option<ModelError> {
        self.fault
    }

    fn read_next_chunk(&mut self) -> Result<(), ModelError> {
        let Self { version, next_chunk, chunk, taken, hasher, .. } = self;
        *taken = 0;
        chunk.resize(version.plan.length(*next_chunk)? * VALUE_BYTES as usize, 0);
        version.read(&version.parameters, *next_chunk, chunk)?;
        hasher.update_rayon(chunk);
        *next_chunk += 1;
        let found = Digest::from(hasher.finalize());
        if *next_chunk == version.plan.chunks() && found != version.digest {
            let reason = format!("it has the digest {}, not {}", found.short(), version.digest.short());
            return Err(version.place.corrupt(PARAMETERS_FILE, reason));
        }
        Ok(())
    }
}

impl Read for ModelBytes<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.taken == self.chunk.len() && self.next_chunk < self.version.plan.chunks() {
            self.read_next_chunk().map_err(|fault| {
                self.chunk.clear();
                self.fault = Some(fault);
                io::Error::other("the model cannot be read")
            })?;
        }
        let given = (&self.chunk[self.taken..]).read(buffer)?;
        self.taken += given;
        Ok(given)
    }
}

#[cfg(test)]
mod tests;
