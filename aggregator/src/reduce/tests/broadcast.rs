//! The forms in which versions reach the sites.

use super::*;

pub(super) fn forms() -> Vec<ModelEncoding> {
    let updates = Encoding::ALL.map(ModelEncoding::Update);
    [ModelEncoding::Fp32, ModelEncoding::Bf16].into_iter().chain(updates).collect()
}

fn decoded(encoding: Encoding, values: &[f32]) -> Vec<f32> {
    let mut decoded = vec![0.0; values.len()];
    encoding.codec().decode(&encoding.encode(values), &mut decoded).unwrap();
    decoded
}

/// Every round of one chunk of a model, written as plainly as can be, in the stated order and precision.
fn reference(
    form: ModelEncoding,
    optimizer: &OuterOptimizer,
    initial: &[f32],
    rounds: &[WeightedDeltas],
) -> Vec<Vec<f32>> {
    let mut p = if form == ModelEncoding::Bf16 { decoded(Encoding::Bf16, initial) } else { initial.to_vec() };
    let mut r: Vec<f32> = initial.iter().zip(&p).map(|(x, p)| x - p).collect();
    let mut moments = vec![ReferenceMoments::new(optimizer); initial.len()];
    let mut versions = vec![p.clone()];
    for deltas in rounds {
        let total: f64 = deltas.iter().map(|(weight, _)| weight).sum();
        let mut x = Vec::new();
        for i in 0..p.len() {
            let mean: f64 =
                deltas.iter().fold(0.0, |sum, (weight, delta)| sum + weight / total * f64::from(delta[i]));
            let d = f64::from(mean as f32);
            let start = match form.residual_decay() {
                Some(decay) => f64::from(p[i]) + f64::from(decay) * f64::from(r[i]),
                None => f64::from(p[i]),
            };
            x.push(moments[i].step(optimizer, start, d));
        }
        p = match form {
            ModelEncoding::Fp32 => x.clone(),
            ModelEncoding::Bf16 => decoded(Encoding::Bf16, &x),
            ModelEncoding::Update(encoding) => {
                let change: Vec<f32> = x.iter().zip(&p).map(|(x, p)| x - p).collect();
                p.iter().zip(decoded(encoding, &change)).map(|(p, u)| p + u).collect()
            }
        };
        r = x.iter().zip(&p).map(|(x, p)| x - p).collect();
        versions.push(p.clone());
    }
    versions
}

/// Values and rounds that take several tiles and a rest.
fn run_of_rounds(length: usize) -> (Vec<f32>, Vec<WeightedDeltas>) {
    let wave = |seed: usize| -> Vec<f32> {
        (0..length)
            .map(|at| ((at * 7 + seed * 13) as f32 * 0.61).sin() * 2f32.powi(-((at % 9) as i32)))
            .collect()
    };
    let rounds = (1..4).map(|round| vec![(1.0, wave(round)), (2.5, wave(round * 5))]).collect();
    (wave(0), rounds)
}

#[test]
fn every_form_follows_the_reference_and_reaches_its_receivers_bit_by_bit() {
    const LENGTH: usize = 9_000;
    let (initial, rounds) = run_of_rounds(LENGTH);
    for form in forms() {
        for optimizer in OPTIMIZERS {
            let chunk = LENGTH as u32;
            let fixture = Fixture::with_form(&initial, chunk, Encoding::Fp32, optimizer.clone(), form);
            let expected = reference(form, &optimizer, &initial, &rounds);
            assert_eq!(fixture.parameters(0), expected[0], "{form}");
            for (round, (deltas, expected)) in (1..).zip(rounds.iter().zip(&expected[1..])) {
                let contributions: Vec<_> = ["a", "b"]
                    .iter()
                    .zip(deltas)
                    .map(|(site, (weight, delta))| fixture.deliver(round, site, *weight, delta))
                    .collect();
                fixture.reduce(round - 1, &contributions).unwrap();
                assert_eq!(fixture.parameters(round), *expected, "{form}, round {round}");
            }
        }
    }
}

/// Decodes what is sent, as a site does, and compares its digest with the version's.
fn receive(fixture: &Fixture, version: u32, held: &mut Vec<f32>) {
    let version = fixture.base(version);
    let mut whole = Vec::new();
    for index in 0..version.plan().chunks() {
        let (payload, digest) = version.chunk(index).unwrap();
        assert_eq!(Digest::of(&payload), digest);
        let mut values = vec![0.0; version.plan().length(index).unwrap()];
        version.encoding().codec().decode(&payload, &mut values).unwrap();
        whole.extend(values);
    }
    assert_eq!(Digest::of(&bytes(&whole)), version.digest());

    match version.update_encoding() {
        None => {
            assert!(matches!(version.update_chunk(0), Err(ModelError::NoUpdate { .. })));
            *held = whole;
        }
        Some(encoding) => {
            for index in 0..version.plan().chunks() {
                let (payload, digest) = version.update_chunk(index).unwrap();
                assert_eq!(Digest::of(&payload), digest);
                let range = version.plan().range(index).unwrap();
                let held = &mut held[range.start as usize..range.end as usize];
                let mut update = vec![0.0; held.len()];
                encoding.codec().decode(&payload, &mut update).unwrap();
                held.iter_mut().zip(update).for_each(|(held, update)| *held += update);
            }
            assert_eq!(Digest::of(&bytes(held)), version.digest());
        }
    }
}

#[test]
fn a_receiver_that_goes_from_version_to_version_holds_what_was_committed() {
    let (initial, rounds) = run_of_rounds(9_000);
    for form in forms() {
        // Chunks that are no multiple of a tile, nor of any block.
        let fixture = Fixture::with_form(&initial, 4_099, Encoding::Bf16, NESTEROV, form);
        let mut held = Vec::new();
        receive(&fixture, 0, &mut held);
        for (round, deltas) in (1..).zip(&rounds) {
            let contributions: Vec<_> = ["a", "b"]
                .iter()
                .zip(deltas)
                .map(|(site, (weight, delta))| fixture.deliver(round, site, *weight, delta))
                .collect();
            let reduction = fixture.reduce(round - 1, &contributions).unwrap();
            receive(&fixture, round, &mut held);
            assert_eq!(Digest::of(&bytes(&held)), reduction.version.digest(), "{form}, round {round}");
        }
    }
}

/// Steps of a quarter of bf16's unit at 1: without the residual the version would never move.
#[test]
fn what_bf16_drops_is_not_lost() {
    let form = ModelEncoding::Bf16;
    let fixture = Fixture::with_form(&[1.0; 4], 4, Encoding::Fp32, OuterOptimizer::FedAvg {}, form);
    let step = 2f32.powi(-9);
    for round in 1..=16 {
        let contribution = fixture.deliver(round, "north", 1.0, &[step; 4]);
        fixture.reduce(round - 1, &[contribution]).unwrap();
    }
    assert_eq!(fixture.parameters(16), [1.0 + 16.0 * step; 4]);
}

#[test]
fn an_update_that_overflows_is_refused_with_the_parameter() {
    let form = ModelEncoding::Update(Encoding::Int8);
    let fixture = Fixture::with_form(&[f32::MAX; 6], 4, Encoding::Fp32, OuterOptimizer::FedAvg {}, form);
    let contribution = fixture.deliver(1, "north", 1.0, &[0.0, 0.0, 0.0, 0.0, 0.0, f32::MAX]);
    let error = fixture.reduce(0, &[contribution]).unwrap_err();
    assert!(matches!(error, ReduceError::NotFinite { version: 1, parameter: 5 }), "{error}");
}
