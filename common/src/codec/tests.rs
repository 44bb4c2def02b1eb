use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

pub(super) fn round_trip(encoding: Encoding, values: &[f32]) -> Vec<f32> {
    let payload = encoding.encode(values);
    let mut decoded = vec![f32::NAN; values.len()];
    encoding.codec().decode(&payload, &mut decoded).unwrap();
    decoded
}

/// Standard normal values by the method of Box and Muller.
pub(super) fn gaussian(random: &mut ChaCha8Rng) -> f32 {
    let (radius, angle) = (1.0 - random.random::<f64>(), std::f64::consts::TAU * random.random::<f64>());
    ((-2.0 * libm::log(radius)).sqrt() * libm::cos(angle)) as f32
}

/// Student's t with 3 degrees of freedom: tails far heavier than a delta's.
pub(super) fn heavy_tailed(random: &mut ChaCha8Rng) -> f32 {
    let square = (0..3).map(|_| gaussian(random).powi(2)).sum::<f32>();
    gaussian(random) / (square / 3.0).sqrt()
}

fn square(values: impl IntoIterator<Item = f32>) -> f64 {
    values.into_iter().map(|value| f64::from(value).powi(2)).sum()
}

pub(super) fn relative_square_error(values: &[f32], decoded: &[f32]) -> f64 {
    square(values.iter().zip(decoded).map(|(value, decoded)| value - decoded))
        / square(values.iter().copied())
}

/// Finite values of any size, zeros and subnormals among them.
fn finite() -> impl Strategy<Value = f32> {
    prop_oneof![
        8 => -1f32..1.0,
        2 => any::<u32>().prop_map(f32::from_bits).prop_filter("finite", |value| value.is_finite()),
        1 => Just(0.0),
        1 => Just(-0.0),
    ]
}

/// Vectors of every length up to a little over a block of most encodings, and some over the largest.
fn any_values() -> impl Strategy<Value = Vec<f32>> {
    prop_oneof![
        6 => prop::collection::vec(finite(), 0..600),
        1 => prop::collection::vec(finite(), 4090..4200),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn fp32_is_exact(values in any_values()) {
        prop_assert_eq!(round_trip(Encoding::Fp32, &values), values);
    }

    #[test]
    fn bf16_is_within_half_a_unit_in_the_last_place(values in any_values()) {
        for (decoded, value) in round_trip(Encoding::Bf16, &values).iter().zip(&values) {
            prop_assert!((decoded - value).abs() <= value.abs() / 256.0 + f32::MIN_POSITIVE);
        }
    }

    #[test]
    fn fp16_is_within_half_a_unit_in_the_last_place_and_saturates(values in any_values()) {
        for (decoded, value) in round_trip(Encoding::Fp16, &values).iter().zip(&values) {
            if value.abs() > 65504.0 {
                prop_assert_eq!(*decoded, 65504f32.copysign(*value));
            } else {
                prop_assert!((decoded - value).abs() <= (value.abs() / 2048.0).max(2f32.powi(-25)));
            }
        }
    }

    #[test]
    fn int8_is_within_half_a_step_of_its_block(values in any_values()) {
        let decoded = round_trip(Encoding::Int8, &values);
        for (decoded, values) in decoded.chunks(64).zip(values.chunks(64)) {
            let largest = values.iter().fold(0f64, |largest, value| largest.max(f64::from(value.abs())));
            // Half a step, and the scale rounded up to bf16.
            let bound = (largest / 254.0 * (1.0 + 1.0 / 128.0)).max(1e-40);
            for (decoded, value) in decoded.iter().zip(values) {
                prop_assert!((f64::from(*decoded) - f64::from(*value)).abs() <= bound, "{} for {} below {}", decoded, value, largest);
            }
        }
    }

    #[test]
    fn e3m0_is_within_a_third_of_a_value_or_a_128th_of_its_block(values in any_values()) {
        let decoded = round_trip(Encoding::E3m0, &values);
        for (decoded, values) in decoded.chunks(128).zip(values.chunks(128)) {
            let largest = values.iter().fold(0f64, |largest, value| largest.max(f64::from(value.abs())));
            for (decoded, value) in decoded.iter().zip(values) {
                let bound = (f64::from(value.abs()) / 3.0).max(largest / 128.0).max(1e-40) * 1.008;
                prop_assert!((f64::from(*decoded) - f64::from(*value)).abs() <= bound, "{} for {} below {}", decoded, value, largest);
            }
        }
    }

    #[test]
    fn what_the_lossiest_encodings_drop_is_less_than_what_they_are_given(
        values in prop::collection::vec(-1f32..1.0, 1..5000),
    ) {
        for encoding in [Encoding::TwoBit, Encoding::TopK] {
            prop_assert!(relative_square_error(&values, &round_trip(encoding, &values)) < 1.0);
        }
    }

    #[test]
    fn finite_values_stay_finite(values in any_values()) {
        for encoding in Encoding::ALL {
            prop_assert!(round_trip(encoding, &values).iter().all(|value| value.is_finite()));
        }
    }

    #[test]
    fn a_chunk_decodes_and_encodes_in_pieces_as_it_does_whole(
        values in prop::collection::vec(finite(), 0..9000),
        cut in 0usize..9000,
    ) {
        for encoding in Encoding::ALL {
            let codec = encoding.codec();
            prop_assert_eq!(TILE_PARAMETERS % codec.block_parameters(), 0);
            let cut = cut.min(values.len()) / codec.block_parameters() * codec.block_parameters();
            let (first, second) = values.split_at(cut);
            let payload = encoding.encode(&values);
            prop_assert_eq!(&payload, &[encoding.encode(first), encoding.encode(second)].concat());
            let (mut whole, mut pieces) = (vec![0.0; values.len()], vec![0.0; values.len()]);
            codec.decode(&payload, &mut whole).unwrap();
            let (first, second) = pieces.split_at_mut(cut);
            let (first_payload, second_payload) = payload.split_at(codec.encoded_bytes(cut));
            codec.decode(first_payload, first).unwrap();
            codec.decode(second_payload, second).unwrap();
            prop_assert_eq!(whole, pieces);
        }
    }

    #[test]
    fn any_bytes_decode_to_finite_values_or_an_error(payload in prop::collection::vec(any::<u8>(), 0..600), length in 0usize..600) {
        for encoding in Encoding::ALL {
            let mut values = vec![0.0; length];
            if encoding.codec().decode(&payload, &mut values).is_ok() {
                prop_assert!(values.iter().all(|value| value.is_finite()));
            }
        }
    }

    /// Of the only length that is looked into: most other bytes are refused unread.
    #[test]
    fn any_bytes_of_the_right_length_decode_to_finite_values_or_an_error(
        noise in prop::collection::vec(any::<u8>(), 1..600),
        length in prop_oneof![0usize..600, 4000usize..4300],
        // Noise alone seldom has scales that are numbers.
        quiet: bool,
    ) {
        for encoding in Encoding::ALL {
            let codec = encoding.codec();
            let mut payload: Vec<u8> = noise.iter().copied().cycle().take(codec.encoded_bytes(length)).collect();
            if quiet {
                payload.iter_mut().for_each(|byte| *byte &= 0x3b);
            }
            let mut values = vec![0.0; length];
            if codec.decode(&payload, &mut values).is_ok() {
                prop_assert!(values.iter().all(|value| value.is_finite()), "{:?}", encoding);
            }
        }
    }

    #[test]
    fn any_text_is_the_name_of_a_form_or_refused(text in "(fp32|bf16|[a-z0-9-]{0,8}|\\PC{0,20})(-update)?") {
        if let Some(encoding) = Encoding::parse(&text) {
            prop_assert_eq!(encoding.name(), &text);
        }
        if let Ok(form) = text.parse::<ModelEncoding>() {
            prop_assert_eq!(form.to_string(), text);
        }
    }

    #[test]
    fn topk_keeps_the_largest_and_of_equal_ones_the_first(
        // Few distinct values, so that most are equal to others.
        values in prop::collection::vec((-6i8..7).prop_map(f32::from), 0..5000),
    ) {
        let decoded = round_trip(Encoding::TopK, &values);
        for (decoded, values) in decoded.chunks(4096).zip(values.chunks(4096)) {
            let mut expected: Vec<usize> = (0..values.len()).collect();
            expected.sort_by(|a, b| values[*b].abs().total_cmp(&values[*a].abs()));
            expected.truncate(values.len().div_ceil(64));
            for (position, (decoded, value)) in decoded.iter().zip(values).enumerate() {
                let kept = expected.contains(&position);
                prop_assert_eq!(*decoded != 0.0, kept && *value != 0.0, "position {}", position);
                prop_assert!(*decoded == 0.0 || decoded.signum() == value.signum());
            }
        }
    }
}

#[test]
fn sizes_are_exact_for_every_length() {
    let expected = |encoding, n: usize| -> usize {
        let last = |block: usize, bytes: fn(usize) -> usize| {
            n / block * bytes(block) + if n.is_multiple_of(block) { 0 } else { bytes(n % block) }
        };
        match encoding {
            Encoding::Fp32 => 4 * n,
            Encoding::Bf16 | Encoding::Fp16 => 2 * n,
            Encoding::Int8 => last(64, |n| 2 + n),
            Encoding::E3m0 => last(128, |n| 2 + n.div_ceil(2)),
            Encoding::TwoBit => last(256, |n| 4 + n.div_ceil(4)),
            Encoding::TopK => {
                last(4096, |n| 4 + (n.div_ceil(64) * 12).div_ceil(8) + (n.div_ceil(64) * 2).div_ceil(8))
            }
        }
    };
    for encoding in Encoding::ALL {
        for length in (0..1100).chain(4000..4400).chain([1 << 18, (1 << 18) + 1]) {
            assert_eq!(
                encoding.codec().encoded_bytes(length),
                expected(encoding, length),
                "{encoding:?} {length}"
            );
        }
    }
    assert_eq!(Encoding::TopK.codec().encoded_bytes(1 << 18), 7424);
}

#[test]
fn every_length_comes_back_and_no_other_length_is_taken() {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    let values: Vec<f32> = (0..4300).map(|_| gaussian(&mut random)).collect();
    for encoding in Encoding::ALL {
        for length in (0..300).chain(4090..4110) {
            let values = &values[..length];
            let decoded = round_trip(encoding, values);
            assert!(length == 0 || relative_square_error(values, &decoded) < 1.0, "{encoding:?} {length}");
            let mut payload = encoding.encode(values);
            payload.push(0);
            let longer = encoding.codec().decode(&payload, &mut vec![0.0; length]);
            assert!(matches!(longer, Err(DecodeError::Length { .. })), "{encoding:?} {length}");
            payload.truncate(payload.len().saturating_sub(2));
            let shorter = encoding.codec().decode(&payload, &mut vec![0.0; length]);
            assert_eq!(shorter.is_err(), length > 0, "{encoding:?} {length}");
        }
    }
}

#[test]
fn wire_ratios_leave_room_for_the_transport() {
    // Ratio to fp32 at the default chunk, with what the transport may take on top.
    for (encoding, overhead, least) in [
        (Encoding::Bf16, 1.0, 2.0),
        (Encoding::Fp16, 1.0, 2.0),
        (Encoding::Int8, 1.01, 3.8),
        (Encoding::E3m0, 1.01, 7.5),
        (Encoding::TwoBit, 1.01, 14.0),
        (Encoding::TopK, 1.03, 130.0),
    ] {
        let ratio = (4 << 18) as f64 / (encoding.codec().encoded_bytes(1 << 18) as f64 * overhead);
        assert!(ratio >= least, "{encoding:?}: {ratio}");
    }
}

#[test]
fn values_that_are_not_finite_are_refused() {
    for encoding in Encoding::ALL {
        for bad in [
            f32::NAN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::from_bits(0x7f80_0001),
            f32::from_bits(u32::MAX),
        ] {
            let payload = encoding.encode(&[0.0, 1.0, bad, 2.0]);
            let error = encoding.codec().decode(&payload, &mut [0.0; 4]).unwrap_err();
            match encoding {
                Encoding::Fp32 | Encoding::Bf16 | Encoding::Fp16 => {
                    assert!(matches!(error, DecodeError::NotFinite { position: 2, .. }), "{error}");
                }
                Encoding::Int8 | Encoding::E3m0 | Encoding::TwoBit | Encoding::TopK => {
                    assert!(matches!(error, DecodeError::Scale { position: 0, .. }), "{error}");
                }
            }
            let mut values = vec![0.5; 10_000];
            values[9_999] = bad;
            let error =
                encoding.codec().decode(&encoding.encode(&values), &mut vec![0.0; 10_000]).unwrap_err();
            let block = encoding.codec().block_parameters();
            let expected = 9_999 / block * block;
            assert!(
                matches!(error, DecodeError::NotFinite { position, .. } | DecodeError::Scale { position, .. } if position == expected),
                "{error}"
            );
        }
    }
}

#[test]
fn scales_that_no_encoder_writes_are_refused() {
    for (encoding, scales) in
        [(Encoding::Int8, 1), (Encoding::E3m0, 1), (Encoding::TwoBit, 2), (Encoding::TopK, 2)]
    {
        let values = [0.25; 70];
        for (scale, bad) in (0..scales)
            .flat_map(|scale| [0x7f80_u16, 0xff80, 0x7fc0, 0x8000, 0xbf80, 0x7fff].map(|bad| (scale, bad)))
        {
            let mut payload = encoding.encode(&values);
            payload[2 * scale..2 * scale + 2].copy_from_slice(&bad.to_le_bytes());
            let error = encoding.codec().decode(&payload, &mut [0.0; 70]).unwrap_err();
            assert!(matches!(error, DecodeError::Scale { position: 0, .. }), "{encoding:?} {bad:x}: {error}");
        }
    }
    // Finite, but 127 of it is not.
    let mut payload = Encoding::Int8.encode(&[1.0]);
    payload[..2].copy_from_slice(&0x7f00_u16.to_le_bytes());
    let error = Encoding::Int8.codec().decode(&payload, &mut [0.0]).unwrap_err();
    assert!(matches!(error, DecodeError::Scale { .. }), "{error}");
}

#[test]
fn bits_that_no_encoder_writes_are_refused() {
    let refused = |encoding: Encoding, parameters: usize, change: fn(&mut [u8])| {
        let values = vec![1.0; parameters];
        let mut payload = encoding.encode(&values);
        change(&mut payload);
        let error = encoding.codec().decode(&payload, &mut vec![0.0; parameters]).unwrap_err();
        assert!(matches!(error, DecodeError::Malformed { position: 0, .. }), "{encoding:?}: {error}");
    };
    refused(Encoding::Int8, 3, |payload| payload[4] = 0x80);
    refused(Encoding::E3m0, 4, |payload| payload[2] = 0x78);
    refused(Encoding::E3m0, 4, |payload| payload[3] = 0x87);
    // Padding: the upper half of the last byte; codes 5, 6 and 7 of 8; positions' and codes' last bits.
    refused(Encoding::E3m0, 3, |payload| payload[3] |= 0x10);
    for bit in [5, 6, 7] {
        let mut payload = Encoding::TwoBit.encode(&[1.0; 5]);
        payload[4 + bit % 2] |= 1 << (2 * (bit / 2));
        let error = Encoding::TwoBit.codec().decode(&payload, &mut [0.0; 5]).unwrap_err();
        assert!(matches!(error, DecodeError::Malformed { .. }), "{error}");
    }
    refused(Encoding::TopK, 64, |payload| payload[5] |= 0x10);
    refused(Encoding::TopK, 64, |payload| payload[6] |= 0x04);
    // Positions: 0 and 1 as encoded; the same twice; falling; beyond the block.
    refused(Encoding::TopK, 128, |payload| payload[4..7].copy_from_slice(&[1, 0x10, 0]));
    refused(Encoding::TopK, 128, |payload| payload[4..7].copy_from_slice(&[2, 0x10, 0]));
    refused(Encoding::TopK, 128, |payload| payload[4..7].copy_from_slice(&[2, 0x00, 8]));
}

/// Pins the wire format: 5 values, no encoding's whole block.
#[test]
fn a_small_chunk_has_these_bytes() {
    let values = [1.0, -0.5, 0.0, 0.3, -2.0];
    let hex = |encoding: Encoding| {
        encoding.encode(&values).iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(hex(Encoding::Fp32), "00 00 80 3f 00 00 00 bf 00 00 00 00 9a 99 99 3e 00 00 00 c0");
    assert_eq!(hex(Encoding::Bf16), "80 3f 00 bf 00 00 9a 3e 00 c0");
    assert_eq!(hex(Encoding::Fp16), "00 3c 00 b8 00 00 cd 34 00 c0");
    // Scale 2 / 127 rounded up: 0x3c82 = 0.015869140625; codes 63, -32, 0, 19, -126.
    assert_eq!(hex(Encoding::Int8), "82 3c 3f e0 00 13 82");
    // Scale 2; 1/2, -1/4, 0 | 1/8 (0.15), -1.
    assert_eq!(hex(Encoding::E3m0), "00 40 46 fd 00");
    // Low 4/15 = mean of 0.5, 0, 0.3; high 1.5; codes 1, 2, 0, 0, 3: byte 0 has 0, 2, 4, byte 1 has 1, 3.
    assert_eq!(hex(Encoding::TwoBit), "89 3e c0 3f 31 02");
    // Low (as if alone, all on one side) 0 or 2; position 4; negative.
    assert_eq!(hex(Encoding::TopK), "00 00 00 40 04 00 03");
}

/// Digests of payloads and of what they decode to, made by code without any vector instructions beyond the
/// architecture's least. A processor that runs a wider version must get the same.
#[test]
fn every_processor_gives_the_same_bits() {
    let mut random = ChaCha8Rng::seed_from_u64(2);
    let values: Vec<f32> = (0..20_000).map(|_| heavy_tailed(&mut random) * 1e-4).collect();
    let digests = Encoding::ALL.map(|encoding| {
        let decoded: Vec<u8> =
            round_trip(encoding, &values).iter().flat_map(|value| value.to_le_bytes()).collect();
        let [payload, decoded] =
            [encoding.encode(&values), decoded].map(|bytes| blake3::hash(&bytes).to_hex()[..16].to_owned());
        format!("{} {payload} {decoded}", encoding.name())
    });
    assert_eq!(
        digests,
        [
            "fp32 ab54314e20ae4265 ab54314e20ae4265",
            "bf16 85125b3a8facde2d 43d73877aa5fe0cb",
            "fp16 d92b586b7aa862d9 2d86eaf9e1930b86",
            "int8 a11853402e9dc97b 85e5c14e5f3ad6eb",
            "e3m0 6766e9f31adb41ee 9915896a797c93b0",
            "2bit 950fe588c65fe1d2 eb281d705fffd07d",
            "topk ab0b55be1d636ab9 5ed90257b469eb3b",
        ]
    );
}

#[test]
fn the_error_on_gaussian_values_is_what_the_encodings_say() {
    let mut random = ChaCha8Rng::seed_from_u64(3);
    let values: Vec<f32> = (0..1 << 16).map(|_| gaussian(&mut random) * 1e-3).collect();
    for (encoding, least, most) in [
        (Encoding::Bf16, 1e-6, 4e-6),
        (Encoding::Fp16, 1e-9, 1e-6),
        (Encoding::Int8, 1e-5, 6e-5),
        (Encoding::E3m0, 0.035, 0.039),
        (Encoding::TwoBit, 0.110, 0.120),
        (Encoding::TopK, 0.87, 0.89),
    ] {
        let error = relative_square_error(&values, &round_trip(encoding, &values));
        assert!((least..most).contains(&error), "{encoding:?}: {error}");
    }
}

#[test]
fn damaged_payloads_of_every_length_never_panic_and_never_decode_to_what_is_not_finite() {
    let mut random = ChaCha8Rng::seed_from_u64(7);
    let mut values = vec![0.0; 9000];
    let mut accepted = 0;
    for round in 0..3000 {
        let length = if round % 8 == 0 { random.random_range(0..9000) } else { random.random_range(0..700) };
        let encoding = Encoding::ALL[round % Encoding::ALL.len()];
        let input: Vec<f32> = (0..length).map(|_| gaussian(&mut random)).collect();
        let mut payload = encoding.encode(&input);
        for _ in 0..random.random_range(0..4) {
            if !payload.is_empty() {
                let at = random.random_range(0..payload.len());
                payload[at] ^= 1 << random.random_range(0..8);
            }
        }
        let decoded = &mut values[..length];
        if encoding.codec().decode(&payload, decoded).is_ok() {
            accepted += 1;
            assert!(decoded.iter().all(|value| value.is_finite()), "{encoding:?} {length}");
        }
    }
    assert!(accepted > 1000, "only {accepted} were accepted: the test tests little");
}

#[test]
fn names_are_those_of_the_specification() {
    for encoding in Encoding::ALL {
        assert_eq!(serde_json::to_value(encoding).unwrap(), encoding.name());
        assert_eq!(Encoding::parse(encoding.name()), Some(encoding));
    }
    assert_eq!(Encoding::parse("fp64"), None);
}
