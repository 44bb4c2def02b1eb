//! Local training and evaluation on libtorch.
//!
//! The only code that names `tch`. A [`Trainer`] holds one model with its optimizer on one device; all its
//! tensors belong to the thread that calls it, which in the daemon is the one of [`Worker`]. It knows
//! batches of tokens and flat vectors: where they come from and go to is others' business. It never opens a
//! socket, and of files only its own checkpoint ([`checkpoint`]).

pub mod checkpoint;
mod device;
mod error;
mod evaluate;
mod generate;
mod gpt2;
mod llama;
mod optimizer;
mod parameters;
mod shim;
mod step;
#[cfg(test)]
mod tests;
mod worker;

use consort_common::model::{Architecture, Manifest};
use tch::{Kind, Reduction, TchError, Tensor};

pub use self::{
    device::{Device, DeviceChoice, DeviceError, Memory, describe, memory, set_threads, wait_passively},
    error::TrainerError,
    evaluate::EvaluationSum,
    generate::Sampling,
    optimizer::Moments,
    step::{StepOutcome, StepResult, Trainer, memory_bytes_needed},
    worker::{Worker, WorkerError},
};
use self::{gpt2::Gpt2, llama::Llama, parameters::Parameters};

/// The model of either architecture.
enum Model {
    Llama(Llama),
    Gpt2(Gpt2),
}

impl Model {
    /// The model over zeroed parameters on `device`.
    fn new(architecture: &Architecture, device: Device) -> Result<(Self, Parameters), TrainerError> {
        let problems = architecture.problems();
        if !problems.is_empty() {
            let problems: Vec<String> =
                problems.iter().map(|(key, problem)| format!("{key} {problem}")).collect();
            return Err(TrainerError::Settings(problems.join("; ")));
        }
        let manifest: Manifest = architecture.manifest();
        let parameters = Parameters::new(&manifest, device)?;
        let model = match architecture {
            Architecture::Llama(config) => Self::Llama(Llama::new(config, &parameters, device)?),
            Architecture::Gpt2(config) => Self::Gpt2(Gpt2::new(config, &parameters, device)?),
        };
        Ok((model, parameters))
    }

    /// Tokens `[batch, time]` to logits `[batch, time, vocabulary]`.
    fn forward(&self, tokens: &Tensor) -> Result<Tensor, TchError> {
        match self {
            Self::Llama(model) => model.forward(tokens),
            Self::Gpt2(model) => model.forward(tokens),
        }
    }

    /// Cross-entropy in nats of each token of `[batch, time + 1]` but the first, given those before it:
    /// the mean or the sum over batch and time, as a scalar.
    fn loss(&self, tokens: &Tensor, reduction: Reduction) -> Result<Tensor, TchError> {
        let (_, length) = tokens.size2()?;
        let logits = self.forward(&tokens.f_narrow(1, 0, length - 1)?)?;
        let targets = tokens.f_narrow(1, 1, length - 1)?.f_reshape([-1])?;
        const IGNORED: i64 = -100; // as everywhere; no token is negative
        logits.f_flatten(0, 1)?.f_cross_entropy_loss(&targets, None::<&Tensor>, reduction, IGNORED, 0.0)
    }
}

/// A scalar of zero on `device`.
fn zero(kind: Kind, device: Device) -> Result<Tensor, TchError> {
    Tensor::f_zeros([0_i64; 0], (kind, device))
}
