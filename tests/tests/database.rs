//! PostgreSQL in place of SQLite: the same records, the same run whatever is killed, one owner, and no step taken
//! twice when the server is lost in the middle of a commit.

mod lossy;

use std::path::Path;

use consort_aggregator::{
    engine::{RoundStatistics, TensorNorms, Treatment},
    store::{
        ClientRow, ContributionRow, EvaluationRow, Location, NewRun, Record, RoundCommit, RoundRow,
        RunSiteRow, StartOrigin, Store, StoreError,
    },
};
use consort_common::{
    codec::Encoding,
    ids::{Digest, RunName},
};
use consort_tests::{
    TestFederation, binaries,
    federation::tiny_spec,
    postgres::{PASSWORD, Postgres},
    process::Process,
};
use serde_json::Value;

use self::lossy::{Cut, LossySocket};

const SITES: [&str; 2] = ["bank", "lab"];
const RUN: &str = "kept";

fn pilot() -> RunName {
    "pilot".parse().expect("a name")
}

/// Runs a test that is async where there is a server.
fn with_server(test: impl AsyncFnOnce(Postgres)) {
    let Some(server) = Postgres::start() else { return };
    let runtime = tokio::runtime::Runtime::new().expect("a runtime can be made");
    runtime.block_on(test(server));
}

/// The database at a URL. A configuration would refuse the password in it.
fn location(url: &str, password: &str) -> Location {
    Location::Server(url.replacen('@', &format!(":{password}@"), 1))
}

fn new_run(name: &str, created_ms: u64) -> NewRun {
    NewRun {
        name: name.parse().expect("a name"),
        spec_toml: "name = 'ü'\n".to_owned(),
        spec_digest: Digest::of(b"spec"),
        manifest_digest: Digest::of(b"manifest"),
        tokenizer_digest: Digest::of(b"tokenizer"),
        architecture: "llama".to_owned(),
        parameters: 7_000_000_000,
        state_json: "{}".to_owned(),
        version_digest: Digest::of(b"version 0"),
        start: Some(StartOrigin { name: "nul \0 byte".to_owned(), digest: Digest::of(b"weights") }),
        created_ms,
    }
}

fn contribution(round: u32, age: u32, site: &str) -> ContributionRow {
    ContributionRow {
        encoding: Encoding::Bf16,
        site: site.parse().expect("a name"),
        run: pilot(),
        round,
        age,
        weight: None,
        tokens: 1 << 40,
        steps: 500,
        train_loss: 0.1 + 0.2,
        train_seconds: 1e-300,
        delta_norm: 1.0 / 3.0,
        bytes: i64::MAX as u64,
        delta_digest: Digest::of(site.as_bytes()),
        accepted_ms: u64::from(round) * 10,
        measured_norm: None,
        clip: None,
        selected: None,
    }
}

fn commit(round: u32, from: &[(u32, &str)]) -> Record {
    let treatments = from.iter().map(|(round, site)| Treatment {
        site: site.parse().expect("a name"),
        round: *round,
        weight: 1.0 / from.len() as f64,
        norm: Some(f64::MIN_POSITIVE),
        clip: None,
        selected: Some(*round > 1),
    });
    Record::Round(RoundCommit {
        row: RoundRow {
            round,
            started_ms: 10,
            committed_ms: 20 + u64::from(round),
            attempts: 2,
            first_step: 500,
            tokens: 1 << 41,
            train_loss: 2.5,
            delta_norm: f64::MAX,
            update_norm: 0.0,
            statistics: (round > 1).then_some(RoundStatistics {
                parameter_norm: 12.5,
                momentum_norm: None,
                update_cosine: Some(-0.25),
                spread: None,
            }),
            bytes_down: 11,
            bytes_up: 12,
            digest: Digest::of(&[round as u8]),
            contributors: 0,
        },
        treatments: treatments.collect(),
        tensors: vec![TensorNorms { delta: 0.25, momentum: None, parameters: 3.5 }],
    })
}

/// Does one of everything, and gives all that can be read afterwards, and the refusals, as text.
async fn story(store: &Store) -> String {
    // Locales put names with hyphens in other orders than bytes have.
    let sites = ["a-b", "ab", "a-c", "b", "a"];
    let mut refused = Vec::new();
    store.create_run(&new_run("pilot", 1000)).await.expect("the run is new");
    store.create_run(&new_run("a-first", 1000)).await.expect("the run is new");
    refused.push(store.create_run(&new_run("pilot", 1)).await.expect_err("the name is taken"));
    for (at, site) in (1..).zip(sites) {
        let site: consort_common::ids::SiteName = site.parse().expect("a name");
        for last_seen_ms in [at, 7 * at] {
            let client = ClientRow {
                site: site.clone(),
                first_seen_ms: at,
                last_seen_ms,
                device: "nul \0 byte".to_owned(),
                software_version: "1".to_owned(),
            };
            store.upsert_client(&client).await.expect("a client is recorded");
        }
        let row = RunSiteRow { site, train_tokens: at, held_out_tokens: 2, documents: 3 };
        store.upsert_run_site(&pilot(), &row).await.expect("a site's report is recorded");
    }
    let contributions = sites.map(|site| Record::Contribution(contribution(1, u32::from(site == "b"), site)));
    store.save_state(&pilot(), "1", &contributions).await.expect("the step is stored");
    let first = commit(1, &[(1, "a-b"), (1, "ab")]);
    refused.push(
        store.save_state(&pilot(), "no", &[commit(2, &[])]).await.expect_err("round 2 follows round 1"),
    );
    refused.push(
        store
            .save_state(&pilot(), "no", &[first.clone(), commit(2, &[(2, "ab")])])
            .await
            .expect_err("no such contribution"),
    );
    store.save_state(&pilot(), "2", &[Record::Started(5), first]).await.expect("the round is committed");
    let evaluations = sites.map(|site| {
        let site = site.parse().expect("a name");
        Record::Evaluation(EvaluationRow { version: 1, site, loss: 1.5, tokens: 10, text_bytes: 40 })
    });
    store.save_state(&pilot(), "3", &evaluations).await.expect("the evaluations are stored");
    let second = [
        Record::Contribution(contribution(2, 0, "ab")),
        commit(2, &[(2, "ab"), (1, "b")]),
        Record::Event { time_ms: 9, text: "nul \0 byte".to_owned() },
        Record::Finished(30),
    ];
    store.save_state(&pilot(), "4", &second).await.expect("the round is committed");
    store.add_traffic(&pilot(), 3, 4).await.expect("traffic is counted");
    store.add_event(&pilot(), 10, "more").await.expect("an event is recorded");
    for (run, touched_ms) in [("pilot", 500), ("x-old", 1), ("xnew", 500)] {
        let run = run.parse().expect("a name");
        store.touch_start_upload(&run, touched_ms).await.expect("an upload is noted");
    }
    let expected = "they can be read";
    format!(
        "{refused:#?}\n{:#?}\n{:#?}\n{:#?}\n{:#?}\n{:#?}\n{:#?}\n{:#?}\n{:#?}\n{:#?}\n{:#?}\n{:#?}\n{:#?}",
        store.runs().await.expect(expected),
        store.clients().await.expect(expected),
        store.run_sites(&pilot()).await.expect(expected),
        store.contributions(&pilot(), 1).await.expect(expected),
        store.contributions(&pilot(), 2).await.expect(expected),
        store.client_contributions(&"ab".parse().expect("a name"), 10).await.expect(expected),
        store.rounds(&pilot()).await.expect(expected),
        store.tensor_norms(&pilot(), 2).await.expect(expected),
        store.version_with_digest(Digest::of(&[1])).await.expect(expected),
        store.evaluations(&pilot()).await.expect(expected),
        store.events_since(&pilot(), 0, 10).await.expect(expected),
        store.spent_start_uploads(100).await.expect(expected),
    )
}

#[test]
fn both_databases_hold_the_same() {
    with_server(async |server| {
        let folder = tempfile::tempdir().expect("a temporary directory can be made");
        let file = Store::open(&Location::File(folder.path().join("consort.db"))).await.expect("a file");
        let at_server = Store::open(&location(&server.url(), PASSWORD)).await.expect("a server");
        let expected = story(&file).await;
        assert!(expected.contains("contributors: 2"), "{expected}");
        assert_eq!(story(&at_server).await, expected);
    });
}

/// What is committed is found by whoever opens the database next, and by nobody before.
#[test]
fn a_database_has_one_owner() {
    with_server(async |server| {
        let location = location(&server.url(), PASSWORD);
        let first = Store::open(&location).await.expect("a server");
        first.create_run(&new_run("pilot", 1)).await.expect("the run is new");
        let second = Store::open(&location).await.expect_err("the database is in use");
        assert!(matches!(second, StoreError::InUse { .. }), "{second}");
        first.close().await;
        let third = Store::open(&location).await.expect("its owner has gone");
        assert_eq!(third.runs().await.expect("they can be read").len(), 1);
    });
}

#[test]
fn what_keeps_a_server_from_being_used_is_said() {
    with_server(async |mut server| {
        let refused = async |url: &str, password: &str| {
            Store::open(&location(url, password)).await.expect_err("it cannot be opened").to_string()
        };
        let missing = refused(&server.url().replace("/postgres?", "/missing?"), PASSWORD).await;
        assert!(
            missing.contains("\"missing\" does not exist") && missing.contains("PGPASSWORD"),
            "{missing}"
        );
        let denied = refused(&server.url(), "wrong").await;
        assert!(denied.contains("password authentication failed"), "{denied}");
        server.kill();
        let away = refused(&server.url(), PASSWORD).await;
        assert!(away.contains("see that the server runs"), "{away}");
    });
}

/// A step whose answer is lost is known to be stored; one whose commit never arrived is known not to be.
#[test]
fn a_commit_whose_answer_is_lost_is_looked_up() {
    with_server(async |server| {
        let socket = LossySocket::in_front_of(server.folder()).await;
        let store =
            Store::open(&location(&Postgres::url_at(socket.folder()), PASSWORD)).await.expect("a server");
        store.create_run(&new_run("pilot", 1)).await.expect("the run is new");
        let events = async || store.events_since(&pilot(), 0, 10).await.expect("they can be read").len();
        socket.cut(Cut::AfterCommit);
        store.add_event(&pilot(), 1, "once").await.expect("it is stored, and that is found out");
        assert_eq!((socket.cuts(), events().await), (1, 1));
        socket.cut(Cut::BeforeCommit);
        store.add_event(&pilot(), 2, "lost").await.expect_err("it is not stored, and that is found out");
        assert_eq!((socket.cuts(), events().await), (2, 1));
        store.add_event(&pilot(), 3, "goes on").await.expect("the next connection is sound");
        assert_eq!(events().await, 2);
    });
}

fn start(federation: &mut TestFederation, rounds: u32) {
    federation.start_aggregator();
    federation.start_run(&tiny_spec(RUN, rounds, 2).replace("local_steps = 8", "local_steps = 40"));
    for site in SITES {
        federation.start_client(site);
    }
}

/// Digests of the finished run's versions.
fn versions(federation: &TestFederation) -> Vec<Value> {
    federation.wait_for_run(RUN, "the run to finish", |run| (run["status"] == "finished").then_some(()));
    let rounds = federation.json(&["rounds", "list", RUN]);
    rounds["rounds"]
        .as_array()
        .expect("a list of rounds")
        .iter()
        .map(|round| round["digest"].clone())
        .collect()
}

#[test]
fn a_run_is_the_same_though_its_server_and_its_aggregator_are_killed() {
    const ROUNDS: u32 = 6;
    let Some(mut server) = Postgres::start() else { return };
    let mut quiet = TestFederation::new(&SITES);
    start(&mut quiet, ROUNDS);
    let expected = versions(&quiet);
    drop(quiet);

    let mut federation = TestFederation::new(&SITES);
    federation.set_aggregator_environment("CONSORT_AGGREGATOR_DATABASE__URL", &server.url());
    federation.set_aggregator_environment("PGPASSWORD", PASSWORD);
    start(&mut federation, ROUNDS);
    for round in 1..u64::from(ROUNDS) {
        federation.wait_for_run(RUN, &format!("round {round}"), |run| {
            (run["round"].as_u64()? > round).then_some(())
        });
        if round % 2 == 0 {
            federation.kill_aggregator();
            federation.start_aggregator();
        } else {
            server.kill();
            server.bring_back();
        }
    }
    assert_eq!(versions(&federation), expected);
    assert!(!federation.aggregator_state().join("consort.db").exists(), "the database is at the server");
    let checked = check(&federation, &server.url());
    assert!(checked.contains("in use by another aggregator"), "{checked}");
    assert!(federation.terminate_aggregator().success());
    let checked = check(&federation, &server.url());
    assert!(checked.contains("ok    database: PostgreSQL"), "{checked}");
}

/// A silence at a commit is not taken for a no: the process ends, and its next start finds what is so.
#[test]
fn a_server_that_does_not_answer_a_commit_ends_the_aggregator_and_nothing_else() {
    const ROUNDS: u32 = 3;
    let Some(server) = Postgres::start() else { return };
    let runtime = tokio::runtime::Runtime::new().expect("a runtime can be made");
    let socket = runtime.block_on(LossySocket::in_front_of(server.folder()));
    let mut federation = TestFederation::new(&SITES);
    federation
        .set_aggregator_environment("CONSORT_AGGREGATOR_DATABASE__URL", &Postgres::url_at(socket.folder()));
    federation.set_aggregator_environment("PGPASSWORD", PASSWORD);
    start(&mut federation, ROUNDS);
    socket.cut(Cut::Silent);
    let status = federation.aggregator().wait();
    let log = federation.aggregator().output();
    assert_eq!((status.code(), socket.cuts()), (Some(1), 1), "{log}");
    assert!(log.contains("the database has not answered for 60 s"), "{log}");
    federation.kill_aggregator();
    federation.start_aggregator();
    assert_eq!(versions(&federation).len(), ROUNDS as usize);
}

/// What it knows of its runs may be old: another has written meanwhile.
#[test]
fn an_aggregator_whose_database_had_another_owner_meanwhile_stops() {
    let Some(mut server) = Postgres::start() else { return };
    let [mut first, mut second] = [(), ()].map(|()| {
        let mut federation = TestFederation::new(&["bank"]);
        federation.set_aggregator_environment("CONSORT_AGGREGATOR_DATABASE__URL", &server.url());
        federation.set_aggregator_environment("PGPASSWORD", PASSWORD);
        federation
    });
    first.start_aggregator();
    server.kill();
    server.bring_back();
    second.start_aggregator();
    assert!(second.terminate_aggregator().success());
    // The site joins, which is written down.
    first.start_client("bank");
    let status = first.aggregator().wait();
    let log = first.aggregator().output();
    assert_eq!(status.code(), Some(1), "{log}");
    assert!(log.contains("another aggregator has taken up the database"), "{log}");
}

/// What `consort-aggregator --check` prints.
fn check(federation: &TestFederation, url: &str) -> String {
    let log = federation.path().join(format!("check-{:?}", std::time::SystemTime::now()));
    let mut process = Process::start(
        std::process::Command::new(binaries::aggregator())
            .arg("--check")
            .arg("--config")
            .arg(federation.kit("aggregator-main").join("aggregator.toml"))
            .env("CONSORT_AGGREGATOR_DATABASE__URL", url)
            .env("PGPASSWORD", PASSWORD),
        Path::new(&log),
    );
    process.wait();
    process.output()
}
