//! `consort`: the command line of those who direct a federation.
//!
//! One file per noun. The nouns ask the aggregator and hand a JSON document and lines of text to
//! `output`; what turns messages into either is pure. Nothing here decides about runs: the aggregator does.

mod checkpoints;
mod clients;
mod completions;
mod connection;
mod failure;
#[cfg(test)]
mod fake_operator;
mod json;
mod output;
mod pki;
mod receive;
mod rounds;
mod runs;
mod screen;
mod specification;
mod start;
mod table;
mod text;
mod tokenizer;
mod watch;
mod watch_lines;
mod watch_view;
mod words;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};
use clap_complete::Shell;

use crate::{
    connection::Operator,
    failure::{EXIT_CODES, Failure},
    output::Output,
};

/// Direct a federation's training runs: create, start and watch them, look at rounds and sites, fetch
/// checkpoints, make certificates and tokenizers.
#[derive(Debug, Parser)]
#[command(name = "consort", version, after_help = EXIT_CODES, arg_required_else_help = true)]
struct Arguments {
    /// Operator configuration [default: ./operator.toml, then ~/.config/consort/operator.toml]
    #[arg(long, short, global = true, value_name = "FILE", env = "CONSORT_OPERATOR_CONFIG")]
    config: Option<PathBuf>,
    /// Print one JSON document instead of text (`runs watch`: one per line)
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    #[command(subcommand)]
    Runs(runs::RunsCommand),
    #[command(subcommand)]
    Rounds(rounds::RoundsCommand),
    #[command(subcommand)]
    Clients(clients::ClientsCommand),
    #[command(subcommand)]
    Checkpoints(checkpoints::CheckpointsCommand),
    #[command(subcommand)]
    Pki(pki::PkiCommand),
    #[command(subcommand)]
    Tokenizer(tokenizer::TokenizerCommand),
    /// Print a shell's completion script
    #[command(
        after_help = "Example:\n  consort completions bash > ~/.local/share/bash-completion/completions/consort"
    )]
    Completions {
        /// The shell
        shell: Shell,
    },
}

/// What every command needs: where the aggregator is, and where the output goes.
#[derive(Debug)]
struct Context {
    config: Option<PathBuf>,
    output: Output,
}

impl Context {
    /// Connects to the aggregator.
    async fn operator(&self) -> Result<Operator, Failure> {
        connection::connect(self.config.as_deref()).await
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let context = Context { config: arguments.config, output: Output::detect(arguments.json) };
    match run(&context, arguments.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !matches!(failure, Failure::PipeClosed) {
                eprintln!("consort: {failure}");
            }
            ExitCode::from(failure.exit_code())
        }
    }
}

fn run(context: &Context, command: Command) -> Result<(), Failure> {
    match command {
        Command::Runs(command) => block_on(runs::run(context, command)),
        Command::Rounds(command) => block_on(rounds::run(context, command)),
        Command::Clients(command) => block_on(clients::run(context, command)),
        Command::Checkpoints(command) => block_on(checkpoints::run(context, command)),
        Command::Pki(command) => pki::run(command).map_err(|error| Failure::Refused(format!("{error:#}"))),
        Command::Tokenizer(command) => tokenizer::run(context, command),
        Command::Completions { shell } => completions::print(shell),
    }
}

fn block_on(command: impl Future<Output = Result<(), Failure>>) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| Failure::Refused(format!("cannot start: {error}")))?.block_on(command)
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
    fn every_command_has_an_example_that_it_understands() {
        fn check(command: &clap::Command, examples: &mut Vec<String>) {
            if command.get_subcommands().next().is_none() {
                let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
                let example = help.split_once("Example:\n  ").map(|(_, example)| example.to_owned());
                examples.push(example.unwrap_or_else(|| panic!("{} has no example", command.get_name())));
            }
            for subcommand in command.get_subcommands() {
                check(subcommand, examples);
            }
        }

        let mut examples = Vec::new();
        check(&Arguments::command(), &mut examples);
        assert!(examples.len() > 15);
        for line in examples.iter().flat_map(|example| example.lines()) {
            let command = line.split(['|', '>', '&']).next().unwrap_or_default();
            // What is between quotes is one word.
            let words = command.split('"').enumerate().flat_map(|(index, part)| match index % 2 {
                0 => part.split_whitespace().collect(),
                _ => vec![part],
            });
            Arguments::try_parse_from(words).unwrap_or_else(|error| panic!("{line:?}: {error}"));
        }
    }

    #[test]
    fn the_exit_codes_are_in_the_help() {
        let help = Arguments::command().render_long_help().to_string();
        for failure in [
            Failure::PipeClosed,
            Failure::Refused(String::new()),
            Failure::Usage(String::new()),
            Failure::Unreachable(String::new()),
            Failure::NotFound(String::new()),
            Failure::Aborted(String::new()),
        ] {
            assert!(help.contains(&format!("\n  {}  ", failure.exit_code())), "{failure:?}");
        }
    }
}
