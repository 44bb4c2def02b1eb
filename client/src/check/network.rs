//! What needs the network: name, port, TLS, and what the aggregator says of us.

use std::time::{Duration, Instant};

use consort_common::{
    spec::RunSpec,
    tls::{Credentials, ServerAddress, connect_channel, dial},
    units::{self, UnixMs, unix_ms_now},
};
use consort_proto::{
    PROTOCOL_VERSION,
    v1::{ProbeRequest, ProbeResponse, federation_client::FederationClient},
};
use tonic::{Code, Request, Status, transport::Channel};

use super::{Finding, failed, passed, warning};
use crate::{
    link::describe,
    session::{clock_skew_ms, federation_client},
};

const NAME_TIMEOUT: Duration = Duration::from_secs(10);
const PORT_TIMEOUT: Duration = Duration::from_secs(8);
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// The upload may take this long: at 0.5 Mbit/s.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(180);
/// Of that, sent in messages of 1 MiB.
const UPLOAD_MESSAGES: usize = 8;
const MESSAGE_BYTES: usize = 1 << 20;
/// A difference between the clocks that is worth a warning, and one with which certificates begin to fail.
const CLOCK_WARNING_MS: u64 = 60_000;
const CLOCK_FAILURE_MS: u64 = 300_000;

pub(super) async fn name(endpoint: &ServerAddress) -> Finding {
    let host = endpoint.host();
    let advice = "check the endpoint's spelling and this machine's DNS";
    let lookup = tokio::net::lookup_host((host, endpoint.port()));
    match tokio::time::timeout(NAME_TIMEOUT, lookup).await {
        Err(_) => failed(format!("no answer about {host} within {} s; {advice}", NAME_TIMEOUT.as_secs())),
        Ok(Err(error)) => failed(format!("cannot find the address of {host}: {error}; {advice}")),
        Ok(Ok(addresses)) => {
            let addresses: Vec<String> = addresses.map(|address| address.ip().to_string()).collect();
            if addresses.is_empty() {
                failed(format!("{host} has no address; {advice}"))
            } else {
                passed(format!("{host} is {}", addresses.join(", ")))
            }
        }
    }
}

pub(super) async fn port(endpoint: &ServerAddress) -> Finding {
    let connect = tokio::net::TcpStream::connect((endpoint.host(), endpoint.port()));
    let began = Instant::now();
    match tokio::time::timeout(PORT_TIMEOUT, connect).await {
        Ok(Ok(_)) => passed(format!("{endpoint} answers after {} ms", began.elapsed().as_millis())),
        Ok(Err(error)) => failed(format!(
            "cannot connect to {endpoint}: {error}; is the aggregator running, is the port right, and may this \
             machine open outbound connections to it?"
        )),
        Err(_) => failed(format!(
            "{endpoint} does not answer within {} s: most often a firewall drops the packets; allow outbound TCP to it",
            PORT_TIMEOUT.as_secs()
        )),
    }
}

pub(super) async fn tls(endpoint: &ServerAddress, credentials: &Credentials) -> Finding {
    match dial(endpoint, credentials).await {
        Ok(_) => passed("TLS 1.3; both sides accept the other's certificate"),
        Err(error) => failed(error.to_string()),
    }
}

/// What the aggregator answers.
pub(super) struct Probe {
    client: FederationClient<Channel>,
    answer: ProbeResponse,
    /// Our clock in the middle of the call.
    asked_unix_ms: UnixMs,
}

impl Probe {
    pub(super) async fn open(endpoint: &ServerAddress, credentials: &Credentials) -> Result<Self, Finding> {
        let channel =
            connect_channel(endpoint, credentials).await.map_err(|error| failed(error.to_string()))?;
        let mut client = federation_client(channel);
        let before = unix_ms_now();
        let answer = probe(&mut client, 0, CALL_TIMEOUT).await.map_err(|status| refusal(&status))?;
        Ok(Self { client, answer, asked_unix_ms: before.midpoint(unix_ms_now()) })
    }

    pub(super) fn identity(&self) -> Finding {
        passed(format!("the aggregator knows this site as {}", self.answer.identity))
    }

    pub(super) fn protocol(&self) -> Finding {
        protocol(self.answer.protocol_version)
    }

    pub(super) fn clock(&self) -> Finding {
        clock(clock_skew_ms(self.asked_unix_ms, self.answer.server_time_unix_ms))
    }

    pub(super) async fn upload(&mut self) -> Finding {
        let began = Instant::now();
        let sent = (UPLOAD_MESSAGES * MESSAGE_BYTES) as u64;
        match probe(&mut self.client, UPLOAD_MESSAGES, UPLOAD_TIMEOUT).await {
            Ok(answer) if answer.bytes_received == sent => {
                #[allow(clippy::cast_precision_loss)]
                let bytes_per_second = sent as f64 / began.elapsed().as_secs_f64().max(1e-9);
                #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
                let speed = units::bytes(bytes_per_second as u64);
                passed(format!("{} in {:.1} s: {speed}/s", units::bytes(sent), began.elapsed().as_secs_f64()))
            }
            Ok(answer) => failed(format!(
                "sent {sent} bytes, {} arrived: something on the way changes the stream; look for a proxy",
                answer.bytes_received
            )),
            Err(status) => failed(format!(
                "uploading {} failed: {}; look for a proxy or a firewall that limits the size or time of a connection",
                units::bytes(sent),
                describe(&status)
            )),
        }
    }

    pub(super) fn active_run(&self) -> (Finding, Option<RunSpec>) {
        let toml = &self.answer.active_spec_toml;
        if toml.is_empty() {
            return (passed("no run is active; disk and memory are not compared with one"), None);
        }
        match RunSpec::parse(toml) {
            Ok(spec) => {
                let parameters = units::count(spec.model.manifest().parameters());
                (
                    passed(format!("{}: {} with {parameters} parameters", spec.name, spec.model.name())),
                    Some(spec),
                )
            }
            Err(error) => (failed(format!("this version cannot take part in the active run: {error}")), None),
        }
    }
}

async fn probe(
    client: &mut FederationClient<Channel>,
    messages: usize,
    timeout: Duration,
) -> Result<ProbeResponse, Status> {
    // Bytes that do not compress, so that a proxy which compresses does not flatter the figure.
    let data: Vec<u8> =
        (0..MESSAGE_BYTES as u64 / 32).flat_map(|n| *blake3::hash(&n.to_le_bytes()).as_bytes()).collect();
    let messages = std::iter::repeat_with(move || ProbeRequest { data: data.clone() }).take(messages);
    let call = client.probe(Request::new(tokio_stream::iter(messages)));
    match tokio::time::timeout(timeout, call).await {
        Ok(answer) => answer.map(tonic::Response::into_inner),
        Err(_) => Err(Status::deadline_exceeded(format!("no answer within {} s", timeout.as_secs()))),
    }
}

fn refusal(status: &Status) -> Finding {
    let reason = describe(status);
    failed(match status.code() {
        Code::PermissionDenied => format!(
            "the aggregator accepts the certificate but not its role or name: {reason}; use the kit of a site, or ask \
             the federation's operator"
        ),
        Code::Unauthenticated => {
            format!(
                "the aggregator does not recognise this site: {reason}; ask the federation's operator for a new kit"
            )
        }
        Code::Unimplemented => {
            format!(
                "the aggregator does not know this call ({reason}): install the same version of Consort on both sides"
            )
        }
        _ => format!("the aggregator does not answer: {reason}"),
    })
}

fn protocol(theirs: u32) -> Finding {
    if theirs == PROTOCOL_VERSION {
        return passed(format!("version {theirs} on both sides"));
    }
    let older = if theirs > PROTOCOL_VERSION { "consort-client" } else { "the aggregator" };
    failed(format!("version {PROTOCOL_VERSION} here, {theirs} at the aggregator: update {older}"))
}

fn clock(skew_ms: u64) -> Finding {
    let differ =
        format!("this machine's clock and the aggregator's differ by {}", units::duration_ms(skew_ms));
    let advice = "check that both keep time by NTP";
    match skew_ms {
        CLOCK_FAILURE_MS.. => failed(format!("{differ}, so that certificates will fail; {advice}")),
        CLOCK_WARNING_MS.. => warning(format!("{differ}; {advice}")),
        _ => passed(differ),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Outcome, *};

    #[test]
    fn clocks_may_differ_by_a_minute_and_must_not_by_five() {
        for (skew_ms, expected) in [
            (0, Outcome::Passed),
            (59_999, Outcome::Passed),
            (60_000, Outcome::Warning),
            (299_999, Outcome::Warning),
            (300_000, Outcome::Failed),
        ] {
            assert_eq!(clock(skew_ms).0, expected, "{skew_ms}");
        }
    }

    #[test]
    fn another_protocol_version_names_the_side_to_update() {
        assert_eq!(protocol(PROTOCOL_VERSION).0, Outcome::Passed);
        let (outcome, detail) = protocol(PROTOCOL_VERSION + 1);
        assert_eq!(outcome, Outcome::Failed);
        assert!(detail.contains("update consort-client"), "{detail}");
    }

    #[test]
    fn a_refused_role_is_told_from_an_unknown_site() {
        assert!(refusal(&Status::permission_denied("operator")).1.contains("role or name"));
        assert!(refusal(&Status::unauthenticated("none")).1.contains("does not recognise"));
    }

    #[tokio::test]
    async fn a_port_where_nothing_listens_is_a_failure() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint: ServerAddress = listener.local_addr().unwrap().to_string().parse().unwrap();
        assert_eq!(port(&endpoint).await.0, Outcome::Passed);
        drop(listener);
        assert_eq!(port(&endpoint).await.0, Outcome::Failed);
    }

    #[tokio::test]
    async fn a_name_without_address_is_a_failure() {
        let endpoint: ServerAddress = "no-such-host.invalid:1".parse().unwrap();
        assert_eq!(name(&endpoint).await.0, Outcome::Failed);
    }
}
