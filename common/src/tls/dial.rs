//! Opening connections to an aggregator: resolved, connected, verified, accepted by the other side.

use std::{fmt, io, net::SocketAddr, str::FromStr, time::Duration};

use hyper_util::rt::TokioIo;
use rustls_pki_types::ServerName;
use serde::{Deserialize, Serialize};
use tokio::{
    io::AsyncBufReadExt,
    net::TcpStream,
    time::{error::Elapsed, timeout},
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::transport::{Channel, Endpoint, Uri};

use super::failure::{ConnectError, classify_io, explain, words};
use super::{
    CONNECTION_WINDOW_BYTES, Credentials, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, STREAM_WINDOW_BYTES,
    client_config,
};
use crate::identity::{Federation, Identity, Role};

const RESOLVE_TIMEOUT: Duration = Duration::from_secs(10);
/// For each of a name's addresses; a first address that leads nowhere must not keep us from the second.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(8);
const CONNECT_ADDRESSES_MAX: usize = 4;
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(15);
/// All of the above, for the whole of a dial.
const DIAL_TIMEOUT: Duration = Duration::from_secs(60);

/// Where an aggregator listens: `host:port`, or `https://host:port`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ServerAddress {
    host: String,
    port: u16,
    name: ServerName<'static>,
    uri: Uri,
}

/// Why a text is no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not an aggregator's address: {reason}; expected HOST:PORT, as in aggregator.example.org:7443"
)]
pub struct AddressError {
    /// The text.
    pub text: String,
    /// What is wrong with it.
    pub reason: &'static str,
}

impl ServerAddress {
    /// The host name or IP address (without brackets).
    pub fn host(&self) -> &str {
        &self.host
    }

    /// The TCP port.
    pub fn port(&self) -> u16 {
        self.port
    }
}

impl FromStr for ServerAddress {
    type Err = AddressError;
    fn from_str(text: &str) -> Result<Self, AddressError> {
        let error = |reason| AddressError { text: text.chars().take(160).collect(), reason };
        if text.starts_with("http://") {
            return Err(error("an aggregator speaks TLS only"));
        }
        let authority = text.strip_prefix("https://").unwrap_or(text);
        let authority = authority.strip_suffix('/').unwrap_or(authority);
        let (host, port) = authority.rsplit_once(':').ok_or_else(|| error("the port is missing"))?;
        let port = port
            .parse()
            .ok()
            .filter(|port| *port != 0)
            .ok_or_else(|| error("the port is not a number from 1 to 65535"))?;
        let host = match host.strip_prefix('[').map(|host| host.strip_suffix(']')) {
            Some(Some(address)) => address,
            Some(None) => return Err(error("a bracket is missing")),
            None if host.contains(':') => return Err(error("write an IPv6 address in brackets")),
            None => host,
        };
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| error("the host is neither a name nor an IP address"))?;
        let uri = format!("https://{}:{port}/", bracketed(host))
            .parse()
            .map_err(|_| error("the host is neither a name nor an IP address"))?;
        Ok(Self { host: host.to_owned(), port, name, uri })
    }
}

fn bracketed(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

impl fmt::Display for ServerAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", bracketed(&self.host), self.port)
    }
}

impl TryFrom<String> for ServerAddress {
    type Error = AddressError;
    fn try_from(text: String) -> Result<Self, AddressError> {
        text.parse()
    }
}

impl From<ServerAddress> for String {
    fn from(address: ServerAddress) -> String {
        address.to_string()
    }
}

/// Opens a connection that is ready for HTTP/2: TCP, TLS 1.3, the server's name and CA verified, its
/// identity that of an aggregator of our federation, our own certificate accepted.
pub async fn dial(
    address: &ServerAddress,
    credentials: &Credentials,
) -> Result<TlsStream<TcpStream>, ConnectError> {
    let silent = |_: Elapsed| ConnectError::Silent { address: address.to_string() };
    timeout(DIAL_TIMEOUT, async {
        let tcp = connect(address).await?;
        let mut stream =
            timeout(HANDSHAKE_TIMEOUT, handshake(tcp, address, credentials)).await.map_err(silent)??;
        check_server(&stream, address, credentials.federation())?;
        timeout(HANDSHAKE_TIMEOUT, first_bytes(&mut stream, address)).await.map_err(silent)??;
        Ok(stream)
    })
    .await
    .map_err(silent)?
}

async fn connect(address: &ServerAddress) -> Result<TcpStream, ConnectError> {
    let mut error: Option<io::Error> = None;
    for candidate in resolve(address).await?.into_iter().take(CONNECT_ADDRESSES_MAX) {
        let attempt = async {
            let tcp = TcpStream::connect(candidate).await?;
            // Messages are written whole; waiting for more to send only adds latency.
            tcp.set_nodelay(true)?;
            Ok(tcp)
        };
        match timeout(CONNECT_TIMEOUT, attempt).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
        {
            Ok(tcp) => return Ok(tcp),
            // The first failure is of the address that the system prefers: the one to report.
            Err(failure) => error = error.or(Some(failure)),
        }
    }
    let error = error.unwrap_or_else(|| io::ErrorKind::AddrNotAvailable.into());
    Err(ConnectError::Connect { address: address.to_string(), reason: error.to_string(), kind: error.kind() })
}

async fn resolve(address: &ServerAddress) -> Result<Vec<SocketAddr>, ConnectError> {
    let error = |reason: String| ConnectError::Resolve { host: address.host.clone(), reason };
    let addresses: Vec<_> =
        timeout(RESOLVE_TIMEOUT, tokio::net::lookup_host((address.host.as_str(), address.port)))
            .await
            .map_err(|_| error(format!("no answer within {} s", RESOLVE_TIMEOUT.as_secs())))?
            .map_err(|reason| error(reason.to_string()))?
            .collect();
    if addresses.is_empty() { Err(error("it has none".to_owned())) } else { Ok(addresses) }
}

async fn handshake(
    tcp: TcpStream,
    address: &ServerAddress,
    credentials: &Credentials,
) -> Result<TlsStream<TcpStream>, ConnectError> {
    TlsConnector::from(client_config(credentials))
        .connect(address.name.clone(), tcp)
        .await
        .map_err(|error| classify_io(&error, &address.to_string()))
}

fn check_server(
    stream: &TlsStream<TcpStream>,
    address: &ServerAddress,
    ours: &Federation,
) -> Result<(), ConnectError> {
    let not_an_aggregator = |found| ConnectError::NotAnAggregator { address: address.to_string(), found };
    let certificate = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(|chain| chain.first())
        .ok_or_else(|| not_an_aggregator("it has no certificate".to_owned()))?;
    let identity =
        Identity::from_certificate(certificate).map_err(|error| not_an_aggregator(error.to_string()))?;
    if identity.role != Role::Aggregator {
        return Err(not_an_aggregator(format!("its certificate is {identity}'s")));
    }
    if identity.federation != *ours {
        return Err(ConnectError::OtherFederation {
            address: address.to_string(),
            ours: ours.clone(),
            theirs: identity.federation,
        });
    }
    Ok(())
}

/// In TLS 1.3 a client's handshake ends before the server has seen the client's certificate; a refusal is
/// the first thing that can be read afterwards. An HTTP/2 server sends its SETTINGS unasked, so that
/// waiting for the first bytes, without taking them, tells the two apart at the cost of half a round trip.
async fn first_bytes(stream: &mut TlsStream<TcpStream>, address: &ServerAddress) -> Result<(), ConnectError> {
    match stream.fill_buf().await {
        Ok([]) => {
            Err(ConnectError::Closed { address: address.to_string(), reason: "end of stream".to_owned() })
        }
        Ok(_) => Ok(()),
        Err(error) => Err(classify_io(&error, &address.to_string())),
    }
}

/// A channel to the aggregator, connected. It reconnects by itself when a later call finds it broken.
pub async fn connect_channel(
    address: &ServerAddress,
    credentials: &Credentials,
) -> Result<Channel, ConnectError> {
    endpoint(address).connect_with_connector(connector(address, credentials)).await.map_err(|error| {
        explain(&error)
            .unwrap_or_else(|| ConnectError::Tls { address: address.to_string(), reason: words(&error) })
    })
}

/// A channel to the aggregator that connects with its first call; a failure is that call's, as
/// `UNAVAILABLE`, and [`explain`] gives the reason.
pub fn connect_channel_lazy(address: &ServerAddress, credentials: &Credentials) -> Channel {
    endpoint(address).connect_with_connector_lazy(connector(address, credentials))
}

fn endpoint(address: &ServerAddress) -> Endpoint {
    Endpoint::from(address.uri.clone())
        .connect_timeout(DIAL_TIMEOUT)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
}

fn connector(
    address: &ServerAddress,
    credentials: &Credentials,
) -> impl tower::Service<
    Uri,
    Response = TokioIo<TlsStream<TcpStream>>,
    Error = ConnectError,
    Future = impl Future<Output = Result<TokioIo<TlsStream<TcpStream>>, ConnectError>> + Send + use<>,
> + Send
+ use<> {
    let (address, credentials) = (address.clone(), credentials.clone());
    tower::service_fn(move |_: Uri| {
        let (address, credentials) = (address.clone(), credentials.clone());
        async move { dial(&address, &credentials).await.map(TokioIo::new) }
    })
}
