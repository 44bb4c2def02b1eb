//! The folder of prepared data: one sub-folder per key, complete or absent.
//!
//! ```text
//! lock                 held while data is prepared
//! preparing/           what is being written; a leftover of a killed process is removed
//! KEY/train-0.tokens   KEY: 64 hexadecimal digits, what the content follows from; one file for each source
//! KEY/held_out.tokens  of all sources
//! KEY/stats.json
//! ```
//!
//! A folder gets its name only when its files are on disk. Nothing in a named folder is ever written again,
//! which is what makes it safe to map: it is only unlinked, whole.

use std::{
    fs::{self, File, TryLockError},
    path::{Path, PathBuf},
    time::SystemTime,
};

use consort_common::{
    atomic_file::{remove_directory, rename_directory_into_place, write_durably},
    ids::Digest,
};

use super::{
    error::DataError,
    shard::{Shard, ShardWriter},
    stats::Stats,
};

/// Keys that are kept, the last used first: a few runs, or versions of the text, in turn.
const KEYS_KEPT: usize = 4;
const LOCK: &str = "lock";
const PREPARING: &str = "preparing";
pub(super) const HELD_OUT: &str = "held_out.tokens";
const STATS: &str = "stats.json";

/// The file with the training text of a source.
pub(super) fn train(source: usize) -> String {
    format!("train-{source}.tokens")
}

/// A cache that this process alone prepares in.
pub(super) struct Cache {
    folder: PathBuf,
    /// Locked until dropped.
    _lock: File,
}

/// The shards while they are written.
pub(super) struct Writers {
    /// By source.
    pub(super) train: Vec<ShardWriter>,
    pub(super) held_out: ShardWriter,
}

/// The shards and what was found when they were made.
pub(super) struct Prepared {
    /// By source.
    pub(super) train: Vec<Shard>,
    pub(super) held_out: Shard,
    pub(super) stats: Stats,
}

/// The folder being written; removed when dropped, unless it was committed.
pub(super) struct Preparing<'a> {
    cache: &'a Cache,
    folder: PathBuf,
}

impl Cache {
    /// Makes the folder if needed and locks it.
    ///
    /// # Errors
    /// [`DataError::Busy`] if another process has it, [`DataError::Cache`] if it cannot be made.
    pub(super) fn open(folder: &Path) -> Result<Self, DataError> {
        let cannot_create = |error| DataError::cache("create", folder, 0, error);
        fs::create_dir_all(folder).map_err(cannot_create)?;
        let lock = File::create(folder.join(LOCK)).map_err(cannot_create)?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { folder: folder.to_owned(), _lock: lock }),
            Err(TryLockError::WouldBlock) => Err(DataError::Busy { path: folder.to_owned() }),
            Err(TryLockError::Error(error)) => Err(DataError::cache("lock", folder, 0, error)),
        }
    }

    fn key_folder(&self, key: &Digest) -> PathBuf {
        self.folder.join(key.to_string())
    }

    /// What was prepared before of so many sources under `key`, if it is there and whole. Damage is logged and
    /// counts as absence.
    pub(super) fn reuse(&self, key: &Digest, sources: usize) -> Option<Prepared> {
        let folder = self.key_folder(key);
        if !folder.exists() {
            return None;
        }
        match load(&folder) {
            Ok(prepared) if prepared.train.len() != sources => {
                tracing::warn!(folder = %folder.display(), "prepared data is of other sources and is made anew");
                None
            }
            Ok(prepared) => {
                mark_used(&folder);
                Some(prepared)
            }
            Err(error) => {
                tracing::warn!(%error, "prepared data cannot be used again and is made anew");
                None
            }
        }
    }

    /// Begins to write; whatever a killed process left is removed.
    pub(super) fn prepare(&self) -> Result<Preparing<'_>, DataError> {
        let folder = self.folder.join(PREPARING);
        remove(&folder)?;
        fs::create_dir(&folder).map_err(|error| DataError::cache("create", &folder, 0, error))?;
        Ok(Preparing { cache: self, folder })
    }

    /// Removes all but the newest keys. What cannot be removed is logged: it is only in the way.
    fn prune(&self) {
        for (_, path) in keys(&self.folder).into_iter().flatten().skip(KEYS_KEPT) {
            if let Err(error) = remove(&path) {
                tracing::warn!(%error, "old prepared data stays");
            }
        }
    }
}

impl Preparing<'_> {
    /// The shards of so many sources, empty. What was written before is gone.
    pub(super) fn writers(&self, sources: usize, vocabulary: usize) -> Result<Writers, DataError> {
        let create = |source| ShardWriter::create(self.folder.join(train(source)), vocabulary);
        Ok(Writers {
            train: (0..sources).map(create).collect::<Result<_, _>>()?,
            held_out: ShardWriter::create(self.folder.join(HELD_OUT), vocabulary)?,
        })
    }

    /// Makes everything durable, then visible under `key`, and drops the oldest keys.
    pub(super) fn commit(self, writers: Writers, stats: &Stats, key: &Digest) -> Result<Prepared, DataError> {
        for writer in writers.train {
            writer.finish()?;
        }
        writers.held_out.finish()?;
        self.write_stats(stats)?;
        let named = self.cache.key_folder(key);
        rename_directory_into_place(&self.folder, &named)
            .map_err(|error| DataError::cache("create", &named, 0, error))?;
        mark_used(&named);
        self.cache.prune();
        load(&named)
    }

    fn write_stats(&self, stats: &Stats) -> Result<(), DataError> {
        let path = self.folder.join(STATS);
        write_durably(&path, |file| Ok(serde_json::to_writer_pretty(file, stats)?))
            .map_err(|error| DataError::cache("write", &path, 0, error))
    }
}

impl Drop for Preparing<'_> {
    /// After a commit there is nothing under this name.
    fn drop(&mut self) {
        if let Err(error) = remove(&self.folder) {
            tracing::warn!(%error, "half-prepared data stays until the next start");
        }
    }
}

/// Maps what lies in a key's folder.
fn load(folder: &Path) -> Result<Prepared, DataError> {
    let stats = load_stats(folder)?;
    let open = |name: String, tokens: u64| Shard::open(&folder.join(name))?.expect_tokens(tokens);
    let train =
        stats.sources.iter().enumerate().map(|(index, source)| open(train(index), source.train.tokens));
    Ok(Prepared {
        train: train.collect::<Result<_, _>>()?,
        held_out: open(HELD_OUT.to_owned(), stats.total().held_out.tokens)?,
        stats,
    })
}

/// What was found when a key's folder was prepared.
pub(super) fn load_stats(folder: &Path) -> Result<Stats, DataError> {
    let path = folder.join(STATS);
    let json = fs::read(&path).map_err(|error| DataError::cache("open", &path, 0, error))?;
    serde_json::from_slice(&json).map_err(|error| DataError::Corrupt { path, reason: error.to_string() })
}

/// The folders in a cache that have a key's name, the last used first; they may be damaged.
///
/// # Errors
/// If the cache is missing or unreadable.
pub(super) fn keys(cache: &Path) -> Result<Vec<(Digest, PathBuf)>, DataError> {
    let entries = fs::read_dir(cache).map_err(|error| DataError::cache("open", cache, 0, error))?;
    let mut keys: Vec<(SystemTime, Digest, PathBuf)> = entries
        .filter_map(Result::ok)
        .filter_map(|entry| {
            let key = entry.file_name().to_str()?.parse().ok()?;
            Some((entry.metadata().ok()?.modified().ok()?, key, entry.path()))
        })
        .collect();
    keys.sort_by(|a, b| (b.0, &b.2).cmp(&(a.0, &a.2)));
    Ok(keys.into_iter().map(|(_, key, path)| (key, path)).collect())
}

fn remove(folder: &Path) -> Result<(), DataError> {
    remove_directory(folder).map_err(|error| DataError::cache("remove", folder, 0, error))
}

/// The folder's time says when it was last used; not knowing it only makes a worse choice when pruning.
fn mark_used(folder: &Path) {
    if let Err(error) = File::open(folder).and_then(|file| file.set_modified(SystemTime::now())) {
        tracing::debug!(%error, "the time of last use was not recorded");
    }
}
