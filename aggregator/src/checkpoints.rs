//! Published checkpoints in the object store, beside those in the state directory.
//!
//! `checkpoints/<run>/version-<version>/`: the files of the directory, and `manifest.json`, which names each
//! with its length and BLAKE3. The manifest is written last and deleted first: readers go by it, and who
//! finds it finds the checkpoint whole. Which checkpoints are kept is the driver's to say.

use std::{fs, io, path::Path};

use consort_common::ids::{Digest, RunName};
use futures::TryStreamExt;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Mutex, MutexGuard},
    task::spawn_blocking,
};

use crate::storage::{Fault, Storage, StorageError};

/// Name of the object that makes a checkpoint one.
pub const MANIFEST: &str = "manifest.json";
/// Below which all checkpoints are.
const ROOT: &str = "checkpoints";
/// A manifest names some files; nothing longer is one.
const MANIFEST_BYTES_MAX: u64 = 1 << 20;

/// Why a checkpoint is not in the object store.
#[derive(Debug, thiserror::Error)]
pub enum UploadError {
    /// The store refused.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The checkpoint in the state directory cannot be read.
    #[error("cannot read the checkpoint in {path} to upload it: {source}")]
    Read {
        /// Where it is.
        path: String,
        /// Why not.
        source: io::Error,
    },
}

/// What a checkpoint consists of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The run.
    pub run: RunName,
    /// The version of its model.
    pub version: u32,
    /// By name.
    pub files: Vec<ManifestFile>,
}

/// A file of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestFile {
    /// Beside the manifest.
    pub name: String,
    /// Its length.
    pub bytes: u64,
    /// BLAKE3 of its content.
    pub blake3: Digest,
}

impl Manifest {
    /// Describes the files of a directory.
    fn of(run: RunName, version: u32, directory: &Path) -> io::Result<Self> {
        let mut files = Vec::new();
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let name = entry.file_name().into_string();
            let name = name.map_err(|name| io::Error::other(format!("{} is not text", name.display())))?;
            let mut hasher = blake3::Hasher::new();
            hasher.update_mmap_rayon(entry.path())?;
            files.push(ManifestFile {
                name,
                bytes: entry.metadata()?.len(),
                blake3: hasher.finalize().into(),
            });
        }
        files.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(Self { run, version, files })
    }
}

/// The published checkpoints of all runs.
#[derive(Debug)]
pub struct Checkpoints {
    storage: Option<Storage>,
    /// Held from a checkpoint's upload until it is recorded, so that nobody takes it for one to be retired.
    turn: Mutex<()>,
}

impl Checkpoints {
    /// Those in `storage`; without one there is nothing to do.
    pub fn new(storage: Option<Storage>) -> Self {
        Self { storage, turn: Mutex::new(()) }
    }

    /// Waits until no other checkpoint is between its upload and its record.
    pub async fn turn(&self) -> Turn<'_> {
        Turn { storage: self.storage.as_ref(), _turn: self.turn.lock().await }
    }
}

/// What may change checkpoints in the object store.
#[derive(Debug)]
pub struct Turn<'a> {
    storage: Option<&'a Storage>,
    _turn: MutexGuard<'a, ()>,
}

impl Turn<'_> {
    /// Uploads the checkpoint in `directory`. One that is there already, of the same files, is left alone.
    ///
    /// # Errors
    /// What the store or the directory refused; the checkpoint is then not there.
    pub async fn upload(&self, run: &RunName, version: u32, directory: &Path) -> Result<(), UploadError> {
        let Some(storage) = self.storage else { return Ok(()) };
        let (name, described, path) = (run.clone(), version, directory.to_owned());
        let manifest = spawn_blocking(move || Manifest::of(name, described, &path)).await;
        let manifest = manifest.unwrap_or_else(|error| Err(io::Error::other(error)));
        let manifest =
            manifest.map_err(|source| UploadError::Read { path: directory.display().to_string(), source })?;
        let text = serde_json::to_vec_pretty(&manifest).unwrap_or_default();

        let folder = folder(run, version);
        let name = format!("{folder}/{MANIFEST}");
        match storage.get(&name, MANIFEST_BYTES_MAX).await {
            Ok(found) if found == text => return Ok(()),
            // Of other files: what follows must not be seen half done.
            Ok(_) => storage.delete(std::slice::from_ref(&name)).await?,
            Err(error) if error.fault() == Fault::NotFound => {}
            Err(error) => return Err(error.into()),
        }
        for file in &manifest.files {
            storage.put_file(&format!("{folder}/{}", file.name), &directory.join(&file.name)).await?;
        }
        storage.put(&name, text.into()).await?;
        tracing::info!(%run, version, url = storage.name(&folder), "checkpoint uploaded");
        Ok(())
    }

    /// Deletes the run's checkpoints but those `kept`, and what uploads left half done.
    ///
    /// # Errors
    /// What the store refused. What is left is deleted the next time.
    pub async fn retain(&self, run: &RunName, kept: &[u32]) -> Result<(), StorageError> {
        let Some(storage) = self.storage else { return Ok(()) };
        let kept: Vec<String> = kept.iter().map(|version| folder(run, *version)).collect();
        let stored: Vec<(String, u64)> = storage.list(&format!("{ROOT}/{run}")).try_collect().await?;
        let is_kept = |name: &str| {
            name.rsplit_once('/').is_some_and(|(folder, _)| kept.iter().any(|kept| kept == folder))
        };
        let retired = stored.into_iter().map(|(name, _)| name).filter(|name| !is_kept(name));
        let (manifests, files): (Vec<_>, Vec<_>) = retired.partition(|name| name.ends_with(MANIFEST));
        storage.delete(&manifests).await?;
        storage.delete(&files).await
    }
}

fn folder(run: &RunName, version: u32) -> String {
    format!("{ROOT}/{run}/version-{version:06}")
}

#[cfg(test)]
mod tests {
    use tokio::runtime::Handle;

    use super::*;

    async fn names(storage: &Storage) -> Vec<String> {
        let stored: Vec<_> = storage.list(ROOT).try_collect().await.unwrap();
        let mut names: Vec<String> = stored.into_iter().map(|(name, _)| name).collect();
        names.sort();
        names
    }

    #[tokio::test]
    async fn a_checkpoint_is_uploaded_with_a_manifest_and_retired_with_it() {
        let storage = Storage::in_memory(Handle::current());
        let checkpoints = Checkpoints::new(Some(storage.clone()));
        let (folder, run) = (tempfile::tempdir().unwrap(), "pilot".parse().unwrap());
        let turn = checkpoints.turn().await;
        for version in 1..=3 {
            fs::write(folder.path().join("model.safetensors"), format!("weights {version}")).unwrap();
            fs::write(folder.path().join("config.json"), "{}").unwrap();
            turn.upload(&run, version, folder.path()).await.unwrap();
        }
        let manifest = storage.get("checkpoints/pilot/version-000002/manifest.json", u64::MAX).await.unwrap();
        let manifest: Manifest = serde_json::from_slice(&manifest).unwrap();
        assert_eq!((manifest.version, manifest.files.len()), (2, 2));
        assert_eq!(manifest.files[1].name, "model.safetensors");
        assert_eq!((manifest.files[1].bytes, manifest.files[1].blake3), (9, Digest::of(b"weights 2")));

        // What an upload left half done goes too; another run's stays.
        storage.put("checkpoints/pilot/version-000009/config.json", "{}".into()).await.unwrap();
        storage.put("checkpoints/pilot2/version-000001/config.json", "{}".into()).await.unwrap();
        turn.retain(&run, &[2, 3]).await.unwrap();
        let left = names(&storage).await;
        assert_eq!(left.len(), 7);
        assert!(!left.iter().any(|name| name.contains("pilot/version-000001") || name.contains("000009")));
    }

    #[tokio::test]
    async fn a_checkpoint_that_is_there_is_not_written_again_and_another_replaces_it() {
        let storage = Storage::in_memory(Handle::current());
        let checkpoints = Checkpoints::new(Some(storage.clone()));
        let (folder, run) = (tempfile::tempdir().unwrap(), "pilot".parse().unwrap());
        let turn = checkpoints.turn().await;
        let file = "checkpoints/pilot/version-000001/config.json";
        fs::write(folder.path().join("config.json"), "{}").unwrap();
        turn.upload(&run, 1, folder.path()).await.unwrap();
        storage.delete(&[file.to_owned()]).await.unwrap();
        turn.upload(&run, 1, folder.path()).await.unwrap();
        assert!(storage.get(file, 10).await.is_err());
        fs::write(folder.path().join("config.json"), "{\"other\": 1}").unwrap();
        turn.upload(&run, 1, folder.path()).await.unwrap();
        assert_eq!(storage.get(file, 100).await.unwrap(), "{\"other\": 1}");
    }

    #[tokio::test]
    async fn without_a_store_there_is_nothing_to_do() {
        let checkpoints = Checkpoints::new(None);
        let turn = checkpoints.turn().await;
        turn.upload(&"pilot".parse().unwrap(), 1, Path::new("/nonexistent")).await.unwrap();
        turn.retain(&"pilot".parse().unwrap(), &[]).await.unwrap();
    }
}
