//! `consort runs watch` in a pipe: what happened, line by line, each with its time. Pure but for what it
//! remembers of the last lines.

use consort_common::units;
use consort_proto::v1::{ClientActivity, Participation, RunEvent, RunSnapshot, RunStatus};

use crate::{
    text::printable,
    watch_view::{View, perplexities, position, train_loss, waiting},
    words,
};

/// Progress lines are at least this far apart.
const PROGRESS_INTERVAL_MS: u64 = 10_000;

/// What was said last.
#[derive(Debug, Default)]
pub struct LineLog {
    /// Status, round and phase.
    said: Option<(i32, u32, i32)>,
    next_progress_unix_ms: u64,
    lost: bool,
}

impl LineLog {
    /// The lines for `view`: each of `events`, a line when the round or the phase changes, else how far the
    /// round is, now and then.
    pub fn lines(&mut self, view: &View<'_>, events: &[RunEvent]) -> Vec<String> {
        let line = |time_unix_ms: u64, text: &str| {
            format!("{}  {}", words::clock(time_unix_ms, view.zone), printable(text))
        };
        let now = view.now_unix_ms;
        if let Some(reason) = view.lost {
            let first = !std::mem::replace(&mut self.lost, true);
            return if first { vec![line(now, &format!("connection lost, {reason}"))] } else { Vec::new() };
        }
        let mut lines = Vec::new();
        if std::mem::take(&mut self.lost) {
            lines.push(line(now, "connected again"));
        }
        lines.extend(events.iter().map(|event| line(event.time_unix_ms, &event.text)));
        let run = view.snapshot.run.clone().unwrap_or_default();
        let state = (run.status, run.round, run.phase);
        if self.said.replace(state) != Some(state) {
            lines.push(line(now, &state_text(view.snapshot)));
            self.next_progress_unix_ms = now.saturating_add(PROGRESS_INTERVAL_MS);
        } else if now >= self.next_progress_unix_ms && run.status() == RunStatus::Active {
            lines.push(line(now, &progress_text(view)));
            self.next_progress_unix_ms = now.saturating_add(PROGRESS_INTERVAL_MS);
        }
        lines
    }
}

fn state_text(snapshot: &RunSnapshot) -> String {
    let run = snapshot.run.clone().unwrap_or_default();
    let mut parts = vec![format!("{} {}", run.name, words::run_status(run.status())), position(&run)];
    parts.extend(perplexities(snapshot).map(|words| format!("perplexity {words}")));
    parts.extend(waiting(snapshot, &run));
    parts.join(" · ")
}

/// All sites together: as short for a hundred of them as for two.
fn progress_text(view: &View<'_>) -> String {
    let snapshot = view.snapshot;
    let run = snapshot.run.clone().unwrap_or_default();
    let mut parts = vec![position(&run)];
    let count = |participation: Participation| {
        snapshot.clients.iter().filter(|client| client.participation() == participation).count()
    };
    let (working, delivered) = (count(Participation::Working), count(Participation::Delivered));
    if working + delivered > 0 {
        parts.push(format!("{delivered} of {} delivered", working + delivered));
    }
    let training = snapshot.clients.iter().filter_map(|client| client.progress.as_ref()).filter(|progress| {
        progress.run == run.name
            && progress.round == run.round
            && progress.activity() == ClientActivity::Training
    });
    let (mut done, mut total, mut speed) = (0u64, 0u64, 0.0f64);
    for progress in training {
        done = done.saturating_add(progress.done);
        total = total.saturating_add(progress.total);
        speed += progress.tokens_per_second;
    }
    if total > 0 {
        parts.push(format!("{done}/{total} steps"));
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        parts.push(format!("{} tokens/s", units::count(speed as u64)));
    }
    parts.extend(train_loss(snapshot, &run).map(|loss| format!("train loss {loss}")));
    if let Some(left_ms) = snapshot.deadline_unix_ms.checked_sub(view.now_unix_ms) {
        parts.push(format!("deadline in {}", units::duration_ms(left_ms)));
    }
    parts.join(" · ")
}

#[cfg(test)]
mod tests {
    use jiff::tz::TimeZone;
    use proptest::prelude::*;

    use super::*;
    use crate::{
        text::Paint,
        watch_view::tests::{NOW, any_snapshot, event, snapshot},
    };

    static ZONE: TimeZone = TimeZone::UTC;

    fn view<'a>(snapshot: &'a RunSnapshot, now_unix_ms: u64, lost: Option<&'a str>) -> View<'a> {
        View { snapshot, events: &[], now_unix_ms, lost, zone: &ZONE, paint: Paint { colours: false } }
    }

    #[test]
    fn events_and_changes_are_said_once_and_progress_every_ten_seconds() {
        let mut log = LineLog::default();
        let mut snapshot = snapshot();
        assert_eq!(
            log.lines(&view(&snapshot, NOW, None), &[event(1, "books delivered")]),
            [
                "22:13:20  books delivered",
                "22:13:20  demo active · round 3 of 20 · training · perplexity 257 → 12.18 · waiting for 2 of 4 sites to deliver",
            ]
        );
        assert!(log.lines(&view(&snapshot, NOW + 9_999, None), &[]).is_empty());
        assert_eq!(
            log.lines(&view(&snapshot, NOW + 10_000, None), &[]),
            [
                "22:13:30  round 3 of 20 · training · 1 of 3 delivered · 341/1000 steps · 24.7k tokens/s · train loss 3.250 (latest, mean of 3 sites) · deadline in 1 min 10 s"
            ]
        );
        assert!(log.lines(&view(&snapshot, NOW + 11_000, None), &[]).is_empty());
        if let Some(run) = &mut snapshot.run {
            run.round = 4;
        }
        assert_eq!(log.lines(&view(&snapshot, NOW + 12_000, None), &[]).len(), 1);
    }

    #[test]
    fn a_lost_connection_is_said_once_and_its_return_too() {
        let mut log = LineLog::default();
        let snapshot = snapshot();
        log.lines(&view(&snapshot, NOW, None), &[]);
        assert_eq!(
            log.lines(&view(&snapshot, NOW, Some("trying again: reset")), &[]),
            ["22:13:20  connection lost, trying again: reset"]
        );
        assert!(log.lines(&view(&snapshot, NOW + 60_000, Some("trying again: refused")), &[]).is_empty());
        assert_eq!(log.lines(&view(&snapshot, NOW + 1_000, None), &[]), ["22:13:21  connected again"]);
    }

    proptest! {
        #[test]
        fn whatever_is_told_stays_on_its_line(snapshot in any_snapshot(), second in any_snapshot()) {
            let mut log = LineLog::default();
            for snapshot in [snapshot, second] {
                for line in log.lines(&view(&snapshot, snapshot.server_time_unix_ms, None), &snapshot.events) {
                    prop_assert!(!line.contains(|character: char| character.is_control()), "{line:?}");
                }
            }
        }
    }
}
