//! An aggregator for tests: in this process, without TLS, breaking off when told to.

use std::{
    collections::{BTreeMap, VecDeque},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use consort_common::{chunk::ChunkPlan, codec::Encoding, ids::Digest};
use consort_proto::v1::{
    federation_server::{Federation, FederationServer},
    *,
};
use hyper_util::rt::TokioIo;
use tokio::{io::DuplexStream, sync::mpsc};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::{
    Request, Response, Status, Streaming,
    transport::{Channel, Endpoint, Uri},
};

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What the fake was asked and what it shall do next.
#[derive(Debug)]
pub struct State {
    /// The model that it offers.
    pub model: Vec<f32>,
    pub chunk_parameters: u32,
    /// How it sends a whole model.
    pub encoding: Encoding,
    /// What it sends to sites that hold the version before.
    pub update: Option<Update>,
    /// How each next download or upload ends; beyond these they end well.
    pub breaks: VecDeque<Break>,
    /// What each download asked for.
    pub downloads: Vec<DownloadModelRequest>,
    /// What each upload brought.
    pub uploads: Vec<Upload>,
    /// Bytes of chunks that it lets be under way unacknowledged.
    pub window_bytes: u64,
    /// Most bytes that were, in any one call.
    pub unacknowledged_bytes_max: u64,
    /// What it holds.
    pub held: BTreeMap<u32, Vec<u8>>,
    pub accepted: Option<DeltaFinish>,
    /// Connections that were opened.
    pub connections: u32,
    /// How each next joining is refused; beyond these it is not.
    pub refusals: VecDeque<Status>,
    pub joins: u32,
    /// Given to each session at once.
    pub instruction: Option<Instruction>,
    /// The open instruction streams.
    pub sessions: Vec<mpsc::Sender<Result<Instruction, Status>>>,
    pub left: bool,
}

impl Default for State {
    fn default() -> Self {
        Self {
            model: Vec::new(),
            chunk_parameters: 0,
            encoding: Encoding::Fp32,
            update: None,
            breaks: VecDeque::new(),
            downloads: Vec::new(),
            uploads: Vec::new(),
            window_bytes: 1 << 20,
            unacknowledged_bytes_max: 0,
            held: BTreeMap::new(),
            accepted: None,
            connections: 0,
            refusals: VecDeque::new(),
            joins: 0,
            instruction: None,
            sessions: Vec::new(),
            left: false,
        }
    }
}

/// What a round changed.
#[derive(Debug, Clone)]
pub struct Update {
    pub base_version: u32,
    pub encoding: Encoding,
    pub values: Vec<f32>,
}

/// One call that brought chunks.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Upload {
    pub part: u32,
    pub parts: u32,
    /// In the order in which they came.
    pub chunks: Vec<u32>,
}

/// How a transfer is broken off.
#[derive(Debug, Clone)]
pub enum Break {
    /// After so many chunks, with a status.
    After(u32, Status),
    /// The chunk of this index arrives damaged.
    Damage(u32),
}

/// How long the fake hears nothing before it acknowledges what it has: it is as late as it can be.
const ACKNOWLEDGES_AFTER: Duration = Duration::from_millis(10);

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

    /// Serves until the test ends; returns a connection, which opens with its first call. It needs no socket,
    /// so that paused time works.
    pub fn serve(&self) -> Channel {
        let (connections, incoming) = mpsc::channel::<std::io::Result<DuplexStream>>(1);
        let service = FederationServer::new(self.clone());
        let server = tonic::transport::Server::builder().add_service(service);
        tokio::spawn(server.serve_with_incoming(ReceiverStream::new(incoming)));
        let fake = self.clone();
        let connector = tower::service_fn(move |_: Uri| {
            let connections = connections.clone();
            fake.state().connections += 1;
            async move {
                let (ours, theirs) = tokio::io::duplex(1 << 16);
                connections.send(Ok(theirs)).await.map_err(std::io::Error::other)?;
                Ok::<_, std::io::Error>(TokioIo::new(ours))
            }
        });
        Endpoint::from_static("http://fake").connect_with_connector_lazy(connector)
    }

    fn plan(&self) -> ChunkPlan {
        let state = self.state();
        ChunkPlan::new(state.model.len() as u64, state.chunk_parameters)
    }

    /// The digest of the model that it offers.
    pub fn model_digest(&self) -> Digest {
        Digest::of(bytemuck::cast_slice(&self.state().model))
    }

    fn download(&self, request: DownloadModelRequest) -> Vec<Result<DownloadModelResponse, Status>> {
        use download_model_response::Part;
        let plan = self.plan();
        let digest = self.model_digest().to_vec();
        let mut state = self.state();
        let update = state.update.clone().filter(|update| Some(update.base_version) == request.held_version);
        let base_version = update.as_ref().map(|update| update.base_version);
        let (encoding, values) = match update {
            Some(update) => (update.encoding, update.values),
            None => (state.encoding, state.model.clone()),
        };
        let header = ModelHeader {
            encoding: encoding.name().to_owned(),
            base_version,
            parameters: plan.parameters(),
            chunk_parameters: plan.chunk_parameters(),
            chunks: plan.chunks(),
            digest,
        };
        let next_break = state.breaks.pop_front();
        let mut parts = vec![Ok(Part::Header(header))];
        let indices = (request.first_chunk..plan.chunks()).step_by(request.stride as usize);
        state.downloads.push(request);
        for (sent, index) in (0..).zip(indices) {
            let range = plan.range(index).unwrap();
            let mut payload = encoding.encode(&values[range.start as usize..range.end as usize]);
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

    /// Receives one call's chunks, and acknowledges many with one answer.
    async fn upload(
        &self,
        mut requests: Streaming<UploadDeltaRequest>,
        next_break: Option<Break>,
        answers: &mpsc::Sender<Result<UploadDeltaResponse, Status>>,
    ) -> Result<(), Status> {
        use upload_delta_request::Part as Sent;
        let answer = async |part| {
            let _ = answers.send(Ok(UploadDeltaResponse { part: Some(part) })).await;
        };
        let mut part = (0, 1);
        let mut call = 0;
        let mut pending = BTreeMap::new();
        loop {
            let request = tokio::select! {
                request = requests.message() => request?,
                () = tokio::time::sleep(ACKNOWLEDGES_AFTER), if !pending.is_empty() => {
                    let indices = std::mem::take(&mut pending).into_keys().collect();
                    let window_bytes = self.state().window_bytes;
                    answer(Part::Acknowledged(ChunksAcknowledged { indices, window_bytes })).await;
                    continue;
                }
            };
            match request.and_then(|request| request.part) {
                None => return Ok(()),
                Some(Sent::Begin(_)) if self.state().accepted.is_some() => {
                    answer(Part::Accepted(UploadAccepted { duplicate: true })).await;
                }
                Some(Sent::Begin(begin)) => {
                    part = (begin.part, begin.parts);
                    let resume = {
                        let mut state = self.state();
                        call = state.uploads.len();
                        state.uploads.push(Upload { part: part.0, parts: part.1, chunks: Vec::new() });
                        let held = state.held.keys().copied().filter(|index| index % part.1 == part.0);
                        UploadResume { held: held.collect(), window_bytes: state.window_bytes }
                    };
                    answer(Part::Resume(resume)).await;
                }
                Some(Sent::Chunk(chunk)) => {
                    assert_eq!(chunk.index % part.1, part.0, "a chunk of another part");
                    assert_eq!(Digest::of(&chunk.payload).to_vec(), chunk.digest);
                    let mut state = self.state();
                    if let Some(Break::After(after, status)) = &next_break
                        && state.uploads[call].chunks.len() as u32 == *after
                    {
                        return Err(status.clone());
                    }
                    state.uploads[call].chunks.push(chunk.index);
                    pending.insert(chunk.index, chunk.payload.len() as u64);
                    let unacknowledged = pending.values().sum();
                    state.unacknowledged_bytes_max = state.unacknowledged_bytes_max.max(unacknowledged);
                    state.held.insert(chunk.index, chunk.payload.to_vec());
                }
                Some(Sent::Finish(finish)) => {
                    let chunks = self.plan().chunks();
                    let whole = self.state().held.len() as u32 == chunks;
                    assert!(whole && part.0 == 0, "finished early, or by another part");
                    self.state().accepted = Some(finish);
                    answer(Part::Accepted(UploadAccepted { duplicate: false })).await;
                }
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
        let parts = self.download(request.into_inner());
        Ok(Response::new(Box::pin(tokio_stream::iter(parts))))
    }

    async fn upload_delta(
        &self,
        request: Request<Streaming<UploadDeltaRequest>>,
    ) -> Result<Response<Self::UploadDeltaStream>, Status> {
        let (fake, next_break) = (self.clone(), self.state().breaks.pop_front());
        let (answers, receiver) = mpsc::channel(4);
        tokio::spawn(async move {
            if let Err(status) = fake.upload(request.into_inner(), next_break, &answers).await {
                let _ = answers.send(Err(status)).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
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
