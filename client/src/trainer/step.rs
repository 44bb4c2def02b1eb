//! One optimizer step: batch, forward, backward, clip, update. Nothing in it waits for the device.

use std::time::{Duration, Instant};

use consort_common::{model::Architecture, schedule::Schedule, spec::TrainingSpec};
use tch::{Device, Kind, TchError, Tensor};

use super::{
    LanguageModel, checked_manifest,
    device::{release_unused, synchronize, upload},
    error::{Doing, TrainerError},
    micro_batch::MicroBatch,
    optimizer::{Control, Moments, Optimizer},
    parameters::{Parameters, copy_out},
    zero,
};

/// One model in training, on one device. All its tensors belong to the thread that calls it.
pub struct Trainer {
    pub(super) model: LanguageModel,
    device: Device,
    pub(super) micro_batch: MicroBatch,
    parameters: Parameters,
    optimizer: Optimizer,
    schedule: Schedule,
    run_steps: u64,
    batch: usize,
    /// Tokens that a sequence predicts.
    sequence: usize,
    gradient_clip: f64,
    /// What the steps since the last reading came to, each f32 `[2]` on the device: loss and gradient norm.
    unread: Vec<Tensor>,
    /// Where the time goes, if that is measured.
    clock: Option<Clock>,
}

/// Time that steps spent, by what they did.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Phases {
    /// The blocks, from tokens to what the output projection is given.
    pub forward: Duration,
    /// The output projection and the loss, forward and backward at once.
    pub head: Duration,
    /// The blocks, backward.
    pub backward: Duration,
    /// The gradient's norm and the optimizer.
    pub update: Duration,
}

struct Clock {
    phases: Phases,
    lap: Instant,
}

/// What a step came to, as the device found it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepResult {
    /// Nats per token.
    pub loss: f32,
    /// L2 norm of the gradient before clipping.
    pub gradient_norm: f32,
}

impl StepResult {
    /// Whether parameters and moments were updated: not where a number was not finite.
    pub fn is_update(&self) -> bool {
        (self.loss + self.gradient_norm).is_finite()
    }
}

/// What is known of a step before the device has made it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepOutcome {
    /// Tokens that it trains.
    pub tokens: u64,
    /// The learning rate used.
    pub learning_rate: f64,
}

impl Trainer {
    /// A trainer with zeroed parameters ([`Trainer::load`] comes next) and moments. `run_steps` is the
    /// number of optimizer steps in the whole run, over which the schedule extends; `end_of_text` the token
    /// that parts documents.
    ///
    /// # Errors
    /// The settings contradict each other, or the device's memory does not suffice.
    pub fn new(
        architecture: &Architecture,
        training: &TrainingSpec,
        run_steps: u64,
        end_of_text: u32,
        device: Device,
    ) -> Result<Self, TrainerError> {
        let [batch, micro_batch, sequence] =
            [training.batch_size, training.micro_batch_size, training.sequence_length]
                .map(|size| size as usize);
        if batch == 0 || (micro_batch > 0 && batch % micro_batch != 0) {
            let problem = format!("micro_batch_size {micro_batch} does not divide batch_size {batch}");
            return Err(TrainerError::Settings(problem));
        }
        if sequence == 0 || sequence > architecture.context_length() {
            let context = architecture.context_length();
            let problem =
                format!("sequence_length is {sequence}, allowed: 1 to the model's context of {context}");
            return Err(TrainerError::Settings(problem));
        }
        let manifest = checked_manifest(architecture)?;
        let parameters = Parameters::new(&manifest, training.precision, device)?;
        let mut model = LanguageModel::over(architecture, &parameters, device)?;
        if training.document_mask {
            model = model.with_documents_apart(end_of_text);
        }
        let optimizer = Optimizer::new(&training.optimizer, &parameters, device)?;
        Ok(Self {
            model,
            device,
            micro_batch: MicroBatch::new(training, device),
            parameters,
            optimizer,
            schedule: training.schedule.clone(),
            run_steps,
            batch,
            sequence,
            gradient_clip: training.gradient_clip,
            unread: Vec::new(),
            clock: None,
        })
    }

    /// Takes over a flat vector of parameters; the moments stay.
    ///
    /// # Errors
    /// Its length is not the model's.
    pub fn load(&mut self, flat: &[f32]) -> Result<(), TrainerError> {
        self.parameters.load(flat)
    }

    /// The flat vector of parameters. Waits for the device.
    ///
    /// # Errors
    /// libtorch failed.
    pub fn parameters(&self) -> Result<Vec<f32>, TrainerError> {
        let mut flat = vec![0.0; self.parameters.values.numel()];
        self.parameters_into(&mut flat)?;
        Ok(flat)
    }

    /// The flat vector of parameters, into a vector of the model's length. Waits for the device.
    ///
    /// # Errors
    /// Its length is not the model's.
    pub fn parameters_into(&self, flat: &mut [f32]) -> Result<(), TrainerError> {
        copy_out(&self.parameters.values, flat, "reading the parameters")
    }

    /// The optimizer's state. Waits for the device.
    ///
    /// # Errors
    /// libtorch failed.
    pub fn moments(&self) -> Result<Moments, TrainerError> {
        self.optimizer.moments()
    }

    /// Takes over the optimizer's state.
    ///
    /// # Errors
    /// Its length is not the model's, or it is another optimizer's.
    pub fn load_moments(&mut self, moments: &Moments) -> Result<(), TrainerError> {
        self.optimizer.load_moments(moments)
    }

    /// Sets the optimizer's state to that before the first step.
    ///
    /// # Errors
    /// libtorch failed.
    pub fn reset_moments(&mut self) -> Result<(), TrainerError> {
        self.optimizer.reset_moments()
    }

    /// Sequences that go through the model at once in the next step.
    pub fn sequences_at_once(&self) -> usize {
        self.micro_batch.sequences
    }

    /// The device, for people.
    pub fn device(&self) -> String {
        super::describe(self.device)
    }

    /// One optimizer step on `batch`, `[batch_size, sequence_length + 1]` row by row; `global_step` is the
    /// run's cumulative step, from 0. Where the loss or the gradient is not finite, the device leaves
    /// parameters and moments as they are.
    ///
    /// # Errors
    /// `cancelled` is asked before each micro-batch. After that, and after whatever failed before the update,
    /// parameters and moments are those before the step. Where libtorch failed in the update itself, part of it may
    /// be made: both must be loaded again.
    pub fn step(
        &mut self,
        batch: &[i64],
        global_step: u64,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<StepOutcome, TrainerError> {
        let length = self.sequence + 1;
        if batch.len() != self.batch * length {
            let expected = format!("{} sequences of {length}", self.batch);
            return Err(TrainerError::Tokens { what: "the batch", found: batch.len(), expected });
        }
        self.model.check_vocabulary(batch)?;
        let tokens =
            upload(batch, &[self.batch as i64, length as i64], self.device).doing("uploading a batch")?;

        self.lap(|_| None);
        let mut micro_batch = self.micro_batch;
        let loss = micro_batch.fit(self.batch, |sequences| {
            let loss = self.gradients_of(&tokens, sequences, cancelled);
            if matches!(loss, Err(TrainerError::OutOfMemory { .. })) {
                release_unused(self.device);
            }
            loss
        });
        self.micro_batch = micro_batch;
        let loss = loss?;
        let (norm, control) = self.control(&loss)?;
        let factor = self.schedule.factor(global_step, self.run_steps);
        let learning_rate = self.optimizer.step(factor, &control)?;
        self.parameters.round()?;
        self.unread.push(Tensor::f_stack(&[loss, norm], 0).doing("keeping the loss")?);
        self.lap(|phases| Some(&mut phases.update));
        Ok(StepOutcome { tokens: (self.batch * self.sequence) as u64, learning_rate })
    }

    /// Makes the gradients those of the mean loss of `tokens`, `[batch, time + 1]`, by so many `sequences` at a
    /// time, and returns the loss.
    fn gradients_of(
        &mut self,
        tokens: &Tensor,
        sequences: usize,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Tensor, TrainerError> {
        self.parameters.clear_gradients()?;
        let mut loss = zero(Kind::Float, self.device).doing("summing the loss")?;
        #[allow(clippy::cast_precision_loss)]
        let scale = 1.0 / (self.batch * self.sequence) as f64;
        for micro_batch in &tokens.f_split(sequences as i64, 0).doing("splitting a batch")? {
            if cancelled() {
                return Err(TrainerError::Cancelled);
            }
            let hidden = self.model.hidden(micro_batch).doing("computing the model")?;
            self.lap(|phases| Some(&mut phases.forward));
            let share = self.model.head_loss(&hidden, micro_batch, scale).doing("computing the loss")?;
            self.lap(|phases| Some(&mut phases.head));
            share.f_backward().doing("computing the gradient")?;
            self.lap(|phases| Some(&mut phases.backward));
            loss = loss.f_add(&share.detach()).doing("summing the loss")?;
        }
        Ok(loss)
    }

    /// The gradient's L2 norm; and whether the update must be skipped, and what the gradient must be divided by so
    /// that its norm is at most what the settings give.
    fn control(&self, loss: &Tensor) -> Result<(Tensor, Control), TrainerError> {
        let control = || {
            let norm = self.parameters.gradients.f_norm()?;
            let skip = norm.f_add(loss)?.f_isfinite()?.f_logical_not()?.f_to_kind(Kind::Float)?;
            let divisor = if self.gradient_clip > 0.0 {
                // 1e-6 as in PyTorch's clip_grad_norm_: equal results.
                norm.f_add_scalar(1e-6)?.f_div_scalar(self.gradient_clip)?.f_clamp_min(1.0)?
            } else {
                norm.f_ones_like()?
            };
            Ok::<_, TchError>((norm, Control { skip, divisor }))
        };
        control().doing("measuring the gradient")
    }

    /// From now on measures where the time of steps goes. Each part then waits for the device, which costs a
    /// GPU some speed.
    pub fn measure_phases(&mut self) {
        self.clock = Some(Clock { phases: Phases::default(), lap: Instant::now() });
    }

    /// Where the time of the steps since [`Trainer::measure_phases`] went, which ends the measurement; zero without it.
    pub fn take_phases(&mut self) -> Phases {
        self.clock.take().map(|clock| clock.phases).unwrap_or_default()
    }

    /// Adds the time since the last lap to a phase, or drops it.
    fn lap(&mut self, phase: impl FnOnce(&mut Phases) -> Option<&mut Duration>) {
        let Some(clock) = &mut self.clock else { return };
        synchronize(self.device);
        let now = Instant::now();
        if let Some(phase) = phase(&mut clock.phases) {
            *phase += now - clock.lap;
        }
        clock.lap = now;
    }

    /// What the steps since the last call came to, in order. The one call of the training loop that waits for
    /// the device; to be made now and then, since the results wait there.
    ///
    /// # Errors
    /// libtorch failed.
    pub fn take_results(&mut self) -> Result<Vec<StepResult>, TrainerError> {
        let unread = std::mem::take(&mut self.unread);
        if unread.is_empty() {
            return Ok(Vec::new());
        }
        let mut values = vec![0.0_f32; 2 * unread.len()];
        let results = Tensor::f_stack(&unread, 0).doing("reading the loss")?;
        copy_out(&results, &mut values, "reading the loss")?;
        let result = |pair: &[f32]| StepResult { loss: pair[0], gradient_norm: pair[1] };
        Ok(values.chunks_exact(2).map(result).collect())
    }

    /// The gradient that the last step used, for tests: after clipping.
    #[cfg(test)]
    pub(super) fn gradient(&self) -> Vec<f32> {
        let mut flat = vec![0.0; self.parameters.gradients.numel()];
        copy_out(&self.parameters.gradients, &mut flat, "reading the gradient").unwrap();
        flat
    }
}
