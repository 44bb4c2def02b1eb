//! Checkpoints written in the background: training pays for the copy out of the device, and a thread of its
//! own for the digest, the disk and the fsync.

use std::{
    fs::File,
    path::{Path, PathBuf},
    thread::{self, JoinHandle},
};

use serde::Serialize;

use super::{Checkpoint, CheckpointError, save};

/// Writes one checkpoint after the other to one path. Memory: the checkpoint under way, of which there is at
/// most one. Dropping it waits for that one.
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    /// Made durable before each checkpoint: what the checkpoint counts on.
    first: Option<File>,
    under_way: Option<JoinHandle<Result<(), CheckpointError>>>,
}

impl Writer {
    /// For checkpoints at `path`. Each is written only once what `first` has got by then is on disk.
    pub fn new(path: &Path, first: Option<File>) -> Self {
        Self { path: path.to_owned(), first, under_way: None }
    }

    /// Whether a checkpoint is being written.
    pub fn is_busy(&self) -> bool {
        self.under_way.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Begins to write `checkpoint`, once the one under way is done.
    ///
    /// # Errors
    /// The one before could not be written, or there can be no thread.
    pub fn begin<P: Serialize + Send + 'static>(
        &mut self,
        checkpoint: Checkpoint<P>,
    ) -> Result<(), CheckpointError> {
        self.wait()?;
        let failed = |source| CheckpointError::Io { action: "write", path: self.path.clone(), source };
        let first = self.first.as_ref().map(File::try_clone).transpose().map_err(failed)?;
        let path = self.path.clone();
        let write = move || {
            let failed = |source| CheckpointError::Io { action: "write", path: path.clone(), source };
            first.as_ref().map_or(Ok(()), File::sync_data).map_err(failed)?;
            save(&path, &checkpoint.progress, &checkpoint.parameters, &checkpoint.moments)
        };
        let thread = thread::Builder::new().name("checkpoint".to_owned()).spawn(write).map_err(failed)?;
        self.under_way = Some(thread);
        Ok(())
    }

    /// Waits for the checkpoint under way.
    ///
    /// # Errors
    /// It could not be written; what was there before still is.
    pub fn wait(&mut self) -> Result<(), CheckpointError> {
        let Some(thread) = self.under_way.take() else { return Ok(()) };
        let panicked = |_| CheckpointError::Thread {
            path: self.path.clone(),
            reason: "its thread has panicked; please report it".to_owned(),
        };
        thread.join().map_err(panicked)?
    }
}

impl Drop for Writer {
    /// Whoever drops it has given up, or has waited before.
    fn drop(&mut self) {
        if let Err(error) = self.wait() {
            tracing::warn!("{error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write, os::fd::OwnedFd};

    use super::{
        super::{super::Moments, load},
        *,
    };

    fn checkpoint(progress: u64) -> Checkpoint<u64> {
        Checkpoint { progress, parameters: vec![progress as f32; 1000], moments: Moments::default() }
    }

    #[test]
    fn checkpoints_follow_each_other_and_the_last_one_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        let mut writer = Writer::new(&path, None);
        for progress in 1..=5 {
            writer.begin(checkpoint(progress)).unwrap();
        }
        writer.wait().unwrap();
        assert!(!writer.is_busy());
        assert_eq!(load(&path).unwrap(), Some(checkpoint(5)));
    }

    #[test]
    fn dropping_waits_for_the_checkpoint_under_way() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        Writer::new(&path, None).begin(checkpoint(1)).unwrap();
        assert_eq!(load(&path).unwrap(), Some(checkpoint(1)));
    }

    #[test]
    fn a_failure_is_told_by_the_next_call_once() {
        let folder = tempfile::tempdir().unwrap();
        let parent = folder.path().join("parent");
        let mut writer = Writer::new(&parent.join("x"), None);
        writer.begin(checkpoint(1)).unwrap();
        let error = writer.begin(checkpoint(2)).unwrap_err();
        assert!(
            error.to_string().contains("cannot write") && error.to_string().contains("parent"),
            "{error}"
        );
        fs::create_dir(&parent).unwrap();
        writer.begin(checkpoint(3)).unwrap();
        writer.wait().unwrap();
        assert_eq!(load(&parent.join("x")).unwrap(), Some(checkpoint(3)));
    }

    /// Each checkpoint that can be read counts on rows that are there, rows that come while it is written are neither
    /// lost nor counted on, and none waits for them.
    #[test]
    fn the_file_that_a_checkpoint_counts_on_may_go_on_growing() {
        const CHECKPOINTS: u64 = 20;
        let folder = tempfile::tempdir().unwrap();
        let (rows, path) = (folder.path().join("rows"), folder.path().join("x"));
        let mut file = File::create(&rows).unwrap();
        let mut writer = Writer::new(&path, Some(file.try_clone().unwrap()));
        for begun in 1..=CHECKPOINTS {
            writeln!(file, "row {}", 2 * begun - 1).unwrap();
            writer.begin(checkpoint(begun)).unwrap();
            writeln!(file, "row {}", 2 * begun).unwrap();
            let found = load::<u64>(&path).unwrap().map_or(0, |checkpoint| checkpoint.progress);
            assert!([begun - 1, begun].contains(&found), "{found} is there once {begun} was begun");
        }
        writer.wait().unwrap();
        assert_eq!(load(&path).unwrap(), Some(checkpoint(CHECKPOINTS)));
        let expected: String = (1..=2 * CHECKPOINTS).map(|row| format!("row {row}\n")).collect();
        assert_eq!(fs::read_to_string(&rows).unwrap(), expected);
    }

    #[test]
    fn there_is_no_checkpoint_before_what_it_counts_on_is_on_disk() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x");
        // A pipe takes what is written to it, and cannot be brought to a disk.
        let (_reader, pipe) = std::io::pipe().unwrap();
        let mut writer = Writer::new(&path, Some(File::from(OwnedFd::from(pipe))));
        writer.begin(checkpoint(1)).unwrap();
        let error = writer.wait().unwrap_err();
        assert!(matches!(error, CheckpointError::Io { action: "write", .. }), "{error}");
        assert_eq!(load::<u64>(&path).unwrap(), None);
    }
}
