//! The service for people's tools.

use std::{pin::Pin, sync::Arc, time::Duration};

use consort_common::{identity::Role, ids::SiteName, spec::SPEC_BYTES_MAX};
use consort_proto::{v1, v1::operator_server::Operator};
use futures::Stream;
use tokio::{
    sync::{Semaphore, mpsc},
    time::timeout,
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{caller, digest, download, next_message, run_name, start};
use crate::{driver::Driver, engine::Event, store::StartOrigin, views};

/// Largest `tokenizer.json`; those of 2026's largest vocabularies have about 20 MB.
const TOKENIZER_BYTES_MAX: usize = 64 << 20;
/// Models that are uploaded at a time, for runs that are to start from them.
const UPLOADS_MAX: usize = 4;
/// Snapshots of one watch are at least this far apart.
const SNAPSHOT_INTERVAL: Duration = Duration::from_millis(250);

/// Refuses a specification that is too long to be looked at.
pub(super) fn check_length(spec_toml: &str) -> Result<(), Status> {
    if spec_toml.len() <= SPEC_BYTES_MAX {
        return Ok(());
    }
    Err(Status::invalid_argument(format!("the specification is longer than {SPEC_BYTES_MAX} bytes")))
}

/// The service for people's tools.
pub struct OperatorService {
    driver: Arc<Driver>,
    /// Places for models that are being uploaded.
    uploads: Arc<Semaphore>,
}

impl OperatorService {
    /// A service over `driver`.
    pub fn new(driver: Arc<Driver>) -> Self {
        Self { driver, uploads: Arc::new(Semaphore::new(UPLOADS_MAX)) }
    }

    fn authorise<T>(&self, request: &Request<T>) -> Result<SiteName, Status> {
        caller(request, self.driver.federation(), Role::Operator)
    }

    async fn command<T>(
        &self,
        request: &Request<T>,
        run: &str,
        event: Event,
    ) -> Result<v1::RunSummary, Status> {
        let operator = self.authorise(request)?;
        let run = run_name(run)?;
        tracing::info!(%operator, %run, ?event, "operator command");
        let (driver, name) = (self.driver.clone(), run.clone());
        self.driver.to_its_end(async move { driver.command(&name, event).await }).await?;
        Ok(views::run_summary(&self.driver, &run).await?)
    }
}

#[tonic::async_trait]
impl Operator for OperatorService {
    async fn create_run(
        &self,
        request: Request<Streaming<v1::CreateRunRequest>>,
    ) -> Result<Response<v1::CreateRunResponse>, Status> {
        use v1::create_run_request::Part;

        let operator = self.authorise(&request)?;
        let mut stream = request.into_inner();
        let stall = self.driver.limits().stall();
        let first = next_message(&mut stream, stall).await?.and_then(|message| message.part);
        let Some(Part::Specification(spec_toml)) = first else {
            return Err(Status::invalid_argument("the first message holds the specification"));
        };
        check_length(&spec_toml)?;
        let (mut tokenizer, mut start) = (Vec::new(), None);
        while let Some(message) = next_message(&mut stream, stall).await? {
            let part = match message.part {
                Some(Part::Tokenizer(part)) if start.is_none() => part,
                Some(Part::Start(model)) if start.is_none() => {
                    start =
                        Some(StartOrigin { digest: digest("digest", &model.digest)?, name: model.origin });
                    continue;
                }
                _ => {
                    return Err(Status::invalid_argument(
                        "after the specification come parts of the tokenizer, then `start`, once",
                    ));
                }
            };
            if tokenizer.len() + part.data.len() > TOKENIZER_BYTES_MAX {
                return Err(Status::invalid_argument(format!(
                    "the tokenizer is larger than {TOKENIZER_BYTES_MAX} bytes"
                )));
            }
            tokenizer.extend_from_slice(&part.data);
        }
        let driver = self.driver.clone();
        let created =
            self.driver.to_its_end(async move { driver.create_run(spec_toml, tokenizer, start).await });
        let run = created.await?;
        tracing::info!(%operator, %run, "run created");
        Ok(Response::new(v1::CreateRunResponse { run: Some(views::run_summary(&self.driver, &run).await?) }))
    }

    type UploadStartStream = Pin<Box<dyn Stream<Item = Result<v1::UploadStartResponse, Status>> + Send>>;

    async fn upload_start(
        &self,
        request: Request<Streaming<v1::UploadStartRequest>>,
    ) -> Result<Response<Self::UploadStartStream>, Status> {
        let operator = self.authorise(&request)?;
        let place = self.uploads.clone().try_acquire_owned().map_err(|_| {
            Status::resource_exhausted(format!("{UPLOADS_MAX} models are being uploaded; try again later"))
        })?;
        let (answers, outbound) = mpsc::channel(1);
        let (driver, stream) = (self.driver.clone(), request.into_inner());
        self.driver.spawn_task("upload of a model", async move {
            if let Err(status) = start::receive(&driver, stream, &answers).await {
                tracing::info!(%operator, code = ?status.code(), reason = status.message(), "upload of a model ended");
                // Lost on a caller that went away, or that reads nothing.
                let _ = timeout(driver.limits().stall(), answers.send(Err(status))).await;
            }
            drop(place);
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(outbound))))
    }

    async fn start_run(
        &self,
        request: Request<v1::StartRunRequest>,
    ) -> Result<Response<v1::StartRunResponse>, Status> {
        let run = self.command(&request, &request.get_ref().run, Event::Start).await?;
        Ok(Response::new(v1::StartRunResponse { run: Some(run) }))
    }

    async fn pause_run(
        &self,
        request: Request<v1::PauseRunRequest>,
    ) -> Result<Response<v1::PauseRunResponse>, Status> {
        let run = self.command(&request, &request.get_ref().run, Event::Pause).await?;
        Ok(Response::new(v1::PauseRunResponse { run: Some(run) }))
    }

    async fn resume_run(
        &self,
        request: Request<v1::ResumeRunRequest>,
    ) -> Result<Response<v1::ResumeRunResponse>, Status> {
        let run = self.command(&request, &request.get_ref().run, Event::Resume).await?;
        Ok(Response::new(v1::ResumeRunResponse { run: Some(run) }))
    }

    async fn abort_run(
        &self,
        request: Request<v1::AbortRunRequest>,
    ) -> Result<Response<v1::AbortRunResponse>, Status> {
        let v1::AbortRunRequest { run, reason } = request.get_ref().clone();
        let run = self.command(&request, &run, Event::Abort { reason }).await?;
        Ok(Response::new(v1::AbortRunResponse { run: Some(run) }))
    }

    async fn list_runs(
        &self,
        request: Request<v1::ListRunsRequest>,
    ) -> Result<Response<v1::ListRunsResponse>, Status> {
        self.authorise(&request)?;
        Ok(Response::new(v1::ListRunsResponse { runs: views::runs(&self.driver).await? }))
    }

    async fn get_run(
        &self,
        request: Request<v1::GetRunRequest>,
    ) -> Result<Response<v1::GetRunResponse>, Status> {
        self.authorise(&request)?;
        let run = run_name(&request.get_ref().run)?;
        Ok(Response::new(views::run(&self.driver, &run).await?))
    }

    type WatchRunStream = Pin<Box<dyn Stream<Item = Result<v1::RunSnapshot, Status>> + Send>>;

    async fn watch_run(
        &self,
        request: Request<v1::WatchRunRequest>,
    ) -> Result<Response<Self::WatchRunStream>, Status> {
        self.authorise(&request)?;
        let run = run_name(&request.get_ref().run)?;
        let mut watch = views::Watch::begin(&self.driver, &run).await?;
        let (queue, outbound) = mpsc::channel(1);
        let driver = self.driver.clone();
        self.driver.spawn_task("watch", async move {
            let mut changes = driver.changes();
            loop {
                changes.mark_unchanged();
                let snapshot = watch.snapshot(&driver).await;
                let over = snapshot.as_ref().map_or(true, views::is_over);
                if queue.send(snapshot.map_err(Status::from)).await.is_err() || over {
                    return;
                }
                tokio::select! {
                    () = driver.stopping() => return,
                    () = queue.closed() => return,
                    () = async {
                        tokio::time::sleep(SNAPSHOT_INTERVAL).await;
                        // An error means that the driver is gone; the next snapshot then says so.
                        let _ = changes.changed().await;
                    } => (),
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(outbound))))
    }

    async fn list_rounds(
        &self,
        request: Request<v1::ListRoundsRequest>,
    ) -> Result<Response<v1::ListRoundsResponse>, Status> {
        self.authorise(&request)?;
        let run = run_name(&request.get_ref().run)?;
        Ok(Response::new(v1::ListRoundsResponse { rounds: views::rounds(&self.driver, &run).await? }))
    }

    async fn get_round(
        &self,
        request: Request<v1::GetRoundRequest>,
    ) -> Result<Response<v1::GetRoundResponse>, Status> {
        self.authorise(&request)?;
        let request = request.get_ref();
        let run = run_name(&request.run)?;
        Ok(Response::new(views::round(&self.driver, &run, request.round).await?))
    }

    async fn list_clients(
        &self,
        request: Request<v1::ListClientsRequest>,
    ) -> Result<Response<v1::ListClientsResponse>, Status> {
        self.authorise(&request)?;
        Ok(Response::new(v1::ListClientsResponse { clients: views::clients(&self.driver, None).await? }))
    }

    async fn get_client(
        &self,
        request: Request<v1::GetClientRequest>,
    ) -> Result<Response<v1::GetClientResponse>, Status> {
        self.authorise(&request)?;
        let site = request.get_ref().site.parse();
        let site: SiteName = site.map_err(|error| Status::invalid_argument(format!("site: {error}")))?;
        Ok(Response::new(views::client(&self.driver, &site).await?))
    }

    async fn list_checkpoints(
        &self,
        request: Request<v1::ListCheckpointsRequest>,
    ) -> Result<Response<v1::ListCheckpointsResponse>, Status> {
        self.authorise(&request)?;
        let run = run_name(&request.get_ref().run)?;
        let checkpoints = views::checkpoints(&self.driver, &run).await?;
        Ok(Response::new(v1::ListCheckpointsResponse { checkpoints }))
    }

    type DownloadCheckpointStream = Pin<Box<dyn Stream<Item = Result<v1::FilePart, Status>> + Send>>;

    async fn download_checkpoint(
        &self,
        request: Request<v1::DownloadCheckpointRequest>,
    ) -> Result<Response<Self::DownloadCheckpointStream>, Status> {
        self.authorise(&request)?;
        let request = request.get_ref();
        let run = run_name(&request.run)?;
        let files = views::checkpoint_files(&self.driver, &run, request.version).await?;
        Ok(Response::new(Box::pin(ReceiverStream::new(download::files(&self.driver, files, ())))))
    }
}
