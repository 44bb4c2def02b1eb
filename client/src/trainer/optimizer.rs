//! The local optimizers, over the flat vectors. The whole state of each is flat vectors and one counter, all on the
//! device, so that checkpoints keep them as they are.
//!
//! No step waits for the device: whether an update is to be skipped, how much the gradient is to be scaled and which
//! step it is are scalars there.

mod adamw;
mod adopt;
mod muon;
#[cfg(test)]
mod tests;

use consort_common::spec::OptimizerSpec;
use tch::{Device, Kind, TchError, Tensor};

use self::{adamw::AdamW, adopt::Adopt, muon::Muon};
use super::{
    error::{Doing, TrainerError},
    parameters::{Parameters, copy_in, copy_out, zeros},
};

/// An optimizer's state, on the host.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Moments {
    /// Whose state it is, as the specification names it; None where a checkpoint does not say it.
    pub optimizer: Option<String>,
    /// Decaying mean of the gradient, in the manifest's order: ADOPT's of the normalised gradient; for Muon's
    /// matrices a decaying mean too.
    pub first: Vec<f32>,
    /// Decaying mean of its square. Muon keeps none for its matrices: there it is that of the other tensors,
    /// in the manifest's order.
    pub second: Vec<f32>,
    /// Updates made since the moments were zero.
    pub steps: u64,
}

pub(super) struct Optimizer {
    rule: Rule,
    learning_rate: f64,
    first: Tensor,
    second: Tensor,
    /// Updates made, as a float scalar (exact up to 2^24 of them).
    steps: Tensor,
}

enum Rule {
    AdamW(AdamW),
    Adopt(Adopt),
    Muon(Muon),
}

impl Rule {
    /// As the specification names it.
    fn name(&self) -> &'static str {
        match self {
            Self::AdamW(_) => "adamw",
            Self::Adopt(_) => "adopt",
            Self::Muon(_) => "muon",
        }
    }
}

/// What a step is told besides the gradient: float scalars on the device.
pub(super) struct Control {
    /// 1 where the update must be skipped because loss or gradient are not finite, else 0.
    pub(super) skip: Tensor,
    /// What the gradient is to be divided by, 1 or more, so that its norm is at most the limit.
    pub(super) divisor: Tensor,
}

/// What a rule is told at the start; the learning rate is told with each step.
#[derive(Debug, Clone, Copy)]
struct Settings {
    beta1: f64,
    beta2: f64,
    epsilon: f64,
    weight_decay: f64,
}

impl Optimizer {
    pub(super) fn new(
        spec: &OptimizerSpec,
        parameters: &Parameters,
        device: Device,
    ) -> Result<Self, TrainerError> {
        let count = parameters.values.numel() as i64;
        let first = zeros(count, device)?;
        let steps = Tensor::f_zeros([0_i64; 0], (Kind::Float, device)).doing("allocating the optimizer")?;
        let (learning_rate, rule, second) = match *spec {
            OptimizerSpec::AdamW { learning_rate, beta1, beta2, epsilon, weight_decay } => {
                let settings = Settings { beta1, beta2, epsilon, weight_decay };
                let second = zeros(count, device)?;
                let rule = AdamW::new(settings, parameters.spans(), parameters, &first, &second);
                (learning_rate, rule.map(Rule::AdamW), second)
            }
            OptimizerSpec::Adopt { learning_rate, beta1, beta2, epsilon, weight_decay } => {
                let settings = Settings { beta1, beta2, epsilon, weight_decay };
                let second = zeros(count, device)?;
                let rule = Adopt::new(settings, parameters, &first, &second);
                (learning_rate, rule.map(Rule::Adopt), second)
            }
            OptimizerSpec::Muon { learning_rate, momentum, beta1, beta2, epsilon, weight_decay } => {
                let settings = Settings { beta1, beta2, epsilon, weight_decay };
                let others = parameters.others();
                let second = zeros(others.iter().map(|span| span.length).sum(), device)?;
                let rule = Muon::new(settings, momentum, parameters, &first, &second);
                (learning_rate, rule.map(Rule::Muon), second)
            }
        };
        let rule = rule.doing("allocating the optimizer")?;
        Ok(Self { rule, learning_rate, first, second, steps })
    }

    /// One update by the gradients, which may be changed by it. `factor` is the schedule's, on the peak learning
    /// rate; the rate used is returned.
    pub(super) fn step(&mut self, factor: f64, control: &Control) -> Result<f64, TrainerError> {
        let _no_grad = tch::no_grad_guard();
        let learning_rate = self.learning_rate * factor;
        match &self.rule {
            Rule::AdamW(rule) => {
                self.count(control).doing("counting the step")?;
                rule.step(learning_rate, &self.steps, control)?;
            }
            Rule::Adopt(rule) => {
                rule.step(learning_rate, &self.steps, control).doing("making an ADOPT step")?;
                self.count(control).doing("counting the step")?;
            }
            Rule::Muon(rule) => {
                self.count(control).doing("counting the step")?;
                rule.step(learning_rate, &self.steps, control)?;
            }
        }
        Ok(learning_rate)
    }

    fn count(&self, control: &Control) -> Result<(), TchError> {
        self.steps.shallow_clone().f_add_(&control.taken()?).map(drop)
    }

    pub(super) fn moments(&self) -> Result<Moments, TrainerError> {
        let mut moments = Moments {
            optimizer: Some(self.rule.name().to_owned()),
            first: vec![0.0; self.first.numel()],
            second: vec![0.0; self.second.numel()],
            steps: 0,
        };
        copy_out(&self.first, &mut moments.first, "reading the first moments")?;
        copy_out(&self.second, &mut moments.second, "reading the second moments")?;
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let steps = self.steps.f_double_value(&[]).doing("reading the step counter")? as u64;
        Ok(Moments { steps, ..moments })
    }

    pub(super) fn load_moments(&mut self, moments: &Moments) -> Result<(), TrainerError> {
        let expected = self.rule.name();
        if let Some(found) = &moments.optimizer
            && found != expected
        {
            return Err(TrainerError::OtherOptimizer { found: found.clone(), expected });
        }
        copy_in(&mut self.first, &moments.first, "loading the first moments")?;
        copy_in(&mut self.second, &moments.second, "loading the second moments")?;
        #[allow(clippy::cast_precision_loss)]
        self.steps.f_fill_(moments.steps as f64).doing("loading the step counter").map(drop)
    }

    pub(super) fn reset_moments(&mut self) -> Result<(), TrainerError> {
        for tensor in [&mut self.first, &mut self.second, &mut self.steps] {
            let _ = tensor.f_zero_().doing("resetting the optimizer")?;
        }
        Ok(())
    }
}

impl Control {
    /// 1 where the update is made, else 0.
    fn taken(&self) -> Result<Tensor, TchError> {
        self.skip.f_rsub_scalar(1.0)
    }

    /// A piece of the gradient, scaled and, where the update is skipped, zero: for rules that compute with it in any
    /// case.
    fn apply_to(&self, gradient: &Tensor) -> Result<(), TchError> {
        let mut gradient = gradient.shallow_clone();
        let _ = gradient.f_div_(&self.divisor)?.f_masked_fill_(&self.skip.f_to_kind(Kind::Bool)?, 0.0)?;
        Ok(())
    }
}
