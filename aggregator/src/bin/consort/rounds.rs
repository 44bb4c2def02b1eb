//! `consort rounds`: the committed rounds of a run, and what it takes to reproduce each.

use clap::Subcommand;
use consort_common::{ids::RunName, units};
use consort_proto::v1;
use jiff::tz::TimeZone;

use crate::{
    Context,
    connection::{missing, reply},
    failure::Failure,
    json,
    output::Output,
    table::{Column, Table, facts},
    text::{fit, left, width},
    words,
};

/// Show the committed rounds of a run
#[derive(Debug, Subcommand)]
pub enum RoundsCommand {
    /// List the committed rounds of a run
    #[command(after_help = "Example:\n  consort rounds list demo")]
    List {
        /// Name of the run
        run: RunName,
    },
    /// Show a round's record: seed, digests, and each contributor's weight, tokens, loss and delta
    #[command(after_help = "Example:\n  consort rounds show demo 3 --json > round-3.json")]
    Show {
        /// Name of the run
        run: RunName,
        /// The round, from 1
        round: u32,
        /// Norms of every tensor of the model too; with --json they are always there
        #[arg(long)]
        tensors: bool,
    },
}

/// Does what the command says.
pub async fn run(context: &Context, command: RoundsCommand) -> Result<(), Failure> {
    let mut operator = context.operator().await?;
    match command {
        RoundsCommand::List { run } => {
            let request = v1::ListRoundsRequest { run: run.to_string() };
            let attempt = format!("list the rounds of the run {run}");
            let rounds = reply(&attempt, operator.list_rounds(request)).await?.rounds;
            let document = json::list("rounds", &rounds, json::round_summary);
            context.output.show(&document, &list_lines(&rounds, &context.output))
        }
        RoundsCommand::Show { run, round, tensors } => {
            let request = v1::GetRoundRequest { run: run.to_string(), round };
            let attempt = format!("show round {round} of the run {run}");
            let response = reply(&attempt, operator.get_round(request)).await?;
            let summary = response.round.as_ref().ok_or_else(|| missing(&attempt, "round"))?;
            let output = &context.output;
            let mut lines = record_lines(run.as_str(), summary, &response, output, &TimeZone::system());
            if tensors {
                lines.push(String::new());
                lines.extend(tensor_lines(&response.tensors, output));
            }
            context.output.show(&json::round(run.as_str(), &response), &lines)
        }
    }
}

fn took(round: &v1::RoundSummary) -> String {
    units::duration_ms(round.committed_unix_ms.saturating_sub(round.started_unix_ms))
}

fn list_lines(rounds: &[v1::RoundSummary], output: &Output) -> Vec<String> {
    let mut table = Table::new([
        Column::number("ROUND"),
        Column::number("SITES"),
        Column::number("TOKENS"),
        Column::number("TRAIN LOSS"),
        Column::number("PERPLEXITY"),
        Column::number("TOOK"),
        Column::number("UP").optional(2),
        Column::number("DOWN").optional(3),
        Column::number("ATTEMPTS").optional(5),
        Column::number("DELTA NORM").optional(4),
        Column::words("MODEL").optional(1),
    ]);
    for round in rounds {
        table.row([
            round.round.to_string(),
            round.contributors.to_string(),
            units::count(round.tokens),
            words::loss(round.train_loss),
            round.validation_loss.map_or_else(|| words::NONE.to_owned(), words::perplexity),
            took(round),
            units::bytes(round.bytes_up),
            units::bytes(round.bytes_down),
            round.attempts.to_string(),
            words::number(round.delta_norm),
            words::short_digest(&round.digest),
        ]);
    }
    table.render(output.columns, output.paint)
}

fn record_lines(
    run: &str,
    summary: &v1::RoundSummary,
    response: &v1::GetRoundResponse,
    output: &Output,
    zone: &TimeZone,
) -> Vec<String> {
    let loss_and_perplexity =
        |loss: f64| format!("{} (perplexity {})", words::loss(loss), words::perplexity(loss));
    let or_none = |value: Option<f64>| value.map_or_else(|| words::NONE.to_owned(), words::number);
    let statistics = summary.statistics.as_ref();
    let mut lines = facts(
        &[
            ("run", run.to_owned()),
            ("round", summary.round.to_string()),
            (
                "committed",
                format!("{}, after {}", words::date(summary.committed_unix_ms, zone), took(summary)),
            ),
            ("attempts", summary.attempts.to_string()),
            ("seed", response.seed.to_string()),
            ("aggregation", response.aggregation.clone()),
            ("specification", words::digest(&response.spec_digest)),
            ("manifest", words::digest(&response.manifest_digest)),
            ("model", words::digest(&summary.digest)),
            ("tokens", summary.tokens.to_string()),
            ("train loss", loss_and_perplexity(summary.train_loss)),
            (
                "held-out loss",
                summary.validation_loss.map_or_else(|| words::NONE.to_owned(), loss_and_perplexity),
            ),
            ("delta norm", words::number(summary.delta_norm)),
            ("update norm", words::number(summary.update_norm)),
            ("model norm", or_none(statistics.map(|one| one.parameter_norm))),
            ("momentum norm", or_none(statistics.and_then(|one| one.momentum_norm))),
            ("update cosine", or_none(statistics.and_then(|one| one.update_cosine))),
            ("spread", or_none(statistics.and_then(|one| one.spread))),
            ("sent to sites", units::bytes(summary.bytes_down)),
            ("received", units::bytes(summary.bytes_up)),
        ],
        output.columns,
        output.paint,
    );
    lines.push(String::new());
    lines.extend(contribution_lines(&response.contributions, output));
    if response.contributions.iter().any(|one| one.measured_norm.is_some()) {
        lines.push(String::new());
        lines.extend(treatment_lines(&response.contributions, output));
    }
    lines.push(String::new());
    lines.extend(digest_lines(&response.contributions, output));
    if !response.evaluations.is_empty() {
        lines.push(String::new());
        lines.extend(evaluation_lines(&response.evaluations, output));
    }
    lines
}

fn contribution_lines(contributions: &[v1::Contribution], output: &Output) -> Vec<String> {
    let mut table = Table::new([
        Column::name("SITE"),
        Column::number("WEIGHT"),
        Column::number("AGE"),
        Column::number("TOKENS"),
        Column::number("STEPS"),
        Column::number("TRAIN LOSS"),
        Column::number("TOOK").optional(1),
        Column::number("DELTA NORM").optional(3),
        Column::number("SENT").optional(2),
    ]);
    for contribution in contributions {
        table.row([
            contribution.site.clone(),
            format!("{:.6}", contribution.weight),
            contribution.age.to_string(),
            contribution.tokens.to_string(),
            contribution.steps.to_string(),
            words::loss(contribution.train_loss),
            took_seconds(contribution.train_seconds),
            words::number(contribution.delta_norm),
            units::bytes(contribution.bytes),
        ]);
    }
    table.render(output.columns, output.paint)
}

/// What the rule of aggregation found and did.
fn treatment_lines(contributions: &[v1::Contribution], output: &Output) -> Vec<String> {
    let mut table = Table::new([
        Column::name("SITE"),
        Column::number("MEASURED NORM"),
        Column::number("SCALED BY"),
        Column::words("SELECTED"),
    ]);
    let number = |value: Option<f64>| value.map_or_else(|| words::NONE.to_owned(), words::number);
    for contribution in contributions {
        let selected =
            contribution.selected.map_or(words::NONE, |selected| if selected { "yes" } else { "no" });
        table.row([
            contribution.site.clone(),
            number(contribution.measured_norm),
            number(contribution.clip),
            selected.to_owned(),
        ]);
    }
    table.render(output.columns, output.paint)
}

/// Seconds as a client reports them: any number.
fn took_seconds(seconds: f64) -> String {
    let duration = std::time::Duration::try_from_secs_f64(seconds).ok();
    let milliseconds = duration.and_then(|duration| u64::try_from(duration.as_millis()).ok());
    milliseconds.map_or_else(|| words::NONE.to_owned(), units::duration_ms)
}

/// Whole digests, since records are compared by them; each under its site's name where it does not fit
/// beside it.
fn digest_lines(contributions: &[v1::Contribution], output: &Output) -> Vec<String> {
    let longest = contributions.iter().map(|contribution| width(&contribution.site)).max().unwrap_or(0);
    let mut lines = vec![output.paint.strong("DELTA DIGESTS")];
    for contribution in contributions {
        let digest = words::digest(&contribution.delta_digest);
        if longest + 2 + digest.len() <= output.columns {
            lines.push(format!("{}  {digest}", left(&contribution.site, longest)));
        } else {
            lines.extend([fit(&contribution.site, output.columns), format!("  {digest}")]);
        }
    }
    lines
}

fn evaluation_lines(evaluations: &[v1::SiteEvaluation], output: &Output) -> Vec<String> {
    let mut table = Table::new([
        Column::name("HELD-OUT TEXT OF"),
        Column::number("PERPLEXITY"),
        Column::number("LOSS"),
        Column::number("TOKENS"),
    ]);
    for site in evaluations {
        let evaluation = site.evaluation.unwrap_or_default();
        table.row([
            site.site.clone(),
            words::perplexity(evaluation.loss),
            words::loss(evaluation.loss),
            units::count(evaluation.tokens),
        ]);
    }
    table.render(output.columns, output.paint)
}

fn tensor_lines(tensors: &[v1::TensorNorms], output: &Output) -> Vec<String> {
    let mut table = Table::new([
        Column::name("TENSOR"),
        Column::number("PARAMETERS").optional(1),
        Column::number("DELTA"),
        Column::number("MOMENTUM"),
        Column::number("MODEL"),
    ]);
    for tensor in tensors {
        table.row([
            tensor.name.clone(),
            tensor.parameters.to_string(),
            words::number(tensor.delta_norm),
            tensor.momentum_norm.map_or_else(|| words::NONE.to_owned(), words::number),
            words::number(tensor.parameter_norm),
        ]);
    }
    table.render(output.columns, output.paint)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::Paint;

    const OUTPUT: Output = Output { json: false, columns: 80, paint: Paint { colours: false } };

    fn summary() -> v1::RoundSummary {
        v1::RoundSummary {
            round: 3,
            started_unix_ms: 1_700_000_000_000,
            committed_unix_ms: 1_700_000_065_000,
            attempts: 1,
            contributors: 2,
            tokens: 2_048_000,
            train_loss: 2.5,
            delta_norm: 1.25,
            update_norm: 0.9,
            validation_loss: Some(std::f64::consts::LN_10),
            bytes_down: 8_400_000,
            bytes_up: 8_400_000,
            digest: vec![0xAB; 32],
            statistics: Some(v1::RoundStatistics {
                parameter_norm: 20.5,
                momentum_norm: None,
                update_cosine: Some(-0.25),
                spread: Some(1.5),
            }),
        }
    }

    fn contribution(site: &str) -> v1::Contribution {
        v1::Contribution {
            site: site.into(),
            weight: 0.5,
            tokens: 1_024_000,
            steps: 500,
            train_loss: 2.5,
            train_seconds: 61.5,
            delta_norm: 1.25,
            bytes: 4_200_000,
            delta_digest: vec![0xCD; 32],
            accepted_unix_ms: 1_700_000_064_000,
            ..v1::Contribution::default()
        }
    }

    #[test]
    fn the_list_fits_and_keeps_what_matters() {
        assert_eq!(
            list_lines(&[summary()], &OUTPUT),
            [
                "ROUND  SITES  TOKENS  TRAIN LOSS  PERPLEXITY        TOOK       UP  MODEL",
                "    3      2   2.05M       2.500       10.00  1 min 05 s  8.40 MB  abababababab",
            ]
        );
    }

    #[test]
    fn a_record_has_every_digest_whole_within_80_columns() {
        let response = v1::GetRoundResponse {
            round: Some(summary()),
            contributions: vec![contribution("books"), contribution(&"m".repeat(40))],
            evaluations: vec![v1::SiteEvaluation {
                site: "books".into(),
                evaluation: Some(v1::Evaluation {
                    version: 3,
                    loss: std::f64::consts::LN_10,
                    tokens: 100_000,
                    text_bytes: 400_000,
                }),
            }],
            spec_digest: vec![0x11; 32],
            manifest_digest: vec![0x22; 32],
            seed: u64::MAX,
            aggregation: "mean".into(),
            tensors: Vec::new(),
        };
        let lines = record_lines("demo", &summary(), &response, &OUTPUT, &TimeZone::UTC);
        let text = lines.join("\n");
        for whole in ["ab", "cd", "11", "22"].map(|pair| pair.repeat(32)) {
            assert!(text.contains(&whole), "{whole} is not in\n{text}");
        }
        for part in [
            "seed           18446744073709551615",
            "2023-11-14 22:14:25, after 1 min 05 s",
            "10.00  2.303    100k",
            "model norm     20.5000",
            "momentum norm  -",
            "update cosine  -0.2500",
            "spread         1.5000",
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
        assert!(lines.iter().all(|line| width(line) <= 80), "{text}");
    }

    #[test]
    fn what_a_rule_did_with_each_delta_is_shown() {
        let judged = |site: &str, norm, clip, selected| v1::Contribution {
            measured_norm: Some(norm),
            clip,
            selected,
            ..contribution(site)
        };
        let lines = treatment_lines(
            &[judged("books", 1.25, Some(1.0), None), judged("mallory", 125.0, Some(0.01), Some(false))],
            &OUTPUT,
        );
        assert_eq!(
            lines,
            [
                "SITE     MEASURED NORM  SCALED BY  SELECTED",
                "books           1.2500     1.0000  -",
                "mallory       125.0000     0.0100  no",
            ]
        );
    }

    #[test]
    fn tensors_are_shown_with_their_norms() {
        let tensor = |name: &str, momentum_norm| v1::TensorNorms {
            name: name.into(),
            parameters: 4096,
            delta_norm: 0.5,
            momentum_norm,
            parameter_norm: 12.0,
        };
        let lines = tensor_lines(
            &[tensor("model.embed_tokens.weight", Some(1.25)), tensor("model.norm.weight", None)],
            &OUTPUT,
        );
        assert_eq!(
            lines,
            [
                "TENSOR                     PARAMETERS   DELTA  MOMENTUM    MODEL",
                "model.embed_tokens.weight        4096  0.5000    1.2500  12.0000",
                "model.norm.weight                4096  0.5000         -  12.0000",
            ]
        );
    }

    #[test]
    fn a_client_may_report_any_duration() {
        assert_eq!(took_seconds(61.5), "1 min 01 s");
        for nonsense in [-1.0, f64::NAN, f64::INFINITY, 1e300] {
            assert_eq!(took_seconds(nonsense), "-");
        }
    }
}
