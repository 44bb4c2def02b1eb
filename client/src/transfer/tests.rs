//! Transfers against an aggregator that breaks off.

use consort_common::{chunk::ChunkPlan, codec::Encoding, fragment::Fragment, ids::RunName};
use consort_proto::v1::ClientActivity;
use tokio::time::Instant;
use tonic::Code;

use super::*;
use crate::{
    fake::{Break, Fake, State, Update},
    link::{LinkKeeper, RoundTrip, link},
    progress::{Activity, Reporter},
    state::{RunDirectory, StateDirectory},
};

const PARAMETERS: usize = 1_000;
const CHUNK_PARAMETERS: u32 = 64;
/// Of fp32: 15 chunks of it, and one of 160.
const CHUNK_BYTES: u64 = 256;
/// A round trip that holds next to nothing.
const NEAR: Duration = Duration::from_micros(100);

struct Site {
    fake: Fake,
    directory: RunDirectory,
    transfers: Transfers,
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

fn offering(breaks: impl Into<std::collections::VecDeque<Break>>) -> State {
    State {
        model: values(1.0),
        chunk_parameters: CHUNK_PARAMETERS,
        breaks: breaks.into(),
        ..State::default()
    }
}

impl Site {
    fn with(breaks: impl Into<std::collections::VecDeque<Break>>) -> Self {
        let unlimited = Transfer { connections: 1, upload_bytes_per_second: 0, download_bytes_per_second: 0 };
        Self::new(offering(breaks), &unlimited)
    }

    fn connected(breaks: impl Into<std::collections::VecDeque<Break>>, connections: u32) -> Self {
        let unlimited = Transfer { connections, upload_bytes_per_second: 0, download_bytes_per_second: 0 };
        Self::new(offering(breaks), &unlimited)
    }

    fn new(state: State, config: &Transfer) -> Self {
        let fake = Fake::new(state);
        let (link, keeper) = link();
        let client = federation_client(fake.serve());
        keeper.publish(Some(Session {
            id: vec![1],
            client,
            generation: 1,
            round_trip: RoundTrip::default(),
        }));
        let folder = tempfile::tempdir().unwrap();
        let directory = StateDirectory::open(folder.path()).unwrap().run(&run()).unwrap();
        let activity = Reporter::default().begin(&run(), 1, ClientActivity::Downloading, 0);
        let further = fake.clone();
        let transfers = Transfers::new(link, config, move || further.serve());
        Self { fake, directory, transfers, activity, _keeper: keeper, _folder: folder }
    }

    async fn download(&self, version: u32) -> Result<PathBuf, TransferError> {
        let model = (&run(), version, self.fake.model_digest());
        self.transfers.download_model(&self.directory, model, Fragment::whole(plan()), &self.activity).await
    }

    /// First chunk, stride and version held of each download.
    fn downloads(&self) -> Vec<(u32, u32, Option<u32>)> {
        let state = self.fake.state();
        let asked = state.downloads.iter();
        asked.map(|download| (download.first_chunk, download.stride, download.held_version)).collect()
    }

    fn first_chunks(&self) -> Vec<u32> {
        self.downloads().into_iter().map(|(first, ..)| first).collect()
    }

    /// Puts version 3 there, and has the aggregator offer version 4 as an update of it; its values, as a site
    /// has to find them.
    fn hold_version_3(&self, encoding: Encoding, change: f32) -> Vec<f32> {
        let base = values(1.0);
        std::fs::write(self.directory.model(3), bytemuck::cast_slice::<f32, u8>(&base)).unwrap();
        let update = values(change);
        let mut model = Vec::new();
        for (base, update) in base.chunks(64).zip(update.chunks(64)) {
            let mut decoded = vec![0.0; update.len()];
            encoding.codec().decode(&encoding.encode(update), &mut decoded).unwrap();
            model.extend(base.iter().zip(decoded).map(|(base, update)| base + update));
        }
        let mut state = self.fake.state();
        state.model = model.clone();
        state.update = Some(Update { base_version: 3, encoding, values: update });
        model
    }

    fn delta(&self) -> Delta {
        let mut values = values(0.5);
        let encoded_digest =
            Delta::write(&self.directory, 1, Fragment::whole(plan()), Encoding::Fp32, &mut values).unwrap();
        let description = DeltaDescription {
            round: 1,
            spec_digest: encoded_digest,
            manifest_digest: encoded_digest,
            base_digest: encoded_digest,
            first_step: 0,
            steps: 10,
            tokens: 100,
            train_loss: 2.5,
            train_seconds: 1.0,
            norm: 3.0,
            encoded_digest,
            encoding: Encoding::Fp32,
            delta_id: draw_delta_id(),
        };
        Delta::describe(&self.directory, plan(), description).unwrap();
        Delta::open(&self.directory, 1, plan()).unwrap()
    }

    async fn upload(&self) -> Result<UploadOutcome, TransferError> {
        self.transfers.upload_delta(&run(), &self.delta(), &self.activity).await
    }

    /// The chunks that each upload brought.
    fn uploads(&self) -> Vec<Vec<u32>> {
        self.fake.state().uploads.iter().map(|upload| upload.chunks.clone()).collect()
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
    let site = Site::with([broken(3), broken(0), broken(5)]);
    let path = site.download(4).await.unwrap();
    assert_eq!(site.first_chunks(), [0, 3, 3, 8]);
    assert_eq!(std::fs::read(path).unwrap(), bytemuck::cast_slice::<f32, u8>(&values(1.0)));
    assert!(!site.directory.model_part(4).exists());
}

#[tokio::test(start_paused = true)]
async fn a_download_goes_on_after_a_kill_in_the_middle_of_a_chunk() {
    let site = Site::with([]);
    let model = values(1.0);
    let bytes: &[u8] = bytemuck::cast_slice(&model);
    std::fs::write(site.directory.model_part(4), &bytes[..2 * 256 + 100]).unwrap();
    site.download(4).await.unwrap();
    assert_eq!(site.first_chunks(), [2]);
    site.download(4).await.unwrap();
    assert_eq!(site.first_chunks(), [2], "a model that is there is not fetched again");
}

#[tokio::test(start_paused = true)]
async fn a_damaged_chunk_is_fetched_again() {
    let site = Site::with([Break::Damage(2)]);
    site.download(4).await.unwrap();
    assert_eq!(site.first_chunks(), [0, 2]);
}

#[tokio::test(start_paused = true)]
async fn what_was_damaged_on_disk_is_noticed_at_the_end_and_fetched_anew() {
    let site = Site::with([]);
    std::fs::write(site.directory.model_part(4), [7; 512]).unwrap();
    site.download(4).await.unwrap();
    assert_eq!(site.first_chunks(), [2, 0]);
    std::fs::write(site.directory.model(4), [7; 512]).unwrap();
    site.download(4).await.unwrap();
    assert_eq!(site.first_chunks(), [2, 0, 0]);
}

#[tokio::test(start_paused = true)]
async fn another_model_than_the_instructed_one_is_refused_before_it_is_downloaded() {
    let site = Site::with([]);
    let model = (&run(), 4, Digest::of(b"other"));
    let whole = Fragment::whole(plan());
    let result = site.transfers.download_model(&site.directory, model, whole, &site.activity).await;
    assert!(matches!(result, Err(TransferError::OtherModel(_))));
    assert!(!site.directory.model(4).exists());
}

#[tokio::test(start_paused = true)]
async fn an_upload_sends_only_what_is_missing_after_a_break() {
    let site = Site::with([broken(5), broken(0), broken(7)]);
    assert_eq!(site.upload().await.unwrap(), UploadOutcome::Accepted);
    site.check_uploaded();
    assert_eq!(site.uploads(), [(0..5).collect(), vec![], (5..12).collect::<Vec<_>>(), (12..16).collect()]);
}

#[tokio::test(start_paused = true)]
async fn a_delta_that_was_accepted_before_is_not_sent_again() {
    let site = Site::with([]);
    site.upload().await.unwrap();
    assert_eq!(site.upload().await.unwrap(), UploadOutcome::Duplicate);
    assert_eq!(site.fake.state().uploads.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_ends_the_upload_with_its_status() {
    for (code, too_late) in [(Code::FailedPrecondition, true), (Code::InvalidArgument, false)] {
        let site = Site::with([Break::After(2, Status::new(code, "no"))]);
        let error = site.upload().await.unwrap_err();
        assert_eq!(is_too_late(&error), too_late, "{error}");
        assert_eq!(site.fake.state().uploads.len(), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn a_delta_whose_values_were_damaged_is_not_there() {
    let site = Site::with([]);
    site.delta();
    let mut bytes = std::fs::read(site.directory.delta(1)).unwrap();
    bytes[9] ^= 1;
    std::fs::write(site.directory.delta(1), bytes).unwrap();
    assert!(Delta::open(&site.directory, 1, plan()).is_none());
}

#[test]
fn what_is_missing_of_a_part_is_what_is_not_held() {
    for (part, parts, held, expected) in [
        (0, 1, vec![], vec![0, 1, 2, 3]),
        (0, 1, vec![0, 2], vec![1, 3]),
        (0, 1, vec![3, 1, 0, 2, 9], vec![]),
        (1, 3, vec![], vec![1]),
        (0, 3, vec![0], vec![3]),
        (5, 6, vec![], vec![]),
    ] {
        assert_eq!(upload::missing(4, part, parts, &held), expected);
    }
}

#[test]
fn twenty_breaks_cost_less_than_a_fiftieth_of_a_delta_of_four_thousand_chunks() {
    for chunk_bytes in [8 << 10, 1 << 20, 4 << 20] {
        let delta_bytes = 4000 * chunk_bytes;
        // One chunk may always be under way.
        let lost = (0..20)
            .map(|breaks| upload::stake_bytes(delta_bytes, chunk_bytes, NEAR, breaks).max(chunk_bytes));
        let lost: u64 = lost.sum();
        assert!(lost * 50 < delta_bytes, "{lost} of {delta_bytes} bytes");
    }
    assert_eq!(upload::stake_bytes(2560, 1, NEAR, u32::MAX), 1);
    // A line of 1 Gbit/s over 100 ms holds 12.5 MB, however small the delta's parts are.
    let far = Duration::from_millis(100);
    let first = upload::stake_bytes(500_000_000, 1 << 20, far, 0);
    assert!(first >= 12_500_000);
    assert_eq!(upload::stake_bytes(500_000_000, 1 << 20, far, 1), first / 4, "it is a quarter after a break");
    assert_eq!(upload::stake_bytes(10_000_000_000, 1 << 20, far, 0), 10_000_000_000 / 128);
}

#[tokio::test(start_paused = true)]
async fn no_more_than_the_window_is_under_way_and_one_chunk_always_may() {
    for (window_bytes, expected) in
        // The last chunk is the shorter one: the last window has no room for it either.
        [(0, 1), (CHUNK_BYTES - 1, 1), (3 * CHUNK_BYTES, 3), (5 * CHUNK_BYTES + 159, 5)]
    {
        let site = Site::with([]);
        site.fake.state().window_bytes = window_bytes;
        site.upload().await.unwrap();
        site.check_uploaded();
        assert_eq!(site.uploads(), [(0..16).collect::<Vec<_>>()]);
        let most = site.fake.state().unacknowledged_bytes_max;
        assert_eq!(most, expected * CHUNK_BYTES, "a window of {window_bytes} bytes");
    }
}

#[tokio::test(start_paused = true)]
async fn an_upload_over_three_connections_brings_each_chunk_once() {
    let site = Site::connected([], 3);
    assert_eq!(site.upload().await.unwrap(), UploadOutcome::Accepted);
    site.check_uploaded();
    let state = site.fake.state();
    let mut parts: Vec<_> = state.uploads.iter().map(|upload| (upload.part, upload.parts)).collect();
    parts.sort_unstable();
    assert_eq!(parts, [(0, 3), (1, 3), (2, 3)]);
    for upload in &state.uploads {
        assert_eq!(upload.chunks, (upload.part..16).step_by(3).collect::<Vec<_>>());
    }
    assert_eq!(state.connections, 3);
}

#[tokio::test(start_paused = true)]
async fn a_break_of_one_connection_of_an_upload_costs_what_was_not_acknowledged() {
    // The calls take their breaks in the order in which they come: the second of the first try breaks.
    let site = Site::connected([broken(99), broken(2)], 3);
    assert_eq!(site.upload().await.unwrap(), UploadOutcome::Accepted);
    site.check_uploaded();
    let mut all: Vec<u32> = site.uploads().into_iter().flatten().collect();
    all.sort_unstable();
    assert_eq!(all, (0..16).collect::<Vec<_>>(), "what had arrived was not sent again");
    assert!(site.fake.state().uploads.len() > 3, "a second try was due");
}

#[tokio::test(start_paused = true)]
async fn there_are_no_more_connections_than_chunks() {
    let mut state = offering([]);
    state.chunk_parameters = 500;
    let transfer = Transfer { connections: 16, upload_bytes_per_second: 0, download_bytes_per_second: 0 };
    let site = Site::new(state, &transfer);
    let model = (&run(), 4, site.fake.model_digest());
    let whole = Fragment::whole(ChunkPlan::new(PARAMETERS as u64, 500));
    site.transfers.download_model(&site.directory, model, whole, &site.activity).await.unwrap();
    let mut downloads = site.downloads();
    downloads.sort_unstable();
    assert_eq!(downloads, [(0, 2, None), (1, 2, None)]);
}

#[tokio::test(start_paused = true)]
async fn a_download_over_three_connections_is_put_together_in_order() {
    let site = Site::connected([broken(3)], 3);
    let path = site.download(4).await.unwrap();
    assert_eq!(std::fs::read(path).unwrap(), bytemuck::cast_slice::<f32, u8>(&values(1.0)));
    let downloads = site.downloads();
    assert_eq!(downloads.len(), 6);
    let [first, second] = [&downloads[..3], &downloads[3..]].map(|asked| {
        let mut asked = asked.to_vec();
        asked.sort_unstable();
        asked
    });
    assert_eq!(first, [0, 1, 2].map(|chunk| (chunk, 3, None)));
    // One of three broke after 3 chunks: 9, 10 or 11 chunks were there in order.
    let next = second[0].0;
    assert!((9..12).contains(&next), "{next}");
    assert_eq!(second, [0, 1, 2].map(|chunk| (next + chunk, 3, None)));
}

#[tokio::test(start_paused = true)]
async fn a_model_that_travels_as_bf16_is_there_as_fp32() {
    let site = Site::with([broken(5)]);
    let rounded: Vec<f32> =
        values(1.0).iter().map(|value| f32::from_bits(value.to_bits() & 0xffff_0000)).collect();
    {
        let mut state = site.fake.state();
        state.model = rounded.clone();
        state.encoding = Encoding::Bf16;
    }
    let path = site.download(4).await.unwrap();
    assert_eq!(std::fs::read(path).unwrap(), bytemuck::cast_slice::<f32, u8>(&rounded));
    assert_eq!(site.first_chunks(), [0, 5]);
}

#[tokio::test(start_paused = true)]
async fn an_update_gives_the_same_bits_as_the_whole_model() {
    for encoding in Encoding::ALL {
        let mut models = Vec::new();
        for connections in [1, 3] {
            let site = Site::connected([broken(4)], connections);
            let expected = site.hold_version_3(encoding, 0.01);
            let path = site.download(4).await.unwrap();
            assert!(site.downloads().iter().all(|(.., held)| *held == Some(3)), "{:?}", site.downloads());
            assert!(!site.directory.model(3).exists(), "the version before is no longer needed");
            models.push(std::fs::read(path).unwrap());
            assert_eq!(models.last().unwrap(), bytemuck::cast_slice::<f32, u8>(&expected));
        }
        let whole = Site::with([]);
        whole.fake.state().model = whole.hold_version_3(encoding, 0.01);
        std::fs::remove_file(whole.directory.model(3)).unwrap();
        models.push(std::fs::read(whole.download(4).await.unwrap()).unwrap());
        assert_eq!(whole.downloads(), [(0, 1, None)]);
        assert!(models.iter().all(|model| *model == models[0]), "{}", encoding.name());
    }
}

#[tokio::test(start_paused = true)]
async fn an_update_of_a_version_that_was_damaged_is_followed_by_the_whole_model() {
    let site = Site::with([]);
    let expected = site.hold_version_3(Encoding::Bf16, 0.01);
    let mut base = std::fs::read(site.directory.model(3)).unwrap();
    base[777] ^= 1;
    std::fs::write(site.directory.model(3), base).unwrap();
    let path = site.download(4).await.unwrap();
    assert_eq!(site.downloads(), [(0, 1, Some(3)), (0, 1, None)]);
    assert_eq!(std::fs::read(path).unwrap(), bytemuck::cast_slice::<f32, u8>(&expected));
}

#[tokio::test(start_paused = true)]
async fn an_update_that_cannot_be_decoded_is_followed_by_the_whole_model() {
    let site = Site::with([]);
    let expected = site.hold_version_3(Encoding::Bf16, 0.01);
    if let Some(update) = &mut site.fake.state().update {
        update.values[500] = f32::NAN;
    }
    let path = site.download(4).await.unwrap();
    assert_eq!(site.downloads(), [(0, 1, Some(3)), (0, 1, None)]);
    assert_eq!(std::fs::read(path).unwrap(), bytemuck::cast_slice::<f32, u8>(&expected));
}

#[tokio::test(start_paused = true)]
async fn a_version_before_that_is_not_whole_is_not_said_to_be_held() {
    let site = Site::with([]);
    site.hold_version_3(Encoding::Bf16, 0.01);
    std::fs::write(site.directory.model(3), [7; 512]).unwrap();
    site.download(4).await.unwrap();
    assert_eq!(site.downloads(), [(0, 1, None)]);
}

#[tokio::test(start_paused = true)]
async fn a_model_that_never_arrives_right_is_the_aggregators_fault() {
    let site = Site::with([]);
    site.fake.state().model[3] = f32::NAN;
    let result = site.download(4).await;
    assert!(matches!(result, Err(TransferError::Damaged { attempts: 3, .. })), "{result:?}");
    assert_eq!(site.first_chunks(), [0, 0, 0]);
    assert!(!site.directory.model(4).exists() && !site.directory.model_part(4).exists());
}

#[tokio::test(start_paused = true)]
async fn transfers_keep_to_the_sites_limits() {
    let bytes = PARAMETERS as f64 * 4.0;
    for connections in [1, 3] {
        let config = Transfer { connections, upload_bytes_per_second: 1_000, download_bytes_per_second: 500 };
        let site = Site::new(offering([]), &config);
        // The last chunk goes when those before it have had their time, to the millisecond.
        let least = |bytes_per_second: f64| (bytes - CHUNK_BYTES as f64) / bytes_per_second - 0.001;

        let began = Instant::now();
        site.download(4).await.unwrap();
        let seconds = began.elapsed().as_secs_f64();
        assert!((least(500.0)..least(500.0) + 1.0).contains(&seconds), "{seconds} s down");

        let began = Instant::now();
        site.upload().await.unwrap();
        site.check_uploaded();
        let seconds = began.elapsed().as_secs_f64();
        assert!((least(1_000.0)..least(1_000.0) + 1.0).contains(&seconds), "{seconds} s up");
    }
}

#[tokio::test(start_paused = true)]
async fn an_upload_that_waits_for_its_own_limit_does_not_take_that_for_silence() {
    let config = Transfer { connections: 1, upload_bytes_per_second: 2, download_bytes_per_second: 0 };
    let site = Site::new(offering([]), &config);
    site.upload().await.unwrap();
    assert_eq!(site.uploads().len(), 1, "each chunk takes 128 s, and no call was given up");
}

impl Site {
    /// Downloads version 4, which differs from a version 3 that is there in every fifth chunk from the fourth on.
    async fn download_fragment(&self, change: impl FnOnce(&mut [f32])) -> Vec<(u32, u32, Option<u32>)> {
        let fragment = Fragment::of_round(plan(), 5, 4);
        let mut held = values(1.0);
        fragment.slices_mut(&mut held).for_each(|chunk| chunk.fill(0.0));
        change(&mut held);
        std::fs::write(self.directory.model(3), bytemuck::cast_slice::<f32, u8>(&held)).unwrap();
        let model = (&run(), 4, self.fake.model_digest());
        let path =
            self.transfers.download_model(&self.directory, model, fragment, &self.activity).await.unwrap();
        assert_eq!(std::fs::read(path).unwrap(), bytemuck::cast_slice::<f32, u8>(&values(1.0)));
        self.downloads()
    }
}

#[tokio::test(start_paused = true)]
async fn of_a_model_whose_predecessor_is_there_only_the_fragment_is_downloaded() {
    let asked = Site::with([broken(2)]).download_fragment(|_| ()).await;
    assert_eq!(asked, [(3, 5, Some(3)), (13, 5, Some(3))], "two of its three chunks, then the last");
    let mut asked = Site::connected([], 2).download_fragment(|_| ()).await;
    asked.sort_unstable();
    assert_eq!(asked, [(3, 10, Some(3)), (8, 10, Some(3))]);
}

#[tokio::test(start_paused = true)]
async fn a_predecessor_that_is_damaged_costs_a_whole_download() {
    let asked = Site::with([]).download_fragment(|held| held[0] += 1.0).await;
    assert_eq!(asked, [(3, 5, Some(3)), (0, 1, None)]);
}
