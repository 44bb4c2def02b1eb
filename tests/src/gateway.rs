//! A site that changes what its daemon sends: a gateway with the site's own certificate between the real daemon and
//! the aggregator. It passes every call on as it is, but the values of deltas, which it alters.
//!
//! So a delta that was really trained arrives as a hostile, faulty or differently encoded one, and nothing of the
//! product knows of it. Of encodings it knows "fp32" alone. Sessions, rounds and identities are the daemon's.

use std::{
    fmt,
    sync::Arc,
    thread::{self, JoinHandle},
};

use consort_common::{
    codec::Encoding,
    ids::Digest,
    tls::{self, IncomingLimits, server_config},
};
use consort_proto::{
    MESSAGE_BYTES_MAX, v1,
    v1::{
        federation_client::FederationClient,
        federation_server::{Federation, FederationServer},
        upload_delta_request::Part,
    },
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Channel, Server},
};

use crate::{
    TestFederation,
    raw::{channel, credentials},
};

/// The kit that gateways serve with: that of an aggregator, or daemons would not talk to them.
const KIT: &str = "gateway";

/// Changes a chunk of a delta: the round, the chunk's index, and its values.
pub type Alter = Arc<dyn Fn(u32, u32, &mut [f32]) + Send + Sync>;

/// A running gateway. It ends when dropped.
#[derive(Debug)]
pub struct Gateway {
    endpoint: String,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Gateway {
    /// Starts the gateway of a site of a federation whose aggregator runs, on a port of the system's choice.
    pub fn start(federation: &TestFederation, site: &str, alter: Alter) -> Self {
        let kit = federation.kit(&format!("aggregator-{KIT}"));
        if !kit.exists() {
            federation.pki(&["issue", "aggregator", KIT, "--host", "localhost"]);
        }
        let config = server_config(&credentials(&kit));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime can be built");
        let (listener, aggregator) = runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port can be had");
            (listener, channel(federation, &federation.kit(&format!("site-{site}"))))
        });
        let port = listener.local_addr().expect("a listener has an address").port();
        let calls = FederationClient::new(aggregator)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let service = FederationServer::new(Between { calls, alter })
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let (stop, stopped) = oneshot::channel();
        let thread = thread::spawn(move || {
            runtime.block_on(async {
                let incoming = tls::incoming(listener, config, IncomingLimits::default());
                let server = Server::builder()
                    .initial_stream_window_size(tls::STREAM_WINDOW_BYTES)
                    .initial_connection_window_size(tls::CONNECTION_WINDOW_BYTES)
                    .add_service(service)
                    .serve_with_incoming(incoming);
                tokio::select! {
                    result = server => result.expect("the gateway serves"),
                    _ = stopped => {}
                }
            });
        });
        Self { endpoint: format!("localhost:{port}"), stop: Some(stop), thread: Some(thread) }
    }

    /// Where the site's daemon connects: `localhost:PORT`.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // It panics only with the test.
            let _ = thread.join();
        }
    }
}

/// The service that the daemon sees.
struct Between {
    calls: FederationClient<Channel>,
    alter: Alter,
}

impl fmt::Debug for Between {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Between").finish_non_exhaustive()
    }
}

/// Alters what is a chunk; everything else stays.
fn altered(message: v1::UploadDeltaRequest, round: &mut u32, alter: &Alter) -> v1::UploadDeltaRequest {
    let part = message.part.map(|part| match part {
        Part::Begin(begin) => {
            assert_eq!(begin.encoding, Encoding::Fp32.name(), "a gateway reads values as they are");
            *round = begin.round;
            Part::Begin(begin)
        }
        Part::Chunk(chunk) => {
            let mut values: Vec<f32> = bytemuck::pod_collect_to_vec(&chunk.payload);
            alter(*round, chunk.index, &mut values);
            let payload = Encoding::Fp32.encode(&values);
            let digest = Digest::of(&payload).as_bytes().to_vec();
            Part::Chunk(v1::DeltaChunk { index: chunk.index, payload: payload.into(), digest })
        }
        finish @ Part::Finish(_) => finish,
    });
    v1::UploadDeltaRequest { part }
}

/// The messages of a call, each as `change` makes it. A call that the daemon breaks off ends here as well.
fn passed_on<T: Send + 'static>(
    mut messages: Streaming<T>,
    mut change: impl FnMut(T) -> T + Send + 'static,
) -> ReceiverStream<T> {
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        while let Ok(Some(message)) = messages.message().await {
            if sender.send(change(message)).await.is_err() {
                break;
            }
        }
    });
    ReceiverStream::new(receiver)
}

#[tonic::async_trait]
impl Federation for Between {
    async fn join(&self, request: Request<v1::JoinRequest>) -> Result<Response<v1::JoinResponse>, Status> {
        self.calls.clone().join(request.into_inner()).await
    }

    type WaitForAssignmentStream = Streaming<v1::Instruction>;

    async fn wait_for_assignment(
        &self,
        request: Request<v1::WaitForAssignmentRequest>,
    ) -> Result<Response<Self::WaitForAssignmentStream>, Status> {
        self.calls.clone().wait_for_assignment(request.into_inner()).await
    }

    async fn describe_run(
        &self,
        request: Request<v1::DescribeRunRequest>,
    ) -> Result<Response<v1::DescribeRunResponse>, Status> {
        self.calls.clone().describe_run(request.into_inner()).await
    }

    type DownloadTokenizerStream = Streaming<v1::FilePart>;

    async fn download_tokenizer(
        &self,
        request: Request<v1::DownloadTokenizerRequest>,
    ) -> Result<Response<Self::DownloadTokenizerStream>, Status> {
        self.calls.clone().download_tokenizer(request.into_inner()).await
    }

    async fn report_ready(
        &self,
        request: Request<v1::ReportReadyRequest>,
    ) -> Result<Response<v1::ReportReadyResponse>, Status> {
        self.calls.clone().report_ready(request.into_inner()).await
    }

    type DownloadModelStream = Streaming<v1::DownloadModelResponse>;

    async fn download_model(
        &self,
        request: Request<v1::DownloadModelRequest>,
    ) -> Result<Response<Self::DownloadModelStream>, Status> {
        self.calls.clone().download_model(request.into_inner()).await
    }

    type UploadDeltaStream = Streaming<v1::UploadDeltaResponse>;

    async fn upload_delta(
        &self,
        request: Request<Streaming<v1::UploadDeltaRequest>>,
    ) -> Result<Response<Self::UploadDeltaStream>, Status> {
        let (alter, mut round) = (self.alter.clone(), 0);
        let messages = passed_on(request.into_inner(), move |message| altered(message, &mut round, &alter));
        self.calls.clone().upload_delta(messages).await
    }

    async fn report_progress(
        &self,
        request: Request<v1::ReportProgressRequest>,
    ) -> Result<Response<v1::ReportProgressResponse>, Status> {
        self.calls.clone().report_progress(request.into_inner()).await
    }

    async fn report_evaluation(
        &self,
        request: Request<v1::ReportEvaluationRequest>,
    ) -> Result<Response<v1::ReportEvaluationResponse>, Status> {
        self.calls.clone().report_evaluation(request.into_inner()).await
    }

    async fn probe(
        &self,
        request: Request<Streaming<v1::ProbeRequest>>,
    ) -> Result<Response<v1::ProbeResponse>, Status> {
        self.calls.clone().probe(passed_on(request.into_inner(), |message| message)).await
    }

    async fn leave(&self, request: Request<v1::LeaveRequest>) -> Result<Response<v1::LeaveResponse>, Status> {
        self.calls.clone().leave(request.into_inner()).await
    }
}
