//! An S3-compatible object store, as the spool and published checkpoints use it.
//!
//! Owns the connection, the retries and the words of its errors; knows neither deltas nor checkpoints, and
//! must never hand out bytes that it did not read whole. An object is there whole or not at all: a write
//! counts once the store has said so, which is when the store itself promises that it lasts. What is written
//! is signed with its SHA-256, so that what the network has changed is refused.
//!
//! The local state directory is not reached through here: the crate's own local backend syncs nothing, so
//! that an acknowledged chunk could go with the power.

use std::{fmt, io, path::Path as FilePath, sync::Arc, time::Duration};

use bytes::Bytes;
use consort_common::{atomic_file::write_atomically, ids::DeltaId};
use futures::{Stream, StreamExt, TryStreamExt};
use object_store::{
    BackoffConfig, ClientOptions, GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutPayload, RetryConfig,
    aws::AmazonS3Builder, buffered::BufWriter, path::Path,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    runtime::Handle,
    time::timeout,
};

use crate::config;

/// Longest that the first contact may take: an operator waits for it.
const PROBE_MAX: Duration = Duration::from_secs(20);
/// How often the first contact is tried before the aggregator gives up.
const PROBE_RETRIES_MAX: usize = 2;
/// No new try of a request begins after this. Beyond it the sender waits better than the aggregator.
const RETRY_MAX: Duration = Duration::from_secs(10);
/// Tries of one request; with the pauses below, more than fit in [`RETRY_MAX`].
const RETRIES_MAX: usize = 16;
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(3);
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// One try of one request, with its body.
const REQUEST_MAX: Duration = Duration::from_secs(60);
/// A part of a file: what a line of 140 KB/s moves within [`REQUEST_MAX`].
const PART_BYTES_MIN: u64 = 8 << 20;
/// S3 takes 10,000 parts.
const PARTS_MAX: u64 = 9_000;
/// Parts of a file under way at a time, and with that held in memory.
const PARTS_AT_A_TIME: usize = 4;
/// What is read of a file at a time.
const READ_BYTES: usize = 1 << 20;
/// Says which aggregator a prefix belongs to.
const OWNER: &str = "owner";
/// The same, in the state directory.
const OWNER_FILE: &str = "storage-owner";

/// What a request to the store failed of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// There is no such object.
    NotFound,
    /// There is no such bucket.
    NoBucket,
    /// The credentials are wrong, or may not do this.
    Denied,
    /// The store takes no more data.
    Full,
    /// Anything else: mostly that it does not answer.
    Other,
}

/// A request that failed, after retries.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the object store did not {attempt} {what}: {reason}")]
pub struct StorageError {
    attempt: &'static str,
    what: String,
    fault: Fault,
    reason: String,
}

impl StorageError {
    /// What it failed of.
    pub fn fault(&self) -> Fault {
        self.fault
    }

    /// A write that was not waited for to its end.
    pub(crate) fn given_up(what: String) -> Self {
        Self::new("store", what, Fault::Other, "the aggregator gave it up")
    }

    fn new(attempt: &'static str, what: String, fault: Fault, reason: impl fmt::Display) -> Self {
        Self { attempt, what, fault, reason: reason.to_string() }
    }
}

/// A configured store that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It did not do what the aggregator will ask of it.
    #[error("the storage {url} cannot be used: {error}\n  {}", advice(.error.fault, endpoint))]
    Refused {
        /// As configured.
        url: String,
        /// Where it was asked for.
        endpoint: String,
        /// What it said.
        error: StorageError,
    },
    /// It did nothing in time.
    #[error("the storage {url} did not answer within {} s: see that storage.endpoint ({endpoint}) is right and can be reached from here, and that credentials are in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY", PROBE_MAX.as_secs())]
    Silent {
        /// As configured.
        url: String,
        /// Where it was asked for.
        endpoint: String,
    },
    /// The settings are not of a store.
    #[error(
        "the settings of the storage {url} cannot be used: {reason}; see [storage] in `consort-aggregator reference`"
    )]
    Settings {
        /// As configured.
        url: String,
        /// What is wrong.
        reason: String,
    },
    /// Another aggregator keeps its deltas there.
    #[error(
        "the storage {url} belongs to another aggregator: give each a prefix of its own in storage.url. If this one replaces that one for good, delete the object {url}/{OWNER}"
    )]
    OtherOwner {
        /// As configured.
        url: String,
    },
    /// The state directory does not remember what is this aggregator's.
    #[error(
        "cannot keep {path}, which says that the storage is this aggregator's: {source}; see that the state directory is writable"
    )]
    Owner {
        /// The file.
        path: String,
        /// Why not.
        source: io::Error,
    },
}

fn advice(fault: Fault, endpoint: &str) -> String {
    match fault {
        Fault::NoBucket | Fault::NotFound => {
            "create the bucket, or correct storage.url or storage.endpoint".to_owned()
        }
        Fault::Denied => "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the aggregator's environment to credentials that may read, write, list and delete objects there".to_owned(),
        Fault::Full => "make room there, or name another store".to_owned(),
        Fault::Other => {
            format!("see that {endpoint} is up and can be reached from here, and that storage.region is right")
        }
    }
}

/// The object store of this aggregator. Names of objects are relative to its prefix.
#[derive(Debug, Clone)]
pub struct Storage {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    url: String,
    runtime: Handle,
}

impl Storage {
    /// Connects to the configured store, and sees that it can be written, read and cleared; none if there is
    /// none. `state_directory` remembers that the prefix is this aggregator's.
    ///
    /// # Errors
    /// [`OpenError`], which says what to do.
    pub async fn open(
        config: &config::Storage,
        state_directory: &FilePath,
    ) -> Result<Option<Self>, OpenError> {
        let Some(storage) = Self::reach(config).await? else { return Ok(None) };
        storage.own(config, state_directory).await?;
        tracing::info!(url = %storage.url, "deltas and checkpoints are kept in the object store");
        Ok(Some(storage))
    }

    /// Like [`Storage::open`], and changes nothing.
    pub async fn reach(config: &config::Storage) -> Result<Option<Self>, OpenError> {
        if config.url.is_empty() {
            return Ok(None);
        }
        let (url, endpoint) = (config.url.clone(), config.endpoint().to_owned());
        let retry = |max_retries| RetryConfig {
            max_retries,
            retry_timeout: RETRY_MAX,
            backoff: BackoffConfig { init_backoff: PAUSE_MIN, max_backoff: PAUSE_MAX, base: 2.0 },
        };
        let probe = Self::connect(config, retry(PROBE_RETRIES_MAX))?;
        match timeout(PROBE_MAX, probe.probe()).await {
            Ok(Ok(())) => Ok(Some(Self::connect(config, retry(RETRIES_MAX))?)),
            Ok(Err(error)) => Err(OpenError::Refused { url, endpoint, error }),
            Err(_) => Err(OpenError::Silent { url, endpoint }),
        }
    }

    fn connect(config: &config::Storage, retry: RetryConfig) -> Result<Self, OpenError> {
        let settings = |reason: &dyn fmt::Display| OpenError::Settings {
            url: config.url.clone(),
            reason: reason.to_string(),
        };
        let (bucket, prefix) = config.bucket_and_prefix().map_err(|reason| settings(&reason))?;
        let options = ClientOptions::new().with_connect_timeout(CONNECT_MAX).with_timeout(REQUEST_MAX);
        // Credentials, and what else AWS's own tools take from the environment.
        let mut builder = AmazonS3Builder::from_env()
            .with_client_options(options)
            .with_bucket_name(bucket)
            .with_retry(retry)
            .with_allow_http(config.endpoint.starts_with("http://"));
        if !config.endpoint.is_empty() {
            builder = builder.with_endpoint(&config.endpoint);
        }
        if !config.region.is_empty() {
            builder = builder.with_region(&config.region);
        }
        let store = builder.build().map_err(|error| settings(&error))?;
        Ok(Self {
            store: Arc::new(store),
            prefix: Path::parse(prefix).map_err(|error| settings(&error))?,
            url: config.url.trim_end_matches('/').to_owned(),
            runtime: Handle::current(),
        })
    }

    /// Everything that will be asked of the store, once.
    async fn probe(&self) -> Result<(), StorageError> {
        let name = format!("probe-{}", DeltaId::random());
        let content = Bytes::from_static(b"Written by consort-aggregator to see that it can.\n");
        self.put(&name, content.clone().into()).await?;
        let found = self.get(&name, content.len() as u64).await;
        let listed: Result<Vec<_>, _> = self.list(&name).try_collect().await;
        self.delete(std::slice::from_ref(&name)).await?;
        listed?;
        if found? == content {
            return Ok(());
        }
        Err(StorageError::new(
            "return what was written to",
            self.name(&name),
            Fault::Other,
            "it has other bytes",
        ))
    }

    /// Keeps two aggregators from clearing each other's deltas away.
    async fn own(&self, config: &config::Storage, state_directory: &FilePath) -> Result<(), OpenError> {
        let path = state_directory.join(OWNER_FILE);
        let owner_error = |source| OpenError::Owner { path: path.display().to_string(), source };
        let mine = match std::fs::read(&path) {
            Ok(mine) => mine,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let mine = DeltaId::random().to_string().into_bytes();
                write_atomically(&path, &mine).map_err(owner_error)?;
                mine
            }
            Err(error) => return Err(owner_error(error)),
        };
        let refused = |error| OpenError::Refused {
            url: self.url.clone(),
            endpoint: config.endpoint().to_owned(),
            error,
        };
        match self.get(OWNER, mine.len() as u64).await {
            Ok(owner) if owner == mine => Ok(()),
            Ok(_) => Err(OpenError::OtherOwner { url: self.url.clone() }),
            Err(error) if error.fault == Fault::NotFound => {
                self.put(OWNER, mine.into()).await.map_err(refused)
            }
            Err(error) => Err(refused(error)),
        }
    }

    /// A store in this process's memory.
    #[cfg(test)]
    pub(crate) fn in_memory(runtime: Handle) -> Self {
        let store = Arc::new(object_store::memory::InMemory::new());
        Self { store, prefix: Path::from("prefix"), url: "memory://prefix".to_owned(), runtime }
    }

    /// Waits for a request, on a thread that may block.
    pub(crate) fn wait<T>(&self, request: impl Future<Output = T>) -> T {
        self.runtime.block_on(request)
    }

    /// Where tasks of requests run.
    pub(crate) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// The URL of an object.
    pub(crate) fn name(&self, name: &str) -> String {
        format!("{}/{name}", self.url)
    }

    fn path(&self, name: &str) -> Path {
        self.prefix.parts().chain(Path::from(name).parts()).collect()
    }

    /// Writes an object. It lasts once this returns; until then it is there whole or not at all.
    pub(crate) async fn put(&self, name: &str, payload: PutPayload) -> Result<(), StorageError> {
        let written = self.store.put(&self.path(name), payload).await;
        written.map(|_| ()).map_err(|error| self.error("store", name, &error))
    }

    /// Reads an object whole, or up to `bytes_max` if it is longer.
    pub(crate) async fn get(&self, name: &str, bytes_max: u64) -> Result<Bytes, StorageError> {
        let range = GetRange::Bounded(0..bytes_max);
        let options = GetOptions { range: Some(range), ..GetOptions::default() };
        let read = async { self.store.get_opts(&self.path(name), options).await?.bytes().await };
        read.await.map_err(|error| self.error("return", name, &error))
    }

    /// Names and lengths of the objects below a name.
    pub(crate) fn list(&self, name: &str) -> impl Stream<Item = Result<(String, u64), StorageError>> + use<> {
        let (storage, name, prefix_parts) = (self.clone(), name.to_owned(), self.prefix.parts().count());
        self.store.list(Some(&self.path(&name))).map(move |object| match object {
            Ok(object) => {
                let parts: Vec<_> = object.location.parts().skip(prefix_parts).collect();
                let parts: Vec<&str> = parts.iter().map(AsRef::as_ref).collect();
                Ok((parts.join("/"), object.size))
            }
            Err(error) => Err(storage.error("list", &name, &error)),
        })
    }

    /// Deletes objects; those that are not there are no error.
    pub(crate) async fn delete(&self, names: &[String]) -> Result<(), StorageError> {
        let paths: Vec<_> = names.iter().map(|name| Ok(self.path(name))).collect();
        let mut deleted = self.store.delete_stream(futures::stream::iter(paths).boxed());
        while let Some(deleted) = deleted.next().await {
            match deleted {
                Ok(_) | Err(object_store::Error::NotFound { .. }) => {}
                Err(error) => {
                    let what = names.first().map_or("", String::as_str);
                    return Err(self.error("delete", what, &error));
                }
            }
        }
        Ok(())
    }

    /// Copies a file into an object, which is there whole or not at all. Memory: some parts of the file.
    pub(crate) async fn put_file(&self, name: &str, path: &FilePath) -> Result<(), StorageError> {
        let unreadable = |error: io::Error| {
            let what = path.display().to_string();
            StorageError::new("receive", what, Fault::Other, format!("the file cannot be read: {error}"))
        };
        let mut file = tokio::fs::File::open(path).await.map_err(unreadable)?;
        let bytes = file.metadata().await.map_err(unreadable)?.len();
        let part_bytes = usize::try_from(bytes.div_ceil(PARTS_MAX).max(PART_BYTES_MIN)).unwrap_or(usize::MAX);
        let mut object = BufWriter::with_capacity(self.store.clone(), self.path(name), part_bytes)
            .with_max_concurrency(PARTS_AT_A_TIME);
        let copied = async {
            loop {
                let mut piece = Vec::with_capacity(READ_BYTES);
                (&mut file).take(READ_BYTES as u64).read_to_end(&mut piece).await.map_err(unreadable)?;
                if piece.is_empty() {
                    return Ok(());
                }
                object.put(piece.into()).await.map_err(|error| self.error("store", name, &error))?;
            }
        };
        if let Err(error) = copied.await {
            // Parts cost money until they are given up.
            let _ = object.abort().await;
            return Err(error);
        }
        object.shutdown().await.map_err(|error| {
            let source = error.get_ref().and_then(|source| source.downcast_ref());
            source.map_or_else(
                || StorageError::new("store", self.name(name), Fault::Other, &error),
                |source| self.error("store", name, source),
            )
        })
    }

    fn error(&self, attempt: &'static str, name: &str, error: &object_store::Error) -> StorageError {
        let reason = error.to_string();
        StorageError::new(attempt, self.name(name), fault(error, &reason), reason)
    }
}

/// The crate knows some status codes; what stores say beside that is in the body, which is in the words.
fn fault(error: &object_store::Error, reason: &str) -> Fault {
    const FULL: [&str; 4] = [
        "507 Insufficient Storage",
        "<Code>QuotaExceeded</Code>",
        "<Code>XMinioStorageFull</Code>",
        "<Code>InsufficientStorage</Code>",
    ];
    match error {
        _ if FULL.iter().any(|words| reason.contains(words)) => Fault::Full,
        _ if reason.contains("NoSuchBucket") => Fault::NoBucket,
        object_store::Error::NotFound { .. } => Fault::NotFound,
        object_store::Error::PermissionDenied { .. } | object_store::Error::Unauthenticated { .. } => {
            Fault::Denied
        }
        _ => Fault::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn names_are_relative_to_the_prefix_and_what_is_not_there_is_told_apart() {
        let storage = Storage::in_memory(Handle::current());
        for name in ["spool/a/1", "spool/a/2", "spool/ab"] {
            storage.put(name, Bytes::from_static(b"four").into()).await.unwrap();
        }
        let list = async || {
            let mut names: Vec<_> = storage.list("spool/a").try_collect().await.unwrap();
            names.sort();
            names
        };
        assert_eq!(list().await, [("spool/a/1".to_owned(), 4), ("spool/a/2".to_owned(), 4)]);
        assert_eq!(storage.get("spool/a/1", 100).await.unwrap(), "four");
        assert_eq!(storage.get("spool/a/1", 2).await.unwrap(), "fo");
        storage.delete(&["spool/a/1".to_owned(), "spool/a/1".to_owned()]).await.unwrap();
        assert_eq!(list().await.len(), 1);
        let error = storage.get("spool/a/1", 100).await.unwrap_err();
        assert_eq!(error.fault(), Fault::NotFound);
        assert!(error.to_string().contains("memory://prefix/spool/a/1"), "{error}");
    }

    #[tokio::test]
    async fn a_file_of_several_parts_becomes_one_object() {
        let storage = Storage::in_memory(Handle::current());
        let folder = tempfile::tempdir().unwrap();
        for bytes in [0, 5, PART_BYTES_MIN as usize, 2 * PART_BYTES_MIN as usize + 3] {
            let content: Vec<u8> = (0..bytes).map(|index| (index % 251) as u8).collect();
            std::fs::write(folder.path().join("file"), &content).unwrap();
            storage.put_file("file", &folder.path().join("file")).await.unwrap();
            let object = storage.get("file", u64::MAX).await;
            assert!(bytes == 0 || object.unwrap() == content, "{bytes} bytes");
        }
    }

    #[test]
    fn a_store_that_is_full_is_told_from_one_that_refuses() {
        let denied = |reason: &str| object_store::Error::PermissionDenied {
            path: "chunk".to_owned(),
            source: reason.to_owned().into(),
        };
        let quota = denied("403 Forbidden: <Error><Code>QuotaExceeded</Code></Error>");
        assert_eq!(fault(&quota, &quota.to_string()), Fault::Full);
        let key = denied("403 Forbidden: <Error><Code>InvalidAccessKeyId</Code></Error>");
        assert_eq!(fault(&key, &key.to_string()), Fault::Denied);
    }
}
