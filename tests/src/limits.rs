//! What the machine can do at best: the figures that a measurement is held against. Measured in the same
//! run, since they differ between machines and between minutes.

use std::{
    io::{self, Write},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use consort_common::tls::{Credentials, client_config, server_config};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rustls_pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::line::{Length, Line};

/// Bytes that a receiver asks for at a time.
const READ_BYTES: usize = 1 << 20;
/// Random bytes that are written over and over: more than any disk compares to find that it has them.
const RANDOM_BYTES: usize = 16 << 20;
/// Bytes that are written at a time: where Linux caches a file in large pieces, writes of more take several
/// times as long.
const DISK_WRITE_BYTES: usize = 1 << 20;

/// How long plain TLS 1.3 over loopback takes for `bytes`, over `streams` connections at a time, both ends
/// in this process, in writes of `write_bytes`: the cipher, TCP and nothing else. With a long line between the
/// ends if there is one.
///
/// # Errors
/// If a connection cannot be made or breaks.
pub async fn tls(
    server: &Credentials,
    client: &Credentials,
    streams: u64,
    bytes: u64,
    write_bytes: usize,
    length: Option<Length>,
) -> io::Result<Duration> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?.to_string();
    let line = length.map(|length| Line::start(&address, length));
    let address = line.as_ref().map_or(address.as_str(), Line::endpoint);
    let acceptor = TlsAcceptor::from(server_config(server));
    let connector = TlsConnector::from(client_config(client));
    let share = bytes / streams;
    let data: Arc<[u8]> = random(write_bytes).into();

    let mut pairs = Vec::new();
    for _ in 0..streams {
        let connect = async {
            let tcp = TcpStream::connect(address).await?;
            tcp.set_nodelay(true)?;
            let name = ServerName::try_from("localhost").map_err(io::Error::other)?;
            connector.connect(name, tcp).await
        };
        let accept = async {
            let (tcp, _) = listener.accept().await?;
            tcp.set_nodelay(true)?;
            acceptor.accept(tcp).await
        };
        pairs.push(tokio::try_join!(connect, accept)?);
    }

    let begin = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for (mut receiver, mut sender) in pairs {
        let data = data.clone();
        tasks.spawn(async move {
            let mut left = share;
            while left > 0 {
                let bytes = left.min(data.len() as u64);
                sender.write_all(&data[..bytes as usize]).await?;
                left -= bytes;
            }
            sender.shutdown().await
        });
        tasks.spawn(async move {
            let mut buffer = vec![0; READ_BYTES];
            let mut received = 0;
            loop {
                match receiver.read(&mut buffer).await? {
                    0 if received == share => return Ok(()),
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    bytes => received += bytes as u64,
                }
            }
        });
    }
    while let Some(result) = tasks.join_next().await {
        result.map_err(io::Error::other)??;
    }
    Ok(begin.elapsed())
}

/// How long it takes to make `bytes` random bytes durable, written in order to one new file in `directory`,
/// which is removed.
///
/// # Errors
/// Those of the file system.
pub fn disk(directory: &Path, bytes: u64) -> io::Result<Duration> {
    let data = random(RANDOM_BYTES);
    let mut file = tempfile::tempfile_in(directory)?;
    let begin = Instant::now();
    let mut left = bytes;
    for piece in data.chunks(DISK_WRITE_BYTES).cycle() {
        let bytes = left.min(piece.len() as u64);
        file.write_all(&piece[..bytes as usize])?;
        left -= bytes;
        if left == 0 {
            break;
        }
    }
    file.sync_data()?;
    Ok(begin.elapsed())
}

fn random(bytes: usize) -> Vec<u8> {
    let mut data = vec![0; bytes];
    ChaCha8Rng::seed_from_u64(1).fill_bytes(&mut data);
    data
}
