//! The checkpoint that a run starts from: what it says of the specification, and its way to the aggregator.
//!
//! The model goes chunk by chunk, as the specification cuts it, and is read twice: once for its digest, by which
//! the aggregator knows what of it has arrived before, and once to be sent. Memory: some chunks.

use std::{collections::BTreeSet, path::Path, sync::Arc};

use bytes::Bytes;
use consort_common::{
    checkpoint::{CheckpointError, CheckpointReader},
    chunk::ChunkPlan,
    ids::Digest,
    spec::{Problem, RunSpec, StartingPoint},
};
use consort_proto::v1::{ModelChunk, StartBegin, StartModel, UploadStartRequest, upload_start_request::Part};
use indicatif::ProgressBar;
use tokio::{
    sync::mpsc,
    task::{JoinError, spawn_blocking},
};
use tokio_stream::wrappers::ReceiverStream;

use crate::{
    checkpoints::progress_bar,
    connection::{Operator, missing},
    failure::Failure,
    specification::Specification,
    text::printable,
};

/// Chunks that were read and wait to be sent.
const QUEUE_CHUNKS_MAX: usize = 2;
/// Longest name of a checkpoint, in characters: what the aggregator takes.
const ORIGIN_CHARACTERS_MAX: usize = 200;

/// A checkpoint to start from.
#[derive(Debug)]
pub struct StartCheckpoint {
    model: Arc<Model>,
    point: StartingPoint,
    origin: String,
}

impl StartCheckpoint {
    /// Opens the Hugging Face directory at `path`; the error completes "start.checkpoint ...".
    pub fn open(path: &Path) -> Result<Self, String> {
        let named = |reason: &dyn std::fmt::Display| {
            format!("names {}, which no run can start from: {reason}", path.display())
        };
        let checkpoint = CheckpointReader::open(path).map_err(|error| named(&error))?;
        let point = StartingPoint {
            architecture: checkpoint.architecture().clone(),
            tokenizer: serde_json::from_str(checkpoint.tokenizer_json()).map_err(|error| named(&error))?,
            end_of_text: checkpoint.end_of_text().to_owned(),
        };
        // The directory's own name, be it given as "." or through a link.
        let full = path.canonicalize().map_err(|error| named(&error))?;
        let name = full.file_name().unwrap_or(full.as_os_str()).to_string_lossy();
        let origin = printable(&name).chars().take(ORIGIN_CHARACTERS_MAX).collect();
        Ok(Self { model: Arc::new(Model(checkpoint)), point, origin })
    }

    /// What the specification must fit.
    pub fn point(&self) -> &StartingPoint {
        &self.point
    }

    /// Its name.
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// What in the specification is not the checkpoint's; `tokenizer` is its `tokenizer.json`, empty where it is
    /// the built-in one.
    pub fn problems(&self, spec: &RunSpec, tokenizer: &[u8]) -> Vec<Problem> {
        self.point.problems(spec, serde_json::from_slice(tokenizer).ok().as_ref())
    }

    /// Brings the aggregator what it lacks of the model; `attempt` completes "cannot ...".
    pub async fn upload(
        &self,
        operator: &mut Operator,
        specification: &Specification,
        attempt: &str,
    ) -> Result<StartModel, Failure> {
        let plan = specification.spec.chunk_plan();
        let model = self.model.clone();
        let digest = ended(attempt, spawn_blocking(move || model.digest(plan)).await)?;

        let from_status = |status| Failure::from_status(attempt, &status);
        let (queue, messages) = mpsc::channel(QUEUE_CHUNKS_MAX);
        let begin =
            StartBegin { specification: specification.text().to_owned(), model_digest: digest.to_vec() };
        // There is room for the first.
        let _ = queue.send(UploadStartRequest { part: Some(Part::Begin(begin)) }).await;
        let answers = operator.upload_start(ReceiverStream::new(messages)).await;
        let mut answers = answers.map_err(from_status)?.into_inner();
        let held = answers.message().await.map_err(from_status)?;
        let held = held.ok_or_else(|| missing(attempt, "list of chunks"))?.held;

        let model = self.model.clone();
        let reading = spawn_blocking(move || model.send(plan, &held, &queue));
        // No timeout: it ends when all that was sent is on the aggregator's disk, or with what is wrong.
        let end = answers.message().await;
        // Whatever it still wants to send is not wanted.
        drop(answers);
        ended(attempt, reading.await)?;
        end.map_err(from_status)?;
        Ok(StartModel { digest: digest.to_vec(), origin: self.origin.clone() })
    }
}

/// What came of reading the model.
fn ended<T>(attempt: &str, result: Result<Result<T, CheckpointError>, JoinError>) -> Result<T, Failure> {
    let result = result.map_err(|error| Failure::Refused(format!("cannot {attempt}: {error}")))?;
    result.map_err(|error| Failure::Refused(format!("cannot {attempt}: {error}")))
}

/// The checkpoint's flat vector, in its files.
#[derive(Debug)]
struct Model(CheckpointReader);

impl Model {
    /// Chunk `index` as fp32 little-endian; `values` is room for it.
    fn chunk(&self, plan: ChunkPlan, index: u32, values: &mut Vec<f32>) -> Result<(), CheckpointError> {
        let range = plan.range(index).unwrap_or_default();
        values.resize(plan.length(index).unwrap_or_default(), 0.0);
        self.0.fill(range.start, values)
    }

    /// BLAKE3 of the whole vector.
    fn digest(&self, plan: ChunkPlan) -> Result<Digest, CheckpointError> {
        let bar = bar("reading", 0..plan.chunks(), plan);
        let (mut hasher, mut values) = (blake3::Hasher::new(), Vec::new());
        for index in 0..plan.chunks() {
            self.chunk(plan, index, &mut values)?;
            hasher.update_rayon(bytemuck::cast_slice(&values));
            bar.inc(size_of_val(values.as_slice()) as u64);
        }
        bar.finish_and_clear();
        Ok(hasher.finalize().into())
    }

    /// Queues the chunks that are not `held`, ascending, until nobody takes them any more.
    fn send(
        &self,
        plan: ChunkPlan,
        held: &[u32],
        queue: &mpsc::Sender<UploadStartRequest>,
    ) -> Result<(), CheckpointError> {
        let held: BTreeSet<u32> = held.iter().copied().collect();
        let missing: Vec<u32> = (0..plan.chunks()).filter(|index| !held.contains(index)).collect();
        let bar = bar("sending", missing.iter().copied(), plan);
        let mut values = Vec::new();
        for index in missing {
            self.chunk(plan, index, &mut values)?;
            let payload = Bytes::copy_from_slice(bytemuck::cast_slice(&values));
            let bytes = payload.len() as u64;
            let chunk = ModelChunk { index, digest: Digest::of(&payload).to_vec(), payload };
            if queue.blocking_send(UploadStartRequest { part: Some(Part::Chunk(chunk)) }).is_err() {
                break;
            }
            bar.inc(bytes);
        }
        bar.finish_and_clear();
        Ok(())
    }
}

/// A bar over these chunks.
fn bar(what: &'static str, chunks: impl Iterator<Item = u32>, plan: ChunkPlan) -> ProgressBar {
    let parameters: u64 = chunks.map(|index| plan.length(index).unwrap_or_default() as u64).sum();
    progress_bar(parameters * size_of::<f32>() as u64).with_prefix(format!("{what} "))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use consort_common::{
        checkpoint,
        model::{Architecture, Gpt2Config, LlamaConfig},
        tokenizer::{BYTE_END_OF_TEXT, BYTE_END_OF_TEXT_ID, byte_tokenizer_json},
    };
    use tonic::Status;

    use super::*;
    use crate::fake_operator::{FakeOperator, Script};

    const SPEC: &str =
        "name = \"demo\"\nrounds = 2\n[start]\ncheckpoint = \"model\"\n[wire]\nchunk_parameters = 1024\n";

    fn architecture() -> Architecture {
        let config = LlamaConfig {
            hidden_size: 16,
            intermediate_size: 16,
            num_hidden_layers: 1,
            num_attention_heads: 2,
            ..LlamaConfig::default()
        };
        Architecture::Llama(config)
    }

    /// A folder with `specification` and the checkpoint that it names.
    fn folder(specification: &str) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("run.toml"), specification).unwrap();
        let architecture = architecture();
        checkpoint::write(
            &folder.path().join("model"),
            &architecture,
            &architecture.manifest().initialise(3),
            &byte_tokenizer_json(),
            BYTE_END_OF_TEXT,
            BYTE_END_OF_TEXT_ID,
            &BTreeMap::new(),
        )
        .unwrap();
        folder
    }

    fn load(folder: &tempfile::TempDir) -> Result<Specification, Failure> {
        Specification::load(&folder.path().join("run.toml"))
    }

    /// What the aggregator received, when it held some chunks.
    async fn uploaded(script: Script) -> (Result<StartModel, Failure>, Vec<UploadStartRequest>) {
        let specification = load(&folder(SPEC)).unwrap();
        let (fake, mut operator, _server) = FakeOperator::serve(script).await;
        let start = specification.start.as_ref().unwrap();
        let result = start.upload(&mut operator, &specification, "create the run demo").await;
        let uploaded = std::mem::take(&mut fake.0.lock().unwrap().uploaded);
        (result, uploaded)
    }

    #[tokio::test]
    async fn the_model_is_sent_in_chunks_under_its_digest() {
        let (result, messages) = uploaded(Script::default()).await;
        let flat = architecture().manifest().initialise(3);
        let start = result.unwrap();
        assert_eq!(start.digest, Digest::of(bytemuck::cast_slice(&flat)).to_vec());
        assert_eq!(start.origin, "model");
        let Some(Part::Begin(begin)) = &messages[0].part else { panic!("{:?}", messages[0]) };
        let spec = RunSpec::parse(&begin.specification).unwrap();
        assert_eq!((spec.model, &begin.model_digest), (architecture(), &start.digest));
        let mut received = Vec::new();
        for (index, message) in (0..).zip(&messages[1..]) {
            let Some(Part::Chunk(chunk)) = &message.part else { panic!("{message:?}") };
            assert_eq!(chunk.index, index);
            assert_eq!(chunk.digest, Digest::of(&chunk.payload).to_vec());
            received.extend_from_slice(&chunk.payload);
        }
        assert!(received == bytemuck::cast_slice::<f32, u8>(&flat));
    }

    #[tokio::test]
    async fn what_the_aggregator_holds_is_not_sent_again() {
        let (result, messages) = uploaded(Script { held: vec![0, 2, 3], ..Script::default() }).await;
        result.unwrap();
        let indices = messages[1..].iter().map(|message| match &message.part {
            Some(Part::Chunk(chunk)) => chunk.index,
            other => panic!("{other:?}"),
        });
        let chunks = u32::try_from(architecture().manifest().parameters().div_ceil(1024)).unwrap();
        let expected: Vec<u32> = (0..chunks).filter(|index| ![0, 2, 3].contains(index)).collect();
        assert_eq!(indices.collect::<Vec<_>>(), expected);
    }

    #[tokio::test]
    async fn what_the_aggregator_says_against_it_is_what_is_reported() {
        for (status, exit_code) in [
            (Status::resource_exhausted("no room"), 1),
            (Status::invalid_argument("chunk 1: is wrong"), 2),
            (Status::unavailable("gone"), 3),
        ] {
            let words = status.message().to_owned();
            let (result, _) = uploaded(Script { upload_failure: Some(status), ..Script::default() }).await;
            let failure = result.unwrap_err();
            assert_eq!(failure.exit_code(), exit_code);
            assert!(failure.to_string().contains(&words), "{failure}");
        }
    }

    #[test]
    fn a_model_that_is_not_the_checkpoints_is_listed_with_all_other_problems() {
        let other = Architecture::Gpt2(Gpt2Config::default()).name();
        let folder = folder(&format!("{SPEC}[model]\narchitecture = \"{other}\"\n"));
        let text = load(&folder).unwrap_err().to_string();
        assert!(
            text.contains("has 1 problem:\n  model.architecture is \"gpt2\"; the checkpoint's"),
            "{text}"
        );
    }

    #[test]
    fn a_checkpoint_that_cannot_be_read_is_a_problem_of_the_specification() {
        let folder = folder(SPEC);
        std::fs::remove_file(folder.path().join("model/model.safetensors")).unwrap();
        let failure = load(&folder).unwrap_err();
        assert_eq!(failure.exit_code(), 2);
        let text = failure.to_string();
        assert!(
            text.contains("has 1 problem:\n  start.checkpoint names ") && text.contains("safetensors"),
            "{text}"
        );
    }
}
