//! An aggregator for tests: in this process, without TLS, breaking off when told to.

use std::{
    collections::{BTreeMap, VecDeque},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
};

use consort_common::{chunk::ChunkPlan, ids::Digest};
use consort_proto::v1::{
    federation_server::{Federation, FederationServer},
    *,
};
use hyper_util::rt::TokioIo;
use tokio::{io::DuplexStream, sync::mpsc};
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Channel, Endpoint, Uri},
};

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What the fake was asked and what it shall do next.
#[derive(Debug, Default)]
pub struct State {
    /// The model that it offers.
    pub model: Vec<f32>,
    pub chunk_parameters: u32,
    /// How each next download or upload ends; beyond these they end well.
    pub breaks: VecDeque<Break>,
    /// `first_chunk` of each download.
    pub downloads: Vec<u32>,
    /// Chunks that arrived in each upload, in order.
    pub uploads: Vec<Vec<u32>>,
    /// What was acknowledged.
    pub held: BTreeMap<u32, Vec<u8>>,
    pub accepted: Option<DeltaFinish>,
    /// How each next joining is refused; beyond these it is not.
    pub refusals: VecDeque<Status>,
    pub joins: u32,
    /// Given to each session at once.
    pub instruction: Option<Instruction>,
    /// The open instruction streams.
    pub sessions: Vec<mpsc::Sender<Result<Instruction, Status>>>,
    pub left: bool,
}

/// How a transfer is broken off.
#[derive(Debug, Clone)]
pub enum Break {
    /// After so many chunks, with a status.
    After(u32, Status),
    /// The chunk of this index arrives damaged.
    Damage(u32),
}

/// The aggregator; clones share its state.
#[derive(Debug, Clone, Default)]
pub struct Fake(Arc<Mutex<State>>);

impl Fake {
    pub fn new(state: State) -> Self {
        Self(Arc::new(Mutex::new(state)))
    }

    pub fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Serves until the test ends; returns a connection. It needs no socket, so that paused time works.
    pub async fn serve(&self) -> Channel {
        let (connections, incoming) = mpsc::channel::<std::io::Result<DuplexStream>>(1);
        let service = FederationServer::new(self.clone());
        let server = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(server.serve_with_incoming(ReceiverStream::new(incoming)));
        let connector = tower::service_fn(move |_: Uri| {
            let connections = connections.clone();
            async move {
                let (ours, theirs) = tokio::io::duplex(1 << 16);
                connections.send(Ok(theirs)).await.map_err(std::io::Error::other)?;
                Ok::<_, std::io::Error>(TokioIo::new(ours))
            }
        });
        Endpoint::from_static("http://fake").connect_with_connector(connector).await.unwrap()
    }

    fn plan(&self) -> ChunkPlan {
        let state = self.state();
        ChunkPlan::new(state.model.len() as u64, state.chunk_parameters)
    }

    /// The digest of the model that it offers.
    pub fn model_digest(&self) -> Digest {
        Digest::of(bytemuck::cast_slice(&self.state().model))
    }

    fn download(&self, first_chunk: u32) -> Vec<Result<DownloadModelResponse, Status>> {
        use download_model_response::Part;
        let plan = self.plan();
        let header = ModelHeader {
            encoding: "fp32".to_owned(),
            base_version: None,
            parameters: plan.parameters(),
            chunk_parameters: plan.chunk_parameters(),
            chunks: plan.chunks(),
            digest: self.model_digest().to_vec(),
        };
        let mut state = self.state();
        state.downloads.push(first_chunk);
        let next_break = state.breaks.pop_front();
        let mut parts = vec![Ok(Part::Header(header))];
        for (sent, index) in (0..).zip(first_chunk..plan.chunks()) {
            let range = plan.range(index).unwrap();
            let mut payload: Vec<u8> =
                bytemuck::cast_slice(&state.model[range.start as usize..range.end as usize]).to_vec();
            let digest = Digest::of(&payload).to_vec();
            match &next_break {
                Some(Break::After(after, status)) if *after == sent => {
                    parts.push(Err(status.clone()));
                    break;
                }
                Some(Break::Damage(damaged)) if *damaged == index => payload[0] ^= 1,
                _ => {}
            }
            parts.push(Ok(Part::Chunk(ModelChunk { index, payload: payload.into(), digest })));
        }
        parts.into_iter().map(|part| part.map(|part| DownloadModelResponse { part: Some(part) })).collect()
    }

    fn upload(
        &self,
        request: upload_delta_request::Part,
        next_break: Option<&Break>,
    ) -> Result<Part, Status> {
        use upload_delta_request::Part as Sent;
        let mut state = self.state();
        match request {
            Sent::Begin(_) if state.accepted.is_some() => {
                Ok(Part::Accepted(UploadAccepted { duplicate: true }))
            }
            Sent::Begin(_) => {
                state.uploads.push(Vec::new());
                Ok(Part::Resume(UploadResume {
                    held: state.held.keys().copied().collect(),
                    window_bytes: 1 << 20,
                }))
            }
            Sent::Chunk(chunk) => {
                let received = state.uploads.last_mut().unwrap();
                if let Some(Break::After(after, status)) = next_break
                    && received.len() as u32 == *after
                {
                    return Err(status.clone());
                }
                received.push(chunk.index);
                assert_eq!(Digest::of(&chunk.payload).to_vec(), chunk.digest);
                state.held.insert(chunk.index, chunk.payload.to_vec());
                Ok(Part::Acknowledged(ChunksAcknowledged {
                    indices: vec![chunk.index],
                    window_bytes: 1 << 20,
                }))
            }
            Sent::Finish(finish) => {
                state.accepted = Some(finish);
                Ok(Part::Accepted(UploadAccepted { duplicate: false }))
            }
        }
    }
}

use upload_delta_response::Part;

#[tonic::async_trait]
impl Federation for Fake {
    type WaitForAssignmentStream = Answers<Instruction>;
    type DownloadTokenizerStream = Answers<FilePart>;
    type DownloadModelStream = Answers<DownloadModelResponse>;
    type UploadDeltaStream = Answers<UploadDeltaResponse>;

    async fn join(&self, request: Request<JoinRequest>) -> Result<Response<JoinResponse>, Status> {
        let mut state = self.state();
        state.joins += 1;
        if let Some(status) = state.refusals.pop_front() {
            return Err(status);
        }
        assert_eq!(request.get_ref().instance_id.len(), 16);
        Ok(Response::new(JoinResponse { session_id: vec![1], ..JoinResponse::default() }))
    }

    async fn wait_for_assignment(
        &self,
        _: Request<WaitForAssignmentRequest>,
    ) -> Result<Response<Self::WaitForAssignmentStream>, Status> {
        let (sender, receiver) = mpsc::channel(4);
        let mut state = self.state();
        if let Some(instruction) = state.instruction.clone() {
            sender.try_send(Ok(instruction)).unwrap();
        }
        state.sessions.push(sender);
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn download_model(
        &self,
        request: Request<DownloadModelRequest>,
    ) -> Result<Response<Self::DownloadModelStream>, Status> {
        let parts = self.download(request.get_ref().first_chunk);
        Ok(Response::new(Box::pin(tokio_stream::iter(parts))))
    }

    async fn upload_delta(
        &self,
        request: Request<Streaming<UploadDeltaRequest>>,
    ) -> Result<Response<Self::UploadDeltaStream>, Status> {
        let fake = self.clone();
        let next_break = self.state().breaks.pop_front();
        let answers = request.into_inner().map(move |request| {
            let part = fake.upload(request?.part.unwrap(), next_break.as_ref())?;
            Ok(UploadDeltaResponse { part: Some(part) })
        });
        Ok(Response::new(Box::pin(answers)))
    }

    async fn leave(&self, _: Request<LeaveRequest>) -> Result<Response<LeaveResponse>, Status> {
        self.state().left = true;
        Ok(Response::new(LeaveResponse {}))
    }

    async fn describe_run(
        &self,
        _: Request<DescribeRunRequest>,
    ) -> Result<Response<DescribeRunResponse>, Status> {
        Err(Status::unimplemented("describe_run"))
    }

    async fn download_tokenizer(
        &self,
        _: Request<DownloadTokenizerRequest>,
    ) -> Result<Response<Self::DownloadTokenizerStream>, Status> {
        Err(Status::unimplemented("download_tokenizer"))
    }

    async fn report_ready(
        &self,
        _: Request<ReportReadyRequest>,
    ) -> Result<Response<ReportReadyResponse>, Status> {
        Err(Status::unimplemented("report_ready"))
    }

    async fn report_progress(
        &self,
        _: Request<ReportProgressRequest>,
    ) -> Result<Response<ReportProgressResponse>, Status> {
        Err(Status::unimplemented("report_progress"))
    }

    async fn report_evaluation(
        &self,
        _: Request<ReportEvaluationRequest>,
    ) -> Result<Response<ReportEvaluationResponse>, Status> {
        Err(Status::unimplemented("report_evaluation"))
    }

    async fn probe(&self, _: Request<Streaming<ProbeRequest>>) -> Result<Response<ProbeResponse>, Status> {
        Err(Status::unimplemented("probe"))
    }
}
