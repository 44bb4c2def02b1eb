//! A long line as a TCP proxy, where the kernel can make none: it carries each direction at a given rate, and
//! hands bytes on only after the time that they need to the other end.
//!
//! What it shows is what the programs make of distance: their windows, their acknowledgements, whatever waits
//! for an answer. It does not show TCP's own part: its connections are of this machine, and the congestion
//! control and the buffers of the kernel see no distance. It never looks into the bytes.

use std::{
    fmt, io,
    str::FromStr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch},
    time::{Instant, sleep, sleep_until},
};

use crate::{proxy::Direction, relay::Relay};

/// Bytes that are read at a time at most.
const PIECE_BYTES: usize = 64 << 10;
/// What the line makes up for where this thread had no processor: its timer alone is a millisecond late.
const BURST: Duration = Duration::from_millis(5);
/// What a connection has on the line, as a multiple of what the line holds: beyond it whoever sends has to wait,
/// since the other end does not read.
const HELD_MAX: f64 = 2.0;

/// How fast and how long a line is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Length {
    /// What it carries in each direction, over all connections.
    pub bytes_per_second: f64,
    /// There and back.
    pub round_trip: Duration,
}

impl Length {
    /// Bytes that are on their way to the other end when the line is full.
    pub fn bytes_one_way(&self) -> f64 {
        self.bytes_per_second * self.one_way().as_secs_f64()
    }

    /// How long a byte is on its way.
    pub fn one_way(&self) -> Duration {
        self.round_trip / 2
    }
}

/// `MBIT:MS`, as in `1000:100`: Mbit/s, and milliseconds there and back.
impl FromStr for Length {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| text.parse::<u32>().ok();
        match text.split_once(':').map(|(rate, time)| (number(rate), number(time))) {
            Some((Some(rate @ 1..=100_000), Some(time @ 0..=10_000))) => Ok(Self {
                bytes_per_second: f64::from(rate) * 125_000.0,
                round_trip: Duration::from_millis(u64::from(time)),
            }),
            _ => {
                Err("a line is MBIT:MS, as in 1000:100 for 1000 Mbit/s and 100 ms there and back".to_owned())
            }
        }
    }
}

impl fmt::Display for Length {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (rate, time) = (self.bytes_per_second / 125_000.0, self.round_trip.as_millis());
        write!(f, "{rate:.0} Mbit/s over {time} ms")
    }
}

#[derive(Debug)]
struct Lane {
    state: Mutex<LaneState>,
    held_back: watch::Sender<bool>,
}

#[derive(Debug)]
struct LaneState {
    /// When the bytes that were read so far will all have left.
    free_at: Instant,
    /// Bytes that came out at the other end.
    carried: u64,
}

impl Lane {
    /// Bytes take their time on the line. Returns when the last of them has left.
    fn leave(&self, bytes: usize, length: &Length) -> Instant {
        let takes = Duration::from_secs_f64(bytes as f64 / length.bytes_per_second);
        let mut state = self.state();
        // Time that nobody used is not saved up, but for the burst.
        let idle_since = Instant::now().checked_sub(BURST).unwrap_or(state.free_at);
        state.free_at = state.free_at.max(idle_since) + takes;
        state.free_at
    }

    fn state(&self) -> std::sync::MutexGuard<'_, LaneState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The running line. It ends when dropped.
#[derive(Debug)]
pub struct Line {
    relay: Relay,
    lanes: Arc<[Lane; 2]>,
}

impl Line {
    /// Starts a line to `target` (`HOST:PORT`), on a thread of its own and a port of the system's choice.
    pub fn start(target: &str, length: Length) -> Self {
        let lane = || Lane {
            state: Mutex::new(LaneState { free_at: Instant::now(), carried: 0 }),
            held_back: watch::Sender::new(false),
        };
        let lanes = Arc::new([lane(), lane()]);
        let relay = Relay::start(target, {
            let lanes = lanes.clone();
            move |near, far| carry(near, far, lanes.clone(), length)
        });
        Self { relay, lanes }
    }

    /// Where to connect: `localhost:PORT`.
    pub fn endpoint(&self) -> &str {
        self.relay.endpoint()
    }

    /// Bytes that came out at the other end so far, over all connections.
    pub fn carried(&self, direction: Direction) -> u64 {
        self.lanes[direction as usize].state().carried
    }

    /// From now on nothing comes out in that direction, or it does again. What is on its way waits.
    pub fn hold_back(&self, direction: Direction, held_back: bool) {
        self.lanes[direction as usize].held_back.send_replace(held_back);
    }
}

/// Bytes on their way.
struct Piece {
    bytes: Vec<u8>,
    arrives_at: Instant,
    _room: OwnedSemaphorePermit,
}

/// Carries what both sides send until both have ended, or one has failed.
async fn carry(near: TcpStream, far: TcpStream, lanes: Arc<[Lane; 2]>, length: Length) -> io::Result<()> {
    // TCP's handshake.
    sleep(length.round_trip).await;
    let ((near_reader, near_writer), (far_reader, far_writer)) = (near.into_split(), far.into_split());
    let [up, down] = &*lanes;
    tokio::try_join!(
        carry_one_way(near_reader, far_writer, up, &length),
        carry_one_way(far_reader, near_writer, down, &length),
    )?;
    Ok(())
}

async fn carry_one_way(
    from: OwnedReadHalf,
    to: OwnedWriteHalf,
    lane: &Lane,
    length: &Length,
) -> io::Result<()> {
    let (pieces, arriving) = mpsc::unbounded_channel();
    tokio::try_join!(take(from, lane, length, pieces), hand_on(to, lane, arriving))?;
    Ok(())
}

async fn take(
    mut from: OwnedReadHalf,
    lane: &Lane,
    length: &Length,
    pieces: mpsc::UnboundedSender<Piece>,
) -> io::Result<()> {
    let room_bytes = PIECE_BYTES + (HELD_MAX * length.bytes_one_way()) as usize;
    let room = Arc::new(Semaphore::new(room_bytes));
    let mut buffer = vec![0; PIECE_BYTES];
    loop {
        let bytes = from.read(&mut buffer).await?;
        if bytes == 0 {
            return Ok(());
        }
        let taken = room.clone().acquire_many_owned(bytes as u32).await;
        let left_at = lane.leave(bytes, length);
        let piece = Piece {
            bytes: buffer[..bytes].to_vec(),
            arrives_at: left_at + length.one_way(),
            _room: taken.map_err(io::Error::other)?,
        };
        pieces.send(piece).map_err(io::Error::other)?;
        wait_until(left_at).await;
    }
}

async fn hand_on(
    mut to: OwnedWriteHalf,
    lane: &Lane,
    mut arriving: mpsc::UnboundedReceiver<Piece>,
) -> io::Result<()> {
    let mut held_back = lane.held_back.subscribe();
    while let Some(piece) = arriving.recv().await {
        wait_until(piece.arrives_at).await;
        held_back.wait_for(|held_back| !held_back).await.map_err(io::Error::other)?;
        to.write_all(&piece.bytes).await?;
        lane.state().carried += piece.bytes.len() as u64;
    }
    to.shutdown().await
}

async fn wait_until(instant: Instant) {
    if instant > Instant::now() {
        sleep_until(instant).await;
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        net::{TcpListener, TcpStream},
        thread,
        time::Instant,
    };

    use super::*;

    #[test]
    fn lines_are_read() {
        let length: Length = "1000:100".parse().unwrap();
        assert_eq!((length.bytes_per_second, length.round_trip), (125e6, Duration::from_millis(100)));
        assert_eq!(length.bytes_one_way(), 6.25e6);
        for text in ["", "1000", "1000:", ":100", "0:100", "-1:100", "1000:100:1", "1e3:100"] {
            assert!(text.parse::<Length>().is_err(), "{text:?}");
        }
    }

    /// Bytes go there and back in their order, none is lost, and none is faster than the line.
    #[test]
    fn what_goes_in_comes_out_and_not_too_soon() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let target = listener.local_addr().unwrap().to_string();
        let length: Length = "80:60".parse().unwrap();
        let line = Line::start(&target, length);
        let sent: Vec<u8> = (0..1_000_000_u32).map(|at| (at % 251) as u8).collect();
        let echo = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut received = Vec::new();
            stream.read_to_end(&mut received).unwrap();
            stream.write_all(&received).unwrap();
        });
        let began = Instant::now();
        let mut stream = TcpStream::connect(line.endpoint()).unwrap();
        stream.write_all(&sent).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut received = Vec::new();
        stream.read_to_end(&mut received).unwrap();
        let took = began.elapsed();
        echo.join().unwrap();
        assert!(received == sent);
        assert_eq!([Direction::Up, Direction::Down].map(|way| line.carried(way)), [1_000_000; 2]);
        // Two round trips, and twice a megabyte at ten megabytes per second.
        let least = 2 * length.round_trip + 2 * (Duration::from_millis(100) - BURST);
        assert!(took >= least, "{took:?}");
    }
}
