//! Uploads of deltas.
//!
//! Each connection takes every so many chunks: blocking threads read and hash a few ahead, and they go as
//! far as the aggregator's window lets them, while its acknowledgements come.

use std::{
    collections::{BTreeMap, BTreeSet},
    future::pending,
    sync::atomic::{AtomicU32, AtomicU64, Ordering},
    time::Duration,
};

use consort_common::ids::RunName;
use consort_proto::v1::{
    DeltaBegin, DeltaChunk, DeltaFinish, UploadDeltaRequest, UploadDeltaResponse,
    federation_client::FederationClient, upload_delta_request as request,
    upload_delta_response::Part as Answer,
};
use futures::{
    StreamExt,
    future::try_join_all,
    stream::{self, Stream},
};
use tokio::{
    sync::{mpsc, watch},
    time::{Instant, timeout_at},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming, transport::Channel};

use super::{
    READ_AHEAD_CHUNKS, SILENCE_MAX, TransferError, Transfers, answer,
    delta::{Delta, DeltaDescription},
    rate::RateLimit,
    silence,
};
use crate::{link::Session, progress::Activity};

/// Messages that lie ready for the connection; what they weigh counts as under way.
const MESSAGES_READY_MAX: usize = 2;
/// Until a connection breaks, one of so many parts of a delta may be under way, over all connections, but at least
/// so many chunks and bytes, and what fills a fast line over the round trip to the aggregator: it is what a break
/// can cost. After each break it is a quarter of that, down to one of the second number of parts
/// ([`stake_bytes`]), so that twenty breaks cost at most 1.82 % of a delta in small chunks where the line itself
/// holds less. Sketch: 1 Gbit/s over a round trip of 100 ms is 12.5 MB.
const STAKE_PARTS: u64 = 128;
const STAKE_PARTS_MAX: u64 = 2560;
const STAKE_CHUNKS_MIN: u64 = 4;
const STAKE_BYTES_MIN: u64 = 128 << 10;
/// Bytes per second of the fast line: 1.25 Gbit/s, so that one of 1 Gbit/s is filled while acknowledgements wait
/// for the aggregator's disk.
const STAKE_LINE_BYTES_PER_SECOND: u64 = 156_250_000;

/// What became of an upload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UploadOutcome {
    /// It counts.
    Accepted,
    /// It had been accepted before.
    Duplicate,
}

/// Whether the aggregator says that the round is over, or that the run is another one by now.
pub fn is_too_late(error: &TransferError) -> bool {
    matches!(error, TransferError::Refused { status, .. } if status.code() == Code::FailedPrecondition)
}

impl Transfers {
    /// Sends a delta until the aggregator has accepted it or refuses it for good.
    ///
    /// # Errors
    /// [`TransferError::Refused`] with the aggregator's status: `FAILED_PRECONDITION` when the round is over.
    pub async fn upload_delta(
        &self,
        run: &RunName,
        delta: &Delta,
        activity: &Activity,
    ) -> Result<UploadOutcome, TransferError> {
        let what = format!("uploading the delta of round {}", delta.description.round);
        let breaks = AtomicU32::new(0);
        let sent = self.link.call(&what, |session| async {
            match self.send(session, run, delta, breaks.load(Ordering::Relaxed), activity).await {
                Ok(outcome) | Err(Stop::Accepted(outcome)) => Ok(outcome),
                Err(Stop::Status(status)) => {
                    // These are answers and no breaks.
                    if !matches!(status.code(), Code::Aborted | Code::ResourceExhausted) {
                        breaks.fetch_add(1, Ordering::Relaxed);
                    }
                    Err(status)
                }
            }
        });
        sent.await.map_err(|status| TransferError::Refused { what, status })
    }

    /// One try, after so many breaks: whatever the aggregator does not hold yet.
    async fn send(
        &self,
        session: Session,
        run: &RunName,
        delta: &Delta,
        breaks: u32,
        activity: &Activity,
    ) -> Result<UploadOutcome, Stop> {
        let mut clients = self.clients(&session, delta.chunks()).into_iter();
        // There are at most 16.
        #[allow(clippy::cast_possible_truncation)]
        let parts = clients.len() as u32;
        let chunk_bytes = delta.chunk_bytes(0).unwrap_or_default() as u64;
        let round_trip = session.round_trip.least().unwrap_or_default();
        let stake_bytes = stake_bytes(delta.encoded_bytes(), chunk_bytes, round_trip, breaks);
        let stake_bytes = stake_bytes / u64::from(parts.max(1));
        let begin = |part| DeltaBegin { part, parts, ..begin(&session, run, delta) };
        // The first alone: it is told whether there is anything to send.
        let mut opened = Vec::new();
        if let Some(client) = clients.next() {
            opened.push(Part::open(client, begin(0), delta, stake_bytes).await?);
        }
        let open = |(part, client)| Part::open(client, begin(part), delta, stake_bytes);
        let others = (1..).zip(clients).map(open);
        opened.extend(try_join_all(others).await?);

        let missing_bytes: u64 = opened.iter().map(|part| part.missing_bytes).sum();
        let progress = Progress { activity, done: AtomicU64::new(delta.encoded_bytes() - missing_bytes) };
        let read_ahead = (READ_AHEAD_CHUNKS / opened.len().max(1)).max(1);
        let deliver = |part: Part| part.deliver(delta, read_ahead, &self.upload_limit, &progress);
        // All calls stay open to the end: one that is dropped early looks like a lost connection.
        let mut delivered = try_join_all(opened.into_iter().map(deliver)).await?;
        match delivered.first_mut() {
            Some(first) => first.finish(&delta.description).await,
            None => Err(unexpected("has no connection").into()),
        }
    }
}

/// Bytes that may be under way, of a delta of such a length in such chunks, to an aggregator so far away, after so
/// many breaks: a line that breaks often is given little to lose.
pub(super) fn stake_bytes(delta_bytes: u64, chunk_bytes: u64, round_trip: Duration, breaks: u32) -> u64 {
    let micros = u64::try_from(round_trip.as_micros()).unwrap_or(u64::MAX);
    let line = STAKE_LINE_BYTES_PER_SECOND.saturating_mul(micros) / 1_000_000;
    let first =
        (delta_bytes / STAKE_PARTS).max(STAKE_CHUNKS_MIN * chunk_bytes).max(STAKE_BYTES_MIN).max(line);
    let last = delta_bytes / STAKE_PARTS_MAX;
    first.checked_shr(breaks.saturating_mul(2)).unwrap_or_default().max(last)
}

fn begin(session: &Session, run: &RunName, delta: &Delta) -> DeltaBegin {
    let description = &delta.description;
    DeltaBegin {
        session_id: session.id.clone(),
        run: run.to_string(),
        round: description.round,
        spec_digest: description.spec_digest.to_vec(),
        manifest_digest: description.manifest_digest.to_vec(),
        encoding: description.encoding.name().to_owned(),
        chunks: delta.chunks(),
        total_bytes: delta.encoded_bytes(),
        delta_id: description.delta_id.to_vec(),
        part: 0,
        parts: 1,
    }
}

/// Why a try ended before its last message.
enum Stop {
    /// To be judged by its code.
    Status(Status),
    /// There is nothing more to do.
    Accepted(UploadOutcome),
}

impl From<Status> for Stop {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
}

fn outcome(duplicate: bool) -> UploadOutcome {
    if duplicate { UploadOutcome::Duplicate } else { UploadOutcome::Accepted }
}

fn unexpected(what: &str) -> Status {
    Status::internal(format!("the aggregator {what}"))
}

/// Bytes that the aggregator holds, of all connections.
struct Progress<'a> {
    activity: &'a Activity,
    done: AtomicU64,
}

impl Progress<'_> {
    fn add(&self, bytes: u64) {
        let done = self.done.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.activity.done(done);
    }
}

/// What is under way on one connection, and how much may be.
struct Window {
    /// What the aggregator allows.
    bytes_max: u64,
    /// What this site allows itself.
    stake_bytes: u64,
    /// Chunks that were sent and are not acknowledged, with their lengths.
    unacknowledged: BTreeMap<u32, u64>,
    bytes: u64,
    /// When a chunk last went or was acknowledged.
    moved: Instant,
}

impl Window {
    fn new(bytes_max: u64, stake_bytes: u64) -> Self {
        Self { bytes_max, stake_bytes, unacknowledged: BTreeMap::new(), bytes: 0, moved: Instant::now() }
    }

    fn admits(&self, bytes: u64) -> bool {
        self.unacknowledged.is_empty() || self.bytes + bytes <= self.bytes_max.min(self.stake_bytes)
    }

    fn send(&mut self, index: u32, bytes: u64) {
        self.unacknowledged.insert(index, bytes);
        self.bytes += bytes;
        self.moved = Instant::now();
    }

    /// The chunk's length, if it was under way.
    fn acknowledge(&mut self, index: u32) -> Option<u64> {
        let bytes = self.unacknowledged.remove(&index)?;
        self.bytes -= bytes;
        self.moved = Instant::now();
        Some(bytes)
    }

    /// When the other side will have said nothing for too long, if it owes an answer.
    fn patience_ends(&self) -> Option<Instant> {
        (!self.unacknowledged.is_empty()).then(|| self.moved + SILENCE_MAX)
    }
}

/// One connection's share of an upload: both directions of one call.
struct Part {
    requests: mpsc::Sender<UploadDeltaRequest>,
    answers: Streaming<UploadDeltaResponse>,
    number: u32,
    missing: Vec<u32>,
    missing_bytes: u64,
    window: watch::Sender<Window>,
}

/// A share whose chunks are all acknowledged; the first can still say that the delta is whole.
struct Delivered {
    requests: Option<mpsc::Sender<UploadDeltaRequest>>,
    answers: Streaming<UploadDeltaResponse>,
}

impl Part {
    async fn open(
        mut client: FederationClient<Channel>,
        begin: DeltaBegin,
        delta: &Delta,
        stake_bytes: u64,
    ) -> Result<Self, Stop> {
        let (requests, receiver) = mpsc::channel(MESSAGES_READY_MAX);
        let (number, parts) = (begin.part, begin.parts);
        // The channel is empty and its other end is here.
        let _ = requests.send(message(request::Part::Begin(begin))).await;
        let call = client.upload_delta(ReceiverStream::new(receiver));
        let mut answers = answer(call).await?.into_inner();
        let resume = match understood(answer(answers.message()).await?)? {
            Answer::Resume(resume) => resume,
            Answer::Accepted(accepted) => return Err(Stop::Accepted(outcome(accepted.duplicate))),
            Answer::Acknowledged(_) => {
                return Err(unexpected("acknowledged a chunk before any was sent").into());
            }
        };
        let missing = missing(delta.chunks(), number, parts, &resume.held);
        let missing_bytes = missing.iter().map(|index| delta.chunk_bytes(*index).unwrap_or_default() as u64);
        let missing_bytes = missing_bytes.sum();
        let window = watch::Sender::new(Window::new(resume.window_bytes, stake_bytes));
        Ok(Self { requests, answers, number, missing, missing_bytes, window })
    }

    /// Sends what is missing; returns once all of it is acknowledged.
    async fn deliver(
        self,
        delta: &Delta,
        read_ahead: usize,
        limit: &RateLimit,
        progress: &Progress<'_>,
    ) -> Result<Delivered, Stop> {
        let Self { requests, mut answers, number, missing, window, .. } = self;
        let chunks = missing.len();
        let chunks_to_send = hashed(delta, missing, read_ahead);
        tokio::try_join!(
            send_chunks(chunks_to_send, limit, &window, &requests),
            receive_acknowledgements(&mut answers, chunks, &window, progress),
        )?;
        // The others have said all that they have to say.
        let requests = (number == 0).then_some(requests);
        Ok(Delivered { requests, answers })
    }
}

/// The chunks in order, the next few of them read and hashed ahead.
fn hashed(
    delta: &Delta,
    indices: Vec<u32>,
    read_ahead: usize,
) -> impl Stream<Item = Result<DeltaChunk, Status>> {
    let delta = delta.clone();
    let read = move |index| {
        let delta = delta.clone();
        async move {
            let read = tokio::task::spawn_blocking(move || delta.chunk(index)).await;
            let read = read.map_err(|error| Status::internal(error.to_string()))?;
            read.map_err(|error| Status::invalid_argument(error.to_string()))
        }
    };
    stream::iter(indices).map(read).buffered(read_ahead)
}

/// Sends each chunk as soon as the window and the site's limit admit it.
async fn send_chunks(
    chunks: impl Stream<Item = Result<DeltaChunk, Status>>,
    limit: &RateLimit,
    window: &watch::Sender<Window>,
    requests: &mpsc::Sender<UploadDeltaRequest>,
) -> Result<(), Stop> {
    let mut chunks = std::pin::pin!(chunks);
    let mut admitted = window.subscribe();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk?;
        let bytes = chunk.payload.len();
        // The window's other end is here: it cannot be closed.
        let _ = admitted.wait_for(|window| window.admits(bytes as u64)).await;
        limit.pass(bytes).await;
        window.send_modify(|window| window.send(chunk.index, bytes as u64));
        if requests.send(message(request::Part::Chunk(chunk))).await.is_err() {
            // A call that has ended takes no more; why it ended is among the answers.
            pending::<()>().await;
        }
    }
    Ok(())
}

/// Takes acknowledgements until there are so many.
async fn receive_acknowledgements(
    answers: &mut Streaming<UploadDeltaResponse>,
    chunks: usize,
    window: &watch::Sender<Window>,
    progress: &Progress<'_>,
) -> Result<(), Stop> {
    let mut acknowledged = 0;
    while acknowledged < chunks {
        match next_answer(answers, window).await? {
            Answer::Acknowledged(acknowledgement) => {
                let mut bytes = Some(0);
                window.send_modify(|window| {
                    window.bytes_max = acknowledgement.window_bytes;
                    for index in &acknowledgement.indices {
                        bytes = bytes.zip(window.acknowledge(*index)).map(|(sum, bytes)| sum + bytes);
                    }
                });
                progress.add(bytes.ok_or_else(|| unexpected("acknowledged a chunk that was not sent"))?);
                acknowledged += acknowledgement.indices.len();
            }
            Answer::Accepted(accepted) => return Err(Stop::Accepted(outcome(accepted.duplicate))),
            Answer::Resume(_) => return Err(unexpected("began to resume twice").into()),
        }
    }
    Ok(())
}

/// The next answer. As long as nothing is under way none is due, and the wait has no end.
async fn next_answer(
    answers: &mut Streaming<UploadDeltaResponse>,
    window: &watch::Sender<Window>,
) -> Result<Answer, Status> {
    loop {
        let due = window.borrow().patience_ends();
        let until = due.unwrap_or_else(|| Instant::now() + SILENCE_MAX);
        match timeout_at(until, answers.message()).await {
            Ok(answer) => return understood(answer?),
            // Chunks that went in the meantime have a time of their own.
            Err(_) if due.is_some() && due == window.borrow().patience_ends() => return Err(silence()),
            Err(_) => {}
        }
    }
}

fn understood(answer: Option<UploadDeltaResponse>) -> Result<Answer, Status> {
    answer
        .ok_or_else(|| Status::unavailable("the upload ended early"))?
        .part
        .ok_or_else(|| unexpected("sent an answer of a kind that this version does not know"))
}

fn message(part: request::Part) -> UploadDeltaRequest {
    UploadDeltaRequest { part: Some(part) }
}

impl Delivered {
    /// Says that all is there.
    async fn finish(&mut self, description: &DeltaDescription) -> Result<UploadOutcome, Stop> {
        let finish = DeltaFinish {
            steps: description.steps,
            tokens: description.tokens,
            train_loss: description.train_loss,
            train_seconds: description.train_seconds,
            delta_norm: description.norm,
        };
        if let Some(requests) = &self.requests {
            // Where the call has ended, the answers say why.
            let _ = requests.send(message(request::Part::Finish(finish))).await;
        }
        match understood(answer(self.answers.message()).await?)? {
            Answer::Accepted(accepted) => Ok(outcome(accepted.duplicate)),
            _ => Err(unexpected("did not answer the end of the upload").into()),
        }
    }
}

/// The chunks of a part that the aggregator lacks, ascending.
pub(super) fn missing(chunks: u32, part: u32, parts: u32, held: &[u32]) -> Vec<u32> {
    let held: BTreeSet<u32> = held.iter().copied().collect();
    (part..chunks).step_by(parts.max(1) as usize).filter(|index| !held.contains(index)).collect()
}
