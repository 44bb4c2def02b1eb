//! Receiving the model that a run is to start from, before there is the run.
//!
//! A chunk is checked as those of deltas are, and written before the next is read: the disk holds up the sender.
//! Memory per call: what HTTP/2 lets the sender have under way, and one decoded chunk.

use std::sync::Arc;

use consort_common::codec::Encoding;
use consort_proto::v1::{
    ModelChunk, StartBegin, UploadStartRequest, UploadStartResponse, upload_start_request as request,
};
use tokio::{sync::mpsc, time::timeout};
use tonic::{Status, Streaming};

use super::{blocking, digest, next_message, operator::check_length, received::Received};
use crate::{
    driver::{Driver, DriverError},
    spool::DeltaLayout,
};

/// Bytes that are written before they are made durable: what a power failure costs at most.
const BYTES_PER_SYNC: u64 = 64 << 20;

/// Where the answer of one upload goes.
pub(super) type Answers = mpsc::Sender<Result<UploadStartResponse, Status>>;

/// Receives one model, or what is missing of it.
///
/// # Errors
/// The status that the caller is to be told; what came before is kept.
pub(super) async fn receive(
    driver: &Arc<Driver>,
    mut stream: Streaming<UploadStartRequest>,
    answers: &Answers,
) -> Result<(), Status> {
    let stall = driver.limits().stall();
    let begin = next_message(&mut stream, stall).await?.and_then(|message| message.part);
    let Some(request::Part::Begin(StartBegin { specification, model_digest })) = begin else {
        return Err(Status::invalid_argument("an upload starts with `begin`"));
    };
    check_length(&specification)?;
    let upload = driver.begin_start(&specification, digest("model_digest", &model_digest)?).await?;
    let held = UploadStartResponse { held: upload.model.held() };
    timeout(stall, answers.send(Ok(held)))
        .await
        .map_err(|_| Status::cancelled(format!("no answer was read for {} s", stall.as_secs())))?
        .map_err(|_| Status::cancelled("the caller went away"))?;

    let layout = DeltaLayout::new(upload.plan, Encoding::Fp32);
    // Each chunk once.
    let mut bytes_left = layout.delta_bytes();
    let (mut values, mut unsynced_bytes) = (Vec::new(), 0);
    while let Some(message) = next_message(&mut stream, stall).await? {
        let Some(request::Part::Chunk(ModelChunk { index, payload, digest })) = message.part else {
            return Err(Status::invalid_argument("after `begin` come chunks"));
        };
        let chunk = Received::new(index, payload, &digest, layout)?;
        let bytes = chunk.payload.len() as u64;
        bytes_left = bytes_left.checked_sub(bytes).ok_or_else(|| {
            Status::invalid_argument(format!("chunk {index}: the upload is longer than the model"))
        })?;
        let model = upload.model.clone();
        values = blocking(move || {
            chunk.write(&model, &mut values)?;
            Ok::<_, DriverError>(values)
        })
        .await?;
        unsynced_bytes += bytes;
        if unsynced_bytes >= BYTES_PER_SYNC {
            driver.sync_start(&upload).await?;
            unsynced_bytes = 0;
        }
    }
    Ok(driver.sync_start(&upload).await?)
}
