//! Why the database did not do what was asked.

use consort_common::ids::{RunName, SiteName};
use sqlx::{migrate::MigrateError, postgres::PgDatabaseError, sqlite::SqliteError};

use super::Location;

/// SQLite's primary result codes (sqlite.org/rescode.html).
const SQLITE_CORRUPT: i32 = 11;
const SQLITE_FULL: i32 = 13;
const SQLITE_NOTADB: i32 = 26;
/// PostgreSQL's error codes (its manual, appendix A).
const DISK_FULL: &str = "53100";
pub(super) const LOCK_NOT_AVAILABLE: &str = "55P03";

/// Why the database did not do what was asked. A failed call has changed nothing.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file is not a sound database.
    #[error("the database {place} is damaged: {reason}; restore the state directory from a backup")]
    Damaged {
        /// The file.
        place: String,
        /// What was found.
        reason: String,
    },
    /// Another aggregator uses it.
    #[error(
        "the database {place} is in use by another aggregator; stop that one, or give each a database of its own"
    )]
    InUse {
        /// The server's URL.
        place: String,
    },
    /// A newer aggregator has written to it.
    #[error(
        "the database {place} was written by a newer version of Consort (its schema is at {version}, this one knows up to {known}); install that version"
    )]
    NewerSchema {
        /// The file or the server's URL.
        place: String,
        /// Newest migration in the database that is not known here.
        version: i64,
        /// Newest migration that is.
        known: i64,
    },
    /// It could not be opened or brought to this version's schema.
    #[error("the database {place} cannot be opened: {reason}; see that {advice}")]
    Open {
        /// The file or the server's URL.
        place: String,
        /// Why.
        reason: String,
        /// What to look at.
        advice: &'static str,
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
        move |source| {
            let is_full = primary_code(&source) == Some(SQLITE_FULL)
                || sql_state(&source).is_some_and(|state| state == DISK_FULL);
            if is_full { Self::Full { attempt } } else { Self::Database { attempt, source } }
        }
    }

    /// For `map_err` while the database is opened.
    pub(super) fn opening(location: &Location) -> impl Fn(sqlx::Error) -> Self {
        let place = location.to_string();
        let advice = match location {
            Location::File(_) => {
                "the file and its folder are readable and writable for this user and that the disk has space"
            }
            Location::Server(_) => {
                "the server runs and can be reached, that the database exists, and that the user, and the password in \
                 PGPASSWORD or in the file that PGPASSFILE names, may create tables in it"
            }
        };
        move |error| {
            let (place, reason) = (place.clone(), error.to_string());
            match primary_code(&error) {
                Some(SQLITE_CORRUPT | SQLITE_NOTADB) => Self::Damaged { place, reason },
                _ => Self::Open { place, reason, advice },
            }
        }
    }

    /// The same for its migrations, of which the newest that is known is `known`.
    pub(super) fn migrating(location: &Location, known: i64) -> impl Fn(MigrateError) -> Self {
        let (place, opening) = (location.to_string(), Self::opening(location));
        move |error| match error {
            MigrateError::VersionMissing(version) => {
                Self::NewerSchema { place: place.clone(), version, known }
            }
            MigrateError::Execute(error) | MigrateError::ExecuteMigration(error, _) => opening(error),
            error => opening(sqlx::Error::Migrate(Box::new(error))),
        }
    }
}

/// SQLite's primary result code, the low byte of the extended one that sqlx reports.
fn primary_code(error: &sqlx::Error) -> Option<i32> {
    let error = error.as_database_error()?.try_downcast_ref::<SqliteError>()?;
    let code: i32 = sqlx::error::DatabaseError::code(error)?.parse().ok()?;
    Some(code & 0xff)
}

/// PostgreSQL's error code.
pub(super) fn sql_state(error: &sqlx::Error) -> Option<String> {
    let error = error.as_database_error()?.try_downcast_ref::<PgDatabaseError>()?;
    Some(error.code().to_owned())
}

/// Whether the error is a key that exists.
pub(super) fn is_taken(error: &sqlx::Error) -> bool {
    error.as_database_error().is_some_and(sqlx::error::DatabaseError::is_unique_violation)
}
