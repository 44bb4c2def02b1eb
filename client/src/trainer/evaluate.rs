//! Loss on held-out windows, and logits.

use tch::{Kind, Reduction};

use super::{
    Trainer,
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

impl Trainer {
    /// The loss over `windows`, in each of which every token but the first is predicted from those before
    /// it. Windows of one length that follow each other are computed together. Parameters, moments and the
    /// training loss are left alone.
    ///
    /// # Errors
    /// A window is shorter than 2 tokens, longer than the context + 1, or has tokens outside the vocabulary;
    /// or `cancelled`, which is asked before each batch.
    pub fn evaluate(
        &self,
        windows: impl IntoIterator<Item = Vec<i64>>,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<EvaluationSum, TrainerError> {
        let _no_grad = tch::no_grad_guard();
        let mut loss_sum = zero(Kind::Double, self.device).doing("summing the held-out loss")?;
        let mut tokens = 0;
        let mut windows = windows.into_iter().peekable();
        while let Some(mut batch) = windows.next() {
            if cancelled() {
                return Err(TrainerError::Cancelled);
            }
            let length = batch.len();
            let mut rows = 1;
            while rows < self.micro_batch
                && let Some(window) = windows.next_if(|window| window.len() == length)
            {
                batch.extend(window);
                rows += 1;
            }
            self.check_window(length.saturating_sub(1))?;
            self.check_vocabulary(&batch)?;
            let loss = upload(&batch, &[rows as i64, length as i64], self.device)
                .and_then(|batch| self.model.loss(&batch, Reduction::Sum));
            let _ = loss.and_then(|loss| loss_sum.f_add_(&loss)).doing("computing the held-out loss")?;
            tokens += (rows * (length - 1)) as u64;
        }
        let loss_sum = loss_sum.f_double_value(&[]).doing("reading the held-out loss")?;
        Ok(EvaluationSum { loss_sum, tokens })
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
            .and_then(|tokens| self.model.forward(&tokens))
            .doing("computing logits")?;
        let mut values = vec![0.0; tokens.len() * self.vocabulary];
        logits.f_copy_data(&mut values, tokens.len() * self.vocabulary).doing("reading logits")?;
        Ok(values)
    }

    /// Whether the model can be given `length` tokens at once.
    fn check_window(&self, length: usize) -> Result<(), TrainerError> {
        if (1..=self.context).contains(&length) {
            return Ok(());
        }
        let expected = format!("1 to the model's context of {}", self.context);
        Err(TrainerError::Tokens { what: "the text to be read", found: length, expected })
    }
}
