//! `evaluate`: a checkpoint's loss on text. Without `--tokens-max` on each distinct document, each token once, so
//! that the bits per byte compare across tokenizers; with it over the very windows that the daemon measures on when it
//! is given the same fraction, sequence length, number of tokens and document mask.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::Args;
use consort_common::checkpoint::CheckpointReader;
use serde_json::json;

use super::{DeviceArguments, text};
use crate::{
    data::{HeldOut, Source, Tokenizer},
    local,
    trainer::EvaluationSum,
};

/// Longest sequence that is measured unasked, in tokens: memory and time grow with it.
const SEQUENCE_LENGTH_MAX: usize = 4096;

/// Arguments of `evaluate`.
#[derive(Debug, Args)]
pub(super) struct EvaluateArguments {
    /// Checkpoint directory, as `transformers` loads it
    checkpoint: PathBuf,
    /// Folder or file with text: .txt or .jsonl, also .gz or .zst, or .parquet
    data: Source,
    /// Measure only on the documents that a site holds out
    #[arg(long)]
    held_out_only: bool,
    /// Share of documents that is held out, as in the run's specification
    #[arg(long, default_value_t = 0.05, value_name = "FRACTION", requires = "held_out_only")]
    held_out_fraction: f64,
    /// Tokens that each sequence predicts, as in the run's specification [default: the context, at most 4096]
    #[arg(long, value_name = "N")]
    sequence_length: Option<usize>,
    /// Whether to keep attention within documents, as training.document_mask in the run's specification [default: as
    /// the checkpoint was trained, if it says so, else false]
    #[arg(long, value_name = "BOOLEAN", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    document_mask: Option<bool>,
    /// Tokens to measure on at most, spread over the text, as in the run's specification [default: all]
    #[arg(long, value_name = "N")]
    tokens_max: Option<u64>,
    /// Folder where the tokenised text is kept for a next time [default: none]
    #[arg(long, value_name = "FOLDER")]
    cache: Option<PathBuf>,
    /// Print one JSON document instead of text
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArguments,
}

impl EvaluateArguments {
    pub(super) fn run(&self) -> Result<()> {
        let checkpoint = CheckpointReader::open(&self.checkpoint)
            .with_context(|| format!("cannot use {} as a checkpoint", self.checkpoint.display()))?;
        let context = checkpoint.architecture().context_length();
        let sequence_length = self.sequence_length.unwrap_or(context.min(SEQUENCE_LENGTH_MAX));
        if sequence_length == 0 || sequence_length > context {
            bail!("--sequence-length is {sequence_length}; allowed: 1 to the model's context of {context}");
        }
        let device = self.device.open()?;
        let tokenizer =
            Tokenizer::from_json(checkpoint.tokenizer_json().as_bytes(), checkpoint.end_of_text())?;
        let end_of_text = tokenizer.end_of_text();
        let held_out_fraction = if self.held_out_only { self.held_out_fraction } else { 0.0 };
        let vocabulary_size = checkpoint.architecture().vocab_size();
        let dataset = text::prepare(
            std::slice::from_ref(&self.data),
            self.cache.as_deref(),
            tokenizer,
            held_out_fraction,
            vocabulary_size,
            &|| false,
        )?;
        // There is one source.
        let shard =
            if self.held_out_only { &dataset.held_out } else { &dataset.train.parts()[0].shard }.clone();
        let windows = match self.tokens_max {
            Some(tokens_max) => HeldOut::new(shard, sequence_length, tokens_max)?,
            None => HeldOut::whole(shard, sequence_length, end_of_text)?,
        };
        let mut model = local::load(&checkpoint, device)?;
        if self.document_mask.or(checkpoint.document_mask()).unwrap_or(false) {
            model = model.with_documents_apart(end_of_text);
        }
        let sum = text::measure(&model, &windows)?;
        print(sum, windows.text_bytes(), self.json);
        Ok(())
    }
}

/// Prints what was measured on `text_bytes` of text.
pub(super) fn print(sum: EvaluationSum, text_bytes: u64, as_json: bool) {
    let (loss, perplexity) = (sum.loss(), sum.perplexity());
    let bits_per_byte = bits_per_byte(sum, text_bytes);
    if as_json {
        let result = json!({
            "loss": loss,
            "perplexity": perplexity,
            "bits_per_byte": bits_per_byte,
            "tokens": sum.tokens,
            "text_bytes": text_bytes,
        });
        println!("{result}");
    } else {
        println!("loss            {loss:.4} nats per token");
        println!("perplexity      {perplexity:.3}");
        println!("bits per byte   {bits_per_byte:.4}");
        println!("measured on     {} tokens ({text_bytes} bytes of text)", sum.tokens);
    }
}

/// A document's last token, its end, costs bits and has no bytes: every tokenizer has one per document.
#[allow(clippy::cast_precision_loss)]
fn bits_per_byte(sum: EvaluationSum, text_bytes: u64) -> f64 {
    sum.loss_sum / std::f64::consts::LN_2 / text_bytes as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_tokenizers_loss_of_ln_2_is_one_bit_per_byte() {
        let bits =
            bits_per_byte(EvaluationSum { loss_sum: 100.0 * std::f64::consts::LN_2, tokens: 100 }, 100);
        assert!((bits - 1.0).abs() < 1e-12, "{bits}");
    }
}
