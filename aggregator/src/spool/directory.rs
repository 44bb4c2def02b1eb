//! The spool in a local directory: `<root>/<run>/<round>/<site>/<delta id>.delta`, a file per delta.
//!
//! Sketch: a file per chunk would cost two syncs and a directory entry each, which on a disk that writes
//! 1 GB/s is most of the time at 1 MiB. With a file per delta one sync covers all chunks that came while the
//! last one ran.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Mutex,
};

use consort_common::{atomic_file, ids::RunName};

use super::{Bound, ContributionKey, DeltaLayout, SpoolError, SpoolLimits, error::is_full, lock};

/// Ending of a delta's file name.
const DELTA_SUFFIX: &str = ".delta";
/// Directories from a delta's own up to the one that holds the spool, whose entries lead to the delta.
const DIRECTORY_LEVELS: usize = 5;
/// What the system counts a file's blocks in, whatever their size.
const BLOCK_BYTES: u64 = 512;

#[derive(Debug)]
pub(super) struct Directory {
    root: PathBuf,
    /// Held while space is counted and taken, so that no two take the same.
    space: Mutex<()>,
}

impl Directory {
    pub(super) fn new(root: PathBuf) -> Self {
        Self { root, space: Mutex::new(()) }
    }

    /// Opens the file of a delta that is there at its full length.
    pub(super) fn open(&self, key: &ContributionKey, layout: DeltaLayout) -> Result<File, SpoolError> {
        match File::options().read(true).write(true).open(self.path(key)) {
            Ok(file) if file.metadata()?.len() >= layout.file_bytes() => Ok(file),
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
            _ => Err(SpoolError::Missing { key: Box::new(key.clone()), index: 0 }),
        }
    }

    /// Creates or takes up the delta's file at its full length, and makes the entries that lead to it
    /// durable: a process that was killed may not have come to that.
    pub(super) fn create(
        &self,
        key: &ContributionKey,
        layout: DeltaLayout,
        limits: &SpoolLimits,
    ) -> Result<File, SpoolError> {
        let path = self.path(key);
        let directory = self.site(key);
        fs::create_dir_all(&directory)?;
        let file = File::options().read(true).write(true).create(true).truncate(false).open(&path)?;
        if let Err(error) = self.take_space(key, &file, layout, limits) {
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
    fn take_space(
        &self,
        key: &ContributionKey,
        file: &File,
        layout: DeltaLayout,
        limits: &SpoolLimits,
    ) -> Result<(), SpoolError> {
        let _space = lock(&self.space);
        let taken_bytes = file.metadata()?.blocks() * BLOCK_BYTES;
        let wanted_bytes = layout.file_bytes();
        let bytes = wanted_bytes.saturating_sub(taken_bytes);
        let full = |bound| SpoolError::Full { key: Box::new(key.clone()), bound };
        let disk = || -> io::Result<_> {
            let available_bytes = available_bytes(&self.root)?;
            Ok((available_bytes, Bound::Disk { available_bytes, reserve_bytes: limits.disk_reserve_bytes }))
        };
        let (available_bytes, bound) = disk()?;
        if available_bytes < bytes.saturating_add(limits.disk_reserve_bytes) {
            return Err(full(bound));
        }
        // Walks the spool only where a bound is set.
        let taken = |bound_bytes_max: u64, directory: &Path| {
            if bound_bytes_max == 0 { Ok(0) } else { allocated_bytes(directory) }
        };
        let total_bytes = taken(limits.total_bytes_max, &self.root)?;
        let site_bytes = taken(limits.site_bytes_max, &self.site(key))?;
        limits.check(total_bytes, site_bytes, bytes).map_err(full)?;
        if file.metadata()?.len() < wanted_bytes {
            match fs4::FileExt::allocate(file, wanted_bytes) {
                // Some network filesystems cannot reserve; the writes then find out.
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
                Err(error) if is_full(&error) => return Err(full(disk()?.1)),
                allocated => allocated?,
            }
            file.set_len(wanted_bytes)?;
        }
        Ok(())
    }

    /// Removes what the site has spooled for the round but this delta.
    pub(super) fn remove_other_deltas(&self, key: &ContributionKey) -> io::Result<()> {
        let mine = self.path(key);
        let others = names(&self.site(key))?.into_iter().map(|name| self.site(key).join(name));
        others.filter(|path| *path != mine).try_for_each(fs::remove_file)
    }

    /// Removes a round's deltas.
    pub(super) fn remove_round(&self, run: &RunName, round: u32) -> io::Result<()> {
        atomic_file::remove_directory(&self.round(run, round))
    }

    /// The rounds of a run of which there are deltas.
    pub(super) fn rounds(&self, run: &RunName) -> io::Result<Vec<u32>> {
        Ok(names(&self.run(run))?.iter().filter_map(|name| name.parse().ok()).collect())
    }

    #[cfg(test)]
    pub(super) fn root(&self) -> &Path {
        &self.root
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

    pub(super) fn path(&self, key: &ContributionKey) -> PathBuf {
        self.site(key).join(format!("{}{DELTA_SUFFIX}", key.delta))
    }
}

/// What an unprivileged process may still write. Before the first delta there is no root; the filesystem
/// is then that of the directory where it will be.
fn available_bytes(root: &Path) -> io::Result<u64> {
    let existing = root.ancestors().find(|ancestor| ancestor.exists());
    fs4::available_space(existing.unwrap_or(Path::new(".")))
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
