//! Why the database did not do what was asked.

use std::path::PathBuf;

use consort_common::ids::{RunName, SiteName};
use sqlx::migrate::MigrateError;

/// SQLite's primary result codes (sqlite.org/rescode.html).
const SQLITE_CORRUPT: i32 = 11;
const SQLITE_FULL: i32 = 13;
const SQLITE_NOTADB: i32 = 26;

/// Why the database did not do what was asked. A failed call has changed nothing.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file is not a sound database.
    #[error("the database {} is damaged: {reason}; restore the state directory from a backup", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// A newer aggregator has written to it.
    #[error("the database {} was written by a newer version of Consort (its schema is at {version}, this one knows up to {known}); install that version", path.display())]
    NewerSchema {
        /// The file.
        path: PathBuf,
        /// Newest migration in the file that is not known here.
        version: i64,
        /// Newest migration that is.
        known: i64,
    },
    /// It could not be opened or brought to this version's schema.
    #[error("the database {} cannot be opened: {reason}; see that the file and its folder are readable and writable for this user and that the disk has space", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// There is no such run.
    #[error("there is no run {0}")]
    NoSuchRun(RunName),
    /// The name is taken.
    #[error("a run {0} exists already")]
    RunExists(RunName),
    /// A round was to be committed that does not follow the newest committed one.
    #[error(
        "round {round} of run {run} cannot be committed: it does not follow the newest committed version"
    )]
    NotNext {
        /// The run.
        run: RunName,
        /// The round.
        round: u32,
    },
    /// A round was to be committed with a contribution that was never recorded.
    #[error("round {round} of run {run} cannot be committed: no contribution of {site} was recorded for it")]
    NoContribution {
        /// The run.
        run: RunName,
        /// The round.
        round: u32,
        /// The site.
        site: SiteName,
    },
    /// A value that the database cannot hold: a float that is not finite, a count above 2^63.
    #[error("{column} cannot be stored as {value}")]
    Unstorable {
        /// The column.
        column: &'static str,
        /// The value.
        value: String,
    },
    /// A stored value is not one that was ever written.
    #[error(
        "the database holds {value:?} as {column}, which this version of Consort never writes; restore it from a backup"
    )]
    Unreadable {
        /// The column.
        column: &'static str,
        /// The value.
        value: String,
    },
    /// The disk is full.
    #[error("could not {attempt}: the disk that holds the database is full; make room and try again")]
    Full {
        /// What was attempted.
        attempt: &'static str,
    },
    /// The database refused.
    #[error("could not {attempt}: the database says: {source}")]
    Database {
        /// What was attempted.
        attempt: &'static str,
        /// Its words.
        source: sqlx::Error,
    },
}

impl StoreError {
    /// For `map_err`: names what was attempted.
    pub(super) fn of(attempt: &'static str) -> impl Fn(sqlx::Error) -> Self {
        move |source| match primary_code(&source) {
            Some(SQLITE_FULL) => Self::Full { attempt },
            _ => Self::Database { attempt, source },
        }
    }

    /// For `map_err` while the database is opened.
    pub(super) fn opening(path: PathBuf) -> impl Fn(sqlx::Error) -> Self {
        move |error| {
            let (path, reason) = (path.clone(), error.to_string());
            match primary_code(&error) {
                Some(SQLITE_CORRUPT | SQLITE_NOTADB) => Self::Damaged { path, reason },
                _ => Self::Open { path, reason },
            }
        }
    }

    /// The same for its migrations, of which the newest that is known is `known`.
    pub(super) fn migrating(path: PathBuf, known: i64) -> impl Fn(MigrateError) -> Self {
        move |error| match error {
            MigrateError::VersionMissing(version) => Self::NewerSchema { path: path.clone(), version, known },
            MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => {
                Self::opening(path.clone())(error)
            }
            error => Self::Open { path: path.clone(), reason: error.to_string() },
        }
    }
}

/// SQLite's primary result code, the low byte of the extended one that sqlx reports.
fn primary_code(error: &sqlx::Error) -> Option<i32> {
    let code: i32 = error.as_database_error()?.code()?.parse().ok()?;
    Some(code & 0xff)
}

/// Whether the error is a key that exists.
pub(super) fn is_taken(error: &sqlx::Error) -> bool {
    error.as_database_error().is_some_and(sqlx::error::DatabaseError::is_unique_violation)
}
