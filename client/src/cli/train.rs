//! `train`: a run's model trained on one folder of text, alone; the baseline for a federation.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};
use clap::Args;
use consort_common::{
    checkpoint,
    ids::SiteName,
    spec::{RunSpec, TokenizerSpec},
    tokenizer::{BYTE_END_OF_TEXT, byte_tokenizer_json},
    units,
};

use super::{DeviceArguments, bar::Bar, evaluate, text};
use crate::{
    data::{HeldOut, Tokenizer},
    local::{LocalProgress, train_locally},
};

/// Arguments of `train`.
#[derive(Debug, Args)]
pub(super) struct TrainArguments {
    /// The run's specification, as given to `consort runs create`
    specification: PathBuf,
    /// Folder or file with text: .txt or .jsonl, also .gz or .zst
    #[arg(long, value_name = "PATH")]
    data: PathBuf,
    /// Where the checkpoint goes: a new folder, or a checkpoint to be replaced
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Optimizer steps, over which the learning rate's schedule extends [default: the run's]
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Train in the order of this site
    #[arg(long, default_value = "alone", value_name = "NAME")]
    site: SiteName,
    /// Folder where the tokenised text is kept for a next time [default: none]
    #[arg(long, value_name = "FOLDER")]
    cache: Option<PathBuf>,
    /// Print one JSON document about the held-out loss instead of text
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArguments,
}

impl TrainArguments {
    pub(super) fn run(&self) -> Result<()> {
        let toml = fs::read_to_string(&self.specification)
            .with_context(|| format!("cannot read the specification {}", self.specification.display()))?;
        let spec = RunSpec::parse(&toml)?;
        check_out(&self.out)?;
        let device = self.device.open()?;
        let (tokenizer_json, end_of_text) = tokenizer(&spec.tokenizer, &self.specification)?;
        let tokenizer = Tokenizer::for_run(&spec.tokenizer, tokenizer_json.as_bytes())?;
        let end_of_text_id = tokenizer.end_of_text();
        let dataset = text::prepare(
            &self.data,
            self.cache.as_deref(),
            tokenizer,
            spec.evaluation.held_out_fraction,
            spec.model.vocab_size(),
        )?;

        let steps = self.steps.unwrap_or(spec.run_steps());
        let mut bar = Bar::new("training");
        let mut tell = |progress: LocalProgress| {
            bar.update(progress.step, progress.steps, &progress_text(&progress));
        };
        let flat = train_locally(&spec, &dataset, self.site.as_str(), steps, device, &mut tell, &|| false)?;
        drop(bar);
        let metadata = BTreeMap::from([
            ("consort.specification".to_owned(), RunSpec::digest(&toml).to_string()),
            ("consort.trained_alone_by".to_owned(), self.site.to_string()),
            ("consort.steps".to_owned(), steps.to_string()),
        ]);
        checkpoint::write(
            &self.out,
            &spec.model,
            &flat,
            &tokenizer_json,
            &end_of_text,
            end_of_text_id,
            &metadata,
        )?;

        let sequence_length = spec.training.sequence_length as usize;
        let held_out = HeldOut::new(dataset.held_out, sequence_length, spec.evaluation.tokens_max)?;
        let sum = text::measure(&spec.model, &flat, &held_out, device)?;
        evaluate::print(sum, held_out.text_bytes(), self.json);
        if !self.json {
            println!("checkpoint      {}", self.out.display());
        }
        Ok(())
    }
}

fn progress_text(progress: &LocalProgress) -> String {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let speed = units::count(progress.tokens_per_second as u64);
    format!(
        "step {} of {}, loss {:.4}, {speed} tokens/s, {:.2}% waiting for data",
        progress.step,
        progress.steps,
        progress.loss,
        progress.waited_share * 100.0
    )
}

/// The run's `tokenizer.json` and its end of text.
fn tokenizer(spec: &TokenizerSpec, specification: &Path) -> Result<(String, String)> {
    match spec {
        TokenizerSpec::Byte {} => Ok((byte_tokenizer_json(), BYTE_END_OF_TEXT.to_owned())),
        TokenizerSpec::File { path, end_of_text } => {
            let path = specification.parent().unwrap_or(Path::new(".")).join(path);
            let json = fs::read_to_string(&path).with_context(|| {
                format!("cannot read the tokenizer {} that the specification names", path.display())
            })?;
            Ok((json, end_of_text.clone()))
        }
    }
}

/// Refuses to replace a folder that holds something else: it would be gone.
fn check_out(out: &Path) -> Result<()> {
    let is_empty = match fs::read_dir(out) {
        Ok(mut entries) => entries.next().is_none(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => bail!("cannot write a checkpoint to {}: {error}", out.display()),
    };
    if is_empty || (out.join("config.json").is_file() && out.join("model.safetensors").is_file()) {
        return Ok(());
    }
    bail!("{} holds something that is no checkpoint: name a new folder with --out", out.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_checkpoints_and_empty_folders_are_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let out = folder.path().join("out");
        check_out(&out).unwrap();
        fs::create_dir(&out).unwrap();
        check_out(&out).unwrap();
        fs::write(out.join("thesis.tex"), "").unwrap();
        assert!(check_out(&out).unwrap_err().to_string().contains("no checkpoint"));
        for name in ["config.json", "model.safetensors"] {
            fs::write(out.join(name), "").unwrap();
        }
        check_out(&out).unwrap();
        assert!(check_out(&out.join("config.json")).is_err());
    }
}
