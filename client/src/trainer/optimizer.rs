//! AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2) over the flat vectors. Its whole state is
//! two more flat vectors and one counter, all on the device.

use consort_common::spec::OptimizerSpec;
use tch::{Device, Kind, Tensor};

use super::{
    error::{Doing, TrainerError},
    parameters::{Parameters, copy_in, copy_out, zeros},
    shim::{self, AdamW, AdamWTensors},
};

/// AdamW's state, on the host.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Moments {
    /// Decaying mean of the gradient, in the manifest's order.
    pub first: Vec<f32>,
    /// Decaying mean of its square.
    pub second: Vec<f32>,
    /// Updates made since the moments were zero.
    pub steps: u64,
}

pub(super) struct Optimizer {
    peak: AdamW,
    first: Tensor,
    second: Tensor,
    /// Updates made, as a float scalar (exact up to 2^24 of them).
    steps: Tensor,
    /// Views of matrices and embeddings: weight decay applies.
    decaying: AdamWTensors,
    /// Views of gains and biases: it does not.
    plain: AdamWTensors,
}

impl Optimizer {
    pub(super) fn new(
        spec: &OptimizerSpec,
        parameters: &Parameters,
        device: Device,
    ) -> Result<Self, TrainerError> {
        let OptimizerSpec::AdamW { learning_rate, beta1, beta2, epsilon, weight_decay } = *spec;
        let count = parameters.values.numel() as i64;
        let (first, second) = (zeros(count, device)?, zeros(count, device)?);
        let steps = Tensor::f_zeros([0_i64; 0], (Kind::Float, device)).doing("allocating the optimizer")?;
        let (mut decaying, mut plain) = (AdamWTensors::default(), AdamWTensors::default());
        for (offset, length, decays) in parameters.spans() {
            let view = |flat: &Tensor| flat.f_narrow(0, offset, length).doing("allocating the optimizer");
            let group = if decays { &mut decaying } else { &mut plain };
            group.parameters.push(view(&parameters.values)?);
            group.gradients.push(view(&parameters.gradients)?);
            group.first.push(view(&first)?);
            group.second.push(view(&second)?);
        }
        let peak = AdamW { learning_rate, beta1, beta2, weight_decay, epsilon };
        Ok(Self { peak, first, second, steps, decaying, plain })
    }

    /// One update by the gradients, unless the float scalar `skip` is 1. `factor` is the schedule's, on the
    /// peak learning rate; the rate used is returned.
    pub(super) fn step(&mut self, factor: f64, skip: &Tensor) -> Result<f64, TrainerError> {
        let learning_rate = self.peak.learning_rate * factor;
        let taken = skip.f_rsub_scalar(1.0).and_then(|taken| self.steps.f_add_(&taken));
        let _ = taken.doing("counting the step")?;
        let decaying = AdamW { learning_rate, ..self.peak };
        shim::adamw_step(&decaying, &self.decaying, &self.steps, skip)?;
        let plain = AdamW { weight_decay: 0.0, ..decaying };
        shim::adamw_step(&plain, &self.plain, &self.steps, skip)?;
        Ok(learning_rate)
    }

    pub(super) fn moments(&self) -> Result<Moments, TrainerError> {
        let mut moments = Moments { first: vec![0.0; self.first.numel()], ..Moments::default() };
        moments.second.clone_from(&moments.first);
        copy_out(&self.first, &mut moments.first, "reading the first moments")?;
        copy_out(&self.second, &mut moments.second, "reading the second moments")?;
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let steps = self.steps.f_double_value(&[]).doing("reading the step counter")? as u64;
        Ok(Moments { steps, ..moments })
    }

    pub(super) fn load_moments(&mut self, moments: &Moments) -> Result<(), TrainerError> {
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
