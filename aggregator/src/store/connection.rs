//! Connections: to a file of this process's own (SQLite), or to a server (PostgreSQL).
//!
//! Both speak the same SQL, through sqlx's `Any`. What they differ in is here: how they are opened and kept to one
//! owner, how a transaction begins, and how its end is learned.

use std::{
    fmt,
    ops::{Deref, DerefMut},
    path::{Path, PathBuf},
    process,
    sync::{Arc, Once},
    time::Duration,
};

use percent_encoding::{NON_ALPHANUMERIC, percent_encode};
use sqlx::{
    Any, AnyConnection, AnyPool, ConnectOptions, Connection, Executor, Transaction,
    any::{AnyConnectOptions, AnyPoolOptions},
};
use tokio::{
    sync::{Mutex, OwnedMutexGuard},
    task::JoinHandle,
    time,
};

use super::{StoreError, error};

/// Connections that read at one time; a call beyond waits for one.
const READERS_MAX: u32 = 4;
/// How long another program (a backup, a shell) may hold SQLite's file before a call fails.
const BUSY_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a call waits for a connection to a file: behind other writes, each of which may meet [`BUSY_TIMEOUT`].
const FILE_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a call waits for a connection to a server that is away, before it fails.
const SERVER_TIMEOUT: Duration = Duration::from_secs(30);
/// Within this a server answers, and a transaction at it is decided, or the process ends.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a connection waits for the session before it to end at the server, which notices a vanished client within
/// 20 s: see [`own`].
const OWNER_TIMEOUT: Duration = Duration::from_secs(25);
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
        // One that may only read would leave SQLite's log beside the file.
        let mut connection = connect(&self.writing().map_err(&opening)?).await.map_err(&opening)?;
        self.look(&mut connection).await?;
        let found = match self {
            Self::File(_) => format!("SQLite, in {self}"),
            Self::Server(_) => {
                let version = sqlx::query_scalar("SHOW server_version").fetch_one(&mut connection).await;
                let version: String = version.map_err(&opening)?;
                format!("PostgreSQL {version}, at {self}")
            }
        };
        connection.close().await.map_err(opening)?;
        Ok(found)
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
    /// One connection: writes queue here, in their order. At a server it holds [`OWNER_LOCK`].
    pub(super) writer: AnyPool,
    readers: AnyPool,
    /// Where the database is at a server, once it is claimed.
    owner: Option<Owner>,
}

/// What this process is to a server's database.
#[derive(Debug, Clone)]
struct Owner {
    generation: i64,
    /// Held from the beginning of a transaction until it is known what became of it.
    turn: Arc<Mutex<()>>,
}

impl Connections {
    pub(super) async fn open(location: &Location) -> Result<Self, StoreError> {
        let opening = StoreError::opening(location);
        let (writing, reading) =
            (location.writing().map_err(&opening)?, location.reading().map_err(&opening)?);
        let mut first = connect(&writing).await.map_err(&opening)?;
        location.look(&mut first).await?;
        let (writer, readers) = match location {
            Location::File(_) => {
                first.execute(&*sqlite_settings()).await.map_err(&opening)?;
                let settled = |settings: fn() -> String| {
                    file_pool().after_connect(move |connection, _| {
                        Box::pin(async move { connection.execute(&*settings()).await.map(drop) })
                    })
                };
                (settled(sqlite_settings), settled(busy_timeout))
            }
            Location::Server(_) => {
                let writer = server_pool().after_connect(|connection, _| Box::pin(own(connection)));
                (writer, server_pool())
            }
        };
        first.close().await.map_err(&opening)?;
        Ok(Self {
            writer: writer.max_connections(1).connect_with(writing).await.map_err(&opening)?,
            readers: readers.max_connections(READERS_MAX).connect_lazy_with(reading),
            owner: None,
        })
    }

    /// Makes this process the newest owner of a server's database, whose tables are there.
    pub(super) async fn claim(&mut self, location: &Location) -> Result<(), StoreError> {
        if matches!(location, Location::File(_)) {
            return Ok(());
        }
        let opening = StoreError::opening(location);
        let _deadline = Deadline::new("take up the database");
        let mut transaction = self.writer.begin().await.map_err(&opening)?;
        let claim = "UPDATE owner SET generation = generation + 1, writes = 0 RETURNING generation";
        let generation = sqlx::query_scalar(claim).fetch_one(&mut *transaction).await.map_err(&opening)?;
        transaction.commit().await.map_err(&opening)?;
        self.owner = Some(Owner { generation, turn: Arc::default() });
        Ok(())
    }

    /// Waits for calls under way and closes the database; of SQLite's, one file is left.
    pub(super) async fn close(&self) {
        let _deadline = self.owner.as_ref().map(|_| Deadline::new("close the database"));
        self.readers.close().await;
        if self.owner.is_none() {
            // The last connection to close would do this, but a reader's may outlive its pool by an instant.
            let folded = self.writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").await;
            if let Err(error) = folded {
                tracing::warn!(%error, "the database's write-ahead log stays beside it; the next start reads it");
            }
        }
        self.writer.close().await;
    }

    /// What reads, for one query.
    pub(super) fn reader(&self) -> Reader<'_> {
        Reader { pool: &self.readers, _deadline: self.owner.as_ref().map(|_| Deadline::new("read")) }
    }

    /// Begins a transaction. Dropped before [`Write::commit`], it has done nothing.
    pub(super) async fn begin(&self, attempt: &'static str) -> Result<Write, StoreError> {
        let connections = self.clone();
        // To its end, though the caller goes away: a session that began, and whose answer nobody waited for, would come
        // back to the pool within a transaction.
        let begun = tokio::spawn(async move { connections.begin_now(attempt).await }).await;
        begun.unwrap_or(Err(sqlx::Error::WorkerCrashed)).map_err(StoreError::of(attempt))
    }

    async fn begin_now(&self, attempt: &'static str) -> Result<Write, sqlx::Error> {
        let Some(Owner { generation, turn }) = self.owner.clone() else {
            // IMMEDIATE takes the write lock now, where the busy timeout applies, and not at the first write.
            let transaction = self.writer.begin_with("BEGIN IMMEDIATE").await?;
            return Ok(Write { transaction, at_server: None });
        };
        let turn = turn.lock_owned().await;
        let deadline = Deadline::new(attempt);
        let mut transaction = self.writer.begin().await?;
        let count = "UPDATE owner SET writes = writes + 1 WHERE generation = $1 RETURNING writes";
        let number = sqlx::query_scalar(count).bind(generation).fetch_optional(&mut *transaction).await?;
        let Some(number) = number else { replaced() };
        let writer = self.writer.clone();
        let at_server = AtServer { generation, number, writer, _deadline: deadline, _turn: turn };
        Ok(Write { transaction, at_server: Some(at_server) })
    }
}

/// A pool that reads.
pub(super) struct Reader<'a> {
    pool: &'a AnyPool,
    _deadline: Option<Deadline>,
}

impl Deref for Reader<'_> {
    type Target = AnyPool;

    fn deref(&self) -> &AnyPool {
        self.pool
    }
}

/// A transaction that writes.
pub(super) struct Write {
    transaction: Transaction<'static, Any>,
    at_server: Option<AtServer>,
}

/// What it takes to learn what became of a transaction.
struct AtServer {
    generation: i64,
    /// Counts the owner's transactions; this one's, once it is committed.
    number: i64,
    writer: AnyPool,
    _deadline: Deadline,
    _turn: OwnedMutexGuard<()>,
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
    /// Makes it durable. Where a server's answer is lost, the next connection looks whether the transaction counted: a
    /// step that was stored must not be taken a second time.
    pub(super) async fn commit(self, attempt: &'static str) -> Result<(), StoreError> {
        let Self { transaction, at_server } = self;
        let Err(lost) = transaction.commit().await else { return Ok(()) };
        let Some(at_server) = at_server else { return Err(StoreError::of(attempt)(lost)) };
        loop {
            // The connection that looks is the owner's: the one before has ended, and its transaction with it.
            let writes = sqlx::query_scalar::<_, i64>("SELECT writes FROM owner WHERE generation = $1")
                .bind(at_server.generation)
                .fetch_optional(&at_server.writer)
                .await;
            match writes {
                Ok(Some(writes)) if writes == at_server.number => return Ok(()),
                Ok(Some(_)) => return Err(StoreError::of(attempt)(lost)),
                Ok(None) => replaced(),
                Err(error) => {
                    tracing::warn!(%error, "the database was lost on the way to {attempt}; asking what became of it");
                    time::sleep(OUTCOME_PAUSE).await;
                }
            }
        }
    }
}

/// Ends the process unless it is dropped in time. What a server does not answer for a minute is not to be guessed, and a
/// connection that is dead without anybody's knowing would be waited for in vain: the next start reads from the database
/// what is so, as after any other end of the process.
#[derive(Debug)]
struct Deadline(JoinHandle<()>);

impl Deadline {
    fn new(attempt: &'static str) -> Self {
        Self(tokio::spawn(async move {
            time::sleep(ANSWER_TIMEOUT).await;
            let seconds = ANSWER_TIMEOUT.as_secs();
            stop(&format!("the database has not answered for {seconds} s, on the way to {attempt}"));
        }))
    }
}

impl Drop for Deadline {
    fn drop(&mut self) {
        self.0.abort();
    }
}

fn replaced() -> ! {
    stop("another aggregator has taken up the database")
}

fn stop(reason: &str) -> ! {
    tracing::error!("{reason}; stopping, since the next start reads from the database what is so");
    process::exit(1)
}

/// A connection of its own.
async fn connect(options: &AnyConnectOptions) -> Result<AnyConnection, sqlx::Error> {
    time::timeout(SERVER_TIMEOUT, options.connect()).await.unwrap_or(Err(sqlx::Error::PoolTimedOut))
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

/// Waits until the session owns the server's database; it does until it ends.
async fn own(connection: &mut AnyConnection) -> Result<(), sqlx::Error> {
    // Where this machine vanishes, the server is to notice, and not after the hours that it takes by itself.
    let settings = format!(
        "SET tcp_keepalives_idle = 10; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 2; \
         SET tcp_user_timeout = 20000; SET lock_timeout = {}",
        OWNER_TIMEOUT.as_millis()
    );
    connection.execute(&*settings).await?;
    sqlx::query("SELECT pg_advisory_lock($1)").bind(OWNER_LOCK).execute(connection).await.map(drop)
}
