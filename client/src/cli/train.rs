//! `train`: a run's model trained on one folder of text, alone; the baseline for a federation.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use clap::{Args, value_parser};
use consort_common::{
    checkpoint,
    ids::SiteName,
    spec::{RunSpec, TokenizerSpec},
    tokenizer::{BYTE_END_OF_TEXT, byte_tokenizer_json},
    units,
};
use tokio_util::sync::CancellationToken;

use super::{DeviceArguments, bar::Bar, data::DataArguments, evaluate, start::Start, text, until_signalled};
use crate::{
    data::{DataError, Dataset, HeldOut, Tokenizer},
    local_training::{Folder, LocalProgress, LocalTraining, Request},
    steps::Text,
};

/// Arguments of `train`.
#[derive(Debug, Args)]
pub(super) struct TrainArguments {
    /// The run's specification, as given to `consort runs create`
    specification: PathBuf,
    #[command(flatten)]
    data: DataArguments,
    /// Where the checkpoint goes: a new folder, or a checkpoint to be replaced
    #[arg(long, value_name = "FOLDER")]
    out: PathBuf,
    /// Start from this checkpoint, a Hugging Face directory [default: the specification's, else new weights]
    #[arg(long, value_name = "CHECKPOINT")]
    from: Option<PathBuf>,
    /// Begin anew, whatever an earlier training has left in OUT.training, and replace what it came to
    #[arg(long)]
    fresh: bool,
    /// Optimizer steps, over which the learning rate's schedule extends [default: the run's]
    #[arg(long, value_name = "N")]
    steps: Option<u64>,
    /// Train in the order of this site
    #[arg(long, default_value = "alone", value_name = "NAME")]
    site: SiteName,
    /// Steps between two rows of metrics.csv
    #[arg(long, default_value_t = 10, value_name = "N", value_parser = value_parser!(u64).range(1..))]
    log_every: u64,
    /// Steps between two measurements of the held-out loss; 0: only at the end
    #[arg(long, default_value_t = 0, value_name = "N")]
    evaluate_every: u64,
    /// Seconds between two local checkpoints: what a crash can cost
    #[arg(long, default_value_t = 300, value_name = "SECONDS")]
    checkpoint_seconds: u64,
    /// Folder where the tokenised text is kept for a next time [default: OUT.training, until it is done]
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
        until_signalled(|stop| self.train(stop))
    }

    fn train(&self, stop: &CancellationToken) -> Result<()> {
        let toml = fs::read_to_string(&self.specification)
            .with_context(|| format!("cannot read the specification {}", self.specification.display()))?;
        check_out(&self.out)?;
        let start = self.start(&toml)?;
        let toml = start.as_ref().map_or(toml, |start| start.specification.clone());
        let spec = RunSpec::parse(&toml)?;
        let folder = Folder::open(&beside(&self.out)?)?;
        if let Some(start) = &start {
            check_apart(&start.directory, &self.out)?;
        }
        if let Some(steps) = self.steps {
            check_steps(&spec, steps)?;
        }
        if self.fresh {
            folder.forget()?;
        } else if folder.has_only_metrics() && is_checkpoint(&self.out) {
            bail!(
                "{} holds a finished training, and {} its metrics: name a new folder with --out, or train anew over \
                 them with --fresh",
                self.out.display(),
                folder.metrics().display()
            );
        }
        let device = self.device.open()?;
        let (tokenizer_json, end_of_text) = tokenizer(&spec.tokenizer, &self.specification)?;
        let tokenizer = Tokenizer::for_run(&spec.tokenizer, tokenizer_json.as_bytes())?;
        let end_of_text_id = tokenizer.end_of_text();
        if let Some(start) = &start {
            start.check(&spec, &tokenizer_json)?;
            if let Some(line) = start.other_document_mask(&spec) {
                eprintln!("{line}");
            }
        }
        let from = start.as_ref().map(|start| start.directory.display().to_string());
        let start =
            start.map_or_else(|| spec.model.manifest().initialise(spec.seed), |start| start.parameters);
        let cache = self.cache.clone().unwrap_or_else(|| folder.text());
        let dataset = text::prepare(
            &self.data.sources,
            Some(&cache),
            tokenizer,
            spec.evaluation.held_out_fraction,
            spec.model.vocab_size(),
            &|| stop.is_cancelled(),
        )?;
        let held_out = held_out(&spec, &dataset)?;

        let steps = self.steps.unwrap_or(spec.run_steps());
        let request = Request {
            text: Text { spec: &spec, dataset: &dataset, site: self.site.as_str() },
            start: &start,
            steps,
            held_out: held_out.as_ref(),
            log_every: self.log_every,
            evaluate_every: self.evaluate_every,
            checkpoint_interval: Duration::from_secs(self.checkpoint_seconds),
            device,
        };
        let training = LocalTraining::open(&folder, request)?;
        if training.steps_done() > 0 {
            eprintln!("going on after step {} of {steps}", training.steps_done());
        }
        let bar = RefCell::new(Bar::new("training"));
        let mut tell = |progress: LocalProgress| {
            bar.borrow_mut().update(progress.step, steps, &progress_text(&progress, steps));
        };
        let trained = training.run(&mut tell, &|| stop.is_cancelled())?;
        drop(bar);
        let mut metadata = BTreeMap::from([
            ("consort.specification".to_owned(), RunSpec::digest(&toml).to_string()),
            ("consort.trained_alone_by".to_owned(), self.site.to_string()),
            ("consort.steps".to_owned(), steps.to_string()),
            (checkpoint::DOCUMENT_MASK.to_owned(), spec.training.document_mask.to_string()),
        ]);
        metadata.extend(from.map(|from| ("consort.started_from".to_owned(), from)));
        checkpoint::write(
            &self.out,
            &spec.model,
            &trained.parameters,
            &tokenizer_json,
            &end_of_text,
            end_of_text_id,
            &metadata,
        )?;
        folder.forget()?;

        if let (Some(sum), Some(held_out)) = (trained.held_out, held_out) {
            evaluate::print(sum, held_out.text_bytes(), self.json);
        }
        if !self.json {
            println!("checkpoint      {}", self.out.display());
            println!("metrics         {}", folder.metrics().display());
        }
        Ok(())
    }

    /// What training starts from, where that is not new weights: `--from`, or what the specification names.
    fn start(&self, toml: &str) -> Result<Option<Start>> {
        let directory = self.from.clone().or_else(|| Start::named(&self.specification, toml));
        directory.map(|directory| Start::open(directory, toml)?.with_parameters()).transpose()
    }
}

/// `OUT.training`.
fn beside(out: &Path) -> Result<PathBuf> {
    let Some(name) = out.file_name() else { bail!("--out is {}: name a folder", out.display()) };
    let mut name = name.to_owned();
    name.push(".training");
    Ok(out.with_file_name(name))
}

/// The held-out windows, if the specification asks for any and the text has as much as one.
fn held_out(spec: &RunSpec, dataset: &Dataset) -> Result<Option<HeldOut>> {
    let sequence_length = spec.training.sequence_length as usize;
    match HeldOut::new(dataset.held_out.clone(), sequence_length, spec.evaluation.tokens_max) {
        Ok(held_out) => Ok(Some(held_out)),
        Err(error @ DataError::TooShort { .. }) => {
            tracing::warn!("no held-out loss is measured: {error}");
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

fn progress_text(progress: &LocalProgress, steps: u64) -> String {
    let LocalProgress { step, latest, held_out_loss } = progress;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let speed = units::count(latest.tokens_per_second() as u64);
    let loss = latest.loss().map_or_else(String::new, |loss| format!(", loss {loss:.4}"));
    let held_out = held_out_loss.map_or_else(String::new, |loss| format!(" (held-out {loss:.4})"));
    let waited = latest.waited_share() * 100.0;
    format!("step {step} of {steps}{loss}{held_out}, {speed} tokens/s, {waited:.2}% waiting for data")
}

/// The run's `tokenizer.json` and its end of text.
pub(super) fn tokenizer(spec: &TokenizerSpec, specification: &Path) -> Result<(String, String)> {
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

fn is_checkpoint(folder: &Path) -> bool {
    folder.join("config.json").is_file() && folder.join("model.safetensors").is_file()
}

/// Refuses `--steps` that the learning rate's schedule does not fit into, as a specification would be. Without
/// any step there is no learning rate.
fn check_steps(spec: &RunSpec, steps: u64) -> Result<()> {
    let problems = if steps > 0 { spec.schedule_problems(steps) } else { Vec::new() };
    if problems.is_empty() {
        return Ok(());
    }
    let problems: Vec<String> = problems.iter().map(|problem| format!("\n  {problem}")).collect();
    bail!("--steps is {steps}, into which the learning rate's schedule does not fit:{}", problems.concat())
}

/// Refuses to replace the checkpoint that training starts from: what it went on from would be gone.
fn check_apart(start: &Path, out: &Path) -> Result<()> {
    let same = match (start.canonicalize(), out.canonicalize()) {
        (Ok(start), Ok(out)) => start == out,
        _ => false, // what is not there yet is another folder
    };
    if same {
        bail!(
            "training starts from {}, which --out would replace: name another folder with --out",
            out.display()
        );
    }
    Ok(())
}

/// Refuses to replace a folder that holds something else: it would be gone.
fn check_out(out: &Path) -> Result<()> {
    let is_empty = match fs::read_dir(out) {
        Ok(mut entries) => entries.next().is_none(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => bail!("cannot write a checkpoint to {}: {error}", out.display()),
    };
    if is_empty || is_checkpoint(out) {
        return Ok(());
    }
    bail!("{} holds something that is no checkpoint: name a new folder with --out", out.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_training_lies_beside_its_result() {
        for (out, training) in [("a/b", "a/b.training"), ("a/b/", "a/b.training"), ("b", "b.training")] {
            assert_eq!(beside(Path::new(out)).unwrap(), Path::new(training));
        }
        assert!(beside(Path::new("..")).is_err());
    }

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

    #[test]
    fn the_checkpoint_that_training_starts_from_is_not_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let from = folder.path().join("from");
        check_apart(&from, &from.join("../new")).unwrap();
        fs::create_dir(&from).unwrap();
        check_apart(&from, &folder.path().join("new")).unwrap();
        let error = check_apart(&from, &from.join("../from/")).unwrap_err().to_string();
        assert!(error.contains("--out would replace"), "{error}");
    }

    #[test]
    fn steps_that_the_schedule_does_not_fit_into_are_refused() {
        let schedule = "training.schedule = { kind = 'cosine', warmup_steps = 20 }";
        let toml = format!("name = 'r'\nrounds = 1\nmodel.architecture = 'llama'\n{schedule}\n");
        let spec = RunSpec::parse(&toml).unwrap();
        for steps in [0, 20, 1_000_000] {
            check_steps(&spec, steps).unwrap();
        }
        let error = check_steps(&spec, 19).unwrap_err().to_string();
        assert!(error.contains("--steps is 19") && error.contains("warmup_steps is 20"), "{error}");
    }
}
