//! The database: runs, rounds, contributions, evaluations, checkpoints, clients, events.
//!
//! SQLite in a file, or PostgreSQL at a server (see `connection`): the SQL is the same.
//!
//! Every write is one transaction on one connection, durable when the call returns: all of it or, whatever
//! the instant at which the process or the machine stops, nothing. Reads go over connections of their own
//! and see whole transactions only. The store decides nothing and keeps no copy in memory; files are not
//! its business. One process uses a database at a time: at a server the store itself keeps others out, from a file
//! the lock of the state directory does. Lists that are by name are put in order here: what a server makes of names
//! depends on its locale.

mod clients;
mod connection;
mod contributions;
mod error;
mod events;
mod records;
mod rounds;
mod runs;
mod starts;
mod values;

use sqlx::migrate::Migrator;

use self::connection::Connections;
pub use self::{
    clients::{ClientRow, RunSiteRow},
    connection::Location,
    contributions::ContributionRow,
    error::StoreError,
    events::{EVENTS_MAX, EventRow},
    records::Record,
    rounds::{CheckpointRow, EvaluationRow, RoundCommit, RoundRow, mean_loss},
    runs::{NewRun, RunRow, StartOrigin},
};

static MIGRATIONS: Migrator = sqlx::migrate!();

/// The database. Clones share its connections.
#[derive(Debug, Clone)]
pub struct Store {
    connections: Connections,
}

impl Store {
    /// Opens the database, creates it if it is a file that is not there, and brings it to this version's schema.
    ///
    /// # Errors
    /// [`StoreError::Damaged`], [`StoreError::InUse`], [`StoreError::NewerSchema`] or [`StoreError::Open`].
    pub async fn open(location: &Location) -> Result<Self, StoreError> {
        let mut connections = Connections::open(location).await?;
        let known = MIGRATIONS.iter().map(|migration| migration.version).max().unwrap_or_default();
        MIGRATIONS.run(&connections.writer).await.map_err(StoreError::migrating(location, known))?;
        connections.claim(location).await?;
        Ok(Self { connections })
    }

    /// Looks whether the database could be opened, and says what it is. Makes no database, and changes none.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub async fn reach(location: &Location) -> Result<String, StoreError> {
        location.reach().await
    }

    /// Waits for calls under way and closes the database; of SQLite's, one file is left.
    pub async fn close(&self) {
        self.connections.close().await;
    }
}

#[cfg(test)]
mod tests;
