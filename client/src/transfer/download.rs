//! Downloads of global models into the run's folder.
//!
//! Each connection receives its chunks and hands them to blocking threads, which verify and decode them;
//! one writer takes them in order and appends them to the file.

use std::{convert::Infallible, path::PathBuf, sync::Arc, sync::PoisonError};

use consort_common::{
    chunk::{ChunkPlan, NoSuchChunk},
    codec::{DecodeError, Encoding},
    fragment::Fragment,
    ids::{Digest, RunName},
};
use consort_proto::v1::{
    DownloadModelRequest, DownloadModelResponse, ModelChunk, ModelHeader,
    download_model_response::Part as Sent, federation_client::FederationClient,
};
use futures::future::{join_all, pending};
use tokio::{sync::mpsc, task::JoinHandle};
use tonic::{Status, Streaming, transport::Channel};
use tracing::warn;

use super::{
    READ_AHEAD_CHUNKS, TransferError, Transfers, answer, blocking, file_error,
    part::{Part, publish},
    rate::RateLimit,
    verified::Verified,
};
use crate::{
    link::Session,
    model_file::ModelFile,
    progress::Activity,
    state::{self, RunDirectory},
};

/// How often a whole model may arrive wrong before that is said to be the aggregator's fault.
const ATTEMPTS_MAX: u32 = 3;

/// What is to be downloaded.
struct Model<'a> {
    run: &'a RunName,
    version: u32,
    digest: Digest,
    plan: ChunkPlan,
    /// What makes it of the version before.
    fragment: Fragment,
}

/// The version before, which an update is added to and whose other fragments stay. That the file has its name says that it was verified
/// when it arrived; should the disk have changed it since, the digest of the result is wrong, and the model
/// is downloaded whole.
#[derive(Clone)]
struct Held {
    version: u32,
    file: Arc<ModelFile>,
}

impl Transfers {
    /// Brings a global model into the run's folder, as flat fp32 little-endian values, and removes older ones.
    /// A model that is there already is verified and used; one that this process has verified before is not
    /// read again for that. Of one whose predecessor is there, only the `fragment` that the round between them
    /// changed is downloaded.
    ///
    /// # Errors
    /// If the aggregator refuses, offers another model, or the disk fails.
    pub async fn download_model(
        &self,
        directory: &RunDirectory,
        (run, version, digest): (&RunName, u32, Digest),
        fragment: Fragment,
        activity: &Activity,
    ) -> Result<PathBuf, TransferError> {
        let path = directory.model(version);
        if self.is_there(&path, digest).await? {
            return Ok(path);
        }
        let part = directory.model_part(version);
        let plan = fragment.model();
        let model = Model { run, version, digest, plan, fragment };
        let mut held = held(directory, version, plan);
        for _ in 0..ATTEMPTS_MAX {
            let what = format!("downloading version {version} of the model");
            // The inner result is what repeating would not mend.
            let fetched = self.link.call(&what, |session| async {
                match self.fetch(session, &model, held.as_ref(), &part, activity).await {
                    Ok(digest) => Ok(Ok(digest)),
                    Err(Stop::Status(status)) => Err(status),
                    Err(Stop::Final(error)) => Ok(Err(Fault::Final(error))),
                    Err(Stop::Undecodable(index, error)) => Ok(Err(Fault::Undecodable(index, error))),
                }
            });
            match fetched.await.map_err(|status| TransferError::Refused { what, status })? {
                Ok(found) if found == digest => {
                    publish(&part, &path)?;
                    self.note(Verified::note(&path, digest).map_err(file_error("read", &path))?);
                    directory.keep_only_model(version)?;
                    return Ok(path);
                }
                Ok(_) => warn!("version {version} arrived with a wrong digest; downloading it again"),
                Err(Fault::Undecodable(index, error)) => {
                    warn!(
                        "chunk {index} of version {version} cannot be decoded ({error}); downloading it again"
                    );
                }
                Err(Fault::Final(error)) => return Err(error),
            }
            // Whole this time: the version that is held may be what is wrong.
            held = None;
            state::remove(&part)?;
        }
        let what = format!("version {version} of the model");
        Err(TransferError::Damaged { what, attempts: ATTEMPTS_MAX, expected: digest })
    }

    /// Whether the file is there and has this digest.
    async fn is_there(&self, path: &std::path::Path, digest: Digest) -> Result<bool, TransferError> {
        let noted = self.verified.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let path = path.to_owned();
        if noted.is_some_and(|noted| noted.holds(&path, digest)) {
            return Ok(true);
        }
        let hashed = blocking(move || Verified::hash(&path).map_err(file_error("read", &path))).await?;
        let there = hashed.filter(|hashed| hashed.had(digest));
        Ok(there.map(|verified| self.note(verified)).is_some())
    }

    fn note(&self, verified: Verified) {
        *self.verified.lock().unwrap_or_else(PoisonError::into_inner) = Some(verified);
    }

    /// One try: the chunks that are missing from `part`, in order; then the digest of the whole.
    async fn fetch(
        &self,
        session: Session,
        model: &Model<'_>,
        held: Option<&Held>,
        part: &std::path::Path,
        activity: &Activity,
    ) -> Result<Digest, Stop> {
        let (path, plan) = (part.to_owned(), model.plan);
        let part = blocking(move || Part::open(&path, plan)).await?;
        let first = part.chunks();
        if first == plan.chunks() {
            return Ok(blocking(|| part.finish()).await?);
        }
        let fragment = held.map_or(Fragment::whole(plan), |_| model.fragment);
        // What the connections deal out among them.
        let coming = (fragment.next_chunk(first)..plan.chunks()).step_by(fragment.count() as usize);
        // There are not more than the model has.
        #[allow(clippy::cast_possible_truncation)]
        let clients = self.clients(&session, coming.len() as u32);
        let read_ahead = (READ_AHEAD_CHUNKS / clients.len()).max(1);
        // There are at most 16.
        #[allow(clippy::cast_possible_truncation)]
        let stride = clients.len() as u32 * fragment.count();
        let mut queues = Vec::new();
        let mut connections = Vec::new();
        for (first, client) in coming.zip(clients) {
            let (queue, receiver) = mpsc::channel(read_ahead);
            queues.push(receiver);
            let request = DownloadModelRequest {
                session_id: session.id.clone(),
                run: model.run.to_string(),
                version: model.version,
                first_chunk: first,
                stride,
                held_version: held.map(|held| held.version),
            };
            connections.push(receive(client, request, model, held, &self.download_limit, queue));
        }
        // What stops a connection is told through its queue, after the chunks that came before.
        let receiving = async {
            join_all(connections).await;
            pending::<Infallible>().await
        };
        let part = tokio::select! {
            part = write(part, plan, (held, fragment), queues, activity) => part?,
            never = receiving => match never {},
        };
        Ok(blocking(|| part.finish()).await?)
    }
}

/// The version before, if it is there.
fn held(directory: &RunDirectory, version: u32, plan: ChunkPlan) -> Option<Held> {
    let version = version.checked_sub(1)?;
    let file = ModelFile::open(&directory.model(version)).ok()?;
    (file.values().len() as u64 == plan.parameters()).then(|| Held { version, file: Arc::new(file) })
}

/// Why a try ended.
enum Stop {
    /// To be judged by its code.
    Status(Status),
    /// Not to be repeated.
    Final(TransferError),
    /// A chunk is what was announced, and no encoding of values.
    Undecodable(u32, DecodeError),
}

/// What repeating the same call would not mend.
enum Fault {
    Final(TransferError),
    Undecodable(u32, DecodeError),
}

impl From<Status> for Stop {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
}

impl From<TransferError> for Stop {
    fn from(error: TransferError) -> Self {
        Self::Final(error)
    }
}

/// A chunk that is being verified and decoded, or why there is no further one.
type Arriving = Result<JoinHandle<Result<Vec<f32>, Stop>>, Stop>;

/// Appends the chunks in order: those of the fragment, which are dealt out to the queues in turn, and the others as
/// they are held.
async fn write(
    mut part: Part,
    plan: ChunkPlan,
    (held, fragment): (Option<&Held>, Fragment),
    mut queues: Vec<mpsc::Receiver<Arriving>>,
    activity: &Activity,
) -> Result<Part, Stop> {
    let connections = queues.len();
    let mut turn = 0;
    while part.chunks() < plan.chunks() {
        let index = part.chunks();
        let kept = held.filter(|_| fragment.position(index).is_none());
        if let Some(held) = kept {
            let (file, until) = (held.file.clone(), fragment.next_chunk(index).min(plan.chunks()));
            let append = move || {
                for index in index..until {
                    part.append(chunk_of(&file, plan, index)?)?;
                }
                Ok(part)
            };
            part = blocking(append).await?;
            continue;
        }
        let arriving = queues[turn % connections].recv().await;
        turn += 1;
        let decoding =
            arriving.unwrap_or_else(|| Err(Status::internal("the download ended early").into()))?;
        let values = decoding.await.map_err(|error| TransferError::Internal(error.to_string()))??;
        part = blocking(move || part.append(&values).map(|()| part)).await?;
        let bytes = u64::from(part.chunks()) * u64::from(plan.chunk_parameters()) * 4;
        activity.done_of(bytes.min(plan.parameters() * 4), plan.parameters() * 4);
    }
    Ok(part)
}

/// A chunk of a file that has the plan's length: `held` looked.
#[allow(clippy::cast_possible_truncation)]
fn chunk_of(file: &ModelFile, plan: ChunkPlan, index: u32) -> Result<&[f32], NoSuchChunk> {
    let range = plan.range(index)?;
    Ok(&file.values()[range.start as usize..range.end as usize])
}

/// Receives one connection's chunks, and has them verified and decoded.
async fn receive(
    client: FederationClient<Channel>,
    request: DownloadModelRequest,
    model: &Model<'_>,
    held: Option<&Held>,
    limit: &RateLimit,
    queue: mpsc::Sender<Arriving>,
) {
    if let Err(stop) = receive_chunks(client, request, model, held, limit, &queue).await {
        // Lost only when nobody asks for more.
        let _ = queue.send(Err(stop)).await;
    }
}

async fn receive_chunks(
    mut client: FederationClient<Channel>,
    request: DownloadModelRequest,
    model: &Model<'_>,
    held: Option<&Held>,
    limit: &RateLimit,
    queue: &mpsc::Sender<Arriving>,
) -> Result<(), Stop> {
    let indices = (request.first_chunk..model.plan.chunks()).step_by(request.stride as usize);
    let mut stream = answer(client.download_model(request)).await?.into_inner();
    let form = Form::new(&header(&mut stream).await?, model, held)?;
    for index in indices {
        let chunk = chunk(&mut stream, index).await?;
        limit.pass(chunk.payload.len()).await;
        let form = form.clone();
        let decoding = tokio::task::spawn_blocking(move || form.values(&chunk));
        if queue.send(Ok(decoding)).await.is_err() {
            break;
        }
    }
    Ok(())
}

async fn next(stream: &mut Streaming<DownloadModelResponse>) -> Result<Sent, Status> {
    answer(stream.message())
        .await?
        .ok_or_else(|| Status::unavailable("the download ended early"))?
        .part
        .ok_or_else(|| {
            Status::internal("the aggregator sent a part of a kind that this version does not know")
        })
}

async fn header(stream: &mut Streaming<DownloadModelResponse>) -> Result<ModelHeader, Status> {
    match next(stream).await? {
        Sent::Header(header) => Ok(header),
        Sent::Chunk(_) => Err(Status::internal("the download begins without a header")),
    }
}

async fn chunk(stream: &mut Streaming<DownloadModelResponse>, index: u32) -> Result<ModelChunk, Status> {
    match next(stream).await? {
        Sent::Chunk(chunk) if chunk.index == index => Ok(chunk),
        Sent::Chunk(chunk) => {
            Err(Status::internal(format!("chunk {} came where {index} was due", chunk.index)))
        }
        Sent::Header(_) => Err(Status::internal("a second header came")),
    }
}

/// How chunks travel, and what they are added to.
#[derive(Clone)]
struct Form {
    plan: ChunkPlan,
    encoding: Encoding,
    base: Option<Arc<ModelFile>>,
}

impl Form {
    /// Reads the header, which must be of the model that was asked for.
    fn new(header: &ModelHeader, model: &Model<'_>, held: Option<&Held>) -> Result<Self, TransferError> {
        let plan = model.plan;
        let expected = ModelHeader {
            parameters: plan.parameters(),
            chunk_parameters: plan.chunk_parameters(),
            chunks: plan.chunks(),
            digest: model.digest.to_vec(),
            encoding: header.encoding.clone(),
            base_version: header.base_version,
        };
        if *header != expected {
            return Err(TransferError::OtherModel(format!(
                "it has {} parameters in {} chunks, the specification {} in {}; its digest {} the instruction's",
                header.parameters,
                header.chunks,
                plan.parameters(),
                plan.chunks(),
                if header.digest == expected.digest { "is" } else { "is not" },
            )));
        }
        let encoding = Encoding::parse(&header.encoding).ok_or_else(|| {
            let name: String = header.encoding.chars().take(40).collect();
            TransferError::OtherModel(format!(
                "it is encoded as {name:?}, which this version does not speak: update consort-client"
            ))
        })?;
        let base = match (header.base_version, held) {
            (None, _) => None,
            (Some(base), Some(held)) if base == held.version => Some(held.file.clone()),
            (Some(base), _) => {
                return Err(TransferError::OtherModel(format!(
                    "it is an update of version {base}, which this site did not say that it holds"
                )));
            }
        };
        Ok(Self { plan, encoding, base })
    }

    /// The chunk's part of the new model. A damaged chunk is fetched again: the connection is authenticated,
    /// so it is a fault and no attack.
    fn values(&self, chunk: &ModelChunk) -> Result<Vec<f32>, Stop> {
        let index = chunk.index;
        let mut values = vec![0.0; self.plan.length(index).map_err(TransferError::from)?];
        let expected_bytes = self.encoding.codec().encoded_bytes(values.len());
        if chunk.payload.len() != expected_bytes {
            let bytes = chunk.payload.len();
            let sentence = format!("chunk {index} has {bytes} bytes instead of {expected_bytes}");
            return Err(Status::data_loss(sentence).into());
        }
        if Digest::of(&chunk.payload).as_bytes().as_slice() != chunk.digest {
            let sentence = format!("chunk {index} does not have its announced digest");
            return Err(Status::data_loss(sentence).into());
        }
        let decoded = self.encoding.codec().decode(&chunk.payload, &mut values);
        decoded.map_err(|error| Stop::Undecodable(index, error))?;
        if let Some(base) = &self.base {
            let base = chunk_of(base, self.plan, index).map_err(TransferError::from)?;
            for (value, base) in values.iter_mut().zip(base) {
                *value += base;
            }
        }
        Ok(values)
    }
}
