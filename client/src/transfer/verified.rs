//! Which model file this process has hashed, so that a round that opens its base model several times reads
//! it for its digest once.
//!
//! Trusted in between: that a file whose length, inode and time of change are as they were has not changed.
//! Nothing survives the process: a daemon that starts hashes what it finds.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use consort_common::ids::Digest;

/// A file with the digest that it had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Verified {
    path: PathBuf,
    digest: Digest,
    bytes: u64,
    modified: SystemTime,
    inode: u64,
}

impl Verified {
    /// Notes that the file has this digest.
    pub(super) fn note(path: &Path, digest: Digest) -> io::Result<Self> {
        let metadata = fs::metadata(path)?;
        Ok(Self {
            path: path.to_owned(),
            digest,
            bytes: metadata.len(),
            modified: metadata.modified()?,
            inode: inode(&metadata),
        })
    }

    /// Hashes the file, if it is there.
    pub(super) fn hash(path: &Path) -> io::Result<Option<Self>> {
        let mut hasher = blake3::Hasher::new();
        match hasher.update_mmap_rayon(path) {
            Ok(_) => Self::note(path, hasher.finalize().into()).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether `path` is this file, has this digest, and has not been changed since.
    pub(super) fn holds(&self, path: &Path, digest: Digest) -> bool {
        Self::note(path, digest).is_ok_and(|now| now == *self)
    }

    /// Whether it had this digest when it was hashed.
    pub(super) fn had(&self, digest: Digest) -> bool {
        self.digest == digest
    }
}

#[cfg(unix)]
fn inode(metadata: &fs::Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::ino(metadata)
}

#[cfg(not(unix))]
fn inode(_: &fs::Metadata) -> u64 {
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_replaced_or_has_gone_is_not_trusted() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model");
        let digest = Digest::of(b"abc");
        assert_eq!(Verified::hash(&path).unwrap(), None);
        fs::write(&path, b"abc").unwrap();
        let verified = Verified::hash(&path).unwrap().unwrap();
        assert!(verified.had(digest) && verified.holds(&path, digest));
        assert!(!verified.holds(&path, Digest::of(b"abd")));
        assert!(!verified.holds(&folder.path().join("other"), digest));
        fs::write(folder.path().join("new"), b"abd").unwrap();
        fs::rename(folder.path().join("new"), &path).unwrap();
        assert!(!verified.holds(&path, digest));
        fs::remove_file(&path).unwrap();
        assert!(!verified.holds(&path, digest));
    }
}
