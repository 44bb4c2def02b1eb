//! The aggregator's binary: reads the configuration, checks it or serves.

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use consort_aggregator::{allocator, check, config::Config, server};

/// Consort's aggregator: coordinates rounds, collects deltas over mutual TLS and averages them.
///
/// Environment variables override the file: CONSORT_AGGREGATOR_LISTEN for `listen`,
/// CONSORT_AGGREGATOR_LIMITS__UPLOADS_MAX for `limits.uploads_max`, and so on.
#[derive(Parser)]
#[command(name = "consort-aggregator", version)]
struct Arguments {
    /// Configuration file, as `consort pki issue aggregator NAME` writes it.
    #[arg(long, short, default_value = "aggregator.toml", env = "CONSORT_AGGREGATOR_CONFIG", global = true)]
    config: PathBuf,
    /// Validate the configuration, the certificate, the disk and the port, print the effective
    /// settings, and exit: 0 if all is well, 1 if something failed.
    #[arg(long)]
    check: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Print every configuration key with its default and meaning.
    Reference,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(Command::Reference) = arguments.command {
        print!("{}", consort_aggregator::config::REFERENCE);
        return ExitCode::SUCCESS;
    }
    let config = match Config::load(&arguments.config) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("consort-aggregator: {error}");
            return ExitCode::from(2);
        }
    };
    if arguments.check {
        return if check::run(&config) { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    match serve(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("consort-aggregator: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(config: Config) -> anyhow::Result<()> {
    allocator::share_freed_memory();
    consort_common::telemetry::init(config.log.format, &config.log.filter)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(server::serve(config))
}
