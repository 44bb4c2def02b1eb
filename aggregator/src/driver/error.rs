//! What can go wrong between a call and the run that it is about, and the one place where it becomes a
//! gRPC status.

use consort_common::{
    codec::DecodeError,
    ids::{Digest, RunName, SiteName},
    spec::SpecError,
};
use tonic::Status;

use crate::{
    checkpoints::UploadError,
    engine::Rejection,
    models::ModelError,
    reduce::ReduceError,
    sessions::SessionError,
    spool::SpoolError,
    storage::{OpenError, StorageError},
    store::StoreError,
};

/// Why a call was refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum DriverError {
    /// There is no such run.
    #[error("there is no run {0}; `consort runs list` shows those that there are")]
    NoSuchRun(RunName),
    /// A run of that name exists.
    #[error("a run {0} exists already; choose another name in the specification")]
    RunExists(RunName),
    /// Another run is active.
    #[error("run {active} is active; pause, abort or finish it before {run} goes on")]
    OtherRunActive {
        /// The one that was to start.
        run: RunName,
        /// The one that is active.
        active: RunName,
    },
    /// The specification cannot be used.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The tokenizer given with the specification cannot be used.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// What the run is to start from is not what its specification says.
    #[error("run {run}: {reason}")]
    Start {
        /// The run.
        run: RunName,
        /// What is wrong.
        reason: String,
    },
    /// The model that the run is to start from has not arrived whole.
    #[error(
        "run {run} cannot be created: of the model that it starts from, {held} of {chunks} chunks have arrived; run `consort runs create` again, it goes on where it stopped"
    )]
    StartIncomplete {
        /// The run.
        run: RunName,
        /// Chunks that have.
        held: usize,
        /// Chunks that the model has.
        chunks: u32,
    },
    /// What arrived is another model than was announced.
    #[error(
        "run {run} cannot be created: the model that arrived has the digest {found}, not {announced} as announced; was the checkpoint changed meanwhile? What arrived is deleted: run `consort runs create` again"
    )]
    OtherStart {
        /// The run.
        run: RunName,
        /// Its digest as announced.
        announced: Digest,
        /// As it arrived.
        found: Digest,
    },
    /// There is no room for the model that the run is to start from.
    #[error("run {run} cannot be created: {reason}; make room and try again")]
    NoRoom {
        /// The run.
        run: RunName,
        /// Where.
        reason: String,
    },
    /// The session is not the caller's.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The round engine refused.
    #[error(transparent)]
    Rejected(#[from] Rejection),
    /// The caller works from another specification or model.
    #[error(
        "{what} is not that of run {run}: this client works from another specification, or its version derives another model from it; restart it, and if this persists install the aggregator's version"
    )]
    OtherDigest {
        /// Which digest.
        what: &'static str,
        /// The run.
        run: RunName,
    },
    /// A version that does not exist, or no longer.
    #[error("version {version} of run {run} is not here; the newest is {newest}")]
    NoSuchVersion {
        /// The run.
        run: RunName,
        /// What was asked for.
        version: u32,
        /// What there is.
        newest: u32,
    },
    /// A round that was not committed.
    #[error("round {round} of run {run} is not committed; the newest is {newest}")]
    NoSuchRound {
        /// The run.
        run: RunName,
        /// What was asked for.
        round: u32,
        /// What there is.
        newest: u32,
    },
    /// A site that was never seen.
    #[error("site {0} was never connected; `consort clients list` shows those that were")]
    NoSuchSite(SiteName),
    /// A checkpoint that was not published, or was retired.
    #[error("run {run} has no checkpoint{}; `consort checkpoints list {run}` shows those that there are", version.map(|version| format!(" of version {version}")).unwrap_or_default())]
    NoSuchCheckpoint {
        /// The run.
        run: RunName,
        /// What was asked for.
        version: Option<u32>,
    },
    /// A chunk's bytes are not what its sender hashed.
    #[error("chunk {index}: its bytes do not have the digest that came with them; send it again")]
    DamagedChunk {
        /// Which.
        index: u32,
    },
    /// A chunk is not an encoding of finite values.
    #[error("chunk {index}: {source}")]
    Undecodable {
        /// Which.
        index: u32,
        /// Why.
        source: DecodeError,
    },
    /// The spool failed.
    #[error(transparent)]
    Spool(#[from] SpoolError),
    /// The database failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The model's files failed.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The reduction failed.
    #[error(transparent)]
    Reduce(#[from] ReduceError),
    /// A checkpoint could not be written.
    #[error(transparent)]
    Checkpoint(#[from] consort_common::checkpoint::CheckpointError),
    /// A checkpoint could not be uploaded.
    #[error(transparent)]
    Upload(#[from] UploadError),
    /// The configured object store cannot be used.
    #[error(transparent)]
    OpenStorage(#[from] OpenError),
    /// The object store did not say what is in it.
    #[error("the spool cannot be taken up: {0}")]
    Storage(#[from] StorageError),
    /// Another aggregator works in the state directory.
    #[error("another aggregator uses the state directory {path}; stop it, or give this one a directory of its own", path = .0.display())]
    DirectoryInUse(std::path::PathBuf),
    /// A stored state that this version cannot read.
    #[error("the stored state of run {run} cannot be read: {reason}; was it written by a newer version?")]
    State {
        /// The run.
        run: RunName,
        /// Why not.
        reason: String,
    },
    /// A task ended without a result.
    #[error("the aggregator failed while it worked on {0}; see its log")]
    TaskFailed(&'static str),
    /// A file could not be read.
    #[error("cannot read {what}: {source}; restore the state directory from a backup")]
    Read {
        /// What was to be read.
        what: String,
        /// Why not.
        source: std::io::Error,
    },
    /// A file could not be written.
    #[error("cannot write {what}: {source}; see that the state directory is writable and has space")]
    Write {
        /// What was to be written.
        what: String,
        /// Why not.
        source: std::io::Error,
    },
}

impl From<DriverError> for Status {
    fn from(error: DriverError) -> Self {
        let message = error.to_string();
        match error {
            DriverError::NoSuchRun(_)
            | DriverError::NoSuchVersion { .. }
            | DriverError::NoSuchRound { .. }
            | DriverError::NoSuchSite(_)
            | DriverError::NoSuchCheckpoint { .. } => Self::not_found(message),
            DriverError::RunExists(_) | DriverError::Session(SessionError::Taken { .. }) => {
                Self::already_exists(message)
            }
            DriverError::Session(SessionError::Unknown(_)) => Self::aborted(message),
            DriverError::OtherRunActive { .. }
            | DriverError::OtherDigest { .. }
            | DriverError::StartIncomplete { .. } => Self::failed_precondition(message),
            DriverError::NoRoom { .. } => Self::resource_exhausted(message),
            DriverError::Rejected(rejection) if rejection.is_content() => Self::invalid_argument(message),
            DriverError::Rejected(_) => Self::failed_precondition(message),
            DriverError::Spec(_)
            | DriverError::Tokenizer(_)
            | DriverError::Start { .. }
            | DriverError::OtherStart { .. }
            | DriverError::DamagedChunk { .. }
            | DriverError::Undecodable { .. } => Self::invalid_argument(message),
            DriverError::Spool(SpoolError::Sealed { .. }) => Self::failed_precondition(message),
            DriverError::Spool(SpoolError::Full { .. }) => {
                tracing::error!("{message}");
                Self::resource_exhausted(message)
            }
            // What the aggregator's own disk or database said is for its operator; the caller retries.
            DriverError::Spool(_)
            | DriverError::Store(_)
            | DriverError::Model(_)
            | DriverError::Reduce(_)
            | DriverError::Checkpoint(_)
            | DriverError::Upload(_)
            | DriverError::OpenStorage(_)
            | DriverError::Storage(_)
            | DriverError::State { .. }
            | DriverError::DirectoryInUse(_)
            | DriverError::TaskFailed(_)
            | DriverError::Read { .. }
            | DriverError::Write { .. } => {
                tracing::error!("{message}");
                Self::unavailable(format!("the aggregator could not do this now: {message}"))
            }
        }
    }
}
