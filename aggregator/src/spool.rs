//! The spool: uploaded delta chunks, durable before they are acknowledged.
//!
//! `<root>/<run>/<round>/<site>/<delta id>/<index>.chunk`, each the 32-byte BLAKE3 of the payload and the payload.
//! A chunk is there whole or not at all, and is verified again whenever it is read: the spool never
//! returns bytes that it did not accept. It does not know what a payload means, and decides neither who
//! may write nor when a round's chunks are no longer needed. Calls block: async callers use
//! `spawn_blocking`.

use std::{
    collections::HashSet,
    fmt,
    fs::{self, File},
    hash::{DefaultHasher, Hash, Hasher},
    io::{self, Read, Write},
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use consort_common::{
    atomic_file,
    ids::{DeltaId, Digest, RunName, SiteName},
    units,
};

/// Bytes that a chunk's file has before the payload.
const HEADER_BYTES: usize = 32;
/// Ending of a chunk's file name.
const CHUNK_SUFFIX: &str = ".chunk";
/// Directories from the one that holds the spool down to a site's, whose entries lead to a delta's chunks.
const DIRECTORY_LEVELS: usize = 5;
/// Chunks that are written at one time, at most.
const WRITERS_MAX: usize = 64;

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

/// Why the spool did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// The payload is not what its sender hashed.
    #[error(
        "chunk {index} of {key} was not stored: its bytes have the digest {actual}, not {claimed}; send it again"
    )]
    WrongDigest {
        /// Whose chunk.
        key: Box<ContributionKey>,
        /// Which chunk.
        index: u32,
        /// The digest that came with it.
        claimed: Digest,
        /// The digest that it has.
        actual: Digest,
    },
    /// There is no room; retrying later makes sense.
    #[error("chunk {index} of {key} was not stored: the aggregator's disk has {} left and {} are kept in reserve; retry when its operator has made room", units::bytes(*available_bytes), units::bytes(*reserve_bytes))]
    Full {
        /// Whose chunk.
        key: Box<ContributionKey>,
        /// Which chunk.
        index: u32,
        /// What the filesystem has left.
        available_bytes: u64,
        /// What must stay free.
        reserve_bytes: u64,
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
            Self::WrongDigest { index, .. }
            | Self::Full { index, .. }
            | Self::Missing { index, .. }
            | Self::Corrupt { index, .. } => *index,
            Self::Io(_) => 0,
        }
    }
}

/// The durable chunks of all runs.
#[derive(Debug)]
pub struct Spool {
    root: PathBuf,
    reserve_bytes: u64,
    /// Deltas whose directories this process knows to be durable; discarding removes them.
    prepared: Mutex<HashSet<ContributionKey>>,
    /// One is held while a chunk is written, chosen by its name: a path has one writer at a time.
    writers: [Mutex<()>; WRITERS_MAX],
}

impl Spool {
    /// A spool under `root`, which is created with the first chunk. No chunk is accepted that would leave
    /// less than `reserve_bytes` on its filesystem: what reduction and the database need to finish.
    pub fn new(root: impl Into<PathBuf>, reserve_bytes: u64) -> Self {
        Self {
            root: root.into(),
            reserve_bytes,
            prepared: Mutex::default(),
            writers: [const { Mutex::new(()) }; _],
        }
    }

    /// Stores a chunk; when this returns, it survives power loss. Storing the same chunk again changes
    /// nothing; another payload replaces it, and so does the same one over a damaged file.
    ///
    /// # Errors
    /// [`SpoolError::WrongDigest`], [`SpoolError::Full`], or the system's refusal. Nothing is stored then.
    pub fn put(
        &self,
        key: &ContributionKey,
        index: u32,
        payload: &[u8],
        digest: Digest,
    ) -> Result<(), SpoolError> {
        let actual = Digest::of(payload);
        if actual != digest {
            return Err(SpoolError::WrongDigest {
                key: Box::new(key.clone()),
                index,
                claimed: digest,
                actual,
            });
        }
        let path = self.chunk(key, index);
        let _writer = self.writer(&path);
        if self.holds(key, index, digest) {
            return Ok(());
        }
        self.check_space(key, index, payload.len() as u64)?;
        let stored = self.prepare_directory(key).and_then(|()| {
            atomic_file::write_atomically_with(&path, |file| {
                file.write_all(digest.as_bytes())?;
                file.write_all(payload)
            })
        });
        match stored {
            Err(error) if is_full(&error) => Err(self.full(key, index)?),
            stored => Ok(stored?),
        }
    }

    /// Indices of the chunks that are durable, ascending.
    pub fn held(&self, key: &ContributionKey) -> Result<Vec<u32>, SpoolError> {
        let names = names(&self.delta(key))?;
        let mut held: Vec<u32> =
            names.iter().filter_map(|name| name.strip_suffix(CHUNK_SUFFIX)?.parse().ok()).collect();
        held.sort_unstable();
        Ok(held)
    }

    /// Reads a chunk's payload into `payload`, replacing what that holds, and returns its digest.
    ///
    /// # Errors
    /// [`SpoolError::Missing`], [`SpoolError::Corrupt`] if it is not what was stored, or the system's.
    pub fn read(
        &self,
        key: &ContributionKey,
        index: u32,
        payload: &mut Vec<u8>,
    ) -> Result<Digest, SpoolError> {
        let (mut file, digest) = self.open(key, index)?;
        payload.clear();
        file.read_to_end(payload).map_err(|error| self.unreadable(key, index, &error))?;
        let actual = Digest::of(payload);
        if actual != digest {
            let reason = format!(
                "its {} bytes have the digest {}, not {}",
                payload.len(),
                actual.short(),
                digest.short()
            );
            return Err(SpoolError::Corrupt { key: Box::new(key.clone()), index, reason });
        }
        Ok(digest)
    }

    /// What identifies a delta of `chunks` chunks, and its size. Reads the chunks' digests only;
    /// [`Spool::read`] verifies payloads against them.
    pub fn summary(&self, key: &ContributionKey, chunks: u32) -> Result<DeltaSummary, SpoolError> {
        let mut hasher = blake3::Hasher::new();
        let mut bytes = 0;
        for index in 0..chunks {
            let (file, digest) = self.open(key, index)?;
            hasher.update(digest.as_bytes());
            let metadata = file.metadata().map_err(|error| self.unreadable(key, index, &error))?;
            bytes += metadata.len().saturating_sub(HEADER_BYTES as u64);
        }
        Ok(DeltaSummary { digest: hasher.finalize().into(), bytes })
    }

    /// Forgets what the site has spooled for the round under other delta ids than this one's: what a site
    /// can occupy stays bounded however often it computes its delta anew.
    pub fn discard_other_deltas(&self, key: &ContributionKey) -> Result<(), SpoolError> {
        let same_site = |other: &ContributionKey| {
            (&other.run, other.round, &other.site) == (&key.run, key.round, &key.site)
        };
        for name in names(&self.site(key))? {
            if name != key.delta.to_string() {
                self.discard(&self.site(key).join(&name), |other| {
                    same_site(other) && other.delta.to_string() == name
                })?;
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

    /// Forgets all of a run's deltas.
    pub fn discard_run(&self, run: &RunName) -> Result<(), SpoolError> {
        self.discard(&self.run(run), |key| key.run == *run)
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

    fn delta(&self, key: &ContributionKey) -> PathBuf {
        self.site(key).join(key.delta.to_string())
    }

    fn chunk(&self, key: &ContributionKey, index: u32) -> PathBuf {
        self.delta(key).join(format!("{index:08}{CHUNK_SUFFIX}"))
    }

    fn writer(&self, path: &Path) -> MutexGuard<'_, ()> {
        let mut hasher = DefaultHasher::new();
        path.hash(&mut hasher);
        #[allow(clippy::cast_possible_truncation)] // less than WRITERS_MAX
        let writer = (hasher.finish() % WRITERS_MAX as u64) as usize;
        self.writers[writer].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Creates a delta's directory and makes the entries that lead to it durable, once per process: one
    /// that was killed may not have come to that. The lock is held meanwhile, since no other chunk of the
    /// delta may be acknowledged before.
    fn prepare_directory(&self, key: &ContributionKey) -> io::Result<()> {
        let mut prepared = self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        if !prepared.contains(key) {
            let directory = self.delta(key);
            fs::create_dir_all(&directory)?;
            for ancestor in directory.ancestors().skip(1).take(DIRECTORY_LEVELS) {
                // The parent of a bare name is written as nothing.
                let here = ancestor.as_os_str().is_empty();
                atomic_file::sync_directory(if here { Path::new(".") } else { ancestor })?;
            }
            prepared.insert(key.clone());
        }
        Ok(())
    }

    fn discard(&self, directory: &Path, which: impl Fn(&ContributionKey) -> bool) -> Result<(), SpoolError> {
        // Locked, so that no directory is prepared while it is removed.
        let mut prepared = self.prepared.lock().unwrap_or_else(PoisonError::into_inner);
        prepared.retain(|key| !which(key));
        Ok(atomic_file::remove_directory(directory)?)
    }

    /// Whether the chunk is there, undamaged, with this digest. One that cannot be read is not: it is then
    /// written again.
    fn holds(&self, key: &ContributionKey, index: u32, digest: Digest) -> bool {
        self.read(key, index, &mut Vec::new()).is_ok_and(|held| held == digest)
    }

    fn open(&self, key: &ContributionKey, index: u32) -> Result<(File, Digest), SpoolError> {
        let mut file = match File::open(self.chunk(key, index)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(SpoolError::Missing { key: Box::new(key.clone()), index });
            }
            file => file.map_err(|error| self.unreadable(key, index, &error))?,
        };
        let mut header = [0; HEADER_BYTES];
        match file.read_exact(&mut header) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                let reason = format!("it is shorter than its header of {HEADER_BYTES} bytes");
                return Err(SpoolError::Corrupt { key: Box::new(key.clone()), index, reason });
            }
            read => read.map_err(|error| self.unreadable(key, index, &error))?,
        }
        Ok((file, blake3::Hash::from_bytes(header).into()))
    }

    /// A medium that fails is damage to one chunk, which can be left out, and not of the whole spool.
    fn unreadable(&self, key: &ContributionKey, index: u32, error: &io::Error) -> SpoolError {
        let reason = format!("{} cannot be read: {error}", self.chunk(key, index).display());
        SpoolError::Corrupt { key: Box::new(key.clone()), index, reason }
    }

    fn check_space(&self, key: &ContributionKey, index: u32, payload_bytes: u64) -> Result<(), SpoolError> {
        let needed = payload_bytes.saturating_add(HEADER_BYTES as u64).saturating_add(self.reserve_bytes);
        if self.available_bytes()? < needed { Err(self.full(key, index)?) } else { Ok(()) }
    }

    fn full(&self, key: &ContributionKey, index: u32) -> Result<SpoolError, SpoolError> {
        let available_bytes = self.available_bytes()?;
        Ok(SpoolError::Full {
            key: Box::new(key.clone()),
            index,
            available_bytes,
            reserve_bytes: self.reserve_bytes,
        })
    }

    /// What an unprivileged process may still write. Before the first chunk there is no root; the
    /// filesystem is then that of the directory where it will be.
    fn available_bytes(&self) -> io::Result<u64> {
        let existing = self.root.ancestors().find(|ancestor| ancestor.exists());
        fs4::available_space(existing.unwrap_or(Path::new(".")))
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
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
