//! A site and an operator that speak the protocol themselves, and wrongly where a test wants it.
//!
//! A [`RawSite`] trains nothing: it uploads any values as its delta, so that rounds commit without
//! libtorch. What can be misstated is a public field of [`Delta`] and of its messages; every upload is
//! taken apart into [`RawSite::begin`], [`Upload::send`] and [`Upload::answer`].

use std::{fmt::Debug, future::Future, io, path::Path, sync::Arc, time::Duration};

use consort_common::{
    chunk::ChunkPlan,
    codec::Encoding,
    ids::{DeltaId, Digest},
    spec::RunSpec,
    tls::{CredentialFiles, Credentials, ServerAddress, connect_channel_lazy},
};
use consort_proto::{
    PROTOCOL_VERSION,
    v1::{
        CreateRunRequest, DeltaBegin, DeltaChunk, DeltaFinish, DescribeRunRequest, DownloadModelRequest,
        Evaluation, GetRunRequest, GetRunResponse, Instruction, JoinRequest, ReportEvaluationRequest,
        ReportReadyRequest, RunSummary, Train, UploadAccepted, UploadDeltaRequest, UploadDeltaResponse,
        WaitForAssignmentRequest, create_run_request, download_model_response,
        federation_client::FederationClient, instruction::Task, operator_client::OperatorClient,
        upload_delta_request, upload_delta_response,
    },
};
use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use tokio::{net::TcpStream, sync::mpsc};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Code, Status, Streaming,
    transport::{Channel, Endpoint, Uri},
};

use crate::{TestFederation, process::PATIENCE};

/// Messages of an upload that wait for the transport.
const QUEUE_MAX: usize = 4;
/// HTTP/2's own windows, which are small.
const WINDOW_BYTES: u32 = 65_535;

/// The credentials of a kit's folder.
pub fn credentials(kit: &Path) -> Credentials {
    let files =
        CredentialFiles { certificate: "cert.pem".into(), key: "key.pem".into(), ca: "ca.pem".into() };
    Credentials::load(&files.relative_to(kit)).expect("the kit can be used")
}

/// A channel to the aggregator with a kit's certificate; it connects with the first call.
pub fn channel(federation: &TestFederation, kit: &Path) -> Channel {
    channel_to(federation.endpoint(), kit)
}

/// The same, by another way than the aggregator's own endpoint.
pub fn channel_to(endpoint: &str, kit: &Path) -> Channel {
    let address: ServerAddress = endpoint.parse().expect("the endpoint is one");
    connect_channel_lazy(&address, &credentials(kit))
}

/// Waits for what must come soon, so that a hang fails.
pub async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    let waited = tokio::time::timeout(PATIENCE, future).await;
    waited.unwrap_or_else(|_| panic!("waited {} s for {what}", PATIENCE.as_secs()))
}

/// A channel that verifies the server's certificate and nothing of its identity, with small windows: what is
/// not read soon stops its sender.
pub fn channel_with(federation: &TestFederation, config: Arc<ClientConfig>) -> Channel {
    let address = federation.endpoint().to_owned();
    let connector = tower::service_fn(move |_: Uri| {
        let (config, address) = (config.clone(), address.clone());
        async move { Ok::<_, io::Error>(TokioIo::new(handshake(&address, config).await?)) }
    });
    Endpoint::from_static("https://localhost")
        .initial_stream_window_size(WINDOW_BYTES)
        .initial_connection_window_size(WINDOW_BYTES)
        .connect_with_connector_lazy(connector)
}

/// A TLS connection, and nothing said yet.
///
/// # Errors
/// Why the handshake failed.
pub async fn handshake(address: &str, config: Arc<ClientConfig>) -> io::Result<TlsStream<TcpStream>> {
    let name = ServerName::try_from("localhost").expect("localhost is a name");
    TlsConnector::from(config).connect(name, TcpStream::connect(address).await?).await
}

/// Asserts that a call was refused with `code` and a message that has all of `words` in it.
#[track_caller]
pub fn assert_refused<T: Debug>(result: Result<T, Status>, code: Code, words: &[&str]) {
    let status = result.expect_err("the call is refused");
    assert_eq!(status.code(), code, "{status:?}");
    for word in words {
        assert!(status.message().contains(word), "{word:?} is not in {:?}", status.message());
    }
}

/// A site that speaks for itself.
pub struct RawSite {
    /// Calls, with the site's certificate.
    pub client: FederationClient<Channel>,
    /// The session, once joined.
    pub session: Vec<u8>,
    /// Names the daemon's state directory.
    pub instance: [u8; 16],
    /// The instruction stream, while open: the site's presence.
    pub instructions: Option<Streaming<Instruction>>,
    run: String,
    latest: Option<Task>,
}

impl RawSite {
    /// A site with the kit of that name, not joined.
    pub fn new(federation: &TestFederation, site: &str) -> Self {
        Self::over(channel(federation, &federation.kit(&format!("site-{site}"))))
    }

    /// A site over `channel`, not joined.
    pub fn over(channel: Channel) -> Self {
        // No bound of our own: a test may send and receive what it likes.
        let client = FederationClient::new(channel).max_decoding_message_size(usize::MAX);
        Self {
            client,
            session: Vec::new(),
            instance: *DeltaId::random().to_vec().first_chunk().expect("16 bytes"),
            instructions: None,
            run: String::new(),
            latest: None,
        }
    }

    /// A site that is joined, attends, and is ready for `run`.
    pub async fn ready(federation: &TestFederation, site: &str, run: &str) -> Self {
        let mut raw = Self::new(federation, site);
        raw.get_ready(run).await;
        raw
    }

    /// Joins, attends and reports that its text is tokenised.
    pub async fn get_ready(&mut self, run: &str) {
        self.join().await.expect("the site may join");
        self.attend().await.expect("the site may attend");
        self.report_ready(run).await.expect("the site may be ready");
    }

    /// Opens a session.
    pub async fn join(&mut self) -> Result<(), Status> {
        let request = JoinRequest {
            protocol_version: PROTOCOL_VERSION,
            software_version: "raw".to_owned(),
            instance_id: self.instance.to_vec(),
            device: "none".to_owned(),
            encodings: Encoding::ALL.map(|encoding| encoding.name().to_owned()).to_vec(),
        };
        self.session = soon("a session", self.client.join(request)).await?.into_inner().session_id;
        Ok(())
    }

    /// Opens the instruction stream.
    pub async fn attend(&mut self) -> Result<(), Status> {
        let request = WaitForAssignmentRequest { session_id: self.session.clone() };
        let stream = soon("instructions", self.client.wait_for_assignment(request)).await?;
        self.instructions = Some(stream.into_inner());
        self.latest = None;
        Ok(())
    }

    /// The run's specification, and the digests that go with it: its own and the manifest's.
    pub async fn describe(&mut self, run: &str) -> Result<(RunSpec, Vec<u8>, Vec<u8>), Status> {
        let request = DescribeRunRequest { session_id: self.session.clone(), run: run.to_owned() };
        let description = soon("a description", self.client.describe_run(request)).await?.into_inner();
        let spec = RunSpec::parse(&description.spec_toml).expect("the aggregator keeps valid specifications");
        Ok((spec, description.spec_digest, description.manifest_digest))
    }

    /// Says that the site's text is tokenised.
    pub async fn report_ready(&mut self, run: &str) -> Result<(), Status> {
        let (_, spec_digest, manifest_digest) = self.describe(run).await?;
        run.clone_into(&mut self.run);
        let request = ReportReadyRequest {
            session_id: self.session.clone(),
            run: run.to_owned(),
            spec_digest,
            manifest_digest,
            train_tokens: 1000,
            held_out_tokens: 100,
            documents: 10,
        };
        soon("readiness", self.client.report_ready(request)).await.map(|_| ())
    }

    /// Waits for an instruction for which `wanted` gives something; the one that holds may be it.
    pub async fn instruction<T>(&mut self, what: &str, mut wanted: impl FnMut(&Task) -> Option<T>) -> T {
        let Self { instructions, latest, .. } = self;
        let stream = instructions.as_mut().expect("the site attends");
        let wait = async {
            loop {
                if let Some(found) = latest.as_ref().and_then(&mut wanted) {
                    return found;
                }
                let instruction = stream.message().await.expect("the stream goes on");
                *latest = instruction.expect("the stream is open").task;
            }
        };
        soon(what, wait).await
    }

    /// Waits until the site is told to train for `round`, of the run that it has said to be ready for, if any.
    pub async fn assignment(&mut self, round: u32) -> Assignment {
        let run = self.run.clone();
        let train = self
            .instruction(&format!("round {round}"), |task| match task {
                Task::Train(train) if train.round == round && (run.is_empty() || train.run == run) => {
                    Some(train.clone())
                }
                _ => None,
            })
            .await;
        let (spec, ..) = self.describe(&train.run).await.expect("the run is described");
        let encoding = Encoding::parse(&train.delta_encoding).expect("the encoding is one");
        Assignment { plan: spec.chunk_plan(), encoding, train }
    }

    /// A version of the global model and its digest, all chunks verified.
    pub async fn model(&mut self, version: u32) -> Result<Vec<f32>, Status> {
        let request = self.model_request(version);
        let mut stream = soon("a model", self.client.download_model(request)).await?.into_inner();
        let (mut bytes, mut digest) = (Vec::new(), Vec::new());
        while let Some(message) = soon("a chunk", stream.message()).await? {
            match message.part.expect("a message has a part") {
                download_model_response::Part::Header(header) => digest = header.digest,
                download_model_response::Part::Chunk(chunk) => {
                    assert_eq!(Digest::of(&chunk.payload).to_vec(), chunk.digest);
                    bytes.extend_from_slice(&chunk.payload);
                }
            }
        }
        assert_eq!(Digest::of(&bytes).to_vec(), digest);
        Ok(bytemuck::pod_collect_to_vec(&bytes))
    }

    /// What asks for a version of the global model.
    pub fn model_request(&self, version: u32) -> DownloadModelRequest {
        DownloadModelRequest {
            session_id: self.session.clone(),
            run: self.run.clone(),
            version,
            first_chunk: 0,
            stride: 1,
            held_version: None,
        }
    }

    /// Opens an upload with `begin`, into which the session is filled in if it has none.
    pub async fn begin(&mut self, begin: &DeltaBegin) -> Result<Upload, Status> {
        let mut begin = begin.clone();
        if begin.session_id.is_empty() {
            begin.session_id.clone_from(&self.session);
        }
        let upload = self.open().await?;
        upload.send(upload_delta_request::Part::Begin(begin)).await;
        Ok(upload)
    }

    /// Opens an upload and says nothing.
    pub async fn open(&mut self) -> Result<Upload, Status> {
        let (requests, outbound) = mpsc::channel(QUEUE_MAX);
        let call = self.client.upload_delta(ReceiverStream::new(outbound));
        let answers = soon("an upload", call).await?.into_inner();
        Ok(Upload { requests, answers })
    }

    /// Uploads what the aggregator does not hold of `delta`, then finishes. Tells whether it was accepted
    /// before.
    pub async fn upload(&mut self, delta: &Delta) -> Result<bool, Status> {
        let mut upload = self.begin(&delta.begin).await?;
        let held = match upload.answer().await? {
            upload_delta_response::Part::Accepted(UploadAccepted { duplicate }) => return Ok(duplicate),
            upload_delta_response::Part::Resume(resume) => resume.held,
            upload_delta_response::Part::Acknowledged(_) => panic!("nothing was sent yet"),
        };
        for chunk in delta.chunks.iter().filter(|chunk| !held.contains(&chunk.index)) {
            upload.send_chunk(chunk).await?;
        }
        upload.finish(&delta.finish).await
    }

    /// Takes part in `round` with a delta of 0.001 everywhere, and waits until it is committed: what any
    /// site can do as long as the aggregator is well. Needs a run with a further round.
    pub async fn complete_round(&mut self, round: u32) {
        let assignment = self.assignment(round).await;
        let delta = Delta::constant(&assignment, 0.001);
        assert_eq!(self.upload(&delta).await.map_err(|status| status.to_string()), Ok(false));
        self.assignment(round + 1).await;
    }

    /// Reports a held-out loss of `version`.
    pub async fn report_evaluation(&mut self, version: u32, loss: f64) -> Result<(), Status> {
        let evaluation = Evaluation { version, loss, tokens: 100, text_bytes: 100 };
        let request = ReportEvaluationRequest {
            session_id: self.session.clone(),
            run: self.run.clone(),
            evaluation: Some(evaluation),
        };
        soon("an evaluation", self.client.report_evaluation(request)).await.map(|_| ())
    }
}

/// What a site was told to train, and how its delta is cut.
#[derive(Debug, Clone)]
pub struct Assignment {
    /// As received.
    pub train: Train,
    /// How the model is cut.
    pub plan: ChunkPlan,
    /// How the delta is encoded.
    pub encoding: Encoding,
}

/// A delta, ready to be sent or to be spoilt.
#[derive(Debug, Clone)]
pub struct Delta {
    /// The first message; its session is filled in when it is sent.
    pub begin: DeltaBegin,
    /// All chunks in order.
    pub chunks: Vec<DeltaChunk>,
    /// The last message.
    pub finish: DeltaFinish,
}

impl Delta {
    /// A delta of these values that is right in every respect.
    pub fn new(assignment: &Assignment, values: &[f32]) -> Self {
        let Assignment { train, plan, encoding } = assignment;
        assert_eq!(values.len() as u64, plan.parameters());
        let chunk = |index| {
            let range = plan.range(index).expect("the plan has the chunk");
            chunk_of(index, encoding.encode(&values[range.start as usize..range.end as usize]))
        };
        let chunks: Vec<DeltaChunk> = (0..plan.chunks()).map(chunk).collect();
        let square: f64 = values.iter().map(|value| f64::from(*value).powi(2)).sum();
        let begin = DeltaBegin {
            session_id: Vec::new(),
            run: train.run.clone(),
            round: train.round,
            spec_digest: train.spec_digest.clone(),
            manifest_digest: train.manifest_digest.clone(),
            encoding: encoding.name().to_owned(),
            chunks: plan.chunks(),
            total_bytes: chunks.iter().map(|chunk| chunk.payload.len() as u64).sum(),
            delta_id: DeltaId::random().to_vec(),
            part: 0,
            parts: 1,
        };
        let finish = DeltaFinish {
            steps: train.steps,
            tokens: train.tokens,
            train_loss: 3.0,
            train_seconds: 1.0,
            delta_norm: square.sqrt(),
        };
        Self { begin, chunks, finish }
    }

    /// A delta that is `value` everywhere.
    pub fn constant(assignment: &Assignment, value: f32) -> Self {
        Self::new(assignment, &vec![value; assignment.plan.parameters() as usize])
    }

    /// The same, spoilt.
    pub fn with(&self, spoil: impl FnOnce(&mut Self)) -> Self {
        let mut delta = self.clone();
        spoil(&mut delta);
        delta
    }

    /// The same with other bytes in a chunk, whose digest is right.
    pub fn with_payload(&self, index: usize, payload: Vec<u8>) -> Self {
        self.with(|delta| delta.chunks[index] = chunk_of(delta.chunks[index].index, payload))
    }
}

/// A chunk with the right digest.
pub fn chunk_of(index: u32, payload: Vec<u8>) -> DeltaChunk {
    DeltaChunk { index, digest: Digest::of(&payload).to_vec(), payload: payload.into() }
}

/// An upload under way. Dropping it breaks it off.
#[derive(Debug)]
pub struct Upload {
    requests: mpsc::Sender<UploadDeltaRequest>,
    answers: Streaming<UploadDeltaResponse>,
}

impl Upload {
    /// Sends a message; one that is no longer wanted is lost, and the answer says why.
    pub async fn send(&self, part: upload_delta_request::Part) {
        let message = UploadDeltaRequest { part: Some(part) };
        let _ = soon("room to send", self.requests.send(message)).await;
    }

    /// The next answer.
    pub async fn answer(&mut self) -> Result<upload_delta_response::Part, Status> {
        let answer = soon("an answer", self.answers.message()).await?;
        Ok(answer.expect("an upload ends with an answer").part.expect("an answer has a part"))
    }

    /// The chunks that the aggregator holds: the answer to `begin`.
    pub async fn held(&mut self) -> Result<Vec<u32>, Status> {
        match self.answer().await? {
            upload_delta_response::Part::Resume(resume) => Ok(resume.held),
            other => panic!("expected `resume`: {other:?}"),
        }
    }

    /// Sends a chunk and waits until it is durable.
    pub async fn send_chunk(&mut self, chunk: &DeltaChunk) -> Result<(), Status> {
        self.send(upload_delta_request::Part::Chunk(chunk.clone())).await;
        match self.answer().await? {
            upload_delta_response::Part::Acknowledged(answer) => assert_eq!(answer.indices, [chunk.index]),
            other => panic!("expected an acknowledgement: {other:?}"),
        }
        Ok(())
    }

    /// Finishes. Tells whether the delta was accepted before.
    pub async fn finish(&mut self, finish: &DeltaFinish) -> Result<bool, Status> {
        self.send(upload_delta_request::Part::Finish(*finish)).await;
        match self.answer().await? {
            upload_delta_response::Part::Accepted(accepted) => Ok(accepted.duplicate),
            other => panic!("expected `accepted`: {other:?}"),
        }
    }
}

/// An operator that speaks for itself.
pub struct RawOperator {
    /// Calls, with the operator's certificate.
    pub client: OperatorClient<Channel>,
}

impl RawOperator {
    /// The operator of the kit `operator-alice`.
    pub fn new(federation: &TestFederation) -> Self {
        Self { client: OperatorClient::new(channel(federation, &federation.kit("operator-alice"))) }
    }

    /// Creates a run.
    pub async fn create(&mut self, specification: &str) -> Result<RunSummary, Status> {
        let part = create_run_request::Part::Specification(specification.to_owned());
        let messages = tokio_stream::iter([CreateRunRequest { part: Some(part) }]);
        let answer = soon("a run", self.client.create_run(messages)).await?;
        Ok(answer.into_inner().run.expect("an answer has a run"))
    }

    /// A run, whole.
    pub async fn run(&mut self, run: &str) -> Result<GetRunResponse, Status> {
        let request = GetRunRequest { run: run.to_owned() };
        Ok(soon("a run", self.client.get_run(request)).await?.into_inner())
    }

    /// Waits until a version is committed, and returns the run as it is then.
    pub async fn committed(&mut self, run: &str, version: u32) -> GetRunResponse {
        let poll = async {
            loop {
                let response = self.run(run).await.expect("the run can be shown");
                if response.version >= version {
                    return response;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        soon(&format!("version {version}"), poll).await
    }
}
