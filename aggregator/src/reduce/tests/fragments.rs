//! Rounds that synchronise a part of the model.

use consort_common::fragment::Fragment;

use super::{broadcast::forms, *};

const FRAGMENTS: u32 = 3;
/// Nine chunks, the last of which is shorter.
const PARAMETERS: usize = 9_000;
const CHUNK: u32 = 1_100;

fn wave(length: usize, seed: u32) -> Vec<f32> {
    (0..length).map(|at| ((at as f32 + seed as f32 * 13.0) * 0.61).sin() * 0.1).collect()
}

fn part(fragment: Fragment, values: &[f32]) -> Vec<f32> {
    fragment.slices(values).collect::<Vec<_>>().concat()
}

/// Takes over the chunks of the round's fragment, as a site does that holds the version before.
fn receive(version: &ModelVersion, fragment: Fragment, held: &mut [f32]) {
    for (index, held) in (0..).zip(fragment.slices_mut(held)) {
        let chunk = fragment.chunk(index);
        let mut values = vec![0.0; held.len()];
        if let Some(encoding) = version.update_encoding() {
            encoding.codec().decode(&version.update_chunk(chunk).unwrap().0, &mut values).unwrap();
            held.iter_mut().zip(values).for_each(|(held, update)| *held += update);
        } else {
            version.encoding().codec().decode(&version.chunk(chunk).unwrap().0, held).unwrap();
        }
    }
    assert_eq!(Digest::of(&bytes(held)), version.digest());
}

#[test]
fn a_fragment_goes_through_its_rounds_as_a_model_of_its_own() {
    let initial = wave(PARAMETERS, 0);
    for (form, optimizer) in forms().into_iter().flat_map(|form| [(form, NESTEROV), (form, FEDADAM)]) {
        let new =
            |initial: &[f32]| Fixture::with_form(initial, CHUNK, Encoding::Int8, optimizer.clone(), form);
        let mut fixture = new(&initial);
        fixture.layout.fragments = FRAGMENTS;
        let fragments: Vec<Fragment> = (1..=FRAGMENTS).map(|round| fixture.layout.fragment(round)).collect();
        let models: Vec<Fixture> = fragments.iter().map(|one| new(&part(*one, &initial))).collect();
        let mut held = fixture.parameters(0);
        let mut versions = [0; FRAGMENTS as usize];
        for round in 1..=FRAGMENTS + 1 {
            let turn = ((round - 1) % FRAGMENTS) as usize;
            let fragment = fragments[turn];
            let deltas = [1, 2].map(|site| wave(fragment.plan().parameters() as usize, round * 7 + site));
            let deliver = |fixture: &Fixture, round| -> Vec<_> {
                let sites = ["a", "b"].into_iter().zip([1.0, 2.5]).zip(&deltas);
                sites.map(|((site, weight), delta)| fixture.deliver(round, site, weight, delta)).collect()
            };
            let whole = fixture.reduce(round - 1, &deliver(&fixture, round)).unwrap();
            versions[turn] += 1;
            let model = &models[turn];
            let alone = model.reduce(versions[turn] - 1, &deliver(model, versions[turn])).unwrap();
            // Sums of squares are added piece by piece, and the pieces of the two models may differ.
            let close = |a: f64, b: f64| (a - b).abs() <= 1e-12 * a;
            assert!(close(whole.delta_norm, alone.delta_norm), "{form}");
            assert!(close(whole.update_norm, alone.update_norm), "{form}");
            assert_eq!(whole.statistics.update_cosine, None, "these updates are of different parameters");

            let parameters = fixture.parameters(round);
            for ((fragment, model), version) in fragments.iter().zip(&models).zip(versions) {
                assert_eq!(part(*fragment, &parameters), model.parameters(version), "{form}, round {round}");
            }
            receive(&whole.version, fragment, &mut held);
        }
    }
}

#[test]
fn a_delta_of_the_whole_model_does_not_fit_a_round_of_a_fragment() {
    let mut fixture = Fixture::new(&wave(PARAMETERS, 0), CHUNK, Encoding::Fp32, NESTEROV);
    let contribution = fixture.deliver(1, "a", 1.0, &wave(PARAMETERS, 1));
    let whole = fixture.spooled(&contribution.key);
    fixture.layout.fragments = FRAGMENTS;
    let shares = vec![Share { delta: whole, weight: 1.0 }];
    let (rule, tensors) = (Aggregation::default(), fixture.tensors());
    let begun = RoundFold::begin(shares, fixture.base(0), NESTEROV, &rule, tensors, &fixture.models);
    let error = begun.unwrap_err();
    assert!(matches!(error, ReduceError::Unfit { .. }), "{error}");
}
