//! Sending a model version or a file, a chunk at a time, at the receiver's pace; a receiver that takes
//! nothing for the stall time is cut.

use std::{path::PathBuf, sync::Arc, time::Duration};

use consort_proto::v1::{
    DownloadModelResponse, FilePart, ModelChunk, ModelHeader, download_model_response as response,
};
use tokio::{fs::File, io::AsyncReadExt, sync::mpsc, time::timeout};
use tonic::Status;

use super::{
    broadcast::{Broadcast, Chunk, Listener},
    places::{DownloadPlace, PARTS_MAX},
};
use crate::driver::{Driver, ModelReader};

/// Messages that wait for the transport, per download.
const QUEUE_MAX: usize = 2;
/// Bytes of a file in one message.
const FILE_PART_BYTES: usize = 1 << 20;

/// Messages of one outbound stream.
pub(super) type Outbound<T> = mpsc::Receiver<Result<T, Status>>;

struct Sender<T> {
    queue: mpsc::Sender<Result<T, Status>>,
    stall: Duration,
}

impl<T> Sender<T> {
    async fn send(&self, message: T) -> Result<(), Status> {
        match timeout(self.stall, self.queue.send(Ok(message))).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(Status::cancelled("the receiver went away")),
            Err(_) => Err(Status::cancelled(format!(
                "the receiver took nothing for {} s; reconnect and resume",
                self.stall.as_secs()
            ))),
        }
    }
}

/// Which chunks of a model are sent: from `first` on, every `stride`-th.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Selection {
    first: u32,
    stride: u32,
}

impl Selection {
    /// Of a model in so many fragments.
    ///
    /// # Errors
    /// INVALID_ARGUMENT if the stride is too large. A stride of 0 is one of 1.
    pub fn new(first: u32, stride: u32, fragments: u32) -> Result<Self, Status> {
        let stride_max = fragments.saturating_mul(PARTS_MAX);
        if stride > stride_max {
            return Err(Status::invalid_argument(format!("stride: is {stride}; allowed: 0 to {stride_max}")));
        }
        Ok(Self { first, stride: stride.max(1) })
    }
}

/// Streams chunks of a model. The place is given up once all are queued, or the receiver is cut: the stream
/// itself may lie there for as long as its connection lives.
pub(super) fn model(
    driver: &Arc<Driver>,
    broadcast: &Arc<Broadcast>,
    reader: ModelReader,
    selection: Selection,
    place: DownloadPlace,
) -> Outbound<DownloadModelResponse> {
    let (queue, outbound) = mpsc::channel(QUEUE_MAX);
    let (driver, listener) = (driver.clone(), broadcast.listen());
    driver.clone().spawn_task("download", async move {
        let _place = place;
        let sender = Sender { queue: queue.clone(), stall: driver.limits().stall() };
        let run = reader.material.name.clone();
        let mut sent = 0;
        let result = send_model(&sender, &listener, &Arc::new(reader), selection, &mut sent).await;
        driver.count_traffic(&run, sent, 0);
        if let Err(status) = result {
            // The receiver is told if it still listens; a full queue is one that it does not read.
            let _ = queue.try_send(Err(status));
        }
    });
    outbound
}

async fn send_model(
    sender: &Sender<DownloadModelResponse>,
    listener: &Listener,
    reader: &Arc<ModelReader>,
    selection: Selection,
    sent: &mut u64,
) -> Result<(), Status> {
    let plan = reader.material.plan;
    let part = |part| DownloadModelResponse { part: Some(part) };
    let header = ModelHeader {
        parameters: plan.parameters(),
        chunk_parameters: plan.chunk_parameters(),
        chunks: plan.chunks(),
        digest: reader.digest().to_vec(),
        encoding: reader.encoding().name().to_owned(),
        base_version: reader.base_version(),
    };
    sender.send(part(response::Part::Header(header))).await?;
    for index in (selection.first..plan.chunks()).step_by(selection.stride as usize) {
        let Chunk { payload, digest } = listener.chunk(reader, index).await?;
        let bytes = payload.len() as u64;
        let chunk = ModelChunk { index, payload, digest: digest.to_vec() };
        sender.send(part(response::Part::Chunk(chunk))).await?;
        *sent += bytes;
    }
    Ok(())
}

/// Streams files, one after the other, under the given names; `place` is kept as in [`model`].
pub(super) fn files(
    driver: &Arc<Driver>,
    files: Vec<(String, PathBuf)>,
    place: impl Send + 'static,
) -> Outbound<FilePart> {
    let (queue, outbound) = mpsc::channel(QUEUE_MAX);
    let sender = Sender { queue: queue.clone(), stall: driver.limits().stall() };
    driver.clone().spawn_task("file download", async move {
        let _place = place;
        for (name, path) in files {
            if let Err(status) = send_file(&sender, name, &path).await {
                let _ = queue.try_send(Err(status));
                return;
            }
        }
    });
    outbound
}

async fn send_file(sender: &Sender<FilePart>, name: String, path: &std::path::Path) -> Result<(), Status> {
    let unreadable = |error: std::io::Error| {
        tracing::error!(path = %path.display(), %error, "cannot read a file that was asked for");
        Status::internal(format!("the aggregator cannot read {name}; see its log"))
    };
    let mut file = File::open(path).await.map_err(unreadable)?;
    let file_bytes = file.metadata().await.map_err(unreadable)?.len();
    let mut offset = 0;
    loop {
        let mut data = Vec::with_capacity(FILE_PART_BYTES);
        (&mut file).take(FILE_PART_BYTES as u64).read_to_end(&mut data).await.map_err(unreadable)?;
        let bytes = data.len() as u64;
        if bytes == 0 && offset > 0 {
            return Ok(());
        }
        sender.send(FilePart { name: name.clone(), file_bytes, offset, data: data.into() }).await?;
        offset += bytes;
        if offset >= file_bytes {
            return Ok(());
        }
    }
}
