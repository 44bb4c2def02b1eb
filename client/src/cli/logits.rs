//! `logits`: what a checkpoint says to given tokens, number by number.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use super::DeviceArguments;
use crate::local::logits_of_checkpoint;

/// Arguments of `logits`.
#[derive(Debug, Args)]
pub(super) struct LogitsArguments {
    /// Checkpoint directory, as `transformers` loads it
    checkpoint: PathBuf,
    /// Token ids, separated by blanks or commas
    #[arg(long, value_name = "IDS")]
    tokens: String,
    #[command(flatten)]
    device: DeviceArguments,
}

impl LogitsArguments {
    pub(super) fn run(&self) -> Result<()> {
        let tokens = parse_tokens(&self.tokens)?;
        let logits = logits_of_checkpoint(&self.checkpoint, &tokens, self.device.open()?)?;
        let vocabulary = logits.len() / tokens.len().max(1);
        let rows: Vec<&[f32]> = logits.chunks(vocabulary.max(1)).collect();
        println!("{}", serde_json::json!({ "tokens": tokens, "logits": rows }));
        Ok(())
    }
}

fn parse_tokens(text: &str) -> Result<Vec<i64>> {
    text.split([' ', ','])
        .filter(|token| !token.is_empty())
        .map(|token| token.parse().with_context(|| format!("--tokens: {token:?} is no token id")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_ids_are_separated_by_blanks_or_commas() {
        assert_eq!(parse_tokens("1 2, 3").unwrap(), [1, 2, 3]);
        assert!(parse_tokens("1 x").unwrap_err().to_string().contains("\"x\""));
    }
}
