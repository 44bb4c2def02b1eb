//! An Operator service for tests that says what it is told to say, over TCP without TLS.

use std::{
    pin::Pin,
    sync::{Arc, Mutex},
};

use consort_proto::v1::{self, operator_client::OperatorClient, operator_server::Operator};
use futures::Stream;
use tokio::{net::TcpListener, task::JoinHandle};
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status, Streaming, transport::Endpoint};

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What it says, and what it heard.
#[derive(Debug, Default)]
pub struct Script {
    /// One entry per call of WatchRun, from the first; then UNAVAILABLE.
    pub watches: Vec<Vec<Result<v1::RunSnapshot, Status>>>,
    /// The only checkpoint's files.
    pub parts: Vec<Result<v1::FilePart, Status>>,
    /// What CreateRun received.
    pub created: Vec<v1::CreateRunRequest>,
    /// Chunks that UploadStart holds already, and the error that it ends with, where it does.
    pub held: Vec<u32>,
    pub upload_failure: Option<Status>,
    /// What UploadStart received.
    pub uploaded: Vec<v1::UploadStartRequest>,
}

/// The service; its clones share one script.
#[derive(Debug, Clone, Default)]
pub struct FakeOperator(pub Arc<Mutex<Script>>);

impl FakeOperator {
    /// A service with this script, a client to it, and the task that serves it.
    pub async fn serve(script: Script) -> (Self, OperatorClient<tonic::transport::Channel>, JoinHandle<()>) {
        let service = Self(Arc::new(Mutex::new(script)));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tonic::transport::Server::builder()
            .add_service(v1::operator_server::OperatorServer::new(service.clone()))
            .serve_with_incoming(TcpListenerStream::new(listener));
        let task = tokio::spawn(async move { server.await.unwrap() });
        let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy();
        (service, OperatorClient::new(channel), task)
    }

    fn with_script<T>(&self, work: impl FnOnce(&mut Script) -> T) -> T {
        work(&mut self.0.lock().unwrap())
    }
}

/// Calls that no test makes, in the form that `async_trait` gives to a method.
macro_rules! refuse {
    ($($name:ident: $request:ident -> $response:ident),* $(,)?) => {
        $(fn $name<'service, 'call>(
            &'service self,
            _: Request<v1::$request>,
        ) -> Pin<Box<dyn Future<Output = Result<Response<v1::$response>, Status>> + Send + 'call>>
        where
            'service: 'call,
            Self: 'call,
        {
            Box::pin(async { Err(Status::failed_precondition("not in the script")) })
        })*
    };
}

#[tonic::async_trait]
impl Operator for FakeOperator {
    type WatchRunStream = Answers<v1::RunSnapshot>;
    type DownloadCheckpointStream = Answers<v1::FilePart>;
    type UploadStartStream = Answers<v1::UploadStartResponse>;

    async fn upload_start(
        &self,
        request: Request<Streaming<v1::UploadStartRequest>>,
    ) -> Result<Response<Self::UploadStartStream>, Status> {
        let mut stream = request.into_inner();
        let (answers, outbound) = tokio::sync::mpsc::channel(2);
        let service = self.clone();
        tokio::spawn(async move {
            let begin = stream.message().await.unwrap().unwrap();
            let held = service.with_script(|script| {
                script.uploaded.push(begin);
                script.held.clone()
            });
            answers.send(Ok(v1::UploadStartResponse { held })).await.unwrap();
            if let Some(failure) = service.with_script(|script| script.upload_failure.take()) {
                answers.send(Err(failure)).await.unwrap();
                return;
            }
            while let Some(message) = stream.message().await.unwrap() {
                service.with_script(|script| script.uploaded.push(message));
            }
        });
        Ok(Response::new(Box::pin(tokio_stream::wrappers::ReceiverStream::new(outbound))))
    }

    async fn create_run(
        &self,
        request: Request<Streaming<v1::CreateRunRequest>>,
    ) -> Result<Response<v1::CreateRunResponse>, Status> {
        let mut stream = request.into_inner();
        while let Some(message) = stream.message().await? {
            self.with_script(|script| script.created.push(message));
        }
        Ok(Response::new(v1::CreateRunResponse { run: Some(v1::RunSummary::default()) }))
    }

    async fn watch_run(
        &self,
        _: Request<v1::WatchRunRequest>,
    ) -> Result<Response<Self::WatchRunStream>, Status> {
        let watch = self.with_script(|script| match script.watches.is_empty() {
            true => Err(Status::unavailable("starting up")),
            false => Ok(script.watches.remove(0)),
        })?;
        Ok(Response::new(Box::pin(tokio_stream::iter(watch))))
    }

    async fn download_checkpoint(
        &self,
        _: Request<v1::DownloadCheckpointRequest>,
    ) -> Result<Response<Self::DownloadCheckpointStream>, Status> {
        let parts = self.with_script(|script| std::mem::take(&mut script.parts));
        Ok(Response::new(Box::pin(tokio_stream::iter(parts))))
    }

    refuse! {
        start_run: StartRunRequest -> StartRunResponse,
        pause_run: PauseRunRequest -> PauseRunResponse,
        resume_run: ResumeRunRequest -> ResumeRunResponse,
        abort_run: AbortRunRequest -> AbortRunResponse,
        list_runs: ListRunsRequest -> ListRunsResponse,
        get_run: GetRunRequest -> GetRunResponse,
        list_rounds: ListRoundsRequest -> ListRoundsResponse,
        get_round: GetRoundRequest -> GetRoundResponse,
        list_clients: ListClientsRequest -> ListClientsResponse,
        get_client: GetClientRequest -> GetClientResponse,
        list_checkpoints: ListCheckpointsRequest -> ListCheckpointsResponse,
    }
}
