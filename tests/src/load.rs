//! Synthetic sites for measurements: each has its own certificate and connection, speaks the protocol as the
//! daemon does, and spends as little processor time as that allows.
//!
//! A site verifies what it downloads and drops it. What it uploads was drawn, encoded and hashed beforehand
//! ([`Payloads`]): a few different chunks, sent over and over, since what is measured is the aggregator and
//! the wire, not a trainer or an encoder. All of the client's side of a transfer is here.

use std::{
    collections::BTreeMap,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
};

use consort_common::{
    chunk::ChunkPlan,
    codec::Encoding,
    ids::{DeltaId, Digest},
    tls::{CONNECTION_WINDOW_BYTES, STREAM_WINDOW_BYTES, client_config},
};
use consort_proto::v1::{
    DeltaBegin, DeltaChunk, DeltaFinish, DownloadModelRequest, Train, UploadAccepted, UploadDeltaRequest,
    download_model_response, instruction::Task, upload_delta_request, upload_delta_response::Part,
};
use hyper_util::rt::TokioIo;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    sync::mpsc,
};
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{
    Status,
    transport::{Channel, Endpoint, Uri},
};

use crate::{
    TestFederation,
    raw::{RawSite, chunk_of, credentials},
};

/// Messages that lie ready for the connection, as many as the daemon lets.
const MESSAGES_READY_MAX: usize = 2;
/// Different payloads per chunk length.
const VARIANTS: usize = 4;
/// Standard deviation of the deltas' values: that of a parameter's change in a round of a small model.
const DELTA_DEVIATION: f32 = 1e-3;

/// What deltas are made of: encoded chunks of Gaussian numbers with their digests.
#[derive(Debug)]
pub struct Payloads {
    plan: ChunkPlan,
    encoding: Encoding,
    whole: Vec<DeltaChunk>,
    last: Vec<DeltaChunk>,
}

impl Payloads {
    /// Draws and encodes them, for a model cut by `plan`.
    pub fn new(plan: ChunkPlan, encoding: Encoding, seed: u64) -> Self {
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        let mut draw = |length: usize| -> Vec<DeltaChunk> {
            let mut variant = || {
                let values: Vec<f32> = (0..length).map(|_| gaussian(&mut generator)).collect();
                chunk_of(0, encoding.encode(&values))
            };
            (0..VARIANTS).map(|_| variant()).collect()
        };
        let length = |index| plan.length(index).expect("the plan has the chunk");
        Self { plan, encoding, whole: draw(length(0)), last: draw(length(plan.chunks() - 1)) }
    }

    /// Chunk `index` of a delta; deltas with different `shift` differ in every chunk.
    fn chunk(&self, index: u32, shift: usize) -> DeltaChunk {
        let variants = if index + 1 == self.plan.chunks() { &self.last } else { &self.whole };
        DeltaChunk { index, ..variants[(index as usize + shift) % VARIANTS].clone() }
    }

    fn chunk_bytes(&self, index: u32) -> u64 {
        let variants = if index + 1 == self.plan.chunks() { &self.last } else { &self.whole };
        variants[0].payload.len() as u64
    }

    /// Bytes of a delta's chunks, encoded.
    pub fn delta_bytes(&self) -> u64 {
        let whole = u64::from(self.plan.chunks() - 1) * self.whole[0].payload.len() as u64;
        whole + self.last[0].payload.len() as u64
    }
}

/// A standard normal number (Box and Muller 1958) times [`DELTA_DEVIATION`].
fn gaussian(generator: &mut ChaCha8Rng) -> f32 {
    let (u, v): (f32, f32) = (generator.random(), generator.random());
    DELTA_DEVIATION * (-2.0 * (1.0 - u).ln()).sqrt() * (std::f32::consts::TAU * v).cos()
}

/// Bytes that went over a site's TCP connections: TLS, HTTP/2 and all.
#[derive(Debug, Default)]
pub struct Traffic {
    down: AtomicU64,
    up: AtomicU64,
}

impl Traffic {
    /// Bytes received and sent so far.
    pub fn down_up(&self) -> (u64, u64) {
        (self.down.load(Ordering::Relaxed), self.up.load(Ordering::Relaxed))
    }
}

/// A site without a trainer.
pub struct LoadSite {
    raw: RawSite,
    traffic: Arc<Traffic>,
    payloads: Arc<Payloads>,
    shift: usize,
    /// What it downloaded last.
    held_version: Option<u32>,
}

impl LoadSite {
    /// A site with the kit `site-NAME` that is joined, attends, and is ready for `run`. Deltas of sites with
    /// different `shift` differ.
    pub async fn ready(
        federation: &TestFederation,
        name: &str,
        run: &str,
        payloads: Arc<Payloads>,
        shift: usize,
    ) -> Self {
        let traffic = Arc::new(Traffic::default());
        let mut raw = RawSite::over(channel(federation, name, traffic.clone()));
        raw.get_ready(run).await;
        Self { raw, traffic, payloads, shift, held_version: None }
    }

    /// What its connections carried.
    pub fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    /// Waits until the site is told to train for `round`.
    pub async fn assignment(&mut self, round: u32) -> Train {
        let wanted = |task: &Task| match task {
            Task::Train(train) if train.round == round => Some(train.clone()),
            _ => None,
        };
        self.raw.instruction(&format!("round {round}"), wanted).await
    }

    /// Downloads the round's base model, or what the round before changed of it, verifies each chunk and drops
    /// it.
    ///
    /// # Errors
    /// What the aggregator says.
    pub async fn download(&mut self, train: &Train) -> Result<(), Status> {
        let held_version = self.held_version.replace(train.round - 1);
        let request = DownloadModelRequest { held_version, ..self.raw.model_request(train.round - 1) };
        let mut stream = self.raw.client.download_model(request).await?.into_inner();
        let mut chunks = 0;
        while let Some(message) = stream.message().await? {
            match message.part.expect("a message has a part") {
                download_model_response::Part::Header(header) => assert_eq!(header.digest, train.base_digest),
                download_model_response::Part::Chunk(chunk) => {
                    assert_eq!(chunk.index, chunks, "chunks come in order");
                    assert_eq!(Digest::of(&chunk.payload).as_bytes().as_slice(), chunk.digest);
                    chunks += 1;
                }
            }
        }
        assert_eq!(chunks, self.payloads.plan.chunks());
        Ok(())
    }

    /// Uploads a delta for the round, as much of it unacknowledged at a time as the aggregator allows.
    ///
    /// # Errors
    /// What the aggregator says.
    pub async fn upload(&mut self, train: &Train) -> Result<(), Status> {
        let payloads = self.payloads.clone();
        let chunks = payloads.plan.chunks();
        let (requests, outbound) = mpsc::channel(MESSAGES_READY_MAX);
        let send = async |part| {
            // A call that has ended takes no more; why it ended is among the answers.
            let _ = requests.send(UploadDeltaRequest { part: Some(part) }).await;
        };
        send(upload_delta_request::Part::Begin(self.begin(train))).await;
        let call = self.raw.client.upload_delta(ReceiverStream::new(outbound));
        let mut answers = call.await?.into_inner();
        let mut answer = async || -> Result<Part, Status> {
            let answer = answers.message().await?.and_then(|answer| answer.part);
            Ok(answer.expect("an upload ends with `accepted`"))
        };
        let mut window_bytes = match answer().await? {
            Part::Resume(resume) if resume.held.is_empty() => resume.window_bytes,
            other => panic!("expected `resume` with nothing held: {other:?}"),
        };
        let (mut unacknowledged, mut unacknowledged_bytes) = (BTreeMap::new(), 0);
        let mut next = 0;
        while next < chunks || !unacknowledged.is_empty() {
            let bytes = payloads.chunk_bytes(next);
            if next < chunks && (unacknowledged.is_empty() || unacknowledged_bytes + bytes <= window_bytes) {
                let chunk = payloads.chunk(next, self.shift + train.round as usize);
                unacknowledged.insert(next, bytes);
                unacknowledged_bytes += bytes;
                next += 1;
                send(upload_delta_request::Part::Chunk(chunk)).await;
                continue;
            }
            match answer().await? {
                Part::Acknowledged(acknowledged) => {
                    window_bytes = acknowledged.window_bytes;
                    for index in acknowledged.indices {
                        unacknowledged_bytes -= unacknowledged.remove(&index).expect("it was under way");
                    }
                }
                other => panic!("expected an acknowledgement: {other:?}"),
            }
        }
        let finish = DeltaFinish {
            steps: train.steps,
            tokens: train.tokens,
            train_loss: 3.0,
            train_seconds: 1.0,
            delta_norm: 1.0,
        };
        send(upload_delta_request::Part::Finish(finish)).await;
        match answer().await? {
            Part::Accepted(UploadAccepted { duplicate: false }) => Ok(()),
            other => panic!("expected `accepted`: {other:?}"),
        }
    }

    fn begin(&self, train: &Train) -> DeltaBegin {
        DeltaBegin {
            session_id: self.raw.session.clone(),
            run: train.run.clone(),
            round: train.round,
            spec_digest: train.spec_digest.clone(),
            manifest_digest: train.manifest_digest.clone(),
            encoding: self.payloads.encoding.name().to_owned(),
            chunks: self.payloads.plan.chunks(),
            total_bytes: self.payloads.delta_bytes(),
            delta_id: DeltaId::random().to_vec(),
            part: 0,
            parts: 1,
        }
    }
}

/// A channel with a site's certificate and the daemon's settings, whose bytes are counted.
fn channel(federation: &TestFederation, site: &str, traffic: Arc<Traffic>) -> Channel {
    let config = client_config(&credentials(&federation.kit(&format!("site-{site}"))));
    let address = federation.endpoint().to_owned();
    let connector = tower::service_fn(move |_: Uri| {
        let (config, address, traffic) = (config.clone(), address.clone(), traffic.clone());
        async move {
            let tcp = TcpStream::connect(&address).await?;
            tcp.set_nodelay(true)?;
            let name = ServerName::try_from("localhost").expect("localhost is a name");
            let tls = TlsConnector::from(config).connect(name, Counted { tcp, traffic }).await?;
            Ok::<_, io::Error>(TokioIo::new(tls))
        }
    });
    Endpoint::from_static("https://localhost")
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .connect_with_connector_lazy(connector)
}

/// A TCP connection whose bytes are counted.
struct Counted {
    tcp: TcpStream,
    traffic: Arc<Traffic>,
}

impl Counted {
    fn count_sent(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(bytes)) = written {
            self.traffic.up.fetch_add(bytes as u64, Ordering::Relaxed);
        }
        written
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let filled = buffer.filled().len();
        let read = Pin::new(&mut self.tcp).poll_read(context, buffer);
        self.traffic.down.fetch_add((buffer.filled().len() - filled) as u64, Ordering::Relaxed);
        read
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.tcp).poll_write(context, bytes);
        self.count_sent(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.tcp).poll_write_vectored(context, slices);
        self.count_sent(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(context)
    }
}
