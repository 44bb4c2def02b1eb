//! Local training and evaluation on libtorch.
//!
//! The only code that names `tch`. A [`Trainer`] holds one model with its optimizer on one device, a
//! [`LanguageModel`] one that is only asked; all their tensors belong to the thread that calls them, which in
//! the daemon is the one of [`Worker`]. They know batches of tokens and flat vectors: where they come from and
//! go to is others' business. Nothing here opens a socket, and of files only its own checkpoint
//! ([`checkpoint`]).

mod attention;
pub mod checkpoint;
mod device;
mod error;
mod evaluate;
mod generate;
mod gpt2;
mod kernels;
mod language_model;
mod llama;
mod memory;
mod micro_batch;
mod mpt;
mod optimizer;
mod parameters;
#[cfg(test)]
mod parity;
mod shim;
mod step;
#[cfg(test)]
mod tests;
mod worker;

use consort_common::model::{Architecture, Manifest};
use tch::{Kind, TchError, Tensor};

use self::{attention::Attention, gpt2::Gpt2, llama::Llama, mpt::Mpt, parameters::Parameters};
pub use self::{
    device::{
        Device, DeviceChoice, DeviceError, Memory, be_deterministic, describe, memory, peak_flops,
        peak_memory, set_threads, set_up_libraries,
    },
    error::TrainerError,
    evaluate::EvaluationSum,
    generate::Sampling,
    language_model::LanguageModel,
    memory::{checkpoint_bytes_needed, memory_bytes_needed},
    optimizer::Moments,
    step::{Phases, StepOutcome, StepResult, Trainer},
    worker::{Worker, WorkerError},
};

#[cfg(test)]
pub(crate) use self::device::test_device;

/// The model of any architecture.
enum Model {
    Llama(Llama),
    Gpt2(Gpt2),
    Mpt(Mpt),
}

impl Model {
    /// The model that computes with `parameters`, which are `architecture`'s.
    fn new(
        architecture: &Architecture,
        parameters: &Parameters,
        device: Device,
    ) -> Result<Self, TrainerError> {
        Ok(match architecture {
            Architecture::Llama(config) => Self::Llama(Llama::new(config, parameters, device)?),
            Architecture::Gpt2(config) => Self::Gpt2(Gpt2::new(config, parameters, device)?),
            Architecture::Mpt(config) => Self::Mpt(Mpt::new(config, parameters, device)?),
        })
    }

    /// Tokens `[batch, time]` to what the output projection takes, `[batch, time, width]`.
    fn hidden(&self, tokens: &Tensor, attention: &mut Attention) -> Result<Tensor, TchError> {
        match self {
            Self::Llama(model) => model.hidden(tokens, attention),
            Self::Gpt2(model) => model.hidden(tokens, attention),
            Self::Mpt(model) => model.hidden(tokens, attention),
        }
    }

    /// The output projection, `[vocabulary, width]`.
    fn output(&self) -> &Tensor {
        match self {
            Self::Llama(model) => model.output(),
            Self::Gpt2(model) => model.output(),
            Self::Mpt(model) => model.output(),
        }
    }
}

/// The tensors of an architecture whose hyper-parameters fit each other.
fn checked_manifest(architecture: &Architecture) -> Result<Manifest, TrainerError> {
    let problems = architecture.problems();
    if problems.is_empty() {
        return Ok(architecture.manifest());
    }
    let problems: Vec<String> = problems.iter().map(|(key, problem)| format!("{key} {problem}")).collect();
    Err(TrainerError::Settings(problems.join("; ")))
}

/// A scalar of zero on `device`.
fn zero(kind: Kind, device: Device) -> Result<Tensor, TchError> {
    Tensor::f_zeros([0_i64; 0], (kind, device))
}
