//! The daemon's state directory: which file is what, and the lock that keeps a second daemon out.
//!
//! ```text
//! daemon.lock                 locked while a daemon runs
//! instance.id                 16 random bytes: tells a restarted daemon from a second one
//! text/...                    tokenised text (see `data`)
//! runs/<run>/specification.toml, tokenizer.json, run.json
//!            model-<version>.f32[.part]     a global model, or as much of it as has arrived
//!            evaluation-<version>.json      its held-out loss
//!            training.checkpoint            the round in progress
//!            site-state-<round>             cursor and moments after the last step of the round; with streaming
//!                                           also the site's parameters
//!            encoding-error-<round>         what the delta encoding has dropped until then, if it is carried; with
//!                                           streaming, of the round's fragment
//!            delta-<round>.encoded, .json   the round's result; complete once the .json is there
//! ```
//!
//! This module knows names and removes files; what is in them is their writers' business.

use std::{
    collections::BTreeMap,
    fs::{self, File, TryLockError},
    io,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use consort_common::{atomic_file::write_atomically, ids::RunName};
use rand::RngCore;

/// Runs whose folders are kept; the least recently used go first.
const RUNS_MAX: usize = 8;

/// Why the state directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Another daemon has it.
    #[error("the folder {path} is in use by another consort-client: stop that one first, or give this one a folder of its own (state_directory, or --out)", path = .0.display())]
    InUse(PathBuf),
    /// A file in it cannot be read or written.
    #[error("cannot {action} {path}: {source}; check the folder's owner and the space on its disk", path = path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A file in it cannot be replaced; the error names it.
    #[error("{0}; check the folder's owner and the space on its disk")]
    Write(#[source] io::Error),
}

/// How often, and with what pause, the state directory's lock is tried.
const LOCK_ATTEMPTS_MAX: u32 = 20;
const LOCK_PAUSE: Duration = Duration::from_millis(100);

/// The state directory, locked for this process.
#[derive(Debug)]
pub struct StateDirectory {
    path: PathBuf,
    instance_id: [u8; 16],
    // The lock lives as long as the open file; the system releases it even after SIGKILL.
    _lock: File,
}

impl StateDirectory {
    /// Creates the directory if need be, and locks it.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        fs::create_dir_all(path).map_err(io_error("create the folder", path))?;
        let lock = lock(&path.join("daemon.lock"))?;
        Ok(Self { path: path.to_owned(), instance_id: instance_id(path)?, _lock: lock })
    }

    /// Tells a restarted daemon from a second one with the same certificate.
    pub fn instance_id(&self) -> [u8; 16] {
        self.instance_id
    }

    /// Where tokenised text lies; shared by runs that tokenise alike.
    pub fn text(&self) -> PathBuf {
        self.path.join("text")
    }

    /// The folder of a run, created if need be; folders of runs that have not been used for long are removed.
    pub fn run(&self, run: &RunName) -> Result<RunDirectory, StateError> {
        let runs = self.path.join("runs");
        let path = runs.join(run.as_str());
        fs::create_dir_all(&path).map_err(io_error("create the folder", &path))?;
        forget_old_runs(&runs, &path).map_err(io_error("tidy", &runs))?;
        Ok(RunDirectory { path })
    }
}

/// Locks the file, created if need be, for as long as it is open; a process that was killed a moment ago may
/// still be on its way out.
///
/// # Errors
/// [`StateError::InUse`] if another process has it, or it cannot be opened.
pub fn lock(path: &Path) -> Result<File, StateError> {
    let file = File::options().create(true).truncate(false).write(true).open(path);
    let file = file.map_err(io_error("open", path))?;
    for _ in 0..LOCK_ATTEMPTS_MAX {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => thread::sleep(LOCK_PAUSE),
            Err(TryLockError::Error(source)) => return Err(io_error("lock", path)(source)),
        }
    }
    Err(StateError::InUse(path.parent().unwrap_or(path).to_owned()))
}

fn instance_id(directory: &Path) -> Result<[u8; 16], StateError> {
    let path = directory.join("instance.id");
    match fs::read(&path) {
        Ok(bytes) => {
            if let Ok(id) = bytes.try_into() {
                return Ok(id);
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(io_error("read", &path)(error)),
    }
    let mut id = [0; 16];
    rand::rng().fill_bytes(&mut id);
    write_atomically(&path, &id).map_err(StateError::Write)?;
    Ok(id)
}

fn forget_old_runs(runs: &Path, current: &Path) -> io::Result<()> {
    let mut others = Vec::new();
    for entry in fs::read_dir(runs)? {
        let entry = entry?;
        if entry.path() != current {
            others.push((entry.metadata()?.modified()?, entry.path()));
        }
    }
    others.sort();
    let excess = (others.len() + 1).saturating_sub(RUNS_MAX);
    for (_, path) in others.into_iter().take(excess) {
        tracing::info!("removing the files of an old run: {}", path.display());
        fs::remove_dir_all(path)?;
    }
    Ok(())
}

/// The files of one run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunDirectory {
    path: PathBuf,
}

impl RunDirectory {
    /// The run's specification, as the aggregator sent it.
    pub fn specification(&self) -> PathBuf {
        self.path.join("specification.toml")
    }

    /// The run's `tokenizer.json`.
    pub fn tokenizer(&self) -> PathBuf {
        self.path.join("tokenizer.json")
    }

    /// Digests of the above: complete once this file is there.
    pub fn description(&self) -> PathBuf {
        self.path.join("run.json")
    }

    /// A global model.
    pub fn model(&self, version: u32) -> PathBuf {
        self.path.join(format!("model-{version}.f32"))
    }

    /// As much of a global model as has arrived.
    pub fn model_part(&self, version: u32) -> PathBuf {
        self.path.join(format!("model-{version}.f32.part"))
    }

    /// The held-out loss of a global model.
    pub fn evaluation(&self, version: u32) -> PathBuf {
        self.path.join(format!("evaluation-{version}.json"))
    }

    /// The local checkpoint of the round in progress.
    pub fn checkpoint(&self) -> PathBuf {
        self.path.join("training.checkpoint")
    }

    /// What the site carries from `round` to its next one.
    pub fn site_state(&self, round: u32) -> PathBuf {
        self.path.join(format!("site-state-{round}"))
    }

    /// What the delta encoding has dropped up to `round` of what that round synchronised, which the site carries to
    /// the next round that does; there only for encodings that lose much.
    pub fn encoding_error(&self, round: u32) -> PathBuf {
        self.path.join(format!("encoding-error-{round}"))
    }

    /// The encoded chunks of a round's delta.
    pub fn delta(&self, round: u32) -> PathBuf {
        self.path.join(format!("delta-{round}.encoded"))
    }

    /// What is to be said of a round's delta; written last.
    pub fn delta_description(&self, round: u32) -> PathBuf {
        self.path.join(format!("delta-{round}.json"))
    }

    /// The newest round before `round` whose site state is there: what the round begins with.
    pub fn site_state_before(&self, round: u32) -> Result<Option<u32>, StateError> {
        let rounds = self.numbers("site-state-", "")?;
        Ok(rounds.into_iter().filter(|candidate| *candidate < round).max())
    }

    /// What the encoding has dropped, up to the state that `round` begins with, of what that round synchronises:
    /// one of so many fragments.
    pub fn encoding_error_before(&self, round: u32, fragments: u32) -> Result<Option<PathBuf>, StateError> {
        let newest = self.encoding_errors_before(round, fragments)?;
        Ok(newest.get(&(round % fragments)).map(|newest| self.encoding_error(*newest)))
    }

    /// The newest rounds, by their remainder, which tells the fragment: none newer than the state that `round`
    /// begins with.
    fn encoding_errors_before(&self, round: u32, fragments: u32) -> Result<BTreeMap<u32, u32>, StateError> {
        let Some(state) = self.site_state_before(round)? else { return Ok(BTreeMap::new()) };
        let mut rounds = self.numbers("encoding-error-", "")?;
        rounds.retain(|candidate| *candidate <= state);
        rounds.sort_unstable();
        Ok(rounds.into_iter().map(|round| (round % fragments, round)).collect())
    }

    /// Prepares for computing `round`, which synchronises one of so many fragments: removes results of this and
    /// other rounds, every site state but the one that the round begins with, and what encodings dropped but for
    /// the newest of each fragment. Those stay until a later round begins, so that the round gives the same bits
    /// however often it is computed.
    pub fn begin_round(&self, round: u32, fragments: u32) -> Result<(), StateError> {
        let state = self.site_state_before(round)?;
        let errors = self.encoding_errors_before(round, fragments)?;
        for candidate in self.numbers("site-state-", "")? {
            if Some(candidate) != state {
                remove(&self.site_state(candidate))?;
            }
        }
        for candidate in self.numbers("encoding-error-", "")? {
            if errors.get(&(candidate % fragments)) != Some(&candidate) {
                remove(&self.encoding_error(candidate))?;
            }
        }
        for candidate in self.numbers("delta-", ".json")? {
            remove(&self.delta_description(candidate))?;
        }
        for candidate in self.numbers("delta-", ".encoded")? {
            remove(&self.delta(candidate))?;
        }
        Ok(())
    }

    /// Removes all models but this version, and what belongs to them.
    pub fn keep_only_model(&self, version: u32) -> Result<(), StateError> {
        for (suffix, prefix) in [(".f32", "model-"), (".f32.part", "model-"), (".json", "evaluation-")] {
            for candidate in self.numbers(prefix, suffix)? {
                if candidate != version {
                    remove(&self.path.join(format!("{prefix}{candidate}{suffix}")))?;
                }
            }
        }
        Ok(())
    }

    /// Removes everything: the folder belongs to another run of the same name.
    pub fn clear(&self) -> Result<(), StateError> {
        fs::remove_dir_all(&self.path).map_err(io_error("remove", &self.path))?;
        fs::create_dir_all(&self.path).map_err(io_error("create the folder", &self.path))
    }

    fn numbers(&self, prefix: &str, suffix: &str) -> Result<Vec<u32>, StateError> {
        let mut numbers = Vec::new();
        for entry in fs::read_dir(&self.path).map_err(io_error("list", &self.path))? {
            let name = entry.map_err(io_error("list", &self.path))?.file_name();
            let number: Option<u32> =
                name.to_str().and_then(|name| name.strip_prefix(prefix)?.strip_suffix(suffix)?.parse().ok());
            numbers.extend(number);
        }
        Ok(numbers)
    }
}

/// Removes a file if it is there.
pub fn remove(path: &Path) -> Result<(), StateError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(io_error("remove", path)(error)),
        _ => Ok(()),
    }
}

/// Makes a [`StateError`] of an I/O error.
pub fn io_error(action: &'static str, path: &Path) -> impl Fn(io::Error) -> StateError + use<> {
    let path = path.to_owned();
    move |source| StateError::Io { action, path: path.clone(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run_directory(folder: &Path) -> RunDirectory {
        StateDirectory::open(folder).unwrap().run(&"r".parse().unwrap()).unwrap()
    }

    fn names(directory: &RunDirectory) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(&directory.path)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn a_second_daemon_is_refused_until_the_first_has_gone() {
        let folder = tempfile::tempdir().unwrap();
        let first = StateDirectory::open(folder.path()).unwrap();
        assert!(matches!(StateDirectory::open(folder.path()), Err(StateError::InUse(_))));
        let id = first.instance_id();
        drop(first);
        assert_eq!(StateDirectory::open(folder.path()).unwrap().instance_id(), id);
    }

    #[test]
    fn two_state_directories_are_two_instances() {
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let ids = folders.each_ref().map(|folder| StateDirectory::open(folder.path()).unwrap().instance_id());
        assert_ne!(ids[0], ids[1]);
    }

    #[test]
    fn a_round_that_begins_again_finds_the_state_that_it_began_with() {
        let folder = tempfile::tempdir().unwrap();
        let directory = run_directory(folder.path());
        for round in [2, 3] {
            fs::write(directory.site_state(round), []).unwrap();
            fs::write(directory.encoding_error(round), []).unwrap();
        }
        fs::write(directory.delta(3), []).unwrap();
        assert_eq!(directory.site_state_before(3).unwrap(), Some(2));
        directory.begin_round(3, 1).unwrap();
        assert_eq!(names(&directory), ["encoding-error-2", "site-state-2"]);
        directory.begin_round(5, 1).unwrap();
        assert_eq!(directory.site_state_before(5).unwrap(), Some(2));
        directory.begin_round(1, 1).unwrap();
        assert_eq!(directory.site_state_before(1).unwrap(), None);
        assert_eq!(names(&directory), [""; 0]);
    }

    #[test]
    fn what_was_dropped_of_a_fragment_stays_until_the_fragment_is_synchronised_again() {
        let folder = tempfile::tempdir().unwrap();
        let directory = run_directory(folder.path());
        for round in 1..=5 {
            fs::write(directory.encoding_error(round), []).unwrap();
            directory.begin_round(round, 3).unwrap();
            fs::write(directory.site_state(round), []).unwrap();
            fs::write(directory.encoding_error(round), []).unwrap();
        }
        let errors = (4..=9).map(|round| directory.encoding_error_before(round, 3).unwrap());
        // The state after round 5 says nothing of a round 4 or 5 that is computed again.
        let expected = [None, Some(2), Some(3), Some(4), Some(5), Some(3)];
        let expected = expected.map(|round: Option<u32>| round.map(|round| directory.encoding_error(round)));
        assert_eq!(errors.collect::<Vec<_>>(), expected);
        directory.begin_round(7, 3).unwrap();
        assert_eq!(
            names(&directory),
            ["encoding-error-3", "encoding-error-4", "encoding-error-5", "site-state-5"]
        );
    }

    #[test]
    fn old_models_go_with_their_evaluations() {
        let folder = tempfile::tempdir().unwrap();
        let directory = run_directory(folder.path());
        for version in [7, 8] {
            fs::write(directory.model(version), []).unwrap();
            fs::write(directory.model_part(version), []).unwrap();
            fs::write(directory.evaluation(version), []).unwrap();
        }
        directory.keep_only_model(8).unwrap();
        assert_eq!(names(&directory), ["evaluation-8.json", "model-8.f32", "model-8.f32.part"]);
    }

    #[test]
    fn only_so_many_runs_are_remembered() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDirectory::open(folder.path()).unwrap();
        for number in 0..RUNS_MAX + 3 {
            state.run(&format!("r{number}").parse().unwrap()).unwrap();
        }
        assert_eq!(fs::read_dir(folder.path().join("runs")).unwrap().count(), RUNS_MAX);
    }
}
