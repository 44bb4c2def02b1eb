//! What a member with a good certificate can do with bytes of its own: nothing but be refused. The aggregator
//! does not fail, keeps to its bounds of memory and disk, and a round goes on to the right bits.
//!
//! `CONSORT_FUZZ_SEED` replays a failure, `CONSORT_FUZZ_CASES` sets how many cases each test makes.

use std::{
    collections::BTreeSet,
    fs,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use consort_aggregator::spool::DeltaLayout;
use consort_common::{codec::Encoding, ids::Digest, spec::RunSpec};
use consort_proto::v1::{
    DeltaBegin, DeltaChunk, UploadDeltaRequest, upload_delta_request::Part, upload_delta_response as answer,
};
use consort_tests::{
    TestFederation,
    federation::tiny_spec,
    hostile::{self, Schema, damaged, framed},
    raw::{Assignment, Delta, RawSite, channel},
};
use proptest::{
    prelude::*,
    test_runner::{RngSeed, TestRunner},
};
use prost::Message;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tonic::{Code, Status};

const RUN: &str = "pilot";
const UPLOAD: &str = "/consort.v1.Federation/UploadDelta";
/// Most that the aggregator may grow by in a test, in bytes: two of the longest messages.
const GROWTH_MAX: u64 = 16 << 20;

/// A run that takes both sites' deltas of its one round, in 27 chunks.
fn spec() -> String {
    tiny_spec(RUN, 2, 2)
        .replace("chunk_parameters = 4096", "chunk_parameters = 1024\ndelta_encoding = \"int8\"")
        + "\n[outer.optimizer]\nkind = \"fedavg\"\n"
}

/// A federation of an honest site and one that is not, which has been told to train.
struct Scene {
    federation: TestFederation,
    mallory: RawSite,
    assignment: Assignment,
    peak_before: u64,
    seed: u64,
    random: ChaCha8Rng,
}

impl Scene {
    async fn new() -> Self {
        let seed = std::env::var("CONSORT_FUZZ_SEED")
            .map_or_else(|_| rand::random(), |seed| seed.parse().expect("CONSORT_FUZZ_SEED is a number"));
        println!("replay with CONSORT_FUZZ_SEED={seed}");
        let mut federation = TestFederation::new(&["bank", "mallory"]);
        federation.start_aggregator();
        federation.start_run(&spec());
        let mut bank = RawSite::ready(&federation, "bank", RUN).await;
        let mut mallory = RawSite::ready(&federation, "mallory", RUN).await;
        let assignment = mallory.assignment(1).await;
        bank.assignment(1).await;
        // What one whole delta and the versions take is no growth.
        mallory.model(0).await.expect("the model can be had");
        let peak_before = federation.aggregator().peak_memory_bytes();
        let random = ChaCha8Rng::seed_from_u64(seed);
        Self { federation, mallory, assignment, peak_before, seed, random }
    }

    fn cases(default: u32) -> u32 {
        let given = std::env::var("CONSORT_FUZZ_CASES").ok();
        given.map_or(default, |cases| cases.parse().expect("CONSORT_FUZZ_CASES is a number"))
    }

    /// A right delta, in either encoding that the run takes.
    fn delta(&self, encoding: Encoding) -> Delta {
        let mut assignment = self.assignment.clone();
        assignment.encoding = encoding;
        let mut delta = Delta::constant(&assignment, 0.001);
        delta.begin.session_id.clone_from(&self.mallory.session);
        delta
    }

    /// The aggregator is as it was: it goes on, has no more than it may, and the round ends with the mean of
    /// what both sites send in the end.
    async fn assert_unharmed(mut self) {
        let output = self.federation.aggregator().output();
        assert!(self.federation.aggregator().is_running(), "the aggregator ended:\n{output}");
        assert!(!output.contains("panicked"), "the aggregator panicked:\n{output}");
        let growth = self.federation.aggregator().peak_memory_bytes() - self.peak_before;
        println!("peak memory grew by {:.1} MB", growth as f64 / 1e6);
        assert!(growth < GROWTH_MAX, "grew by {growth} bytes");
        self.assert_spool_is_bounded();

        let mut base = Vec::new();
        let mut deltas = Vec::new();
        for (site, instance, value) in
            [("bank", None, 0.001), ("mallory", Some(self.mallory.instance), -0.0075)]
        {
            let mut site = RawSite::new(&self.federation, site);
            site.instance = instance.unwrap_or(site.instance);
            // Until the aggregator has seen that a connection of before is gone.
            while let Err(status) = site.join().await {
                assert_eq!(status.code(), Code::AlreadyExists, "{status:?}");
                tokio::task::yield_now().await;
            }
            site.attend().await.expect("the site may attend");
            site.report_ready(RUN).await.expect("the site may be ready");
            deltas.push((site, value));
        }
        let mut mean = 0.0;
        let mut sites = Vec::new();
        for (mut site, value) in deltas {
            let assignment = site.assignment(1).await;
            base = site.model(0).await.expect("the base is there");
            let delta = Delta::constant(&assignment, value);
            assert!(!site.upload(&delta).await.expect("the delta is right"));
            let mut decoded = [0.0; 1024];
            let chunk = &delta.chunks[0];
            assignment.encoding.codec().decode(&chunk.payload, &mut decoded).expect("a chunk is right");
            mean += 0.5 * f64::from(decoded[0]);
            sites.push(site);
        }
        let next = sites[0].assignment(2).await;
        let add = |old: &f32| (f64::from(*old) + f64::from(mean as f32)) as f32;
        let expected: Vec<f32> = base.iter().map(add).collect();
        assert_eq!(Digest::of(bytemuck::cast_slice(&expected)).to_vec(), next.train.base_digest);
    }

    /// Of each site at most one delta lies in the spool, of at most its length.
    fn assert_spool_is_bounded(&self) {
        let round = self.federation.aggregator_state().join("spool").join(RUN).join("1");
        let names = |folder: &std::path::Path| -> Vec<std::path::PathBuf> {
            let entries = fs::read_dir(folder).into_iter().flatten();
            entries.map(|entry| entry.expect("the folder can be read").path()).collect()
        };
        let plan = RunSpec::parse(&spec()).expect("a valid specification").chunk_plan();
        let bytes_max = DeltaLayout::new(plan, Encoding::Fp32).file_bytes();
        for site in names(&round) {
            let deltas = names(&site);
            assert!(deltas.len() <= 1, "{deltas:?}");
            for delta in deltas {
                let bytes = fs::metadata(&delta).expect("the file is there").len();
                assert!(bytes <= bytes_max, "{} has {bytes} bytes", delta.display());
            }
        }
    }
}

/// Statuses that say what is wrong with a call. `Unknown` is none of them; `Internal` is what the protocol's
/// library says of bytes that are no message.
fn assert_refused_in_words(status: &Status) {
    let is_expected = match status.code() {
        Code::InvalidArgument
        | Code::Aborted
        | Code::FailedPrecondition
        | Code::Cancelled
        | Code::NotFound
        | Code::OutOfRange
        | Code::PermissionDenied
        | Code::AlreadyExists
        | Code::Unimplemented
        | Code::ResourceExhausted => true,
        Code::Internal => {
            let message = status.message();
            !message.contains("see its log") && !message.contains("the aggregator failed")
        }
        _ => false,
    };
    assert!(is_expected, "{status:?}");
}

/// A recorded upload that lacks its last chunk, the only one of its length: however it is damaged, it is not
/// a whole delta.
fn recorded(delta: &Delta) -> Vec<Vec<u8>> {
    let chunks = delta.chunks[..4].iter().map(|chunk| Part::Chunk(chunk.clone()));
    let parts =
        std::iter::once(Part::Begin(delta.begin.clone())).chain(chunks).chain([Part::Finish(delta.finish)]);
    parts.map(|part| UploadDeltaRequest { part: Some(part) }.encode_to_vec()).collect()
}

#[tokio::test]
async fn damaged_uploads_and_mere_noise_are_refused_and_harm_nobody() {
    let mut scene = Scene::new().await;
    let channel = channel(&scene.federation, &scene.federation.kit("site-mallory"));
    let uploads = [Encoding::Int8, Encoding::Fp32].map(|encoding| recorded(&scene.delta(encoding)));
    let random = &mut scene.random;
    // As it was recorded, for what all others are measured by.
    let whole: Vec<u8> = uploads[0].iter().flat_map(|message| framed(message)).collect();
    let answer = hostile::call(&channel, UPLOAD, &whole, false, usize::MAX, random).await;
    let status = answer.status.expect("the upload was answered");
    assert!(status.message().contains("4 of 27 chunks held"), "{status:?}");

    let mut codes = BTreeSet::new();
    let cases = Scene::cases(1500);
    for case in 0..cases {
        let body = damaged(&uploads[case as usize % 2], random);
        let breaks_off = random.random_ratio(1, 8);
        let answer = hostile::call(&channel, UPLOAD, &body, breaks_off, usize::MAX, random).await;
        if breaks_off {
            continue;
        }
        let status = answer.status.unwrap_or_else(|| panic!("case {case} was not answered"));
        assert_refused_in_words(&status);
        codes.insert(format!(
            "{:?}: {}",
            status.code(),
            status.message().chars().take(24).collect::<String>()
        ));
    }
    println!("{cases} cases; {} different refusals", codes.len());
    assert!(codes.len() > 10, "the damage is too uniform: {codes:?}");
    scene.assert_unharmed().await;
}

/// One message of an upload: right, but for what is given.
#[derive(Debug, Clone)]
enum Step {
    Begin { encoding: Encoding, spoilt: Spoilt, part: u32, parts: u32 },
    Chunk { index: u32, payload: Payload, digest: Option<Vec<u8>> },
    Finish { numbers: [f64; 3], steps: Option<u32>, tokens: Option<u64> },
    Nothing,
}

/// What is wrong with a `begin`.
#[derive(Debug, Clone)]
enum Spoilt {
    Nothing,
    Session(Vec<u8>),
    Run(String),
    Round(u32),
    SpecDigest(Vec<u8>),
    ManifestDigest(Vec<u8>),
    Encoding(String),
    Chunks(u32),
    TotalBytes(u64),
    DeltaId(Vec<u8>),
}

#[derive(Debug, Clone)]
enum Payload {
    Right,
    Other(Vec<u8>),
    /// The right one with these bytes at a place.
    With(usize, [u8; 4]),
}

fn begin() -> impl Strategy<Value = Step> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..40);
    let spoilt = prop_oneof![
        20 => Just(Spoilt::Nothing),
        1 => bytes().prop_map(Spoilt::Session),
        1 => any::<String>().prop_map(Spoilt::Run),
        1 => any::<u32>().prop_map(Spoilt::Round),
        1 => bytes().prop_map(Spoilt::SpecDigest),
        1 => bytes().prop_map(Spoilt::ManifestDigest),
        1 => any::<String>().prop_map(Spoilt::Encoding),
        1 => any::<u32>().prop_map(Spoilt::Chunks),
        1 => any::<u64>().prop_map(Spoilt::TotalBytes),
        1 => bytes().prop_map(Spoilt::DeltaId),
        // Right as well: another delta.
        1 => prop::collection::vec(any::<u8>(), 16).prop_map(Spoilt::DeltaId),
    ];
    let parts = prop_oneof![6 => Just((0, 1)), 3 => (0u32..20, 0u32..20), 1 => any::<(u32, u32)>()];
    let encoding = prop_oneof![Just(Encoding::Int8), Just(Encoding::Fp32)];
    (encoding, spoilt, parts).prop_map(|(encoding, spoilt, (part, parts))| Step::Begin {
        encoding,
        spoilt,
        part,
        parts,
    })
}

fn step() -> impl Strategy<Value = Step> {
    let index = prop_oneof![8 => 0u32..27, 1 => any::<u32>()];
    let payload = prop_oneof![
        8 => Just(Payload::Right),
        1 => prop::collection::vec(any::<u8>(), 0..5000).prop_map(Payload::Other),
        2 => (any::<usize>(), prop_oneof![any::<[u8; 4]>(), Just(f32::NAN.to_le_bytes()), Just([0xff; 4])])
            .prop_map(|(place, bytes)| Payload::With(place, bytes)),
    ];
    let digest = prop::option::weighted(0.1, prop::collection::vec(any::<u8>(), 0..40));
    let chunk =
        (index, payload, digest).prop_map(|(index, payload, digest)| Step::Chunk { index, payload, digest });
    let finish = (any::<[f64; 3]>(), any::<Option<u32>>(), any::<Option<u64>>())
        .prop_map(|(numbers, steps, tokens)| Step::Finish { numbers, steps, tokens });
    prop_oneof![16 => chunk, 1 => begin(), 1 => finish, 1 => Just(Step::Nothing)]
}

/// What the aggregator may acknowledge of an upload, by its messages.
struct Oracle {
    right: [Delta; 2],
    /// The upload that was begun, if it was begun right.
    begun: Option<(usize, DeltaBegin)>,
    /// Chunks that were sent right; nothing counts after the first wrong message.
    sent: BTreeSet<u32>,
    ended: bool,
}

impl Oracle {
    fn message(&mut self, step: &Step) -> Option<Part> {
        Some(match step {
            Step::Begin { encoding, spoilt, part, parts } => self.begin(*encoding, spoilt, *part, *parts),
            Step::Chunk { index, payload, digest } => self.chunk(*index, payload, digest.as_deref()),
            Step::Finish { numbers: [loss, seconds, norm], steps, tokens } => {
                let mut finish = self.right[0].finish;
                (finish.train_loss, finish.train_seconds, finish.delta_norm) = (*loss, *seconds, *norm);
                finish.steps = steps.unwrap_or(finish.steps);
                finish.tokens = tokens.unwrap_or(finish.tokens);
                self.ended = true;
                Part::Finish(finish)
            }
            Step::Nothing => {
                self.ended = true;
                return None;
            }
        })
    }

    fn begin(&mut self, encoding: Encoding, spoilt: &Spoilt, part: u32, parts: u32) -> Part {
        let which = usize::from(encoding == Encoding::Fp32);
        let right = DeltaBegin { part, parts, ..self.right[which].begin.clone() };
        let mut begin = right.clone();
        match spoilt.clone() {
            Spoilt::Nothing => {}
            Spoilt::Session(session) => begin.session_id = session,
            Spoilt::Run(run) => begin.run = run,
            Spoilt::Round(round) => begin.round = round,
            Spoilt::SpecDigest(digest) => begin.spec_digest = digest,
            Spoilt::ManifestDigest(digest) => begin.manifest_digest = digest,
            Spoilt::Encoding(encoding) => begin.encoding = encoding,
            Spoilt::Chunks(chunks) => begin.chunks = chunks,
            Spoilt::TotalBytes(bytes) => begin.total_bytes = bytes,
            Spoilt::DeltaId(delta) => begin.delta_id = delta,
        }
        let is_right = DeltaBegin { delta_id: right.delta_id.clone(), ..begin.clone() } == right
            && begin.delta_id.len() == 16
            && parts <= 16
            && part < parts.max(1);
        if self.begun.is_none() && !self.ended && is_right {
            self.begun = Some((which, begin.clone()));
        } else {
            self.ended = true;
        }
        Part::Begin(begin)
    }

    fn chunk(&mut self, index: u32, payload: &Payload, digest: Option<&[u8]>) -> Part {
        let (which, begin) = self.begun.clone().unwrap_or_default();
        let right = self.right[which].chunks.get(index as usize).cloned();
        // The last chunk is never sent right, so that no delta gets whole.
        let right =
            right.filter(|chunk| chunk.index != 26).unwrap_or(DeltaChunk { index, ..DeltaChunk::default() });
        let mut bytes = right.payload.to_vec();
        match payload {
            Payload::Right => {}
            Payload::Other(other) => bytes.clone_from(other),
            Payload::With(place, with) => {
                for (offset, byte) in with.iter().enumerate() {
                    let length = bytes.len().max(1);
                    if let Some(there) = bytes.get_mut(place.wrapping_add(offset) % length) {
                        *there = *byte;
                    }
                }
            }
        }
        let true_digest = Digest::of(&bytes).to_vec();
        let digest = digest.map_or_else(|| true_digest.clone(), <[u8]>::to_vec);
        let encoding = Encoding::parse(&begin.encoding);
        let is_right = index < 26
            && index % begin.parts.max(1) == begin.part
            && digest == true_digest
            && encoding.is_some_and(|encoding| encoding.codec().decode(&bytes, &mut [0.0; 1024]).is_ok());
        if is_right && !self.ended {
            self.sent.insert(index);
        } else {
            self.ended = true;
        }
        Part::Chunk(DeltaChunk { index, payload: bytes.into(), digest })
    }
}

/// Sends the messages; every answer must be one that they have earned. Counts the chunks that were
/// acknowledged.
async fn check(
    mallory: &mut RawSite,
    right: [Delta; 2],
    steps: &[Step],
    acknowledged: &AtomicUsize,
) -> Result<(), TestCaseError> {
    let mut oracle = Oracle { right, begun: None, sent: BTreeSet::new(), ended: false };
    let messages: Vec<_> =
        steps.iter().map(|step| UploadDeltaRequest { part: oracle.message(step) }).collect();
    let mut answers = match mallory.client.upload_delta(tokio_stream::iter(messages)).await {
        Ok(answers) => answers.into_inner(),
        Err(status) => {
            assert_refused_in_words(&status);
            return Ok(());
        }
    };
    let mut resumed = false;
    loop {
        match answers.message().await {
            Err(status) => {
                assert_refused_in_words(&status);
                return Ok(());
            }
            Ok(Some(answer)) => match answer.part {
                Some(answer::Part::Resume(_)) => {
                    prop_assert!(oracle.begun.is_some() && !resumed, "an upload was begun");
                    resumed = true;
                }
                Some(answer::Part::Acknowledged(chunks)) => {
                    prop_assert!(resumed);
                    acknowledged.fetch_add(chunks.indices.len(), Ordering::Relaxed);
                    for index in chunks.indices {
                        prop_assert!(oracle.sent.contains(&index), "chunk {index} was acknowledged");
                    }
                }
                other => prop_assert!(false, "{other:?}"),
            },
            Ok(None) => prop_assert!(false, "an upload that is not whole ended well"),
        }
    }
}

#[test]
fn whatever_messages_come_in_whatever_order_only_right_chunks_are_acknowledged() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime can be made");
    let scene = runtime.block_on(Scene::new());
    let right = [Encoding::Int8, Encoding::Fp32].map(|encoding| scene.delta(encoding));
    let config = ProptestConfig {
        cases: Scene::cases(400),
        failure_persistence: None,
        rng_seed: RngSeed::Fixed(scene.seed),
        ..ProptestConfig::default()
    };
    let mut runner = TestRunner::new(config);
    let mallory = Mutex::new(scene.mallory);
    let acknowledged = AtomicUsize::new(0);
    let steps = (begin(), prop::collection::vec(step(), 0..12));
    let result = runner.run(&steps, |(begin, mut steps)| {
        steps.insert(0, begin);
        let mut mallory = mallory.lock().expect("nobody panics with it");
        runtime.block_on(check(&mut mallory, right.clone(), &steps, &acknowledged))
    });
    result.unwrap_or_else(|failure| panic!("{failure}"));
    let acknowledged = acknowledged.into_inner();
    println!("{acknowledged} chunks were acknowledged");
    assert!(acknowledged > 0, "nothing was ever right");
    let mallory = mallory.into_inner().expect("nobody panicked with it");
    runtime.block_on(Scene { mallory, ..scene }.assert_unharmed());
}

#[tokio::test]
async fn no_call_of_either_service_is_harmed_by_what_a_member_sends() {
    let mut scene = Scene::new().await;
    let schema = Schema::new();
    let kits = ["site-mallory", "operator-alice"];
    let channels = kits.map(|kit| channel(&scene.federation, &scene.federation.kit(kit)));
    let delta = scene.delta(Encoding::Int8);
    let mut words: Vec<Vec<u8>> =
        [&b"../../etc"[..], b"other", b"fp32", b"\xff\xfe"].map(<[u8]>::to_vec).to_vec();
    let federations_words = [
        RUN.as_bytes().to_vec(),
        scene.mallory.session.clone(),
        delta.begin.spec_digest.clone(),
        delta.begin.manifest_digest.clone(),
        scene.mallory.instance.to_vec(),
    ];
    let cases = Scene::cases(40);
    for (path, request) in &schema.calls {
        let is_operators = path.contains("Operator");
        words.truncate(4);
        if !is_operators {
            // An operator could do with the run what it likes, which is no harm that is looked for here.
            words.extend(federations_words.clone());
        }
        let mut answered = BTreeSet::new();
        for case in 0..cases {
            let message = schema.message(request, &words, &mut scene.random);
            let body = if case % 2 == 0 { framed(&message) } else { damaged(&[message], &mut scene.random) };
            let channel = &channels[usize::from(is_operators)];
            // Some answers, such as instructions, have no end.
            let answer = hostile::call(channel, path, &body, false, 0, &mut scene.random).await;
            if let Some(status) = answer.status.filter(|status| status.code() != Code::Ok) {
                assert_refused_in_words(&status);
                answered.insert(format!("{:?}", status.code()));
            }
        }
        println!("{path}: {}", answered.into_iter().collect::<Vec<_>>().join(", "));
    }
    assert!(schema.calls.len() >= 20, "the protocol has its calls");
    scene.assert_unharmed().await;
}
