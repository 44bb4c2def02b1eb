//! Real handshakes over loopback, each of the ways in which one fails included.

use std::net::{IpAddr, Ipv4Addr};

use consort_proto::v1::{ReportReadyRequest, federation_client::FederationClient};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    SanType,
};
use rustls::SupportedProtocolVersion;
use tempfile::TempDir;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use tokio_stream::StreamExt;
use tonic::transport::server::Connected;

use super::*;

const SITE: &str = "consort://acme/site/paris";
const AGGREGATOR: &str = "consort://acme/aggregator/main";
const FOR_CLIENTS: &[ExtendedKeyUsagePurpose] = &[ExtendedKeyUsagePurpose::ClientAuth];
const FOR_SERVERS: &[ExtendedKeyUsagePurpose] =
    &[ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// A federation's CA.
struct Ca(CertifiedIssuer<'static, KeyPair>);

impl Ca {
    fn new(name: &str) -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn pem(&self) -> String {
        self.0.pem()
    }
}

/// A member's certificate, before it is issued.
struct Member {
    uri: &'static str,
    host: Option<IpAddr>,
    usages: &'static [ExtendedKeyUsagePurpose],
    last_year: i32,
}

impl Member {
    fn site() -> Self {
        Self { uri: SITE, host: None, usages: FOR_CLIENTS, last_year: 2100 }
    }

    fn aggregator() -> Self {
        Self { uri: AGGREGATOR, host: Some(LOOPBACK), usages: FOR_SERVERS, last_year: 2100 }
    }

    /// Certificate and key, PEM.
    fn issue(&self, ca: &Ca) -> (String, String) {
        let mut params = CertificateParams::default();
        params.subject_alt_names = vec![SanType::URI(self.uri.try_into().unwrap())];
        params.subject_alt_names.extend(self.host.map(SanType::IpAddress));
        params.extended_key_usages = self.usages.to_vec();
        params.not_before = rcgen::date_time_ymd(2000, 1, 1);
        params.not_after = rcgen::date_time_ymd(self.last_year, 1, 1);
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &ca.0).unwrap().pem(), key.serialize_pem())
    }

    /// Credentials issued by `ca` whose holder believes `believed`.
    fn credentials(&self, ca: &Ca, believed: &Ca) -> Credentials {
        let (certificate, key) = self.issue(ca);
        let kit = Kit::write(&certificate, &key, &believed.pem());
        Credentials::load(&kit.files).unwrap()
    }
}

struct Kit {
    _folder: TempDir,
    files: CredentialFiles,
}

impl Kit {
    fn write(certificate: &str, key: &str, ca: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let files =
            CredentialFiles { certificate: "cert.pem".into(), key: "key.pem".into(), ca: "ca.pem".into() }
                .relative_to(folder.path());
        std::fs::write(&files.certificate, certificate).unwrap();
        std::fs::write(&files.key, key).unwrap();
        std::fs::write(&files.ca, ca).unwrap();
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            std::fs::set_permissions(&files.key, std::fs::Permissions::from_mode(0o600)).unwrap();
        }
        Self { _folder: folder, files }
    }
}

/// A gRPC server without services: whatever gets through to it is answered UNIMPLEMENTED.
struct Server {
    address: ServerAddress,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn listen() -> (TcpListener, ServerAddress) {
    let listener = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
    let address = listener.local_addr().unwrap().to_string().parse().unwrap();
    (listener, address)
}

async fn serve(credentials: &Credentials, limits: IncomingLimits) -> Server {
    let (listener, address) = listen().await;
    let connections = incoming(listener, server_config(credentials), limits);
    let task = tokio::spawn(async move {
        tonic::transport::Server::builder()
            .add_routes(tonic::service::Routes::default())
            .serve_with_incoming(connections)
            .await
            .unwrap();
    });
    Server { address, task }
}

async fn outcome(server: &Credentials, client: &Credentials) -> Result<(), ConnectError> {
    let server = serve(server, IncomingLimits::default()).await;
    let dialled = dial(&server.address, client).await.map(drop);
    // The channel tells the same, connected at once or with the first call.
    let connected = connect_channel(&server.address, client).await;
    assert_eq!(connected.as_ref().err(), dialled.as_ref().err());
    let lazy = connect_channel_lazy(&server.address, client);
    let status = FederationClient::new(lazy).report_ready(ReportReadyRequest::default()).await.unwrap_err();
    assert_eq!(explain(&status).as_ref(), dialled.as_ref().err(), "{status:?}");
    let expected = if dialled.is_ok() { tonic::Code::Unimplemented } else { tonic::Code::Unavailable };
    assert_eq!(status.code(), expected, "{status:?}");
    dialled
}

/// What a client with these rustls settings meets.
async fn raw_outcome(server: &Credentials, config: ClientConfig) -> ConnectError {
    let server = serve(server, IncomingLimits::default()).await;
    let tcp = TcpStream::connect((server.address.host(), server.address.port())).await.unwrap();
    let connected = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(LOOPBACK.into(), tcp).await;
    let error = match connected {
        Ok(mut stream) => stream.fill_buf().await.map(<[u8]>::len).unwrap_err(),
        Err(error) => error,
    };
    explain(&error).unwrap_or_else(|| panic!("{error:?} is not explained"))
}

fn raw_config(
    ca: &Ca,
    version: &'static SupportedProtocolVersion,
) -> rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert> {
    let mut roots = RootCertStore::empty();
    roots.add(ca.0.der().clone()).unwrap();
    ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots)
}

#[tokio::test]
async fn a_site_reaches_its_aggregator() {
    let ca = Ca::new("acme");
    let aggregator = Member::aggregator().credentials(&ca, &ca);
    let site = Member::site().credentials(&ca, &ca);
    assert_eq!(site.warnings(), [""; 0]);
    assert_eq!(aggregator.warnings(), [""; 0]);
    assert_eq!(outcome(&aggregator, &site).await, Ok(()));
}

#[tokio::test]
async fn the_server_learns_who_calls() {
    let ca = Ca::new("acme");
    let (listener, address) = listen().await;
    let aggregator = Member::aggregator().credentials(&ca, &ca);
    let mut connections = Box::pin(incoming(listener, server_config(&aggregator), IncomingLimits::default()));
    let site = Member::site().credentials(&ca, &ca);
    let client = tokio::spawn(async move { dial(&address, &site).await });
    let mut connection = connections.next().await.unwrap().unwrap();
    assert_eq!(peer_identity(&connection.connect_info()).unwrap().to_string(), SITE);
    let (_, session) = connection.tls.get_ref();
    assert_eq!(session.protocol_version(), Some(rustls::ProtocolVersion::TLSv1_3));
    assert_eq!(session.alpn_protocol(), Some(b"h2".as_slice()));
    connection.write_all(b"settings").await.unwrap();
    connection.flush().await.unwrap();
    // What `dial` waited for is still there to be read.
    let mut received = [0; 8];
    client.await.unwrap().unwrap().read_exact(&mut received).await.unwrap();
    assert_eq!(&received, b"settings");
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused() {
    let ca = Ca::new("acme");
    let mut config = raw_config(&ca, &rustls::version::TLS13).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let error = raw_outcome(&Member::aggregator().credentials(&ca, &ca), config).await;
    assert_eq!(error, ConnectError::ClientCertificateRefused(Refusal::Missing));
}

#[tokio::test]
async fn tls_1_2_is_refused_by_the_server() {
    let ca = Ca::new("acme");
    let mut config = raw_config(&ca, &rustls::version::TLS12).with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let error = raw_outcome(&Member::aggregator().credentials(&ca, &ca), config).await;
    assert!(matches!(error, ConnectError::TlsVersion { .. }), "{error:?}");
}

#[tokio::test]
async fn tls_1_2_is_refused_by_the_client() {
    let ca = Ca::new("acme");
    let (certificate, key) = Member::aggregator().issue(&ca);
    let config = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()],
            PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
        )
        .unwrap();
    let (listener, address) = listen().await;
    let _connections = incoming(listener, Arc::new(config), IncomingLimits::default());
    let error = dial(&address, &Member::site().credentials(&ca, &ca)).await.unwrap_err();
    assert!(matches!(error, ConnectError::TlsVersion { .. }), "{error:?}");
}

#[tokio::test]
async fn a_client_of_another_ca_is_refused() {
    let ca = Ca::new("acme");
    let aggregator = Member::aggregator().credentials(&ca, &ca);
    // Also when the other CA has taken the name of ours.
    for other in [Ca::new("other"), Ca::new("acme")] {
        let site = Member::site().credentials(&other, &ca);
        assert!(site.warnings()[0].contains("does not stem from the CA"), "{:?}", site.warnings());
        assert_eq!(
            outcome(&aggregator, &site).await,
            Err(ConnectError::ClientCertificateRefused(Refusal::OtherCa))
        );
    }
}

#[tokio::test]
async fn an_expired_client_is_refused() {
    let ca = Ca::new("acme");
    let site = Member { last_year: 2001, ..Member::site() }.credentials(&ca, &ca);
    assert!(site.warnings()[0].contains("expired"), "{:?}", site.warnings());
    assert_eq!(site.warnings().len(), 1);
    assert_eq!(
        outcome(&Member::aggregator().credentials(&ca, &ca), &site).await,
        Err(ConnectError::ClientCertificateRefused(Refusal::Expired))
    );
}

#[tokio::test]
async fn a_client_with_a_certificate_for_servers_only_is_refused() {
    let ca = Ca::new("acme");
    let site =
        Member { usages: &[ExtendedKeyUsagePurpose::ServerAuth], ..Member::site() }.credentials(&ca, &ca);
    assert_eq!(
        outcome(&Member::aggregator().credentials(&ca, &ca), &site).await,
        Err(ConnectError::ClientCertificateRefused(Refusal::Unacceptable))
    );
}

#[tokio::test]
async fn a_server_of_another_ca_is_refused() {
    let ca = Ca::new("acme");
    let site = Member::site().credentials(&ca, &ca);
    for other in [Ca::new("other"), Ca::new("acme")] {
        let error = outcome(&Member::aggregator().credentials(&other, &other), &site).await.unwrap_err();
        assert!(matches!(error, ConnectError::WrongCa { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn a_server_with_another_name_is_refused() {
    let ca = Ca::new("acme");
    let site = Member::site().credentials(&ca, &ca);
    let aggregator =
        Member { host: Some([10, 1, 2, 3].into()), ..Member::aggregator() }.credentials(&ca, &ca);
    let error = outcome(&aggregator, &site).await.unwrap_err();
    let ConnectError::WrongName { expected, presented, .. } = &error else { panic!("{error:?}") };
    assert_eq!(expected, "127.0.0.1");
    assert_eq!(presented, "10.1.2.3", "{error}");
}

#[tokio::test]
async fn an_expired_server_is_refused() {
    let ca = Ca::new("acme");
    let site = Member::site().credentials(&ca, &ca);
    let aggregator = Member { last_year: 2001, ..Member::aggregator() }.credentials(&ca, &ca);
    let error = dial(&serve(&aggregator, IncomingLimits::default()).await.address, &site).await.unwrap_err();
    assert!(matches!(error, ConnectError::ServerCertificateExpired { .. }), "{error:?}");
}

#[tokio::test]
async fn a_site_that_poses_as_the_aggregator_is_refused() {
    let ca = Ca::new("acme");
    let victim = Member { uri: "consort://acme/site/rome", ..Member::site() }.credentials(&ca, &ca);
    // As issued by `consort pki`, and with a certificate that a careless CA made fit for servers.
    for usages in [FOR_CLIENTS, FOR_SERVERS] {
        let impostor = Member { host: Some(LOOPBACK), usages, ..Member::site() }.credentials(&ca, &ca);
        let error = outcome(&impostor, &victim).await.unwrap_err();
        assert!(matches!(error, ConnectError::NotAnAggregator { .. }), "{error:?}");
    }
    let anonymous = Member { uri: "https://acme.example.org", ..Member::aggregator() };
    let (certificate, key) = anonymous.issue(&ca);
    let kit = Kit::write(&certificate, &key, &ca.pem());
    assert!(
        Credentials::load(&kit.files).unwrap_err().to_string().contains("names no member of a federation")
    );
}

#[tokio::test]
async fn the_aggregator_of_another_federation_is_refused() {
    let ca = Ca::new("acme");
    let aggregator =
        Member { uri: "consort://emca/aggregator/main", ..Member::aggregator() }.credentials(&ca, &ca);
    let error = outcome(&aggregator, &Member::site().credentials(&ca, &ca)).await.unwrap_err();
    let ConnectError::OtherFederation { ours, theirs, .. } = &error else { panic!("{error:?}") };
    assert_eq!((ours.as_str(), theirs.as_str()), ("acme", "emca"));
}

#[tokio::test]
async fn what_is_not_tls_at_all_is_told() {
    let ca = Ca::new("acme");
    let site = Member::site().credentials(&ca, &ca);
    let (listener, address) = listen().await;
    let server = tokio::spawn(async move {
        let (mut tcp, _) = listener.accept().await.unwrap();
        tcp.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        let _ = tcp.read(&mut [0; 4096]).await;
        let (tcp, _) = listener.accept().await.unwrap();
        drop(tcp);
    });
    let error = dial(&address, &site).await.unwrap_err();
    assert!(matches!(error, ConnectError::NotTls { .. }), "{error:?}");
    let error = dial(&address, &site).await.unwrap_err();
    assert!(matches!(error, ConnectError::Closed { .. }), "{error:?}");
    server.await.unwrap();
    let error = dial(&address, &site).await.unwrap_err();
    assert!(
        matches!(error, ConnectError::Connect { kind: io::ErrorKind::ConnectionRefused, .. }),
        "{error:?}"
    );
    let nowhere = "aggregator.invalid:7443".parse().unwrap();
    let error = dial(&nowhere, &site).await.unwrap_err();
    assert!(matches!(error, ConnectError::Resolve { .. }), "{error:?}");
}

#[tokio::test]
async fn silent_and_babbling_peers_are_cut_and_stop_nobody() {
    let ca = Ca::new("acme");
    let limits = IncomingLimits { handshakes_max: 4, handshake_timeout: Duration::from_secs(1) };
    let server = serve(&Member::aggregator().credentials(&ca, &ca), limits).await;
    let site = Member::site().credentials(&ca, &ca);
    let socket = (server.address.host().to_owned(), server.address.port());
    let mut silent = Vec::new();
    // More than there is room for at a time.
    for _ in 0..8 {
        silent.push(TcpStream::connect(socket.clone()).await.unwrap());
    }
    let mut babbling = TcpStream::connect(socket).await.unwrap();
    babbling.write_all(&[b'x'; 5000]).await.unwrap();
    assert_eq!(dial(&server.address, &site).await.map(drop), Ok(()));
    for mut tcp in silent {
        let mut rest = Vec::new();
        let _ = tokio::time::timeout(Duration::from_secs(20), tcp.read_to_end(&mut rest)).await.expect("cut");
    }
}

#[tokio::test]
async fn a_peer_that_is_silent_after_its_handshake_is_cut_and_one_that_spoke_is_not() {
    let ca = Ca::new("acme");
    let limits = IncomingLimits { handshakes_max: 4, handshake_timeout: Duration::from_secs(1) };
    let server = serve(&Member::aggregator().credentials(&ca, &ca), limits).await;
    let site = Member::site().credentials(&ca, &ca);
    let mut spoke = dial(&server.address, &site).await.unwrap();
    spoke.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    // All that counts as speaking is the whole of that.
    let mut hesitating = dial(&server.address, &site).await.unwrap();
    hesitating.write_all(b"PRI * HTTP/2.0").await.unwrap();
    let mut silent = dial(&server.address, &site).await.unwrap();
    for stream in [&mut silent, &mut hesitating] {
        let mut rest = Vec::new();
        let _ =
            tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut rest)).await.expect("cut");
    }
    // An empty SETTINGS frame, which is answered with one that acknowledges it.
    spoke.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
    let acknowledgement = [0, 0, 0, 4, 1, 0, 0, 0, 0];
    let mut received = Vec::new();
    while !received.ends_with(&acknowledgement) {
        received.push(spoke.read_u8().await.unwrap());
    }
}

#[tokio::test]
async fn dropping_the_stream_of_connections_closes_the_listener() {
    let ca = Ca::new("acme");
    let (listener, address) = listen().await;
    drop(incoming(
        listener,
        server_config(&Member::aggregator().credentials(&ca, &ca)),
        IncomingLimits::default(),
    ));
    for _ in 0..100 {
        if TcpStream::connect((address.host(), address.port())).await.is_err() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{address} still listens");
}

#[test]
fn errors_of_credentials_name_the_file_and_the_remedy() {
    let ca = Ca::new("acme");
    let (certificate, key) = Member::site().issue(&ca);
    let (_, other_key) = Member::site().issue(&ca);
    let check = |certificate: &str, key: &str, ca: &str, expected: &[&str]| {
        let kit = Kit::write(certificate, key, ca);
        let error = Credentials::load(&kit.files).unwrap_err().to_string();
        for part in expected {
            assert!(error.contains(part), "{error:?} lacks {part:?}");
        }
    };
    check("", &key, &ca.pem(), &["cert.pem", "BEGIN CERTIFICATE", "kit"]);
    check(&certificate, &certificate, &ca.pem(), &["key.pem", "BEGIN PRIVATE KEY", "kit"]);
    check(&certificate, &key, &key, &["ca.pem", "BEGIN CERTIFICATE"]);
    check(&certificate, &other_key, &ca.pem(), &["cert.pem", "key.pem", "same kit"]);
    check(&certificate, &key, "-----BEGIN CERTIFICATE-----\nnonsense", &["ca.pem", "not PEM"]);
    check(&"x".repeat(2 << 20), &key, &ca.pem(), &["cert.pem", "larger than"]);

    let kit = Kit::write(&certificate, &key, &ca.pem());
    std::fs::remove_file(&kit.files.key).unwrap();
    let error = Credentials::load(&kit.files).unwrap_err().to_string();
    assert!(error.contains("key.pem") && error.contains("[tls]"), "{error}");
}

#[test]
fn credentials_of_another_role_are_refused() {
    let ca = Ca::new("acme");
    let error = Member::site().credentials(&ca, &ca).require_role(Role::Aggregator).unwrap_err().to_string();
    assert!(error.contains(SITE) && error.contains("consort pki issue aggregator"), "{error}");
    assert!(Member::site().credentials(&ca, &ca).require_role(Role::Site).is_ok());
}

#[cfg(unix)]
#[test]
fn a_key_that_others_can_read_is_warned_about() {
    use std::os::unix::fs::PermissionsExt;
    let ca = Ca::new("acme");
    let (certificate, key) = Member::site().issue(&ca);
    let kit = Kit::write(&certificate, &key, &ca.pem());
    std::fs::set_permissions(&kit.files.key, std::fs::Permissions::from_mode(0o640)).unwrap();
    let credentials = Credentials::load(&kit.files).unwrap();
    assert!(credentials.warnings()[0].contains("chmod 600"), "{:?}", credentials.warnings());
}

#[test]
fn the_key_is_not_in_the_debug_output() {
    let ca = Ca::new("acme");
    let text = format!("{:?}", Member::site().credentials(&ca, &ca));
    assert!(text.len() < 300, "{text}");
}

#[test]
fn addresses_are_read_in_both_forms() {
    let check = |text: &str, expected: &str| {
        let outcome = match text.parse::<ServerAddress>() {
            Ok(address) => address.to_string(),
            Err(error) => error.to_string(),
        };
        assert!(outcome.contains(expected), "{text:?} gave {outcome:?}");
    };
    check("aggregator.example.org:7443", "aggregator.example.org:7443");
    check("https://aggregator.example.org:7443", "aggregator.example.org:7443");
    check("https://aggregator.example.org:7443/", "aggregator.example.org:7443");
    check("10.0.0.1:1", "10.0.0.1:1");
    check("[::1]:7443", "[::1]:7443");
    check("http://aggregator:7443", "speaks TLS only");
    check("aggregator", "port is missing");
    check("aggregator:", "not a number");
    check("aggregator:0", "not a number");
    check("aggregator:70000", "not a number");
    check("::1:7443", "brackets");
    check("[::1:7443", "bracket is missing");
    check(":7443", "neither a name nor an IP address");
    check("aggre gator:7443", "neither a name nor an IP address");
    check("user@aggregator:7443", "neither a name nor an IP address");
    check("aggregator/path:7443", "neither a name nor an IP address");
    check("", "port is missing");
}

proptest::proptest! {
    #[test]
    fn any_text_is_an_address_that_is_read_again_or_refused(
        text in "(https://)?(\\PC{0,20}|[a-z0-9.-]{0,20}|\\[[0-9a-f:.]{0,20}\\]?)(:[0-9]{0,7})?/?",
    ) {
        if let Ok(address) = text.parse::<ServerAddress>() {
            proptest::prop_assert!(address.port() > 0);
            proptest::prop_assert_eq!(address.to_string().parse::<ServerAddress>(), Ok(address));
        }
    }
}
