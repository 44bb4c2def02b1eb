//! Connections: to a file of this process's own (SQLite), or to a server (PostgreSQL).
//!
//! Both speak the same SQL, through sqlx's `Any`. What they differ in is here: how they are opened and kept to one
//! owner, how a transaction begins, and how its end is learned.

use std::{
    fmt,
    ops::{Deref, DerefMut},
    path::{Path, PathBuf},
    process,
    sync::{Arc, Once, OnceLock},
    time::Duration,
};

use percent_encoding::{NON_ALPHANUMERIC, percent_encode};
use sqlx::{
    Any, AnyConnection, AnyPool, ConnectOptions, Connection, Executor, Transaction,
    any::{AnyConnectOptions, AnyPoolOptions},
};
use tokio::task::JoinHandle;

use super::{StoreError, error};

/// Connections that read at one time; a call beyond waits for one.
const READERS_MAX: u32 = 4;
/// How long another program (a backup, a shell) may hold SQLite's file before a call fails.
const BUSY_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a call waits for a connection to a file: behind other writes, each of which may meet [`BUSY_TIMEOUT`].
const FILE_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a call waits for a connection to a server that is away, before it fails.
const SERVER_TIMEOUT: Duration = Duration::from_secs(30);
/// Within this a transaction at a server is decided, or the process ends.
const DECIDED_WITHIN: Duration = Duration::from_secs(60);
/// How long a connection waits for the session of a process that was killed to end at the server.
const OWNER_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause before a server that is away is asked again what became of a transaction.
const OUTCOME_PAUSE: Duration = Duration::from_millis(200);
/// PostgreSQL's advisory lock (within the database) of the aggregator that uses it: "consort".
const OWNER_LOCK: i64 = 0x0063_6f6e_736f_7274;

/// Where the database is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Location {
    /// SQLite, in this file.
    File(PathBuf),
    /// PostgreSQL: `postgres://USER@HOST:PORT/DATABASE`, without a password.
    Server(String),
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "{}", path.display()),
            Self::Server(url) => f.write_str(url),
        }
    }
}

impl Location {
    /// The options of a connection that may write.
    fn writing(&self) -> Result<AnyConnectOptions, sqlx::Error> {
        self.options("rwc")
    }

    /// The options of a connection that reads.
    fn reading(&self) -> Result<AnyConnectOptions, sqlx::Error> {
        self.options("ro")
    }

    fn options(&self, mode: &str) -> Result<AnyConnectOptions, sqlx::Error> {
        static DRIVERS: Once = Once::new();
        DRIVERS.call_once(sqlx::any::install_default_drivers);
        match self {
            Self::File(path) => file_url(path, mode).parse(),
            Self::Server(url) => url.parse(),
        }
    }

    /// Says what the database is, if it can be opened. Makes no database, and changes none.
    pub(super) async fn reach(&self) -> Result<String, StoreError> {
        let opening = StoreError::opening(self);
        if matches!(self, Self::File(path) if !path.exists()) {
            return Ok(format!("SQLite, in {self} from the first start"));
        }
        let mut connection = self.reading().map_err(&opening)?.connect().await.map_err(&opening)?;
        self.look(&mut connection).await?;
        if matches!(self, Self::File(_)) {
            return Ok(format!("SQLite, in {self}"));
        }
        let version = sqlx::query_scalar("SHOW server_version").fetch_one(&mut connection).await;
        let version: String = version.map_err(&opening)?;
        connection.close().await.map_err(opening)?;
        Ok(format!("PostgreSQL {version}, at {self}"))
    }

    /// Whether the database is sound, or this process's to have, over a connection of its own, so that what is wrong
    /// is said at once: pools try again.
    async fn look(&self, connection: &mut AnyConnection) -> Result<(), StoreError> {
        let opening = StoreError::opening(self);
        match self {
            Self::File(_) => {
                connection.execute(&*busy_timeout()).await.map_err(&opening)?;
                // SQLite's own check of the file's structure. Reads all of it: some 10 ms for the tens of MB that
                // years of rounds come to.
                let verdict: String = sqlx::query_scalar("PRAGMA quick_check(1)")
                    .fetch_one(connection)
                    .await
                    .map_err(opening)?;
                if verdict == "ok" {
                    Ok(())
                } else {
                    Err(StoreError::Damaged { place: self.to_string(), reason: verdict })
                }
            }
            Self::Server(_) => {
                own(connection).await.map_err(|found| match error::sql_state(&found).as_deref() {
                    Some(error::LOCK_NOT_AVAILABLE) => StoreError::InUse { place: self.to_string() },
                    _ => opening(found),
                })
            }
        }
    }
}

/// Pools of connections to one database.
#[derive(Debug, Clone)]
pub(super) struct Connections {
    /// One connection: writes queue here, in their order. At a server it holds [`OWNER_LOCK`]: whoever writes is the
    /// owner.
    pub(super) writer: AnyPool,
    pub(super) readers: AnyPool,
    /// At a server: which owner this process is, once that is settled.
    generation: Option<Arc<OnceLock<i64>>>,
}

impl Connections {
    pub(super) async fn open(location: &Location) -> Result<Self, StoreError> {
        let opening = StoreError::opening(location);
        let (writing, reading) =
            (location.writing().map_err(&opening)?, location.reading().map_err(&opening)?);
        let mut first = writing.connect().await.map_err(&opening)?;
        location.look(&mut first).await?;
        let (writer, readers, generation) = match location {
            Location::File(_) => {
                first.execute(&*sqlite_settings()).await.map_err(&opening)?;
                let settled = |settings: fn() -> String| {
                    file_pool().after_connect(move |connection, _| {
                        Box::pin(async move { connection.execute(&*settings()).await.map(drop) })
                    })
                };
                (settled(sqlite_settings).max_connections(1), settled(busy_timeout), None)
            }
            Location::Server(_) => {
                let generation = Arc::new(OnceLock::new());
                let settled = generation.clone();
                let writer = server_pool().max_connections(1).after_connect(move |connection, _| {
                    let settled = settled.get().copied();
                    Box::pin(async move { take_up(connection, settled).await })
                });
                (writer, server_pool(), Some(generation))
            }
        };
        first.close().await.map_err(&opening)?;
        Ok(Self {
            writer: writer.connect_with(writing).await.map_err(&opening)?,
            readers: readers.max_connections(READERS_MAX).connect_lazy_with(reading),
            generation,
        })
    }

    /// Counts this process as the newest owner of a server's database, whose tables are there.
    pub(super) async fn claim(&self, location: &Location) -> Result<(), StoreError> {
        let Some(generation) = &self.generation else { return Ok(()) };
        let claimed = sqlx::query_scalar("UPDATE owner SET generation = generation + 1 RETURNING generation");
        let claimed = claimed.fetch_one(&self.writer).await.map_err(StoreError::opening(location))?;
        generation.get_or_init(|| claimed);
        Ok(())
    }

    /// Waits for calls under way and closes the database; of SQLite's, one file is left.
    pub(super) async fn close(&self) {
        self.readers.close().await;
        if self.generation.is_none() {
            // The last connection to close would do this, but a reader's may outlive its pool by an instant.
            let folded = self.writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").await;
            if let Err(error) = folded {
                tracing::warn!(%error, "the database's write-ahead log stays beside it; the next start reads it");
            }
        }
        self.writer.close().await;
    }

    /// Begins a transaction. Dropped before [`Write::commit`], it has done nothing.
    pub(super) async fn begin(&self, attempt: &'static str) -> Result<Write, StoreError> {
        let connections = self.clone();
        // To its end, though the caller goes away: a session that began, and whose answer nobody waited for, would come
        // back to the pool within a transaction.
        let begun = tokio::spawn(async move { connections.begin_now(attempt).await }).await;
        begun.unwrap_or_else(|_| Err(StoreError::of(attempt)(sqlx::Error::WorkerCrashed)))
    }

    async fn begin_now(&self, attempt: &'static str) -> Result<Write, StoreError> {
        let failed = StoreError::of(attempt);
        if self.generation.is_none() {
            // IMMEDIATE takes the write lock now, where the busy timeout applies, and not at the first write.
            let transaction = self.writer.begin_with("BEGIN IMMEDIATE").await.map_err(failed)?;
            return Ok(Write { transaction, at_server: None });
        }
        let deadline = Deadline::new(attempt);
        let mut transaction = self.writer.begin().await.map_err(&failed)?;
        let id = sqlx::query_scalar("SELECT txid_current()").fetch_one(&mut *transaction).await;
        let id = id.map_err(&failed)?;
        Ok(Write { transaction, at_server: Some(AtServer { id, writer: self.writer.clone(), deadline }) })
    }
}

/// A transaction that writes.
pub(super) struct Write {
    transaction: Transaction<'static, Any>,
    at_server: Option<AtServer>,
}

/// What it takes to learn what became of a transaction.
struct AtServer {
    /// What the server calls it.
    id: i64,
    writer: AnyPool,
    deadline: Deadline,
}

impl Deref for Write {
    type Target = AnyConnection;

    fn deref(&self) -> &AnyConnection {
        &self.transaction
    }
}

impl DerefMut for Write {
    fn deref_mut(&mut self) -> &mut AnyConnection {
        &mut self.transaction
    }
}

impl Write {
    /// Makes it durable. Where a server's answer is lost, the next connection asks what became of the transaction: a
    /// step that was stored must not be taken a second time.
    pub(super) async fn commit(self, attempt: &'static str) -> Result<(), StoreError> {
        let Self { transaction, at_server } = self;
        let Err(lost) = transaction.commit().await else { return Ok(()) };
        let failed = StoreError::of(attempt)(lost);
        let Some(AtServer { id, writer, deadline }) = at_server else { return Err(failed) };
        loop {
            let outcome = sqlx::query_scalar::<_, Option<String>>("SELECT txid_status($1)").bind(id);
            match outcome.fetch_one(&writer).await {
                Ok(outcome) => match outcome.as_deref() {
                    Some("committed") => return Ok(()),
                    Some("aborted") => return Err(failed),
                    outcome => {
                        tracing::warn!(?outcome, "it is not known yet whether it was possible to {attempt}")
                    }
                },
                Err(sqlx::Error::PoolClosed) => deadline.passed(),
                Err(error) => {
                    tracing::warn!(%error, "the database was lost on the way to {attempt}; asking what became of it");
                }
            }
            tokio::time::sleep(OUTCOME_PAUSE).await;
        }
    }
}

/// Ends the process unless it is dropped in time. What a server says of a transaction, or does not say for a minute, is
/// not to be guessed: the next start reads it from the database, as after any other end of the process.
struct Deadline {
    attempt: &'static str,
    watch: JoinHandle<()>,
}

impl Deadline {
    fn new(attempt: &'static str) -> Self {
        let watch = tokio::spawn(async move {
            tokio::time::sleep(DECIDED_WITHIN).await;
            stop(&format!(
                "the database has not said for {} s whether it was possible to {attempt}",
                DECIDED_WITHIN.as_secs()
            ));
        });
        Self { attempt, watch }
    }

    fn passed(&self) -> ! {
        stop(&format!("the database was closed before it said whether it was possible to {}", self.attempt))
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        self.watch.abort();
    }
}

fn stop(reason: &str) -> ! {
    tracing::error!("{reason}; stopping, since the next start reads from the database what is so");
    process::exit(1)
}

fn file_pool() -> AnyPoolOptions {
    AnyPoolOptions::new()
        .acquire_timeout(FILE_TIMEOUT)
        // A file's connections do not age.
        .idle_timeout(None)
        .max_lifetime(None)
        .test_before_acquire(false)
        // SQLite ends a transaction by itself when the disk is full; sqlx does not notice, and would refuse
        // every later one on that connection. It gives way to a new one.
        .before_acquire(|connection, _| {
            let is_usable = !connection.is_in_transaction();
            Box::pin(async move { Ok(is_usable) })
        })
}

fn server_pool() -> AnyPoolOptions {
    // The owner's connection is not to be given up for its age.
    AnyPoolOptions::new().acquire_timeout(SERVER_TIMEOUT).idle_timeout(None).max_lifetime(None)
}

/// The URL of a file, every other character of whose path is encoded: URLs are parsed twice, and a `..` in one is not a
/// folder's.
fn file_url(path: &Path, mode: &str) -> String {
    let path = percent_encode(path.as_os_str().as_encoded_bytes(), NON_ALPHANUMERIC);
    format!("sqlite:{path}?mode={mode}")
}

fn busy_timeout() -> String {
    format!("PRAGMA busy_timeout = {}", BUSY_TIMEOUT.as_millis())
}

/// Settings of a connection that writes. Each commit is synced: what was acknowledged survives power loss.
fn sqlite_settings() -> String {
    busy_timeout() + "; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA foreign_keys = ON"
}

/// Makes a new session the owner's; once the process has been the owner, only if nobody else was since.
async fn take_up(connection: &mut AnyConnection, generation: Option<i64>) -> Result<(), sqlx::Error> {
    own(connection).await?;
    let Some(generation) = generation else { return Ok(()) };
    let newest: i64 = sqlx::query_scalar("SELECT generation FROM owner").fetch_one(connection).await?;
    if newest != generation {
        stop("another aggregator has used the database while this one had no connection to it");
    }
    Ok(())
}

/// Waits until the session owns the server's database; it does until it ends.
async fn own(connection: &mut AnyConnection) -> Result<(), sqlx::Error> {
    let owner_ms = OWNER_TIMEOUT.as_millis();
    // Where this machine vanishes, the server is to notice within a minute, and not in hours.
    let settings = format!(
        "SET tcp_keepalives_idle = 30; SET tcp_keepalives_interval = 10; SET tcp_keepalives_count = 3; \
         SET lock_timeout = {owner_ms}"
    );
    connection.execute(&*settings).await?;
    sqlx::query("SELECT pg_advisory_lock($1)").bind(OWNER_LOCK).execute(connection).await.map(drop)
}
