//! The versions of the global model on disk.
//!
//! `<root>/<run>/<version>/` holds
//!
//! | file | what | where |
//! |---|---|---|
//! | `parameters.f32` | the flat vector that the sites hold, fp32 little-endian | always |
//! | `momentum.f32` | the outer optimizer's momentum, of the same shape | the optimizer has one |
//! | `second-moment.f32` | its second moment, of the same shape | the optimizer has one |
//! | `residual.f32` | what rounding for the wire dropped, of the same shape | it enters the next round |
//! | `update.bin` | the encoded chunks of what the round changed, at fixed distances | updates are sent |
//! | `chunks.digests` | BLAKE3 of the vector and of each chunk as it is sent, an XXH3 checksum of each chunk of each file | always |
//!
//! The BLAKE3 digests are what others compare; by the checksums, which take a tenth of the time, every chunk
//! is verified whenever it is read. A version is there whole or not at all; which versions are *committed* is
//! the database's to say: one above the newest committed is an orphan of a crash, and writing it again
//! replaces it.
//!
//! Nothing here computes a model, and nothing holds more of one than a chunk, or maps it. Calls block: async
//! callers use `spawn_blocking`.

mod files;
mod new_version;
mod reader;
mod writeback;

use std::{
    fs, io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use consort_common::{
    atomic_file,
    chunk::{ChunkPlan, NoSuchChunk},
    codec::{Encoding, ModelEncoding},
    fragment::Fragment,
    ids::{Digest, RunName},
    units,
};

use self::files::{
    MOMENTUM_FILE, NewFiles, PARAMETERS_FILE, Parts, Place, RESIDUAL_FILE, SECOND_MOMENT_FILE, StoredPart,
    UPDATE_FILE, checksum,
};
pub(crate) use self::new_version::{ChunkRecord, NewChunk};
use self::writeback::Writeback;
pub use self::{new_version::NewVersion, reader::ModelBytes};

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
    /// The version was not made from the one before by an update that is sent.
    #[error("version {version} of run {run} has no update that could be sent")]
    NoUpdate {
        /// The run.
        run: RunName,
        /// The version.
        version: u32,
    },
    /// The chunk does not exist.
    #[error(transparent)]
    NoSuchChunk(#[from] NoSuchChunk),
    /// The system refused an operation; the error names it and the path.
    #[error("the model files failed: {0}")]
    Io(#[from] io::Error),
}

/// What a run's versions consist of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelLayout {
    /// How the flat vector is cut.
    pub plan: ChunkPlan,
    /// How versions reach the sites.
    pub encoding: ModelEncoding,
    /// Whether the outer optimizer has momentum.
    pub momentum: bool,
    /// Whether it has a second moment.
    pub second_moment: bool,
    /// Fragments, of which each round changes one.
    pub fragments: u32,
}

impl ModelLayout {
    /// What makes `version`, from 1, of the one before.
    pub fn fragment(self, version: u32) -> Fragment {
        Fragment::of_round(self.plan, self.fragments, version)
    }

    /// Whether what rounding drops is kept for the next round.
    pub fn has_residual(self) -> bool {
        self.encoding.residual_decay().is_some()
    }

    /// The encoding of the update that makes `version` of the one before, if there is one.
    pub fn update_of(self, version: u32) -> Option<Encoding> {
        self.encoding.update().filter(|_| version > 0)
    }

    /// Bytes of one fp32 vector.
    fn vector_bytes(self) -> u64 {
        self.plan.parameters() * VALUE_BYTES
    }

    /// Bytes of chunk `index` of the update, and where they begin.
    fn update_place(self, index: u32) -> Result<(u64, usize), NoSuchChunk> {
        let codec = self.encoding.update().unwrap_or_default().codec();
        let stride = codec.encoded_bytes(self.plan.chunk_parameters() as usize) as u64;
        Ok((u64::from(index) * stride, codec.encoded_bytes(self.plan.length(index)?)))
    }

    /// Where chunk `index` begins in the file of that name.
    fn offset(self, name: &str, index: u32) -> Result<u64, NoSuchChunk> {
        if name == UPDATE_FILE {
            Ok(self.update_place(index)?.0)
        } else {
            Ok(self.plan.range(index)?.start * VALUE_BYTES)
        }
    }

    /// Bytes of the whole update.
    fn update_bytes(self) -> u64 {
        let last = self.plan.chunks().saturating_sub(1);
        self.update_place(last).map_or(0, |(offset, bytes)| offset + bytes as u64)
    }

    /// Bytes of all chunked files of `version`.
    pub(crate) fn version_bytes(self, version: u32) -> u64 {
        let optional = [self.momentum, self.second_moment, self.has_residual()].map(u64::from);
        let vectors = 1 + optional.iter().sum::<u64>();
        vectors * self.vector_bytes() + self.update_of(version).map_or(0, |_| self.update_bytes())
    }
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

    /// Opens a version. What it holds is verified chunk by chunk as it is read.
    ///
    /// # Errors
    /// [`ModelError::Missing`]; [`ModelError::Corrupt`] if its files do not have the sizes of `layout`.
    pub fn open(&self, run: &RunName, version: u32, layout: ModelLayout) -> Result<ModelVersion, ModelError> {
        let directory = self.directory(run, version);
        let place = Place { run: run.clone(), version, directory };
        if !place.directory.exists() {
            return Err(place.missing());
        }
        let parts = Parts::of(layout, version, |name, bytes| {
            Ok::<_, ModelError>(StoredPart { name, file: place.open(name, bytes)?, checksums: Vec::new() })
        })?;
        let count = parts.iter().count();
        let digests = place.read_digests(layout.plan.chunks(), count, layout.update_of(version).is_some())?;
        let parts = parts.with_checksums(digests.checksums);
        Ok(ModelVersion {
            digest: digests.whole,
            chunk_digests: digests.chunks,
            update_digests: digests.update,
            parts,
            place,
            layout,
        })
    }

    /// Whether the disk has that much left.
    pub(crate) fn has_room(&self, bytes: u64) -> Result<bool, ModelError> {
        // Before the first version there is no root.
        let existing = self.root.ancestors().find(|ancestor| ancestor.exists());
        Ok(fs4::available_space(existing.unwrap_or(Path::new(".")))? >= bytes)
    }

    /// Removes all versions of a run that was never recorded.
    pub(crate) fn remove_run(&self, run: &RunName) -> Result<(), ModelError> {
        Ok(atomic_file::remove_directory(&self.root.join(run.as_str()))?)
    }

    /// Starts to write a version, beside its place until [`NewVersion::finish`]. Its space is reserved, so
    /// that a full disk is found here and not half-way. A version has one writer at a time.
    ///
    /// # Errors
    /// [`ModelError::Full`], or the system's.
    pub fn begin(&self, run: &RunName, version: u32, layout: ModelLayout) -> Result<NewVersion, ModelError> {
        let place = Place { run: run.clone(), version, directory: self.directory(run, version) };
        let needed_bytes = layout.version_bytes(version);
        let files = atomic_file::create_partial_directory(&place.directory).and_then(|partial| {
            // Some filesystems fill up before they find that there is not enough.
            if fs4::available_space(&partial)? < needed_bytes {
                let _ = atomic_file::remove_directory(&partial);
                return Err(io::ErrorKind::StorageFull.into());
            }
            let files = NewFiles::create(partial, layout, version)?;
            Ok((Writeback::start(files.parts.clone())?, files))
        });
        match files {
            Ok((writeback, files)) => Ok(NewVersion::new(self.clone(), place, layout, files, writeback)),
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
    layout: ModelLayout,
    digest: Digest,
    chunk_digests: Vec<Digest>,
    update_digests: Vec<Digest>,
    parts: Parts<StoredPart>,
}

impl ModelVersion {
    /// The run.
    pub fn run(&self) -> &RunName {
        &self.place.run
    }

    /// What it consists of.
    pub fn layout(&self) -> ModelLayout {
        self.layout
    }

    /// How it is cut.
    pub fn plan(&self) -> ChunkPlan {
        self.layout.plan
    }

    /// The version: the round that made it, 0 for the initial one.
    pub fn version(&self) -> u32 {
        self.place.version
    }

    /// BLAKE3 over the flat fp32 little-endian vector, as recorded when it was written: the same however
    /// the vector is cut and sent.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The file that is the flat fp32 little-endian vector and nothing else.
    pub fn parameters_path(&self) -> PathBuf {
        self.place.directory.join(PARAMETERS_FILE)
    }

    /// The encoding of [`ModelVersion::chunk`].
    pub fn encoding(&self) -> Encoding {
        self.layout.encoding.whole()
    }

    /// The encoding of [`ModelVersion::update_chunk`], if there is an update.
    pub fn update_encoding(&self) -> Option<Encoding> {
        self.layout.update_of(self.place.version)
    }

    /// Chunk `index` of the parameters in the form in which the run's versions are sent whole, and the BLAKE3
    /// digest of these bytes. Decoding them gives exactly the version's parameters.
    ///
    /// # Errors
    /// If the chunk does not exist or is not what was written.
    pub fn chunk(&self, index: u32) -> Result<(Vec<u8>, Digest), ModelError> {
        let length = self.plan().length(index)?;
        let payload = if self.encoding() == Encoding::Fp32 {
            let mut payload = vec![0; length * VALUE_BYTES as usize];
            self.read(&self.parts.parameters, index, &mut payload)?;
            payload
        } else {
            let mut values = vec![0.0; length];
            self.read_parameters(index, &mut values)?;
            self.encoding().encode(&values)
        };
        Ok((payload, self.chunk_digests[index as usize]))
    }

    /// Chunk `index` of the encoded update: its decoded values, added in f32 to the parameters of the version
    /// before, give this version's. With the BLAKE3 digest of these bytes.
    ///
    /// # Errors
    /// [`ModelError::NoUpdate`]; or if the chunk does not exist or is not what was written.
    pub fn update_chunk(&self, index: u32) -> Result<(Vec<u8>, Digest), ModelError> {
        let Some(update) = &self.parts.update else {
            return Err(ModelError::NoUpdate { run: self.run().clone(), version: self.version() });
        };
        let mut payload = vec![0; self.layout.update_place(index)?.1];
        self.read(update, index, &mut payload)?;
        Ok((payload, self.update_digests[index as usize]))
    }

    /// The whole flat vector, from its beginning, a chunk in memory at a time.
    pub fn reader(&self) -> ModelBytes<'_> {
        ModelBytes::new(self)
    }

    /// Reads the parameters of chunk `index` into `values`, which has its length, and verifies them.
    pub(crate) fn read_parameters(&self, index: u32, values: &mut [f32]) -> Result<(), ModelError> {
        self.read(&self.parts.parameters, index, bytemuck::cast_slice_mut(values))
    }

    /// Like [`ModelVersion::read_parameters`] for the momentum.
    pub(crate) fn read_momentum(&self, index: u32, values: &mut [f32]) -> Result<(), ModelError> {
        self.read(self.part(&self.parts.momentum, MOMENTUM_FILE)?, index, bytemuck::cast_slice_mut(values))
    }

    /// Like [`ModelVersion::read_parameters`] for the second moment.
    pub(crate) fn read_second_moment(&self, index: u32, values: &mut [f32]) -> Result<(), ModelError> {
        let part = self.part(&self.parts.second_moment, SECOND_MOMENT_FILE)?;
        self.read(part, index, bytemuck::cast_slice_mut(values))
    }

    /// Like [`ModelVersion::read_parameters`] for the residual.
    pub(crate) fn read_residual(&self, index: u32, values: &mut [f32]) -> Result<(), ModelError> {
        self.read(self.part(&self.parts.residual, RESIDUAL_FILE)?, index, bytemuck::cast_slice_mut(values))
    }

    fn part<'a>(&self, part: &'a Option<StoredPart>, name: &str) -> Result<&'a StoredPart, ModelError> {
        part.as_ref().ok_or_else(|| self.place.corrupt(name, "the run's versions have none".to_owned()))
    }

    /// Reads chunk `index` of a part into `bytes`, which has its length, and verifies it.
    fn read(&self, part: &StoredPart, index: u32, bytes: &mut [u8]) -> Result<(), ModelError> {
        let StoredPart { name, file, checksums } = part;
        let offset = self.layout.offset(name, index)?;
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

#[cfg(test)]
mod tests;
