use std::{fs, path::PathBuf};

use consort_common::ids::{Digest, RunName, SiteName};
use tempfile::TempDir;

use super::*;
use crate::engine::{RoundStatistics, TensorNorms, Treatment};

/// A database with the run "pilot".
struct Fixture {
    _folder: TempDir,
    path: PathBuf,
    store: Store,
}

fn name(text: &str) -> RunName {
    text.parse().unwrap()
}

fn site(text: &str) -> SiteName {
    text.parse().unwrap()
}

fn pilot() -> RunName {
    name("pilot")
}

fn new_run(run: &str, created_ms: u64) -> NewRun {
    NewRun {
        name: name(run),
        spec_toml: "name = 'ü'\n".to_owned(),
        spec_digest: Digest::of(b"spec"),
        manifest_digest: Digest::of(b"manifest"),
        tokenizer_digest: Digest::of(b"tokenizer"),
        architecture: "llama".to_owned(),
        parameters: 7_000_000_000,
        state_json: "{}".to_owned(),
        version_digest: Digest::of(b"version 0"),
        start: None,
        created_ms,
    }
}

async fn fixture() -> Fixture {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("consort.sqlite");
    let store = Store::open(&Location::File(path.clone())).await.unwrap();
    store.create_run(&new_run("pilot", 1000)).await.unwrap();
    Fixture { _folder: folder, path, store }
}

fn contribution(round: u32, from: &str) -> ContributionRow {
    ContributionRow {
        encoding: consort_common::codec::Encoding::Bf16,
        site: site(from),
        run: pilot(),
        round,
        age: 0,
        weight: None,
        tokens: 1 << 40,
        steps: 500,
        train_loss: 2.5,
        train_seconds: 12.25,
        delta_norm: 0.1,
        bytes: 123,
        delta_digest: Digest::of(from.as_bytes()),
        accepted_ms: u64::from(round) * 10,
        measured_norm: None,
        clip: None,
        selected: None,
    }
}

fn round_row(round: u32) -> RoundRow {
    RoundRow {
        round,
        started_ms: 10,
        committed_ms: 20,
        attempts: 2,
        first_step: 500,
        tokens: 1 << 41,
        train_loss: 2.5,
        delta_norm: 0.3,
        update_norm: 0.2,
        statistics: Some(RoundStatistics {
            parameter_norm: 12.5,
            momentum_norm: Some(0.3),
            update_cosine: Some(-0.25),
            spread: None,
        }),
        bytes_down: 11,
        bytes_up: 12,
        digest: Digest::of(&[round as u8]),
        contributors: 0,
    }
}

fn tensors() -> Vec<TensorNorms> {
    vec![
        TensorNorms { delta: 0.25, momentum: Some(1e-12), parameters: 3.5 },
        TensorNorms { delta: 0.0, momentum: None, parameters: 0.125 },
    ]
}

fn treatment(round: u32, from: &str, weight: f64) -> Treatment {
    let (norm, selected) = (Some(2.0 * weight), Some(weight > 0.25));
    Treatment { site: site(from), round, weight, norm, clip: None, selected }
}

fn commit_of(round: u32, weights: &[(&str, f64)]) -> Record {
    let treatments = weights.iter().map(|(from, weight)| treatment(round, from, *weight)).collect();
    Record::Round(RoundCommit { row: round_row(round), treatments, tensors: tensors() })
}

fn event(text: &str) -> Record {
    Record::Event { time_ms: 5, text: text.to_owned() }
}

impl Fixture {
    async fn save(&self, state: &str, records: &[Record]) -> Result<(), StoreError> {
        self.store.save_state(&pilot(), state, records).await
    }

    async fn run(&self) -> RunRow {
        self.store.run(&pilot()).await.unwrap().unwrap()
    }

    async fn events(&self) -> Vec<String> {
        let events = self.store.events_since(&pilot(), 0, 100).await.unwrap();
        events.into_iter().map(|event| event.text).collect()
    }
}

#[tokio::test]
async fn a_created_run_is_read_back_whole() {
    let fixture = fixture().await;
    let expected = new_run("pilot", 1000);
    let run = fixture.run().await;
    let read = NewRun {
        name: run.name,
        spec_toml: run.spec_toml,
        spec_digest: run.spec_digest,
        manifest_digest: run.manifest_digest,
        tokenizer_digest: run.tokenizer_digest,
        architecture: run.architecture,
        parameters: run.parameters,
        state_json: run.state_json,
        version_digest: run.version_digest,
        start: run.start,
        created_ms: run.created_ms,
    };
    assert_eq!(read, expected);
    assert_eq!((run.version, run.started_ms, run.finished_ms), (0, None, None));
    assert_eq!((run.bytes_down, run.bytes_up, run.tokens), (0, 0, 0));
}

#[tokio::test]
async fn runs_are_listed_oldest_first_and_names_are_unique() {
    let Fixture { store, .. } = &fixture().await;
    store.create_run(&new_run("newer", 2000)).await.unwrap();
    store.create_run(&new_run("older", 500)).await.unwrap();
    assert!(
        matches!(store.create_run(&new_run("pilot", 9)).await, Err(StoreError::RunExists(run)) if run == pilot())
    );
    let names: Vec<_> = store.runs().await.unwrap().into_iter().map(|run| run.name.to_string()).collect();
    assert_eq!(names, ["older", "pilot", "newer"]);
    assert_eq!(store.run(&name("none")).await.unwrap(), None);
}

#[tokio::test]
async fn a_step_is_stored_with_all_its_records() {
    let fixture = fixture().await;
    let evaluation =
        EvaluationRow { version: 1, site: site("north"), loss: 1.5, tokens: 100, text_bytes: 400 };
    let checkpoint = CheckpointRow {
        version: 1,
        path: "/state/checkpoints/pilot/1".into(),
        bytes: 4096,
        created_ms: 30,
        digest: Digest::of(&[1]),
    };
    fixture
        .save(
            "first",
            &[Record::Started(7), Record::Contribution(contribution(1, "south")), event("south delivered")],
        )
        .await
        .unwrap();
    let records = [
        Record::Started(8),
        Record::Contribution(contribution(1, "north")),
        Record::Contribution(contribution(1, "late")),
        commit_of(1, &[("north", 0.25), ("south", 0.75)]),
        Record::Evaluation(EvaluationRow { loss: 9.0, ..evaluation.clone() }),
        Record::Evaluation(evaluation.clone()),
        Record::Checkpoint(checkpoint.clone()),
        Record::Finished(9),
        event("done"),
    ];
    fixture.save("second", &records).await.unwrap();

    let run = fixture.run().await;
    assert_eq!((run.state_json.as_str(), run.version, run.version_digest), ("second", 1, Digest::of(&[1])));
    assert_eq!((run.started_ms, run.finished_ms, run.tokens), (Some(7), Some(9), 1 << 41));
    let round = RoundRow { contributors: 2, ..round_row(1) };
    assert_eq!(fixture.store.round(&pilot(), 1).await.unwrap().as_ref(), Some(&round));
    assert_eq!(fixture.store.rounds(&pilot()).await.unwrap(), [round]);
    assert_eq!(fixture.store.round(&pilot(), 2).await.unwrap(), None);
    assert_eq!(fixture.store.tensor_norms(&pilot(), 1).await.unwrap(), tensors());
    assert_eq!(fixture.store.tensor_norms(&pilot(), 2).await.unwrap(), []);
    let treated = |from, weight, selected| ContributionRow {
        weight: Some(weight),
        measured_norm: Some(2.0 * weight),
        selected: Some(selected),
        ..contribution(1, from)
    };
    let expected = [contribution(1, "late"), treated("north", 0.25, false), treated("south", 0.75, true)];
    assert_eq!(fixture.store.contributions(&pilot(), 1).await.unwrap(), expected);
    assert_eq!(fixture.store.evaluations(&pilot()).await.unwrap(), [evaluation]);
    assert_eq!(fixture.store.checkpoints(&pilot()).await.unwrap(), [checkpoint]);
    assert_eq!(fixture.events().await, ["south delivered", "done"]);

    fixture.save("third", &[Record::CheckpointRetired(1)]).await.unwrap();
    assert!(fixture.store.checkpoints(&pilot()).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_late_delta_is_listed_with_the_round_in_which_it_counts() {
    let fixture = fixture().await;
    let late = ContributionRow { age: 2, ..contribution(1, "north") };
    let [first, second, third] = [1, 2, 3].map(|round| contribution(round, "south"));
    let fresh = contribution(3, "north");
    let all = [&late, &first, &second, &third, &fresh].map(|row| Record::Contribution(row.clone()));
    fixture.save("delivered", &all).await.unwrap();
    for round in [1, 2] {
        fixture.save("committed", &[commit_of(round, &[("south", 1.0)])]).await.unwrap();
    }
    let treatments =
        vec![treatment(1, "north", 0.25), treatment(3, "north", 0.25), treatment(3, "south", 0.5)];
    let commit = Record::Round(RoundCommit { row: round_row(3), treatments, tensors: tensors() });
    fixture.save("committed", &[commit]).await.unwrap();
    let counted: Vec<u32> =
        fixture.store.rounds(&pilot()).await.unwrap().iter().map(|row| row.contributors).collect();
    assert_eq!(counted, [1, 1, 3]);
    let weighted = |row: ContributionRow, weight: f64| ContributionRow {
        weight: Some(weight),
        measured_norm: Some(2.0 * weight),
        selected: Some(weight > 0.25),
        ..row
    };
    let expected = [weighted(late, 0.25), weighted(fresh, 0.25), weighted(third, 0.5)];
    assert_eq!(fixture.store.contributions(&pilot(), 3).await.unwrap(), expected);
    assert_eq!(fixture.store.contributions(&pilot(), 1).await.unwrap(), [weighted(first, 1.0)]);
}

/// Saves a step whose last record cannot be stored: nothing of it may remain.
async fn check_all_or_nothing(last: Record, expected: fn(&StoreError) -> bool) {
    let fixture = fixture().await;
    fixture.save("before", &[Record::Contribution(contribution(1, "north")), event("before")]).await.unwrap();
    let records = [event("lost"), Record::Contribution(contribution(1, "south")), Record::Started(3), last];
    let error = fixture.save("lost", &records).await.unwrap_err();
    assert!(expected(&error), "{error:?}");

    let run = fixture.run().await;
    assert_eq!((run.state_json.as_str(), run.version, run.started_ms), ("before", 0, None));
    assert_eq!(fixture.events().await, ["before"]);
    assert_eq!(fixture.store.contributions(&pilot(), 1).await.unwrap(), [contribution(1, "north")]);
    assert!(fixture.store.rounds(&pilot()).await.unwrap().is_empty());
    // The writer is free again.
    fixture.save("after", &[commit_of(1, &[("north", 1.0)])]).await.unwrap();
    assert_eq!(fixture.run().await.version, 1);
}

#[tokio::test]
async fn a_step_whose_last_record_fails_leaves_nothing() {
    check_all_or_nothing(commit_of(2, &[("north", 1.0)]), |error| {
        matches!(error, StoreError::NotNext { round: 2, .. })
    })
    .await;
    check_all_or_nothing(commit_of(0, &[]), |error| matches!(error, StoreError::NotNext { round: 0, .. }))
        .await;
    check_all_or_nothing(
        commit_of(1, &[("north", 0.5), ("stranger", 0.5)]),
        |error| matches!(error, StoreError::NoContribution { site, .. } if site.as_str() == "stranger"),
    )
    .await;
    let diverged = ContributionRow { train_loss: f64::NAN, ..contribution(1, "west") };
    check_all_or_nothing(Record::Contribution(diverged), |error| {
        matches!(error, StoreError::Unstorable { column: "contributions.train_loss", .. })
    })
    .await;
    let boundless = ContributionRow { bytes: u64::MAX, ..contribution(1, "west") };
    check_all_or_nothing(Record::Contribution(boundless), |error| {
        matches!(error, StoreError::Unstorable { column: "contributions.bytes", .. })
    })
    .await;
}

#[tokio::test]
async fn a_round_is_committed_once() {
    let fixture = fixture().await;
    fixture
        .save("1", &[Record::Contribution(contribution(1, "north")), commit_of(1, &[("north", 1.0)])])
        .await
        .unwrap();
    let again = fixture.save("2", &[commit_of(1, &[("north", 1.0)])]).await;
    assert!(matches!(again, Err(StoreError::NotNext { round: 1, .. })));
    assert_eq!(fixture.store.rounds(&pilot()).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_call_that_is_given_up_half_way_leaves_nothing() {
    let fixture = fixture().await;
    let mut transaction = fixture.store.connections.begin("test").await.unwrap();
    events::insert_event(&mut transaction, &pilot(), 1, "lost").await.unwrap();
    drop(transaction);
    assert!(fixture.events().await.is_empty());
    fixture.save("goes on", &[event("kept")]).await.unwrap();
    assert_eq!(fixture.events().await, ["kept"]);
}

#[tokio::test]
async fn readers_see_whole_transactions_only() {
    let fixture = fixture().await;
    let mut transaction = fixture.store.connections.begin("test").await.unwrap();
    events::insert_event(&mut transaction, &pilot(), 1, "open").await.unwrap();
    assert!(fixture.events().await.is_empty());
    transaction.commit("test").await.unwrap();
    assert_eq!(fixture.events().await, ["open"]);
}

#[tokio::test]
async fn what_was_committed_is_there_after_the_database_is_opened_again() {
    let fixture = fixture().await;
    fixture.save("kept", &[event("kept")]).await.unwrap();
    // Not closed: as after a kill, the second one finds the write-ahead log.
    let second = Store::open(&Location::File(fixture.path.clone())).await.unwrap();
    assert_eq!(second.run(&pilot()).await.unwrap().unwrap().state_json, "kept");
    second.close().await;
    fixture.store.close().await;
    // Closed, all is in the one file.
    let copy = fixture.path.with_file_name("copy.sqlite");
    fs::copy(&fixture.path, &copy).unwrap();
    let third = Store::open(&Location::File(copy.clone())).await.unwrap();
    assert_eq!(third.events_since(&pilot(), 0, 10).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_run_that_does_not_exist_is_refused() {
    let Fixture { store, .. } = &fixture().await;
    let none = name("none");
    assert!(matches!(store.save_state(&none, "", &[]).await, Err(StoreError::NoSuchRun(_))));
    assert!(matches!(store.add_traffic(&none, 1, 1).await, Err(StoreError::NoSuchRun(_))));
    let site = RunSiteRow { site: site("north"), train_tokens: 1, held_out_tokens: 1, documents: 1 };
    assert!(matches!(store.upsert_run_site(&none, &site).await, Err(StoreError::Database { .. })));
    assert!(store.rounds(&none).await.unwrap().is_empty());
}

#[tokio::test]
async fn clients_keep_when_they_were_first_seen() {
    let Fixture { store, .. } = &fixture().await;
    let client = |from: &str, first_seen_ms, last_seen_ms, device: &str| ClientRow {
        site: site(from),
        first_seen_ms,
        last_seen_ms,
        device: device.to_owned(),
        software_version: "0.1.0".to_owned(),
    };
    for row in [client("south", 1, 1, "cpu"), client("north", 2, 2, "cpu"), client("south", 9, 9, "cuda:0")] {
        store.upsert_client(&row).await.unwrap();
    }
    let expected = [client("north", 2, 2, "cpu"), client("south", 1, 9, "cuda:0")];
    assert_eq!(store.clients().await.unwrap(), expected);
    assert_eq!(store.client(&site("south")).await.unwrap(), Some(expected[1].clone()));
    assert_eq!(store.client(&site("west")).await.unwrap(), None);
}

#[tokio::test]
async fn a_sites_last_report_counts() {
    let Fixture { store, .. } = &fixture().await;
    let report =
        |tokens| RunSiteRow { site: site("north"), train_tokens: tokens, held_out_tokens: 5, documents: 3 };
    store.upsert_run_site(&pilot(), &report(10)).await.unwrap();
    store.upsert_run_site(&pilot(), &report(20)).await.unwrap();
    assert_eq!(store.run_sites(&pilot()).await.unwrap(), [report(20)]);
}

#[tokio::test]
async fn a_sites_contributions_come_newest_first_over_all_runs() {
    let fixture = fixture().await;
    fixture.store.create_run(&new_run("second", 2000)).await.unwrap();
    let of_second = ContributionRow { run: name("second"), accepted_ms: 15, ..contribution(1, "north") };
    fixture
        .save("", &[1, 2, 3].map(|round| Record::Contribution(contribution(round, "north"))))
        .await
        .unwrap();
    fixture.save("", &[Record::Contribution(contribution(4, "south"))]).await.unwrap();
    fixture.store.save_state(&name("second"), "", &[Record::Contribution(of_second)]).await.unwrap();
    let newest = fixture.store.client_contributions(&site("north"), 3).await.unwrap();
    let newest: Vec<_> = newest.iter().map(|row| (row.run.as_str(), row.round)).collect();
    assert_eq!(newest, [("pilot", 3), ("pilot", 2), ("second", 1)]);
}

#[tokio::test]
async fn traffic_adds_up() {
    let fixture = fixture().await;
    fixture.store.add_traffic(&pilot(), 5, 7).await.unwrap();
    fixture.store.add_traffic(&pilot(), 10, 0).await.unwrap();
    let run = fixture.run().await;
    assert_eq!((run.bytes_down, run.bytes_up), (15, 7));
}

#[tokio::test]
async fn events_are_numbered_within_their_run_and_only_the_newest_are_kept() {
    let Fixture { store, .. } = &fixture().await;
    store.create_run(&new_run("other", 1)).await.unwrap();
    store.add_event(&name("other"), 1, "of another run").await.unwrap();
    // All in one transaction: one sync instead of ten thousand.
    let beyond = 5;
    let records: Vec<_> = (1..=EVENTS_MAX + beyond).map(|number| event(&number.to_string())).collect();
    store.save_state(&pilot(), "", &records).await.unwrap();
    let all = store.events_since(&pilot(), 0, u32::MAX).await.unwrap();
    assert_eq!(all.len(), EVENTS_MAX as usize);
    assert_eq!((all[0].id, all[0].text.as_str()), (u64::from(beyond) + 1, "6"));
    let newest: Vec<_> =
        store.events_since(&pilot(), 10_000, 2).await.unwrap().iter().map(|event| event.id).collect();
    assert_eq!(newest, [10_004, 10_005]);
    assert!(store.events_since(&pilot(), 10_005, 2).await.unwrap().is_empty());
    assert_eq!(store.events_since(&name("other"), 0, 2).await.unwrap()[0].id, 1);
}

#[test]
fn the_mean_loss_is_weighted_by_tokens() {
    let row = |loss, tokens| EvaluationRow { version: 1, site: site("north"), loss, tokens, text_bytes: 1 };
    assert_eq!(mean_loss(&[row(1.0, 100), row(3.0, 300)]), Some(2.5));
    assert_eq!(mean_loss(&[row(1.0, 0)]), None);
    assert_eq!(mean_loss(&[]), None);
}

#[tokio::test]
async fn many_tasks_write_at_a_time() {
    let fixture = fixture().await;
    let writes = (0..50).map(|number| {
        let store = fixture.store.clone();
        tokio::spawn(async move { store.add_event(&pilot(), 1, &number.to_string()).await })
    });
    for write in writes.collect::<Vec<_>>() {
        write.await.unwrap().unwrap();
    }
    assert_eq!(fixture.events().await.len(), 50);
}

/// Opens a database after `damage` to its file.
async fn open_damaged(damage: impl FnOnce(&mut Vec<u8>)) -> StoreError {
    let fixture = fixture().await;
    for number in 0..50 {
        fixture.store.add_event(&pilot(), number, &"long ".repeat(200)).await.unwrap();
    }
    fixture.store.close().await;
    let mut content = fs::read(&fixture.path).unwrap();
    damage(&mut content);
    fs::write(&fixture.path, content).unwrap();
    Store::open(&Location::File(fixture.path.clone())).await.unwrap_err()
}

#[tokio::test]
async fn a_damaged_database_is_refused_in_words() {
    let not_a_database = open_damaged(|content| content[..4096].fill(b'x')).await;
    let half = open_damaged(|content| content.truncate(content.len() / 8192 * 4096)).await;
    let scribbled = open_damaged(|content| content[4096..12288].fill(0xff)).await;
    for error in [not_a_database, half, scribbled] {
        assert!(matches!(error, StoreError::Damaged { .. }), "{error:?}");
        assert!(error.to_string().contains("restore the state directory"), "{error}");
    }
}

#[tokio::test]
async fn a_database_of_a_newer_version_is_refused_in_words() {
    let fixture = fixture().await;
    sqlx::query("INSERT INTO _sqlx_migrations VALUES (99, 'later', CURRENT_TIMESTAMP, TRUE, X'00', 1)")
        .execute(&fixture.store.connections.writer)
        .await
        .unwrap();
    fixture.store.close().await;
    let error = Store::open(&Location::File(fixture.path.clone())).await.unwrap_err();
    assert!(matches!(error, StoreError::NewerSchema { version: 99, .. }), "{error:?}");
    assert!(error.to_string().contains("newer version"), "{error}");
}

#[tokio::test]
async fn a_file_may_have_any_name_and_be_found_by_any_path() {
    let folder = tempfile::tempdir().unwrap();
    let elsewhere = folder.path().join("elsewhere/deep");
    fs::create_dir_all(&elsewhere).unwrap();
    std::os::unix::fs::symlink(&elsewhere, folder.path().join("link")).unwrap();
    for name in ["with space", "50%", "a%20b", "what?mode=ro", "a#b", "über", "link/../b", "./c//d"] {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let store = Store::open(&Location::File(path.clone())).await.unwrap();
        store.create_run(&new_run("pilot", 1000)).await.unwrap();
        assert_eq!(store.runs().await.unwrap().len(), 1);
        store.close().await;
        assert!(path.is_file(), "{name}");
    }
}

#[tokio::test]
async fn a_place_that_cannot_be_written_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("missing/consort.sqlite");
    let error = Store::open(&Location::File(path.clone())).await.unwrap_err();
    assert!(matches!(error, StoreError::Open { .. }), "{error:?}");
    assert!(error.to_string().contains("missing/consort.sqlite"), "{error}");
}

#[tokio::test]
async fn a_transaction_that_sqlite_ended_by_itself_does_not_stop_the_next() {
    let fixture = fixture().await;
    let mut transaction = fixture.store.connections.begin("meet a full disk").await.unwrap();
    // What SQLite does by itself when a commit finds the disk full.
    sqlx::query("ROLLBACK").execute(&mut *transaction).await.unwrap();
    transaction.commit("meet a full disk").await.unwrap_err();
    fixture.store.save_state(&pilot(), "{}", &[]).await.unwrap();
}
