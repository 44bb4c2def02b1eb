//! Who may call what: every connection and every call by somebody who may not is refused with a status
//! and a sentence, costs the aggregator next to nothing, and leaves the others alone.

use std::{sync::Arc, time::Duration};

use consort_common::{
    identity::Federation,
    tls::{ConnectError, Refusal, client_config, explain},
};
use consort_proto::v1::{
    self, DeltaBegin, federation_client::FederationClient, operator_client::OperatorClient,
};
use consort_tests::{
    TestFederation,
    federation::tiny_spec,
    forgery,
    raw::{
        self, Delta, RawOperator, RawSite, assert_refused, channel, channel_with, chunk_of, handshake, soon,
    },
};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use time::OffsetDateTime;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tonic::{Code, Request, Status, transport::Channel};

/// Most that the aggregator may grow by while somebody floods it, in bytes: far below what is sent.
const GROWTH_MAX: u64 = 64 << 20;
/// What is sent in a flood, in bytes.
const FLOOD: usize = 200 << 20;

/// A federation with the site `bank` and a started run of two rounds.
fn federation() -> TestFederation {
    let mut federation = TestFederation::new(&["bank"]);
    federation.start_aggregator();
    federation.start_run(&tiny_spec("pilot", 2, 1));
    federation
}

/// A well-behaved site can still complete a round.
async fn assert_serving(federation: &mut TestFederation) {
    assert!(federation.aggregator().is_running());
    RawSite::ready(federation, "bank", "pilot").await.complete_round(1).await;
}

/// Every call of the service for sites.
async fn call_federation(channel: &Channel) -> Vec<Result<(), Status>> {
    let mut client = FederationClient::new(channel.clone());
    let (session_id, run) = (vec![0; 16], "pilot".to_owned());
    vec![
        client.join(v1::JoinRequest::default()).await.map(drop),
        client
            .wait_for_assignment(v1::WaitForAssignmentRequest { session_id: session_id.clone() })
            .await
            .map(drop),
        client
            .describe_run(v1::DescribeRunRequest { session_id: session_id.clone(), run: run.clone() })
            .await
            .map(drop),
        client
            .download_tokenizer(v1::DownloadTokenizerRequest {
                session_id: session_id.clone(),
                run: run.clone(),
            })
            .await
            .map(drop),
        client
            .report_ready(v1::ReportReadyRequest {
                session_id: session_id.clone(),
                run,
                ..Default::default()
            })
            .await
            .map(drop),
        client.download_model(v1::DownloadModelRequest::default()).await.map(drop),
        client.upload_delta(tokio_stream::empty::<v1::UploadDeltaRequest>()).await.map(drop),
        client.report_progress(v1::ReportProgressRequest::default()).await.map(drop),
        client.report_evaluation(v1::ReportEvaluationRequest::default()).await.map(drop),
        client.probe(tokio_stream::empty::<v1::ProbeRequest>()).await.map(drop),
        client.leave(v1::LeaveRequest { session_id, reason: String::new() }).await.map(drop),
    ]
}

/// Every call of the service for operators.
async fn call_operator(channel: &Channel) -> Vec<Result<(), Status>> {
    let mut client = OperatorClient::new(channel.clone());
    let run = "pilot".to_owned();
    vec![
        client.create_run(tokio_stream::empty::<v1::CreateRunRequest>()).await.map(drop),
        client.start_run(v1::StartRunRequest { run: run.clone() }).await.map(drop),
        client.pause_run(v1::PauseRunRequest { run: run.clone() }).await.map(drop),
        client.resume_run(v1::ResumeRunRequest { run: run.clone() }).await.map(drop),
        client.abort_run(v1::AbortRunRequest { run: run.clone(), reason: "mine".to_owned() }).await.map(drop),
        client.list_runs(v1::ListRunsRequest {}).await.map(drop),
        client.get_run(v1::GetRunRequest { run: run.clone() }).await.map(drop),
        client.watch_run(v1::WatchRunRequest { run: run.clone() }).await.map(drop),
        client.list_rounds(v1::ListRoundsRequest { run: run.clone() }).await.map(drop),
        client.get_round(v1::GetRoundRequest { run: run.clone(), round: 1 }).await.map(drop),
        client.list_clients(v1::ListClientsRequest {}).await.map(drop),
        client.get_client(v1::GetClientRequest { site: "bank".to_owned() }).await.map(drop),
        client.list_checkpoints(v1::ListCheckpointsRequest { run: run.clone() }).await.map(drop),
        client.download_checkpoint(v1::DownloadCheckpointRequest { run, version: None }).await.map(drop),
    ]
}

/// Every one of the calls is refused for the certificate, and nothing is stored or changed.
async fn assert_all_denied(federation: &mut TestFederation, calls: Vec<Result<(), Status>>, words: &[&str]) {
    for call in calls {
        assert_refused(call, Code::PermissionDenied, words);
    }
    assert_eq!(federation.json(&["runs", "show", "pilot"])["status"], "active");
    assert_serving(federation).await;
}

#[tokio::test]
async fn a_sites_certificate_may_call_nothing_of_operator() {
    let mut federation = federation();
    let stored = federation.stored();
    let calls = call_operator(&channel(&federation, &federation.kit("site-bank"))).await;
    assert_eq!(federation.stored(), stored);
    let words = ["consort://test/site/bank", "role operator", "consort pki issue operator"];
    assert_all_denied(&mut federation, calls, &words).await;
}

#[tokio::test]
async fn an_operators_certificate_may_call_nothing_of_federation() {
    let mut federation = federation();
    let stored = federation.stored();
    let calls = call_federation(&channel(&federation, &federation.kit("operator-alice"))).await;
    assert_eq!(federation.stored(), stored);
    let words = ["consort://test/operator/alice", "role site", "consort pki issue site"];
    assert_all_denied(&mut federation, calls, &words).await;
}

#[tokio::test]
async fn an_aggregators_certificate_may_call_neither() {
    let mut federation = federation();
    let channel = channel(&federation, &federation.kit("aggregator-main"));
    let mut calls = call_federation(&channel).await;
    calls.extend(call_operator(&channel).await);
    assert_all_denied(&mut federation, calls, &["consort://test/aggregator/main", "consort pki issue"]).await;
}

#[tokio::test]
async fn another_federations_member_is_refused_though_the_ca_is_the_same() {
    let mut federation = federation();
    let folder = federation.path().join("stranger");
    let tomorrow = OffsetDateTime::now_utc() + time::Duration::DAY;
    forgery::write_kit(&federation, &folder, "consort://other/site/bank", tomorrow);
    // As a tool does that does not look whom it is talking to; ours refuses before the first call.
    let channel = channel_with(&federation, client_config(&raw::credentials(&folder)));
    let calls = call_federation(&channel).await;
    assert_all_denied(&mut federation, calls, &["consort://other/site/bank", "another federation", "test"])
        .await;

    let status =
        FederationClient::new(raw::channel(&federation, &folder)).join(v1::JoinRequest::default()).await;
    let error = explain(&status.expect_err("the client refuses")).expect("the reason is known");
    let other: Federation = "other".parse().expect("a name");
    assert!(matches!(error, ConnectError::OtherFederation { ours, .. } if ours == other));
}

/// The first call fails for the connection, and says why.
async fn assert_not_connected(federation: &TestFederation, kit: &str, refusal: Refusal) {
    let mut client = FederationClient::new(channel(federation, &federation.path().join(kit)));
    let status = client.join(v1::JoinRequest::default()).await.expect_err("the connection is refused");
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    assert_eq!(explain(&status), Some(ConnectError::ClientCertificateRefused(refusal)), "{status:?}");
}

#[tokio::test]
async fn a_certificate_of_another_ca_is_refused() {
    let mut federation = federation();
    // A stranger that somehow got hold of our ca.pem.
    let stranger = TestFederation::new(&["bank"]);
    let kit = stranger.kit("site-bank");
    std::fs::copy(federation.kit("site-bank").join("ca.pem"), kit.join("ca.pem"))
        .expect("files can be copied");
    assert_not_connected(&federation, kit.to_str().expect("a path is text"), Refusal::OtherCa).await;
    federation.aggregator().wait_for_output("its certificate was not issued by this federation's CA");
    assert_serving(&mut federation).await;
}

#[tokio::test]
async fn an_expired_certificate_is_refused() {
    let mut federation = federation();
    let yesterday = OffsetDateTime::now_utc() - time::Duration::DAY;
    forgery::write_kit(&federation, &federation.path().join("late"), "consort://test/site/bank", yesterday);
    assert_not_connected(&federation, "late", Refusal::Expired).await;
    federation.aggregator().wait_for_output("its certificate has expired");
    assert_serving(&mut federation).await;
}

/// A TLS configuration without a certificate of our own.
fn anonymous(federation: &TestFederation) -> Arc<ClientConfig> {
    let mut roots = RootCertStore::empty();
    let ca =
        CertificateDer::from_pem_file(federation.kit("site-bank").join("ca.pem")).expect("the CA is PEM");
    roots.add(ca).expect("the CA can be a root");
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let mut config = builder.expect("versions are there").with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Arc::new(config)
}

#[tokio::test]
async fn a_caller_without_a_certificate_is_refused() {
    let mut federation = federation();
    let mut stream =
        handshake(federation.endpoint(), anonymous(&federation)).await.expect("half a handshake");
    let error = soon("the alert", stream.read_u8()).await.expect_err("the connection is refused");
    assert!(error.to_string().contains("CertificateRequired"), "{error}");

    let channel = channel_with(&federation, anonymous(&federation));
    for call in call_federation(&channel).await.into_iter().chain(call_operator(&channel).await) {
        let status = call.expect_err("the connection is refused");
        assert!(matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Internal), "{status:?}");
    }
    federation.aggregator().wait_for_output("it presented no certificate");
    assert_serving(&mut federation).await;
}

#[tokio::test]
async fn an_anonymous_flood_is_not_buffered() {
    let mut federation = federation();
    let before = federation.aggregator().peak_memory_bytes();
    // Over TLS with no certificate, and without even TLS.
    let tls = handshake(federation.endpoint(), anonymous(&federation)).await.expect("half a handshake");
    let plain = TcpStream::connect(federation.endpoint()).await.expect("the port is open");
    assert!(flood(tls).await < FLOOD, "the aggregator takes what a stranger sends");
    assert!(flood(plain).await < FLOOD, "the aggregator takes what a stranger sends");
    let growth = federation.aggregator().peak_memory_bytes() - before;
    assert!(growth < GROWTH_MAX, "grew by {growth} bytes");
    assert_serving(&mut federation).await;
}

/// Sends until the other side has enough; tells how much it took.
async fn flood(mut stream: impl AsyncWriteExt + Unpin) -> usize {
    let piece = vec![0x55; 1 << 20];
    for sent in (0..FLOOD).step_by(piece.len()) {
        if soon("a write", stream.write_all(&piece)).await.is_err() {
            return sent;
        }
    }
    FLOOD
}

#[tokio::test]
async fn a_message_above_eight_mebibytes_is_refused_before_it_is_buffered() {
    let mut federation = federation();
    let mut bank = RawSite::ready(&federation, "bank", "pilot").await;
    let assignment = bank.assignment(1).await;
    let delta = Delta::constant(&assignment, 0.5);
    let before = federation.aggregator().peak_memory_bytes();

    // In a chunk, in the first message, and in a call without a stream.
    let mut upload = bank.begin(&delta.begin).await.expect("an upload begins");
    assert!(upload.held().await.expect("an upload begins").is_empty());
    let stored = federation.stored();
    let chunk = chunk_of(0, vec![0; FLOOD]);
    assert_refused(upload.send_chunk(&chunk).await, Code::OutOfRange, &["too large", "limit"]);
    let begin = DeltaBegin { encoding: "x".repeat(FLOOD), ..delta.begin };
    let mut upload = bank.begin(&begin).await.expect("a call begins");
    assert_refused(upload.held().await, Code::OutOfRange, &["too large", "limit"]);
    let leave = v1::LeaveRequest { session_id: bank.session.clone(), reason: "x".repeat(FLOOD) };
    assert_refused(bank.client.leave(leave).await, Code::OutOfRange, &["too large", "limit"]);

    let growth = federation.aggregator().peak_memory_bytes() - before;
    assert!(growth < GROWTH_MAX, "grew by {growth} bytes");
    assert_eq!(federation.stored(), stored);
    bank.complete_round(1).await;
}

#[tokio::test]
async fn a_probe_ends_at_its_bound_and_is_not_kept() {
    let mut federation = federation();
    let before = federation.aggregator().peak_memory_bytes();
    let mut bank = RawSite::new(&federation, "bank");
    let message = v1::ProbeRequest { data: vec![7; 1 << 20] };
    let messages = std::iter::repeat_n(message, FLOOD >> 20);
    let probe = bank.client.probe(tokio_stream::iter(messages)).await;
    assert_refused(probe, Code::InvalidArgument, &["at most 67108864 bytes"]);
    let growth = federation.aggregator().peak_memory_bytes() - before;
    assert!(growth < GROWTH_MAX, "grew by {growth} bytes");
    assert_serving(&mut federation).await;
}

/// Waits until the other side closes; it may say what it likes before.
async fn closed(mut stream: impl AsyncRead + Unpin) {
    // A reset is as good as an end.
    let _ =
        soon("the silent connection to be cut", tokio::io::copy(&mut stream, &mut tokio::io::sink())).await;
}

#[tokio::test]
async fn a_peer_that_connects_and_says_nothing_is_cut_while_others_go_on() {
    let mut federation = federation();
    let config = client_config(&raw::credentials(&federation.kit("site-bank")));
    let tls = handshake(federation.endpoint(), config).await.expect("a handshake");
    let mut plain = Vec::new();
    for _ in 0..20 {
        plain.push(closed(TcpStream::connect(federation.endpoint()).await.expect("the port is open")));
    }
    let silent = async { tokio::join!(closed(tls), futures::future::join_all(plain)) };
    tokio::join!(silent, assert_serving(&mut federation));
    federation.aggregator().wait_for_output("it did not complete the TLS handshake within 10 s");
    federation.aggregator().wait_for_output("it said nothing for 10 s after the TLS handshake");
}

#[tokio::test]
async fn a_second_daemon_with_the_same_identity_is_refused_and_the_first_is_unharmed() {
    let federation = federation();
    let mut first = RawSite::ready(&federation, "bank", "pilot").await;
    first.assignment(1).await;
    let mut second = RawSite::new(&federation, "bank");
    let words = ["another daemon", "bank", "stop it", "certificate"];
    assert_refused(second.join().await, Code::AlreadyExists, &words);
    // The second knows no session, and guessing does not help.
    second.session = vec![0; 16];
    assert_refused(second.report_ready("pilot").await, Code::Aborted, &["unknown", "join"]);
    let leave = v1::LeaveRequest { session_id: second.session.clone(), reason: String::new() };
    assert_refused(second.client.leave(leave).await, Code::Aborted, &["unknown", "join"]);
    first.attend().await.expect("the first keeps its session");
    first.complete_round(1).await;
}

#[tokio::test]
async fn a_restarted_daemon_takes_its_own_place_at_once() {
    let federation = federation();
    let mut killed = RawSite::ready(&federation, "bank", "pilot").await;
    killed.assignment(1).await;
    let mut restarted = RawSite::new(&federation, "bank");
    restarted.instance = killed.instance;
    restarted.join().await.expect("the same daemon may join again");
    restarted.attend().await.expect("the session is open");
    // The stream of the one that it replaces ends, and its session is worth nothing.
    let stream = killed.instructions.as_mut().expect("it attends");
    while let Some(_instruction) = soon("the old stream's end", stream.message()).await.expect("an end") {}
    assert_refused(killed.report_ready("pilot").await, Code::Aborted, &["unknown", "join"]);
    // It need not say again that it is ready.
    restarted.complete_round(1).await;
}

#[tokio::test]
async fn a_session_of_the_aggregator_before_its_restart_is_unknown() {
    let mut federation = federation();
    let mut bank = RawSite::ready(&federation, "bank", "pilot").await;
    bank.assignment(1).await;
    federation.kill_aggregator();
    federation.start_aggregator();
    // The channel finds out about the broken connection with its first call.
    let refused = loop {
        match bank.report_ready("pilot").await {
            Err(status) if status.code() != Code::Aborted => {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            other => break other,
        }
    };
    assert_refused(refused, Code::Aborted, &["unknown", "join"]);
    bank.get_ready("pilot").await;
    bank.complete_round(1).await;
}

#[tokio::test]
async fn a_client_of_another_protocol_version_is_told_which_to_install() {
    let mut federation = federation();
    let mut bank = RawSite::new(&federation, "bank");
    let request = v1::JoinRequest { protocol_version: 99, ..Default::default() };
    let join = bank.client.join(request).await;
    assert_refused(join, Code::FailedPrecondition, &["protocol version 99", "install the client of version"]);
    assert_serving(&mut federation).await;
}

#[tokio::test]
async fn every_member_may_ask_for_health_and_reflection() {
    use tonic_health::pb::{
        HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient,
    };
    use tonic_reflection::pb::v1::{
        ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
        server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
    };

    let federation = federation();
    for kit in ["site-bank", "operator-alice"] {
        let channel = channel(&federation, &federation.kit(kit));
        for service in ["", "consort.v1.Federation", "consort.v1.Operator"] {
            let request = HealthCheckRequest { service: service.to_owned() };
            let answer = HealthClient::new(channel.clone()).check(request).await.expect("health is told");
            assert_eq!(answer.get_ref().status(), ServingStatus::Serving, "{service:?}");
        }
        let request = ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let request = Request::new(tokio_stream::iter([request]));
        let answers = ServerReflectionClient::new(channel).server_reflection_info(request).await;
        let answer = answers.expect("reflection is there").into_inner().message().await.expect("an answer");
        let Some(MessageResponse::ListServicesResponse(list)) =
            answer.and_then(|answer| answer.message_response)
        else {
            panic!("reflection lists the services");
        };
        let names: Vec<&str> = list.service.iter().map(|service| service.name.as_str()).collect();
        assert!(
            names.contains(&"consort.v1.Federation") && names.contains(&"consort.v1.Operator"),
            "{names:?}"
        );
    }
    RawOperator::new(&federation).run("pilot").await.expect("the operator is served");
}
