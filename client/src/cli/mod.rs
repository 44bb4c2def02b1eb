//! The command line: what can be asked, and in which words it is answered. One file per command that does
//! more than call one function.

mod bar;
mod bench;
mod data;
mod evaluate;
mod generate;
mod logits;
mod start;
mod text;
mod train;

use std::{path::PathBuf, process::ExitCode};

use clap::{Args, Parser, Subcommand};
use console::style;
use consort_common::telemetry::{self, LogFormat};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::{
    check::{self, Line, Outcome},
    config::{self, Config},
    daemon,
    trainer::{Device, DeviceChoice, DeviceError, set_threads, set_up_libraries},
};

/// Exit code for what cannot even begin: arguments or a configuration that make no sense.
const UNUSABLE: u8 = 2;

/// Consort's daemon for partner sites, and tools around its models.
///
/// Exit codes: 0 all is well; 1 it failed, and the last line says why; 2 the arguments or the configuration
/// cannot be used.
#[derive(Debug, Parser)]
#[command(name = "consort-client", version)]
pub struct Arguments {
    /// Form of log lines, on standard error: human or json [default: the configuration's, else human]
    #[arg(long, global = true, value_name = "FORMAT")]
    log_format: Option<LogFormat>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon: join the federation and train what it asks for, until stopped
    ///
    /// SIGTERM or SIGINT makes it write a local checkpoint, leave and end; a second one ends it at once.
    /// Environment variables override the file: CONSORT_CLIENT_ENDPOINT for `endpoint`,
    /// CONSORT_CLIENT_TLS__KEY for `key` in `[tls]`.
    Run(ConfigPath),
    /// Check everything that the daemon needs: each line passes or says what to do
    Check {
        #[command(flatten)]
        config: ConfigPath,
        /// Print one JSON document instead of lines
        #[arg(long)]
        json: bool,
    },
    /// Train a run's model on one folder of text, without a federation
    ///
    /// A training that was stopped or killed goes on with the same command: beside OUT, in OUT.training, lie
    /// its checkpoint and metrics.csv with a row every so many steps. On a CPU it comes to the same rows and
    /// weights as without a break. SIGTERM or SIGINT makes it write a checkpoint and end; a second one ends it
    /// at once.
    Train(train::TrainArguments),
    /// Measure a checkpoint on text: loss, perplexity, bits per byte
    ///
    /// The text is read as for training: documents that repeat an earlier one, blank ones and what cannot be
    /// read are left out; how many there are is said on standard error.
    Evaluate(evaluate::EvaluateArguments),
    /// Let a checkpoint continue a text
    Generate(generate::GenerateArguments),
    /// Measure what this machine makes of a run's training step: tokens per second, and where the time goes
    Bench(bench::BenchArguments),
    /// Print the logits of a checkpoint as JSON, to compare it with another implementation
    Logits(logits::LogitsArguments),
    /// Prepare text in advance, print what it consists of, check it
    #[command(subcommand)]
    Data(data::DataCommand),
    /// Print every configuration key with its meaning and its default
    Reference,
    /// Print the version of this program and of its protocol
    Version,
}

impl Command {
    /// Whether it keeps the cores busy.
    fn computes(&self) -> bool {
        matches!(
            self,
            Self::Run(_)
                | Self::Train(_)
                | Self::Evaluate(_)
                | Self::Generate(_)
                | Self::Bench(_)
                | Self::Logits(_)
        )
    }
}

#[derive(Debug, Args)]
struct ConfigPath {
    /// Configuration file, as `consort pki issue site NAME` writes it
    #[arg(long, short, default_value = "client.toml", env = "CONSORT_CLIENT_CONFIG", value_name = "FILE")]
    config: PathBuf,
}

/// What computes, for commands without a configuration.
#[derive(Debug, Args)]
struct DeviceArguments {
    /// auto (the first GPU, else the CPU), cpu, cuda or cuda:N
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    device: DeviceChoice,
    /// CPU threads; 0: all cores
    #[arg(long, default_value_t = 0, value_name = "N")]
    threads: usize,
}

impl DeviceArguments {
    /// The device, with its number of threads set for the whole process.
    fn open(&self) -> Result<Device, DeviceError> {
        set_threads(self.threads);
        self.device.open()
    }
}

/// Does what the command line asks for.
pub fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.command.computes() {
        set_up_libraries();
    }
    let log_format = arguments.log_format;
    match arguments.command {
        Command::Run(path) => with_config(&path, log_format, |config| run(&config)),
        Command::Check { config: path, json } => {
            with_config(&path, log_format, |config| check(&path.config, &config, json))
        }
        Command::Train(arguments) => tool(log_format, || arguments.run()),
        Command::Evaluate(arguments) => tool(log_format, || arguments.run()),
        Command::Generate(arguments) => tool(log_format, || arguments.run()),
        Command::Bench(arguments) => tool(log_format, || arguments.run()),
        Command::Logits(arguments) => tool(log_format, || arguments.run()),
        Command::Data(command) => tool(log_format, || command.run()),
        Command::Reference => {
            print!("{}", config::REFERENCE);
            ExitCode::SUCCESS
        }
        Command::Version => {
            println!(
                "consort-client {}, protocol {}",
                env!("CARGO_PKG_VERSION"),
                consort_proto::PROTOCOL_VERSION
            );
            ExitCode::SUCCESS
        }
    }
}

fn complain(error: &dyn std::fmt::Display) {
    eprintln!("consort-client: {error}");
}

fn with_config(
    path: &ConfigPath,
    log_format: Option<LogFormat>,
    command: impl FnOnce(Config) -> anyhow::Result<ExitCode>,
) -> ExitCode {
    let config = match Config::load(&path.config) {
        Ok(config) => config,
        Err(error) => {
            complain(&error);
            return ExitCode::from(UNUSABLE);
        }
    };
    if let Err(error) = telemetry::init(log_format.unwrap_or(config.log.format), &config.log.filter) {
        complain(&error);
        return ExitCode::from(UNUSABLE);
    }
    finish(command(config))
}

/// A command without a configuration; what it has to say goes to standard output.
fn tool(log_format: Option<LogFormat>, command: impl FnOnce() -> anyhow::Result<()>) -> ExitCode {
    // What this module tells is meant for whoever has sent a signal.
    let filter = concat!("warn,", module_path!(), "=info");
    if let Err(error) = telemetry::init(log_format.unwrap_or_default(), filter) {
        complain(&error);
        return ExitCode::from(UNUSABLE);
    }
    finish(command().map(|()| ExitCode::SUCCESS))
}

fn finish(result: anyhow::Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        complain(&format!("{error:#}"));
        ExitCode::FAILURE
    })
}

fn run(config: &Config) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let stop = CancellationToken::new();
    runtime.block_on(async {
        tokio::spawn(on_signals(stop.clone()));
        daemon::run(config, stop).await
    })?;
    Ok(ExitCode::SUCCESS)
}

/// A command that the first signal asks to stop and a second one ends.
fn until_signalled<T>(command: impl FnOnce(&CancellationToken) -> anyhow::Result<T>) -> anyhow::Result<T> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let stop = CancellationToken::new();
    runtime.spawn(on_signals(stop.clone()));
    command(&stop)
}

/// The first signal asks to end, a second one ends the process.
async fn on_signals(stop: CancellationToken) {
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return tracing::warn!(
            "signals cannot be received: stopping this will cost its work since the last checkpoint"
        );
    };
    let mut next = async || {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    next().await;
    tracing::info!("stopping: writing a local checkpoint; a second signal ends this at once");
    stop.cancel();
    next().await;
    // 128 + SIGINT, as shells have it.
    std::process::exit(130);
}

fn check(path: &std::path::Path, config: &Config, json: bool) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let tell = |line: &Line| {
        if !json {
            println!("{}", line_text(line));
        }
    };
    let lines = runtime.block_on(check::check(path, config, &tell));
    let all_well = check::all_well(&lines);
    if json {
        println!("{}", serde_json::to_string_pretty(&serde_json::json!({ "ok": all_well, "lines": lines }))?);
    } else if all_well {
        println!("\nThis site is ready: start `consort-client run`.");
    } else {
        println!("\nNot ready: see to the lines marked `failed`, then check again.");
    }
    Ok(if all_well { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn line_text(line: &Line) -> String {
    let outcome = match line.outcome {
        Outcome::Passed => style("ok     ").green(),
        Outcome::Warning => style("warning").yellow(),
        Outcome::Failed => style("failed ").red().bold(),
        Outcome::Skipped => style("skipped").dim(),
    };
    format!("{outcome}  {:<13}  {}", line.name, line.detail)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn a_checked_line_names_its_outcome_its_subject_and_what_to_do() {
        let line = Line { name: "port", outcome: Outcome::Failed, detail: "ask your firewall".to_owned() };
        let text = console::strip_ansi_codes(&line_text(&line)).into_owned();
        assert_eq!(text, "failed   port           ask your firewall");
    }
}
