//! The scales of the encodings that work in blocks: non-negative bf16, little-endian, 2 bytes.
//!
//! bf16 has the range of fp32, which fp16 lacks: deltas of 1e-7 need it. A scale that is NaN says that its
//! block held a value that was not finite, so that an encoder, which cannot fail, is understood by the
//! decoder.

use super::{Fault, INFINITY, bf16};

pub(super) const BYTES: usize = 2;

/// Marks a block with a value that is not finite.
pub(super) const NOT_FINITE: [u8; BYTES] = 0x7fc0_u16.to_le_bytes();

/// The nearest scale to a magnitude; the largest finite one where the magnitude is beyond it.
#[inline(always)]
pub(super) fn nearest(magnitude: f32) -> [u8; BYTES] {
    bf16::nearest(magnitude.min(f32::MAX)).to_le_bytes()
}

/// The smallest scale that is not below a magnitude, but at most `limit`, which is a scale.
#[inline(always)]
pub(super) fn not_below(magnitude: f32, limit: f32) -> [u8; BYTES] {
    let up = (magnitude.to_bits().min(INFINITY) + 0xffff) >> 16;
    (up.min(limit.to_bits() >> 16) as u16).to_le_bytes()
}

/// Reads a scale that must be finite, not negative, at most `limit`.
#[inline(always)]
pub(super) fn read(bytes: [u8; BYTES], limit: f32) -> Result<f32, Fault> {
    let scale = value(bytes);
    // The sign bit makes the largest bits, so this refuses -0 and whatever is negative or not finite.
    if scale.to_bits() <= limit.to_bits() { Ok(scale) } else { Err(Fault::Scale(scale)) }
}

/// The value of a scale that this module made.
#[inline(always)]
pub(super) fn value(bytes: [u8; BYTES]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
}

/// The largest finite scale.
pub(super) const LARGEST: f32 = f32::from_bits(0x7f7f_0000);
