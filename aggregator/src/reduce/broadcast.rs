//! How a new version is rounded to what the sites will hold: the form of the broadcast.
//!
//! With p what the sites hold (the base version), r the residual that the base version's rounding left (zero
//! at first), c its decay, and s the outer optimizer's step, the aggregator is at
//!
//!   x = p + c r + s
//!
//! in f64 from left to right, s as in `outer`, and rounded to f32 once. What the sites get is
//!
//! | form | p' | r' | c |
//! |---|---|---|---|
//! | fp32 | x | none | |
//! | bf16 | bf16(x) | x - p' | 1 |
//! | an update with encoding E | p + E(x - p) | x - p', if E has error feedback | its decay |
//!
//! where E(v) is v encoded and decoded, and each difference and sum is one in f32. p' is the version: its
//! digest, its checkpoint and the next round's base. A receiver adds the decoded update in f32, element by
//! element, and has the same bits.
//!
//! Error feedback in this direction is that of Tang et al., "DoubleSqueeze", arXiv 1905.05957, algorithm 1
//! (the server's e); Seide et al., Interspeech 2014.
//!
//! Version 0 is rounded alike: for bf16, p = bf16(x) and r = x - p with x the initial vector; an update has
//! nothing to begin from, so version 0 is sent whole.

use consort_common::codec::{DecodeError, Encoding, ModelEncoding, TILE_PARAMETERS};
use multiversion::multiversion;

/// p + c r, in f64.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
pub(super) fn add_residual(base: &[f32], residual: &[f32], decay: f32, start: &mut [f64]) {
    let decay = f64::from(decay);
    for ((start, p), r) in start.iter_mut().zip(base).zip(residual) {
        *start = f64::from(*p) + decay * f64::from(*r);
    }
}

/// What the form of a run's versions makes of a chunk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rounding {
    form: ModelEncoding,
}

impl Rounding {
    pub(super) fn new(form: ModelEncoding) -> Self {
        Self { form }
    }

    /// The encoding of what [`Rounding::apply`] encodes, if it does.
    pub(super) fn encoding(self) -> Option<Encoding> {
        match self.form {
            ModelEncoding::Fp32 => None,
            ModelEncoding::Bf16 => Some(Encoding::Bf16),
            ModelEncoding::Update(encoding) => Some(encoding),
        }
    }

    /// Rounds a chunk, or a piece of one that begins at a multiple of the encoding's block: `parameters` come
    /// as x and become p'; `residual` becomes r', or is empty; `payload` becomes what is sent, and has its
    /// length. `base` is p, of which only an update takes notice.
    ///
    /// # Errors
    /// If the payload would not decode: an x is not finite, or x - p is too large for an fp32.
    pub(super) fn apply(
        self,
        base: &[f32],
        parameters: &mut [f32],
        residual: &mut [f32],
        payload: &mut [u8],
    ) -> Result<(), DecodeError> {
        let Some(encoding) = self.encoding() else { return Ok(()) };
        let codec = encoding.codec();
        let mut tile = [0.0; TILE_PARAMETERS];
        let payloads = payload.chunks_mut(codec.encoded_bytes(TILE_PARAMETERS));
        for (at, (x, payload)) in parameters.chunks_mut(TILE_PARAMETERS).zip(payloads).enumerate() {
            let begin = at * TILE_PARAMETERS;
            let range = begin..begin + x.len();
            let tile = &mut tile[..x.len()];
            if let ModelEncoding::Update(_) = self.form {
                subtract(x, &base[range.clone()], tile);
                codec.encode(tile, payload);
                codec.decode(payload, tile).map_err(|error| error.after(begin))?;
                add(&base[range.clone()], tile);
            } else {
                codec.encode(x, payload);
                codec.decode(payload, tile).map_err(|error| error.after(begin))?;
            }
            if let Some(residual) = residual.get_mut(range) {
                subtract(x, tile, residual);
            }
            x.copy_from_slice(tile);
        }
        Ok(())
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn subtract(left: &[f32], right: &[f32], difference: &mut [f32]) {
    for ((difference, left), right) in difference.iter_mut().zip(left).zip(right) {
        *difference = left - right;
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl", "x86_64+avx2"))]
fn add(base: &[f32], sum: &mut [f32]) {
    for (sum, base) in sum.iter_mut().zip(base) {
        *sum += base;
    }
}
