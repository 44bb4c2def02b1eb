//! Receiving a delta, in three stages that run beside each other: messages are read, chunks are checked and
//! written, what was written is made durable and acknowledged. A stage that is slow, such as the disk, holds
//! up those before it and with them the sender; no other upload.
//!
//! A chunk is checked against the manifest's sizes and its digest, and decoded to see that its values are
//! finite. Memory per call: what the sender may have unacknowledged (its window), and one decoded chunk.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use consort_common::{
    codec::Encoding,
    ids::{DeltaId, SiteName},
};
use consort_proto::v1::{
    ChunksAcknowledged, DeltaBegin, DeltaChunk, DeltaFinish, UploadAccepted, UploadDeltaRequest,
    UploadDeltaResponse, UploadResume, upload_delta_request as request, upload_delta_response as response,
};
use tokio::{
    sync::{Notify, mpsc},
    time::timeout,
};
use tonic::{Status, Streaming};

use super::{
    blocking, digest, next_message,
    places::{Share, UploadPlace, Uploads},
    received::Received,
    run_name,
};
use crate::{
    driver::{Driver, DriverError, UploadTicket},
    engine::ContributionFacts,
    spool::{DeltaLayout, SpoolError, SpooledDelta},
};

/// Chunks that were read and wait to be written, per call.
const QUEUE_CHUNKS_MAX: usize = 2;

/// Where the answers of one upload go.
pub(super) type Answers = mpsc::Sender<Result<UploadDeltaResponse, Status>>;

/// Receives one delta of `site`, or its part of one, from `begin` to `accepted`.
///
/// # Errors
/// The status that the caller is to be told.
pub(super) async fn receive(
    driver: &Arc<Driver>,
    uploads: &Arc<Uploads>,
    site: &SiteName,
    mut stream: Streaming<UploadDeltaRequest>,
    answers: &Answers,
) -> Result<(), Status> {
    let stall = driver.limits().stall();
    let Some(request::Part::Begin(begin)) =
        next_message(&mut stream, stall).await?.and_then(|message| message.part)
    else {
        return Err(Status::invalid_argument("an upload starts with `begin`"));
    };
    let Some(announced) = announced(driver, site, &begin).await? else {
        return answer(answers, stall, response::Part::Accepted(UploadAccepted { duplicate: true })).await;
    };
    let place = uploads.enter(site, announced.ticket.key.delta, announced.share)?;
    let upload = place.exclusively(Upload::resume(driver, &place, announced, answers)).await?;
    let held = upload.held();
    let window_bytes = place.window_bytes();
    answer(answers, stall, response::Part::Resume(UploadResume { held, window_bytes })).await?;

    let finish = upload.receive(&mut stream).await?;
    let duplicate = place.exclusively(upload.finish(&finish)).await?;
    answer(answers, stall, response::Part::Accepted(UploadAccepted { duplicate })).await
}

async fn answer(answers: &Answers, stall: Duration, part: response::Part) -> Result<(), Status> {
    let message = UploadDeltaResponse { part: Some(part) };
    match timeout(stall, answers.send(Ok(message))).await {
        Ok(sent) => sent.map_err(|_| Status::cancelled("the caller went away")),
        Err(_) => Err(Status::cancelled(format!("no answer was read for {} s", stall.as_secs()))),
    }
}

/// An upload that may begin.
struct Announced {
    ticket: UploadTicket,
    layout: DeltaLayout,
    share: Share,
}

/// What the aggregator knows of the delta that is announced; none if it was accepted before.
async fn announced(
    driver: &Arc<Driver>,
    site: &SiteName,
    begin: &DeltaBegin,
) -> Result<Option<Announced>, Status> {
    let run = run_name(&begin.run)?;
    let delta = DeltaId::try_from(begin.delta_id.as_slice());
    let delta = delta.map_err(|error| Status::invalid_argument(format!("delta_id: {error}")))?;
    let share = Share::new(begin.part, begin.parts)?;
    let ticket = driver.upload_ticket(site, &begin.session_id, &run, begin.round, delta).await?;
    let Some(ticket) = ticket else { return Ok(None) };

    let material = &ticket.material;
    for (what, theirs, ours) in [
        ("spec_digest", &begin.spec_digest, material.spec_digest),
        ("manifest_digest", &begin.manifest_digest, material.manifest_digest),
    ] {
        if digest(what, theirs)? != ours {
            return Err(DriverError::OtherDigest { what, run }.into());
        }
    }
    let preferred = material.spec.wire.delta_encoding;
    let encoding = Encoding::parse(&begin.encoding)
        .filter(|encoding| [preferred, Encoding::Fp32].contains(encoding))
        .ok_or_else(|| {
            Status::invalid_argument(format!(
                "encoding: is {:?}; the run's specification says {:?}, and \"fp32\" is taken too",
                begin.encoding.chars().take(40).collect::<String>(),
                preferred.name()
            ))
        })?;
    let layout = DeltaLayout::new(material.layout().fragment(begin.round).plan(), encoding);
    if begin.chunks != layout.chunks() {
        return Err(Status::invalid_argument(format!(
            "chunks: is {}; a delta of this round has {}",
            begin.chunks,
            layout.chunks()
        )));
    }
    if begin.total_bytes != layout.delta_bytes() {
        return Err(Status::invalid_argument(format!(
            "total_bytes: is {}; a delta of this round takes {} as {}",
            begin.total_bytes,
            layout.delta_bytes(),
            encoding.name()
        )));
    }
    Ok(Some(Announced { ticket, layout, share }))
}

/// One upload call under way.
struct Upload<'a> {
    driver: &'a Arc<Driver>,
    place: &'a UploadPlace,
    answers: &'a Answers,
    ticket: UploadTicket,
    share: Share,
    delta: Arc<SpooledDelta>,
    bytes_received: AtomicU64,
}

impl<'a> Upload<'a> {
    async fn resume(
        driver: &'a Arc<Driver>,
        place: &'a UploadPlace,
        announced: Announced,
        answers: &'a Answers,
    ) -> Result<Self, Status> {
        let Announced { ticket, layout, share } = announced;
        // Asked again: the site's last upload may have been accepted meanwhile, and what counts must stay.
        driver.check_upload_open(&ticket).await?;
        let (spool, key) = (driver.spool(), ticket.key.clone());
        let delta = blocking(move || {
            spool.discard_other_deltas(&key)?;
            let delta = spool.receive(&key, layout)?;
            // What a call that broke off had written need not be sent again.
            delta.sync(|index| share.has(index))?;
            Ok::<_, SpoolError>(delta)
        })
        .await?;
        driver.chunks_stored(&delta, &delta.held());
        Ok(Self { driver, place, answers, ticket, share, delta, bytes_received: AtomicU64::new(0) })
    }

    /// The chunks of this call's share that are durable.
    fn held(&self) -> Vec<u32> {
        self.delta.held().into_iter().filter(|index| self.share.has(*index)).collect()
    }

    /// Receives chunks until `finish` comes, by which time all of them are durable and acknowledged. What
    /// came before the sender broke off is stored in any case.
    async fn receive(&self, stream: &mut Streaming<UploadDeltaRequest>) -> Result<DeltaFinish, Status> {
        let (received, queue) = mpsc::channel(QUEUE_CHUNKS_MAX);
        let written = Written::default();
        let (finish, (), ()) = tokio::try_join!(
            async { Ok(self.read(stream, received).await) },
            self.write(queue, &written),
            self.acknowledge(&written),
        )?;
        finish
    }

    /// Reads messages until `finish`, an error or the end.
    async fn read(
        &self,
        stream: &mut Streaming<UploadDeltaRequest>,
        received: mpsc::Sender<Received>,
    ) -> Result<DeltaFinish, Status> {
        let stall = self.driver.limits().stall();
        // Each chunk once, and none of another part's.
        let mut bytes_left = self.delta.layout().delta_bytes();
        loop {
            let message = tokio::select! {
                message = next_message(stream, stall) => message?,
                status = self.place.superseded() => return Err(status),
            };
            let part = match message {
                Some(message) => message.part,
                None => {
                    return Err(Status::cancelled("the upload ended before `finish`; reconnect and resume"));
                }
            };
            match part {
                Some(request::Part::Chunk(chunk)) => {
                    let chunk = self.check(chunk, &mut bytes_left)?;
                    self.driver.check_upload_open(&self.ticket).await?;
                    // Writing has failed, and says why, if it takes nothing any more.
                    let _ = received.send(chunk).await;
                }
                Some(request::Part::Finish(finish)) if self.share.finishes() => return Ok(finish),
                Some(request::Part::Finish(_)) => {
                    return Err(Status::invalid_argument("`finish` comes with part 0 of an upload"));
                }
                Some(request::Part::Begin(_)) | None => {
                    return Err(Status::invalid_argument("after `begin` come chunks, then `finish`"));
                }
            }
        }
    }

    /// Checks what can be seen without looking at the payload.
    fn check(&self, chunk: DeltaChunk, bytes_left: &mut u64) -> Result<Received, Status> {
        let DeltaChunk { index, payload, digest } = chunk;
        let received = Received::new(index, payload, &digest, self.delta.layout())?;
        if !self.share.has(index) {
            return Err(Status::invalid_argument(format!(
                "chunk {index}: belongs to another part of this upload"
            )));
        }
        *bytes_left = bytes_left.checked_sub(received.payload.len() as u64).ok_or_else(|| {
            Status::invalid_argument(format!(
                "chunk {index}: the upload is longer than its announced total_bytes"
            ))
        })?;
        Ok(received)
    }

    /// The second stage: checks and writes what was read, in its order.
    async fn write(&self, mut queue: mpsc::Receiver<Received>, written: &Written) -> Result<(), Status> {
        let mut values = Vec::new();
        while let Some(chunk) = queue.recv().await {
            let (delta, bytes) = (self.delta.clone(), chunk.payload.len() as u64);
            values = blocking(move || {
                chunk.write(&delta, &mut values)?;
                Ok::<_, DriverError>(values)
            })
            .await?;
            self.bytes_received.fetch_add(bytes, Ordering::Relaxed);
            written.some.notify_one();
        }
        written.all.cancel();
        Ok(())
    }

    /// The last stage: one sync for all that was written while the one before it ran, then the
    /// acknowledgement.
    async fn acknowledge(&self, written: &Written) -> Result<(), Status> {
        let stall = self.driver.limits().stall();
        let mut more = true;
        while more {
            more = tokio::select! {
                biased;
                () = written.some.notified() => true,
                () = written.all.cancelled() => false,
            };
            let (delta, share) = (self.delta.clone(), self.share);
            let indices = blocking(move || delta.sync(|index| share.has(index))).await?;
            if !indices.is_empty() {
                self.driver.chunks_stored(&self.delta, &indices);
                let acknowledged = ChunksAcknowledged { indices, window_bytes: self.place.window_bytes() };
                // Whoever broke off reads no acknowledgements; the chunks are stored all the same.
                let _ = answer(self.answers, stall, response::Part::Acknowledged(acknowledged)).await;
            }
        }
        Ok(())
    }

    /// Hands the delta over to the round. Tells whether it had been accepted before.
    async fn finish(&self, finish: &DeltaFinish) -> Result<bool, Status> {
        let numbers = [finish.train_loss, finish.train_seconds, finish.delta_norm];
        if !numbers.iter().all(|number| number.is_finite() && *number >= 0.0) {
            return Err(Status::invalid_argument(
                "train_loss, train_seconds and delta_norm must be finite and not negative",
            ));
        }
        self.delta.seal();
        let delivered = self.deliver(finish).await;
        if delivered.is_err() {
            self.delta.unseal();
        }
        delivered
    }

    async fn deliver(&self, finish: &DeltaFinish) -> Result<bool, Status> {
        let spooled = self.delta.summary().map_err(|error| match error {
            SpoolError::Missing { index, .. } => Status::invalid_argument(format!(
                "`finish` came with {} of {} chunks held; chunk {index} is missing",
                self.delta.held().len(),
                self.delta.layout().chunks()
            )),
            error => DriverError::from(error).into(),
        })?;
        let facts = ContributionFacts {
            steps: finish.steps,
            tokens: finish.tokens,
            train_loss: finish.train_loss,
            train_seconds: finish.train_seconds,
            delta_norm: finish.delta_norm,
            bytes: spooled.bytes,
            delta_digest: spooled.digest,
            delta: self.ticket.key.delta,
            encoding: self.delta.layout().encoding(),
        };
        // Counted before the round can end with it, so that each round's bytes are its own.
        let bytes = self.bytes_received.swap(0, Ordering::Relaxed);
        let store = self.driver.store();
        store.add_traffic(&self.ticket.material.name, 0, bytes).await.map_err(DriverError::from)?;
        Ok(self.driver.delivered(&self.ticket, facts).await?)
    }
}

/// What was received is counted whatever became of the upload.
impl Drop for Upload<'_> {
    fn drop(&mut self) {
        let bytes = self.bytes_received.load(Ordering::Relaxed);
        self.driver.count_traffic(&self.ticket.material.name, 0, bytes);
    }
}

/// Tells the last stage that there is something to make durable, or that nothing more will come.
#[derive(Default)]
struct Written {
    some: Notify,
    all: tokio_util::sync::CancellationToken,
}
