//! Downloading the run's tokenizer.

use consort_common::ids::{Digest, RunName};
use consort_proto::v1::DownloadTokenizerRequest;
use tonic::Status;

use super::{TransferError, answer};
use crate::{
    link::{Link, Session},
    progress::Activity,
};

/// How often it may arrive whole with a wrong digest before that is said to be the aggregator's fault.
const ATTEMPTS_MAX: u32 = 3;
/// Largest `tokenizer.json`, in bytes; that of a vocabulary of 256,000 takes about 20 MB.
const TOKENIZER_BYTES_MAX: u64 = 256 << 20;

/// The run's `tokenizer.json`.
///
/// # Errors
/// If the aggregator refuses, or what it sends does not have the announced digest.
pub async fn download_tokenizer(
    link: &Link,
    run: &RunName,
    digest: Digest,
    activity: &Activity,
) -> Result<Vec<u8>, TransferError> {
    let what = "downloading the tokenizer".to_owned();
    for _ in 0..ATTEMPTS_MAX {
        let bytes = link
            .call(&what, |session| fetch_tokenizer(session, run, activity))
            .await
            .map_err(|status| TransferError::Refused { what: what.clone(), status })?;
        if Digest::of(&bytes) == digest {
            return Ok(bytes);
        }
    }
    Err(TransferError::Damaged { what: "the tokenizer".to_owned(), attempts: ATTEMPTS_MAX, expected: digest })
}

async fn fetch_tokenizer(
    mut session: Session,
    run: &RunName,
    activity: &Activity,
) -> Result<Vec<u8>, Status> {
    let request = DownloadTokenizerRequest { session_id: session.id, run: run.to_string() };
    let mut stream = answer(session.client.download_tokenizer(request)).await?.into_inner();
    let mut bytes = Vec::new();
    while let Some(part) = answer(stream.message()).await? {
        if part.offset != bytes.len() as u64 {
            return Err(Status::internal("a part of the tokenizer is missing"));
        }
        if part.offset + part.data.len() as u64 > TOKENIZER_BYTES_MAX {
            return Err(Status::invalid_argument(format!("it is larger than {TOKENIZER_BYTES_MAX} bytes")));
        }
        bytes.extend_from_slice(&part.data);
        activity.done_of(bytes.len() as u64, part.file_bytes);
    }
    Ok(bytes)
}
