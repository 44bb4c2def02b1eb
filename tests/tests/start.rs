//! A run starts from a checkpoint: an earlier run's, bit for bit, or any other; whatever breaks on the way, it
//! starts from the whole of it or not at all.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use consort_common::{
    checkpoint,
    ids::Digest,
    model::Architecture,
    spec::RunSpec,
    tokenizer::{BYTE_END_OF_TEXT, BYTE_END_OF_TEXT_ID, byte_tokenizer_json},
};
use consort_proto::v1::{
    CreateRunRequest, ModelChunk, StartBegin, StartModel, UploadStartRequest, UploadStartResponse,
    create_run_request, operator_client::OperatorClient, upload_start_request::Part,
};
use consort_tests::{
    TestFederation, binaries,
    federation::tiny_spec,
    phases::chunks_held_in,
    proxy::{Direction, Proxy},
    raw::{RawOperator, assert_refused, channel, soon},
};
use serde_json::Value;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

/// The tiny run's specification without what the checkpoint says.
fn spec_from(checkpoint: &Path, name: &str, rounds: u32) -> String {
    let spec = tiny_spec(name, rounds, 1);
    let (head, rest) = spec.split_once("[model]").expect("a model");
    let (_, tail) = rest.split_once("[training]").expect("a section after it");
    format!("{head}[start]\ncheckpoint = {:?}\n\n[training]{tail}", checkpoint.display().to_string())
}

/// Writes a checkpoint of `spec`'s model with weights of another seed, and gives these.
fn write_checkpoint(directory: &Path, architecture: &Architecture) -> Vec<f32> {
    let flat = architecture.manifest().initialise(1234);
    checkpoint::write(
        directory,
        architecture,
        &flat,
        &byte_tokenizer_json(),
        BYTE_END_OF_TEXT,
        BYTE_END_OF_TEXT_ID,
        &BTreeMap::new(),
    )
    .expect("a checkpoint can be written");
    flat
}

fn digest_of(flat: &[f32]) -> Digest {
    Digest::of(bytemuck::cast_slice(flat))
}

/// The losses of a version by site, as they are shown.
fn evaluations(federation: &TestFederation, run: &str, version: u64) -> Value {
    let output = federation.consort(&["runs", "watch", run, "--once", "--json"]);
    let snapshot: Value = serde_json::from_slice(&output.stdout).expect("--json prints JSON");
    let versions = snapshot["evaluations"].as_array().expect("a list").clone();
    versions.into_iter().find(|one| one["version"] == version).expect("the version was measured")
}

#[test]
fn a_run_goes_on_from_what_another_has_learnt() {
    let mut federation = TestFederation::new(&["bank"]);
    federation.start_aggregator();
    federation.start_run(&tiny_spec("first", 2, 1));
    federation.start_client("bank");
    let finished = |federation: &TestFederation, run: &str| {
        federation
            .wait_for_run(run, "the run to finish", |run| (run["status"] == "finished").then(|| run.clone()))
    };
    let first = finished(&federation, "first");
    assert_eq!(first["start"], Value::Null);
    let learnt = evaluations(&federation, "first", 2);
    assert!(federation.terminate_client("bank").success());

    let model = federation.path().join("learnt");
    federation.wait_for_run("first", "its checkpoint", |_| {
        let list = federation.json(&["checkpoints", "list", "first"]);
        list["checkpoints"].as_array()?.last().filter(|one| one["version"] == 2).map(|_| ())
    });
    federation.json(&["checkpoints", "get", "first", "--out", model.to_str().expect("a path is text")]);
    // Another learning rate, another number of rounds: the phases are its own.
    let spec = spec_from(Path::new("learnt"), "second", 1).replace("local_steps = 8", "local_steps = 4");
    federation.start_run(&spec);

    let second = federation.json(&["runs", "show", "second"]);
    assert_eq!((&second["version"], &second["version_digest"]), (&0.into(), &first["version_digest"]));
    assert_eq!(second["start"]["digest"], first["version_digest"]);
    assert_eq!(second["start"]["origin"], "version 2 of run first");
    let shown = federation.consort(&["runs", "show", "second"]);
    let shown = String::from_utf8_lossy(&shown.stdout);
    assert!(shown.contains("starts from") && shown.contains("version 2 of run first"), "{shown}");
    // Sites read the model from the specification as it was stored.
    let stored = RunSpec::parse(second["spec_toml"].as_str().expect("a text")).expect("a valid one");
    assert_eq!(stored.model, RunSpec::parse(&tiny_spec("first", 2, 1)).expect("a valid one").model);

    federation.start_client("bank");
    let second = finished(&federation, "second");
    assert_ne!(second["version_digest"], first["version_digest"]);
    // The site measures the same model on the same text.
    assert_eq!(evaluations(&federation, "second", 0)["loss"], learnt["loss"]);
}

/// 4.9 million parameters in 297 chunks: 19 MB.
fn large_architecture() -> Architecture {
    let spec = tiny_spec("large", 1, 1)
        .replace("hidden_size = 32", "hidden_size = 512")
        .replace("intermediate_size = 64", "intermediate_size = 1024");
    RunSpec::parse(&spec).expect("a valid one").model
}

/// The CLI by another way to the aggregator.
fn consort_through(federation: &TestFederation, endpoint: &str, arguments: &[&str]) -> Output {
    let kit = federation.kit("operator-alice");
    let config = fs::read_to_string(kit.join("operator.toml")).expect("the kit has a configuration");
    let config = config.replace(federation.endpoint(), endpoint);
    fs::write(kit.join("through.toml"), config).expect("the configuration can be written");
    Command::new(binaries::consort())
        .arg("--config")
        .arg(kit.join("through.toml"))
        .args(arguments)
        .output()
        .expect("consort can be run")
}

/// A federation with a large checkpoint and the specification of a run that starts from it.
struct Scene {
    federation: TestFederation,
    spec: PathBuf,
    flat: Vec<f32>,
}

impl Scene {
    fn new() -> Self {
        let mut federation = TestFederation::new(&["bank"]);
        federation.start_aggregator();
        let flat = write_checkpoint(&federation.path().join("other-model"), &large_architecture());
        let spec = federation.path().join("run.toml");
        let text = spec_from(Path::new("other-model"), "pilot", 2);
        fs::write(&spec, text.replace("chunk_parameters = 4096", "chunk_parameters = 16384"))
            .expect("the specification can be written");
        Self { federation, spec, flat }
    }

    fn spec_path(&self) -> &str {
        self.spec.to_str().expect("a path is text")
    }

    /// The specification as the CLI sends it.
    fn completed(&self) -> String {
        let text = fs::read_to_string(&self.spec).expect("the specification can be read");
        let model = toml::Table::try_from(large_architecture()).expect("a model is a table");
        format!("{text}\n{}", toml::Table::from_iter([("model".to_owned(), model.into())]))
    }

    fn chunk(&self, index: u32) -> ModelChunk {
        let plan = RunSpec::parse(&self.completed()).expect("a valid one").chunk_plan();
        let range = plan.range(index).expect("there is such a chunk");
        let values = &self.flat[range.start as usize..range.end as usize];
        let payload: &[u8] = bytemuck::cast_slice(values);
        ModelChunk { index, digest: Digest::of(payload).to_vec(), payload: payload.to_vec().into() }
    }
}

/// An upload that a test makes message by message.
struct RawUpload {
    requests: mpsc::Sender<UploadStartRequest>,
    answers: Streaming<UploadStartResponse>,
}

impl RawUpload {
    async fn begin(operator: &mut RawOperator, part: Part) -> Result<Self, Status> {
        let (requests, messages) = mpsc::channel(4);
        requests.send(UploadStartRequest { part: Some(part) }).await.expect("there is room");
        let call = operator.client.upload_start(ReceiverStream::new(messages));
        Ok(Self { requests, answers: soon("a call", call).await?.into_inner() })
    }

    async fn held(&mut self) -> Result<Vec<u32>, Status> {
        Ok(soon("the answer", self.answers.message()).await?.expect("an answer comes first").held)
    }

    async fn send(&self, chunk: ModelChunk) {
        // What is no longer wanted is lost, and the answer says why.
        let _ = soon("room", self.requests.send(UploadStartRequest { part: Some(Part::Chunk(chunk)) })).await;
    }

    /// Ends the call and waits until all that was sent is durable, or refused.
    async fn end(self) -> Result<(), Status> {
        let Self { requests, mut answers } = self;
        drop(requests);
        let end = soon("the end", answers.message()).await?;
        assert_eq!(end, None, "one answer");
        Ok(())
    }
}

fn begin(scene: &Scene) -> StartBegin {
    StartBegin { specification: scene.completed(), model_digest: digest_of(&scene.flat).to_vec() }
}

#[tokio::test]
async fn an_upload_that_was_killed_and_cut_goes_on_to_the_same_bits() {
    let mut scene = Scene::new();
    let chunks = RunSpec::parse(&scene.completed()).expect("a valid one").chunk_plan().chunks();
    let mut operator = RawOperator::new(&scene.federation);
    let mut upload = RawUpload::begin(&mut operator, Part::Begin(begin(&scene))).await.expect("it begins");
    assert_eq!(upload.held().await.expect("an answer"), [] as [u32; 0]);
    // Half of the chunks, and the call stays open: the aggregator is killed in its middle.
    for index in 0..chunks / 2 {
        upload.send(scene.chunk(index)).await;
    }
    let spooled = scene.federation.aggregator_state().join("spool/pilot/0/operator");
    let some = async {
        while chunks_held_in(&spooled, chunks as usize) < chunks as usize / 4 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    soon("a quarter of the chunks", some).await;
    scene.federation.kill_aggregator();
    drop(upload);
    scene.federation.start_aggregator();
    let mut operator = RawOperator::new(&scene.federation);
    let mut upload = RawUpload::begin(&mut operator, Part::Begin(begin(&scene))).await.expect("it begins");
    let held = upload.held().await.expect("an answer");
    // What was written is held; what was in the sockets is lost.
    assert!(held.len() as u32 >= chunks / 4 && held.len() as u32 <= chunks / 2, "{} of {chunks}", held.len());
    upload.end().await.expect("what is held is durable");
    let shown = scene.federation.consort(&["runs", "show", "pilot"]);
    assert_eq!(shown.status.code(), Some(4), "there is no run before its model is whole");

    // The tool goes on, is cut, and goes on again.
    let proxy = Proxy::start(scene.federation.endpoint());
    let model_bytes = 4 * scene.flat.len() as u64;
    proxy.cut_at(Direction::Up, vec![model_bytes / 4]);
    let cut = consort_through(&scene.federation, proxy.endpoint(), &["runs", "create", scene.spec_path()]);
    assert_eq!(cut.status.code(), Some(3), "{}", String::from_utf8_lossy(&cut.stderr));
    let passed = proxy.passed().up;
    let whole = consort_through(&scene.federation, proxy.endpoint(), &["runs", "create", scene.spec_path()]);
    assert_eq!(whole.status.code(), Some(0), "{}", String::from_utf8_lossy(&whole.stderr));
    let sent = proxy.passed().up - passed;
    assert!(sent < model_bytes * 4 / 5, "what was held was sent again: {sent} of {model_bytes}");

    scene.federation.kill_aggregator();
    scene.federation.start_aggregator();
    let run = scene.federation.json(&["runs", "show", "pilot"]);
    let digest = digest_of(&scene.flat).to_string();
    assert_eq!((&run["version_digest"], &run["start"]["digest"]), (&digest.clone().into(), &digest.into()));
    assert_eq!(run["start"]["origin"], "other-model");
    assert_eq!(run["status"], "created");
    scene.federation.json(&["runs", "start", "pilot"]);
    // Nothing of the upload is left but the run.
    assert!(!scene.federation.aggregator_state().join("spool/pilot/0").exists());
}

#[tokio::test]
async fn a_start_that_is_wrong_is_refused_with_what_is_wrong() {
    let scene = Scene::new();
    let mut operator = RawOperator::new(&scene.federation);
    let refuse = Code::InvalidArgument;
    let plain = tiny_spec("pilot", 1, 1);
    for (part, words) in [
        (Part::Chunk(scene.chunk(0)), &["begin"][..]),
        (
            Part::Begin(StartBegin { model_digest: vec![1; 31], ..begin(&scene) }),
            &["model_digest", "32 bytes"],
        ),
        (Part::Begin(StartBegin { specification: plain, ..begin(&scene) }), &["no [start]"]),
        (Part::Begin(StartBegin { specification: "x".into(), ..begin(&scene) }), &["not TOML"]),
        (
            Part::Begin(StartBegin { specification: " ".repeat((1 << 20) + 1), ..begin(&scene) }),
            &["longer than 1048576 bytes"],
        ),
    ] {
        let mut upload = RawUpload::begin(&mut operator, part).await.expect("a call begins");
        assert_refused(upload.held().await, refuse, words);
    }
    assert!(scene.federation.stored().is_empty());

    let good = || scene.chunk(1);
    let mut not_finite = good();
    let mut payload = not_finite.payload.to_vec();
    payload[8..12].copy_from_slice(&f32::NAN.to_le_bytes());
    not_finite.digest = Digest::of(&payload).to_vec();
    not_finite.payload = payload.into();
    for (chunk, words) in [
        (ModelChunk { index: 297, ..good() }, &["chunk 297 does not exist"][..]),
        (ModelChunk { index: u32::MAX, ..good() }, &["does not exist"]),
        (ModelChunk { payload: good().payload.slice(4..), ..good() }, &["chunk 1", "65532 bytes", "65536"]),
        (ModelChunk { payload: Default::default(), ..good() }, &["0 bytes"]),
        (ModelChunk { digest: vec![0; 32], ..good() }, &["chunk 1", "digest"]),
        (ModelChunk { digest: vec![], ..good() }, &["32 bytes"]),
        (not_finite, &["chunk 1", "finite"]),
    ] {
        let mut upload =
            RawUpload::begin(&mut operator, Part::Begin(begin(&scene))).await.expect("a call begins");
        assert_eq!(upload.held().await.expect("an answer"), [] as [u32; 0]);
        upload.send(chunk).await;
        assert_refused(upload.end().await, refuse, words);
    }
    let mut create = async |start: Option<StartModel>, spec: String| {
        let parts = std::iter::once(create_run_request::Part::Specification(spec))
            .chain(start.map(create_run_request::Part::Start));
        let messages: Vec<_> = parts.map(|part| CreateRunRequest { part: Some(part) }).collect();
        soon("an answer", operator.client.create_run(tokio_stream::iter(messages))).await
    };
    let start = |origin: &str| {
        Some(StartModel { digest: digest_of(&scene.flat).to_vec(), origin: origin.to_owned() })
    };
    assert_refused(create(None, scene.completed()).await, refuse, &["other-model", "not sent"]);
    assert_refused(create(start("\u{1b}[2J"), scene.completed()).await, refuse, &["control character"]);
    assert_refused(create(start("x"), tiny_spec("pilot", 1, 1)).await, refuse, &["no [start]"]);
    let missing = create(start("other-model"), scene.completed()).await;
    assert_refused(missing, Code::FailedPrecondition, &["0 of 297 chunks", "again"]);
    assert_eq!(scene.federation.json(&["runs", "list"])["runs"], Value::Array(Vec::new()));
}

#[tokio::test]
async fn a_site_cannot_say_what_a_run_starts_from() {
    let scene = Scene::new();
    let channel = channel(&scene.federation, &scene.federation.kit("site-bank"));
    let mut operator = RawOperator { client: OperatorClient::new(channel) };
    let refused = RawUpload::begin(&mut operator, Part::Begin(begin(&scene))).await;
    assert_refused(refused.map(|_| ()), Code::PermissionDenied, &["operator"]);
    assert!(scene.federation.stored().is_empty());
}

#[test]
fn a_checkpoint_that_does_not_fit_the_specification_is_refused_before_anything_is_sent() {
    let scene = Scene::new();
    let text = fs::read_to_string(&scene.spec).expect("the specification can be read");
    let other = text.clone() + "\n[model]\narchitecture = \"llama\"\nhidden_size = 64\n";
    let weights = scene.federation.path().join("other-model/model.safetensors");
    let mut damaged = fs::read(&weights).expect("the checkpoint can be read");
    for (spec, words) in [
        (other, "model.hidden_size is 64; the checkpoint's is 512"),
        (text.replace("other-model", "nowhere"), "start.checkpoint names"),
    ] {
        fs::write(&scene.spec, spec).expect("the specification can be written");
        let output = scene.federation.consort(&["runs", "create", scene.spec_path()]);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{errors}");
        assert!(errors.contains(words), "{words:?} is not in {errors:?}");
    }
    // A value that is no number is found when the weights are read.
    let end = damaged.len();
    damaged[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&weights, damaged).expect("the checkpoint can be written");
    fs::write(&scene.spec, text).expect("the specification can be written");
    let output = scene.federation.consort(&["runs", "create", scene.spec_path()]);
    assert!(!output.status.success());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains("NaN"), "{errors}");
    assert!(scene.federation.stored().is_empty());
}
