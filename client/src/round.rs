//! One round: the base model down, its held-out loss, local steps, the delta up. And measuring a model
//! without training it.
//!
//! The rule that everything here keeps: the same round of the same run gives the same bits (on a CPU),
//! however often the site was killed, disconnected or asked again. A round therefore begins with the state
//! that the site had after an earlier round, which stays until a later round begins; and its delta is
//! durable, with the state after the round, before the first byte of it is sent.
//!
//! What a site carries from one of its rounds to its next (cursor, moments, what the encoding dropped) does not
//! depend on which versions they train from: where rounds do not wait for slow sites, a site skips numbers and
//! never goes back. What the encoding dropped is part of a delta, and late by as many versions as the delta that
//! it is added to; moments are of gradients at a version that old, as with any optimizer that is kept.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock, PoisonError, atomic::Ordering},
    time::Instant,
};

use consort_common::{
    atomic_file::write_atomically,
    ids::{Digest, RunName},
};
use consort_proto::v1::{ClientActivity, Evaluation, ReportEvaluationRequest};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    daemon::Context,
    link::request,
    local_steps::{self, Job, Trained},
    model_file::ModelFile,
    overlap::{Ahead, Coming, FirstSteps, Held},
    prepare::{Material, material},
    state::{self, StateError},
    trainer::{Trainer, WorkerError, checkpoint},
    transfer::{Delta, DeltaDescription, UploadOutcome, draw_delta_id, is_too_late},
    work::{EvaluateTask, TrainTask, WorkError},
};

/// Trains a round and delivers its delta.
///
/// # Errors
/// If the round cannot be trained or delivered; [`WorkError::Cancelled`] when it is no longer wanted.
pub async fn train(
    context: &Arc<Context>,
    task: &TrainTask,
    cancel: &CancellationToken,
) -> Result<(), WorkError> {
    let material = material(context, &task.run, cancel).await?;
    check(&material, task)?;
    let arrived = OnceLock::new();
    let round = Round { context, material: &material, number: task.round, cancel, arrived: &arrived };
    let base = Base { version: task.round - 1, digest: task.base_digest };
    let finished = finished(&material, task);
    if finished.is_none() {
        round.go_ahead(Coming::this(task)).await?;
    }
    let measured = if task.evaluate_base { Some(round.measure(base).await) } else { None };
    // A report that waits for the connection delays no training.
    let report = async {
        match measured {
            Some(measured) => round.report(base, measured?).await,
            None => Ok(()),
        }
    };
    let deliver = async {
        let delta = match finished {
            Some(delta) => delta,
            None => round.compute(task, base).await?,
        };
        round.go_ahead(Coming::next(task, &material)).await?;
        round.send(&delta).await
    };
    let (reported, delivered) = tokio::join!(report, deliver);
    if let Err(error) = reported
        && !matches!(error, WorkError::Cancelled)
    {
        warn!("the held-out loss of version {} was not reported: {error}", base.version);
    }
    delivered
}

/// Measures a global model and reports its held-out loss.
///
/// # Errors
/// If the model cannot be had or measured, or the report is refused.
pub async fn evaluate(
    context: &Arc<Context>,
    task: &EvaluateTask,
    cancel: &CancellationToken,
) -> Result<(), WorkError> {
    let material = material(context, &task.run, cancel).await?;
    check_manifest(&material, task.manifest_digest)?;
    let arrived = OnceLock::new();
    let round = Round { context, material: &material, number: task.version, cancel, arrived: &arrived };
    let base = Base { version: task.version, digest: task.digest };
    let measured = round.measure(base).await?;
    round.report(base, measured).await
}

/// A global model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Base {
    version: u32,
    digest: Digest,
}

fn check_manifest(material: &Material, theirs: Digest) -> Result<(), WorkError> {
    let ours = material.manifest_digest;
    if ours == theirs { Ok(()) } else { Err(WorkError::Manifest { ours, theirs }) }
}

fn check(material: &Material, task: &TrainTask) -> Result<(), WorkError> {
    check_manifest(material, task.manifest_digest)?;
    let tokens = material.spec.tokens(task.steps);
    if tokens != task.tokens {
        return Err(WorkError::Tokens { steps: task.steps, ours: tokens, theirs: task.tokens });
    }
    Ok(())
}

/// The round's delta, if it was computed before.
fn finished(material: &Material, task: &TrainTask) -> Option<Delta> {
    let plan = material.fragment(task.round).plan();
    let delta = Delta::open(&material.directory, task.round, plan)?;
    let description = &delta.description;
    let same = description.spec_digest == task.run.spec_digest
        && description.base_digest == task.base_digest
        && description.first_step == task.first_step
        && description.steps == task.steps
        && description.encoding == task.delta_encoding;
    same.then_some(delta)
}

/// The held-out loss of one model, as kept on disk.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Measured {
    /// The model.
    digest: Digest,
    /// Nats per token.
    loss: f64,
    /// Tokens predicted.
    tokens: u64,
    /// Bytes of their text.
    text_bytes: u64,
}

/// What the steps of a round share.
#[derive(Clone, Copy)]
struct Round<'a> {
    context: &'a Arc<Context>,
    material: &'a Arc<Material>,
    /// For progress: the round, or the version that is measured after the last one.
    number: u32,
    cancel: &'a CancellationToken,
    /// That the global model is there.
    arrived: &'a OnceLock<Arrival>,
}

/// The arrival of a global model.
#[derive(Debug, Clone, Copy)]
struct Arrival {
    at: Instant,
    /// The steps that the site had taken ahead by then.
    steps_ahead: u32,
}

impl Round<'_> {
    fn run(&self) -> &RunName {
        &self.material.run.name
    }

    /// The file of a global model, downloaded if it is not there.
    async fn download(&self, base: Base) -> Result<PathBuf, WorkError> {
        let bytes = self.material.plan.parameters() * 4;
        let activity =
            self.context.reporter.begin(self.run(), self.number, ClientActivity::Downloading, bytes);
        let model = (self.run(), base.version, base.digest);
        let (directory, fragment) = (&self.material.directory, self.material.fragment(base.version));
        let download = self.context.transfers.download_model(directory, model, fragment, &activity);
        let model = self.cancel.run_until_cancelled(download).await.ok_or(WorkError::Cancelled)??;
        let steps_ahead = self.context.steps_ahead.load(Ordering::Relaxed);
        self.arrived.get_or_init(|| Arrival { at: Instant::now(), steps_ahead });
        Ok(model)
    }

    /// With streaming, has the first steps of a round taken and does not wait for that: who needs them takes those
    /// that are left, and learns what is wrong.
    async fn go_ahead(&self, coming: Coming) -> Result<(), WorkError> {
        let Material { spec, directory, .. } = &**self.material;
        // A round that was interrupted goes on from its checkpoint.
        if spec.outer.streaming.is_none() || coming.round > spec.rounds || directory.checkpoint().exists() {
            return Ok(());
        }
        let ahead = Ahead {
            material: self.material.clone(),
            coming,
            steps_taken: self.context.steps_ahead.clone(),
            cancel: self.context.stopping.clone(),
        };
        let begun = self.context.worker.begin(self.job(move |trainer, held| ahead.take(trainer, held)));
        begun.await.map(drop).map_err(|error| WorkError::Internal(error.to_string()))
    }

    /// Does a job on the trainer's thread, with a trainer of this run.
    async fn on_trainer<T, F>(&self, job: F) -> Result<T, WorkError>
    where
        T: Send + 'static,
        F: FnOnce(&mut Trainer, &mut Option<FirstSteps>) -> Result<T, WorkError> + Send + 'static,
    {
        let done = self.context.worker.run(self.job(job));
        done.await.map_err(|error: WorkerError| WorkError::Internal(error.to_string()))?
    }

    /// A job for the trainer's thread, which is to be done with a trainer of this run and told what it holds.
    fn job<T, F>(
        &self,
        job: F,
    ) -> impl FnOnce(&mut Option<Trainer>) -> Result<T, WorkError> + Send + use<T, F>
    where
        F: FnOnce(&mut Trainer, &mut Option<FirstSteps>) -> Result<T, WorkError> + Send + 'static,
    {
        let (material, device, held) =
            (self.material.clone(), self.context.device, self.context.held.clone());
        move |slot| {
            let mut held = held.lock().unwrap_or_else(PoisonError::into_inner);
            let trainer = match slot {
                Some(trainer) if held.spec == Some(material.run.spec_digest) => trainer,
                _ => {
                    // The old one first: the device may not have room for two.
                    *slot = None;
                    *held = Held { spec: Some(material.run.spec_digest), first_steps: None };
                    let (spec, end_of_text) = (&material.spec, material.dataset.end_of_text);
                    let steps = spec.run_steps();
                    slot.insert(Trainer::new(&spec.model, &spec.training, steps, end_of_text, device)?)
                }
            };
            job(trainer, &mut held.first_steps)
        }
    }

    /// The held-out loss of a model: measured once, then remembered.
    async fn measure(&self, base: Base) -> Result<Measured, WorkError> {
        let path = self.material.directory.evaluation(base.version);
        let kept = fs::read(&path).ok().and_then(|json| serde_json::from_slice::<Measured>(&json).ok());
        if let Some(measured) = kept.filter(|measured| measured.digest == base.digest) {
            return Ok(measured);
        }
        let model = self.download(base).await?;
        let (material, cancel) = (self.material.clone(), self.cancel.clone());
        let activity = self.context.reporter.begin(self.run(), self.number, ClientActivity::Evaluating, 0);
        let measured = self.on_trainer(move |trainer, held| {
            let first_steps = held.take();
            // First steps that wait to go on are put aside meanwhile.
            let aside = first_steps.as_ref().map(|_| trainer.parameters()).transpose()?;
            trainer.load(ModelFile::open(&model)?.values())?;
            let measured = local_steps::held_out_loss(trainer, &material, &activity, &cancel);
            if let Some(parameters) = aside {
                trainer.load(&parameters)?;
                *held = first_steps;
            }
            let (sum, text_bytes) = measured?;
            Ok(Measured { digest: base.digest, loss: sum.loss(), tokens: sum.tokens, text_bytes })
        });
        let measured = measured.await?;
        info!(
            "version {}: held-out loss {:.4} nats per token, perplexity {:.3}, over {} tokens",
            base.version,
            measured.loss,
            measured.loss.exp(),
            measured.tokens
        );
        let json = serde_json::to_vec_pretty(&measured).unwrap_or_default();
        write_atomically(&path, &json).map_err(StateError::Write)?;
        Ok(measured)
    }

    async fn report(&self, base: Base, measured: Measured) -> Result<(), WorkError> {
        let Measured { loss, tokens, text_bytes, .. } = measured;
        let evaluation = Evaluation { version: base.version, loss, tokens, text_bytes };
        let what = "reporting the held-out loss";
        let call = self.context.link.call(what, async |mut session| {
            let report = ReportEvaluationRequest {
                session_id: session.id,
                run: self.run().to_string(),
                evaluation: Some(evaluation),
            };
            session.client.report_evaluation(request(report)).await
        });
        let reported = self.cancel.run_until_cancelled(call).await.ok_or(WorkError::Cancelled)?;
        reported.map(drop).map_err(|status| WorkError::Refused { what, status })
    }

    /// Trains the round and makes its delta durable.
    async fn compute(&self, task: &TrainTask, base: Base) -> Result<Delta, WorkError> {
        let model = self.download(base).await?;
        self.material.directory.begin_round(task.round, self.material.spec.fragments())?;
        let steps = u64::from(task.steps);
        let job = Job {
            material: self.material.clone(),
            task: task.clone(),
            base: model.clone(),
            checkpoint_interval: self.context.checkpoint_interval,
            activity: self.context.reporter.begin(self.run(), task.round, ClientActivity::Training, steps),
            steps_ahead: self.context.steps_ahead.clone(),
            cancel: self.cancel.clone(),
        };
        let trained = self.on_trainer(move |trainer, held| local_steps::train(trainer, held, &job));
        let trained = trained.await?;
        let tally = &trained.progress.tally;
        info!(
            "round {}: {} steps, loss {:.4}, {:.1} s of training, {:.2}% of it waiting for data",
            task.round,
            task.steps,
            trained.train_loss,
            tally.seconds,
            tally.waited_share() * 100.0
        );
        if let (Some(since), Some(arrived)) = (trained.waited_since, self.arrived.get()) {
            let waited_seconds = arrived.at.saturating_duration_since(since).as_secs_f64();
            info!(
                "round {}: {} of the steps while the fragment of round {} was sent and received, then {:.1} s ({:.1}% of the round) of waiting for it",
                task.round,
                arrived.steps_ahead,
                base.version,
                waited_seconds,
                100.0 * waited_seconds / (waited_seconds + tally.seconds).max(1e-9)
            );
        }
        let (material, task) = (self.material.clone(), task.clone());
        let keeping = tokio::task::spawn_blocking(move || keep(&material, &task, &model, trained));
        keeping.await.map_err(|error| WorkError::Internal(error.to_string()))?
    }

    /// Delivers the delta, for as long as that makes sense.
    async fn send(&self, delta: &Delta) -> Result<(), WorkError> {
        let round = delta.description.round;
        let bytes = delta.encoded_bytes();
        let activity = self.context.reporter.begin(self.run(), round, ClientActivity::Uploading, bytes);
        let upload = self.context.transfers.upload_delta(self.run(), delta, &activity);
        match self.cancel.run_until_cancelled(upload).await.ok_or(WorkError::Cancelled)? {
            Ok(UploadOutcome::Accepted) => info!("round {round}: the delta was accepted"),
            Ok(UploadOutcome::Duplicate) => info!("round {round}: the delta had been accepted before"),
            Err(error) if is_too_late(&error) => {
                warn!("round {round}: {error}; the delta is dropped");
                Delta::remove(&self.material.directory, round)?;
            }
            Err(error) => return Err(error.into()),
        }
        Ok(())
    }
}

/// Makes the round's result durable: the encoded delta of what the round synchronises, then the site's state after
/// the round (what the encoding dropped, if that is carried, and cursor and moments; with streaming the local model,
/// too), then the description that makes all count. What is interrupted in between is computed again, to the same
/// bits.
///
/// Memory: the local model's vector becomes the delta and then what its encoding dropped, in place; with streaming
/// the fragment is copied. Besides there are the moments.
pub(crate) fn keep(
    material: &Material,
    task: &TrainTask,
    base: &Path,
    trained: Trained,
) -> Result<Delta, WorkError> {
    let (directory, fragment) = (&material.directory, material.fragment(task.round));
    let (mut values, local) = match material.spec.outer.streaming {
        Some(_) => (fragment.slices(&trained.parameters).collect::<Vec<_>>().concat(), trained.parameters),
        None => (trained.parameters, Vec::new()),
    };
    let base = ModelFile::open(base)?;
    let base: Vec<&[f32]> = fragment.slices(base.values()).collect();
    values.par_chunks_mut(material.plan.chunk_parameters() as usize).zip(base).for_each(|(local, base)| {
        local.iter_mut().zip(base).for_each(|(local, base)| *local -= base);
    });
    let norm = norm(&values);
    if !norm.is_finite() {
        return Err(WorkError::Diverged { round: task.round, norm });
    }
    let encoding = task.delta_encoding;
    let encoded_digest = Delta::write(directory, task.round, fragment, encoding, &mut values)?;
    checkpoint::save(&directory.site_state(task.round), &trained.progress, &local, &trained.moments)?;
    let description = DeltaDescription {
        round: task.round,
        spec_digest: task.run.spec_digest,
        manifest_digest: material.manifest_digest,
        base_digest: task.base_digest,
        first_step: task.first_step,
        steps: task.steps,
        tokens: task.tokens,
        train_loss: trained.train_loss,
        train_seconds: trained.progress.tally.seconds,
        norm,
        encoded_digest,
        encoding,
        delta_id: draw_delta_id(),
    };
    let delta = Delta::describe(directory, fragment.plan(), description)?;
    state::remove(&directory.checkpoint())?;
    Ok(delta)
}

/// L2 norm, summed in f64 in the order of the values: a number for people, not part of the result.
fn norm(values: &[f32]) -> f64 {
    values.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt()
}
