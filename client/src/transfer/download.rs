//! Downloads: a global model into the run's folder, and the run's tokenizer.

use std::{
    io::SeekFrom,
    path::{Path, PathBuf},
};

use consort_common::{
    atomic_file::sync_directory,
    chunk::ChunkPlan,
    codec::Encoding,
    ids::{Digest, RunName},
};
use consort_proto::v1::{
    DownloadModelRequest, DownloadModelResponse, DownloadTokenizerRequest, ModelChunk, ModelHeader,
    download_model_response::Part,
};
use tokio::{
    fs::File,
    io::{AsyncSeekExt, AsyncWriteExt},
};
use tonic::{Status, Streaming};
use tracing::warn;

use super::{TransferError, answer, file_error};
use crate::{
    link::{Link, Session},
    progress::Activity,
    state::{self, RunDirectory},
};

/// How often a whole model may arrive with a wrong digest before that is said to be the aggregator's fault.
const ATTEMPTS_MAX: u32 = 3;
/// Largest `tokenizer.json`, in bytes; that of a vocabulary of 256,000 takes about 20 MB.
const TOKENIZER_BYTES_MAX: u64 = 256 << 20;

/// What is to be downloaded.
struct Model<'a> {
    run: &'a RunName,
    version: u32,
    digest: Digest,
    plan: ChunkPlan,
}

/// Brings a global model into the run's folder, as flat fp32 little-endian values, and removes older ones.
/// A model that is there already is verified and used.
///
/// # Errors
/// If the aggregator refuses, offers another model, or the disk fails.
pub async fn download_model(
    link: &Link,
    directory: &RunDirectory,
    (run, version, digest): (&RunName, u32, Digest),
    plan: ChunkPlan,
    activity: &Activity,
) -> Result<PathBuf, TransferError> {
    let path = directory.model(version);
    if has_digest(&path, digest).await? {
        return Ok(path);
    }
    let part = directory.model_part(version);
    let model = Model { run, version, digest, plan };
    for _ in 0..ATTEMPTS_MAX {
        let what = format!("downloading version {version} of the model");
        // The inner result is what repeating would not mend.
        link.call(&what, |session| async {
            match fetch(session, &model, &part, activity).await {
                Ok(()) => Ok(Ok(())),
                Err(Stop::Status(status)) => Err(status),
                Err(Stop::Final(error)) => Ok(Err(error)),
            }
        })
        .await
        .map_err(|status| TransferError::Refused { what, status })??;
        if has_digest(&part, digest).await? {
            publish(&part, &path).await?;
            directory.keep_only_model(version)?;
            return Ok(path);
        }
        warn!("the model arrived with a wrong digest; downloading it again");
        state::remove(&part)?;
    }
    let what = format!("version {version} of the model");
    Err(TransferError::Damaged { what, attempts: ATTEMPTS_MAX, expected: digest })
}

/// Why a try ended.
enum Stop {
    /// To be judged by its code.
    Status(Status),
    /// Not to be repeated.
    Final(TransferError),
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

/// One try: the chunks that are missing from `part`, in order.
async fn fetch(
    mut session: Session,
    model: &Model<'_>,
    part: &Path,
    activity: &Activity,
) -> Result<(), Stop> {
    let chunk_bytes = u64::from(model.plan.chunk_parameters()) * 4;
    let mut file = open(part).await?;
    let held = file.metadata().await.map_err(file_error("read", part))?.len();
    // A chunk that was written in part is fetched again; a file that is too long is not ours.
    let mut next = u32::try_from(held / chunk_bytes).unwrap_or(u32::MAX);
    if held == model.plan.parameters() * 4 {
        return Ok(());
    }
    if next >= model.plan.chunks() {
        next = 0;
    }
    let position = u64::from(next) * chunk_bytes;
    file.set_len(position).await.map_err(file_error("shorten", part))?;
    file.seek(SeekFrom::Start(position)).await.map_err(file_error("write", part))?;

    let request = DownloadModelRequest {
        session_id: session.id,
        run: model.run.to_string(),
        version: model.version,
        first_chunk: next,
        stride: 1,
        held_version: None,
    };
    let mut stream = answer(session.client.download_model(request)).await?.into_inner();
    check_header(&header(&mut stream).await?, model)?;
    while next < model.plan.chunks() {
        let chunk = chunk(&mut stream, next).await?;
        let expected = model.plan.length(next).map_err(TransferError::from)? * 4;
        check_chunk(&chunk, next, expected)?;
        file.write_all(&chunk.payload).await.map_err(file_error("write", part))?;
        next += 1;
        activity.done_of(u64::from(next) * chunk_bytes, model.plan.parameters() * 4);
    }
    file.sync_all().await.map_err(file_error("write", part))?;
    Ok(())
}

async fn open(part: &Path) -> Result<File, TransferError> {
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .read(true)
        .open(part)
        .await
        .map_err(file_error("open", part))
}

async fn next_part(stream: &mut Streaming<DownloadModelResponse>) -> Result<Part, Status> {
    answer(stream.message())
        .await?
        .ok_or_else(|| Status::unavailable("the download ended early"))?
        .part
        .ok_or_else(|| {
            Status::internal("the aggregator sent a part of a kind that this version does not know")
        })
}

async fn header(stream: &mut Streaming<DownloadModelResponse>) -> Result<ModelHeader, Status> {
    match next_part(stream).await? {
        Part::Header(header) => Ok(header),
        Part::Chunk(_) => Err(Status::internal("the download begins without a header")),
    }
}

async fn chunk(stream: &mut Streaming<DownloadModelResponse>, index: u32) -> Result<ModelChunk, Status> {
    match next_part(stream).await? {
        Part::Chunk(chunk) if chunk.index == index => Ok(chunk),
        Part::Chunk(chunk) => {
            Err(Status::internal(format!("chunk {} came where {index} was due", chunk.index)))
        }
        Part::Header(_) => Err(Status::internal("a second header came")),
    }
}

fn check_header(header: &ModelHeader, model: &Model<'_>) -> Result<(), TransferError> {
    let plan = model.plan;
    let expected = ModelHeader {
        encoding: Encoding::Fp32.name().to_owned(),
        base_version: None,
        parameters: plan.parameters(),
        chunk_parameters: plan.chunk_parameters(),
        chunks: plan.chunks(),
        digest: model.digest.to_vec(),
    };
    if *header == expected {
        return Ok(());
    }
    Err(TransferError::OtherModel(format!(
        "it has {} parameters in {} chunks, the specification {} in {}; its digest {} the instruction's",
        header.parameters,
        header.chunks,
        plan.parameters(),
        plan.chunks(),
        if header.digest == expected.digest { "is" } else { "is not" },
    )))
}

/// A damaged chunk is fetched again: the connection is authenticated, so it is a fault and no attack.
fn check_chunk(chunk: &ModelChunk, index: u32, expected_bytes: usize) -> Result<(), Status> {
    if chunk.payload.len() != expected_bytes {
        return Err(Status::data_loss(format!(
            "chunk {index} has {} bytes instead of {expected_bytes}",
            chunk.payload.len()
        )));
    }
    if Digest::of(&chunk.payload).as_bytes().as_slice() != chunk.digest {
        return Err(Status::data_loss(format!("chunk {index} does not have its announced digest")));
    }
    Ok(())
}

/// Whether the file is there and has this digest.
async fn has_digest(path: &Path, digest: Digest) -> Result<bool, TransferError> {
    let path = path.to_owned();
    let error = file_error("read", &path);
    let hashed = tokio::task::spawn_blocking(move || {
        if !path.exists() {
            return Ok(false);
        }
        let mut hasher = blake3::Hasher::new();
        hasher.update_mmap_rayon(&path)?;
        Ok(Digest::from(hasher.finalize()) == digest)
    });
    hashed.await.map_err(std::io::Error::other).flatten().map_err(error)
}

async fn publish(part: &Path, path: &Path) -> Result<(), TransferError> {
    tokio::fs::rename(part, path).await.map_err(file_error("rename", part))?;
    path.parent().map_or(Ok(()), sync_directory).map_err(file_error("finish", path))
}

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
