//! Streaming DiLoCo (arXiv 2501.18512, algorithm 2) at a site. Its model is its own: from round to round it goes on
//! where it was, while one fragment of it is sent, averaged with the others' and received. Meanwhile the site takes
//! the first steps of the next round, `overlap` of them (the paper's tau), neither more nor fewer; then it mixes
//! the fragment in, waiting for it if need be. So the bits of a round depend on no network.
//!
//! A site that has not trained in the round before begins with the global model. One that has goes on from its own,
//! also if its delta was refused because it came too late: what it sends later of its other fragments has that
//! round's steps in it.
//!
//! What the fragment was last made of, which its next delta is the difference from, needs no copy: it is what the
//! global model has, since nobody changes a fragment between its rounds.
//!
//! The first steps leave nothing on disk: they begin with the site's state after the round before, which is
//! there, and who is killed takes them again. While they wait to go on they are the trainer's parameters and moments,
//! and a [`FirstSteps`] says so.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use consort_common::{
    fragment::Fragment,
    ids::Digest,
    spec::{OptimizerState, StreamingSpec},
};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::{
    local_steps::{self, Progress},
    prepare::Material,
    steps::{self, Steps, StepsError},
    trainer::{Trainer, TrainerError, checkpoint::Writer},
    work::{TrainTask, WorkError},
};

/// What the worker's trainer holds.
#[derive(Debug, Default)]
pub struct Held {
    /// The specification that it was built for.
    pub spec: Option<Digest>,
    /// The first steps of a round, if it holds those.
    pub first_steps: Option<FirstSteps>,
}

/// A round of one history of a run, of which the base need not be known yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Coming {
    /// Digest of the run's specification.
    pub spec: Digest,
    /// The round.
    pub round: u32,
    /// The run's cumulative step before the round.
    pub first_step: u64,
}

impl Coming {
    /// The round of a task.
    pub fn this(task: &TrainTask) -> Self {
        Self { spec: task.run.spec_digest, round: task.round, first_step: task.first_step }
    }

    /// The one after it.
    pub fn next(task: &TrainTask, material: &Material) -> Self {
        let steps = u64::from(material.spec.training.local_steps);
        Self {
            spec: task.run.spec_digest,
            round: task.round.saturating_add(1),
            first_step: task.first_step + steps,
        }
    }
}

/// The first steps of a round, whose parameters and moments the trainer has.
#[derive(Debug, Clone)]
pub struct FirstSteps {
    /// How far they came.
    pub progress: steps::Progress<Coming>,
    /// When the last was taken, or the round before ended.
    pub since: Instant,
}

impl FirstSteps {
    /// None yet: the trainer has just come to the end of the round before.
    pub fn none(coming: Coming, ended: &Progress) -> Self {
        let progress = steps::Progress { steps: 0, tally: steps::Tally::default(), ..ended.clone() };
        Self { progress: progress.of(coming), since: Instant::now() }
    }
}

/// First steps to be taken.
pub struct Ahead {
    /// The run's.
    pub material: Arc<Material>,
    /// Of which round.
    pub coming: Coming,
    /// Counts them.
    pub steps_taken: Arc<AtomicU32>,
    /// Ends them early.
    pub cancel: CancellationToken,
}

impl Ahead {
    /// Takes the first steps of the round, as far as they are not taken; false if there is nothing to go on from:
    /// the site has not trained in the round before, or has lost its state.
    ///
    /// # Errors
    /// A step failed, or they were cancelled; those taken stay taken.
    pub fn take(&self, trainer: &mut Trainer, held: &mut Option<FirstSteps>) -> Result<bool, WorkError> {
        let Some(StreamingSpec { overlap, .. }) = self.material.spec.outer.streaming else {
            return Ok(false);
        };
        let Some(FirstSteps { progress, since }) = self.begun(trainer, held.take())? else {
            return Ok(false);
        };
        let progress = local_steps::in_todays_text(&self.material, progress);
        if progress.steps == 0 && self.material.spec.training.optimizer_state == OptimizerState::Reset {
            trainer.reset_moments()?;
        }
        if progress.steps >= u64::from(overlap) {
            *held = Some(FirstSteps { progress, since });
            return Ok(true);
        }
        let (progress, outcome) = self.steps(trainer, progress, u64::from(overlap))?;
        *held = Some(FirstSteps { progress, since: Instant::now() });
        outcome.map(|()| true)
    }

    /// What the trainer holds of these steps, or the state that they begin with.
    fn begun(
        &self,
        trainer: &mut Trainer,
        held: Option<FirstSteps>,
    ) -> Result<Option<FirstSteps>, WorkError> {
        let before = self.coming.round.saturating_sub(1);
        let directory = &self.material.directory;
        if before == 0 || directory.site_state_before(self.coming.round)? != Some(before) {
            return Ok(None);
        }
        if let Some(held) = held.filter(|held| held.progress.training == self.coming) {
            return Ok(Some(held));
        }
        let Some(state) = local_steps::load(&directory.site_state(before))? else { return Ok(None) };
        if state.parameters.len() as u64 != self.material.plan.parameters() {
            return Ok(None);
        }
        trainer.load(&state.parameters)?;
        trainer.load_moments(&state.moments)?;
        Ok(Some(FirstSteps::none(self.coming, &state.progress)))
    }

    /// Steps from `progress` on, until there are so many; how far they came, and why no further.
    fn steps(
        &self,
        trainer: &mut Trainer,
        progress: steps::Progress<Coming>,
        overlap: u64,
    ) -> Result<(steps::Progress<Coming>, Result<(), WorkError>), WorkError> {
        let text = self.material.training_text();
        // Nothing of it is written.
        let writer = Writer::new(&self.material.directory.checkpoint(), None);
        let mut steps = Steps::new(trainer, text, self.coming.first_step, progress, writer, Duration::MAX)?;
        let mut outcome = Ok(());
        while steps.done() < overlap {
            match steps.step(&|| self.cancel.is_cancelled()) {
                Ok(_) => self.steps_taken.store(count(steps.done()), Ordering::Relaxed),
                Err(StepsError::Trainer(TrainerError::Cancelled)) => {
                    outcome = Err(WorkError::Cancelled);
                    break;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok((steps.pause()?, outcome))
    }
}

fn count(steps: u64) -> u32 {
    u32::try_from(steps).unwrap_or(u32::MAX)
}

/// Mixes the global values of `fragment` into the site's: alpha x local + (1 - alpha) x global (arXiv 2501.18512,
/// algorithm 2), in f64, rounded once. With an alpha of 0 they are the global ones, bit by bit.
pub fn mix(alpha: f64, fragment: Fragment, local: &mut [f32], global: &[f32]) {
    for (local, global) in fragment.slices_mut(local).zip(fragment.slices(global)) {
        if alpha == 0.0 {
            local.copy_from_slice(global);
            continue;
        }
        for (local, global) in local.iter_mut().zip(global) {
            #[allow(clippy::cast_possible_truncation)] // the rounding that is meant
            let mixed = (alpha * f64::from(*local) + (1.0 - alpha) * f64::from(*global)) as f32;
            *local = mixed;
        }
    }
}

#[cfg(test)]
mod tests {
    use consort_common::chunk::ChunkPlan;

    use super::*;

    #[test]
    fn only_the_fragment_is_mixed() {
        let fragment = Fragment::of_round(ChunkPlan::new(5, 1), 2, 2);
        let global = [10.0, 20.0, 30.0, -0.0, 50.0];
        let check = |alpha, expected: [f32; 5]| {
            let mut local = [0.0, 4.0, 0.0, 8.0, 0.0];
            mix(alpha, fragment, &mut local, &global);
            assert_eq!(local.map(f32::to_bits), expected.map(f32::to_bits), "{alpha}");
        };
        check(0.5, [0.0, 12.0, 0.0, 4.0, 0.0]);
        check(0.25, [0.0, 16.0, 0.0, 2.0, 0.0]);
        check(0.0, [0.0, 20.0, 0.0, -0.0, 0.0]);
    }
}
