//! Moving models: the global one down, a delta up. Chunk by chunk, each with its digest; what has arrived
//! survives any break, and a transfer goes on with the first chunk that is missing.
//!
//! Both ways are pipelines: reading, hashing, decoding and writing go on beside the network, on blocking
//! threads, and every queue between two of them holds a few chunks. A transfer can share several
//! connections, and all together keep to the site's limits.
//!
//! Time limits here are about silence only: a slow transfer that moves lives.

mod delta;
mod download;
mod encoding_error;
mod part;
mod rate;
#[cfg(test)]
mod tests;
mod tokenizer;
mod upload;
mod verified;

use std::{future::Future, io, path::PathBuf, sync::Mutex, time::Duration};

use consort_common::{chunk::NoSuchChunk, codec::DecodeError, ids::Digest};
use consort_proto::v1::federation_client::FederationClient;
use tonic::{Status, transport::Channel};

pub use self::{
    delta::{Delta, DeltaDescription, draw_delta_id},
    tokenizer::download_tokenizer,
    upload::{UploadOutcome, is_too_late},
};
use self::{rate::RateLimit, verified::Verified};
use crate::{
    config::Transfer,
    link::{Link, Session, describe},
    session::federation_client,
    state::StateError,
};

/// A transfer that has not moved for this long is begun anew.
const SILENCE_MAX: Duration = Duration::from_secs(90);
/// Chunks that a transfer reads ahead of what it waits for: together over its connections, but at least one
/// on each. Sketch: a chunk has at most 4 MiB and is held encoded and decoded, so that one connection takes
/// 64 MiB at most, and the 16 that there can be 256 MiB (each has one more in its hands).
const READ_AHEAD_CHUNKS: usize = 8;

/// Moves models over the session's connection, and over more of them if the site's configuration says so.
pub struct Transfers {
    link: Link,
    /// Makes a further connection to the aggregator, which connects with its first call.
    connect: Box<dyn Fn() -> Channel + Send + Sync>,
    connections: u32,
    upload_limit: RateLimit,
    download_limit: RateLimit,
    /// The model file that was hashed last.
    verified: Mutex<Option<Verified>>,
}

impl Transfers {
    /// Transfers over `link`, and over what `connect` makes where the configuration asks for more connections
    /// than one: each of those lives as long as the transfer, so that an idle site keeps one connection open.
    pub fn new(link: Link, config: &Transfer, connect: impl Fn() -> Channel + Send + Sync + 'static) -> Self {
        Self {
            link,
            connect: Box::new(connect),
            connections: config.connections,
            upload_limit: RateLimit::new(config.upload_bytes_per_second),
            download_limit: RateLimit::new(config.download_bytes_per_second),
            verified: Mutex::default(),
        }
    }

    /// A client for each connection of a transfer of so many chunks; at least one.
    fn clients(&self, session: &Session, chunks: u32) -> Vec<FederationClient<Channel>> {
        let others = self.connections.min(chunks).saturating_sub(1);
        let others = (0..others).map(|_| federation_client((self.connect)()));
        std::iter::once(session.client.clone()).chain(others).collect()
    }
}

/// Why a transfer failed for good; passing failures are repeated and not seen outside.
#[derive(Debug, thiserror::Error)]
pub enum TransferError {
    /// The aggregator refuses.
    #[error("the aggregator refuses {what}: {}", describe(status))]
    Refused {
        /// What was attempted.
        what: String,
        /// Its answer.
        status: Status,
    },
    /// The aggregator offers another model than the instruction named.
    #[error(
        "the aggregator offers a model that is not the one of its instruction: {0}; this site and the aggregator disagree about the run, so nothing was downloaded"
    )]
    OtherModel(String),
    /// What arrived is not what was announced, though each part was right.
    #[error(
        "{what} arrived whole {attempts} times and was not what the digest {expected} announced: the aggregator's copy is damaged, tell the federation's operator"
    )]
    Damaged {
        /// What was downloaded.
        what: String,
        /// How often.
        attempts: u32,
        /// The announced digest.
        expected: Digest,
    },
    /// The delta is beyond its encoding.
    #[error("cannot encode the delta: {0}")]
    Encode(#[source] DecodeError),
    /// The state directory failed.
    #[error(transparent)]
    State(#[from] StateError),
    /// A file failed.
    #[error("cannot {action} {path}: {source}; check the space on its disk", path = path.display())]
    File {
        /// What was attempted.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A chunk that the model does not have.
    #[error(transparent)]
    Chunk(#[from] NoSuchChunk),
    /// A thread of this program failed.
    #[error("an internal failure: {0}; please report it")]
    Internal(String),
}

/// The answer, unless nothing comes for too long.
async fn answer<T>(next: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    match tokio::time::timeout(SILENCE_MAX, next).await {
        Ok(answer) => answer,
        Err(_) => Err(silence()),
    }
}

fn silence() -> Status {
    Status::deadline_exceeded(format!("nothing came for {} s", SILENCE_MAX.as_secs()))
}

fn file_error(action: &'static str, path: &std::path::Path) -> impl Fn(io::Error) -> TransferError + use<> {
    let path = path.to_owned();
    move |source| TransferError::File { action, path: path.clone(), source }
}

/// Does what waits for the disk, or for a core, on a thread of its own.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, TransferError> + Send + 'static,
) -> Result<T, TransferError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(TransferError::Internal(error.to_string())))
}
