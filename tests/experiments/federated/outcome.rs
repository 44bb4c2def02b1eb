//! What came of a trial, and its files.

use std::path::Path;

use anyhow::Result;

use super::report::Figures;

/// What came of a trial.
#[derive(Debug, Clone, Default)]
pub(super) struct Outcome {
    /// Loss of the final model on the common held-out text, in nats per byte.
    pub loss: f64,
    /// Tokens trained, as far as they count in the model.
    pub tokens: f64,
    /// Bytes of deltas and models, as the aggregator counts them.
    pub bytes_up: f64,
    pub bytes_down: f64,
    /// From the start to the end of the run.
    pub seconds: f64,
    /// Seconds of training, over all sites.
    pub train_seconds: f64,
    /// Steps of each site and held-out losses.
    pub curve: Vec<(f64, f64)>,
    /// Seconds from each commit to the next.
    pub round_seconds: Vec<f64>,
    /// Bytes down and up in each round.
    pub round_bytes: Vec<f64>,
}

impl Outcome {
    const FIGURES: [&str; 6] = ["loss", "tokens", "bytes_up", "bytes_down", "seconds", "train_seconds"];

    fn figures(&self) -> Figures {
        let Self { loss, tokens, bytes_up, bytes_down, seconds, train_seconds, .. } = self;
        let values = [loss, tokens, bytes_up, bytes_down, seconds, train_seconds].map(|value| vec![*value]);
        Figures::new(&Self::FIGURES, values.to_vec())
    }

    /// What an earlier trial left in its folder, if that was finished.
    pub(super) fn read(folder: &Path) -> Option<Self> {
        let figure =
            |name: &str| Figures::read(&folder.join("outcome.csv")).ok()?.column(name)?.first().copied();
        let rounds = Figures::read(&folder.join("rounds.csv")).ok()?;
        let curve = Figures::read(&folder.join("curve.csv")).ok()?;
        let points = curve.column("step")?.into_iter().zip(curve.column("loss")?);
        Some(Self {
            loss: figure("loss")?,
            tokens: figure("tokens")?,
            bytes_up: figure("bytes_up")?,
            bytes_down: figure("bytes_down")?,
            seconds: figure("seconds")?,
            train_seconds: figure("train_seconds")?,
            curve: points.collect(),
            round_seconds: rounds.column("seconds")?,
            round_bytes: rounds.column("bytes")?,
        })
    }

    pub(super) fn write(&self, folder: &Path) -> Result<()> {
        let (steps, losses) = self.curve.iter().copied().unzip();
        Figures::new(&["step", "loss"], vec![steps, losses]).write(&folder.join("curve.csv"))?;
        let rounds = vec![self.round_seconds.clone(), self.round_bytes.clone()];
        Figures::new(&["seconds", "bytes"], rounds).write(&folder.join("rounds.csv"))?;
        // Last: with it the trial is finished.
        self.figures().write(&folder.join("outcome.csv"))
    }
}
