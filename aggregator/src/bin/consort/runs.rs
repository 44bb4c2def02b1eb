//! `consort runs`: everything that can be done with a run.

use std::{
    io::{self, IsTerminal, Write},
    path::PathBuf,
};

use clap::Subcommand;
use consort_common::{ids::RunName, units};
use consort_proto::v1;
use jiff::tz::TimeZone;

use crate::{
    Context,
    connection::{Operator, missing, reply},
    failure::Failure,
    json,
    output::Output,
    specification::{self, Specification},
    table::{Column, Table, facts},
    text, watch, words,
};

/// Longest answer to a question, in bytes.
const ANSWER_BYTES_MAX: usize = 64;

/// Create, start, watch and end runs
#[derive(Debug, Subcommand)]
pub enum RunsCommand {
    /// Create a run from its specification
    #[command(after_help = "Example:\n  consort runs create run.toml --start")]
    Create {
        /// The specification; `consort runs reference` prints one with every key
        #[arg(value_name = "SPEC.toml")]
        specification: PathBuf,
        /// Start the run at once
        #[arg(long)]
        start: bool,
    },
    /// Check a specification without an aggregator, and list everything that is wrong with it
    #[command(after_help = "Example:\n  consort runs check run.toml")]
    Check {
        /// The specification
        #[arg(value_name = "SPEC.toml")]
        specification: PathBuf,
    },
    /// Print a specification with every key, its default and its meaning
    #[command(after_help = "Example:\n  consort runs reference > run.toml")]
    Reference,
    /// List the runs
    #[command(after_help = "Example:\n  consort runs list")]
    List,
    /// Show a run
    #[command(after_help = "Example:\n  consort runs show demo")]
    Show {
        /// Name of the run
        run: RunName,
        /// Print the run's specification, exactly as it was stored
        #[arg(long)]
        spec: bool,
    },
    /// Start a run that was created; one run is active at a time
    #[command(after_help = "Example:\n  consort runs start demo")]
    Start {
        /// Name of the run
        run: RunName,
    },
    /// Set a run's round in progress aside; deltas that were delivered are kept
    #[command(after_help = "Example:\n  consort runs pause demo")]
    Pause {
        /// Name of the run
        run: RunName,
    },
    /// Go on with a paused run where it was
    #[command(after_help = "Example:\n  consort runs resume demo")]
    Resume {
        /// Name of the run
        run: RunName,
    },
    /// End a run for good; its committed rounds and checkpoints stay
    #[command(after_help = "Example:\n  consort runs abort demo --reason \"wrong corpus\" --yes")]
    Abort {
        /// Name of the run
        run: RunName,
        /// Why, for the record
        #[arg(long, default_value = "")]
        reason: String,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
    },
    /// Watch a run live until it ends; in a pipe, one line per event
    #[command(after_help = "Example:\n  consort runs watch demo")]
    Watch {
        /// Name of the run
        run: RunName,
        /// Show one look at the run and exit
        #[arg(long)]
        once: bool,
    },
}

/// Does what the command says.
pub async fn run(context: &Context, command: RunsCommand) -> Result<(), Failure> {
    match command {
        RunsCommand::Check { specification } => specification::check(&specification, &context.output),
        RunsCommand::Reference => specification::reference(&context.output),
        RunsCommand::Create { specification, start } => {
            let specification = Specification::load(&specification)?;
            create(context, specification, start).await
        }
        RunsCommand::List => list(context).await,
        RunsCommand::Show { run, spec } => show(context, &run, spec).await,
        RunsCommand::Start { run } => {
            let mut operator = context.operator().await?;
            let summary = start(&mut operator, run.as_str()).await?;
            report(context, &summary)
        }
        RunsCommand::Pause { run } => {
            let request = v1::PauseRunRequest { run: run.to_string() };
            let attempt = format!("pause the run {run}");
            let response = reply(&attempt, context.operator().await?.pause_run(request)).await?;
            report(context, &response.run.ok_or_else(|| missing(&attempt, "run"))?)
        }
        RunsCommand::Resume { run } => {
            let request = v1::ResumeRunRequest { run: run.to_string() };
            let attempt = format!("resume the run {run}");
            let response = reply(&attempt, context.operator().await?.resume_run(request)).await?;
            report(context, &response.run.ok_or_else(|| missing(&attempt, "run"))?)
        }
        RunsCommand::Abort { run, reason, yes } => {
            if !yes {
                confirm_abort(&run)?;
            }
            let request = v1::AbortRunRequest { run: run.to_string(), reason };
            let attempt = format!("abort the run {run}");
            let response = reply(&attempt, context.operator().await?.abort_run(request)).await?;
            report(context, &response.run.ok_or_else(|| missing(&attempt, "run"))?)
        }
        RunsCommand::Watch { run, once } => watch::watch(context, &run, once).await,
    }
}

async fn create(context: &Context, specification: Specification, start_it: bool) -> Result<(), Failure> {
    let name = specification.spec.name.clone();
    let words = specification::in_words(&specification);
    let attempt = format!("create the run {name}");
    let mut operator = context.operator().await?;
    let start_model = match &specification.start {
        Some(checkpoint) => Some(checkpoint.upload(&mut operator, &specification, &attempt).await?),
        None => None,
    };
    // No timeout: a tokenizer of megabytes may travel over a slow line, a model of gigabytes take its place on
    // disk, and the connection's keepalive ends the call when the aggregator is gone.
    let response = operator.create_run(tokio_stream::iter(specification.into_messages(start_model))).await;
    let response = response.map_err(|status| Failure::from_status(&attempt, &status))?.into_inner();
    let mut summary = response.run.ok_or_else(|| missing(&attempt, "run"))?;
    if start_it {
        summary = start(&mut operator, name.as_str()).await?;
    }
    let done = if start_it { "Created and started" } else { "Created" };
    let lines = text::wrap(&format!("{done}: {words}."), context.output.columns);
    context.output.show(&json::run_summary(&summary), &lines)?;
    let next = if start_it { "watch" } else { "start" };
    context.output.hint(&format!("Next: consort runs {next} {name}"));
    Ok(())
}

async fn start(operator: &mut Operator, run: &str) -> Result<v1::RunSummary, Failure> {
    let attempt = format!("start the run {run}");
    let response = reply(&attempt, operator.start_run(v1::StartRunRequest { run: run.to_owned() })).await?;
    response.run.ok_or_else(|| missing(&attempt, "run"))
}

async fn list(context: &Context) -> Result<(), Failure> {
    let runs =
        reply("list the runs", context.operator().await?.list_runs(v1::ListRunsRequest {})).await?.runs;
    let lines = list_lines(&runs, &context.output, &TimeZone::system());
    context.output.show(&json::list("runs", &runs, json::run_summary), &lines)?;
    if runs.is_empty() {
        context.output.hint("There are none yet: consort runs create SPEC.toml");
    }
    Ok(())
}

async fn show(context: &Context, run: &RunName, spec: bool) -> Result<(), Failure> {
    let attempt = format!("show the run {run}");
    let request = v1::GetRunRequest { run: run.to_string() };
    let response = reply(&attempt, context.operator().await?.get_run(request)).await?;
    if spec && !context.output.json {
        return crate::output::print(&response.spec_toml);
    }
    let summary = response.run.as_ref().ok_or_else(|| missing(&attempt, "run"))?;
    let lines = show_lines(summary, &response, &context.output, &TimeZone::system());
    context.output.show(&json::run(&response), &lines)
}

/// What a command has made of a run.
fn report(context: &Context, run: &v1::RunSummary) -> Result<(), Failure> {
    let line = format!("The run {} is {}.", run.name, words::run_status(run.status()));
    context.output.show(&json::run_summary(run), &[line])
}

fn confirm_abort(run: &RunName) -> Result<(), Failure> {
    if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
        return Err(Failure::Usage(format!("aborting ends the run {run} for good: confirm with --yes")));
    }
    eprint!("End the run {run} for good? Its committed rounds and checkpoints stay. [y/N] ");
    let failed = |error: io::Error| Failure::Refused(format!("cannot read the answer: {error}"));
    io::stderr().flush().map_err(failed)?;
    let mut answer = String::new();
    io::stdin().read_line(&mut answer).map_err(failed)?;
    if is_yes(&answer) { Ok(()) } else { Err(Failure::Refused(format!("the run {run} was not aborted"))) }
}

fn is_yes(answer: &str) -> bool {
    answer.len() <= ANSWER_BYTES_MAX && ["y", "yes"].contains(&answer.trim().to_lowercase().as_str())
}

fn list_lines(runs: &[v1::RunSummary], output: &Output, zone: &TimeZone) -> Vec<String> {
    let mut table = Table::new([
        Column::name("NAME"),
        Column::words("STATUS"),
        Column::number("ROUND"),
        Column::number("PERPLEXITY"),
        Column::words("PHASE").optional(1),
        Column::number("TOKENS").optional(2),
        Column::words("CREATED").optional(3),
        Column::words("MODEL").optional(4),
        Column::number("PARAMETERS").optional(5),
    ]);
    for run in runs {
        let active = run.status() == v1::RunStatus::Active;
        table.row([
            run.name.clone(),
            words::run_status(run.status()).to_owned(),
            format!("{}/{}", run.round, run.rounds),
            run.validation_loss.map_or_else(|| words::NONE.to_owned(), words::perplexity),
            if active { words::phase(run.phase()) } else { words::NONE }.to_owned(),
            units::count(run.tokens),
            words::date(run.created_unix_ms, zone),
            run.architecture.clone(),
            units::count(run.parameters),
        ]);
    }
    table.render(output.columns, output.paint)
}

fn show_lines(
    summary: &v1::RunSummary,
    run: &v1::GetRunResponse,
    output: &Output,
    zone: &TimeZone,
) -> Vec<String> {
    let held_out = summary.validation_loss.map_or_else(
        || words::NONE.to_owned(),
        |loss| format!("{} (perplexity {})", words::loss(loss), words::perplexity(loss)),
    );
    let mut lines = vec![
        ("run", summary.name.clone()),
        ("status", words::run_status(summary.status()).to_owned()),
        ("round", format!("{} of {}, {}", summary.round, summary.rounds, words::phase(summary.phase()))),
        ("model", format!("{}, {} parameters", summary.architecture, summary.parameters)),
        ("tokens", summary.tokens.to_string()),
        ("held-out loss", held_out),
        ("sent to sites", units::bytes(summary.bytes_down)),
        ("received", units::bytes(summary.bytes_up)),
        ("created", words::date(summary.created_unix_ms, zone)),
        ("started", words::date(summary.started_unix_ms, zone)),
        ("finished", words::date(summary.finished_unix_ms, zone)),
        ("specification", words::digest(&run.spec_digest)),
        ("manifest", words::digest(&run.manifest_digest)),
        ("version", run.version.to_string()),
        ("its model", words::digest(&run.version_digest)),
    ];
    if let Some(start) = &run.start {
        lines.push(("starts from", text::printable(&start.origin)));
        lines.push(("that model", words::digest(&start.digest)));
    }
    if !run.reason.is_empty() {
        lines.push(("aborted for", run.reason.clone()));
    }
    facts(&lines, output.columns, output.paint)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::{Paint, width};

    fn output(columns: usize) -> Output {
        Output { json: false, columns, paint: Paint { colours: false } }
    }

    fn run(name: &str) -> v1::RunSummary {
        v1::RunSummary {
            name: name.into(),
            status: v1::RunStatus::Active.into(),
            round: 3,
            rounds: 20,
            phase: v1::Phase::Training.into(),
            parameters: 1_048_576,
            tokens: 2_048_000,
            created_unix_ms: 1_700_000_000_000,
            validation_loss: Some(std::f64::consts::LN_10),
            architecture: "llama".into(),
            ..v1::RunSummary::default()
        }
    }

    #[test]
    fn the_list_fits_80_columns_and_says_more_where_there_is_room() {
        assert_eq!(
            list_lines(&[run("demo")], &output(80), &TimeZone::UTC),
            [
                "NAME  STATUS  ROUND  PERPLEXITY  PHASE     TOKENS  CREATED              MODEL",
                "demo  active   3/20       10.00  training   2.05M  2023-11-14 22:13:20  llama",
            ]
        );
        assert!(list_lines(&[run("demo")], &output(100), &TimeZone::UTC)[0].ends_with("PARAMETERS"));
    }

    #[test]
    fn the_longest_name_and_the_largest_numbers_fit_80_columns() {
        let name = "n".repeat(40);
        let large = v1::RunSummary {
            round: u32::MAX,
            rounds: u32::MAX,
            tokens: u64::MAX,
            parameters: u64::MAX,
            validation_loss: Some(600.0),
            ..run(&name)
        };
        let lines = list_lines(std::slice::from_ref(&large), &output(80), &TimeZone::UTC);
        assert!(lines.iter().all(|line| width(line) <= 80), "{lines:#?}");
        assert!(lines[1].starts_with(&name));
        let response = v1::GetRunResponse { reason: "why ".repeat(100), ..v1::GetRunResponse::default() };
        let lines = show_lines(&large, &response, &output(80), &TimeZone::UTC);
        assert!(lines.iter().all(|line| width(line) <= 80), "{lines:#?}");
    }

    #[test]
    fn a_run_is_shown_with_whole_digests() {
        let response = v1::GetRunResponse {
            spec_digest: vec![0xAB; 32],
            version: 2,
            reason: "wrong corpus".into(),
            start: Some(v1::StartModel { origin: "gpt2\u{1b}[2J".into(), digest: vec![0xCD; 32] }),
            ..v1::GetRunResponse::default()
        };
        let lines = show_lines(&run("demo"), &response, &output(80), &TimeZone::UTC);
        for line in [
            "round          3 of 20, training",
            "held-out loss  2.303 (perplexity 10.00)",
            &format!("specification  {}", "ab".repeat(32)),
            "manifest       -",
            "starts from    gpt2 [2J",
            &format!("that model     {}", "cd".repeat(32)),
            "aborted for    wrong corpus",
        ] {
            assert!(lines.iter().any(|shown| shown == line), "{line:?} is not in {lines:#?}");
        }
    }

    #[test]
    fn only_yes_is_yes() {
        for (answer, expected) in
            [("y\n", true), ("Yes\n", true), ("\n", false), ("", false), ("yesterday\n", false)]
        {
            assert_eq!(is_yes(answer), expected, "{answer:?}");
        }
    }
}
