//! `generate`: a checkpoint continues a text, printed as it comes.

use std::{io::Write, path::PathBuf};

use anyhow::{Result, bail};
use clap::Args;

use super::DeviceArguments;
use crate::{local::generate_from_checkpoint, trainer::Sampling};

/// Arguments of `generate`.
#[derive(Debug, Args)]
pub(super) struct GenerateArguments {
    /// Checkpoint directory, as `transformers` loads it
    checkpoint: PathBuf,
    /// The text to continue; empty: a document is begun
    prompt: String,
    /// Tokens to add at most
    #[arg(long, default_value_t = 200, value_name = "N")]
    tokens: usize,
    /// Divides the logits: 0 takes the likeliest token, more is more daring
    #[arg(long, default_value_t = 0.8, value_name = "T")]
    temperature: f64,
    /// Draw among the likeliest tokens that together have this probability
    #[arg(long, default_value_t = 0.95, value_name = "P")]
    top_p: f64,
    /// Seed of the draws: the same seed gives the same text
    #[arg(long, default_value_t = 0, value_name = "N")]
    seed: u64,
    #[command(flatten)]
    device: DeviceArguments,
}

impl GenerateArguments {
    pub(super) fn run(&self) -> Result<()> {
        if !self.temperature.is_finite() || self.temperature < 0.0 || !(0.0..=1.0).contains(&self.top_p) {
            bail!("--temperature must be at least 0, --top-p from 0 to 1");
        }
        let sampling = Sampling { temperature: self.temperature, top_p: self.top_p, seed: self.seed };
        let device = self.device.open()?;
        let mut out = std::io::stdout();
        write!(out, "{}", self.prompt)?;
        // Whoever reads may have had enough: then nothing is left to be done with the text.
        let mut written = Ok(());
        let generated = generate_from_checkpoint(
            &self.checkpoint,
            &self.prompt,
            self.tokens,
            sampling,
            device,
            &mut |text| {
                if written.is_ok() {
                    written = write!(out, "{text}").and_then(|()| out.flush());
                }
            },
        )?;
        written?;
        writeln!(out)?;
        let seconds = generated.time.as_secs_f64().max(1e-9);
        #[allow(clippy::cast_precision_loss)]
        let tokens_per_second = generated.tokens as f64 / seconds;
        eprintln!("{} tokens in {seconds:.1} s: {tokens_per_second:.1} tokens/s", generated.tokens);
        Ok(())
    }
}
