//! A model on a device, and what it can be asked: loss, held-out loss ([`evaluate`](super::evaluate)), logits,
//! text ([`generate`](super::generate)). A trainer holds one beside its optimizer.

use consort_common::model::Architecture;
use tch::{Device, TchError, Tensor};

use super::{
    Model,
    attention::Attention,
    checked_manifest,
    device::upload,
    error::{Doing, TrainerError},
    kernels,
    parameters::Parameters,
};

/// One model, on one device. All its tensors belong to the thread that calls it.
pub struct LanguageModel {
    pub(super) model: Model,
    pub(super) device: Device,
    /// Rows of the embedding; tokens are below it.
    pub(super) vocabulary: usize,
    /// Longest sequence, in tokens.
    pub(super) context: usize,
    /// The end-of-text token, where attention is kept within documents that it parts.
    pub(super) document_end: Option<i64>,
}

impl LanguageModel {
    /// A model that is not trained: it takes no more memory than its parameters. `fill` gives these piece by
    /// piece, each piece by its position in the flat vector.
    ///
    /// # Errors
    /// The architecture's hyper-parameters contradict each other, the device's memory does not suffice, or
    /// `fill` failed.
    pub fn load<E: From<TrainerError>>(
        architecture: &Architecture,
        device: Device,
        fill: impl FnMut(u64, &mut [f32]) -> Result<(), E>,
    ) -> Result<Self, E> {
        let mut parameters = Parameters::frozen(&checked_manifest(architecture)?, device)?;
        let model = Self::over(architecture, &parameters, device)?;
        parameters.load_pieces(fill)?;
        Ok(model)
    }

    /// The same from the whole flat vector.
    ///
    /// # Errors
    /// The length of `flat` is not the model's, or as [`LanguageModel::load`].
    pub fn from_flat(
        architecture: &Architecture,
        flat: &[f32],
        device: Device,
    ) -> Result<Self, TrainerError> {
        let mut parameters = Parameters::frozen(&checked_manifest(architecture)?, device)?;
        let model = Self::over(architecture, &parameters, device)?;
        parameters.load(flat)?;
        Ok(model)
    }

    /// The model that computes with `parameters`, which are `architecture`'s.
    pub(super) fn over(
        architecture: &Architecture,
        parameters: &Parameters,
        device: Device,
    ) -> Result<Self, TrainerError> {
        Ok(Self {
            model: Model::new(architecture, parameters, device)?,
            device,
            vocabulary: architecture.vocab_size(),
            context: architecture.context_length(),
            document_end: None,
        })
    }

    /// From now on, attention in losses is kept within documents, which `end_of_text` parts: see the
    /// specification's `training.document_mask`.
    #[must_use]
    pub fn with_documents_apart(self, end_of_text: u32) -> Self {
        Self { document_end: Some(end_of_text.into()), ..self }
    }

    /// `scale` times the sum of the cross-entropies, in nats, of all tokens of `[batch, time + 1]` but the first,
    /// each given those before it (in its document, if these are kept apart), as a scalar. To be propagated back as
    /// it is, if at all: see [`kernels::head_loss`].
    pub(super) fn loss(&self, tokens: &Tensor, scale: f64) -> Result<Tensor, TchError> {
        self.head_loss(&self.hidden(tokens)?, tokens, scale)
    }

    /// What the output projection takes, of all tokens of `[batch, time + 1]` but the last.
    pub(super) fn hidden(&self, tokens: &Tensor) -> Result<Tensor, TchError> {
        let (_, length) = tokens.size2()?;
        let inputs = tokens.f_narrow(1, 0, length - 1)?;
        let mut attention = match self.document_end {
            Some(end_of_text) => Attention::within_documents(&inputs, end_of_text)?,
            None => Attention::causal(),
        };
        self.model.hidden(&inputs, &mut attention)
    }

    /// The loss that follows from it.
    pub(super) fn head_loss(&self, hidden: &Tensor, tokens: &Tensor, scale: f64) -> Result<Tensor, TchError> {
        let (_, length) = tokens.size2()?;
        let targets = tokens.f_narrow(1, 1, length - 1)?.f_reshape([-1])?;
        kernels::head_loss(hidden, self.model.output(), &targets, scale)
    }

    /// The logits `[tokens, vocabulary]`, row by row, that follow each of `tokens`.
    ///
    /// # Errors
    /// There are no tokens, more than the context, or such as the vocabulary does not have.
    pub fn logits(&self, tokens: &[i64]) -> Result<Vec<f32>, TrainerError> {
        let _no_grad = tch::no_grad_guard();
        self.check_window(tokens.len())?;
        self.check_vocabulary(tokens)?;
        let logits = upload(tokens, &[1, tokens.len() as i64], self.device)
            .and_then(|tokens| self.model.hidden(&tokens, &mut Attention::causal()))
            .and_then(|hidden| kernels::linear(&hidden, self.model.output(), None))
            .doing("computing logits")?;
        self.read_logits(&logits, tokens.len())
    }

    /// The logits of `rows` positions, from the device.
    pub(super) fn read_logits(&self, logits: &Tensor, rows: usize) -> Result<Vec<f32>, TrainerError> {
        let mut values = vec![0.0; rows * self.vocabulary];
        logits.f_copy_data(&mut values, rows * self.vocabulary).doing("reading logits")?;
        Ok(values)
    }

    /// Whether the model can be given `length` tokens at once.
    pub(super) fn check_window(&self, length: usize) -> Result<(), TrainerError> {
        if (1..=self.context).contains(&length) {
            return Ok(());
        }
        let expected = format!("1 to the model's context of {}", self.context);
        Err(TrainerError::Tokens { what: "the text to be read", found: length, expected })
    }

    /// An index outside the embedding would, on a GPU, stop the whole device.
    pub(super) fn check_vocabulary(&self, tokens: &[i64]) -> Result<(), TrainerError> {
        let allowed = 0..self.vocabulary as i64;
        match tokens.iter().find(|token| !allowed.contains(token)) {
            Some(token) => Err(TrainerError::Vocabulary { token: *token, vocabulary: self.vocabulary }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
