//! Accepting connections for a server: handshakes run side by side, bounded in number and in time, and a
//! failed one is a line in the log and nothing else.

use std::{io, net::SocketAddr, sync::Arc, time::Duration};

use rustls::{AlertDescription, CertificateError, ServerConfig};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, mpsc},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::{Stream, wrappers::ReceiverStream};
use tonic::transport::server::Connected;

use super::Connection;
use crate::identity::{Identity, IdentityError};

/// Connections that are set up and wait for the server to take them.
const READY_MAX: usize = 64;
/// Pause after the system could not accept (usually: too many open files).
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);
/// How long, and for how many bytes, a refused peer is listened to, so that it gets to read why.
const FAREWELL: Duration = Duration::from_secs(2);
const FAREWELL_BYTES_MAX: u64 = 64 << 10;

/// What tonic puts into a request's extensions about its connection (its `TlsConnectInfo`, which it names
/// only for servers that use its own TLS).
pub type PeerInfo = <TlsStream<TcpStream> as Connected>::ConnectInfo;

/// Who is at the other end: `request.extensions().get::<PeerInfo>()` gives what to ask.
pub fn peer_identity(peer: &PeerInfo) -> Result<Identity, IdentityError> {
    let chain = peer.peer_certs().ok_or(IdentityError::Missing)?;
    Identity::from_certificate(chain.first().ok_or(IdentityError::Missing)?)
}

/// Bounds on connections that are being set up.
#[derive(Debug, Clone, Copy)]
pub struct IncomingLimits {
    /// Handshakes at a time; further peers wait in the system's queue.
    pub handshakes_max: usize,
    /// How long one may take, and after it the first words of HTTP/2: whoever says nothing is cut.
    pub handshake_timeout: Duration,
}

impl Default for IncomingLimits {
    fn default() -> Self {
        Self { handshakes_max: 256, handshake_timeout: Duration::from_secs(10) }
    }
}

/// The connections that complete their handshake, for `serve_with_incoming_shutdown`. Never ends by
/// itself and never yields an error; dropping it closes the listener. Must be called inside a runtime.
pub fn incoming(
    listener: TcpListener,
    config: Arc<ServerConfig>,
    limits: IncomingLimits,
) -> impl Stream<Item = io::Result<Connection>> + Send + 'static {
    let (sender, receiver) = mpsc::channel(READY_MAX);
    tokio::spawn(accept_all(listener, TlsAcceptor::from(config), limits, sender));
    ReceiverStream::new(receiver)
}

type Sender = mpsc::Sender<io::Result<Connection>>;

async fn accept_all(listener: TcpListener, acceptor: TlsAcceptor, limits: IncomingLimits, sender: Sender) {
    let permits = Arc::new(Semaphore::new(limits.handshakes_max));
    // Dropped with this task, which aborts what is left of them.
    let mut handshakes = JoinSet::new();
    loop {
        tokio::select! {
            () = sender.closed() => return,
            Some(_) = handshakes.join_next() => {}
            (permit, tcp, peer) = accept(&listener, permits.clone()) => {
                handshakes.spawn(set_up(tcp, peer, acceptor.clone(), limits.handshake_timeout, sender.clone(), permit));
            }
        }
    }
}

/// Cancel-safe: a connection is taken in the last step only.
async fn accept(
    listener: &TcpListener,
    permits: Arc<Semaphore>,
) -> (Option<OwnedSemaphorePermit>, TcpStream, SocketAddr) {
    // The semaphore is never closed.
    let permit = permits.acquire_owned().await.ok();
    loop {
        match listener.accept().await {
            Ok((tcp, peer)) => return (permit, tcp, peer),
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection; trying again");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn set_up(
    tcp: TcpStream,
    peer: SocketAddr,
    acceptor: TlsAcceptor,
    limit: Duration,
    sender: Sender,
    permit: Option<OwnedSemaphorePermit>,
) {
    if let Err(error) = tcp.set_nodelay(true) {
        tracing::debug!(%peer, %error, "cannot set TCP_NODELAY");
    }
    match timeout(limit, acceptor.accept(tcp).into_fallible()).await {
        Ok(Ok(stream)) => {
            drop(permit);
            // The server went away: so does the connection.
            let _ = sender.send(Ok(Connection::new(stream, limit))).await;
        }
        Ok(Err((error, tcp))) => {
            tracing::info!(%peer, reason = reason(&error), "refused a connection");
            say_farewell(tcp).await;
        }
        Err(_) => {
            let reason = format!("it did not complete the TLS handshake within {} s", limit.as_secs_f32());
            tracing::info!(%peer, reason, "refused a connection");
        }
    }
}

/// The alert that says why is on its way. Closing while the peer still sends would reset the connection,
/// and a reset overtakes the alert: so our direction is closed first and the peer's is emptied.
async fn say_farewell(mut tcp: TcpStream) {
    let _ = timeout(FAREWELL, async {
        tcp.shutdown().await?;
        tokio::io::copy(&mut tcp.take(FAREWELL_BYTES_MAX), &mut tokio::io::sink()).await
    })
    .await;
}

/// Why a handshake failed, seen from the server, in words.
fn reason(error: &io::Error) -> String {
    let Some(tls) = error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>()) else {
        return match error.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
                "it closed the connection during the TLS handshake".to_owned()
            }
            _ => error.to_string(),
        };
    };
    match tls {
        rustls::Error::NoCertificatesPresented => "it presented no certificate".to_owned(),
        rustls::Error::InvalidCertificate(
            CertificateError::UnknownIssuer | CertificateError::BadSignature,
        ) => "its certificate was not issued by this federation's CA".to_owned(),
        rustls::Error::InvalidCertificate(
            CertificateError::Expired | CertificateError::ExpiredContext { .. },
        ) => "its certificate has expired".to_owned(),
        rustls::Error::InvalidCertificate(error) => format!("its certificate is not acceptable: {error}"),
        rustls::Error::AlertReceived(AlertDescription::UnknownCA | AlertDescription::DecryptError) => {
            "it does not accept our certificate: its ca.pem is not this federation's".to_owned()
        }
        rustls::Error::AlertReceived(AlertDescription::BadCertificate) => {
            "it does not accept our certificate, most likely because it looked for another host name"
                .to_owned()
        }
        rustls::Error::AlertReceived(AlertDescription::CertificateExpired) => {
            "it finds our certificate expired".to_owned()
        }
        rustls::Error::AlertReceived(alert) => format!("it broke off the TLS handshake ({alert:?})"),
        rustls::Error::PeerIncompatible(error) => format!("it does not speak TLS 1.3 ({error:?})"),
        rustls::Error::NoApplicationProtocol => "it does not speak HTTP/2".to_owned(),
        rustls::Error::InvalidMessage(_) => "it does not speak TLS".to_owned(),
        error => error.to_string(),
    }
}
