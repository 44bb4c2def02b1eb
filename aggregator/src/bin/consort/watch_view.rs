//! What `consort runs watch` shows of a run: a snapshot in, lines out. Pure; no line is wider than asked.

use consort_common::units;
use consort_proto::v1::{
    ClientActivity, ClientSummary, Participation, Phase, Progress, RunEvent, RunSnapshot, RunStatus,
    RunSummary, VersionEvaluation,
};
use jiff::tz::TimeZone;

use crate::{
    text::{Paint, bar, fit, left, right, sparkline, width, wrap},
    words,
};

/// Columns of the labels above the clients.
const LABEL: usize = 12;
/// Events that a frame shows at most.
pub const EVENTS_SHOWN_MAX: usize = 5;
/// Lines that what is waited for, or why there is no connection, takes at most.
const SENTENCE_LINES_MAX: usize = 3;
/// Widest bar and sparkline; wider ones are harder to read, not easier.
const BAR_MAX: usize = 40;
/// Columns of a client's line but its name and bar: the marker, state, count, speed, loss, and the gaps.
const STATE: usize = 12;
const COUNT: usize = 9;
const SPEED: usize = 6;
const LOSS: usize = 7;
const CLIENT_FIXED: usize = 2 + STATE + COUNT + SPEED + LOSS + 5 * 2;
const NAME_MIN: usize = 4;
const BAR_MIN: usize = 4;

/// A run at one moment, as it is known here.
#[derive(Debug, Clone, Copy)]
pub struct View<'a> {
    /// The newest snapshot.
    pub snapshot: &'a RunSnapshot,
    /// The newest events, oldest first.
    pub events: &'a [RunEvent],
    /// The aggregator's clock.
    pub now_unix_ms: u64,
    /// Why there is no connection at the moment.
    pub lost: Option<&'a str>,
    /// For the events' times.
    pub zone: &'a TimeZone,
    /// Colours or none.
    pub paint: Paint,
}

/// How a piece of a line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tone {
    Plain,
    Strong,
    Faint,
    Good,
    Busy,
    Alarming,
}

/// A line's pieces, in order.
type Pieces = Vec<(Tone, String)>;

impl View<'_> {
    fn run(&self) -> RunSummary {
        self.snapshot.run.clone().unwrap_or_default()
    }

    fn line(&self, pieces: &Pieces, columns: usize) -> String {
        let mut free = columns;
        let mut line = String::new();
        for (tone, text) in pieces {
            let text = fit(text, free);
            free -= width(&text);
            line += &match tone {
                Tone::Plain => text,
                Tone::Strong => self.paint.strong(&text),
                Tone::Faint => self.paint.faint(&text),
                Tone::Good => self.paint.good(&text),
                Tone::Busy => self.paint.busy(&text),
                Tone::Alarming => self.paint.alarming(&text),
            };
        }
        line
    }
}

/// A whole frame for a terminal of `columns`, at most `rows_max` high: first events, then clients give way.
pub fn frame(view: &View<'_>, columns: usize, rows_max: usize) -> Vec<String> {
    let mut lines = top(view, columns);
    let free = rows_max.saturating_sub(lines.len());
    let clients = &view.snapshot.clients;
    // Both blocks have a blank line before them, the clients a heading too.
    let clients_rows = if clients.is_empty() { 0 } else { clients.len() + 2 };
    let events_shown = view.events.len().min(EVENTS_SHOWN_MAX).min(free.saturating_sub(clients_rows + 1));
    let events_rows = if events_shown == 0 { 0 } else { events_shown + 1 };
    let client_lines = client_lines(view, columns, (free - events_rows).saturating_sub(2));
    if !client_lines.is_empty() {
        lines.push(Pieces::new());
        lines.extend(client_lines);
    }
    if events_shown > 0 {
        lines.push(Pieces::new());
        lines.extend(
            view.events[view.events.len() - events_shown..].iter().map(|event| event_line(view, event)),
        );
    }
    lines.truncate(rows_max);
    lines.iter().map(|pieces| view.line(pieces, columns)).collect()
}

fn top(view: &View<'_>, columns: usize) -> Vec<Pieces> {
    let run = view.run();
    let mut lines = vec![header(view, &run)];
    let (tone, text) = match view.lost {
        Some(reason) => (Tone::Alarming, Some(format!("Connection lost, {reason}"))),
        None => (Tone::Plain, waiting(view.snapshot, &run)),
    };
    let sentence = text.map_or_else(Vec::new, |text| wrap(&text, columns));
    lines.extend(sentence.into_iter().take(SENTENCE_LINES_MAX).map(|line| vec![(tone, line)]));
    let committed = committed_rounds(&run);
    let bar_columns = BAR_MAX.min(columns.saturating_sub(LABEL + 26));
    lines.push(vec![
        label("rounds"),
        (Tone::Good, bar(ratio(committed.into(), run.rounds.into()), bar_columns)),
        (Tone::Plain, format!("  {committed} of {} committed", run.rounds)),
    ]);
    if let Some((tone, text)) = deadline(view) {
        lines.push(vec![label("deadline"), (tone, text)]);
    }
    lines.push(vec![label("traffic"), (Tone::Plain, traffic(&run))]);
    if let Some(text) = train_loss(view.snapshot, &run) {
        lines.push(vec![label("train loss"), (Tone::Plain, text)]);
    }
    if let Some(perplexities) = perplexities(view.snapshot) {
        let text = format!("{perplexities}  ");
        let spark_columns = BAR_MAX.min(columns.saturating_sub(LABEL + width(&text)));
        // Heights are of the loss, the perplexity's logarithm: the first drop would flatten all others.
        let losses: Vec<f64> = view.snapshot.evaluations.iter().map(|evaluation| evaluation.loss).collect();
        lines.push(vec![
            label("perplexity"),
            (Tone::Plain, text),
            (Tone::Good, sparkline(&losses, spark_columns)),
        ]);
    }
    lines
}

fn label(text: &str) -> (Tone, String) {
    (Tone::Faint, left(text, LABEL))
}

fn header(view: &View<'_>, run: &RunSummary) -> Pieces {
    let status = run.status();
    let tone = match status {
        RunStatus::Active => Tone::Busy,
        RunStatus::Finished => Tone::Good,
        _ => Tone::Alarming,
    };
    let mut header = vec![
        (Tone::Strong, run.name.clone()),
        (Tone::Plain, "  ".into()),
        (tone, words::run_status(status).into()),
    ];
    if run.started_unix_ms != 0 {
        header.push((Tone::Plain, format!(" · {}", position(run))));
        header.push((Tone::Plain, format!(" · {}", units::duration_ms(elapsed_ms(view.now_unix_ms, run)))));
    }
    header
}

/// "round 3 of 20 · training"; the phase while there is one.
pub fn position(run: &RunSummary) -> String {
    let round = format!("round {} of {}", run.round, run.rounds);
    if run.status() == RunStatus::Active {
        format!("{round} · {}", words::phase(run.phase()))
    } else {
        round
    }
}

/// What the run waits for, in words; one that has ended waits for nothing.
pub fn waiting(snapshot: &RunSnapshot, run: &RunSummary) -> Option<String> {
    match (snapshot.waiting_for.as_str(), run.status()) {
        ("", RunStatus::Created) => Some(format!("to be started: consort runs start {}", run.name)),
        ("", RunStatus::Paused) => Some(format!("to be resumed: consort runs resume {}", run.name)),
        ("", _) | (_, RunStatus::Finished | RunStatus::Aborted) => None,
        (waiting, _) => {
            Some(format!("waiting for {}", waiting.strip_prefix("waiting for ").unwrap_or(waiting)))
        }
    }
}

/// From the run's start to its end, or until now.
pub fn elapsed_ms(now_unix_ms: u64, run: &RunSummary) -> u64 {
    let end = if run.finished_unix_ms == 0 { now_unix_ms } else { run.finished_unix_ms };
    end.saturating_sub(run.started_unix_ms)
}

/// Rounds whose model is there.
pub fn committed_rounds(run: &RunSummary) -> u32 {
    let after_the_last =
        run.status() == RunStatus::Finished || matches!(run.phase(), Phase::Evaluating | Phase::Done);
    if after_the_last { run.round } else { run.round.saturating_sub(1) }
}

fn deadline(view: &View<'_>) -> Option<(Tone, String)> {
    let deadline = view.snapshot.deadline_unix_ms;
    if deadline == 0 || view.run().status() != RunStatus::Active {
        return None;
    }
    Some(match deadline.checked_sub(view.now_unix_ms) {
        Some(left_ms) => (Tone::Plain, format!("in {}", units::duration_ms(left_ms))),
        None => (Tone::Alarming, "passed".to_owned()),
    })
}

/// What went over the network, and the tokens that it trained.
pub fn traffic(run: &RunSummary) -> String {
    format!(
        "{} to sites, {} from sites · {} tokens",
        units::bytes(run.bytes_down),
        units::bytes(run.bytes_up),
        units::count(run.tokens)
    )
}

/// A client's report of this run's round in progress.
fn progress_of<'a>(client: &'a ClientSummary, run: &RunSummary) -> Option<&'a Progress> {
    let current = |progress: &&Progress| {
        progress.run == run.name
            && (progress.round == run.round || progress.activity() == ClientActivity::Preparing)
    };
    client.progress.as_ref().filter(current)
}

/// The mean of the latest losses that the sites report in this round.
pub fn train_loss(snapshot: &RunSnapshot, run: &RunSummary) -> Option<String> {
    let losses: Vec<f64> =
        snapshot.clients.iter().filter_map(|client| progress_of(client, run)?.loss).collect();
    if losses.is_empty() {
        return None;
    }
    #[allow(clippy::cast_precision_loss)]
    let mean = losses.iter().sum::<f64>() / losses.len() as f64;
    Some(format!("{} (latest, mean of {})", words::loss(mean), words::plural(losses.len(), "site")))
}

/// Held-out perplexity of the first and the newest version that were measured: "257 → 12.18".
pub fn perplexities(snapshot: &RunSnapshot) -> Option<String> {
    let perplexity = |evaluation: &VersionEvaluation| words::perplexity(evaluation.loss);
    match snapshot.evaluations.as_slice() {
        [] => None,
        [only] => Some(perplexity(only)),
        [first, .., last] => Some(format!("{} → {}", perplexity(first), perplexity(last))),
    }
}

#[allow(clippy::cast_precision_loss)]
fn ratio(done: u64, total: u64) -> f64 {
    if total == 0 { 0.0 } else { done as f64 / total as f64 }
}

/// The heading and one line per client, at most `clients_max` of them.
fn client_lines(view: &View<'_>, columns: usize, clients_max: usize) -> Vec<Pieces> {
    let clients = &view.snapshot.clients;
    if clients.is_empty() || clients_max == 0 {
        return Vec::new();
    }
    let shown = if clients.len() <= clients_max { clients.len() } else { clients_max - 1 };
    let free = columns.saturating_sub(CLIENT_FIXED).max(NAME_MIN + BAR_MIN);
    let longest = clients.iter().map(|client| width(&client.site)).max().unwrap_or(0);
    let name_columns = longest.clamp(NAME_MIN, (free * 3 / 5).max(NAME_MIN));
    let bar_columns = (free - name_columns).min(BAR_MAX);
    let heading = [
        left("  SITE", name_columns + 2),
        left("STATE", STATE),
        left("", bar_columns),
        right("PROGRESS", COUNT),
        right("TOK/S", SPEED),
        right("LOSS", LOSS),
    ];
    let mut lines = vec![vec![(Tone::Faint, heading.join("  "))]];
    let run = view.run();
    lines.extend(clients[..shown].iter().map(|client| client_line(client, &run, name_columns, bar_columns)));
    if shown < clients.len() {
        lines.push(vec![(Tone::Faint, format!("  and {} more", clients.len() - shown))]);
    }
    lines
}

fn client_line(client: &ClientSummary, run: &RunSummary, name_columns: usize, bar_columns: usize) -> Pieces {
    let (marker, tone) = match (client.connected, client.participation()) {
        (false, _) => ("✗", Tone::Alarming),
        (true, Participation::Working | Participation::Behind) => ("▶", Tone::Busy),
        (true, Participation::Delivered) => ("✓", Tone::Good),
        (true, Participation::Replaced) => ("↷", Tone::Alarming),
        (true, Participation::NotSelected | Participation::Unspecified) => ("·", Tone::Faint),
    };
    let state = match (words::client_state(client), client.participation(), run.phase()) {
        ("idle", Participation::NotSelected, Phase::Training) => "not selected",
        (state, _, _) => state,
    };
    let progress = progress_of(client, run).filter(|_| client.connected);
    // Of a site that has delivered, the last report says nothing more but its loss.
    let doing = progress.filter(|progress| state == words::activity(progress.activity()));
    let speed = doing.map(|progress| progress.tokens_per_second).filter(|speed| *speed > 0.0);
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let speed = speed.map_or_else(String::new, |speed| units::count(speed as u64));
    let progress_bar = doing
        .filter(|progress| progress.total > 0)
        .map(|progress| bar(ratio(progress.done, progress.total), bar_columns));
    let cells = [
        left(&progress_bar.unwrap_or_default(), bar_columns),
        right(&doing.map(done).unwrap_or_default(), COUNT),
        right(&speed, SPEED),
        right(&progress.and_then(|progress| progress.loss).map(words::loss).unwrap_or_default(), LOSS),
    ];
    let [bar_cell, rest @ ..] = cells;
    vec![
        (tone, format!("{marker} ")),
        (Tone::Strong, left(&client.site, name_columns)),
        (tone, format!("  {}  ", left(state, STATE))),
        (Tone::Busy, bar_cell),
        (Tone::Plain, format!("  {}", rest.join("  "))),
    ]
}

/// Steps as "340/500", everything else (bytes, tokens) as a share.
fn done(progress: &Progress) -> String {
    let steps = format!("{}/{}", progress.done, progress.total);
    match progress.total {
        0 if progress.done == 0 => String::new(),
        0 => units::count(progress.done),
        _ if progress.activity() == ClientActivity::Training && steps.len() <= COUNT => steps,
        total => format!("{:.0}%", (100.0 * ratio(progress.done, total)).min(100.0)),
    }
}

fn event_line(view: &View<'_>, event: &RunEvent) -> Pieces {
    let time = words::clock(event.time_unix_ms, view.zone);
    vec![(Tone::Faint, format!("{time}  ")), (Tone::Plain, event.text.clone())]
}

/// What became of the run, in a sentence, once it has ended.
pub fn summary(snapshot: &RunSnapshot, now_unix_ms: u64) -> String {
    let run = snapshot.run.clone().unwrap_or_default();
    let perplexity = perplexities(snapshot).map_or_else(String::new, |words| format!("; perplexity {words}"));
    format!(
        "The run {} is {}: {} of {} rounds in {}{perplexity}; {}.",
        run.name,
        words::run_status(run.status()),
        committed_rounds(&run),
        run.rounds,
        units::duration_ms(elapsed_ms(now_unix_ms, &run)),
        traffic(&run).replace(" · ", ", "),
    )
}

#[cfg(test)]
pub mod tests;
