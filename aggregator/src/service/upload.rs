//! Receiving a delta: each chunk is checked against the manifest's sizes and the announced total, decoded
//! to see that its values are finite, compared with its digest, made durable, and only then acknowledged.
//!
//! Memory per upload: one message, one decoded chunk.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use consort_common::{
    codec::Encoding,
    ids::{DeltaId, Digest, SiteName},
};
use consort_proto::v1::{
    ChunksAcknowledged, DeltaBegin, DeltaChunk, DeltaFinish, UploadAccepted, UploadDeltaRequest,
    UploadDeltaResponse, UploadResume, upload_delta_request as request, upload_delta_response as response,
};
use tokio::{sync::mpsc, task::spawn_blocking, time::timeout};
use tonic::{Status, Streaming};

use super::{
    digest, next_message,
    places::{UploadPlace, Uploads},
    run_name,
};
use crate::{
    driver::{Driver, DriverError, UploadTicket},
    engine::ContributionFacts,
    spool::Spool,
};

/// Where the answers of one upload go.
pub(super) type Answers = mpsc::Sender<Result<UploadDeltaResponse, Status>>;

/// Receives one delta of `site`, from `begin` to `accepted`.
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
    let Some((ticket, encoding)) = ticket(driver, site, &begin).await? else {
        return answer(answers, stall, response::Part::Accepted(UploadAccepted { duplicate: true })).await;
    };
    let place = uploads.enter(site)?;
    let mut upload = place.exclusively(Upload::resume(driver, ticket, encoding, begin.total_bytes)).await?;
    let held = upload.held.iter().copied().collect();
    answer(answers, stall, response::Part::Resume(UploadResume { held, window_bytes: 8 << 20 })).await?;

    loop {
        let message = tokio::select! {
            message = next_message(&mut stream, stall) => message?,
            status = place.superseded() => return Err(status),
        };
        let part = match message {
            Some(message) => message.part,
            None => return Err(Status::cancelled("the upload ended before `finish`; reconnect and resume")),
        };
        match part {
            Some(request::Part::Chunk(chunk)) => {
                let index = chunk.index;
                upload.receive_chunk(driver, &place, chunk).await?;
                answer(
                    answers,
                    stall,
                    response::Part::Acknowledged(ChunksAcknowledged {
                        indices: vec![index],
                        window_bytes: 8 << 20,
                    }),
                )
                .await?;
            }
            Some(request::Part::Finish(finish)) => {
                let duplicate = place.exclusively(upload.finish(driver, &finish)).await?;
                return answer(answers, stall, response::Part::Accepted(UploadAccepted { duplicate })).await;
            }
            Some(request::Part::Begin(_)) | None => {
                return Err(Status::invalid_argument("after `begin` come chunks, then `finish`"));
            }
        }
    }
}

async fn answer(answers: &Answers, stall: Duration, part: response::Part) -> Result<(), Status> {
    let message = UploadDeltaResponse { part: Some(part) };
    match timeout(stall, answers.send(Ok(message))).await {
        Ok(sent) => sent.map_err(|_| Status::cancelled("the caller went away")),
        Err(_) => Err(Status::cancelled(format!("no answer was read for {} s", stall.as_secs()))),
    }
}

/// What the aggregator knows of the delta that is announced; none if it was accepted before.
async fn ticket(
    driver: &Arc<Driver>,
    site: &SiteName,
    begin: &DeltaBegin,
) -> Result<Option<(UploadTicket, Encoding)>, Status> {
    let run = run_name(&begin.run)?;
    let delta = DeltaId::try_from(begin.delta_id.as_slice());
    let delta = delta.map_err(|error| Status::invalid_argument(format!("delta_id: {error}")))?;
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
    let chunks = material.plan.chunks();
    if begin.chunks != chunks {
        return Err(Status::invalid_argument(format!("chunks: is {}; the model has {chunks}", begin.chunks)));
    }
    let delta_bytes = material.delta_bytes(encoding);
    if begin.total_bytes != delta_bytes {
        return Err(Status::invalid_argument(format!(
            "total_bytes: is {}; a delta of this model takes {delta_bytes} as {}",
            begin.total_bytes,
            encoding.name()
        )));
    }
    Ok(Some((ticket, encoding)))
}

/// One upload under way.
struct Upload {
    ticket: UploadTicket,
    encoding: Encoding,
    spool: Arc<Spool>,
    held: BTreeSet<u32>,
    /// Payload that may still come, by what was announced.
    bytes_left: u64,
    bytes_received: u64,
    driver: Arc<Driver>,
}

impl Upload {
    async fn resume(
        driver: &Arc<Driver>,
        ticket: UploadTicket,
        encoding: Encoding,
        total_bytes: u64,
    ) -> Result<Self, Status> {
        // Asked again: the site's last upload may have been accepted meanwhile, and what counts must stay.
        driver.check_upload_open(&ticket).await?;
        let spool = driver.spool();
        let (reader, key) = (spool.clone(), ticket.key.clone());
        let held = blocking(move || {
            reader.discard_other_deltas(&key)?;
            reader.held(&key)
        })
        .await?;
        Ok(Self {
            ticket,
            encoding,
            spool,
            held: held.into_iter().collect(),
            bytes_left: total_bytes,
            bytes_received: 0,
            driver: driver.clone(),
        })
    }

    async fn receive_chunk(
        &mut self,
        driver: &Arc<Driver>,
        place: &UploadPlace,
        chunk: DeltaChunk,
    ) -> Result<(), Status> {
        let DeltaChunk { index, payload, digest: announced } = chunk;
        let length = self.ticket.material.plan.length(index);
        let length = length.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let codec = self.encoding.codec();
        let bytes = payload.len() as u64;
        if payload.len() != codec.encoded_bytes(length) {
            return Err(Status::invalid_argument(format!(
                "chunk {index}: has {bytes} bytes; its encoding takes {}",
                codec.encoded_bytes(length)
            )));
        }
        self.bytes_left = self.bytes_left.checked_sub(bytes).ok_or_else(|| {
            Status::invalid_argument(format!(
                "chunk {index}: the upload is longer than its announced total_bytes"
            ))
        })?;
        let announced = digest("chunk digest", &announced)?;
        let (spool, ticket, key) = (self.spool.clone(), &self.ticket, self.ticket.key.clone());
        let store = blocking(move || -> Result<(), DriverError> {
            if Digest::of(&payload) != announced {
                return Err(DriverError::DamagedChunk { index });
            }
            let mut values = vec![0.0; length];
            codec
                .decode(&payload, &mut values)
                .map_err(|source| DriverError::Undecodable { index, source })?;
            spool.put(&key, index, &payload, announced).map_err(DriverError::from)
        });
        place
            .exclusively(async {
                driver.check_upload_open(ticket).await?;
                store.await
            })
            .await?;
        self.held.insert(index);
        self.bytes_received += bytes;
        Ok(())
    }

    /// Whether the contribution had been accepted before.
    async fn finish(&mut self, driver: &Arc<Driver>, finish: &DeltaFinish) -> Result<bool, Status> {
        let chunks = self.ticket.material.plan.chunks();
        if let Some(missing) = (0..chunks).find(|index| !self.held.contains(index)) {
            return Err(Status::invalid_argument(format!(
                "`finish` came with {} of {chunks} chunks held; chunk {missing} is missing",
                self.held.len()
            )));
        }
        let numbers = [finish.train_loss, finish.train_seconds, finish.delta_norm];
        if !numbers.iter().all(|number| number.is_finite() && *number >= 0.0) {
            return Err(Status::invalid_argument(
                "train_loss, train_seconds and delta_norm must be finite and not negative",
            ));
        }
        let (spool, key) = (self.spool.clone(), self.ticket.key.clone());
        let spooled = blocking(move || spool.summary(&key, chunks)).await?;
        let facts = ContributionFacts {
            steps: finish.steps,
            tokens: finish.tokens,
            train_loss: finish.train_loss,
            train_seconds: finish.train_seconds,
            delta_norm: finish.delta_norm,
            bytes: spooled.bytes,
            delta_digest: spooled.digest,
            delta: self.ticket.key.delta,
            encoding: self.encoding,
        };
        // Counted before the round can end with it, so that each round's bytes are its own.
        let bytes = std::mem::take(&mut self.bytes_received);
        driver.store().add_traffic(&self.ticket.material.name, 0, bytes).await.map_err(DriverError::from)?;
        Ok(driver.delivered(&self.ticket, facts).await?)
    }
}

/// What was received is counted whatever became of the upload.
impl Drop for Upload {
    fn drop(&mut self) {
        self.driver.count_traffic(&self.ticket.material.name, 0, self.bytes_received);
    }
}

async fn blocking<T, E>(work: impl FnOnce() -> Result<T, E> + Send + 'static) -> Result<T, Status>
where
    T: Send + 'static,
    E: Into<DriverError> + Send + 'static,
{
    let result = spawn_blocking(work).await;
    let result = result
        .map_err(|_| Status::internal("the aggregator failed while it stored the chunk; see its log"))?;
    result.map_err(|error| Status::from(error.into()))
}
