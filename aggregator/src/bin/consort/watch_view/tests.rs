use consort_proto::v1::{Evaluation, SiteEvaluation, VersionEvaluation};
use proptest::prelude::*;

use super::*;

/// 2023-11-14 22:13:20 UTC.
pub const NOW: u64 = 1_700_000_000_000;

pub fn client(
    site: &str,
    participation: Participation,
    activity: ClientActivity,
    done: u64,
) -> ClientSummary {
    let training = activity == ClientActivity::Training;
    ClientSummary {
        site: site.into(),
        connected: true,
        participation: participation.into(),
        progress: Some(Progress {
            run: "demo".into(),
            round: 3,
            activity: activity.into(),
            done,
            total: 500,
            tokens_per_second: if training { 12_345.6 } else { 0.0 },
            loss: (activity != ClientActivity::Idle).then_some(3.25),
        }),
        ready: true,
        ..ClientSummary::default()
    }
}

pub fn snapshot() -> RunSnapshot {
    RunSnapshot {
        run: Some(RunSummary {
            name: "demo".into(),
            status: RunStatus::Active.into(),
            round: 3,
            rounds: 20,
            phase: Phase::Training.into(),
            tokens: 2_048_000,
            bytes_down: 1_200_000_000,
            bytes_up: 300_000_000,
            started_unix_ms: NOW - 245_000,
            ..RunSummary::default()
        }),
        waiting_for: "2 of 4 sites to deliver".into(),
        deadline_unix_ms: NOW + 80_000,
        clients: vec![
            client("books", Participation::Working, ClientActivity::Training, 340),
            client("manuals", Participation::Delivered, ClientActivity::Uploading, 500),
            client("law", Participation::NotSelected, ClientActivity::Idle, 0),
            ClientSummary {
                connected: false,
                ..client("code", Participation::Working, ClientActivity::Training, 1)
            },
        ],
        evaluations: [5.549, 4.0, 2.5]
            .into_iter()
            .zip(0..)
            .map(|(loss, version)| VersionEvaluation {
                version,
                loss,
                sites: vec![SiteEvaluation {
                    site: "books".into(),
                    evaluation: Some(Evaluation { version, loss, tokens: 1, text_bytes: 1 }),
                }],
            })
            .collect(),
        events: vec![event(1, "books delivered its delta for round 2")],
        server_time_unix_ms: NOW,
    }
}

pub fn event(id: u64, text: &str) -> RunEvent {
    RunEvent { id, time_unix_ms: NOW, text: text.into() }
}

fn render(snapshot: &RunSnapshot, columns: usize, rows: usize) -> Vec<String> {
    let view = View {
        snapshot,
        events: &snapshot.events,
        now_unix_ms: NOW,
        lost: None,
        zone: &TimeZone::UTC,
        paint: Paint { colours: false },
    };
    frame(&view, columns, rows).into_iter().map(|line| line.trim_end().to_owned()).collect()
}

#[test]
fn a_round_in_training_at_80_columns() {
    assert_eq!(
        render(&snapshot(), 80, 40),
        [
            "demo  active · round 3 of 20 · training · 4 min 05 s",
            "waiting for 2 of 4 sites to deliver",
            "rounds      ████░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░  2 of 20 committed",
            "deadline    in 1 min 20 s",
            "traffic     1.20 GB to sites, 300 MB from sites · 2.05M tokens",
            "train loss  3.250 (latest, mean of 3 sites)",
            "perplexity  257 → 12.18  █▄▁",
            "",
            "  SITE     STATE                                       PROGRESS   TOK/S     LOSS",
            "▶ books    training      ██████████████████░░░░░░░░░    340/500   12.3k    3.250",
            "✓ manuals  delivered                                                       3.250",
            "· law      not selected",
            "✗ code     offline",
            "",
            "22:13:20  books delivered its delta for round 2",
        ]
    );
}

#[test]
fn a_narrow_terminal_still_has_bars() {
    let lines = render(&snapshot(), 60, 40);
    assert_eq!(lines[8], "  SITE     STATE                   PROGRESS   TOK/S     LOSS");
    assert!(lines[9].starts_with("▶ books    training      "), "{lines:#?}");
    assert!(lines[9].contains('█') && lines[9].ends_with("340/500   12.3k    3.250"), "{lines:#?}");
}

#[test]
fn what_does_not_fit_in_height_gives_way_events_first() {
    let mut many = snapshot();
    many.clients = (0..30)
        .map(|index| client(&format!("site-{index}"), Participation::Working, ClientActivity::Training, 1))
        .collect();
    many.events = (0..9).map(|id| event(id, "something happened")).collect();
    let lines = render(&many, 80, 24);
    assert_eq!(lines.len(), 24);
    assert_eq!(lines[23], "  and 16 more");
    assert_eq!(render(&many, 80, 100).len(), 7 + 2 + 30 + 1 + EVENTS_SHOWN_MAX);
    assert_eq!(render(&many, 80, 3).len(), 3);
}

#[test]
fn a_lost_connection_is_said_in_place_of_what_is_waited_for() {
    let snapshot = snapshot();
    let view = View {
        snapshot: &snapshot,
        events: &[],
        now_unix_ms: NOW + 100_000,
        lost: Some("trying again in 2.0 s: reset"),
        zone: &TimeZone::UTC,
        paint: Paint { colours: false },
    };
    let lines = frame(&view, 80, 40);
    assert_eq!(lines[1], "Connection lost, trying again in 2.0 s: reset");
    assert_eq!(lines[3], "deadline    passed");
}

#[test]
fn a_run_that_was_not_started_says_how_to() {
    let mut created = snapshot();
    created.run = Some(RunSummary {
        name: "demo".into(),
        status: RunStatus::Created.into(),
        rounds: 20,
        ..RunSummary::default()
    });
    created.waiting_for.clear();
    let lines = render(&created, 80, 40);
    assert_eq!(lines[..2], ["demo  created", "to be started: consort runs start demo"]);
}

#[test]
fn an_earlier_rounds_progress_is_not_shown_as_this_ones() {
    let mut old = snapshot();
    old.clients.truncate(1);
    if let Some(progress) = &mut old.clients[0].progress {
        progress.round = 2;
    }
    let lines = render(&old, 80, 40);
    assert!(lines.iter().all(|line| !line.contains("340/500") && !line.contains("train loss")), "{lines:#?}");
}

#[test]
fn steps_are_counted_and_everything_else_is_a_share() {
    let progress = |activity: ClientActivity, done, total| Progress {
        activity: activity.into(),
        done,
        total,
        ..Progress::default()
    };
    for (progress, expected) in [
        (progress(ClientActivity::Training, 340, 500), "340/500"),
        (progress(ClientActivity::Training, 34_000, 100_000), "34%"),
        (progress(ClientActivity::Downloading, 2, 3), "67%"),
        (progress(ClientActivity::Preparing, 1_200_000, 0), "1.20M"),
        (progress(ClientActivity::Training, 9, 3), "9/3"),
        (progress(ClientActivity::Idle, 0, 0), ""),
    ] {
        assert_eq!(done(&progress), expected);
    }
}

#[test]
fn the_end_is_summed_up() {
    let mut finished = snapshot();
    if let Some(run) = &mut finished.run {
        run.status = RunStatus::Finished.into();
        run.round = 20;
        run.finished_unix_ms = NOW;
    }
    assert_eq!(
        summary(&finished, NOW + 1_000_000),
        "The run demo is finished: 20 of 20 rounds in 4 min 05 s; perplexity 257 → 12.18; 1.20 GB to sites, 300 MB from sites, 2.05M tokens."
    );
}

#[test]
fn colours_take_no_columns() {
    let snapshot = snapshot();
    let view = View {
        snapshot: &snapshot,
        events: &snapshot.events,
        now_unix_ms: NOW,
        lost: None,
        zone: &TimeZone::UTC,
        paint: Paint { colours: true },
    };
    let lines = frame(&view, 60, 40);
    assert!(lines.iter().any(|line| line.contains('\x1b')));
    assert!(lines.iter().all(|line| width(line) <= 60));
}

prop_compose! {
    fn any_client()(
        site in any::<String>(),
        connected in any::<bool>(),
        (participation, activity) in (-1..6, -1..8),
        progress in prop::option::of((any::<u32>(), any::<u64>(), any::<u64>(), any::<f64>(), any::<Option<f64>>())),
        device in any::<String>(),
        ready in any::<bool>(),
    ) -> ClientSummary {
        let progress = progress.map(|(round, done, total, tokens_per_second, loss)| Progress {
            run: "run".into(), round: round % 2, activity, done, total, tokens_per_second, loss,
        });
        ClientSummary { site, connected, participation, progress, device, ready, ..ClientSummary::default() }
    }
}

prop_compose! {
    pub fn any_snapshot()(
        name in prop_oneof![Just("run".to_owned()), any::<String>()],
        (status, phase) in (-1..7, -1..7),
        (round, rounds, tokens, bytes_down, bytes_up) in any::<(u32, u32, u64, u64, u64)>(),
        (started_unix_ms, finished_unix_ms, deadline_unix_ms, server_time_unix_ms) in any::<(u64, u64, u64, u64)>(),
        waiting_for in any::<String>(),
        clients in prop::collection::vec(any_client(), 0..8),
        losses in prop::collection::vec(any::<f64>(), 0..60),
        events in prop::collection::vec((any::<u64>(), any::<u64>(), any::<String>()), 0..8),
    ) -> RunSnapshot {
        let run = RunSummary {
            name, status, phase, round: round % 3, rounds, tokens, bytes_down, bytes_up, started_unix_ms,
            finished_unix_ms, ..RunSummary::default()
        };
        let evaluations = losses.into_iter().zip(0..);
        RunSnapshot {
            run: Some(run),
            waiting_for,
            deadline_unix_ms,
            clients,
            evaluations: evaluations.map(|(loss, version)| VersionEvaluation { version, loss, sites: vec![] }).collect(),
            events: events.into_iter().map(|(id, time_unix_ms, text)| RunEvent { id, time_unix_ms, text }).collect(),
            server_time_unix_ms,
        }
    }
}

proptest! {
    #[test]
    fn no_line_is_wider_and_no_frame_higher_than_asked(
        snapshot in any_snapshot(),
        columns in 1usize..160,
        rows in 1usize..50,
        lost in any::<Option<String>>(),
        colours in any::<bool>(),
    ) {
        let view = View {
            snapshot: &snapshot,
            events: &snapshot.events,
            now_unix_ms: snapshot.server_time_unix_ms,
            lost: lost.as_deref(),
            zone: &TimeZone::UTC,
            paint: Paint { colours },
        };
        let lines = frame(&view, columns, rows);
        prop_assert!(lines.len() <= rows);
        for line in &lines {
            prop_assert!(width(line) <= columns && !line.contains(['\n', '\r']), "{line:?} in {columns}");
        }
        // Panics are failures too.
        summary(&snapshot, snapshot.server_time_unix_ms);
    }
}
