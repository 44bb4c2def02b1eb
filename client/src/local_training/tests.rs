//! Trainings that run through, are stopped, and go on.

use std::{cell::Cell, fs};

use consort_common::atomic_file::partial_path;

use super::*;
use crate::{
    data::{Dataset, PrepareRequest, Source, Tokenizer, prepare},
    trainer::{be_deterministic, test_device},
};

const SPEC: &str = r#"
    name = "alone"
    seed = 3
    rounds = 2
    [model]
    architecture = "llama"
    hidden_size = 32
    intermediate_size = 64
    num_hidden_layers = 1
    num_attention_heads = 2
    num_key_value_heads = 1
    max_position_embeddings = 32
    [training]
    local_steps = 30
    batch_size = 8
    micro_batch_size = 8
    sequence_length = 32
    optimizer = { kind = "adamw", learning_rate = 0.01 }
"#;

pub(crate) struct Site {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) spec: RunSpec,
    pub(crate) dataset: Dataset,
    pub(crate) held_out: HeldOut,
}

impl Site {
    /// A text of repeating phrases, easy to learn.
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let source = folder.path().join("text");
        fs::create_dir(&source).unwrap();
        for document in 0..20 {
            let phrase = format!("The {document} bells of the harbour rang. ");
            fs::write(source.join(format!("{document}.txt")), phrase.repeat(20)).unwrap();
        }
        let request = PrepareRequest {
            sources: vec![Source::new(source)],
            cache: folder.path().join("cache"),
            tokenizer: Tokenizer::byte(),
            held_out_fraction: 0.2,
            vocabulary_size: 257,
        };
        let dataset = prepare(&request, &|_| {}, &|| false).unwrap();
        let held_out = HeldOut::new(dataset.held_out.clone(), 32, 2_000).unwrap();
        Self { folder, spec: RunSpec::parse(SPEC).unwrap(), dataset, held_out }
    }

    fn start(&self) -> Vec<f32> {
        self.spec.model.manifest().initialise(self.spec.seed)
    }

    fn folder(&self, name: &str) -> Folder {
        Folder::open(&self.folder.path().join(name)).unwrap()
    }

    fn request<'a>(&'a self, start: &'a [f32], steps: u64) -> Request<'a> {
        Request {
            text: Text { spec: &self.spec, dataset: &self.dataset, site: "a" },
            start,
            steps,
            held_out: Some(&self.held_out),
            log_every: 10,
            evaluate_every: 0,
            checkpoint_interval: Duration::from_secs(3600),
            device: deterministic_device(),
        }
    }

    /// The weights after `steps` steps.
    pub(crate) fn train(&self, steps: u64) -> Vec<f32> {
        let start = self.start();
        run(&self.folder("plain"), self.request(&start, steps), &go_on).unwrap().parameters
    }
}

/// Trainings are compared bit by bit.
fn deterministic_device() -> Device {
    let device = test_device();
    be_deterministic(device).unwrap();
    device
}

fn go_on() -> bool {
    false
}

fn run(
    folder: &Folder,
    request: Request<'_>,
    cancelled: &dyn Fn() -> bool,
) -> Result<Trained, TrainingError> {
    LocalTraining::open(folder, request)?.run(&mut |_| {}, cancelled)
}

/// The columns of the metrics that follow from text and weights alone, without those of time.
fn rows(folder: &Folder) -> Vec<Vec<String>> {
    let table = fs::read_to_string(folder.metrics()).unwrap();
    let columns: Vec<&str> = table.lines().next().unwrap().split(',').collect();
    let timed = ["tokens_per_second", "waited_share", "seconds"];
    let kept = |row: &str| {
        let values = row.split(',').zip(&columns).filter(|(_, column)| !timed.contains(column));
        values.map(|(value, _)| value.to_owned()).collect()
    };
    table.lines().skip(1).map(kept).collect()
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn training_alone_learns_the_text_and_gives_the_same_bits_again() {
    let site = Site::new();
    let start = site.start();
    let (first, second) = (site.folder("first"), site.folder("second"));
    let trained = run(&first, site.request(&start, 60), &go_on).unwrap();
    let rows = rows(&first);
    let column = |index: usize| rows.iter().map(|row| row[index].clone()).collect::<Vec<_>>();
    assert_eq!(column(0), ["10", "20", "30", "40", "50", "60"]);
    assert_eq!(column(1).last().unwrap(), &(60 * 8 * 32).to_string());
    let losses: Vec<f64> = column(2).iter().map(|loss| loss.parse().unwrap()).collect();
    assert!(losses[5] < losses[0] / 2.0, "{losses:?}");
    let held_out = trained.held_out.unwrap();
    assert!(held_out.loss() < 1.5, "{held_out:?}");
    assert_eq!(column(5), ["", "", "", "", "", &held_out.loss().to_string()]);

    let again = run(&second, site.request(&start, 60), &go_on).unwrap();
    assert_eq!(bits(&again.parameters), bits(&trained.parameters));
    assert_eq!(self::rows(&second), rows);
}

/// Asked for the `at`th time, says yes.
fn after(at: u32) -> impl Fn() -> bool {
    let asked = Cell::new(0);
    move || asked.replace(asked.get() + 1) == at
}

#[test]
fn a_training_that_is_stopped_goes_on_to_the_same_rows_and_bits() {
    let site = Site::new();
    let start = site.start();
    let request = Request { log_every: 4, evaluate_every: 6, ..site.request(&start, 21) };
    let quiet = site.folder("quiet");
    let expected = run(&quiet, request, &go_on).unwrap();
    let disturbed = site.folder("disturbed");
    let mut stops = 0;
    // A step asks once, a measurement eight times: each is hit by some of these.
    let trained = loop {
        match run(&disturbed, request, &after(stops % 13)) {
            Ok(trained) => break trained,
            Err(TrainingError::Stopped { steps: 21, .. }) => stops += 1,
            Err(error) => panic!("{error}"),
        }
        assert!(stops < 100, "it does not come forward");
    };
    assert!(stops >= 10, "{stops}");
    assert_eq!(bits(&trained.parameters), bits(&expected.parameters));
    assert_eq!(trained.held_out, expected.held_out);
    assert_eq!(rows(&disturbed), rows(&quiet));
    let steps: Vec<String> = rows(&quiet).into_iter().map(|row| row[0].clone()).collect();
    assert_eq!(steps, ["0", "4", "6", "8", "12", "16", "18", "20", "21"]);
}

/// As a kill does it: what was written since the checkpoint is there, and comes again.
#[test]
fn a_training_that_is_killed_goes_on_from_its_last_checkpoint() {
    let site = Site::new();
    let start = site.start();
    let request = Request { log_every: 1, ..site.request(&start, 12) };
    let quiet = site.folder("quiet");
    let expected = run(&quiet, request, &go_on).unwrap();
    let killed = site.folder("killed");
    assert!(matches!(run(&killed, request, &after(5)), Err(TrainingError::Stopped { step: 5, .. })));
    let checkpoint = fs::read(killed.checkpoint()).unwrap();
    assert!(matches!(run(&killed, request, &after(4)), Err(TrainingError::Stopped { step: 9, .. })));
    fs::write(killed.checkpoint(), checkpoint).unwrap();
    let trained = run(&killed, request, &go_on).unwrap();
    assert_eq!(bits(&trained.parameters), bits(&expected.parameters));
    assert_eq!(rows(&killed), rows(&quiet));
}

#[test]
fn checkpoints_are_written_while_it_trains() {
    let site = Site::new();
    let start = site.start();
    let request = Request { checkpoint_interval: Duration::ZERO, ..site.request(&start, 40) };
    let folder = site.folder("busy");
    let plain = site.train(40);
    let trained = run(&folder, request, &go_on).unwrap();
    assert_eq!(bits(&trained.parameters), bits(&plain));
    let checkpoint = checkpoint::load::<Progress>(&folder.checkpoint()).unwrap().unwrap();
    assert!((1..40).contains(&checkpoint.progress.steps), "{:?}", checkpoint.progress);
    let resumed = run(&folder, request, &go_on).unwrap();
    assert_eq!(bits(&resumed.parameters), bits(&plain));
    folder.forget().unwrap();
    assert!(!folder.checkpoint().exists() && folder.metrics().exists());
}

#[test]
fn another_training_does_not_go_on_with_this_ones_checkpoint() {
    let site = Site::new();
    let start = site.start();
    let request = site.request(&start, 20);
    let folder = site.folder("x");
    assert!(run(&folder, request, &after(3)).is_err());
    let mut other_spec = site.spec.clone();
    other_spec.training.gradient_clip = 0.5;
    let mut other_text = site.dataset.clone();
    other_text.key = Digest::of(b"another");
    let other_start = vec![0.0; start.len()];
    let text = request.text;
    for (request, expected) in [
        (Request { text: Text { spec: &other_spec, ..text }, ..request }, "its specification is another"),
        (Request { text: Text { dataset: &other_text, ..text }, ..request }, "its text is another"),
        (Request { text: Text { site: "b", ..text }, ..request }, "its --site is a, not b"),
        (Request { start: &other_start, ..request }, "it began with other weights"),
        (Request { steps: 30, ..request }, "its --steps is 20, not 30"),
        (Request { log_every: 5, ..request }, "its --log-every is 10, not 5"),
        (Request { evaluate_every: 5, ..request }, "its --evaluate-every is 0, not 5"),
    ] {
        let error = run(&folder, request, &go_on).unwrap_err().to_string();
        assert!(error.contains("step 3") && error.contains(expected) && error.contains("--fresh"), "{error}");
    }
    run(&folder, request, &go_on).unwrap();
}

#[test]
fn a_damaged_checkpoint_is_an_error_and_not_a_training_from_the_beginning() {
    let site = Site::new();
    let start = site.start();
    let folder = site.folder("x");
    assert!(run(&folder, site.request(&start, 20), &after(3)).is_err());
    fs::write(folder.checkpoint(), b"rubbish").unwrap();
    let error = run(&folder, site.request(&start, 20), &go_on).unwrap_err().to_string();
    assert!(error.contains("damaged") && error.contains("--fresh"), "{error}");
    folder.forget().unwrap();
    run(&folder, site.request(&start, 20), &go_on).unwrap();
}

#[test]
fn without_steps_the_weights_are_those_that_it_began_with() {
    let site = Site::new();
    let start: Vec<f32> = site.start().iter().map(|weight| weight * 0.5).collect();
    let trained = run(&site.folder("x"), site.request(&start, 0), &go_on).unwrap();
    assert_eq!(trained.parameters, start);
    assert!((trained.held_out.unwrap().loss() - 257f64.ln()).abs() < 0.05);
}

#[test]
fn two_trainings_do_not_share_a_folder() {
    let site = Site::new();
    let first = site.folder("x");
    let error = Folder::open(&site.folder.path().join("x")).unwrap_err();
    assert!(matches!(error, StateError::InUse(_)) && error.to_string().contains("--out"), "{error}");
    drop(first);
    site.folder("x");
}

/// A folder in the place where checkpoints are written.
fn obstacle(folder: &Folder) -> PathBuf {
    let obstacle = partial_path(&folder.checkpoint());
    fs::create_dir(&obstacle).unwrap();
    obstacle
}

#[test]
fn a_checkpoint_that_cannot_be_written_for_a_while_costs_nothing() {
    let site = Site::new();
    let start = site.start();
    let request = Request { checkpoint_interval: Duration::ZERO, ..site.request(&start, 12) };
    let expected = site.train(12);
    let folder = site.folder("x");
    let obstacle = obstacle(&folder);
    // What failed in the background before does not keep the last checkpoint from being written.
    let asked = Cell::new(0);
    let stopped = run(&folder, request, &|| {
        asked.set(asked.get() + 1);
        asked.get() == 3 && fs::remove_dir(&obstacle).is_ok()
    });
    assert!(matches!(stopped, Err(TrainingError::Stopped { step: 2, .. })), "{stopped:?}");
    assert_eq!(checkpoint::load::<Progress>(&folder.checkpoint()).unwrap().unwrap().progress.steps, 2);
    let trained = run(&folder, request, &go_on).unwrap();
    assert_eq!(bits(&trained.parameters), bits(&expected));
}

#[test]
fn a_training_whose_checkpoints_cannot_be_written_is_given_up() {
    let site = Site::new();
    let start = site.start();
    let request = Request { checkpoint_interval: Duration::ZERO, ..site.request(&start, 100_000) };
    let folder = site.folder("x");
    obstacle(&folder);
    let error = run(&folder, request, &go_on).unwrap_err();
    let expected = matches!(error, TrainingError::Steps(StepsError::Checkpoint(CheckpointError::Io { .. })));
    assert!(expected && !error.to_string().contains("--fresh"), "{error}");
}

#[test]
fn a_folder_has_only_metrics_once_its_training_is_over() {
    let site = Site::new();
    let start = site.start();
    let folder = site.folder("x");
    assert!(!folder.has_only_metrics());
    assert!(run(&folder, site.request(&start, 4), &after(2)).is_err());
    assert!(!folder.has_only_metrics());
    run(&folder, site.request(&start, 4), &go_on).unwrap();
    folder.forget().unwrap();
    assert!(folder.has_only_metrics());
}
