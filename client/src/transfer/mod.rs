//! Moving models: the global one down, a delta up. Chunk by chunk, each with its digest; what has arrived
//! survives any break, and a transfer goes on with the first chunk that is missing.
//!
//! Time limits here are about silence only: a slow transfer that moves lives.

mod download;
#[cfg(test)]
mod tests;
mod upload;

use std::{future::Future, io, path::PathBuf, time::Duration};

use consort_common::{chunk::NoSuchChunk, ids::Digest};
use tonic::Status;

pub use self::{
    download::{download_model, download_tokenizer},
    upload::{
        Delta, DeltaDescription, UploadOutcome, draw_delta_id, encoded_bytes, is_too_late, upload_delta,
    },
};
use crate::{link::describe, state::StateError};

/// A transfer that has not moved for this long is begun anew.
const SILENCE_MAX: Duration = Duration::from_secs(90);

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
        "{what} arrived whole {attempts} times with a digest that is not the announced {expected}: the aggregator's copy is damaged, tell the federation's operator"
    )]
    Damaged {
        /// What was downloaded.
        what: String,
        /// How often.
        attempts: u32,
        /// The announced digest.
        expected: Digest,
    },
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
}

/// The answer, unless nothing comes for too long.
async fn answer<T>(next: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    match tokio::time::timeout(SILENCE_MAX, next).await {
        Ok(answer) => answer,
        Err(_) => Err(Status::deadline_exceeded(format!("nothing came for {} s", SILENCE_MAX.as_secs()))),
    }
}

fn file_error(action: &'static str, path: &std::path::Path) -> impl Fn(io::Error) -> TransferError + use<> {
    let path = path.to_owned();
    move |source| TransferError::File { action, path: path.clone(), source }
}
