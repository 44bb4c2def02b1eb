//! Transfers against an aggregator that breaks off.

use consort_common::codec::Encoding;
use consort_proto::v1::ClientActivity;
use tonic::Code;

use super::*;
use crate::{
    fake::{Break, Fake, State},
    link::{Link, LinkKeeper, Session, link},
    progress::{Activity, Reporter},
    session::federation_client,
    state::{RunDirectory, StateDirectory},
};
use consort_common::{chunk::ChunkPlan, ids::RunName};

const PARAMETERS: usize = 1_000;
const CHUNK_PARAMETERS: u32 = 64;

struct Site {
    fake: Fake,
    directory: RunDirectory,
    link: Link,
    activity: Activity,
    _keeper: LinkKeeper,
    _folder: tempfile::TempDir,
}

fn run() -> RunName {
    "r".parse().unwrap()
}

fn plan() -> ChunkPlan {
    ChunkPlan::new(PARAMETERS as u64, CHUNK_PARAMETERS)
}

fn values(seed: f32) -> Vec<f32> {
    (0..PARAMETERS).map(|index| (index as f32).sin() * seed).collect()
}

impl Site {
    async fn with(breaks: impl Into<std::collections::VecDeque<Break>>) -> Self {
        let fake = Fake::new(State {
            model: values(1.0),
            chunk_parameters: CHUNK_PARAMETERS,
            breaks: breaks.into(),
            ..State::default()
        });
        let (link, keeper) = link();
        let client = federation_client(fake.serve().await);
        keeper.publish(Some(Session { id: vec![1], client, generation: 1 }));
        let folder = tempfile::tempdir().unwrap();
        let directory = StateDirectory::open(folder.path()).unwrap().run(&run()).unwrap();
        let activity = Reporter::default().begin(&run(), 1, ClientActivity::Downloading, 0);
        Self { fake, directory, link, activity, _keeper: keeper, _folder: folder }
    }

    async fn download(&self, version: u32) -> Result<PathBuf, TransferError> {
        let model = (&run(), version, self.fake.model_digest());
        download_model(&self.link, &self.directory, model, plan(), &self.activity).await
    }

    fn downloads(&self) -> Vec<u32> {
        self.fake.state().downloads.clone()
    }

    fn delta(&self) -> Delta {
        let values = values(0.5);
        let digest = Delta::write_values(&self.directory, 1, &values).unwrap();
        let description = DeltaDescription {
            round: 1,
            spec_digest: digest,
            manifest_digest: digest,
            base_digest: digest,
            first_step: 0,
            steps: 10,
            tokens: 100,
            train_loss: 2.5,
            train_seconds: 1.0,
            norm: 3.0,
            digest,
            encoding: Encoding::Fp32,
            encoded_bytes: encoded_bytes(&values, plan(), Encoding::Fp32),
            delta_id: draw_delta_id(),
        };
        Delta::describe(&self.directory, &description).unwrap();
        Delta::open(&self.directory, 1, plan()).unwrap()
    }

    async fn upload(&self) -> Result<UploadOutcome, TransferError> {
        upload_delta(&self.link, &run(), &self.delta(), &self.activity).await
    }

    fn check_uploaded(&self) {
        let state = self.fake.state();
        let received: Vec<u8> = state.held.values().flatten().copied().collect();
        assert_eq!(bytemuck::pod_collect_to_vec::<u8, f32>(&received), values(0.5));
        assert_eq!(state.accepted.as_ref().unwrap().steps, 10);
    }
}

fn broken(after: u32) -> Break {
    Break::After(after, Status::unavailable("broken off by the test"))
}

#[tokio::test(start_paused = true)]
async fn a_download_goes_on_at_the_first_missing_chunk() {
    let site = Site::with([broken(3), broken(0), broken(5)]).await;
    let path = site.download(4).await.unwrap();
    assert_eq!(site.downloads(), [0, 3, 3, 8]);
    assert_eq!(std::fs::read(path).unwrap(), bytemuck::cast_slice::<f32, u8>(&values(1.0)));
    assert!(!site.directory.model_part(4).exists());
}

#[tokio::test(start_paused = true)]
async fn a_download_goes_on_after_a_kill_in_the_middle_of_a_chunk() {
    let site = Site::with([]).await;
    let model = values(1.0);
    let bytes: &[u8] = bytemuck::cast_slice(&model);
    std::fs::write(site.directory.model_part(4), &bytes[..2 * 256 + 100]).unwrap();
    site.download(4).await.unwrap();
    assert_eq!(site.downloads(), [2]);
    site.download(4).await.unwrap();
    assert_eq!(site.downloads(), [2], "a model that is there is not fetched again");
}

#[tokio::test(start_paused = true)]
async fn a_damaged_chunk_is_fetched_again() {
    let site = Site::with([Break::Damage(2)]).await;
    site.download(4).await.unwrap();
    assert_eq!(site.downloads(), [0, 2]);
}

#[tokio::test(start_paused = true)]
async fn what_was_damaged_on_disk_is_noticed_at_the_end_and_fetched_anew() {
    let site = Site::with([]).await;
    std::fs::write(site.directory.model_part(4), [7; 512]).unwrap();
    site.download(4).await.unwrap();
    assert_eq!(site.downloads(), [2, 0]);
    std::fs::write(site.directory.model(4), [7; 512]).unwrap();
    site.download(4).await.unwrap();
    assert_eq!(site.downloads(), [2, 0, 0]);
}

#[tokio::test(start_paused = true)]
async fn another_model_than_the_instructed_one_is_refused_before_it_is_downloaded() {
    let site = Site::with([]).await;
    let model = (&run(), 4, Digest::of(b"other"));
    let result = download_model(&site.link, &site.directory, model, plan(), &site.activity).await;
    assert!(matches!(result, Err(TransferError::OtherModel(_))));
    assert!(!site.directory.model(4).exists());
}

#[tokio::test(start_paused = true)]
async fn an_upload_sends_only_what_is_missing_after_a_break() {
    let site = Site::with([broken(5), broken(0), broken(7)]).await;
    assert_eq!(site.upload().await.unwrap(), UploadOutcome::Accepted);
    site.check_uploaded();
    let uploads = site.fake.state().uploads.clone();
    assert_eq!(uploads, [(0..5).collect(), vec![], (5..12).collect::<Vec<_>>(), (12..16).collect()]);
}

#[tokio::test(start_paused = true)]
async fn a_delta_that_was_accepted_before_is_not_sent_again() {
    let site = Site::with([]).await;
    site.upload().await.unwrap();
    assert_eq!(site.upload().await.unwrap(), UploadOutcome::Duplicate);
    assert_eq!(site.fake.state().uploads.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_ends_the_upload_with_its_status() {
    for (code, too_late) in [(Code::FailedPrecondition, true), (Code::InvalidArgument, false)] {
        let site = Site::with([Break::After(2, Status::new(code, "no"))]).await;
        let error = site.upload().await.unwrap_err();
        assert_eq!(is_too_late(&error), too_late, "{error}");
        assert_eq!(site.fake.state().uploads.len(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_delta_whose_values_were_damaged_is_not_there() {
    let site = Site::with([]).await;
    site.delta();
    let mut bytes = std::fs::read(site.directory.delta(1)).unwrap();
    bytes[9] ^= 1;
    std::fs::write(site.directory.delta(1), bytes).unwrap();
    assert!(Delta::open(&site.directory, 1, plan()).is_none());
}

#[test]
fn what_is_missing_is_what_is_not_held() {
    for (held, expected) in
        [(vec![], vec![0, 1, 2, 3]), (vec![0, 2], vec![1, 3]), (vec![3, 1, 0, 2, 9], vec![])]
    {
        assert_eq!(upload::missing(4, &held), expected);
    }
}
