//! Continual pretraining on real text: a model trained on one domain goes on with another, with and without a
//! learning rate that is warmed up again, and with a share of the old text replayed. After Ibrahim et al.,
//! "Simple and Scalable Strategies to Continually Pre-train Large Language Models" (arXiv 2403.08763).
//!
//! Trains with `consort-client train`, as anyone would; a training that is done is not done again, and one
//! that was interrupted goes on. Prints a table, and writes it as `results.csv` with a chart, `results.svg`.

mod chart;

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
    sync::Mutex,
    thread,
    time::Instant,
};

use anyhow::{Context, Result, bail};
use clap::Parser;
use consort_tests::binaries;
use serde_json::Value;

/// Shares of replayed text that are tried, in percent.
const REPLAYS: [u32; 3] = [0, 5, 25];
/// Where the first training's cosine ends, as a fraction of the peak: there re-warming begins, and there the
/// rate stays without it.
const FINAL_FRACTION: f64 = 0.1;
/// Points of the curves that show how a training adapts.
const MEASUREMENTS: u64 = 15;

/// Continual pretraining on real text: what re-warming and replay are worth
#[derive(Debug, Parser)]
struct Arguments {
    /// Text that the model learns first
    #[arg(long, default_value = ".cache/corpora/literature", value_name = "PATH")]
    old: PathBuf,
    /// Text that it goes on with
    #[arg(long, default_value = ".cache/corpora/manuals", value_name = "PATH")]
    new: PathBuf,
    /// Optimizer steps on the old text
    #[arg(long, default_value_t = 3000, value_name = "N")]
    old_steps: u64,
    /// Optimizer steps on the new text, for each of the six ways
    #[arg(long, default_value_t = 1200, value_name = "N")]
    new_steps: u64,
    /// Trainings at a time, with one thread each; the first one has as many threads to itself
    #[arg(long, default_value_t = 2, value_name = "N")]
    at_once: usize,
    /// Where the trainings, results.csv and results.svg are kept
    #[arg(long, default_value = ".cache/continual", value_name = "FOLDER")]
    out: PathBuf,
}

/// A way to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Way {
    rewarm: bool,
    replay: u32,
}

impl Way {
    fn all() -> impl Iterator<Item = Self> {
        [false, true].into_iter().flat_map(|rewarm| REPLAYS.map(|replay| Self { rewarm, replay }))
    }

    fn schedule(self) -> &'static str {
        if self.rewarm { "re-warmed" } else { "constant" }
    }

    fn name(self) -> String {
        format!("{}-{}", self.schedule(), self.replay)
    }
}

/// Perplexities per byte on held-out text.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Perplexity {
    old: f64,
    new: f64,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let work = Work::new(arguments)?;
    work.train_all()?;
    let before = work.perplexity("old")?;
    let results: Vec<(Way, Perplexity)> =
        Way::all().map(|way| Ok((way, work.perplexity(&way.name())?))).collect::<Result<_>>()?;
    print(before, &results);
    write_csv(&work.path("results.csv"), before, &results)?;
    let curves = [false, true].map(|rewarm| {
        let way = Way { rewarm, replay: 0 };
        Ok((way, curve(&work.path(&format!("{}.training/metrics.csv", way.name())))?))
    });
    let curves: Vec<(Way, Vec<(f64, f64)>)> = curves.into_iter().collect::<Result<_>>()?;
    chart::draw(&work.path("results.svg"), before, &results, &curves)?;
    println!("\n{}\n{}", work.path("results.csv").display(), work.path("results.svg").display());
    Ok(())
}

struct Work {
    arguments: Arguments,
    /// Of these texts, steps and settings.
    folder: PathBuf,
    began: Instant,
}

impl Work {
    fn new(arguments: Arguments) -> Result<Self> {
        let Arguments { old, new, old_steps, new_steps, out, .. } = &arguments;
        for text in [old, new] {
            if !text.exists() {
                bail!(
                    "there is no text at {}: run deploy/corpora, or name another with --old and --new",
                    text.display()
                );
            }
        }
        let name = |path: &Path| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let folder = out.join(format!("{}-{old_steps}-{}-{new_steps}", name(old), name(new)));
        let work = Self { folder, arguments, began: Instant::now() };
        let specifications = ["first", "re-warmed", "constant"].map(|kind| (kind, work.specification(kind)));
        let is_there = |(kind, text): &(&str, String)| {
            fs::read_to_string(work.path(&format!("{kind}.toml"))).is_ok_and(|there| there == *text)
        };
        if !specifications.iter().all(is_there) {
            // Trainings of other specifications are worth nothing here.
            if work.folder.exists() {
                fs::remove_dir_all(&work.folder)?;
            }
            fs::create_dir_all(&work.folder)?;
            for (kind, text) in specifications {
                fs::write(work.path(&format!("{kind}.toml")), text)?;
            }
        }
        Ok(work)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A specification: the first training's, or that of one that goes on.
    fn specification(&self, kind: &str) -> String {
        let Arguments { old_steps, new_steps, .. } = self.arguments;
        let (steps, schedule) = match kind {
            "first" => (old_steps, format!("kind = \"cosine\"\nwarmup_steps = {}", old_steps / 50)),
            "re-warmed" => {
                let warmup = new_steps / 20;
                (
                    new_steps,
                    format!("kind = \"cosine\"\nwarmup_steps = {warmup}\nwarmup_from = {FINAL_FRACTION}"),
                )
            }
            _ => (new_steps, format!("kind = \"constant\"\nfraction = {FINAL_FRACTION}")),
        };
        include_str!("continual.toml").replace("{steps}", &steps.to_string()).replace("{schedule}", &schedule)
    }

    fn say(&self, text: &str) {
        println!("[{:4.0} s] {text}", self.began.elapsed().as_secs_f64());
    }

    fn train_all(&self) -> Result<()> {
        let Arguments { old, new, at_once, .. } = &self.arguments;
        let source = |path: &Path| format!("path={}", path.display());
        self.train("old", "first", &[source(old)], None, *at_once)?;
        let waiting: Mutex<Vec<Way>> = Mutex::new(Way::all().collect());
        let take = || waiting.lock().ok().and_then(|mut waiting| waiting.pop());
        let worker = || {
            while let Some(way) = take() {
                let mut data = vec![source(new)];
                if way.replay > 0 {
                    data.push(format!("{},replay={}", source(old), way.replay));
                }
                self.train(&way.name(), way.schedule(), &data, Some("old"), 1)?;
            }
            Ok(())
        };
        thread::scope(|scope| {
            let workers: Vec<_> = (0..*at_once).map(|_| scope.spawn(worker)).collect();
            workers.into_iter().try_for_each(|worker| worker.join().expect("a worker does not panic"))
        })
    }

    /// Trains a model, unless it is there.
    fn train(
        &self,
        name: &str,
        kind: &str,
        data: &[String],
        from: Option<&str>,
        threads: usize,
    ) -> Result<()> {
        if self.path(name).exists() {
            return Ok(());
        }
        self.say(&format!("training {name}"));
        let steps = if from.is_some() { self.arguments.new_steps } else { self.arguments.old_steps };
        let mut command = Command::new(binaries::client());
        command.arg("train").arg(self.path(&format!("{kind}.toml"))).arg("--out").arg(self.path(name));
        command.args(data.iter().flat_map(|source| ["--data", source]));
        command.args(["--threads", &threads.to_string(), "--checkpoint-seconds", "20"]);
        command.args(["--log-every", "20", "--evaluate-every", &(steps / MEASUREMENTS).max(1).to_string()]);
        if let Some(from) = from {
            command.arg("--from").arg(self.path(from));
        }
        let log = self.path(&format!("{name}.log"));
        let file = File::options().create(true).append(true).open(&log)?;
        let status = command.stdout(file.try_clone()?).stderr(file).status()?;
        if !status.success() {
            bail!("training {name} failed: see {}", log.display());
        }
        self.say(&format!("trained {name}"));
        Ok(())
    }

    fn perplexity(&self, model: &str) -> Result<Perplexity> {
        let measure = |text: &Path| -> Result<f64> {
            let output = Command::new(binaries::client())
                .arg("evaluate")
                .arg(self.path(model))
                .arg(text)
                .args(["--held-out-only", "--held-out-fraction", "0.05", "--tokens-max", "60000", "--json"])
                .output()?;
            let result: Value = serde_json::from_slice(&output.stdout)
                .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
            result["perplexity"].as_f64().context("evaluate prints a perplexity")
        };
        Ok(Perplexity { old: measure(&self.arguments.old)?, new: measure(&self.arguments.new)? })
    }
}

/// Steps and held-out losses of a table of metrics.
fn curve(metrics: &Path) -> Result<Vec<(f64, f64)>> {
    let table = fs::read_to_string(metrics).with_context(|| metrics.display().to_string())?;
    let point = |row: &str| {
        let columns: Vec<&str> = row.split(',').collect();
        Some((columns.first()?.parse().ok()?, columns.get(7)?.parse().ok()?))
    };
    Ok(table.lines().filter_map(point).collect())
}

fn write_csv(path: &Path, before: Perplexity, results: &[(Way, Perplexity)]) -> Result<()> {
    let mut csv = String::from("schedule,replay_percent,perplexity_old,perplexity_new\n");
    csv += &format!("before,,{},{}\n", before.old, before.new);
    for (way, Perplexity { old, new }) in results {
        csv += &format!("{},{},{old},{new}\n", way.schedule(), way.replay);
    }
    Ok(fs::write(path, csv)?)
}

fn print(before: Perplexity, results: &[(Way, Perplexity)]) {
    println!("\nPerplexity (per byte) on held-out text.\n");
    println!("{:<12}{:>8}{:>12}{:>12}", "schedule", "replay", "old text", "new text");
    println!("{:<12}{:>8}{:>12.3}{:>12.3}", "before", "", before.old, before.new);
    for (way, Perplexity { old, new }) in results {
        println!("{:<12}{:>6} %{old:>12.3}{new:>12.3}", way.schedule(), way.replay);
    }
    println!();
    let of = |rewarm, replay| {
        let result = results.iter().find(|(way, _)| *way == Way { rewarm, replay });
        result.map_or(before, |(_, perplexity)| *perplexity)
    };
    let (constant, rewarmed, most) = (of(false, 0), of(true, 0), of(true, 25));
    let finding = |holds: bool, what: &str, figures: String| {
        println!("{}: {what} ({figures})", if holds { "as in the paper" } else { "UNLIKE the paper" });
    };
    finding(
        rewarmed.new < constant.new,
        "re-warming adapts more",
        format!("new text {:.3} against {:.3}", rewarmed.new, constant.new),
    );
    finding(
        rewarmed.old > constant.old,
        "re-warming forgets more",
        format!("old text {:.3} against {:.3}", rewarmed.old, constant.old),
    );
    let (forgotten, recovered) = (rewarmed.old - before.old, rewarmed.old - most.old);
    finding(
        recovered > 0.0,
        "replay recovers what was forgotten",
        format!("25 %: {:.0} % of the rise on the old text", 100.0 * recovered / forgotten),
    );
    finding(
        most.new - rewarmed.new < 0.5 * (constant.new - rewarmed.new),
        "and costs little of what was learnt",
        format!("new text {:.3} against {:.3} without replay", most.new, rewarmed.new),
    );
}
