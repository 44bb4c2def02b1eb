//! A TCP proxy between sites and the aggregator: counts what passes, and cuts connections at chosen counts.
//!
//! It counts the bytes of the TCP streams, so TLS and HTTP/2 with all that they add, but neither TCP's own
//! headers nor what TCP sends again. It never looks into the bytes.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::watch,
};

use crate::relay::Relay;

/// Bytes that one direction of a connection has in hand at a time.
const BUFFER_BYTES: usize = 16 << 10;

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From the site to the aggregator.
    Up,
    /// From the aggregator to the site.
    Down,
}

/// What passed, over all connections since the proxy began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Passed {
    /// Bytes that sites sent: handed on, or lost in a cut.
    pub up: u64,
    /// Bytes that the aggregator sent.
    pub down: u64,
    /// Times that all connections were cut.
    pub cuts: u64,
}

impl Passed {
    fn add(&mut self, direction: Direction, bytes: usize) {
        match direction {
            Direction::Up => self.up += bytes as u64,
            Direction::Down => self.down += bytes as u64,
        }
    }
}

#[derive(Debug, Default)]
struct State {
    passed: Passed,
    cutting: [Cutting; 2],
}

/// Where one direction is cut.
#[derive(Debug, Default)]
struct Cutting {
    /// Bytes handed on since the counts were set.
    handed_on: u64,
    /// Of those, ascending.
    counts: VecDeque<u64>,
}

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    cut: watch::Sender<u64>,
}

/// The running proxy. It ends when dropped.
#[derive(Debug)]
pub struct Proxy {
    relay: Relay,
    shared: Arc<Shared>,
}

impl Proxy {
    /// Starts a proxy before `aggregator` (`HOST:PORT`), on a thread of its own and a port of the system's
    /// choice. One thread does all the work, so that counts and cuts are in one order.
    pub fn start(aggregator: &str) -> Self {
        let shared = Arc::new(Shared { state: Mutex::default(), cut: watch::Sender::new(0) });
        let relay = Relay::start(aggregator, {
            let shared = shared.clone();
            move |site, aggregator| {
                let shared = shared.clone();
                async move { relay(site, aggregator, &shared).await }
            }
        });
        Self { relay, shared }
    }

    /// Where sites connect: `localhost:PORT`.
    pub fn endpoint(&self) -> &str {
        self.relay.endpoint()
    }

    /// What has passed so far.
    pub fn passed(&self) -> Passed {
        self.shared.state().passed
    }

    /// From now on, cuts every connection whenever so many bytes were handed on in `direction` (counted
    /// from now, ascending): both sides see a reset, and what was on its way is lost.
    pub fn cut_at(&self, direction: Direction, counts: Vec<u64>) {
        self.shared.state().cutting[direction as usize] = Cutting { handed_on: 0, counts: counts.into() };
    }
}

impl Shared {
    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts bytes that were read. Returns how many of them may be handed on, and whether there is a cut
    /// after them.
    fn pass(&self, direction: Direction, bytes: usize) -> (usize, bool) {
        let mut state = self.state();
        state.passed.add(direction, bytes);
        let cutting = &mut state.cutting[direction as usize];
        let left = cutting.counts.front().map_or(u64::MAX, |count| count.saturating_sub(cutting.handed_on));
        let allowed = usize::try_from(left).unwrap_or(usize::MAX).min(bytes);
        cutting.handed_on += allowed as u64;
        let is_cut = left <= bytes as u64;
        if is_cut {
            cutting.counts.pop_front();
            state.passed.cuts += 1;
            self.cut.send_modify(|cuts| *cuts += 1);
        }
        (allowed, is_cut)
    }
}

/// Hands on what either side sends until one of them ends, or all is cut.
async fn relay(mut site: TcpStream, mut aggregator: TcpStream, shared: &Shared) -> io::Result<()> {
    let mut cut = shared.cut.subscribe();
    let is_cut = {
        let (site_reader, site_writer) = site.split();
        let (aggregator_reader, aggregator_writer) = aggregator.split();
        tokio::select! {
            biased;
            _ = cut.changed() => true,
            is_cut = pump(Direction::Up, site_reader, aggregator_writer, shared) => is_cut?,
            is_cut = pump(Direction::Down, aggregator_reader, site_writer, shared) => is_cut?,
        }
    };
    if is_cut {
        // What had come here was sent as well.
        count_rest(Direction::Up, &site, shared);
        count_rest(Direction::Down, &aggregator, shared);
        site.set_zero_linger()?;
        aggregator.set_zero_linger()?;
    }
    Ok(())
}

/// Tells at the end whether there was a cut.
async fn pump(
    direction: Direction,
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    shared: &Shared,
) -> io::Result<bool> {
    let mut buffer = vec![0; BUFFER_BYTES];
    loop {
        let bytes = from.read(&mut buffer).await?;
        if bytes == 0 {
            return Ok(false);
        }
        let (allowed, is_cut) = shared.pass(direction, bytes);
        to.write_all(&buffer[..allowed]).await?;
        if is_cut {
            return Ok(true);
        }
    }
}

/// Counts what lies in the socket unread; it is handed on to nobody.
fn count_rest(direction: Direction, from: &TcpStream, shared: &Shared) {
    let mut buffer = vec![0; BUFFER_BYTES];
    while let Ok(bytes @ 1..) = from.try_read(&mut buffer) {
        shared.state().passed.add(direction, bytes);
    }
}
