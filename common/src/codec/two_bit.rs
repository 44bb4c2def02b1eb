//! `2bit`: blocks of 256 values; a block is two magnitudes, low and high, then 2 bits per value: the sign
//! above, whether the magnitude is the high one below. 68 bytes per block, 15.06 times less than fp32.
//!
//! The magnitudes (bf16, see `scale.rs`) are means over their values, found as `split.rs` says. That 2-bit
//! codes whose levels are the means of their bins train nearly as well as fp32, with error feedback, is a finding
//! of MuLoCo: Thérien et al., arXiv 2505.23725. Their published code makes four bins, 1.5 standard deviations
//! wide, the third around the mean, each with its mean. Two magnitudes and a sign, with a threshold that
//! follows the values, take half as many bytes for levels and lose less. Squared error over the square of the
//! values, both in blocks of 256 (`signs_and_two_magnitudes_lose_less_than_four_bins`):
//!
//! | values | four bins | this |
//! |---|---|---|
//! | Gaussian | 0.178 | 0.116 |
//! | Laplace | 0.202 | 0.171 |
//! | Student's t, 3 degrees of freedom | 0.262 | 0.244 |
//!
//! There is no zero among the levels, and no bound on the error of a single value but the high magnitude or
//! its own; the error of a block is never more than the square of its values. What is lost is sent in later
//! rounds (`feedback.rs`), and what stays of an error per round is 0.9, as in the runs of MuLoCo.
//!
//! Code j of a block of n is in byte j mod q with q = ceil(n / 4), in the bits from 2 * (j div q) on. The
//! last block has the values that are left; codes beyond them are zero.

use multiversion::multiversion;

use super::{
    DecodeError, DeltaCodec, Fault, INFINITY, MAGNITUDE,
    blocks::{self, Block},
    check_length, largest_magnitude, scale,
    split::split,
};

const BLOCK: usize = 256;
const HEAD_BYTES: usize = 2 * scale::BYTES;
const BLOCK_BYTES: usize = HEAD_BYTES + BLOCK / 4;

/// What stays of an error from one round to the next: `error_decay` in the configurations that the authors
/// of MuLoCo published with their code.
pub(super) const ERROR_DECAY: f32 = 0.9;

const HIGH: u8 = 1;
const NEGATIVE: u8 = 2;

pub(super) struct TwoBit;

impl DeltaCodec for TwoBit {
    fn encoded_bytes(&self, parameters: usize) -> usize {
        // The values of a whole block fill its bytes.
        parameters.div_ceil(BLOCK) * HEAD_BYTES + parameters.div_ceil(4)
    }

    fn block_parameters(&self) -> usize {
        BLOCK
    }

    fn encode(&self, values: &[f32], payload: &mut [u8]) {
        encode(values, payload);
    }

    fn decode(&self, payload: &[u8], values: &mut [f32]) -> Result<(), DecodeError> {
        check_length(payload, self.encoded_bytes(values.len()))?;
        decode(payload, values)
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+bmi2", "x86_64+avx2+bmi2"))]
fn encode(values: &[f32], payload: &mut [u8]) {
    blocks::encode(&mut TwoBit, values, payload);
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512vl+bmi2", "x86_64+avx2+bmi2"))]
fn decode(payload: &[u8], values: &mut [f32]) -> Result<(), DecodeError> {
    blocks::decode::<BLOCK, BLOCK_BYTES, TwoBit>(payload, values)
}

impl Block<BLOCK, BLOCK_BYTES> for TwoBit {
    #[inline(always)]
    fn encode_block(&mut self, values: &[f32], bytes: &mut [u8]) {
        let (head, packed) = bytes.split_at_mut(HEAD_BYTES);
        let (low, high) = head.split_at_mut(scale::BYTES);
        if largest_magnitude(values) >= INFINITY {
            low.copy_from_slice(&scale::NOT_FINITE);
            high.copy_from_slice(&scale::NOT_FINITE);
            return packed.fill(0);
        }
        let mut magnitudes = [0.0; BLOCK];
        for (magnitude, value) in magnitudes.iter_mut().zip(values) {
            *magnitude = f32::from_bits(value.to_bits() & MAGNITUDE);
        }
        let split = split(&magnitudes, values.len());
        low.copy_from_slice(&split.scales[0]);
        high.copy_from_slice(&split.scales[1]);
        let mut codes = [0; BLOCK];
        for ((code, value), magnitude) in codes.iter_mut().zip(values).zip(&magnitudes) {
            *code =
                if *magnitude > split.threshold { HIGH } else { 0 } | if *value < 0.0 { NEGATIVE } else { 0 };
        }
        blocks::pack::<4>(&codes[..packed.len() * 4], packed);
    }

    #[inline(always)]
    fn decode_block(bytes: &[u8], values: &mut [f32]) -> Result<(), Fault> {
        let (head, packed) = bytes.split_at(HEAD_BYTES);
        let low = scale::read([head[0], head[1]], scale::LARGEST)?.to_bits();
        let high = scale::read([head[2], head[3]], scale::LARGEST)?.to_bits();
        let mut codes = [0; BLOCK];
        let codes = &mut codes[..packed.len() * 4];
        blocks::unpack::<4>(packed, codes);
        blocks::check_padding(&codes[values.len()..])?;
        for (value, code) in values.iter_mut().zip(&*codes) {
            let magnitude = if code & HIGH == 0 { low } else { high };
            *value = f32::from_bits(magnitude | u32::from(code & NEGATIVE) << 30);
        }
        Ok(())
    }
}
