//! The versions of the global model on disk.
//!
//! `<root>/<run>/<version>/` holds `parameters.f32` (the flat vector, fp32 little-endian),
//! `momentum.f32` (the outer optimizer's, where it has one) and `chunks.blake3`: 32-byte digests, of the
//! whole vector, of each of its chunks, and of each chunk of the momentum. Every chunk is verified whenever
//! it is read. A version is there whole or not at all; which versions are *committed* is the database's to
//! say: one above the newest committed is an orphan of a crash, and writing it again replaces it.
//!
//! Nothing here computes a model. Calls block: async callers use `spawn_blocking`.

mod files;

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::FileExt,
    path::PathBuf,
};

use consort_common::{
    atomic_file,
    chunk::{ChunkPlan, NoSuchChunk},
    codec::Encoding,
    ids::{Digest, RunName},
    units,
};

use self::files::{DIGESTS_FILE, Digests, MOMENTUM_FILE, NewFiles, PARAMETERS_FILE, Place};

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

    /// Writes version 0: `values`, and a momentum of zeros if the outer optimizer has one. To be called
    /// before the run is recorded, never after: it replaces a version 0 that is there.
    pub fn create_initial(
        &self,
        run: &RunName,
        plan: ChunkPlan,
        values: &[f32],
        momentum: bool,
    ) -> Result<ModelVersion, ModelError> {
        let version = self.begin(run, 0, plan, momentum)?;
        let mut rest = values;
        let mut digests = Vec::new();
        for index in 0..plan.chunks() {
            let (chunk, tail) = rest.split_at(plan.length(index)?);
            let zeros = momentum.then(|| vec![0.0; chunk.len()]);
            digests.push(version.write(index, chunk, zeros.as_deref())?);
            rest = tail;
        }
        version.finish(&digests)
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
        Ok(ModelVersion { place, plan, parameters, momentum, digests })
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
    parameters: File,
    momentum: Option<File>,
    digests: Digests,
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
        self.digests.whole
    }

    /// The file that is the flat fp32 little-endian vector and nothing else. A reader that does not go by
    /// chunks compares what it read with [`ModelVersion::digest`].
    pub fn parameters_path(&self) -> PathBuf {
        self.place.directory.join(PARAMETERS_FILE)
    }

    /// Whether the outer optimizer's momentum is beside the parameters.
    pub fn has_momentum(&self) -> bool {
        self.momentum.is_some()
    }

    /// The parameters of chunk `index`, fp32 little-endian, and their digest, against which they were
    /// verified.
    ///
    /// # Errors
    /// If the chunk does not exist or is not what was written.
    pub fn chunk(&self, index: u32) -> Result<(Vec<u8>, Digest), ModelError> {
        let mut payload = Vec::new();
        let digest =
            self.read(&self.parameters, PARAMETERS_FILE, &self.digests.parameters, index, &mut payload)?;
        Ok((payload, digest))
    }

    /// Reads the parameters of chunk `index` into `values`, which has its length, by way of `bytes`.
    pub(crate) fn read_parameters(
        &self,
        index: u32,
        bytes: &mut Vec<u8>,
        values: &mut [f32],
    ) -> Result<(), ModelError> {
        self.read(&self.parameters, PARAMETERS_FILE, &self.digests.parameters, index, bytes)?;
        self.place.decode(PARAMETERS_FILE, bytes, values)
    }

    /// Like [`ModelVersion::read_parameters`] for the momentum.
    pub(crate) fn read_momentum(
        &self,
        index: u32,
        bytes: &mut Vec<u8>,
        values: &mut [f32],
    ) -> Result<(), ModelError> {
        let Some(momentum) = &self.momentum else {
            return Err(self
                .place
                .corrupt(MOMENTUM_FILE, "the outer optimizer's state is not there".to_owned()));
        };
        self.read(momentum, MOMENTUM_FILE, &self.digests.momentum, index, bytes)?;
        self.place.decode(MOMENTUM_FILE, bytes, values)
    }

    fn read(
        &self,
        file: &File,
        name: &str,
        digests: &[Digest],
        index: u32,
        bytes: &mut Vec<u8>,
    ) -> Result<Digest, ModelError> {
        bytes.clear();
        bytes.resize(self.plan.length(index)? * VALUE_BYTES as usize, 0);
        let offset = self.plan.range(index)?.start * VALUE_BYTES;
        file.read_exact_at(bytes, offset)
            .map_err(|error| self.place.corrupt(name, format!("chunk {index} cannot be read: {error}")))?;
        let (expected, actual) = (digests[index as usize], Digest::of(bytes));
        if actual != expected {
            let reason = format!("chunk {index} has the digest {}, not {}", actual.short(), expected.short());
            return Err(self.place.corrupt(name, reason));
        }
        Ok(expected)
    }
}

/// What the two vectors of one written chunk hash to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ChunkDigests {
    parameters: Digest,
    momentum: Option<Digest>,
}

/// A version that is being written. Dropped unfinished, it leaves nothing.
#[derive(Debug)]
pub struct NewVersion {
    models: ModelFiles,
    place: Place,
    plan: ChunkPlan,
    files: NewFiles,
}

impl NewVersion {
    /// Writes chunk `index`; several threads may write different chunks at a time. `momentum` is there if
    /// the version has one.
    pub(crate) fn write(
        &self,
        index: u32,
        parameters: &[f32],
        momentum: Option<&[f32]>,
    ) -> Result<ChunkDigests, ModelError> {
        let offset = self.plan.range(index)?.start * VALUE_BYTES;
        let mut bytes = vec![0; parameters.len() * VALUE_BYTES as usize];
        let mut write = |file: &File, values: &[f32]| {
            Encoding::Fp32.codec().encode(values, &mut bytes);
            let written = file.write_all_at(&bytes, offset);
            written.map(|()| Digest::of(&bytes)).map_err(|error| self.explain(error))
        };
        let parameters = write(&self.files.parameters, parameters)?;
        let momentum = match (&self.files.momentum, momentum) {
            (Some(file), Some(values)) => Some(write(file, values)?),
            _ => None,
        };
        Ok(ChunkDigests { parameters, momentum })
    }

    /// Makes the version durable and puts it in its place, with the digests of its chunks in order.
    pub(crate) fn finish(self, chunks: &[ChunkDigests]) -> Result<ModelVersion, ModelError> {
        self.files.sync().map_err(|error| self.explain(error))?;
        // Read back, which costs a pass over cached pages: chunks may have been written in any order.
        let mut whole = blake3::Hasher::new();
        whole.update_mmap_rayon(self.files.partial.join(PARAMETERS_FILE))?;
        let digests = Digests {
            whole: whole.finalize().into(),
            parameters: chunks.iter().map(|chunk| chunk.parameters).collect(),
            momentum: chunks.iter().filter_map(|chunk| chunk.momentum).collect(),
        };
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

#[cfg(test)]
mod tests;
