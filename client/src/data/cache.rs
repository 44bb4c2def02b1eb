//! The folder of prepared data: one sub-folder per key, complete or absent.
//!
//! ```text
//! lock                 held while data is prepared
//! preparing/           what is being written; a leftover of a killed process is removed
//! KEY/train.tokens     KEY: 64 hexadecimal digits, what the content follows from
//! KEY/held_out.tokens
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
const TRAIN: &str = "train.tokens";
const HELD_OUT: &str = "held_out.tokens";
const STATS: &str = "stats.json";

/// A cache that this process alone prepares in.
pub(super) struct Cache {
    folder: PathBuf,
    /// Locked until dropped.
    _lock: File,
}

/// Both shards while they are written.
pub(super) struct Writers {
    pub(super) train: ShardWriter,
    pub(super) held_out: ShardWriter,
}

/// Both shards and what was found when they were made.
pub(super) struct Prepared {
    pub(super) train: Shard,
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

    /// What was prepared before under `key`, if it is there and whole. Damage is logged and counts as absence.
    pub(super) fn reuse(&self, key: &Digest) -> Option<Prepared> {
        let folder = self.key_folder(key);
        if !folder.exists() {
            return None;
        }
        match load(&folder) {
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
        let is_key = |path: &Path| {
            path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.parse::<Digest>().is_ok())
        };
        let entries = fs::read_dir(&self.folder).into_iter().flatten().filter_map(Result::ok);
        let mut keys: Vec<(SystemTime, PathBuf)> = entries
            .map(|entry| entry.path())
            .filter(|path| is_key(path))
            .filter_map(|path| Some((path.metadata().ok()?.modified().ok()?, path)))
            .collect();
        keys.sort_by(|a, b| b.cmp(a));
        for (_, path) in keys.into_iter().skip(KEYS_KEPT) {
            if let Err(error) = remove(&path) {
                tracing::warn!(%error, "old prepared data stays");
            }
        }
    }
}

impl Preparing<'_> {
    /// Both shards, empty. What was written before is gone.
    pub(super) fn writers(&self, vocabulary: usize) -> Result<Writers, DataError> {
        Ok(Writers {
            train: ShardWriter::create(self.folder.join(TRAIN), vocabulary)?,
            held_out: ShardWriter::create(self.folder.join(HELD_OUT), vocabulary)?,
        })
    }

    /// Makes everything durable, then visible under `key`, and drops the oldest keys.
    pub(super) fn commit(self, writers: Writers, stats: &Stats, key: &Digest) -> Result<Prepared, DataError> {
        writers.train.finish()?;
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

fn load(folder: &Path) -> Result<Prepared, DataError> {
    let path = folder.join(STATS);
    let damaged = |path: &Path, reason: String| DataError::Corrupt { path: path.to_owned(), reason };
    let json = fs::read(&path).map_err(|error| DataError::cache("open", &path, 0, error))?;
    let stats: Stats = serde_json::from_slice(&json).map_err(|error| damaged(&path, error.to_string()))?;
    let open = |name: &str, tokens: u64| {
        let path = folder.join(name);
        let shard = Shard::open(&path)?;
        if shard.tokens() == tokens {
            return Ok(shard);
        }
        Err(damaged(&path, format!("it has {} tokens, {STATS} says {tokens}", shard.tokens())))
    };
    Ok(Prepared {
        train: open(TRAIN, stats.train.tokens)?,
        held_out: open(HELD_OUT, stats.held_out.tokens)?,
        stats,
    })
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
