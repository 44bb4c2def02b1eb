//! `consort clients`: the sites, as the aggregator knows them.

use clap::Subcommand;
use consort_common::{
    ids::SiteName,
    units::{self, unix_ms_now},
};
use consort_proto::v1;
use jiff::tz::TimeZone;

use crate::{
    Context,
    connection::{missing, reply},
    failure::Failure,
    json,
    output::Output,
    table::{Column, Table, facts},
    words,
};

/// Show the sites that have joined
#[derive(Debug, Subcommand)]
pub enum ClientsCommand {
    /// List the sites: what each does, on what device, when it was last seen
    #[command(after_help = "Example:\n  consort clients list")]
    List,
    /// Show a site and its newest contributions
    #[command(after_help = "Example:\n  consort clients show hospital-north")]
    Show {
        /// Name of the site, as its certificate has it
        site: SiteName,
    },
}

/// Does what the command says.
pub async fn run(context: &Context, command: ClientsCommand) -> Result<(), Failure> {
    let mut operator = context.operator().await?;
    match command {
        ClientsCommand::List => {
            let clients =
                reply("list the clients", operator.list_clients(v1::ListClientsRequest {})).await?.clients;
            let document = json::list("clients", &clients, json::client_summary);
            context.output.show(&document, &list_lines(&clients, &context.output, unix_ms_now()))
        }
        ClientsCommand::Show { site } => {
            let attempt = format!("show the client {site}");
            let request = v1::GetClientRequest { site: site.to_string() };
            let response = reply(&attempt, operator.get_client(request)).await?;
            let client = response.client.as_ref().ok_or_else(|| missing(&attempt, "client"))?;
            let lines = show_lines(
                client,
                &response.contributions,
                &context.output,
                unix_ms_now(),
                &TimeZone::system(),
            );
            context.output.show(&json::client(&response), &lines)
        }
    }
}

/// When the site was last heard of: now, while it is connected.
fn seen(client: &v1::ClientSummary, now_unix_ms: u64) -> String {
    if client.connected { "now".to_owned() } else { words::ago(client.last_seen_unix_ms, now_unix_ms) }
}

fn list_lines(clients: &[v1::ClientSummary], output: &Output, now_unix_ms: u64) -> Vec<String> {
    let mut table = Table::new([
        Column::name("SITE"),
        Column::words("STATE"),
        Column::words("SEEN"),
        Column::number("TOKENS"),
        Column::words("DEVICE").optional(1),
        Column::number("HELD OUT").optional(2),
        Column::words("VERSION").optional(3),
    ]);
    for client in clients {
        table.row([
            client.site.clone(),
            words::client_state(client).to_owned(),
            seen(client, now_unix_ms),
            words::count_or_none(client.train_tokens),
            client.device.clone(),
            words::count_or_none(client.held_out_tokens),
            client.software_version.clone(),
        ]);
    }
    table.render(output.columns, output.paint)
}

fn show_lines(
    client: &v1::ClientSummary,
    contributions: &[v1::ClientContribution],
    output: &Output,
    now_unix_ms: u64,
    zone: &TimeZone,
) -> Vec<String> {
    let mut lines = facts(
        &[
            ("site", client.site.clone()),
            ("state", words::client_state(client).to_owned()),
            ("doing", client.progress.as_ref().map_or_else(|| words::NONE.to_owned(), doing)),
            ("device", client.device.clone()),
            ("version", client.software_version.clone()),
            ("seen", seen(client, now_unix_ms)),
            ("first seen", words::date(client.first_seen_unix_ms, zone)),
            ("train tokens", words::count_or_none(client.train_tokens)),
            ("held out", words::count_or_none(client.held_out_tokens)),
        ],
        output.columns,
        output.paint,
    );
    lines.push(String::new());
    if contributions.is_empty() {
        lines.push("No contributions yet.".to_owned());
    } else {
        lines.extend(contribution_lines(contributions, output, zone));
    }
    lines
}

/// What the site last reported.
fn doing(progress: &v1::Progress) -> String {
    let activity = words::activity(progress.activity());
    let mut text = match (progress.run.as_str(), progress.round) {
        ("", _) => activity.to_owned(),
        (run, 0) => format!("{activity} for the run {run}"),
        (run, round) => format!("{activity} in round {round} of the run {run}"),
    };
    if progress.total > 0 {
        text += &format!(", {} of {}", units::count(progress.done), units::count(progress.total));
    }
    if progress.tokens_per_second > 0.0 {
        text += &format!(", {:.0} tokens/s", progress.tokens_per_second);
    }
    if let Some(loss) = progress.loss {
        text += &format!(", loss {}", words::loss(loss));
    }
    text
}

fn contribution_lines(
    contributions: &[v1::ClientContribution],
    output: &Output,
    zone: &TimeZone,
) -> Vec<String> {
    let mut table = Table::new([
        Column::name("RUN"),
        Column::number("ROUND"),
        Column::words("ACCEPTED").optional(1),
        Column::number("WEIGHT"),
        Column::number("TOKENS"),
        Column::number("TRAIN LOSS"),
        Column::number("SENT").optional(2),
    ]);
    for item in contributions {
        let contribution = item.contribution.clone().unwrap_or_default();
        table.row([
            item.run.clone(),
            item.round.to_string(),
            words::date(contribution.accepted_unix_ms, zone),
            format!("{:.4}", contribution.weight),
            units::count(contribution.tokens),
            words::loss(contribution.train_loss),
            units::bytes(contribution.bytes),
        ]);
    }
    table.render(output.columns, output.paint)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::{Paint, width};

    const NOW: u64 = 1_700_000_000_000;

    fn output(columns: usize) -> Output {
        Output { json: false, columns, paint: Paint { colours: false } }
    }

    fn client(site: &str, connected: bool) -> v1::ClientSummary {
        v1::ClientSummary {
            site: site.into(),
            connected,
            participation: v1::Participation::Working.into(),
            progress: Some(v1::Progress {
                run: "demo".into(),
                round: 3,
                activity: v1::ClientActivity::Training.into(),
                done: 340,
                total: 500,
                tokens_per_second: 12_345.6,
                loss: Some(3.25),
            }),
            device: "cpu (2 threads)".into(),
            software_version: "0.1.0".into(),
            first_seen_unix_ms: NOW - 3_600_000,
            last_seen_unix_ms: NOW - 180_000,
            train_tokens: 1_200_000,
            held_out_tokens: 64_000,
            ready: true,
        }
    }

    #[test]
    fn the_list_says_what_each_site_does() {
        assert_eq!(
            list_lines(&[client("books", true), client("code", false)], &output(80), NOW),
            [
                "SITE   STATE     SEEN            TOKENS  DEVICE           HELD OUT  VERSION",
                "books  training  now              1.20M  cpu (2 threads)     64.0k  0.1.0",
                "code   offline   3 min 00 s ago   1.20M  cpu (2 threads)     64.0k  0.1.0",
            ]
            .map(str::to_owned)
        );
    }

    #[test]
    fn the_longest_names_stay_whole_within_80_columns() {
        let name = "n".repeat(40);
        for line in list_lines(&[client(&name, true)], &output(80), NOW) {
            assert!(width(&line) <= 80, "{line}");
        }
        assert!(list_lines(&[client(&name, true)], &output(80), NOW)[1].starts_with(&name));
    }

    #[test]
    fn a_site_is_shown_with_what_it_last_reported() {
        let contributions = vec![v1::ClientContribution {
            run: "demo".into(),
            round: 2,
            contribution: Some(v1::Contribution {
                weight: 0.25,
                tokens: 64_000,
                bytes: 10,
                ..Default::default()
            }),
        }];
        let books = client("books", true);
        let text = show_lines(&books, &contributions, &output(80), NOW, &TimeZone::UTC).join("\n");
        for part in [
            "doing         training in round 3 of the run demo, 340 of 500",
            "first seen    2023-11-14 21:13:20",
            "demo      2  ",
        ] {
            assert!(text.contains(part), "{part:?} is not in\n{text}");
        }
    }
}
