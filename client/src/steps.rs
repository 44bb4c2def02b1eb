//! Optimizer steps one after the other: batches of the text into the trainer, what is known of the steps, and
//! the local checkpoint. The rounds of a federation (`local_steps`) and training alone (`local_training`) are
//! this loop; they differ in who says where it begins and ends, and in what becomes of its numbers.
//!
//! Everything that a training goes on with is in its [`Checkpoint`]: parameters, optimizer state, the text's
//! cursor, the number of steps (from which the learning rate follows) and the numbers not yet reported. Nothing
//! here draws random numbers. Resumed on a CPU with as many threads, a training gives the same bits.

use std::time::{Duration, Instant};

use consort_common::{ids::Digest, spec::RunSpec};
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::{
    data::{Cursor, DataError, Dataset, Feed, HeldOut, Sampler},
    trainer::{
        EvaluationSum, StepResult, Trainer, TrainerError,
        checkpoint::{Checkpoint, CheckpointError, Writer},
    },
};

/// Least time between two readings of the steps' results: each waits for the device.
const READ_INTERVAL: Duration = Duration::from_secs(1);
/// Steps in a row without an update before a training is given up: loss or gradient were not finite in any.
const STEPS_WITHOUT_UPDATE_MAX: u64 = 20;
/// Checkpoints in a row that cannot be written before a training is given up: a full disk may be seen to.
const CHECKPOINTS_FAILED_MAX: u32 = 5;

/// Why a training cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum StepsError {
    /// The text.
    #[error(transparent)]
    Data(#[from] DataError),
    /// A step failed, training diverged, or it was cancelled.
    #[error(transparent)]
    Trainer(#[from] TrainerError),
    /// A checkpoint cannot be written.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

/// Where a training stands. `T` says which one it is, and what its owner keeps with it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress<T> {
    /// The training.
    pub training: T,
    /// Which text the cursor belongs to.
    pub text: Digest,
    /// Where the next batch begins.
    pub cursor: Cursor,
    /// Steps done.
    pub steps: u64,
    /// Of the steps since the last [`Steps::take_tally`].
    pub tally: Tally,
}

impl<T> Progress<T> {
    /// The same of another training.
    pub fn of<U>(self, training: U) -> Progress<U> {
        let Self { text, cursor, steps, tally, .. } = self;
        Progress { training, text, cursor, steps, tally }
    }
}

/// What a row of steps came to.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tally {
    /// Steps that made an update.
    pub updates: u64,
    /// Tokens of all steps.
    pub tokens: u64,
    /// Sum of the updates' losses, nats per token, in the order of the steps.
    #[serde(with = "exact")]
    pub loss_sum: f64,
    /// Sum of the updates' gradient norms before clipping, in the order of the steps.
    #[serde(with = "exact")]
    pub gradient_norm_sum: f64,
    /// Learning rate of the last step.
    #[serde(with = "exact")]
    pub learning_rate: f64,
    /// Time that they took.
    pub seconds: f64,
    /// Time of it that was spent waiting for batches.
    pub waited_seconds: f64,
}

/// Numbers as texts: `serde_json` may read a number with an error in its last bit.
mod exact {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[allow(clippy::cast_precision_loss)]
impl Tally {
    fn add(&mut self, results: &[StepResult], tokens: u64, seconds: f64, waited_seconds: f64) {
        for result in results.iter().filter(|result| result.is_update()) {
            self.updates += 1;
            self.loss_sum += f64::from(result.loss);
            self.gradient_norm_sum += f64::from(result.gradient_norm);
        }
        self.tokens += tokens;
        self.seconds += seconds;
        self.waited_seconds += waited_seconds;
    }

    /// Mean loss of the updates, nats per token; nothing if there were none.
    pub fn loss(&self) -> Option<f64> {
        (self.updates > 0).then(|| self.loss_sum / self.updates as f64)
    }

    /// Mean norm of the updates' gradients before clipping; nothing if there were none.
    pub fn gradient_norm(&self) -> Option<f64> {
        (self.updates > 0).then(|| self.gradient_norm_sum / self.updates as f64)
    }

    /// Tokens per second.
    pub fn tokens_per_second(&self) -> f64 {
        self.tokens as f64 / self.seconds.max(1e-9)
    }

    /// Share of the time that was spent waiting for batches, 0 to 1.
    pub fn waited_share(&self) -> f64 {
        self.waited_seconds / self.seconds.max(1e-9)
    }
}

/// What is trained on, in which order.
#[derive(Clone, Copy)]
pub struct Text<'a> {
    /// The run's specification.
    pub spec: &'a RunSpec,
    /// The text, tokenised.
    pub dataset: &'a Dataset,
    /// The site, which chooses the order.
    pub site: &'a str,
}

impl Text<'_> {
    fn feed(&self, cursor: &Cursor) -> Result<Feed, DataError> {
        let training = &self.spec.training;
        let train = self.dataset.train.clone();
        let mut sampler = Sampler::new(train, training.sequence_length as usize, self.spec.seed, self.site)?;
        sampler.seek(cursor);
        Feed::new(sampler, training.batch_size as usize)
    }
}

/// A training in progress. `T` as in [`Progress`].
pub struct Steps<'a, T> {
    trainer: &'a mut Trainer,
    feed: Feed,
    first_step: u64,
    progress: Progress<T>,
    /// Tokens of the steps whose results were not read yet.
    tokens_unread: u64,
    steps_without_update: u64,
    /// Up to when time is counted, and how long batches were waited for until then.
    clock: (Instant, Duration),
    writer: Writer,
    checkpoint_interval: Duration,
    saved: Instant,
    /// In a row.
    checkpoints_failed: u32,
}

impl<'a, T: Clone + Serialize + Send + 'static> Steps<'a, T> {
    /// Goes on at `progress`, whose parameters and moments the trainer has, in the text that it belongs to.
    /// `first_step` is the run's cumulative step before this training's first. Checkpoints are due every
    /// `checkpoint_interval`.
    ///
    /// # Errors
    /// The text is shorter than a sequence, or there can be no thread that reads it.
    pub fn new(
        trainer: &'a mut Trainer,
        text: Text<'_>,
        first_step: u64,
        progress: Progress<T>,
        writer: Writer,
        checkpoint_interval: Duration,
    ) -> Result<Self, StepsError> {
        let clock = (Instant::now(), Duration::ZERO);
        let feed = text.feed(&progress.cursor)?;
        // What a training that was given up did not read is none of this one's.
        trainer.take_results()?;
        Ok(Self {
            trainer,
            feed,
            first_step,
            progress,
            tokens_unread: 0,
            steps_without_update: 0,
            clock,
            writer,
            checkpoint_interval,
            saved: Instant::now(),
            checkpoints_failed: 0,
        })
    }

    /// Steps done.
    pub fn done(&self) -> u64 {
        self.progress.steps
    }

    /// What the owner keeps with the training.
    pub fn training(&mut self) -> &mut T {
        &mut self.progress.training
    }

    /// One step; and, about once a second, what the steps since the last such reading came to. After
    /// [`TrainerError::Cancelled`] all is as before the step.
    ///
    /// # Errors
    /// The step failed or was cancelled, or too many in a row made no update.
    pub fn step(&mut self, cancelled: &dyn Fn() -> bool) -> Result<Option<Tally>, StepsError> {
        let step = self.first_step + self.progress.steps;
        let outcome = match self.trainer.step(self.feed.next_batch()?, step, cancelled) {
            Ok(outcome) => outcome,
            Err(error) => {
                self.feed.put_back();
                return Err(error.into());
            }
        };
        self.progress.steps += 1;
        self.progress.tally.learning_rate = outcome.learning_rate;
        self.tokens_unread += outcome.tokens;
        if self.clock.0.elapsed() < READ_INTERVAL {
            return Ok(None);
        }
        self.read().map(Some)
    }

    /// Reads the results of the steps since the last reading, and the clock. Waits for the device.
    fn read(&mut self) -> Result<Tally, StepsError> {
        let results = self.trainer.take_results()?;
        let (since, waited_since) = std::mem::replace(&mut self.clock, (Instant::now(), self.feed.waited()));
        let seconds = (self.clock.0 - since).as_secs_f64();
        let waited = (self.clock.1 - waited_since).as_secs_f64();
        let tokens = std::mem::take(&mut self.tokens_unread);
        let mut latest = Tally { learning_rate: self.progress.tally.learning_rate, ..Tally::default() };
        for tally in [&mut latest, &mut self.progress.tally] {
            tally.add(&results, tokens, seconds, waited);
        }
        self.judge(&results)?;
        Ok(latest)
    }

    /// Steps without an update are borne for a while.
    fn judge(&mut self, results: &[StepResult]) -> Result<(), TrainerError> {
        let skipped = results.iter().filter(|result| !result.is_update()).count();
        let in_a_row = results.iter().rev().take_while(|result| !result.is_update()).count() as u64;
        let all = in_a_row == results.len() as u64;
        self.steps_without_update = if all { self.steps_without_update + in_a_row } else { in_a_row };
        let step = self.first_step + self.progress.steps;
        if self.steps_without_update >= STEPS_WITHOUT_UPDATE_MAX {
            return Err(TrainerError::Diverged { step, steps: self.steps_without_update });
        }
        if skipped > 0 {
            let steps = results.len();
            warn!(
                "{skipped} of {steps} steps up to step {step} of the run made no update: loss or gradient was not finite"
            );
        }
        Ok(())
    }

    /// What the steps since the last call came to. Waits for the device.
    ///
    /// # Errors
    /// libtorch failed, or too many steps made no update.
    pub fn take_tally(&mut self) -> Result<Tally, StepsError> {
        self.read()?;
        Ok(std::mem::take(&mut self.progress.tally))
    }

    /// Does something else with the trainer, whose time is not the training's.
    ///
    /// # Errors
    /// As [`Steps::take_tally`].
    pub fn aside<R>(&mut self, job: impl FnOnce(&Trainer) -> R) -> Result<R, StepsError> {
        self.read()?;
        let result = job(self.trainer);
        self.clock.0 = Instant::now();
        Ok(result)
    }

    /// Begins to write a checkpoint if it is time for one and the last one is written. The training pays for the
    /// copy out of the device. A checkpoint that could not be written is borne: what was there before still is,
    /// and this one is the next attempt.
    ///
    /// # Errors
    /// As [`Steps::take_tally`], or too many checkpoints in a row could not be written.
    pub fn save_if_due(&mut self) -> Result<(), StepsError> {
        if self.saved.elapsed() < self.checkpoint_interval || self.writer.is_busy() {
            return Ok(());
        }
        let before = self.writer.wait();
        let begun = self.begin_to_save()?;
        let Err(error) = before.and(begun) else {
            self.checkpoints_failed = 0;
            return Ok(());
        };
        self.checkpoints_failed += 1;
        if self.checkpoints_failed >= CHECKPOINTS_FAILED_MAX {
            return Err(error.into());
        }
        warn!("{error}; training goes on and tries it again");
        Ok(())
    }

    /// Writes a checkpoint; durable on return.
    ///
    /// # Errors
    /// As [`Steps::take_tally`], or it cannot be written.
    pub fn save(&mut self) -> Result<(), StepsError> {
        self.settle();
        self.begin_to_save()??;
        Ok(self.writer.wait()?)
    }

    /// Waits for the checkpoint under way, whose copy is then gone from memory. What it came to no longer
    /// counts: a newer one follows, or none is needed.
    fn settle(&mut self) {
        if let Err(error) = self.writer.wait() {
            warn!("{error}");
        }
    }

    /// Only while none is under way: there is memory for one copy. The inner error is the writer's.
    fn begin_to_save(&mut self) -> Result<Result<(), CheckpointError>, StepsError> {
        self.saved = Instant::now();
        let checkpoint = self.checkpoint()?;
        Ok(self.writer.begin(checkpoint))
    }

    /// Where the training has come to; the trainer has the parameters and moments. No checkpoint is being written
    /// any more.
    ///
    /// # Errors
    /// As [`Steps::take_tally`].
    pub fn pause(mut self) -> Result<Progress<T>, StepsError> {
        self.settle();
        self.read()?;
        self.progress.cursor = self.feed.cursor();
        Ok(self.progress)
    }

    fn checkpoint(&mut self) -> Result<Checkpoint<Progress<T>>, StepsError> {
        self.read()?;
        self.progress.cursor = self.feed.cursor();
        Ok(Checkpoint {
            progress: self.progress.clone(),
            parameters: self.trainer.parameters()?,
            moments: self.trainer.moments()?,
        })
    }

    /// Where the training has come to. No checkpoint is being written any more.
    ///
    /// # Errors
    /// As [`Steps::take_tally`].
    pub fn finish(mut self) -> Result<Checkpoint<Progress<T>>, StepsError> {
        self.settle();
        self.checkpoint()
    }
}

/// The loss on held-out text that `evaluate` finds over its windows. `tell` is told how many tokens were handed
/// out.
///
/// # Errors
/// The text is damaged, or as `evaluate`.
pub fn held_out_loss<E: From<DataError> + From<TrainerError>>(
    held_out: &HeldOut,
    tell: &dyn Fn(u64),
    evaluate: impl FnOnce(&mut dyn Iterator<Item = Vec<i64>>) -> Result<EvaluationSum, TrainerError>,
) -> Result<EvaluationSum, E> {
    let mut damage = None;
    let mut tokens = 0;
    let mut windows = held_out.windows().map_while(|window| {
        let window = window.map_err(|error| damage = Some(error)).ok()?;
        tokens += window.len().saturating_sub(1) as u64;
        tell(tokens);
        Some(window)
    });
    let sum = evaluate(&mut windows)?;
    damage.map_or(Ok(sum), |error| Err(error.into()))
}
