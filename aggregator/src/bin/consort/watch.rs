//! `consort runs watch`: follows a run until it ends, through restarts of the aggregator.
//!
//! A task feeds snapshots through a channel of one; the loop here shows them, ticks the clocks between
//! them, and ends with the run or at Ctrl-C. What is shown is `watch_view`'s and `watch_lines`' business.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use consort_common::{ids::RunName, units};
use consort_proto::v1::{self, RunEvent, RunSnapshot, RunStatus};
use jiff::tz::TimeZone;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::mpsc,
    task::JoinSet,
};

use crate::{
    Context,
    connection::{Operator, missing, reply},
    failure::Failure,
    json,
    output::{self, Output},
    screen::Screen,
    watch_lines::LineLog,
    watch_view::{EVENTS_SHOWN_MAX, View, frame, summary},
};

/// Between attempts to reach the aggregator again: the first, doubled up to the last.
const BACKOFF_MIN: Duration = Duration::from_millis(500);
const BACKOFF_MAX: Duration = Duration::from_secs(10);
/// How often clocks and countdowns move between snapshots.
const TICK: Duration = Duration::from_secs(1);
/// Height of a single frame in a pipe: enough for a hundred sites.
const ROWS_UNLIMITED: usize = 200;

/// Follows `run` until it ends, or shows it `once`.
pub async fn watch(context: &Context, run: &RunName, once: bool) -> Result<(), Failure> {
    let mut operator = context.operator().await?;
    if once {
        return show_once(&mut operator, run, &context.output).await;
    }
    let mut display = Display::new(&context.output);
    let ended = follow(&operator, run, &mut display).await;
    // A live view's screen is left before anything else is said.
    drop(display);
    match ended? {
        Some(last) => conclude(&mut operator, run, &last, &context.output).await,
        None => Ok(()),
    }
}

async fn show_once(operator: &mut Operator, run: &RunName, output: &Output) -> Result<(), Failure> {
    let attempt = format!("watch the run {run}");
    let from_status = |status| Failure::from_status(&attempt, &status);
    let mut stream = reply(&attempt, operator.watch_run(request(run))).await?;
    let snapshot = stream.message().await.map_err(from_status)?;
    let mut state = State::new();
    state.take(snapshot.ok_or_else(|| missing(&attempt, "snapshot"))?);
    let lines = state.view(output).map(|view| frame(&view, output.columns, ROWS_UNLIMITED));
    output.show(&json::snapshot(&state.snapshot), &lines.unwrap_or_default())
}

/// Shows the run until it ends; the last snapshot then, or `None` where the person has seen enough.
async fn follow(
    operator: &Operator,
    run: &RunName,
    display: &mut Display,
) -> Result<Option<RunSnapshot>, Failure> {
    let failed = |error: std::io::Error| Failure::Refused(format!("cannot listen for signals: {error}"));
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut ticks = tokio::time::interval(TICK);
    let (sender, mut updates) = mpsc::channel(1);
    // Ends with this function.
    let mut tasks = JoinSet::new();
    tasks.spawn(feed(operator.clone(), run.clone(), sender, BACKOFF_MIN));
    let mut state = State::new();
    loop {
        tokio::select! {
            _ = interrupt.recv() => return Ok(None),
            _ = terminate.recv() => return Ok(None),
            _ = ticks.tick() => display.show(&state, &[])?,
            update = updates.recv() => match update {
                Some(Update::Snapshot(snapshot)) => {
                    let events = state.take(*snapshot);
                    display.snapshot(&state, &events)?;
                    if is_over(&state.snapshot) {
                        return Ok(Some(state.snapshot));
                    }
                }
                Some(Update::Lost(reason)) => {
                    state.lost = Some(reason.clone());
                    display.lost(&state, &reason)?;
                }
                Some(Update::Failed(failure)) => return Err(failure),
                None => return Ok(None),
            },
        }
    }
}

/// Says how the run ended. One that was aborted is a failure of its own kind, for scripts.
async fn conclude(
    operator: &mut Operator,
    run: &RunName,
    last: &RunSnapshot,
    output: &Output,
) -> Result<(), Failure> {
    if !output.json {
        let text = summary(last, last.server_time_unix_ms);
        output::print(&(crate::text::wrap(&text, output.columns).join("\n") + "\n"))?;
    }
    if status(last) == RunStatus::Finished {
        output.hint(&format!("Its model: consort checkpoints get {run} --out DIR"));
        return Ok(());
    }
    let details = operator.get_run(v1::GetRunRequest { run: run.to_string() });
    let reason = match reply(&format!("show the run {run}"), details).await {
        Ok(response) if !response.reason.is_empty() => {
            format!(": {}", crate::text::printable(&response.reason))
        }
        // The reason is a courtesy; that the run was aborted is known.
        _ => String::new(),
    };
    Err(Failure::Aborted(format!("the run {run} was aborted{reason}")))
}

fn request(run: &RunName) -> v1::WatchRunRequest {
    v1::WatchRunRequest { run: run.to_string() }
}

fn status(snapshot: &RunSnapshot) -> RunStatus {
    snapshot.run.as_ref().map(v1::RunSummary::status).unwrap_or_default()
}

fn is_over(snapshot: &RunSnapshot) -> bool {
    matches!(status(snapshot), RunStatus::Finished | RunStatus::Aborted)
}

/// What the feeding task has to say.
enum Update {
    Snapshot(Box<RunSnapshot>),
    /// There is no connection; it is tried again.
    Lost(String),
    /// There will not be one.
    Failed(Failure),
}

/// Feeds snapshots until the run ends, the receiver goes, or the aggregator refuses. A person watches, so
/// an aggregator that is gone is tried for as long as it takes; not so when it never was there.
async fn feed(mut operator: Operator, run: RunName, updates: mpsc::Sender<Update>, backoff_min: Duration) {
    let mut backoff = backoff_min;
    let mut seen = false;
    loop {
        let failure = match feed_once(&mut operator, &run, &updates, &mut seen).await {
            Ok(()) => return,
            Err(FeedError { failure, progressed }) => {
                backoff = if progressed { backoff_min } else { (backoff * 2).min(BACKOFF_MAX) };
                failure
            }
        };
        if !seen || !matches!(failure, Failure::Unreachable(_)) {
            // The receiver may have gone at the same moment.
            let _ = updates.send(Update::Failed(failure)).await;
            return;
        }
        let backoff_ms = u64::try_from(backoff.as_millis()).unwrap_or(u64::MAX);
        let lost = Update::Lost(format!("trying again in {}: {failure}", units::duration_ms(backoff_ms)));
        if updates.send(lost).await.is_err() {
            return;
        }
        tokio::time::sleep(backoff).await;
    }
}

/// Why one stream ended before the run did.
struct FeedError {
    failure: Failure,
    /// Whether it had brought anything.
    progressed: bool,
}

async fn feed_once(
    operator: &mut Operator,
    run: &RunName,
    updates: &mpsc::Sender<Update>,
    seen: &mut bool,
) -> Result<(), FeedError> {
    let attempt = format!("watch the run {run}");
    let mut progressed = false;
    let opened = reply(&attempt, operator.watch_run(request(run))).await;
    let mut stream = opened.map_err(|failure| FeedError { failure, progressed })?;
    loop {
        let snapshot = match stream.message().await {
            Ok(Some(snapshot)) => snapshot,
            Ok(None) => {
                let failure =
                    Failure::Unreachable(format!("cannot {attempt}: the aggregator is shutting down"));
                return Err(FeedError { failure, progressed });
            }
            Err(status) => {
                return Err(FeedError { failure: Failure::from_status(&attempt, &status), progressed });
            }
        };
        (*seen, progressed) = (true, true);
        let over = is_over(&snapshot);
        if updates.send(Update::Snapshot(Box::new(snapshot))).await.is_err() || over {
            return Ok(());
        }
    }
}

/// What is known of the run.
struct State {
    snapshot: RunSnapshot,
    /// When the snapshot came; `None` before the first.
    received: Option<Instant>,
    /// The newest few, oldest first.
    events: Vec<RunEvent>,
    newest_event: Option<u64>,
    lost: Option<String>,
    zone: TimeZone,
}

impl State {
    fn new() -> Self {
        Self {
            snapshot: RunSnapshot::default(),
            received: None,
            events: Vec::new(),
            newest_event: None,
            lost: None,
            zone: TimeZone::system(),
        }
    }

    /// Takes a snapshot; the events in it that are new.
    fn take(&mut self, snapshot: RunSnapshot) -> Vec<RunEvent> {
        // After a reconnection the newest few come again.
        let is_new = |event: &&RunEvent| self.newest_event.is_none_or(|newest| event.id > newest);
        let events: Vec<RunEvent> = snapshot.events.iter().filter(is_new).cloned().collect();
        self.newest_event = events.iter().map(|event| event.id).max().or(self.newest_event);
        self.events.extend(events.iter().cloned());
        self.events.drain(..self.events.len().saturating_sub(EVENTS_SHOWN_MAX));
        self.snapshot = snapshot;
        self.received = Some(Instant::now());
        self.lost = None;
        events
    }

    /// What there is to show; `None` before the first snapshot.
    fn view(&self, output: &Output) -> Option<View<'_>> {
        let since_ms = u64::try_from(self.received?.elapsed().as_millis()).unwrap_or(u64::MAX);
        Some(View {
            snapshot: &self.snapshot,
            events: &self.events,
            now_unix_ms: self.snapshot.server_time_unix_ms.saturating_add(since_ms),
            lost: self.lost.as_deref(),
            zone: &self.zone,
            paint: output.paint,
        })
    }
}

/// How the run is shown.
enum Display {
    /// A frame in its place, on a terminal.
    Live { screen: Screen, output: Output },
    /// Line by line.
    Lines { log: LineLog, output: Output },
    /// One document per snapshot.
    Documents,
}

impl Display {
    fn new(output: &Output) -> Self {
        let output = *output;
        if output.json {
            Self::Documents
        } else if std::io::stdout().is_terminal()
            && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
        {
            Self::Live { screen: Screen::new(), output }
        } else {
            Self::Lines { log: LineLog::default(), output }
        }
    }

    /// Shows the state as it is now; `events` are those that are new.
    fn show(&mut self, state: &State, events: &[RunEvent]) -> Result<(), Failure> {
        match self {
            Self::Live { screen, output } => {
                let Some(view) = state.view(output) else { return Ok(()) };
                let (rows, columns) = screen.size();
                // The last row is the cursor's.
                let lines = frame(&view, columns, rows.saturating_sub(1));
                screen.draw(&lines).map_err(|error| Failure::from_output(&error))
            }
            Self::Lines { log, output } => {
                let Some(view) = state.view(output) else { return Ok(()) };
                log.lines(&view, events).iter().try_for_each(|line| output::print(&format!("{line}\n")))
            }
            Self::Documents => Ok(()),
        }
    }

    /// Shows what a new snapshot brought.
    fn snapshot(&mut self, state: &State, events: &[RunEvent]) -> Result<(), Failure> {
        match self {
            Self::Documents => output::print_document(&json::snapshot(&state.snapshot)),
            _ => self.show(state, events),
        }
    }

    /// Shows that the connection was lost.
    fn lost(&mut self, state: &State, reason: &str) -> Result<(), Failure> {
        if let Self::Documents = self {
            eprintln!("consort: connection lost, {reason}");
        }
        self.show(state, &[])
    }
}

#[cfg(test)]
mod tests {
    use tonic::Status;

    use super::*;
    use crate::{
        fake_operator::{FakeOperator, Script},
        watch_view::tests::event,
        words,
    };

    fn snapshot(events: &[(u64, &str)]) -> RunSnapshot {
        RunSnapshot {
            events: events.iter().map(|(id, text)| event(*id, text)).collect(),
            ..RunSnapshot::default()
        }
    }

    #[test]
    fn events_that_come_again_after_a_reconnection_are_not_new() {
        let mut state = State::new();
        let ids = |events: Vec<RunEvent>| events.iter().map(|event| event.id).collect::<Vec<_>>();
        assert_eq!(ids(state.take(snapshot(&[(4, "a"), (5, "b")]))), [4, 5]);
        state.lost = Some("reset".to_owned());
        assert_eq!(ids(state.take(snapshot(&[(4, "a"), (5, "b"), (6, "c")]))), [6]);
        assert_eq!(ids(state.take(snapshot(&[]))), [0; 0]);
        assert_eq!(ids(state.events.clone()), [4, 5, 6]);
        assert_eq!(state.lost, None);
    }

    #[test]
    fn only_the_newest_events_are_kept() {
        let mut state = State::new();
        for id in 0..100 {
            state.take(snapshot(&[(id, "something")]));
        }
        assert_eq!(state.events.len(), EVENTS_SHOWN_MAX);
        assert_eq!(state.events.last().map(|event| event.id), Some(99));
    }

    #[test]
    fn clocks_go_on_between_snapshots() {
        let mut state = State::new();
        let output = Output { json: false, columns: 80, paint: crate::text::Paint { colours: false } };
        assert!(state.view(&output).is_none());
        state.take(RunSnapshot { server_time_unix_ms: 5_000, ..RunSnapshot::default() });
        state.received = state.received.and_then(|received| received.checked_sub(Duration::from_secs(2)));
        assert!(state.view(&output).is_some_and(|view| (7_000..60_000).contains(&view.now_unix_ms)));
    }

    fn with_status(status: RunStatus) -> RunSnapshot {
        let run = v1::RunSummary { status: status.into(), ..v1::RunSummary::default() };
        RunSnapshot { run: Some(run), ..RunSnapshot::default() }
    }

    /// What the feeding task says, in short, until it ends.
    async fn fed(watches: Vec<Vec<Result<RunSnapshot, Status>>>) -> Vec<String> {
        let (_fake, operator, _server) = FakeOperator::serve(Script { watches, ..Script::default() }).await;
        let (sender, mut updates) = mpsc::channel(1);
        let mut tasks = JoinSet::new();
        tasks.spawn(feed(operator, "demo".parse().unwrap(), sender, Duration::from_millis(2)));
        let mut said = Vec::new();
        while let Some(update) = updates.recv().await {
            said.push(match update {
                Update::Snapshot(snapshot) => words::run_status(status(&snapshot)).to_owned(),
                Update::Lost(reason) => reason,
                Update::Failed(failure) => format!("{}: {failure}", failure.exit_code()),
            });
        }
        said
    }

    #[tokio::test]
    async fn a_restarted_aggregator_is_found_again_and_the_run_followed_to_its_end() {
        let said = fed(vec![
            vec![Ok(with_status(RunStatus::Active))],
            vec![Err(Status::unavailable("starting up"))],
            vec![Ok(with_status(RunStatus::Active)), Ok(with_status(RunStatus::Finished))],
        ])
        .await;
        assert_eq!(said.len(), 5, "{said:#?}");
        assert_eq!((said[0].as_str(), said[3].as_str(), said[4].as_str()), ("active", "active", "finished"));
        assert!(
            said[1].starts_with(
                "trying again in 2 ms: cannot watch the run demo: the aggregator is shutting down"
            )
        );
        assert!(said[2].starts_with("trying again in 4 ms: "), "{said:#?}");
    }

    #[tokio::test]
    async fn a_refusal_ends_the_watch() {
        let said =
            fed(vec![vec![Ok(with_status(RunStatus::Active)), Err(Status::not_found("no run demo"))]]).await;
        assert_eq!(said, ["active", "4: cannot watch the run demo: no run demo"]);
    }

    #[tokio::test]
    async fn an_aggregator_that_never_was_there_is_not_waited_for() {
        let said = fed(vec![]).await;
        assert_eq!(said.len(), 1);
        assert!(said[0].starts_with("3: cannot watch the run demo"), "{said:#?}");
    }
}
