//! What the encodings in blocks share: cutting a chunk into blocks, and packing codes of a few bits.
//!
//! Every block is encoded by itself, blocks follow one another, and the last has the values that are left.

use super::{DecodeError, Fault};

/// An encoding in blocks of `PARAMETERS` values, `BYTES` bytes each; the last block may have fewer of both.
///
/// Its functions are to be `#[inline(always)]`, so that they are compiled for the processor that their caller
/// is compiled for, and for whole blocks with their length known. A closure would not be.
pub(super) trait Block<const PARAMETERS: usize, const BYTES: usize> {
    /// Encodes one block, 1 to `PARAMETERS` values.
    fn encode_block(&mut self, values: &[f32], bytes: &mut [u8]);

    /// The reverse; `bytes` has the length that the values take.
    fn decode_block(bytes: &[u8], values: &mut [f32]) -> Result<(), Fault>;
}

/// Encodes whole blocks, then what is left.
#[inline(always)]
pub(super) fn encode<const PARAMETERS: usize, const BYTES: usize>(
    encoder: &mut impl Block<PARAMETERS, BYTES>,
    values: &[f32],
    payload: &mut [u8],
) {
    let (blocks, last) = values.as_chunks::<PARAMETERS>();
    // Not by the length of the payload: a last block may have fewer values and as many bytes as a whole one.
    let (encoded, last_encoded) = payload.split_at_mut(blocks.len() * BYTES);
    for (values, bytes) in blocks.iter().zip(encoded.as_chunks_mut::<BYTES>().0) {
        encoder.encode_block(values, bytes);
    }
    if !last.is_empty() {
        encoder.encode_block(last, last_encoded);
    }
}

/// The reverse of [`encode`]; the caller has checked the payload's length.
#[inline(always)]
pub(super) fn decode<const PARAMETERS: usize, const BYTES: usize, Decoder: Block<PARAMETERS, BYTES>>(
    payload: &[u8],
    values: &mut [f32],
) -> Result<(), DecodeError> {
    let (blocks, last) = values.as_chunks_mut::<PARAMETERS>();
    let whole = blocks.len();
    let (encoded, last_encoded) = payload.split_at(whole * BYTES);
    for (at, (values, bytes)) in blocks.iter_mut().zip(encoded.as_chunks::<BYTES>().0).enumerate() {
        Decoder::decode_block(bytes, values).map_err(|fault| fault.at(at * PARAMETERS))?;
    }
    if last.is_empty() {
        return Ok(());
    }
    Decoder::decode_block(last_encoded, last).map_err(|fault| fault.at(whole * PARAMETERS))
}

/// Packs codes of `8 / PER_BYTE` bits: with q bytes, code j is in byte j mod q, in the bits from
/// (j div q) * 8 / `PER_BYTE` on. So neighbours lie in neighbouring bytes, and packing is a few operations on
/// whole vectors of codes, where packing neighbours into one byte would shuffle within them.
///
/// `codes` has `PER_BYTE` codes for each of `bytes`, zeros beyond those that there are.
#[inline(always)]
pub(super) fn pack<const PER_BYTE: usize>(codes: &[u8], bytes: &mut [u8]) {
    let mut planes = codes.chunks_exact(bytes.len());
    bytes.fill(0);
    for plane in 0..PER_BYTE {
        for (byte, code) in bytes.iter_mut().zip(planes.next().unwrap_or_default()) {
            *byte |= code << (plane * 8 / PER_BYTE);
        }
    }
}

/// The reverse of [`pack`]: `PER_BYTE` codes for each of `bytes`.
#[inline(always)]
pub(super) fn unpack<const PER_BYTE: usize>(bytes: &[u8], codes: &mut [u8]) {
    for (plane, codes) in codes.chunks_exact_mut(bytes.len()).enumerate() {
        for (code, byte) in codes.iter_mut().zip(bytes) {
            *code = (byte >> (plane * 8 / PER_BYTE)) & (0xff >> (8 - 8 / PER_BYTE));
        }
    }
}

/// Refuses bits that stand for no value and are not zero.
#[inline(always)]
pub(super) fn check_padding(codes: &[u8]) -> Result<(), Fault> {
    if codes.iter().all(|code| *code == 0) {
        Ok(())
    } else {
        Err(Fault::Malformed("has padding bits that are not zero"))
    }
}
