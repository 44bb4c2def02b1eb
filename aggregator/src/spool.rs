//! The spool: uploaded deltas, durable before they are acknowledged.
//!
//! `<root>/<run>/<round>/<site>/<delta id>.delta`, each a file with a place for every chunk (see `delta`).
//! A chunk is there whole or not at all, and is verified again whenever it is read: the spool never
//! returns bytes that it did not accept. It does not know what a payload means, and decides neither who
//! may write nor when a round's deltas are no longer needed. Calls block: async callers use
//! `spawn_blocking`.
//!
//! Sketch: a file per chunk would cost two syncs and a directory entry each, which on a disk that writes
//! 1 GB/s is most of the time at 1 MiB. Here one sync covers all chunks that came while the last one ran.

mod delta;

use std::{
    collections::BTreeMap,
    fmt,
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use consort_common::{
    atomic_file,
    ids::{DeltaId, Digest, RunName, SiteName},
    units,
};

pub use self::delta::{DeltaLayout, SpooledDelta};

/// Ending of a delta's file name.
const DELTA_SUFFIX: &str = ".delta";
/// Directories from a delta's own up to the one that holds the spool, whose entries lead to the delta.
const DIRECTORY_LEVELS: usize = 5;
/// What the system counts a file's blocks in, whatever their size.
const BLOCK_BYTES: u64 = 512;

/// Which delta a chunk belongs to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContributionKey {
    /// The run.
    pub run: RunName,
    /// The round, from 1.
    pub round: u32,
    /// The site that trained.
    pub site: SiteName,
    /// Drawn by the site when it computed the delta: chunks of two deltas are never mixed.
    pub delta: DeltaId,
}

impl fmt::Display for ContributionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}'s delta for round {} of run {}", self.site, self.round, self.run)
    }
}

/// A complete delta, as spooled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeltaSummary {
    /// BLAKE3 over its chunks' digests, in chunk order.
    pub digest: Digest,
    /// Total of its encoded chunks' lengths.
    pub bytes: u64,
}

/// What a spool may occupy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SpoolLimits {
    /// What stays free on the filesystem, for reduction and the database to finish.
    pub disk_reserve_bytes: u64,
    /// Most that all deltas take together; 0: what the disk has.
    pub total_bytes_max: u64,
    /// Most that the deltas of one site take together; 0: what the disk has.
    pub site_bytes_max: u64,
}

/// What there is no room under.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// The filesystem.
    Disk {
        /// What it has left.
        available_bytes: u64,
        /// What must stay free.
        reserve_bytes: u64,
    },
    /// The bound for all sites together.
    Total {
        /// As configured.
        bytes_max: u64,
    },
    /// The bound for each site.
    Site {
        /// As configured.
        bytes_max: u64,
    },
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk { available_bytes, reserve_bytes } => write!(
                f,
                "the aggregator's disk has {} left and {} are kept in reserve",
                units::bytes(*available_bytes),
                units::bytes(*reserve_bytes)
            ),
            Self::Total { bytes_max } => {
                write!(
                    f,
                    "the deltas of all sites may take {} (limits.spool_bytes_max)",
                    units::bytes(*bytes_max)
                )
            }
            Self::Site { bytes_max } => {
                write!(
                    f,
                    "the deltas of a site may take {} (limits.spool_bytes_per_site_max)",
                    units::bytes(*bytes_max)
                )
            }
        }
    }
}

/// Why the spool did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// There is no room; retrying later makes sense.
    #[error("{key} was not stored: {bound}; retry when the aggregator's operator has made room")]
    Full {
        /// Whose delta.
        key: Box<ContributionKey>,
        /// What it does not fit under.
        bound: Bound,
    },
    /// The delta is accepted and does not change any more.
    #[error("{key} is being accepted and takes no further chunks")]
    Sealed {
        /// Whose delta.
        key: Box<ContributionKey>,
    },
    /// The chunk was never stored, or its round was discarded.
    #[error("chunk {index} of {key} is not in the spool")]
    Missing {
        /// Whose chunk.
        key: Box<ContributionKey>,
        /// Which chunk.
        index: u32,
    },
    /// The chunk changed on disk after it was stored.
    #[error(
        "chunk {index} of {key} is damaged on the aggregator's disk ({reason}); it must be sent again or left out"
    )]
    Corrupt {
        /// Whose chunk.
        key: Box<ContributionKey>,
        /// Which chunk.
        index: u32,
        /// What is wrong with it.
        reason: String,
    },
    /// The system refused an operation; the error names it and the path.
    #[error("the spool failed: {0}")]
    Io(#[from] io::Error),
}

impl SpoolError {
    /// The chunk that the error is about; 0 where it is about none.
    pub(crate) fn chunk(&self) -> u32 {
        match self {
            Self::Missing { index, .. } | Self::Corrupt { index, .. } => *index,
            Self::Full { .. } | Self::Sealed { .. } | Self::Io(_) => 0,
        }
    }
}

/// A delta's place in the table of open ones: locked while it is opened, which can take a while.
type Place = Arc<Mutex<Option<Arc<SpooledDelta>>>>;

/// The deltas of all runs that wait to be averaged.
#[derive(Debug)]
pub struct Spool {
    root: PathBuf,
    limits: SpoolLimits,
    /// Deltas that this process has opened, until they are discarded.
    open: Mutex<BTreeMap<ContributionKey, Place>>,
    /// Held while space is counted and taken, so that no two take the same.
    space: Mutex<()>,
}

impl Spool {
    /// A spool under `root`, which is created with the first delta.
    pub fn new(root: impl Into<PathBuf>, limits: SpoolLimits) -> Self {
        Self { root: root.into(), limits, open: Mutex::default(), space: Mutex::new(()) }
    }

    /// The site's delta of that key, to be received: its space is taken and its name is durable. What an
    /// earlier process stored of it is verified and held.
    ///
    /// # Errors
    /// [`SpoolError::Full`], or the system's refusal. Nothing is stored then.
    pub fn receive(
        &self,
        key: &ContributionKey,
        layout: DeltaLayout,
    ) -> Result<Arc<SpooledDelta>, SpoolError> {
        self.open(key, layout, || self.create(key, layout))
    }

    /// The delta of that key, to be read.
    ///
    /// # Errors
    /// [`SpoolError::Missing`] with its first chunk if there is none, or the system's refusal.
    pub fn stored(
        &self,
        key: &ContributionKey,
        layout: DeltaLayout,
    ) -> Result<Arc<SpooledDelta>, SpoolError> {
        self.open(key, layout, || match File::options().read(true).write(true).open(self.path(key)) {
            Ok(file) if file.metadata()?.len() >= layout.file_bytes() => Ok(file),
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
            _ => Err(SpoolError::Missing { key: Box::new(key.clone()), index: 0 }),
        })
    }

    fn open(
        &self,
        key: &ContributionKey,
        layout: DeltaLayout,
        file: impl FnOnce() -> Result<File, SpoolError>,
    ) -> Result<Arc<SpooledDelta>, SpoolError> {
        let place = lock(&self.open).entry(key.clone()).or_default().clone();
        let mut place = lock(&place);
        if let Some(delta) = place.as_ref().filter(|delta| delta.layout() == layout) {
            return Ok(delta.clone());
        }
        let delta = Arc::new(SpooledDelta::open(key.clone(), layout, file()?)?);
        *place = Some(delta.clone());
        Ok(delta)
    }

    /// Creates or takes up the delta's file at its full length, and makes the entries that lead to it
    /// durable: a process that was killed may not have come to that.
    fn create(&self, key: &ContributionKey, layout: DeltaLayout) -> Result<File, SpoolError> {
        let path = self.path(key);
        let directory = self.site(key);
        fs::create_dir_all(&directory)?;
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&path)?;
        if let Err(error) = self.take_space(key, &file, layout) {
            // An empty file says nothing; one with chunks is what a retry goes on with.
            if file.metadata()?.len() == 0 {
                let _ = fs::remove_file(&path);
            }
            return Err(error);
        }
        for ancestor in directory.ancestors().take(DIRECTORY_LEVELS) {
            // The parent of a bare name is written as nothing.
            let here = ancestor.as_os_str().is_empty();
            atomic_file::sync_directory(if here { Path::new(".") } else { ancestor })?;
        }
        Ok(file)
    }

    /// Takes what the delta lacks of its space, so that a full disk is found now and not half-way.
    fn take_space(&self, key: &ContributionKey, file: &File, layout: DeltaLayout) -> Result<(), SpoolError> {
        let _space = lock(&self.space);
        let taken_bytes = file.metadata()?.blocks() * BLOCK_BYTES;
        let wanted_bytes = layout.file_bytes();
        let bytes = wanted_bytes.saturating_sub(taken_bytes);
        self.check_space(key, bytes)?;
        if file.metadata()?.len() < wanted_bytes {
            match fs4::FileExt::allocate(file, wanted_bytes) {
                // Some network filesystems cannot reserve; the writes then find out.
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
                Err(error) if is_full(&error) => {
                    return Err(self.full(key, self.disk()?));
                }
                allocated => allocated?,
            }
            file.set_len(wanted_bytes)?;
        }
        Ok(())
    }

    fn check_space(&self, key: &ContributionKey, bytes: u64) -> Result<(), SpoolError> {
        let disk = self.disk()?;
        let SpoolLimits { disk_reserve_bytes, total_bytes_max, site_bytes_max } = self.limits;
        if let Bound::Disk { available_bytes, .. } = disk
            && available_bytes < bytes.saturating_add(disk_reserve_bytes)
        {
            return Err(self.full(key, disk));
        }
        if total_bytes_max > 0 && allocated_bytes(&self.root)?.saturating_add(bytes) > total_bytes_max {
            return Err(self.full(key, Bound::Total { bytes_max: total_bytes_max }));
        }
        if site_bytes_max > 0 && allocated_bytes(&self.site(key))?.saturating_add(bytes) > site_bytes_max {
            return Err(self.full(key, Bound::Site { bytes_max: site_bytes_max }));
        }
        Ok(())
    }

    /// Forgets what the site has spooled for the round under other delta ids than this one's: what a site
    /// can occupy stays bounded however often it computes its delta anew.
    pub fn discard_other_deltas(&self, key: &ContributionKey) -> Result<(), SpoolError> {
        let mine = self.path(key);
        for name in names(&self.site(key))? {
            let path = self.site(key).join(name);
            if path != mine {
                self.discard(&path, |other| self.path(other) == path)?;
            }
        }
        Ok(())
    }

    /// Forgets a round's deltas.
    pub fn discard_round(&self, run: &RunName, round: u32) -> Result<(), SpoolError> {
        self.discard(&self.round(run, round), |key| key.run == *run && key.round == round)
    }

    /// Forgets the deltas of all rounds of a run up to `round`, which included.
    pub fn discard_rounds_through(&self, run: &RunName, round: u32) -> Result<(), SpoolError> {
        let rounds = names(&self.run(run))?;
        rounds
            .iter()
            .filter_map(|name| name.parse::<u32>().ok())
            .filter(|spooled| *spooled <= round)
            .try_for_each(|spooled| self.discard_round(run, spooled))
    }

    fn run(&self, run: &RunName) -> PathBuf {
        self.root.join(run.as_str())
    }

    fn round(&self, run: &RunName, round: u32) -> PathBuf {
        self.run(run).join(round.to_string())
    }

    fn site(&self, key: &ContributionKey) -> PathBuf {
        self.round(&key.run, key.round).join(key.site.as_str())
    }

    fn path(&self, key: &ContributionKey) -> PathBuf {
        self.site(key).join(format!("{}{DELTA_SUFFIX}", key.delta))
    }

    /// Those that use the deltas go on with files that have no name any more.
    fn discard(&self, path: &Path, which: impl Fn(&ContributionKey) -> bool) -> Result<(), SpoolError> {
        lock(&self.open).retain(|key, _| !which(key));
        if path.is_file() {
            fs::remove_file(path)?;
            return Ok(());
        }
        Ok(atomic_file::remove_directory(path)?)
    }

    fn full(&self, key: &ContributionKey, bound: Bound) -> SpoolError {
        SpoolError::Full { key: Box::new(key.clone()), bound }
    }

    fn disk(&self) -> io::Result<Bound> {
        let available_bytes = available_bytes(&self.root)?;
        Ok(Bound::Disk { available_bytes, reserve_bytes: self.limits.disk_reserve_bytes })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What an unprivileged process may still write. Before the first delta there is no root; the filesystem
/// is then that of the directory where it will be.
fn available_bytes(root: &Path) -> io::Result<u64> {
    let existing = root.ancestors().find(|ancestor| ancestor.exists());
    fs4::available_space(existing.unwrap_or(Path::new(".")))
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// What the files under a directory take on disk.
fn allocated_bytes(directory: &Path) -> io::Result<u64> {
    let mut bytes = 0;
    for name in names(directory)? {
        let path = directory.join(name);
        bytes += match fs::metadata(&path) {
            Ok(metadata) if metadata.is_dir() => allocated_bytes(&path)?,
            Ok(metadata) => metadata.blocks() * BLOCK_BYTES,
            // Discarded meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
            Err(error) => return Err(error),
        };
    }
    Ok(bytes)
}

/// The names in a directory that are text, as all of the spool's are; none if it does not exist.
fn names(directory: &Path) -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let names = entries.map(|entry| entry.map(|entry| entry.file_name().into_string().ok()));
    names.filter_map(Result::transpose).collect()
}

#[cfg(test)]
mod tests;
