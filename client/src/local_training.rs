//! Training on one machine without a federation: a run's model on one text, with the federation's engine,
//! initial weights and order of data, so that the two compare.
//!
//! All that a training keeps is in one folder, locked while it runs:
//!
//! ```text
//! lock
//! training.checkpoint   what it goes on with (see `steps`)
//! metrics.csv           a row every so many steps (see `metrics`)
//! text/                 the tokenised text, if no other place is given
//! ```
//!
//! A training that is killed goes on from its checkpoint and comes to the same rows and the same weights (on a
//! CPU, with as many threads): a checkpoint says through which row it counts, and is written only when those
//! rows are on disk; later rows are dropped, since they come again.
//!
//! No network here. All tensors belong to the thread that calls.

mod metrics;
#[cfg(test)]
pub(crate) mod tests;

use std::{
    fs::File,
    path::{Path, PathBuf},
    time::Duration,
};

use consort_common::{atomic_file::remove_directory, ids::Digest, spec::RunSpec};
use serde::{Deserialize, Serialize};

pub use self::metrics::MetricsError;
use self::metrics::{Metrics, Row};
use crate::{
    data::{Cursor, DataError, HeldOut},
    state::{self, StateError},
    steps::{self, Steps, StepsError, Tally, Text},
    trainer::{
        Device, EvaluationSum, Trainer, TrainerError,
        checkpoint::{self, Checkpoint, CheckpointError, Writer},
    },
};

/// Why it could not be done.
#[derive(Debug, thiserror::Error)]
pub enum TrainingError {
    /// It was asked to stop, and can go on.
    #[error("stopped after step {step} of {steps}, with a checkpoint: the same command goes on from there")]
    Stopped {
        /// Steps done.
        step: u64,
        /// Steps to do.
        steps: u64,
    },
    /// The folder is that of another training.
    #[error(
        "{} holds a training that has come to step {step} and is another one: {}; give it what it began with, take \
         another --out, or begin anew with --fresh", folder.display(), differences.join(", ")
    )]
    Other {
        /// The folder.
        folder: PathBuf,
        /// How far that one is.
        step: u64,
        /// What differs, in words.
        differences: Vec<String>,
    },
    /// The checkpoint cannot be read.
    #[error("{0}; begin anew with --fresh if it cannot be restored")]
    Checkpoint(#[from] CheckpointError),
    /// The table of metrics cannot be used.
    #[error("{0}; begin anew with --fresh if it cannot be restored")]
    Metrics(#[from] MetricsError),
    /// The folder cannot be used.
    #[error(transparent)]
    State(#[from] StateError),
    /// The text cannot be read or is too short, a step failed, or no checkpoint can be written.
    #[error(transparent)]
    Steps(#[from] StepsError),
}

impl From<TrainerError> for TrainingError {
    fn from(error: TrainerError) -> Self {
        Self::Steps(error.into())
    }
}

impl From<DataError> for TrainingError {
    fn from(error: DataError) -> Self {
        Self::Steps(error.into())
    }
}

/// What is to be trained.
#[derive(Clone, Copy)]
pub struct Request<'a> {
    /// What is trained on, in which order.
    pub text: Text<'a>,
    /// The flat vector that training begins with.
    pub start: &'a [f32],
    /// Optimizer steps, over which the learning rate's schedule extends.
    pub steps: u64,
    /// What is measured on; nothing: no loss but that of training.
    pub held_out: Option<&'a HeldOut>,
    /// Steps between two rows of the metrics; at least 1.
    pub log_every: u64,
    /// Steps between two measurements, the first before any step; 0: only after the last step.
    pub evaluate_every: u64,
    /// Time between two checkpoints.
    pub checkpoint_interval: Duration,
    /// Where it computes.
    pub device: Device,
}

/// What makes one training: with the same plan and text it comes to the same weights.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Plan {
    specification: Digest,
    start: Digest,
    site: String,
    steps: u64,
    log_every: u64,
    evaluate_every: u64,
}

/// What is kept with the steps.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Training {
    plan: Plan,
    /// The step of the last row of the metrics.
    rows_through: Option<u64>,
    /// Tokens and seconds of all rows.
    tokens: u64,
    seconds: f64,
}

type Progress = steps::Progress<Training>;

impl Plan {
    fn of(request: &Request<'_>) -> Self {
        // A struct of numbers and texts always has a value.
        let specification = serde_json::to_vec(request.text.spec).unwrap_or_default();
        Self {
            specification: Digest::of(&specification),
            start: Digest::of(bytemuck::cast_slice(request.start)),
            site: request.text.site.to_owned(),
            steps: request.steps,
            log_every: request.log_every,
            evaluate_every: request.evaluate_every,
        }
    }

    /// In which words this plan differs from that of a training which is asked for.
    fn differences(&self, asked: &Self) -> Vec<String> {
        let mut differences = Vec::new();
        let mut differ = |differs: bool, what: &dyn Fn() -> String| {
            if differs {
                differences.push(what());
            }
        };
        differ(self.specification != asked.specification, &|| "its specification is another".to_owned());
        differ(self.start != asked.start, &|| "it began with other weights".to_owned());
        differ(self.site != asked.site, &|| format!("its --site is {}, not {}", self.site, asked.site));
        for (option, ours, theirs) in [
            ("--steps", self.steps, asked.steps),
            ("--log-every", self.log_every, asked.log_every),
            ("--evaluate-every", self.evaluate_every, asked.evaluate_every),
        ] {
            differ(ours != theirs, &|| format!("its {option} is {ours}, not {theirs}"));
        }
        differences
    }

    /// Whether the metrics have a row after `step` steps.
    fn has_row(&self, step: u64) -> bool {
        self.is_measured(step) || (step > 0 && step.is_multiple_of(self.log_every))
    }

    /// Whether the held-out loss is measured after `step` steps.
    fn is_measured(&self, step: u64) -> bool {
        step == self.steps || (self.evaluate_every > 0 && step.is_multiple_of(self.evaluate_every))
    }
}

/// The folder of a training, locked for this process.
#[derive(Debug)]
pub struct Folder {
    path: PathBuf,
    // The lock lives as long as the open file; the system releases it even after SIGKILL.
    _lock: File,
}

impl Folder {
    /// Creates the folder if need be, and locks it.
    ///
    /// # Errors
    /// Another process trains there, or it cannot be made.
    pub fn open(path: &Path) -> Result<Self, StateError> {
        std::fs::create_dir_all(path).map_err(state::io_error("create the folder", path))?;
        let lock = state::lock(&path.join("lock"))?;
        Ok(Self { path: path.to_owned(), _lock: lock })
    }

    /// The table of metrics.
    pub fn metrics(&self) -> PathBuf {
        self.path.join("metrics.csv")
    }

    /// Where tokenised text may lie until the training is done.
    pub fn text(&self) -> PathBuf {
        self.path.join("text")
    }

    /// Whether there are metrics and nothing to go on with, as after a training's end, or before its first
    /// checkpoint.
    pub fn has_only_metrics(&self) -> bool {
        self.metrics().is_file() && !self.checkpoint().exists()
    }

    fn checkpoint(&self) -> PathBuf {
        self.path.join("training.checkpoint")
    }

    /// Removes what a training goes on with; its metrics stay.
    ///
    /// # Errors
    /// The file system refused.
    pub fn forget(&self) -> Result<(), StateError> {
        state::remove(&self.checkpoint())?;
        remove_directory(&self.text()).map_err(state::io_error("remove", &self.text()))
    }
}

/// How far a training is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LocalProgress {
    /// Steps done.
    pub step: u64,
    /// What the latest steps came to.
    pub latest: Tally,
    /// The held-out loss measured last, nats per token.
    pub held_out_loss: Option<f64>,
}

/// A training that is over.
#[derive(Debug, Clone, PartialEq)]
pub struct Trained {
    /// The flat vector.
    pub parameters: Vec<f32>,
    /// What was measured on the held-out text.
    pub held_out: Option<EvaluationSum>,
}

/// A training, ready to begin or to go on.
pub struct LocalTraining<'a> {
    request: Request<'a>,
    folder: &'a Folder,
    trainer: Trainer,
    progress: Progress,
}

impl<'a> LocalTraining<'a> {
    /// Goes on with the training that `folder` holds, or begins it.
    ///
    /// # Errors
    /// The folder holds another training or its files are damaged, or the device's memory does not suffice.
    pub fn open(folder: &'a Folder, request: Request<'a>) -> Result<Self, TrainingError> {
        let RunSpec { model, training, .. } = request.text.spec;
        let plan = Plan::of(&request);
        let text = request.text.dataset.key;
        let end_of_text = request.text.dataset.end_of_text;
        let mut trainer = Trainer::new(model, training, request.steps, end_of_text, request.device)?;
        let progress = match checkpoint::load::<Progress>(&folder.checkpoint())? {
            Some(Checkpoint { progress, parameters, moments }) => {
                let mut differences = progress.training.plan.differences(&plan);
                if progress.text != text {
                    differences.push("its text is another, or has changed".to_owned());
                }
                if !differences.is_empty() {
                    let folder = folder.path.clone();
                    return Err(TrainingError::Other { folder, step: progress.steps, differences });
                }
                trainer.load(&parameters)?;
                trainer.load_moments(&moments)?;
                progress
            }
            None => {
                trainer.load(request.start)?;
                let training = Training { plan, rows_through: None, tokens: 0, seconds: 0.0 };
                let (cursor, tally) = (Cursor::default(), Tally::default());
                Progress { training, text, cursor, steps: 0, tally }
            }
        };
        Ok(Self { request, folder, trainer, progress })
    }

    /// Steps done before.
    pub fn steps_done(&self) -> u64 {
        self.progress.steps
    }

    /// Trains to the end. `tell` is told about once a second and at each row; `cancelled` is asked before each
    /// forward pass.
    ///
    /// # Errors
    /// [`TrainingError::Stopped`] after a checkpoint was written; or what failed.
    pub fn run(
        mut self,
        tell: &mut dyn FnMut(LocalProgress),
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Trained, TrainingError> {
        let Request { text, steps: total, held_out, checkpoint_interval, .. } = self.request;
        let metrics = Metrics::open(&self.folder.metrics(), self.progress.training.rows_through)?;
        let writer = Writer::new(&self.folder.checkpoint(), Some(metrics.handle()?));
        let steps = Steps::new(&mut self.trainer, text, 0, self.progress, writer, checkpoint_interval)?;
        let mut loop_ = Loop { steps, metrics, held_out, cancelled, measured: None };
        match loop_.run(total, tell) {
            Ok(()) => loop_.metrics.sync()?,
            Err(TrainingError::Steps(StepsError::Trainer(TrainerError::Cancelled))) => {
                loop_.steps.save()?;
                return Err(TrainingError::Stopped { step: loop_.steps.done(), steps: total });
            }
            Err(error) => return Err(error),
        }
        Ok(Trained { parameters: loop_.steps.finish()?.parameters, held_out: loop_.measured })
    }
}

/// A training that runs.
struct Loop<'a> {
    steps: Steps<'a, Training>,
    metrics: Metrics,
    held_out: Option<&'a HeldOut>,
    cancelled: &'a dyn Fn() -> bool,
    /// What was measured last.
    measured: Option<EvaluationSum>,
}

impl Loop<'_> {
    fn run(&mut self, total: u64, tell: &mut dyn FnMut(LocalProgress)) -> Result<(), TrainingError> {
        loop {
            let step = self.steps.done();
            // A row that is due may be one that an earlier process was stopped before.
            let Training { plan, rows_through, .. } = self.steps.training();
            if plan.has_row(step) && *rows_through != Some(step) {
                let latest = self.write_row(step)?;
                tell(self.progress(latest));
            }
            if step == total {
                return Ok(());
            }
            self.steps.save_if_due()?;
            if let Some(latest) = self.steps.step(self.cancelled)? {
                tell(self.progress(latest));
            }
        }
    }

    fn progress(&self, latest: Tally) -> LocalProgress {
        let held_out_loss = self.measured.as_ref().map(EvaluationSum::loss);
        LocalProgress { step: self.steps.done(), latest, held_out_loss }
    }

    /// Measures, if it is time to, and writes the row of the steps since the last one. Cancelled, it leaves
    /// all to be done again.
    fn write_row(&mut self, step: u64) -> Result<Tally, TrainingError> {
        let mut held_out_loss = None;
        if self.steps.training().plan.is_measured(step)
            && let Some(held_out) = self.held_out
        {
            let cancelled = self.cancelled;
            let sum = self.steps.aside(|trainer| {
                let evaluate =
                    |windows: &mut dyn Iterator<Item = Vec<i64>>| trainer.evaluate(windows, cancelled);
                steps::held_out_loss::<StepsError>(held_out, &|_| (), evaluate)
            })??;
            held_out_loss = Some(sum.loss());
            self.measured = Some(sum);
        }
        let tally = self.steps.take_tally()?;
        let training = self.steps.training();
        training.tokens += tally.tokens;
        training.seconds += tally.seconds;
        training.rows_through = Some(step);
        let Training { tokens, seconds, .. } = *training;
        self.metrics.write(&Row { step, tokens, seconds, tally, held_out_loss })?;
        Ok(tally)
    }
}
