//! The service for sites.

use std::{pin::Pin, sync::Arc};

use consort_common::{codec::Encoding, identity::Role, ids::SiteName, units::unix_ms_now};
use consort_proto::{PROTOCOL_VERSION, v1, v1::federation_server::Federation};
use futures::{Stream, StreamExt};
use tokio::{
    sync::{Semaphore, mpsc},
    time::timeout,
};
use tokio_stream::wrappers::{ReceiverStream, WatchStream};
use tonic::{Request, Response, Status, Streaming};

use super::{
    broadcast::Broadcast,
    caller, digest,
    download::{self, Selection},
    next_message,
    places::{Downloads, Uploads, no_room},
    run_name, upload,
};
use crate::{
    driver::{Driver, Evaluated, ReadyReport},
    sessions::Daemon,
};

/// Acknowledgements that wait for the transport, per upload.
const ANSWERS_MAX: usize = 16;
/// Longest text that a client may give for people to read, in characters.
const TEXT_CHARACTERS_MAX: usize = 200;

/// The service for sites.
pub struct FederationService {
    driver: Arc<Driver>,
    uploads: Arc<Uploads>,
    downloads: Downloads,
    broadcast: Arc<Broadcast>,
    probes: Semaphore,
}

impl FederationService {
    /// A service over `driver`.
    pub fn new(driver: Arc<Driver>) -> Self {
        let limits = driver.limits();
        let uploads = Uploads::new(limits.uploads_max);
        let downloads = Downloads::new(limits.downloads_max);
        // A probe is an upload whose bytes go nowhere; those that count do not wait for it.
        let probes = Semaphore::new(limits.uploads_max);
        let broadcast = Arc::new(Broadcast::new());
        Self { driver, uploads, downloads, broadcast, probes }
    }

    fn site<T>(&self, request: &Request<T>) -> Result<SiteName, Status> {
        caller(request, self.driver.federation(), Role::Site)
    }
}

/// Text from a client, cut and without control characters, fit for logs and tables.
fn printable(text: &str) -> String {
    text.chars().filter(|character| !character.is_control()).take(TEXT_CHARACTERS_MAX).collect()
}

type Outbound<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Federation for FederationService {
    async fn join(&self, request: Request<v1::JoinRequest>) -> Result<Response<v1::JoinResponse>, Status> {
        let site = self.site(&request)?;
        let request = request.into_inner();
        if request.protocol_version != PROTOCOL_VERSION {
            return Err(Status::failed_precondition(format!(
                "this client speaks protocol version {}, the aggregator {PROTOCOL_VERSION}; install the client of version {}",
                request.protocol_version,
                env!("CARGO_PKG_VERSION")
            )));
        }
        let instance = request.instance_id.as_slice().try_into();
        let instance =
            instance.map_err(|_| Status::invalid_argument("instance_id: 16 bytes are expected"))?;
        let daemon = Daemon {
            instance,
            device: printable(&request.device),
            software_version: printable(&request.software_version),
            // Names that this aggregator does not know are of no use to it.
            encodings: request.encodings.iter().filter_map(|name| Encoding::parse(name)).collect(),
        };
        let (driver, name) = (self.driver.clone(), site.clone());
        let session_id = self.driver.to_its_end(async move { driver.join(&name, daemon).await }).await?;
        Ok(Response::new(v1::JoinResponse {
            session_id: session_id.to_vec(),
            server_time_unix_ms: unix_ms_now(),
            software_version: env!("CARGO_PKG_VERSION").to_owned(),
            federation: self.driver.federation().to_owned(),
            site: site.to_string(),
        }))
    }

    type WaitForAssignmentStream = Outbound<v1::Instruction>;

    async fn wait_for_assignment(
        &self,
        request: Request<v1::WaitForAssignmentRequest>,
    ) -> Result<Response<Self::WaitForAssignmentStream>, Status> {
        let site = self.site(&request)?;
        let (driver, session) = (self.driver.clone(), request.into_inner().session_id);
        let attend = self.driver.to_its_end(async move { driver.attend(&site, &session).await });
        let attendance = attend.await?;
        let stopping = self.driver.stopping();
        let instructions = WatchStream::new(attendance.instructions());
        let stream = instructions
            // Before the first instruction is known there is nothing to tell.
            .filter(|instruction| std::future::ready(instruction.task.is_some()))
            .take_until(stopping)
            .map(move |instruction| {
                // The stream owns the attendance: the site is present as long as it is open.
                let _ = &attendance;
                Ok(instruction)
            });
        Ok(Response::new(Box::pin(stream)))
    }

    async fn describe_run(
        &self,
        request: Request<v1::DescribeRunRequest>,
    ) -> Result<Response<v1::DescribeRunResponse>, Status> {
        let site = self.site(&request)?;
        let request = request.get_ref();
        let material = self.driver.material_for(&site, &request.session_id, &run_name(&request.run)?).await?;
        Ok(Response::new(v1::DescribeRunResponse {
            spec_toml: material.spec_toml.clone(),
            spec_digest: material.spec_digest.to_vec(),
            manifest_digest: material.manifest_digest.to_vec(),
            tokenizer_digest: material.tokenizer_digest.to_vec(),
        }))
    }

    type DownloadTokenizerStream = Outbound<v1::FilePart>;

    async fn download_tokenizer(
        &self,
        request: Request<v1::DownloadTokenizerRequest>,
    ) -> Result<Response<Self::DownloadTokenizerStream>, Status> {
        let site = self.site(&request)?;
        let request = request.get_ref();
        let material = self.driver.material_for(&site, &request.session_id, &run_name(&request.run)?).await?;
        let place = self.downloads.enter(&site)?;
        let path = self.driver.tokenizer_path(&material.name);
        let parts = download::files(&self.driver, vec![("tokenizer.json".to_owned(), path)], place);
        Ok(Response::new(Box::pin(ReceiverStream::new(parts))))
    }

    async fn report_ready(
        &self,
        request: Request<v1::ReportReadyRequest>,
    ) -> Result<Response<v1::ReportReadyResponse>, Status> {
        let site = self.site(&request)?;
        let request = request.get_ref();
        check_count("train_tokens", request.train_tokens)?;
        check_count("held_out_tokens", request.held_out_tokens)?;
        check_count("documents", request.documents)?;
        let report = ReadyReport {
            run: run_name(&request.run)?,
            spec_digest: digest("spec_digest", &request.spec_digest)?,
            manifest_digest: digest("manifest_digest", &request.manifest_digest)?,
            train_tokens: request.train_tokens,
            held_out_tokens: request.held_out_tokens,
            documents: request.documents,
        };
        let (driver, session) = (self.driver.clone(), request.session_id.clone());
        self.driver.to_its_end(async move { driver.ready(&site, &session, report).await }).await?;
        Ok(Response::new(v1::ReportReadyResponse {}))
    }

    type DownloadModelStream = Outbound<v1::DownloadModelResponse>;

    async fn download_model(
        &self,
        request: Request<v1::DownloadModelRequest>,
    ) -> Result<Response<Self::DownloadModelStream>, Status> {
        let site = self.site(&request)?;
        let request = request.get_ref();
        let run = run_name(&request.run)?;
        let (session, held) = (&request.session_id, request.held_version);
        let reader = self.driver.model_for(&site, session, &run, request.version, held).await?;
        let fragments = reader.material.spec.fragments();
        let selection = Selection::new(request.first_chunk, request.stride, fragments)?;
        let place = self.downloads.enter(&site)?;
        let chunks = download::model(&self.driver, &self.broadcast, reader, selection, place);
        Ok(Response::new(Box::pin(ReceiverStream::new(chunks))))
    }

    type UploadDeltaStream = Outbound<v1::UploadDeltaResponse>;

    async fn upload_delta(
        &self,
        request: Request<Streaming<v1::UploadDeltaRequest>>,
    ) -> Result<Response<Self::UploadDeltaStream>, Status> {
        let site = self.site(&request)?;
        let (answers, outbound) = mpsc::channel(ANSWERS_MAX);
        let (driver, uploads) = (self.driver.clone(), self.uploads.clone());
        let stream = request.into_inner();
        self.driver.spawn_task("upload", async move {
            if let Err(status) = upload::receive(&driver, &uploads, &site, stream, &answers).await {
                tracing::info!(%site, code = ?status.code(), reason = status.message(), "upload ended");
                // Lost on a caller that went away, or that reads nothing.
                let _ = timeout(driver.limits().stall(), answers.send(Err(status))).await;
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(outbound))))
    }

    async fn report_progress(
        &self,
        request: Request<v1::ReportProgressRequest>,
    ) -> Result<Response<v1::ReportProgressResponse>, Status> {
        let site = self.site(&request)?;
        let v1::ReportProgressRequest { session_id, progress } = request.into_inner();
        let mut progress = progress.ok_or_else(|| Status::invalid_argument("progress: is missing"))?;
        run_name(&progress.run)?;
        progress.loss = progress.loss.filter(|loss| loss.is_finite());
        if !progress.tokens_per_second.is_finite() {
            progress.tokens_per_second = 0.0;
        }
        self.driver.progress(&site, &session_id, progress).await?;
        Ok(Response::new(v1::ReportProgressResponse {}))
    }

    async fn report_evaluation(
        &self,
        request: Request<v1::ReportEvaluationRequest>,
    ) -> Result<Response<v1::ReportEvaluationResponse>, Status> {
        let site = self.site(&request)?;
        let request = request.get_ref();
        let run = run_name(&request.run)?;
        let report = request.evaluation.ok_or_else(|| Status::invalid_argument("evaluation: is missing"))?;
        if !(0.0..=LOSS_MAX).contains(&report.loss) {
            return Err(Status::invalid_argument(format!(
                "evaluation.loss: is {}; allowed: 0 to {LOSS_MAX} nats per token",
                report.loss
            )));
        }
        if report.tokens == 0 {
            return Err(Status::invalid_argument(
                "evaluation.tokens: is 0; a loss is measured on at least one",
            ));
        }
        check_count("evaluation.text_bytes", report.text_bytes)?;
        let evaluated = Evaluated {
            version: report.version,
            loss: report.loss,
            tokens: report.tokens,
            text_bytes: report.text_bytes,
        };
        let (driver, session) = (self.driver.clone(), request.session_id.clone());
        let record = async move { driver.evaluated(&site, &session, &run, evaluated).await };
        self.driver.to_its_end(record).await?;
        Ok(Response::new(v1::ReportEvaluationResponse {}))
    }

    async fn probe(
        &self,
        request: Request<Streaming<v1::ProbeRequest>>,
    ) -> Result<Response<v1::ProbeResponse>, Status> {
        let site = self.site(&request)?;
        let _permit = self.probes.try_acquire().map_err(|_| no_room("probes"))?;
        let mut stream = request.into_inner();
        let mut bytes_received = 0;
        while let Some(message) = next_message(&mut stream, self.driver.limits().stall()).await? {
            bytes_received += message.data.len() as u64;
            if bytes_received > PROBE_BYTES_MAX {
                return Err(Status::invalid_argument(format!(
                    "a probe sends at most {PROBE_BYTES_MAX} bytes"
                )));
            }
        }
        Ok(Response::new(v1::ProbeResponse {
            bytes_received,
            server_time_unix_ms: unix_ms_now(),
            protocol_version: PROTOCOL_VERSION,
            identity: format!("consort://{}/site/{site}", self.driver.federation()),
            active_spec_toml: self.driver.active_spec().await.unwrap_or_default(),
        }))
    }

    async fn leave(&self, request: Request<v1::LeaveRequest>) -> Result<Response<v1::LeaveResponse>, Status> {
        let site = self.site(&request)?;
        let (driver, request) = (self.driver.clone(), request.into_inner());
        let leave =
            async move { driver.leave(&site, &request.session_id, &printable(&request.reason)).await };
        self.driver.to_its_end(leave).await?;
        Ok(Response::new(v1::LeaveResponse {}))
    }
}

/// Largest loss that is taken; a model that guesses evenly over 2^32 tokens has 22.
const LOSS_MAX: f64 = 1000.0;
/// Largest count that a site may report of its text.
const COUNT_MAX: u64 = 1 << 53;

fn check_count(what: &str, count: u64) -> Result<(), Status> {
    if count <= COUNT_MAX {
        return Ok(());
    }
    Err(Status::invalid_argument(format!("{what}: is {count}; allowed: 0 to {COUNT_MAX}")))
}

/// Most that one probe may send.
const PROBE_BYTES_MAX: u64 = 64 << 20;
