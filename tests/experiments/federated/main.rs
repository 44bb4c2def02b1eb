//! What federated training is worth, measured: the real aggregator and real daemons as processes on this machine,
//! over mutual TLS, on real text of several domains.
//!
//! Equal tokens, and equal steps: with K sites each takes 1/K of the sequences of a step, and the centralised run
//! takes them all, so that both see as many tokens in as many optimizer steps, as in the scaling laws for DiLoCo
//! (arXiv 2503.09799); where an experiment does otherwise, it says so. Losses are those of the final model on one
//! held-out text of all domains.
//!
//! Each experiment prints a table, writes it as CSV, and draws a chart. A run that is finished is kept under the
//! digest of what it is, and not done again: after an interruption the same command goes on. After a change of the
//! programs, take another folder.

mod alteration;
mod averaging;
mod chart;
mod comings;
mod corpora;
mod encodings;
mod federation;
mod hostile;
mod links;
mod network;
mod outcome;
mod recipes;
mod report;
mod trial;

use std::{collections::BTreeSet, fs, path::PathBuf, time::Instant};

use anyhow::{Result, ensure};
use clap::{Parser, ValueEnum};
use toml::Table;

use self::{
    corpora::{Corpora, Split},
    trial::{Links, Sites, Trial},
};

/// What federated training is worth, measured on this machine
#[derive(Debug, Parser)]
struct Arguments {
    /// Experiments to do [default: all]
    #[arg(value_name = "EXPERIMENT", ignore_case = true)]
    experiments: Vec<Experiment>,
    /// Three seeds (one in E7, which measures times), both starts in E2, E4 and E8, an average after every step
    /// in E3, all shares of dropped deltas in E6, and all attacks in E8
    #[arg(long)]
    full: bool,
    /// Optimizer steps of each run
    #[arg(long, value_name = "N", default_value_t = 512)]
    steps: i64,
    /// The sites' text, as deploy/corpora leaves it
    #[arg(long, default_value = ".cache/corpora", value_name = "FOLDER")]
    corpora: PathBuf,
    /// Where finished runs, tables and charts are kept
    #[arg(long, default_value = ".cache/experiments", value_name = "FOLDER")]
    out: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Experiment {
    /// Centralised training against 1, 2, 4 and 8 sites
    E1,
    /// Encodings of deltas: loss against bytes
    E2,
    /// Local steps between two averages
    E3,
    /// Photon's recipe against DiLoCo's
    E4,
    /// Sites with text of one domain each against mixed ones
    E5,
    /// Deltas that are dropped, sites that are killed and added
    E6,
    /// Round times over shaped links against the wall-time model
    E7,
    /// One hostile site of four
    E8,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let work = Work::new(&arguments)?;
    let all =
        if arguments.experiments.is_empty() { Experiment::value_variants() } else { &arguments.experiments };
    let (mut findings, mut failed) = (Vec::new(), Vec::new());
    for experiment in all {
        let found = match experiment {
            Experiment::E1 => averaging::sites(&work),
            Experiment::E2 => encodings::run(&work),
            Experiment::E3 => averaging::local_steps(&work),
            Experiment::E4 => recipes::run(&work),
            Experiment::E5 => averaging::domains(&work),
            Experiment::E6 => comings::run(&work),
            Experiment::E7 => links::run(&work),
            Experiment::E8 => hostile::run(&work),
        };
        match found {
            Ok(found) => findings.extend(found),
            // The others need not wait for what this one lacks.
            Err(error) => {
                work.say(&format!("{experiment:?} failed: {error:#}"));
                failed.push(format!("{experiment:?}"));
            }
        }
    }
    work.show(&findings)?;
    ensure!(failed.is_empty(), "{} failed; the same command goes on with what is left", failed.join(", "));
    Ok(())
}

/// A relation that is to hold, and what was found.
#[derive(Debug)]
struct Finding {
    experiment: &'static str,
    relation: String,
    measured: String,
    holds: bool,
}

/// What the experiments share.
struct Work {
    folder: PathBuf,
    corpora: Corpora,
    full: bool,
    steps: i64,
    began: Instant,
}

impl Work {
    fn new(arguments: &Arguments) -> Result<Self> {
        let Arguments { full, steps, corpora, out, .. } = arguments;
        let steps = *steps;
        // E3 averages every 512 steps.
        ensure!(steps > 0 && steps % 512 == 0, "--steps is {steps}: it must be a multiple of 512");
        let corpora = Corpora::open(corpora, &out.join("text"))?;
        fs::create_dir_all(out)?;
        Ok(Self { folder: out.clone(), corpora, full: *full, steps, began: Instant::now() })
    }

    fn say(&self, text: &str) {
        println!("[{:5.0} s] {text}", self.began.elapsed().as_secs_f64());
    }

    /// Where a table or chart goes; those of the long form beside those of the short.
    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(if self.full { format!("full {name}") } else { name.to_owned() })
    }

    fn seeds(&self) -> Vec<i64> {
        if self.full { vec![1, 2, 3] } else { vec![1] }
    }

    /// A run with so many sites that average every `local_steps`.
    fn federated(&self, sites: usize, split: Split, local_steps: i64, seed: i64) -> Result<Trial> {
        let batch = GLOBAL_BATCH / i64::try_from(sites)?;
        Ok(self
            .trial(Sites::Federated(sites, split), seed)?
            .with("training.local_steps", local_steps)
            .with("rounds", self.steps / local_steps)
            .with("training.batch_size", batch)
            .with("participation.minimum_clients", i64::try_from(sites)?))
    }

    fn centralised(&self, seed: i64) -> Result<Trial> {
        Ok(self
            .trial(Sites::Centralised, seed)?
            .with("training.local_steps", self.steps)
            .with("rounds", 1)
            .with("training.batch_size", GLOBAL_BATCH))
    }

    fn trial(&self, sites: Sites, seed: i64) -> Result<Trial> {
        let spec: Table = toml::from_str(include_str!("base.toml"))?;
        let trial = Trial {
            spec,
            start: None,
            sites,
            events: Vec::new(),
            alterations: Vec::new(),
            links: Links::Loopback,
        };
        Ok(trial.with("seed", seed))
    }

    fn show(&self, findings: &[Finding]) -> Result<()> {
        let mut table = report::Table::new(&["experiment", "relation", "measured", "holds"]);
        for Finding { experiment, relation, measured, holds } in findings {
            let holds = if *holds { "yes" } else { "NO" };
            table.row([(*experiment).to_owned(), relation.clone(), measured.clone(), holds.to_owned()]);
        }
        let name = match findings.iter().map(|finding| finding.experiment).collect::<BTreeSet<_>>() {
            all if all.len() == Experiment::value_variants().len() => "findings".to_owned(),
            some => format!("findings of {}", some.into_iter().collect::<Vec<_>>().join(" ")),
        };
        table.show("What was to be shown.", &self.path(&format!("{name}.csv")))?;
        let mut markdown = String::from("| | relation | measured | holds |\n|---|---|---|---|\n");
        for Finding { experiment, relation, measured, holds } in findings {
            let holds = if *holds { "yes" } else { "no" };
            markdown +=
                &format!("| `deploy/experiments {experiment}` | {relation} | {measured} | {holds} |\n");
        }
        fs::write(self.path(&format!("{name}.md")), markdown)?;
        println!("tables and charts: {}", self.folder.display());
        Ok(())
    }
}

/// Sequences of an optimizer step, over all sites.
const GLOBAL_BATCH: i64 = 16;
/// Local steps between two averages, where nothing else is said.
const LOCAL_STEPS: i64 = 8;
