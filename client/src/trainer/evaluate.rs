//! Loss on held-out windows.

use tch::Kind;

use super::{
    LanguageModel, Trainer,
    device::upload,
    error::{Doing, TrainerError},
    zero,
};

/// Held-out loss as sums, so that those of several sites add up.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct EvaluationSum {
    /// Cross-entropy in nats, over all tokens.
    pub loss_sum: f64,
    /// Tokens predicted.
    pub tokens: u64,
}

impl EvaluationSum {
    /// Nats per token.
    #[allow(clippy::cast_precision_loss)]
    pub fn loss(&self) -> f64 {
        self.loss_sum / self.tokens as f64
    }

    /// e to the loss.
    pub fn perplexity(&self) -> f64 {
        self.loss().exp()
    }
}

impl LanguageModel {
    /// The loss over `windows`, in each of which every token but the first is predicted from those before
    /// it. Up to `batch` windows of one length that follow each other are computed together.
    ///
    /// # Errors
    /// A window is shorter than 2 tokens, longer than the context + 1, or has tokens outside the vocabulary;
    /// or `cancelled`, which is asked before each batch.
    pub fn evaluate(
        &self,
        windows: impl IntoIterator<Item = Vec<i64>>,
        batch: usize,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<EvaluationSum, TrainerError> {
        let _no_grad = tch::no_grad_guard();
        let mut loss_sum = zero(Kind::Double, self.device).doing("summing the held-out loss")?;
        let mut tokens = 0;
        let mut windows = windows.into_iter().peekable();
        while let Some(mut rows_of_tokens) = windows.next() {
            if cancelled() {
                return Err(TrainerError::Cancelled);
            }
            let length = rows_of_tokens.len();
            let mut rows = 1;
            while rows < batch
                && let Some(window) = windows.next_if(|window| window.len() == length)
            {
                rows_of_tokens.extend(window);
                rows += 1;
            }
            self.check_window(length.saturating_sub(1))?;
            self.check_vocabulary(&rows_of_tokens)?;
            let loss = upload(&rows_of_tokens, &[rows as i64, length as i64], self.device)
                .and_then(|tokens| self.loss(&tokens, 1.0));
            let _ = loss.and_then(|loss| loss_sum.f_add_(&loss)).doing("computing the held-out loss")?;
            tokens += (rows * (length - 1)) as u64;
        }
        let loss_sum = loss_sum.f_double_value(&[]).doing("reading the held-out loss")?;
        Ok(EvaluationSum { loss_sum, tokens })
    }
}

impl Trainer {
    /// The loss of the model as it is, as [`LanguageModel::evaluate`], a micro-batch at a time. Parameters,
    /// moments and the training loss are left alone.
    ///
    /// # Errors
    /// As there.
    pub fn evaluate(
        &self,
        windows: impl IntoIterator<Item = Vec<i64>>,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<EvaluationSum, TrainerError> {
        self.model.evaluate(windows, self.micro_batch.sequences, cancelled)
    }
}
