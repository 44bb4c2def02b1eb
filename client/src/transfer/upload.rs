//! Uploads: a delta, chunk by chunk, encoded on the way.

use std::{collections::BTreeSet, sync::Arc};

use bytes::Bytes;
use consort_common::{
    atomic_file::{write_atomically, write_atomically_with},
    chunk::ChunkPlan,
    codec::Encoding,
    ids::{Digest, RunName},
};
use consort_proto::v1::{
    DeltaBegin, DeltaChunk, DeltaFinish, UploadDeltaRequest, UploadDeltaResponse, upload_delta_request,
    upload_delta_response::Part,
};
use rand::RngCore;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use super::{TransferError, answer, file_error};
use crate::{
    link::{Link, Session},
    model_file::ModelFile,
    progress::Activity,
    state::{self, RunDirectory},
};

/// Chunks that may be on their way unacknowledged. Sketch: at 4 MiB each, 32 MiB fill 1 Gbit/s over a
/// round trip of 250 ms, the aggregator's fsync included.
const UNACKNOWLEDGED_MAX: usize = 8;

/// What is to be said of a delta, besides its values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeltaDescription {
    /// The round that it is of.
    pub round: u32,
    /// The run's specification.
    pub spec_digest: Digest,
    /// The tensors.
    pub manifest_digest: Digest,
    /// The model that training started from.
    pub base_digest: Digest,
    /// The run's cumulative step before the round.
    pub first_step: u64,
    /// Local steps taken.
    pub steps: u32,
    /// Tokens trained.
    pub tokens: u64,
    /// Mean loss over the round, in nats per token.
    pub train_loss: f64,
    /// Seconds of local training.
    pub train_seconds: f64,
    /// L2 norm of the values.
    pub norm: f64,
    /// BLAKE3 of the values, fp32 little-endian.
    pub digest: Digest,
    /// How it travels.
    pub encoding: Encoding,
    /// Total of the encoded chunks, in bytes.
    pub encoded_bytes: u64,
    /// Drawn once; names the delta towards the aggregator.
    pub delta_id: [u8; 16],
}

/// A round's delta, on disk.
#[derive(Debug, Clone)]
pub struct Delta {
    /// What is to be said of it.
    pub description: DeltaDescription,
    plan: ChunkPlan,
    values: Arc<ModelFile>,
}

/// What became of an upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UploadOutcome {
    /// It counts.
    Accepted,
    /// It had been accepted before.
    Duplicate,
}

impl Delta {
    /// Makes the values durable. The delta is not there before [`describe`](Self::describe) has added
    /// its description.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn write_values(
        directory: &RunDirectory,
        round: u32,
        values: &[f32],
    ) -> Result<Digest, TransferError> {
        let path = directory.delta(round);
        // Little-endian machines only: the same assumption as in libtorch's own files.
        let bytes: &[u8] = bytemuck::cast_slice(values);
        write_atomically_with(&path, |file| std::io::Write::write_all(file, bytes))
            .map_err(file_error("write", &path))?;
        Ok(Digest::of_parallel(bytes))
    }

    /// Adds the description: from now on the delta is there, and stays until it is removed.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn describe(directory: &RunDirectory, description: &DeltaDescription) -> Result<(), TransferError> {
        let path = directory.delta_description(description.round);
        let json = serde_json::to_vec_pretty(description).unwrap_or_default();
        write_atomically(&path, &json).map_err(file_error("write", &path))
    }

    /// The delta of `round`, if it is there, whole and undamaged.
    pub fn open(directory: &RunDirectory, round: u32, plan: ChunkPlan) -> Option<Self> {
        let description = std::fs::read(directory.delta_description(round)).ok()?;
        let description: DeltaDescription = serde_json::from_slice(&description).ok()?;
        let values = ModelFile::open(&directory.delta(round)).ok()?;
        let whole = values.values().len() as u64 == plan.parameters()
            && Digest::of_parallel(values.bytes()) == description.digest;
        whole.then(|| Self { description, plan, values: Arc::new(values) })
    }

    /// Removes the delta of `round`.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn remove(directory: &RunDirectory, round: u32) -> Result<(), TransferError> {
        state::remove(&directory.delta_description(round))?;
        Ok(state::remove(&directory.delta(round))?)
    }

    fn encode(&self, index: u32) -> Result<DeltaChunk, TransferError> {
        let range = self.plan.range(index)?;
        // Both ends are inside the file, whose length `open` compared with the plan.
        #[allow(clippy::cast_possible_truncation)]
        let values = &self.values.values()[range.start as usize..range.end as usize];
        let payload = self.description.encoding.encode(values);
        let digest = Digest::of(&payload).to_vec();
        Ok(DeltaChunk { index, payload: Bytes::from(payload), digest })
    }
}

/// Total length of the encoded chunks, in bytes.
pub fn encoded_bytes(values: &[f32], plan: ChunkPlan, encoding: Encoding) -> u64 {
    let lengths = values.chunks(plan.chunk_parameters() as usize);
    lengths.map(|chunk| encoding.codec().encoded_bytes(chunk.len()) as u64).sum()
}

/// A name for a new delta.
pub fn draw_delta_id() -> [u8; 16] {
    let mut id = [0; 16];
    rand::rng().fill_bytes(&mut id);
    id
}

/// Sends a delta until the aggregator has accepted it or refuses it for good.
///
/// # Errors
/// [`TransferError::Refused`] with the aggregator's status: `FAILED_PRECONDITION` when the round is over.
pub async fn upload_delta(
    link: &Link,
    run: &RunName,
    delta: &Delta,
    activity: &Activity,
) -> Result<UploadOutcome, TransferError> {
    let what = format!("uploading the delta of round {}", delta.description.round);
    link.call(&what, |session| send(session, run, delta, activity))
        .await
        .map_err(|status| TransferError::Refused { what, status })
}

/// One try: whatever the aggregator does not hold yet.
async fn send(
    session: Session,
    run: &RunName,
    delta: &Delta,
    activity: &Activity,
) -> Result<UploadOutcome, Status> {
    let mut upload = Upload::open(session, run, delta).await?;
    let held = match upload.answer().await? {
        Part::Resume(resume) => resume.held,
        Part::Accepted(accepted) => return Ok(outcome(accepted.duplicate)),
        Part::Acknowledged(_) => return Err(unexpected("acknowledged a chunk before any was sent")),
    };
    let chunks = delta.plan.chunks();
    let mut missing = missing(chunks, &held).into_iter();
    let mut unacknowledged = BTreeSet::new();
    let mut acknowledged = u64::from(chunks) - missing.len() as u64;
    loop {
        activity.done(delta.description.encoded_bytes * acknowledged / u64::from(chunks).max(1));
        while unacknowledged.len() < UNACKNOWLEDGED_MAX
            && let Some(index) = missing.next()
        {
            let delta = delta.clone();
            let encoded = tokio::task::spawn_blocking(move || delta.encode(index)).await;
            let chunk = encoded
                .map_err(|error| Status::internal(error.to_string()))?
                .map_err(|error| Status::invalid_argument(error.to_string()))?;
            upload.send(upload_delta_request::Part::Chunk(chunk)).await?;
            unacknowledged.insert(index);
        }
        if unacknowledged.is_empty() {
            break;
        }
        match upload.answer().await? {
            Part::Acknowledged(chunks) => {
                for index in chunks.indices {
                    if !unacknowledged.remove(&index) {
                        return Err(unexpected("acknowledged a chunk that was not sent"));
                    }
                    acknowledged += 1;
                }
            }
            Part::Accepted(accepted) => return Ok(outcome(accepted.duplicate)),
            Part::Resume(_) => return Err(unexpected("began to resume twice")),
        }
    }
    upload.finish(&delta.description).await
}

fn outcome(duplicate: bool) -> UploadOutcome {
    if duplicate { UploadOutcome::Duplicate } else { UploadOutcome::Accepted }
}

fn unexpected(what: &str) -> Status {
    Status::internal(format!("the aggregator {what}"))
}

/// The chunks that the aggregator lacks, ascending.
pub(super) fn missing(chunks: u32, held: &[u32]) -> Vec<u32> {
    let held: BTreeSet<u32> = held.iter().copied().collect();
    (0..chunks).filter(|index| !held.contains(index)).collect()
}

/// Both directions of one upload call.
struct Upload {
    requests: mpsc::Sender<UploadDeltaRequest>,
    answers: Streaming<UploadDeltaResponse>,
}

impl Upload {
    async fn open(mut session: Session, run: &RunName, delta: &Delta) -> Result<Self, Status> {
        // Room for every message that can be under way: sending never waits while an answer is due.
        let (requests, receiver) = mpsc::channel(UNACKNOWLEDGED_MAX + 2);
        let description = &delta.description;
        let begin = DeltaBegin {
            session_id: session.id,
            run: run.to_string(),
            round: description.round,
            spec_digest: description.spec_digest.to_vec(),
            manifest_digest: description.manifest_digest.to_vec(),
            encoding: description.encoding.name().to_owned(),
            chunks: delta.plan.chunks(),
            total_bytes: description.encoded_bytes,
            delta_id: description.delta_id.to_vec(),
            part: 0,
            parts: 1,
        };
        let begin = UploadDeltaRequest { part: Some(upload_delta_request::Part::Begin(begin)) };
        // The channel is empty and its other end is here.
        let _ = requests.send(begin).await;
        let answers = answer(session.client.upload_delta(ReceiverStream::new(receiver))).await?.into_inner();
        Ok(Self { requests, answers })
    }

    async fn send(&self, part: upload_delta_request::Part) -> Result<(), Status> {
        // A call that has ended takes no more; why it ended is among the answers.
        let _ = self.requests.send(UploadDeltaRequest { part: Some(part) }).await;
        Ok(())
    }

    async fn answer(&mut self) -> Result<Part, Status> {
        answer(self.answers.message())
            .await?
            .ok_or_else(|| Status::unavailable("the upload ended early"))?
            .part
            .ok_or_else(|| unexpected("sent an answer of a kind that this version does not know"))
    }

    async fn finish(mut self, description: &DeltaDescription) -> Result<UploadOutcome, Status> {
        let finish = DeltaFinish {
            steps: description.steps,
            tokens: description.tokens,
            train_loss: description.train_loss,
            train_seconds: description.train_seconds,
            delta_norm: description.norm,
        };
        self.send(upload_delta_request::Part::Finish(finish)).await?;
        match self.answer().await? {
            Part::Accepted(accepted) => Ok(outcome(accepted.duplicate)),
            _ => Err(unexpected("did not answer the end of the upload")),
        }
    }
}

/// Whether the aggregator says that the round is over, or that the run is another one by now.
pub fn is_too_late(error: &TransferError) -> bool {
    matches!(error, TransferError::Refused { status, .. } if status.code() == Code::FailedPrecondition)
}
