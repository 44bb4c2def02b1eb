//! One training, federated or centralised, and what came of it. What is finished is kept under a name that follows
//! from its specification, its text and what happens on the way, and is not done again.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use consort_common::{codec::Encoding, ids::Digest, spec::RunSpec};
use consort_tests::{binaries, federation::device};
use serde::Serialize;
use serde_json::Value;
use toml::Table;

use super::{
    Work,
    alteration::Alteration,
    corpora::Split,
    federation::{Federation, asked},
    outcome::Outcome,
    report,
};

/// Tokens of the common held-out text that every final model is measured on, of all domains.
const FINAL_TOKENS: u32 = 120_000;
/// Tokens of held-out text for a point of a curve, over all sites.
const CURVE_TOKENS: i64 = 40_000;
/// Points of a curve.
const CURVE_POINTS: i64 = 8;
/// The final model, in its trial's folder.
const MODEL: &str = "model";
/// A round that lasts longer than this is stuck.
const ROUND_MAX: Duration = Duration::from_secs(180);
/// Pause between two looks at a run.
const POLL: Duration = Duration::from_secs(1);

/// What is trained.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Trial {
    /// The run's specification, but for what it starts from.
    pub spec: Table,
    /// The trial whose model it starts from, as [`Work::started_by`] names it; without, from new weights.
    pub start: Option<String>,
    /// Who trains.
    pub sites: Sites,
    /// What happens to sites on the way.
    pub events: Vec<Event>,
    /// What sites make of their deltas, by their number from 1.
    pub alterations: Vec<(usize, Alteration)>,
    /// The sites' links.
    pub links: Links,
}

/// How sites reach the aggregator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) enum Links {
    /// Over loopback.
    Loopback,
    /// Each from a network namespace of its own, over a link of so many Mbit/s in either direction, or as fast as the
    /// machine is.
    Namespaces(Option<u32>),
}

/// Who trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) enum Sites {
    /// One process with all text and no federation: `consort-client train`.
    Centralised,
    /// So many sites, each a daemon with its own part of the text.
    Federated(usize, Split),
}

/// Something that happens to a site, once so many rounds are committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Event {
    pub round: u64,
    /// From 1.
    pub site: usize,
    pub what: What,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) enum What {
    /// SIGKILL.
    Killed,
    Started,
}

impl Trial {
    /// Sets a key of the specification: `training.local_steps`.
    pub(super) fn with(mut self, key: &str, value: impl Into<toml::Value>) -> Self {
        set(&mut self.spec, key, value.into());
        self
    }

    /// A number of the specification; 0 if it has none there.
    pub(super) fn integer(&self, key: &str) -> i64 {
        self.value(key).as_ref().and_then(toml::Value::as_integer).unwrap_or_default()
    }

    fn value(&self, key: &str) -> Option<toml::Value> {
        let spec = toml::Value::Table(self.spec.clone());
        key.split('.').try_fold(&spec, |at, part| at.get(part)).cloned()
    }

    /// A real number of the specification, which it must have.
    pub(super) fn number(&self, key: &str) -> Result<f64> {
        let value = self.value(key);
        value.as_ref().and_then(toml::Value::as_float).with_context(|| format!("{key} is no real number"))
    }

    /// Optimizer steps of each site.
    pub(super) fn steps(&self) -> i64 {
        self.integer("rounds") * self.integer("training.local_steps")
    }

    /// Bytes that gradients as fp32 would have, one of each site at each step.
    pub(super) fn gradient_bytes(&self) -> Result<f64> {
        let parameters = RunSpec::parse(&toml::to_string(&self.spec)?)?.model.manifest().parameters();
        Ok(4.0 * parameters as f64 * self.steps() as f64 * self.sites() as f64)
    }

    /// Bytes of all deltas, if each chunk has what `encoding` makes of it and no more.
    pub(super) fn delta_bytes(&self, encoding: Encoding) -> Result<f64> {
        let plan = RunSpec::parse(&toml::to_string(&self.spec)?)?.chunk_plan();
        let lengths: Vec<usize> =
            (0..plan.chunks()).map(|index| plan.length(index)).collect::<Result<_, _>>()?;
        let delta: usize = lengths.into_iter().map(|length| encoding.codec().encoded_bytes(length)).sum();
        Ok(delta as f64 * self.integer("rounds") as f64 * self.sites() as f64)
    }

    fn sites(&self) -> usize {
        match self.sites {
            Sites::Centralised => 1,
            Sites::Federated(sites, _) => sites,
        }
    }
}

/// Sets a key of a table of tables.
pub(super) fn set(table: &mut Table, key: &str, value: toml::Value) {
    match key.split_once('.') {
        None => drop(table.insert(key.to_owned(), value)),
        Some((section, rest)) => {
            let section = table.entry(section).or_insert_with(|| Table::new().into());
            if let Some(section) = section.as_table_mut() {
                set(section, rest, value);
            }
        }
    }
}

impl Work {
    /// What comes of the trial: from the last time, or else now.
    pub(super) fn outcome(&self, label: &str, trial: &Trial) -> Result<Outcome> {
        let trial = self.completed(trial)?;
        let folder = self.trial_folder(&trial)?;
        if let Some(outcome) = Outcome::read(&folder) {
            return Ok(outcome);
        }
        let outcome = match trial.sites {
            Sites::Centralised => self.train_alone(&trial, &folder),
            Sites::Federated(sites, split) => self.train_federated(&trial, sites, split, &folder),
        };
        let outcome = outcome.with_context(|| format!("{label}, in {}", folder.display()))?;
        outcome.write(&folder)?;
        self.say(&format!("{label}: loss {:.4}, {:.0} s", outcome.loss, outcome.seconds));
        Ok(outcome)
    }

    /// The trial with a curve of some points; without where times are what is measured.
    fn completed(&self, trial: &Trial) -> Result<Trial> {
        if trial.links != Links::Loopback {
            return Ok(trial.clone().with("evaluation.every_rounds", 0));
        }
        let every = (trial.integer("rounds") / CURVE_POINTS).max(1);
        let tokens = CURVE_TOKENS / i64::try_from(trial.sites())?;
        Ok(trial.clone().with("evaluation.tokens_max", tokens).with("evaluation.every_rounds", every))
    }

    /// Where a trial is kept: under the digest of what it is, whatever programs did it.
    fn trial_folder(&self, trial: &Trial) -> Result<PathBuf> {
        let what = serde_json::to_string_pretty(&trial)?;
        let identity = Digest::of((what.clone() + &self.corpora.digest()).as_bytes());
        let folder = self.trials().join(&identity.to_string()[..16]);
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("trial.json"), what)?;
        Ok(folder)
    }

    fn trials(&self) -> PathBuf {
        self.folder.join("trials")
    }

    /// Trains centrally what other trials start from, unless that is there: its name.
    pub(super) fn started_by(&self, label: &str, trial: &Trial) -> Result<String> {
        self.outcome(label, trial)?;
        let folder = self.trial_folder(&self.completed(trial)?)?;
        let name = folder.file_name().context("a trial has a folder")?;
        Ok(name.to_string_lossy().into_owned())
    }

    /// The specification as it is given to the programs.
    fn specification(&self, trial: &Trial) -> Result<String> {
        let mut spec = trial.spec.clone();
        if let Some(start) = &trial.start {
            let model = self.trials().join(start).join(MODEL).canonicalize()?;
            set(&mut spec, "start.checkpoint", model.to_string_lossy().into_owned().into());
        }
        Ok(toml::to_string(&spec)?)
    }

    fn train_alone(&self, trial: &Trial, folder: &Path) -> Result<Outcome> {
        let specification = folder.join("specification.toml");
        fs::write(&specification, self.specification(trial)?)?;
        let model = folder.join(MODEL);
        let began = Instant::now();
        let mut command = Command::new(binaries::client());
        command
            .arg("train")
            .arg(&specification)
            .arg("--data")
            .arg(self.corpora.all()?)
            .arg("--out")
            .arg(&model);
        // In the order in which the only site of a federation takes the text, and with what each site has.
        command.args([
            "--site",
            "site-1",
            "--device",
            &device(),
            "--threads",
            "1",
            "--checkpoint-seconds",
            "20",
            "--steps",
            &trial.steps().to_string(),
        ]);
        // What was interrupted goes on; what was trained, and then not measured, is trained anew.
        command.args(model.exists().then_some("--fresh"));
        command.args(["--evaluate-every", &(trial.steps() / CURVE_POINTS).max(1).to_string()]);
        let log = folder.join("log.txt");
        let file = File::create(&log)?;
        let status = command.stdout(file.try_clone()?).stderr(file).status()?;
        if !status.success() {
            bail!("the training failed: see {}", log.display());
        }
        let seconds = began.elapsed().as_secs_f64();
        let curve = report::metrics(&folder.join("model.training/metrics.csv"))?;
        let tokens =
            trial.steps() * trial.integer("training.batch_size") * trial.integer("training.sequence_length");
        let loss = self.final_loss(&model)?;
        Ok(Outcome {
            loss,
            tokens: tokens as f64,
            seconds,
            train_seconds: seconds,
            curve,
            ..Outcome::default()
        })
    }

    fn train_federated(&self, trial: &Trial, sites: usize, split: Split, folder: &Path) -> Result<Outcome> {
        let names: Vec<String> = (1..=sites).map(|site| format!("site-{site}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let mut federation = Federation::new(trial, &names)?;
        for (site, text) in names.iter().zip(self.corpora.sites(split, sites)?) {
            let data = federation.processes.kit(&format!("site-{site}")).join("data");
            fs::remove_dir_all(&data)?;
            std::os::unix::fs::symlink(text, data)?;
        }
        federation.processes.start_aggregator();
        let first =
            |site: usize| trial.events.iter().find(|event| event.site == site).map(|event| event.what);
        for site in (1..=sites).filter(|site| first(*site) != Some(What::Started)) {
            federation.start(trial, site);
        }
        federation.processes.start_run(&self.specification(trial)?);
        self.watch(trial, &mut federation)?;
        let federation = &federation.processes;

        let run = trial.spec["name"].as_str().context("a run has a name")?;
        let show = asked(federation, &["runs", "show", run])?;
        let rounds = asked(federation, &["rounds", "list", run])?;
        let rounds = rounds["rounds"].as_array().context("a run has rounds")?;
        fs::write(folder.join("rounds.json"), serde_json::to_vec(&rounds)?)?;
        let figure = |value: &Value, name: &str| value[name].as_f64().unwrap_or(f64::NAN);
        let local_steps = trial.integer("training.local_steps") as f64;
        let point =
            |round: &Value| Some((figure(round, "round") * local_steps, round["validation_loss"].as_f64()?));
        let mut committed = vec![figure(&show, "started_unix_ms")];
        committed.extend(rounds.iter().map(|round| figure(round, "committed_unix_ms")));
        let bytes = |round: &Value| figure(round, "bytes_up") + figure(round, "bytes_down");
        let mut train_seconds = 0.0;
        for round in 1..=rounds.len() {
            let round = asked(federation, &["rounds", "show", run, &round.to_string()])?;
            let contributions = round["contributions"].as_array().into_iter().flatten();
            train_seconds += contributions.map(|one| figure(one, "train_seconds")).sum::<f64>();
        }
        let model = folder.join(MODEL);
        if model.exists() {
            fs::remove_dir_all(&model)?;
        }
        let path = model.to_str().context("a path is text")?;
        asked(federation, &["checkpoints", "get", run, "--out", path])?;
        let loss = self.final_loss(&model)?;
        fs::remove_dir_all(&model)?;
        Ok(Outcome {
            loss,
            tokens: figure(&show, "tokens"),
            bytes_up: figure(&show, "bytes_up"),
            bytes_down: figure(&show, "bytes_down"),
            seconds: (figure(&show, "finished_unix_ms") - figure(&show, "started_unix_ms")) / 1e3,
            train_seconds,
            curve: rounds.iter().filter_map(point).collect(),
            round_bytes: rounds.iter().map(bytes).collect(),
            round_seconds: committed.windows(2).map(|pair| (pair[1] - pair[0]) / 1e3).collect(),
        })
    }

    /// Sees to the run until it has ended.
    fn watch(&self, trial: &Trial, federation: &mut Federation) -> Result<()> {
        let run = trial.spec["name"].as_str().context("a run has a name")?;
        let mut events = trial.events.clone();
        let (mut committed, mut since) = (0, Instant::now());
        loop {
            let show = asked(&federation.processes, &["runs", "show", run])?;
            match show["status"].as_str() {
                Some("finished") => {
                    ensure!(events.is_empty(), "the run had ended before {events:?}");
                    return Ok(());
                }
                Some("aborted") => bail!("the run was aborted: {}", show["reason"]),
                _ => {}
            }
            let version = show["version"].as_u64().unwrap_or_default();
            if version > committed {
                (committed, since) = (version, Instant::now());
            }
            for Event { site, what, .. } in events.extract_if(.., |event| event.round <= committed) {
                self.say(&format!("site {site} is {what:?} after round {committed}").to_lowercase());
                match what {
                    What::Killed => federation.kill(site),
                    What::Started => federation.start(trial, site),
                }
            }
            federation.check()?;
            if since.elapsed() > ROUND_MAX {
                let log = federation.processes.aggregator().output();
                bail!("no round in {} s:\n{log}", ROUND_MAX.as_secs());
            }
            thread::sleep(POLL);
        }
    }

    fn final_loss(&self, model: &Path) -> Result<f64> {
        let output = Command::new(binaries::client())
            .arg("evaluate")
            .arg(model)
            .arg(self.corpora.all()?)
            .args(["--held-out-only", "--held-out-fraction", "0.05", "--json"])
            .args(["--device", &device(), "--tokens-max", &FINAL_TOKENS.to_string()])
            .output()?;
        let result: Value = serde_json::from_slice(&output.stdout)
            .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
        result["loss"].as_f64().context("evaluate prints a loss")
    }
}
