//! What the machine itself can do, measured: the figures that the benchmark programs are held against.
//!
//! It measures memory bandwidth and nothing else, needs no privileges and keeps no state. One call takes
//! [`BYTES_PER_THREAD`] of memory per thread and some seconds.

use std::{
    hint::black_box,
    sync::{Barrier, Mutex},
    thread,
    time::{Duration, Instant},
};

/// Memory that each thread works on: far more than its share of any cache.
pub const BYTES_PER_THREAD: usize = 512 << 20;

/// Passes of which the best counts, so that a neighbour on the machine spoils a pass, not the figure.
const PASSES: usize = 7;

const WORDS_PER_THREAD: usize = BYTES_PER_THREAD / size_of::<u64>();
/// Bytes of a cache line.
const LINE_BYTES: usize = 64;

/// Bytes per second that `threads` threads move together with memcpy, each between two halves of its own
/// [`BYTES_PER_THREAD`]. A byte counts twice, once read and once written: the rate of copying is half of
/// this. What a processor reads of a line before it overwrites it does not count.
///
/// # Panics
/// If `threads` is 0.
pub fn copy_bytes_per_second(threads: usize) -> f64 {
    bytes_per_second(threads, |words| {
        let (from, to) = words.split_at_mut(WORDS_PER_THREAD / 2);
        to.copy_from_slice(black_box(from));
        black_box(to);
    })
}

/// Bytes per second that `threads` threads read together, each summing its own [`BYTES_PER_THREAD`] as
/// 64-bit words. A byte counts once, nothing is written.
///
/// # Panics
/// If `threads` is 0.
pub fn read_bytes_per_second(threads: usize) -> f64 {
    bytes_per_second(threads, |words| {
        // As many sums as there are words in four cache lines: no addition waits for the one before it.
        let mut sums = [0u64; 32];
        for line in black_box(words).chunks_exact(sums.len()) {
            for (sum, word) in sums.iter_mut().zip(line) {
                *sum = sum.wrapping_add(*word);
            }
        }
        black_box(sums);
    })
}

/// Bytes per second that `threads` threads move together when each adds up `vectors` vectors element by element,
/// as 64-bit words, and writes the sum to one more: what an ideal reduction of one vector less would do to
/// memory. Read and written bytes count once.
///
/// # Panics
/// If `threads` is 0.
pub fn sum_bytes_per_second(threads: usize, vectors: usize) -> f64 {
    // Words of a piece that stays in a core's first cache while vector after vector is added to it.
    const PIECE_WORDS: usize = 512;
    let length = WORDS_PER_THREAD / (vectors + 1) / PIECE_WORDS * PIECE_WORDS;
    let moved = (vectors + 1) * length * size_of::<u64>();
    let share = moved as f64 / BYTES_PER_THREAD as f64;
    let rate = bytes_per_second(threads, |words| {
        let (sums, vectors) = black_box(words).split_at_mut(length);
        for (at, sums) in sums.chunks_exact_mut(PIECE_WORDS).enumerate() {
            let mut piece = [0u64; PIECE_WORDS];
            for vector in vectors.chunks_exact(length) {
                for (sum, word) in piece.iter_mut().zip(&vector[at * PIECE_WORDS..]) {
                    *sum = sum.wrapping_add(*word);
                }
            }
            sums.copy_from_slice(&piece);
        }
        black_box(sums);
    });
    rate * share
}

/// Runs `pass` over each thread's memory, all threads at once, and divides the bytes of all by the time from
/// the common start to the end of the slowest thread. Best of [`PASSES`].
fn bytes_per_second(threads: usize, pass: impl Fn(&mut [u64]) + Sync) -> f64 {
    assert!(threads > 0, "bandwidth is measured with one thread at least");
    let barrier = Barrier::new(threads);
    let slowest = Mutex::new([Duration::ZERO; PASSES]);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                // Ones, not zeros: memory that is zero from the start may not be there before it is written.
                // The thread that uses it writes it first, so that it lies beside that thread's core.
                let mut words = vec![1u64; WORDS_PER_THREAD + LINE_BYTES / size_of::<u64>()];
                let begin = words.as_ptr().align_offset(LINE_BYTES);
                let words = &mut words[begin..begin + WORDS_PER_THREAD];
                for at in 0..PASSES {
                    barrier.wait();
                    let started_at = Instant::now();
                    pass(words);
                    let took = started_at.elapsed();
                    let mut slowest = slowest.lock().expect("a thread that measures does not panic");
                    slowest[at] = slowest[at].max(took);
                }
            });
        }
    });
    let best = slowest.into_inner().expect("a thread that measures does not panic").into_iter().min();
    (threads * BYTES_PER_THREAD) as f64 / best.unwrap_or_default().as_secs_f64()
}
