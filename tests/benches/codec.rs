//! What each delta encoding costs and saves on this machine, one core: prints a table.
//!
//! `cargo bench -p consort-tests --bench codec`. Rates are fp32 bytes per second, whatever is on the wire, in
//! 10^9; best of several passes over 64 chunks of the default size, so that values come from memory on one
//! side and stay in a core's cache on the other, as in the daemon and in the aggregator.

use std::{
    hint::black_box,
    time::{Duration, Instant},
};

use consort_common::codec::{Encoding, encode_with_feedback};
use consort_tests::machine;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const CHUNK_PARAMETERS: usize = 1 << 18;
const CHUNKS: usize = 64;
const PASSES: usize = 7;
const ZSTD_LEVEL: i32 = 1;

fn main() {
    let copy = machine::copy_bytes_per_second(1) / 1e9;
    println!(
        "memory, 1 thread: copy {copy:.1} GB/s (read + written), so {:.1} GB/s copied; read {:.1} GB/s",
        copy / 2.0,
        machine::read_bytes_per_second(1) / 1e9
    );
    let inputs = [("gaussian", gaussian_delta()), ("heavy-tailed", heavy_tailed_delta())];
    println!(
        "memcpy of a chunk at a time into one that stays in cache: {:.1} GB/s\n",
        memcpy_rate(&inputs[0].1)
    );

    println!("            wire    GB/s of fp32 on one core    squared error, relative");
    println!("encoding   ratio   encode  decode  +feedback   gaussian  heavy-tailed");
    for encoding in Encoding::ALL {
        let values = &inputs[0].1;
        let payload = encoded(encoding, values);
        let feedback = encoding
            .error_feedback_decay()
            .map_or("-".to_owned(), |decay| format!("{:.2}", feedback_rate(encoding, decay, values)));
        println!(
            "{:8}  {:6.2}   {:6.2}  {:6.2}  {feedback:>9}   {:8.2e}  {:12.2e}",
            encoding.name(),
            (CHUNK_PARAMETERS * 4) as f64 / payload[0].len() as f64,
            encode_rate(encoding, values),
            decode_rate(encoding, &payload),
            relative_square_error(encoding, &inputs[0].1),
            relative_square_error(encoding, &inputs[1].1),
        );
    }

    println!("\nzstd level {ZSTD_LEVEL} on top of the payload, each chunk by itself; GB/s of payload");
    println!("encoding  input         saved   compress  decompress");
    for encoding in Encoding::ALL {
        for (name, values) in &inputs {
            let Zstd { saved, compress, decompress } = zstd_on(&encoded(encoding, values));
            println!(
                "{:8}  {name:12}  {:4.1} %   {compress:8.2}  {decompress:10.2}",
                encoding.name(),
                saved * 100.0
            );
        }
    }
}

/// Independent normal values, all of one size: what leaves a compressor least.
fn gaussian_delta() -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    (0..CHUNKS * CHUNK_PARAMETERS).map(|_| 1e-4 * normal(&mut random)).collect()
}

/// Normal values times a log-normal factor of their own and one of their row of 1024: tensors and rows that
/// move by very different amounts, and tails.
fn heavy_tailed_delta() -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(2);
    let mut row = 1.0;
    (0..CHUNKS * CHUNK_PARAMETERS)
        .map(|at| {
            if at % 1024 == 0 {
                row = normal(&mut random).exp();
            }
            1e-4 * row * normal(&mut random) * (0.8 * normal(&mut random)).exp()
        })
        .collect()
}

/// By the method of Box and Muller, one of the two values.
fn normal(random: &mut impl Rng) -> f32 {
    let (radius, angle) = (1.0 - random.random::<f32>(), std::f32::consts::TAU * random.random::<f32>());
    (-2.0 * radius.ln()).sqrt() * angle.cos()
}

fn encoded(encoding: Encoding, values: &[f32]) -> Vec<Vec<u8>> {
    values.chunks(CHUNK_PARAMETERS).map(|chunk| encoding.encode(chunk)).collect()
}

/// The shortest of the passes over all chunks.
fn best(mut pass: impl FnMut()) -> Duration {
    (0..PASSES)
        .map(|_| {
            let started_at = Instant::now();
            pass();
            started_at.elapsed()
        })
        .min()
        .unwrap_or_default()
}

/// 10^9 fp32 bytes per second of a pass over all chunks.
fn rate(pass: impl FnMut()) -> f64 {
    (CHUNKS * CHUNK_PARAMETERS * 4) as f64 / best(pass).as_secs_f64() / 1e9
}

fn memcpy_rate(values: &[f32]) -> f64 {
    let mut copy = vec![0f32; CHUNK_PARAMETERS];
    rate(|| {
        for chunk in values.chunks(CHUNK_PARAMETERS) {
            copy.copy_from_slice(black_box(chunk));
            black_box(&mut copy);
        }
    })
}

fn encode_rate(encoding: Encoding, values: &[f32]) -> f64 {
    let codec = encoding.codec();
    let mut payload = vec![0; codec.encoded_bytes(CHUNK_PARAMETERS)];
    rate(|| {
        for chunk in values.chunks(CHUNK_PARAMETERS) {
            codec.encode(black_box(chunk), &mut payload);
            black_box(&mut payload);
        }
    })
}

fn feedback_rate(encoding: Encoding, decay: f32, values: &[f32]) -> f64 {
    let codec = encoding.codec();
    let mut payload = vec![0; codec.encoded_bytes(CHUNK_PARAMETERS)];
    let mut errors = vec![0.0; values.len()];
    rate(|| {
        for (chunk, error) in values.chunks(CHUNK_PARAMETERS).zip(errors.chunks_mut(CHUNK_PARAMETERS)) {
            encode_with_feedback(codec, decay, black_box(chunk), error, &mut payload)
                .expect("the values are finite");
            black_box(&mut payload);
        }
    })
}

fn decode_rate(encoding: Encoding, payloads: &[Vec<u8>]) -> f64 {
    let mut values = vec![0.0; CHUNK_PARAMETERS];
    rate(|| {
        for payload in payloads {
            encoding.codec().decode(black_box(payload), &mut values).expect("it was encoded here");
            black_box(&mut values);
        }
    })
}

fn relative_square_error(encoding: Encoding, values: &[f32]) -> f64 {
    let (mut error, mut total) = (0.0, 0.0);
    let mut decoded = vec![0.0; CHUNK_PARAMETERS];
    for chunk in values.chunks(CHUNK_PARAMETERS) {
        encoding.codec().decode(&encoding.encode(chunk), &mut decoded).expect("it was encoded here");
        for (value, decoded) in chunk.iter().zip(&decoded) {
            error += (f64::from(*value) - f64::from(*decoded)).powi(2);
            total += f64::from(*value).powi(2);
        }
    }
    error / total
}

struct Zstd {
    /// Share of the payload's bytes.
    saved: f64,
    /// 10^9 payload bytes per second.
    compress: f64,
    decompress: f64,
}

fn zstd_on(payloads: &[Vec<u8>]) -> Zstd {
    let mut compressor = zstd::bulk::Compressor::new(ZSTD_LEVEL).expect("the level exists");
    let mut decompressor = zstd::bulk::Decompressor::new().expect("zstd gives a context");
    let bytes: usize = payloads.iter().map(Vec::len).sum();
    let mut frames = vec![vec![0; zstd::zstd_safe::compress_bound(payloads[0].len())]; payloads.len()];
    let mut lengths = vec![0; payloads.len()];
    let compress = best(|| {
        for ((payload, frame), length) in payloads.iter().zip(&mut frames).zip(&mut lengths) {
            *length = compressor
                .compress_to_buffer(payload, frame.as_mut_slice())
                .expect("the frame has the bound");
        }
    });
    let mut restored = vec![0; payloads[0].len()];
    let decompress = best(|| {
        for (frame, length) in frames.iter().zip(&lengths) {
            decompressor
                .decompress_to_buffer(&frame[..*length], restored.as_mut_slice())
                .expect("it was compressed here");
        }
    });
    Zstd {
        saved: 1.0 - lengths.iter().sum::<usize>() as f64 / bytes as f64,
        compress: bytes as f64 / compress.as_secs_f64() / 1e9,
        decompress: bytes as f64 / decompress.as_secs_f64() / 1e9,
    }
}
