//! The local steps of a round: what they begin with, how far they go, and what a site carries from round to
//! round. Also the loss on held-out text.
//!
//! No network here. The loop ends early only when it is cancelled, and then leaves a checkpoint.

#[cfg(test)]
mod tests;

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use consort_common::{ids::Digest, spec::OptimizerState};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    data::{Cursor, HeldOut},
    model_file::ModelFile,
    overlap::{self, Ahead, Coming, FirstSteps},
    prepare::Material,
    progress::Activity,
    steps::{self, Steps, StepsError, Tally},
    trainer::{
        EvaluationSum, Moments, Trainer, TrainerError,
        checkpoint::{self, Checkpoint, CheckpointError, Writer},
    },
    work::{TrainTask, WorkError},
};

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
    /// Counts the steps that are taken ahead of the base model.
    pub steps_ahead: Arc<AtomicU32>,
    /// Ends the round early.
    pub cancel: CancellationToken,
}

/// A round that was trained.
pub struct Trained {
    /// The local model's flat vector.
    pub parameters: Vec<f32>,
    /// The optimizer's state after the last step.
    pub moments: Moments,
    /// Where the training ended, the text's cursor included.
    pub progress: Progress,
    /// Mean over the updates, in nats per token.
    pub train_loss: f64,
    /// Since when it had waited for the base model, if it began without it.
    pub waited_since: Option<Instant>,
}

/// Where the training of a round stands.
pub type Progress = steps::Progress<RoundId>;

/// Which round it is. The base and the first step tell the round of one history of a run from that of another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RoundId {
    /// Digest of the run's specification.
    spec: Digest,
    round: u32,
    base: Digest,
    first_step: u64,
}

impl RoundId {
    fn of(task: &TrainTask) -> Self {
        let TrainTask { round, first_step, .. } = *task;
        Self { spec: task.run.spec_digest, round, base: task.base_digest, first_step }
    }
}

/// Trains the round from its checkpoint, from its first steps, or from its beginning. With streaming, the trainer then
/// holds the first steps of the next round: none yet.
///
/// # Errors
/// [`WorkError::Cancelled`] after a checkpoint was written; or what failed.
pub fn train(trainer: &mut Trainer, held: &mut Option<FirstSteps>, job: &Job) -> Result<Trained, WorkError> {
    let (progress, waited_since) = match resume(trainer, held, job)? {
        Some(progress) => (progress, None),
        None => begin(trainer, held, job)?,
    };
    let mut steps = job.steps(trainer, progress)?;
    let mut loss = None;
    while steps.done() < u64::from(job.task.steps) {
        match steps.step(&|| job.cancel.is_cancelled()) {
            Ok(None) => {}
            Ok(Some(latest)) => {
                loss = latest.loss().or(loss);
                job.activity.trained(steps.done(), latest.tokens_per_second(), loss);
            }
            Err(error) => {
                if matches!(error, StepsError::Trainer(TrainerError::Cancelled)) {
                    steps.save()?;
                }
                return Err(error.into());
            }
        }
        // After the last step the result is at hand, and is kept at once.
        if steps.done() < u64::from(job.task.steps) {
            steps.save_if_due()?;
        }
    }
    let Checkpoint { progress, parameters, moments } = steps.finish()?;
    let none =
        || TrainerError::Diverged { step: job.task.first_step + progress.steps, steps: progress.steps };
    let train_loss = progress.tally.loss().ok_or_else(none)?;
    job.activity.trained(progress.steps, progress.tally.tokens_per_second(), loss.or(Some(train_loss)));
    if job.material.spec.outer.streaming.is_some() {
        *held = Some(FirstSteps::none(Coming::next(&job.task, &job.material), &progress));
        job.steps_ahead.store(0, Ordering::Relaxed);
    }
    Ok(Trained { parameters, moments, progress, train_loss, waited_since })
}

/// Loads the round's checkpoint into the trainer, if there is one of this very round.
fn resume(
    trainer: &mut Trainer,
    held: &mut Option<FirstSteps>,
    job: &Job,
) -> Result<Option<Progress>, WorkError> {
    let Some(checkpoint) = load(&job.material.directory.checkpoint())? else { return Ok(None) };
    let progress = checkpoint.progress;
    if progress.training != RoundId::of(&job.task) || progress.steps > u64::from(job.task.steps) {
        return Ok(None);
    }
    *held = None;
    trainer.load(&checkpoint.parameters)?;
    trainer.load_moments(&checkpoint.moments)?;
    info!("round {}: going on after step {} of {}", job.task.round, progress.steps, job.task.steps);
    Ok(Some(in_todays_text(&job.material, progress)))
}

/// With streaming, mixes what the base model has of the fragment that made it into the site's model, once the first
/// steps are taken; since when they were is returned, too. Else, and where the site has no model to go on with,
/// loads the base model into the trainer, and what the site carries over from its last round.
fn begin(
    trainer: &mut Trainer,
    held: &mut Option<FirstSteps>,
    job: &Job,
) -> Result<(Progress, Option<Instant>), WorkError> {
    let (material, task) = (&job.material, &job.task);
    let ahead = Ahead {
        material: material.clone(),
        coming: Coming::this(task),
        steps_taken: job.steps_ahead.clone(),
        cancel: job.cancel.clone(),
    };
    if let Some(streaming) = &material.spec.outer.streaming
        && ahead.take(trainer, held)?
        && let Some(FirstSteps { progress, since }) = held.take()
    {
        let mut parameters = trainer.parameters()?;
        let base = ModelFile::open(&job.base)?;
        overlap::mix(streaming.mixing, material.fragment(task.round - 1), &mut parameters, base.values());
        trainer.load(&parameters)?;
        return Ok((progress.of(RoundId::of(task)), Some(since)));
    }
    *held = None;
    Ok((begin_with_base(trainer, job)?, None))
}

fn begin_with_base(trainer: &mut Trainer, job: &Job) -> Result<Progress, WorkError> {
    let task = &job.task;
    trainer.load(ModelFile::open(&job.base)?.values())?;
    trainer.reset_moments()?;
    let directory = &job.material.directory;
    let mut progress = Progress {
        training: RoundId::of(task),
        text: job.material.dataset.key,
        cursor: Cursor::default(),
        steps: 0,
        tally: Tally::default(),
    };
    if let Some(round) = directory.site_state_before(task.round)?
        && let Some(carried) = load(&directory.site_state(round))?
    {
        let Progress { text, cursor, .. } = carried.progress;
        progress = in_todays_text(&job.material, Progress { text, cursor, ..progress });
        if job.material.spec.training.optimizer_state == OptimizerState::Keep {
            trainer.load_moments(&carried.moments)?;
        }
    }
    Ok(progress)
}

/// A checkpoint, unless there is none or it is damaged.
pub(crate) fn load(path: &Path) -> Result<Option<Checkpoint<Progress>>, WorkError> {
    match checkpoint::load(path) {
        Ok(checkpoint) => Ok(checkpoint),
        Err(error @ CheckpointError::Damaged { .. }) => {
            warn!("{error}; what it was for begins anew");
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

impl Job {
    /// The steps of the round from `progress` on.
    fn steps<'a>(
        &self,
        trainer: &'a mut Trainer,
        progress: Progress,
    ) -> Result<Steps<'a, RoundId>, StepsError> {
        let text = self.material.training_text();
        let writer = Writer::new(&self.material.directory.checkpoint(), None);
        Steps::new(trainer, text, self.task.first_step, progress, writer, self.checkpoint_interval)
    }
}

/// The same, at the text's beginning when it is another text by now.
pub(crate) fn in_todays_text<T>(material: &Material, progress: steps::Progress<T>) -> steps::Progress<T> {
    let text = material.dataset.key;
    if progress.text == text {
        return progress;
    }
    warn!("the site's text has changed: training goes on at its beginning");
    steps::Progress { text, cursor: Cursor::default(), ..progress }
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
    let tell = |tokens| activity.done_of(tokens, held_out.tokens());
    let cancelled = || cancel.is_cancelled();
    let evaluate = |windows: &mut dyn Iterator<Item = Vec<i64>>| trainer.evaluate(windows, &cancelled);
    let sum = steps::held_out_loss::<WorkError>(&held_out, &tell, evaluate)?;
    Ok((sum, held_out.text_bytes()))
}
