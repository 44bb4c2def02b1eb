//! The local steps of a round: the loop that runs on the trainer's thread, and its checkpoints. Also the
//! loss on held-out text.
//!
//! No network here. The loop ends early only when it is cancelled, and then leaves a checkpoint.

#[cfg(test)]
mod tests;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use consort_common::{ids::Digest, spec::OptimizerState};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    data::{Cursor, Feed, HeldOut, Sampler},
    model_file::ModelFile,
    prepare::Material,
    progress::Activity,
    trainer::{
        EvaluationSum, Moments, Trainer, TrainerError,
        checkpoint::{self, CheckpointError, Progress},
    },
    work::{TrainTask, WorkError},
};

/// Least time between two readings of the loss: each waits for the device.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);
/// Steps in a row without an update before a round is given up: the loss was not finite in any of them.
const STEPS_WITHOUT_UPDATE_MAX: u64 = 20;

/// A round to be trained.
pub struct Job {
    /// The run's.
    pub material: Arc<Material>,
    /// The round.
    pub task: TrainTask,
    /// File of its base model.
    pub base: PathBuf,
    /// Time between two checkpoints.
    pub checkpoint_interval: Duration,
    /// Where progress goes.
    pub activity: Activity,
    /// Ends the round early.
    pub cancel: CancellationToken,
}

/// A round that was trained.
pub struct Trained {
    /// The local model's flat vector.
    pub parameters: Vec<f32>,
    /// The optimizer's state after the last step.
    pub moments: Moments,
    /// Where the training ended, the sampler's cursor included.
    pub progress: Progress,
    /// Mean over the steps, in nats per token.
    pub train_loss: f64,
}

/// Where a site stands in its text; stored as the `cursor` of the trainer's progress. The base and the
/// first step tell the round of one history of a run from that of another.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Position {
    base_digest: Digest,
    first_step: u64,
    /// Which text the cursor belongs to.
    text: Digest,
    cursor: Cursor,
}

/// Trains the round from its checkpoint, or from its beginning.
///
/// # Errors
/// [`WorkError::Cancelled`] after a checkpoint was written; or what failed.
pub fn train(trainer: &mut Trainer, job: &Job) -> Result<Trained, WorkError> {
    let begun = match resume(trainer, job)? {
        Some(begun) => begun,
        None => begin(trainer, job)?,
    };
    let mut steps = Steps::new(trainer, job, begun)?;
    while steps.progress.steps < u64::from(job.task.steps) {
        if let Err(error) = steps.step() {
            if matches!(error, WorkError::Cancelled) {
                steps.save()?;
            }
            return Err(error);
        }
    }
    steps.finish()
}

/// What a round, or the rest of it, starts with besides what the trainer holds.
struct Begun {
    progress: Progress,
    cursor: Cursor,
}

/// Loads the round's checkpoint into the trainer, if there is one of this very round.
fn resume(trainer: &mut Trainer, job: &Job) -> Result<Option<Begun>, WorkError> {
    let path = job.material.directory.checkpoint();
    let Some(checkpoint) = load(&path)? else { return Ok(None) };
    let Some(position) = position(&checkpoint.progress) else { return Ok(None) };
    let progress = checkpoint.progress;
    let same = progress.spec == job.task.run.spec_digest
        && progress.round == job.task.round
        && position.base_digest == job.task.base_digest
        && position.first_step == job.task.first_step
        && progress.steps <= u64::from(job.task.steps);
    if !same {
        return Ok(None);
    }
    trainer.load(&checkpoint.parameters)?;
    trainer.load_moments(&checkpoint.moments)?;
    info!("round {}: going on after step {} of {}", job.task.round, progress.steps, job.task.steps);
    let cursor = job.cursor(&position);
    Ok(Some(Begun { progress, cursor }))
}

/// Loads the base model into the trainer, and what the site carries over from its last round.
fn begin(trainer: &mut Trainer, job: &Job) -> Result<Begun, WorkError> {
    let task = &job.task;
    trainer.load(ModelFile::open(&job.base)?.values())?;
    trainer.reset_moments()?;
    let directory = &job.material.directory;
    let mut cursor = Cursor::default();
    if let Some(round) = directory.site_state_before(task.round)?
        && let Some(carried) = load(&directory.site_state(round))?
    {
        cursor = position(&carried.progress).map(|position| job.cursor(&position)).unwrap_or_default();
        if job.material.spec.training.optimizer_state == OptimizerState::Keep {
            trainer.load_moments(&carried.moments)?;
        }
    }
    let progress = Progress {
        run: task.run.name.clone(),
        spec: task.run.spec_digest,
        round: task.round,
        steps: 0,
        cursor: serde_json::Value::Null,
        loss_sum: 0.0,
        tokens: 0,
        seconds: 0.0,
    };
    Ok(Begun { progress, cursor })
}

/// A checkpoint, unless there is none or it is damaged.
fn load(path: &Path) -> Result<Option<checkpoint::Checkpoint>, WorkError> {
    match checkpoint::load(path) {
        Ok(checkpoint) => Ok(checkpoint),
        Err(error @ CheckpointError::Damaged { .. }) => {
            warn!("{error}");
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

fn position(progress: &Progress) -> Option<Position> {
    serde_json::from_value(progress.cursor.clone()).ok()
}

impl Job {
    /// Where to go on in the text; at its beginning when it is another text by now.
    fn cursor(&self, position: &Position) -> Cursor {
        if position.text == self.material.dataset.key {
            return position.cursor;
        }
        warn!("the site's text has changed: training goes on at its beginning");
        Cursor::default()
    }
}

/// The round in progress.
struct Steps<'a> {
    trainer: &'a mut Trainer,
    job: &'a Job,
    feed: Feed,
    progress: Progress,
    /// Steps whose loss was not read yet.
    steps_unread: u64,
    steps_without_update: u64,
    /// Latest mean, in nats per token.
    loss: Option<f64>,
    /// When the loss was read last, and the tokens trained until then.
    read: (Instant, u64),
    /// When this part of the round began.
    began: Instant,
    /// When the time in `progress` was last brought up to date.
    clocked: Instant,
    saved: Instant,
}

impl<'a> Steps<'a> {
    fn new(trainer: &'a mut Trainer, job: &'a Job, begun: Begun) -> Result<Self, WorkError> {
        let material = &job.material;
        let sequence_length = material.spec.training.sequence_length as usize;
        let train = material.dataset.train.clone();
        let mut sampler = Sampler::new(train, sequence_length, material.spec.seed, material.site.as_str())?;
        sampler.seek(begun.cursor);
        let feed = Feed::new(sampler, material.spec.training.batch_size as usize)?;
        let now = Instant::now();
        Ok(Self {
            trainer,
            job,
            feed,
            began: now,
            read: (now, begun.progress.tokens),
            progress: begun.progress,
            steps_unread: 0,
            steps_without_update: 0,
            loss: None,
            clocked: now,
            saved: now,
        })
    }

    /// One step, and what is due after it. After [`WorkError::Cancelled`] all is as before the step.
    fn step(&mut self) -> Result<(), WorkError> {
        let job = self.job;
        let step = job.task.first_step + self.progress.steps;
        match self.trainer.step(self.feed.next_batch()?, step, &|| job.cancel.is_cancelled()) {
            Ok(outcome) => {
                self.progress.steps += 1;
                self.progress.tokens += outcome.tokens;
                self.steps_unread += 1;
            }
            Err(error) => {
                self.feed.put_back();
                return Err(error.into());
            }
        }
        if self.read.0.elapsed() >= REPORT_INTERVAL {
            self.read_loss()?;
        }
        if self.saved.elapsed() >= job.checkpoint_interval {
            self.save()?;
        }
        Ok(())
    }

    /// Brings the loss up to date and reports. Steps without an update are borne for a while.
    fn read_loss(&mut self) -> Result<(), WorkError> {
        match self.trainer.take_loss() {
            Ok(Some(loss)) => {
                #[allow(clippy::cast_precision_loss)]
                let steps = self.steps_unread as f64;
                self.progress.loss_sum += loss * steps;
                self.loss = Some(loss);
                self.steps_without_update = 0;
            }
            Ok(None) => {}
            Err(TrainerError::Diverged { step, steps }) => {
                self.steps_without_update += steps;
                if self.steps_without_update >= STEPS_WITHOUT_UPDATE_MAX {
                    return Err(TrainerError::Diverged { step, steps: self.steps_without_update }.into());
                }
                // They count with the loss of the steps before them, so that the mean stays a mean.
                #[allow(clippy::cast_precision_loss)]
                let steps = steps as f64;
                self.progress.loss_sum += self.loss.unwrap_or_default() * steps;
            }
            Err(error) => return Err(error.into()),
        }
        self.steps_unread = 0;
        let (since, tokens) = std::mem::replace(&mut self.read, (Instant::now(), self.progress.tokens));
        #[allow(clippy::cast_precision_loss)]
        let tokens_per_second =
            (self.progress.tokens - tokens) as f64 / since.elapsed().as_secs_f64().max(1e-9);
        self.job.activity.trained(self.progress.steps, tokens_per_second, self.loss);
        Ok(())
    }

    /// Where the round stands, complete.
    fn progress(&mut self) -> Progress {
        self.progress.seconds += std::mem::replace(&mut self.clocked, Instant::now()).elapsed().as_secs_f64();
        let position = Position {
            base_digest: self.job.task.base_digest,
            first_step: self.job.task.first_step,
            text: self.job.material.dataset.key,
            cursor: self.feed.cursor(),
        };
        // A struct of numbers and texts always has a value.
        let cursor = serde_json::to_value(position).unwrap_or_default();
        Progress { cursor, ..self.progress.clone() }
    }

    /// Writes a checkpoint.
    fn save(&mut self) -> Result<(), WorkError> {
        self.read_loss()?;
        let progress = self.progress();
        let path = self.job.material.directory.checkpoint();
        checkpoint::save(&path, &progress, &self.trainer.parameters()?, &self.trainer.moments()?)?;
        self.saved = Instant::now();
        Ok(())
    }

    fn finish(mut self) -> Result<Trained, WorkError> {
        self.read_loss()?;
        let waited = self.feed.waited().as_secs_f64() / self.began.elapsed().as_secs_f64().max(1e-9);
        info!(
            "round {}: {} steps are done, {:.2}% of the time went into waiting for data",
            self.job.task.round,
            self.progress.steps,
            waited * 100.0
        );
        #[allow(clippy::cast_precision_loss)]
        let train_loss = self.progress.loss_sum / self.progress.steps.max(1) as f64;
        Ok(Trained {
            parameters: self.trainer.parameters()?,
            moments: self.trainer.moments()?,
            progress: self.progress(),
            train_loss,
        })
    }
}

/// The loss of the trainer's model on the site's held-out text, and the bytes of that text.
///
/// # Errors
/// If the text is too short or cannot be read, or the evaluation is cancelled.
pub fn held_out_loss(
    trainer: &Trainer,
    material: &Material,
    activity: &Activity,
    cancel: &CancellationToken,
) -> Result<(EvaluationSum, u64), WorkError> {
    let sequence_length = material.spec.training.sequence_length as usize;
    let held_out = HeldOut::new(
        material.dataset.held_out.clone(),
        sequence_length,
        material.spec.evaluation.tokens_max,
    )?;
    let mut damage = None;
    let mut tokens = 0;
    let windows = held_out.batches(1).map_while(|window| {
        tokens += sequence_length as u64;
        activity.done_of(tokens, held_out.tokens());
        window.map_err(|error| damage = Some(error)).ok()
    });
    let sum = trainer.evaluate(windows, &|| cancel.is_cancelled())?;
    match damage {
        Some(error) => Err(error.into()),
        None => Ok((sum, held_out.text_bytes())),
    }
}
