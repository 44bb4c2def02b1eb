use consort_common::{model::Manifest, spec::RunSpec};
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::config::{Config, Limits};

const SPEC: &str = "name = \"pilot\"\nrounds = 2\n[model]\narchitecture = \"llama\"\nhidden_size = 16\n\
    intermediate_size = 16\nnum_hidden_layers = 1\nnum_attention_heads = 2\n[wire]\nchunk_parameters = 1024\n\
    [start]\ncheckpoint = \"model\"\n";

struct World {
    folder: TempDir,
    driver: Arc<Driver>,
}

async fn open(folder: &TempDir) -> Arc<Driver> {
    let limits = Limits { disk_reserve_bytes: 0, ..Limits::default() };
    let config = Config { state_directory: folder.path().to_owned(), limits, ..Config::default() };
    Driver::open(&config, "test", CancellationToken::new()).await.unwrap()
}

async fn world() -> World {
    let folder = tempfile::tempdir().unwrap();
    let driver = open(&folder).await;
    World { folder, driver }
}

fn manifest() -> Manifest {
    RunSpec::parse(SPEC).unwrap().model.manifest()
}

/// Another model than the run's seed gives.
fn model() -> Vec<f32> {
    manifest().initialise(99)
}

fn digest_of(values: &[f32]) -> Digest {
    Digest::of(bytemuck::cast_slice(values))
}

fn pilot() -> RunName {
    "pilot".parse().unwrap()
}

impl World {
    /// As after a crash.
    async fn restarted(self) -> Self {
        let Self { folder, driver } = self;
        driver.close().await;
        drop(driver);
        let driver = open(&folder).await;
        Self { folder, driver }
    }

    /// Sends those of the model's chunks that are `wanted`, under its digest.
    async fn send(&self, values: &[f32], digest: Digest, wanted: impl Fn(u32) -> bool) {
        let upload = self.driver.begin_start(SPEC, digest).await.unwrap();
        for index in (0..upload.plan.chunks()).filter(|index| wanted(*index)) {
            let range = upload.plan.range(index).unwrap();
            let payload: &[u8] = bytemuck::cast_slice(&values[range.start as usize..range.end as usize]);
            upload.model.write(index, payload, Digest::of(payload)).unwrap();
        }
        self.driver.sync_start(&upload).await.unwrap();
    }

    async fn create(&self, spec: &str, digest: Option<Digest>) -> Result<RunName, DriverError> {
        let start = digest.map(|digest| StartOrigin { name: "gpt2-small".to_owned(), digest });
        self.driver.create_run(spec.to_owned(), Vec::new(), start).await
    }

    /// Version 0 of the run.
    async fn version(&self) -> ModelVersion {
        let layout = self.driver.core().await.run(&pilot()).unwrap().material.layout();
        self.driver.models.open(&pilot(), 0, layout).unwrap()
    }

    fn spooled(&self) -> bool {
        self.folder.path().join("spool/pilot/0").exists()
    }
}

#[tokio::test]
async fn a_run_starts_from_the_model_that_was_sent() {
    let world = world().await;
    let digest = digest_of(&model());
    world.send(&model(), digest, |_| true).await;
    assert!(world.spooled());
    world.create(SPEC, Some(digest)).await.unwrap();
    assert_eq!(world.version().await.digest(), digest);
    let row = world.driver.store().run(&pilot()).await.unwrap().unwrap();
    assert_eq!(row.start, Some(StartOrigin { name: "gpt2-small".to_owned(), digest }));
    assert_eq!(row.version_digest, digest);
    assert!(!world.spooled());
    // And is what it was after a restart.
    let world = world.restarted().await;
    assert_eq!(world.version().await.digest(), digest);
    assert!(matches!(world.driver.begin_start(SPEC, digest).await, Err(DriverError::RunExists(_))));
}

#[tokio::test]
async fn an_upload_goes_on_after_a_restart() {
    let world = world().await;
    let digest = digest_of(&model());
    world.send(&model(), digest, |index| index % 2 == 0).await;
    let error = world.create(SPEC, Some(digest)).await.unwrap_err();
    assert!(matches!(error, DriverError::StartIncomplete { held: 3, chunks: 6, .. }), "{error}");
    let world = world.restarted().await;
    let upload = world.driver.begin_start(SPEC, digest).await.unwrap();
    assert_eq!(upload.model.held(), [0, 2, 4]);
    world.send(&model(), digest, |index| index % 2 == 1).await;
    world.create(SPEC, Some(digest)).await.unwrap();
    assert_eq!(world.version().await.digest(), digest);
}

#[tokio::test]
async fn without_the_model_there_is_no_run() {
    let world = world().await;
    let digest = digest_of(&model());
    let error = world.create(SPEC, Some(digest)).await.unwrap_err();
    assert!(matches!(error, DriverError::StartIncomplete { held: 0, chunks: 6, .. }), "{error}");
    let error = world.create(SPEC, None).await.unwrap_err().to_string();
    assert!(error.contains("start.checkpoint = \"model\" was not sent"), "{error}");
    let plain = SPEC.replace("[start]\ncheckpoint = \"model\"", "");
    let error = world.create(&plain, Some(digest)).await.unwrap_err().to_string();
    assert!(error.contains("has no [start]"), "{error}");
    let error = world.driver.begin_start(&plain, digest).await.unwrap_err().to_string();
    assert!(error.contains("has no [start]"), "{error}");
    assert!(world.driver.core().await.runs.is_empty());
    assert!(!world.folder.path().join("models/pilot").exists());
    // What was refused is in nobody's way.
    world.create(&plain, None).await.unwrap();
}

#[tokio::test]
async fn another_model_than_was_announced_is_refused_and_can_be_sent_again() {
    let world = world().await;
    let digest = digest_of(&model());
    let mut other = model();
    other[0] += 1.0;
    world.send(&other, digest, |_| true).await;
    let error = world.create(SPEC, Some(digest)).await.unwrap_err();
    assert!(matches!(error, DriverError::OtherStart { .. }), "{error}");
    assert!(!world.spooled());
    world.send(&model(), digest, |_| true).await;
    world.create(SPEC, Some(digest)).await.unwrap();
    assert_eq!(world.version().await.digest(), digest);
}

#[tokio::test]
async fn another_model_for_the_same_run_takes_the_place_of_the_first() {
    let world = world().await;
    let (first, second) = (model(), manifest().initialise(5));
    world.send(&first, digest_of(&first), |_| true).await;
    world.send(&second, digest_of(&second), |_| true).await;
    let error = world.create(SPEC, Some(digest_of(&first))).await.unwrap_err();
    assert!(matches!(error, DriverError::StartIncomplete { held: 0, .. }), "{error}");
    world.create(SPEC, Some(digest_of(&second))).await.unwrap();
    assert_eq!(world.version().await.digest(), digest_of(&second));
}

#[tokio::test]
async fn a_model_that_is_sent_rounded_starts_rounded_and_is_recorded_as_it_came() {
    let world = world().await;
    let digest = digest_of(&model());
    let spec = SPEC.replace("[wire]", "[wire]\nmodel_encoding = \"bf16\"");
    world.send(&model(), digest, |_| true).await;
    world.create(&spec, Some(digest)).await.unwrap();
    let version = world.version().await;
    let mut values = vec![0.0; 1024];
    version.read_parameters(1, &mut values).unwrap();
    let mut residual = vec![0.0; 1024];
    version.read_residual(1, &mut residual).unwrap();
    for ((value, residual), sent) in values.iter().zip(&residual).zip(&model()[1024..]) {
        assert_eq!(value.to_bits() & 0xFFFF, 0, "bf16");
        assert!((value + residual).to_bits() == sent.to_bits());
    }
    assert_ne!(version.digest(), digest);
    let row = world.driver.store().run(&pilot()).await.unwrap().unwrap();
    assert_eq!(row.start.unwrap().digest, digest);
}

#[tokio::test]
async fn a_model_that_no_run_is_made_of_is_deleted_in_time() {
    let world = world().await;
    let digest = digest_of(&model());
    world.send(&model(), digest, |_| true).await;
    let now = unix_ms_now();
    world.driver.discard_starts_before(now - KEPT_MS).await.unwrap();
    assert!(world.spooled(), "it is fresh");
    // Its creation came as far as a version 0, and no further.
    let material = RunMaterial::new(SPEC.to_owned(), Digest::of(b"")).unwrap();
    create_version(&world.driver.spool, &world.driver.models, &material, digest).unwrap();
    world.driver.discard_starts_before(now + 60_000).await.unwrap();
    assert!(!world.spooled());
    assert_eq!(world.driver.models.versions(&pilot()).unwrap(), [] as [u32; 0]);
    let error = world.create(SPEC, Some(digest)).await.unwrap_err();
    assert!(matches!(error, DriverError::StartIncomplete { held: 0, .. }), "{error}");
}

#[tokio::test]
async fn a_model_that_cannot_be_deleted_keeps_none_of_the_others() {
    let world = world().await;
    let names = ["first", "second", "third"];
    let spooled = |name: &str| world.folder.path().join("spool").join(name).join("0");
    for name in names {
        world.driver.store.touch_start_upload(&name.parse().unwrap(), 0).await.unwrap();
        std::fs::create_dir_all(spooled(name)).unwrap();
    }
    // No folder, so that it cannot be removed as one.
    std::fs::remove_dir(spooled("second")).unwrap();
    std::fs::write(spooled("second"), "").unwrap();
    world.driver.discard_starts_before(unix_ms_now()).await.unwrap();
    assert_eq!(names.map(|name| spooled(name).exists()), [false, true, false]);
    let left = world.driver.store.spent_start_uploads(unix_ms_now()).await.unwrap();
    assert_eq!(left, ["second".parse::<RunName>().unwrap()]);
}

#[tokio::test]
async fn what_a_crash_left_in_the_spool_of_a_run_that_exists_goes_and_the_run_stays() {
    let world = world().await;
    let digest = digest_of(&model());
    world.send(&model(), digest, |_| true).await;
    world.create(SPEC, Some(digest)).await.unwrap();
    // As if the process had been killed after the commit and before the model was deleted.
    world.driver.store.touch_start_upload(&pilot(), unix_ms_now()).await.unwrap();
    std::fs::create_dir_all(world.folder.path().join("spool/pilot/0/operator")).unwrap();
    world.driver.discard_starts_before(0).await.unwrap();
    assert!(!world.spooled());
    assert_eq!(world.version().await.digest(), digest);
    assert_eq!(world.driver.store.spent_start_uploads(u64::MAX / 2).await.unwrap(), [] as [RunName; 0]);
}

#[tokio::test]
async fn a_disk_without_room_for_the_model_is_found_before_anything_is_sent() {
    let folder = tempfile::tempdir().unwrap();
    let limits = Limits { disk_reserve_bytes: u64::MAX / 2, ..Limits::default() };
    let config = Config { state_directory: folder.path().to_owned(), limits, ..Config::default() };
    let driver = Driver::open(&config, "test", CancellationToken::new()).await.unwrap();
    let error = driver.begin_start(SPEC, digest_of(&model())).await.unwrap_err();
    assert!(error.to_string().contains("the model that run pilot starts from was not stored"), "{error}");
    let status = tonic::Status::from(error);
    assert_eq!(status.code(), tonic::Code::ResourceExhausted);
}

#[test]
fn names_of_models_are_short_and_plain() {
    for good in ["gpt2", "Llama 3.1 – 8B", &"x".repeat(200)] {
        assert_eq!(check_origin(good), Ok(()));
    }
    for bad in ["", "a\nb", "\u{1b}[2J", &"x".repeat(201)] {
        assert!(check_origin(bad).is_err(), "{bad:?}");
    }
}
