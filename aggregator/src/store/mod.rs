//! The database: runs, rounds, contributions, evaluations, checkpoints, clients, events.
//!
//! Every write is one transaction on one connection, durable when the call returns: all of it or, whatever
//! the instant at which the process or the machine stops, nothing. Reads go over connections of their own
//! and see whole transactions only. The store decides nothing and keeps no copy in memory; files are not
//! its business. One process uses a database at a time: its owner keeps others out.

mod clients;
mod contributions;
mod error;
mod events;
mod records;
mod rounds;
mod runs;
mod starts;
mod values;

use std::{path::Path, time::Duration};

use sqlx::{
    Connection, Sqlite, SqlitePool, Transaction,
    migrate::Migrator,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};

pub use self::{
    clients::{ClientRow, RunSiteRow},
    contributions::ContributionRow,
    error::StoreError,
    events::{EVENTS_MAX, EventRow},
    records::Record,
    rounds::{CheckpointRow, EvaluationRow, RoundCommit, RoundRow, mean_loss},
    runs::{NewRun, RunRow, StartOrigin},
};

/// Connections that read at one time; a call beyond waits for one.
const READERS_MAX: u32 = 4;
/// How long another program (a backup, a shell) may hold the database before a write fails.
const BUSY_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a call waits for a connection: behind other writes, each of which may meet [`BUSY_TIMEOUT`].
const ACQUIRE_TIMEOUT: Duration = Duration::from_secs(120);

static MIGRATIONS: Migrator = sqlx::migrate!();

/// The database. Clones share its connections.
#[derive(Debug, Clone)]
pub struct Store {
    /// One connection: writes queue here instead of colliding in SQLite.
    writer: SqlitePool,
    readers: SqlitePool,
}

impl Store {
    /// Opens the database at `path`, creates it if it is not there, and brings it to this version's schema.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::NewerSchema`] or [`StoreError::Open`].
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            // Each commit is synced: what was acknowledged survives power loss.
            .synchronous(SqliteSynchronous::Full)
            .foreign_keys(true)
            .busy_timeout(BUSY_TIMEOUT);
        let writer =
            pool(1).connect_with(options.clone()).await.map_err(StoreError::opening(path.to_owned()))?;
        check_sound(&writer, path).await?;
        let known = MIGRATIONS.iter().map(|migration| migration.version).max().unwrap_or_default();
        MIGRATIONS.run(&writer).await.map_err(StoreError::migrating(path.to_owned(), known))?;
        let readers = pool(READERS_MAX).connect_lazy_with(options.read_only(true));
        Ok(Self { writer, readers })
    }

    /// Waits for calls under way and closes the database, leaving one file.
    pub async fn close(&self) {
        self.readers.close().await;
        // The last connection to close would do this, but a reader's may outlive its pool by an instant.
        let folded = sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)").execute(&self.writer).await;
        if let Err(error) = folded {
            tracing::warn!(%error, "the database's write-ahead log stays beside it; the next start reads it");
        }
        self.writer.close().await;
    }

    /// Begins a transaction. Dropped before [`commit`], it has done nothing.
    async fn begin(&self, attempt: &'static str) -> Result<Transaction<'static, Sqlite>, StoreError> {
        // IMMEDIATE takes the write lock now, where the busy timeout applies, and not at the first write.
        self.writer.begin_with("BEGIN IMMEDIATE").await.map_err(StoreError::of(attempt))
    }
}

async fn commit(transaction: Transaction<'static, Sqlite>, attempt: &'static str) -> Result<(), StoreError> {
    transaction.commit().await.map_err(StoreError::of(attempt))
}

fn pool(connections_max: u32) -> SqlitePoolOptions {
    SqlitePoolOptions::new()
        .max_connections(connections_max)
        .acquire_timeout(ACQUIRE_TIMEOUT)
        // A file's connections do not age.
        .idle_timeout(None)
        .max_lifetime(None)
        .test_before_acquire(false)
        // SQLite ends a transaction by itself when the disk is full; sqlx does not notice, and would refuse
        // every later one on that connection. It gives way to a new one.
        .before_acquire(|connection, _| Box::pin(async { Ok(!connection.is_in_transaction()) }))
}

/// SQLite's own check of the file's structure. Reads all of it: some 10 ms for the tens of MB that years of
/// rounds come to.
async fn check_sound(pool: &SqlitePool, path: &Path) -> Result<(), StoreError> {
    let verdict: String = sqlx::query_scalar("PRAGMA quick_check(1)")
        .fetch_one(pool)
        .await
        .map_err(StoreError::opening(path.to_owned()))?;
    if verdict == "ok" { Ok(()) } else { Err(StoreError::Damaged { path: path.to_owned(), reason: verdict }) }
}

#[cfg(test)]
mod tests;
