//! An accepted connection. Until its peer has begun to speak HTTP/2 it is on probation: the handshake proves
//! who the peer is, and keepalive takes over once HTTP/2 is there; in between nothing else would notice
//! a peer that says nothing.

use std::{
    future::Future,
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::{Sleep, sleep},
};
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use super::PeerInfo;

/// What every HTTP/2 client sends first, in bytes (RFC 9113, section 3.4).
const PREFACE_BYTES: usize = 24;

/// A connection whose peer's certificate is verified.
pub struct Connection {
    pub(super) tls: TlsStream<TcpStream>,
    probation: Option<Probation>,
}

struct Probation {
    end: Pin<Box<Sleep>>,
    limit: Duration,
    bytes_missing: usize,
}

impl Connection {
    /// A connection that is cut if its peer has not begun to speak HTTP/2 within `limit`.
    pub(super) fn new(tls: TlsStream<TcpStream>, limit: Duration) -> Self {
        let probation = Probation { end: Box::pin(sleep(limit)), limit, bytes_missing: PREFACE_BYTES };
        Self { tls, probation: Some(probation) }
    }
}

impl Probation {
    fn poll_end(&mut self, context: &mut Context<'_>, tls: &TlsStream<TcpStream>) -> Poll<io::Error> {
        self.end.as_mut().poll(context).map(|()| {
            let peer =
                tls.get_ref().0.peer_addr().map_or_else(|_| "gone".to_owned(), |peer| peer.to_string());
            let reason =
                format!("it said nothing for {} s after the TLS handshake", self.limit.as_secs_f32());
            tracing::info!(peer, reason, "closed a connection");
            io::Error::new(io::ErrorKind::TimedOut, reason)
        })
    }
}

impl Connected for Connection {
    type ConnectInfo = PeerInfo;

    fn connect_info(&self) -> PeerInfo {
        self.tls.connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Self { tls, probation } = &mut *self;
        let filled = buffer.filled().len();
        let read = Pin::new(&mut *tls).poll_read(context, buffer);
        let Some(pending) = probation else { return read };
        if read.is_pending() {
            return pending.poll_end(context, tls).map(Err);
        }
        pending.bytes_missing = pending.bytes_missing.saturating_sub(buffer.filled().len() - filled);
        if pending.bytes_missing == 0 {
            *probation = None;
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.tls).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.tls.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tls).poll_shutdown(context)
    }
}
