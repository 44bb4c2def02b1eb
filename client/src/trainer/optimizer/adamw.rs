//! AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2), by libtorch's fused kernel.

use tch::{TchError, Tensor};

use super::{
    super::{
        error::TrainerError,
        parameters::{Parameters, Span},
        shim::{self, AdamWTensors},
    },
    Control, Settings,
};

pub(super) struct AdamW {
    settings: Settings,
    /// Views of matrices and embeddings: weight decay applies.
    decaying: AdamWTensors,
    /// Views of gains and biases: it does not.
    plain: AdamWTensors,
}

impl AdamW {
    /// For the parameters in `spans`, whose second moments lie next to each other in `second`.
    pub(super) fn new(
        settings: Settings,
        spans: Vec<Span>,
        parameters: &Parameters,
        first: &Tensor,
        second: &Tensor,
    ) -> Result<Self, TchError> {
        let (mut decaying, mut plain) = (AdamWTensors::default(), AdamWTensors::default());
        let mut position = 0;
        for Span { offset, length, decays } in spans {
            let group = if decays { &mut decaying } else { &mut plain };
            group.parameters.push(parameters.values.f_narrow(0, offset, length)?);
            group.gradients.push(parameters.gradients.f_narrow(0, offset, length)?);
            group.first.push(first.f_narrow(0, offset, length)?);
            group.second.push(second.f_narrow(0, position, length)?);
            position += length;
        }
        Ok(Self { settings, decaying, plain })
    }

    /// `steps` is the number of this step, from 1.
    pub(super) fn step(
        &self,
        learning_rate: f64,
        steps: &Tensor,
        control: &Control,
    ) -> Result<(), TrainerError> {
        let Settings { beta1, beta2, epsilon, weight_decay } = self.settings;
        let decaying = shim::AdamW { learning_rate, beta1, beta2, weight_decay, epsilon };
        let plain = shim::AdamW { weight_decay: 0.0, ..decaying };
        for (settings, tensors) in [(decaying, &self.decaying), (plain, &self.plain)] {
            shim::adamw_step(&settings, tensors, steps, &control.skip, &control.divisor)?;
        }
        Ok(())
    }
}
