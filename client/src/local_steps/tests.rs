//! Rounds that are interrupted, trained again, or follow each other.

mod streaming;

use consort_common::{codec::Encoding, ids::Digest, spec::RunSpec};
use consort_proto::v1::ClientActivity;

use super::*;
use crate::{
    data::{PrepareRequest, Source, Tokenizer, prepare},
    progress::Reporter,
    round::keep,
    state::StateDirectory,
    trainer::{be_deterministic, test_device},
    work::RunId,
};

const SPEC: &str = r#"
    name = "r"
    rounds = 3
    [model]
    architecture = "llama"
    hidden_size = 16
    intermediate_size = 32
    num_hidden_layers = 1
    num_attention_heads = 2
    num_key_value_heads = 1
    max_position_embeddings = 16
    [training]
    local_steps = 8
    batch_size = 2
    micro_batch_size = 2
    sequence_length = 16
"#;

/// A site that has prepared a run, with the files of the run in a folder that goes with it.
struct Site {
    material: Arc<Material>,
    base: PathBuf,
    encoding: Encoding,
    _folder: tempfile::TempDir,
}

impl Site {
    fn new(optimizer_state: &str) -> Self {
        Self::with(&format!("optimizer_state = \"{optimizer_state}\"\n"))
    }

    /// With this after the specification.
    fn with(settings: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let text: String = (0..2_000).map(|number| format!("{number} ")).collect();
        let source = folder.path().join("text.jsonl");
        let documents: Vec<String> = (0..9).map(|n| format!("{{\"text\": \"{n} {text}\"}}")).collect();
        std::fs::write(&source, documents.join("\n")).unwrap();
        let spec = RunSpec::parse(&format!("{SPEC}{settings}")).unwrap();
        let request = PrepareRequest {
            sources: vec![Source::new(source)],
            cache: folder.path().join("cache"),
            tokenizer: Tokenizer::byte(),
            held_out_fraction: 0.2,
            vocabulary_size: spec.model.vocab_size(),
        };
        let run = RunId { name: "r".parse().unwrap(), spec_digest: Digest::of(SPEC.as_bytes()) };
        let state = StateDirectory::open(&folder.path().join("state")).unwrap();
        let base = folder.path().join("base");
        let model = spec.model.manifest().initialise(spec.seed);
        std::fs::write(&base, bytemuck::cast_slice::<f32, u8>(&model)).unwrap();
        let material = Material {
            site: "a".parse().unwrap(),
            manifest_digest: spec.model.manifest().digest(),
            plan: spec.chunk_plan(),
            directory: state.run(&run.name).unwrap(),
            dataset: prepare(&request, &|_| {}, &|| false).unwrap(),
            run,
            spec,
        };
        Self { material: Arc::new(material), base, encoding: Encoding::Fp32, _folder: folder }
    }

    fn job(&self, round: u32) -> Job {
        let steps = self.material.spec.training.local_steps;
        Job {
            material: self.material.clone(),
            task: TrainTask {
                run: self.material.run.clone(),
                manifest_digest: self.material.manifest_digest,
                round,
                base_digest: Digest::of(b"base"),
                first_step: u64::from(steps) * u64::from(round - 1),
                steps,
                tokens: self.material.spec.tokens(steps),
                evaluate_base: false,
                delta_encoding: self.encoding,
            },
            base: self.base.clone(),
            checkpoint_interval: Duration::from_secs(3600),
            activity: Reporter::default().begin(&self.material.run.name, round, ClientActivity::Training, 0),
            steps_ahead: Arc::default(),
            cancel: CancellationToken::new(),
        }
    }

    fn trainer(&self) -> Trainer {
        let spec = &self.material.spec;
        let device = test_device();
        be_deterministic(device).unwrap();
        Trainer::new(&spec.model, &spec.training, spec.run_steps(), 256, device).unwrap()
    }

    /// Trains a round as it comes, and keeps its delta and what the site carries over.
    fn train(&self, trainer: &mut Trainer, round: u32) -> Vec<u32> {
        self.train_on(trainer, &mut None, round)
    }

    /// The same with a trainer that may hold the round's first steps.
    fn train_on(&self, trainer: &mut Trainer, held: &mut Option<FirstSteps>, round: u32) -> Vec<u32> {
        let job = self.job(round);
        let fragments = self.material.spec.fragments();
        self.material.directory.begin_round(round, fragments).unwrap();
        let trained = train(trainer, held, &job).unwrap();
        let parameters = bits(&trained.parameters);
        keep(&self.material, &job.task, &self.base, trained).unwrap();
        parameters
    }

    /// What a round left on disk: its encoded delta, and what the encoding dropped.
    fn results(&self, round: u32) -> [Vec<u8>; 2] {
        let directory = &self.material.directory;
        [directory.delta(round), directory.encoding_error(round)].map(|path| std::fs::read(path).unwrap())
    }

    /// Trains `steps` of a round, then leaves a checkpoint, as a daemon that is stopped.
    fn interrupt(&self, trainer: &mut Trainer, round: u32, steps: u64) {
        let job = self.job(round);
        let resumed = resume(trainer, &mut None, &job).unwrap();
        let progress = resumed.unwrap_or_else(|| begin(trainer, &mut None, &job).unwrap().0);
        let mut round = job.steps(trainer, progress).unwrap();
        for _ in 0..steps {
            round.step(&|| false).unwrap();
        }
        assert!(matches!(round.step(&|| true), Err(StepsError::Trainer(TrainerError::Cancelled))));
        round.save().unwrap();
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn a_round_that_is_interrupted_gives_the_same_bits() {
    let site = Site::new("keep");
    let expected = site.train(&mut site.trainer(), 1);
    for stops in [vec![0], vec![3], vec![1, 2, 1]] {
        let _ = std::fs::remove_file(site.material.directory.checkpoint());
        for steps in stops {
            site.interrupt(&mut site.trainer(), 1, steps);
        }
        assert_eq!(site.train(&mut site.trainer(), 1), expected);
    }
}

#[test]
fn a_round_that_is_trained_again_begins_with_what_the_earlier_round_left() {
    let site = Site::new("keep");
    let mut trainer = site.trainer();
    site.train(&mut trainer, 1);
    let second = site.train(&mut trainer, 2);
    assert_eq!(site.train(&mut trainer, 2), second, "in the same process");
    assert_eq!(site.train(&mut site.trainer(), 2), second, "in another process");
    assert_ne!(site.train(&mut trainer, 1), second);
}

#[test]
fn a_round_that_is_computed_again_gives_the_same_delta_and_encoding_error() {
    let mut site = Site::new("keep");
    site.encoding = Encoding::TwoBit;
    let mut trainer = site.trainer();
    site.train(&mut trainer, 1);
    site.train(&mut trainer, 2);
    let second = site.results(2);
    site.train(&mut site.trainer(), 2);
    assert_eq!(site.results(2), second, "in another process");
    site.interrupt(&mut site.trainer(), 2, 3);
    site.train(&mut site.trainer(), 2);
    assert_eq!(site.results(2), second, "after an interruption");
}

#[test]
fn steps_of_a_round_that_was_given_up_do_not_count_in_the_next() {
    let site = Site::new("keep");
    let mut trainer = site.trainer();
    let job = site.job(1);
    let progress = begin(&mut trainer, &mut None, &job).unwrap().0;
    job.steps(&mut trainer, progress).unwrap().step(&|| false).unwrap();
    let progress = begin(&mut trainer, &mut None, &job).unwrap().0;
    let mut steps = job.steps(&mut trainer, progress).unwrap();
    steps.step(&|| false).unwrap();
    let tally = steps.take_tally().unwrap();
    assert_eq!((tally.updates, tally.tokens), (1, 2 * 16));
}

#[test]
fn moments_are_carried_over_only_if_the_run_keeps_them() {
    let second_rounds = ["keep", "reset"].map(|optimizer_state| {
        let site = Site::new(optimizer_state);
        let first = site.train(&mut site.trainer(), 1);
        (first, site.train(&mut site.trainer(), 2))
    });
    assert_eq!(second_rounds[0].0, second_rounds[1].0);
    assert_ne!(second_rounds[0].1, second_rounds[1].1);
}

#[test]
fn a_checkpoint_of_another_round_or_base_is_not_resumed() {
    let site = Site::new("keep");
    site.interrupt(&mut site.trainer(), 1, 2);
    let mut trainer = site.trainer();
    assert!(resume(&mut trainer, &mut None, &site.job(2)).unwrap().is_none());
    let mut job = site.job(1);
    assert!(resume(&mut trainer, &mut None, &job).unwrap().is_some());
    job.task.base_digest = Digest::of(b"other");
    assert!(resume(&mut trainer, &mut None, &job).unwrap().is_none());
}

#[test]
fn a_damaged_checkpoint_costs_the_round_its_steps_and_nothing_else() {
    let site = Site::new("keep");
    let expected = site.train(&mut site.trainer(), 1);
    site.interrupt(&mut site.trainer(), 1, 2);
    let path = site.material.directory.checkpoint();
    let mut bytes = std::fs::read(&path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    assert_eq!(site.train(&mut site.trainer(), 1), expected);
}
