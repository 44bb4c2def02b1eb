//! The versions of the global model on disk.
//!
//! `<root>/<run>/<version>/` holds `parameters.f32` (the flat vector, fp32 little-endian),
//! `momentum.f32` (the outer optimizer's, where it has one) and `chunks.blake3`: 32-byte digests, of the
//! whole vector, of each of its chunks, and of each chunk of the momentum. Every chunk is verified whenever
//! it is read. A version is there whole or not at all; which versions are *committed* is the database's to
//! say: one above the newest committed is an orphan of a crash, and writing it again replaces it.
//!
//! Nothing here computes a model. Calls block: async callers use `spawn_blocking`.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use consort_common::{
    atomic_file,
    chunk::{ChunkPlan, NoSuchChunk},
    codec::Encoding,
    ids::{Digest, RunName},
    units,
};

const PARAMETERS_FILE: &str = "parameters.f32";
const MOMENTUM_FILE: &str = "momentum.f32";
const DIGESTS_FILE: &str = "chunks.blake3";
/// Bytes of one value.
const VALUE_BYTES: u64 = 4;
/// Bytes of one digest.
const DIGEST_BYTES: usize = 32;

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
        let mut bytes = Vec::with_capacity(parameters.len() * VALUE_BYTES as usize);
        let mut write = |file: &File, values: &[f32]| {
            bytes.clear();
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

/// The files of a version that is being written, in a directory beside its place.
#[derive(Debug)]
struct NewFiles {
    partial: PathBuf,
    vector_bytes: u64,
    parameters: File,
    momentum: Option<File>,
}

impl NewFiles {
    fn create(partial: PathBuf, vector_bytes: u64, momentum: bool) -> io::Result<Self> {
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

    fn bytes(&self) -> u64 {
        self.vector_bytes * (1 + u64::from(self.momentum.is_some()))
    }

    fn sync(&self) -> io::Result<()> {
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
struct Digests {
    whole: Digest,
    parameters: Vec<Digest>,
    /// Empty without momentum.
    momentum: Vec<Digest>,
}

impl Digests {
    fn to_bytes(&self) -> Vec<u8> {
        let all = [&self.whole].into_iter().chain(&self.parameters).chain(&self.momentum);
        all.flat_map(|digest| *digest.as_bytes()).collect()
    }

    fn from_bytes(bytes: &[u8], chunks: usize, momentum: bool) -> Option<Self> {
        let all: Result<Vec<_>, _> = bytes.chunks(DIGEST_BYTES).map(Digest::try_from).collect();
        let mut all =
            all.ok().filter(|all| all.len() == 1 + chunks * (1 + usize::from(momentum)))?.into_iter();
        let whole = all.next()?;
        Some(Self { whole, parameters: all.by_ref().take(chunks).collect(), momentum: all.collect() })
    }
}

/// Which version, and where it is.
#[derive(Debug)]
struct Place {
    run: RunName,
    version: u32,
    directory: PathBuf,
}

impl Place {
    fn missing(&self) -> ModelError {
        ModelError::Missing { run: self.run.clone(), version: self.version }
    }

    fn corrupt(&self, name: &str, reason: String) -> ModelError {
        let path = self.directory.join(name);
        ModelError::Corrupt { run: self.run.clone(), version: self.version, path, reason }
    }

    /// Opens a vector and checks its size; none if it is not there.
    fn open(&self, name: &str, plan: ChunkPlan) -> Result<Option<File>, ModelError> {
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

    fn read_digests(&self, plan: ChunkPlan, momentum: bool) -> Result<Digests, ModelError> {
        let bytes = fs::read(self.directory.join(DIGESTS_FILE))
            .map_err(|error| self.corrupt(DIGESTS_FILE, format!("it cannot be read: {error}")))?;
        Digests::from_bytes(&bytes, plan.chunks() as usize, momentum).ok_or_else(|| {
            let reason = format!("its {} bytes are not the digests of {} chunks", bytes.len(), plan.chunks());
            self.corrupt(DIGESTS_FILE, reason)
        })
    }

    fn decode(&self, name: &str, bytes: &[u8], values: &mut [f32]) -> Result<(), ModelError> {
        Encoding::Fp32.codec().decode(bytes, values).map_err(|error| self.corrupt(name, error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;

    fn run() -> RunName {
        "pilot".parse().unwrap()
    }

    fn models() -> (TempDir, ModelFiles) {
        let folder = tempfile::tempdir().unwrap();
        let models = ModelFiles::new(folder.path().join("models"));
        (folder, models)
    }

    fn ramp(length: u16) -> Vec<f32> {
        (0..length).map(|value| f32::from(value) - 3.5).collect()
    }

    fn bytes(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    fn files_of(models: &ModelFiles) -> Vec<String> {
        let mut names: Vec<_> = fs::read_dir(models.root.join("pilot"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    proptest! {
        #[test]
        fn a_model_has_one_digest_however_it_is_cut(length in 0u16..3000, chunk in 1u32..1200, momentum: bool) {
            let (_folder, models) = models();
            let (plan, values) = (ChunkPlan::new(length.into(), chunk), ramp(length));
            let version = models.create_initial(&run(), plan, &values, momentum).unwrap();
            prop_assert_eq!(version.digest(), Digest::of(&bytes(&values)));
            prop_assert_eq!(version.has_momentum(), momentum);

            let version = models.open(&run(), 0, plan).unwrap();
            let mut read = Vec::new();
            for index in 0..plan.chunks() {
                let (payload, digest) = version.chunk(index).unwrap();
                prop_assert_eq!(Digest::of(&payload), digest);
                read.extend(payload);
            }
            prop_assert_eq!(&read, &bytes(&values));
            prop_assert_eq!(fs::read(version.parameters_path()).unwrap(), read);
            prop_assert!(version.chunk(plan.chunks()).is_err());
        }
    }

    #[test]
    fn initial_momentum_is_zero() {
        let (_folder, models) = models();
        let version = models.create_initial(&run(), ChunkPlan::new(10, 4), &ramp(10), true).unwrap();
        let mut values = [1.0; 2];
        version.read_momentum(2, &mut Vec::new(), &mut values).unwrap();
        assert_eq!(values, [0.0; 2]);
    }

    #[test]
    fn an_orphan_is_replaced_and_an_unfinished_version_leaves_nothing() {
        let (_folder, models) = models();
        let plan = ChunkPlan::new(10, 4);
        models.create_initial(&run(), plan, &ramp(10), false).unwrap();
        models.create_initial(&run(), plan, &[7.0; 10], false).unwrap();
        assert_eq!(models.open(&run(), 0, plan).unwrap().chunk(0).unwrap().0, bytes(&[7.0; 4]));

        // As if killed while writing, then tried again, then given up.
        std::mem::forget(models.begin(&run(), 1, plan, false).unwrap());
        assert_eq!(files_of(&models), [".1.partial", "0"]);
        drop(models.begin(&run(), 1, plan, false).unwrap());
        assert_eq!(files_of(&models), ["0"]);
        assert!(matches!(models.open(&run(), 1, plan), Err(ModelError::Missing { version: 1, .. })));
    }

    fn write_version(models: &ModelFiles, version: u32, plan: ChunkPlan) -> ModelVersion {
        let new = models.begin(&run(), version, plan, false).unwrap();
        // Out of order, as several threads write.
        let mut digests: Vec<_> = (0..plan.chunks())
            .rev()
            .map(|index| new.write(index, &vec![0.5; plan.length(index).unwrap()], None).unwrap())
            .collect();
        digests.reverse();
        new.finish(&digests).unwrap()
    }

    #[test]
    fn retention_keeps_what_is_named_and_what_is_newer() {
        let (_folder, models) = models();
        for version in [0, 1, 2, 3, 11] {
            write_version(&models, version, ChunkPlan::new(10, 4));
        }
        models.retain(&run(), &[1, 3]).unwrap();
        assert_eq!(models.versions(&run()).unwrap(), [1, 3, 11]);
        models.retain(&run(), &[]).unwrap();
        assert_eq!(models.versions(&run()).unwrap(), [1, 3, 11]);
        assert!(models.versions(&"other".parse().unwrap()).unwrap().is_empty());
    }

    #[test]
    fn a_version_of_another_size_is_refused() {
        let (_folder, models) = models();
        write_version(&models, 1, ChunkPlan::new(10, 4));
        let error = models.open(&run(), 1, ChunkPlan::new(11, 4)).unwrap_err();
        assert!(matches!(error, ModelError::Corrupt { version: 1, .. }), "{error}");
    }

    #[test]
    fn an_open_version_stays_readable_when_it_is_retired() {
        let (_folder, models) = models();
        let plan = ChunkPlan::new(10, 4);
        let old = models.create_initial(&run(), plan, &ramp(10), false).unwrap();
        write_version(&models, 1, plan);
        models.retain(&run(), &[1]).unwrap();
        assert_eq!(models.versions(&run()).unwrap(), [1]);
        assert_eq!(old.chunk(2).unwrap().0, bytes(&ramp(10)[8..]));
    }

    /// Damages one file of a version with momentum; reading every chunk must say which file is damaged.
    fn check_damage(name: &str, damage: impl FnOnce(&mut Vec<u8>)) {
        let (_folder, models) = models();
        let plan = ChunkPlan::new(10, 4);
        models.create_initial(&run(), plan, &ramp(10), true).unwrap();
        let path = models.directory(&run(), 0).join(name);
        let mut content = fs::read(&path).unwrap();
        damage(&mut content);
        fs::write(&path, content).unwrap();
        let read_all = || -> Result<(), ModelError> {
            let version = models.open(&run(), 0, plan)?;
            for index in 0..plan.chunks() {
                let mut values = vec![0.0; plan.length(index)?];
                version.read_parameters(index, &mut Vec::new(), &mut values)?;
                version.read_momentum(index, &mut Vec::new(), &mut values)?;
            }
            Ok(())
        };
        let error = read_all().unwrap_err();
        assert!(matches!(error, ModelError::Corrupt { version: 0, .. }), "{error}");
    }

    #[test]
    fn damage_to_any_file_is_found() {
        for name in [PARAMETERS_FILE, MOMENTUM_FILE] {
            check_damage(name, |content| content[20] ^= 1);
            check_damage(name, |content| content.truncate(39));
            check_damage(name, |content| content.push(0));
        }
        check_damage(DIGESTS_FILE, |content| content[DIGEST_BYTES + 5] ^= 1);
        check_damage(DIGESTS_FILE, |content| content.truncate(DIGEST_BYTES * 4));
        check_damage(DIGESTS_FILE, Vec::clear);
    }

    #[test]
    fn a_version_that_does_not_fit_the_disk_is_refused_before_it_is_written() {
        let (_folder, models) = models();
        // 2^60 bytes: more than any disk here.
        let error = models.begin(&run(), 0, ChunkPlan::new(1 << 58, u32::MAX), true).unwrap_err();
        assert!(matches!(error, ModelError::Full { needed_bytes, .. } if needed_bytes == 1 << 61), "{error}");
        assert!(files_of(&models).is_empty());
    }
}
