//! Folding chunks while others are still to come.

use super::*;

const SITES: [&str; 3] = ["east", "north", "south"];

/// A round of three sites, of which nothing has come yet: 10 values in 3 chunks.
fn fixture() -> Fixture {
    Fixture::new(&[0.5; 10], 4, Encoding::Fp32, NESTEROV)
}

fn delta(site: &str) -> Vec<f32> {
    (0..10u8).map(|at| f32::from(at) * 0.37 - f32::from(site.len() as u8)).collect()
}

fn weight(site: &str) -> f64 {
    1.0 + site.len() as f64 / 3.0
}

fn begin(fixture: &Fixture) -> RoundFold {
    let shares = SITES.map(|site| Share { delta: fixture.spooled(&key(1, site)), weight: weight(site) });
    let (rule, tensors) = (Aggregation::default(), fixture.tensors());
    RoundFold::begin(shares.to_vec(), fixture.base(0), NESTEROV, &rule, tensors, &fixture.models).unwrap()
}

fn put(fixture: &Fixture, site: &str, index: u32) {
    fixture.put(&key(1, site), index, &fixture.payload(&delta(site), index));
}

fn put_all(fixture: &Fixture) {
    for site in SITES {
        (0..3).for_each(|index| put(fixture, site, index));
    }
}

fn accepted(fixture: &Fixture) -> Vec<WeightedContribution> {
    SITES.map(|site| fixture.accepted(key(1, site), weight(site))).to_vec()
}

#[test]
fn chunks_folded_before_the_rest_has_come_give_the_same_version() {
    let fixture = fixture();
    let fold = begin(&fixture);
    for index in [2, 0] {
        assert!(fold.fold_delta(index).is_err(), "nothing has come");
        SITES.iter().rev().for_each(|site| put(&fixture, site, index));
        fold.fold_delta(index).unwrap();
        fold.fold_delta(index).unwrap();
    }
    SITES.iter().for_each(|site| put(&fixture, site, 1));
    let mut contributions = accepted(&fixture);
    contributions.reverse();
    let early = fold.finish(&contributions).unwrap();
    let late = fixture.reduce(0, &contributions).unwrap();
    assert_eq!(early.version.digest(), late.version.digest());
    assert_eq!((early.delta_norm, early.update_norm), (late.delta_norm, late.update_norm));
}

#[test]
fn a_round_that_is_given_up_leaves_nothing() {
    let fixture = fixture();
    put_all(&fixture);
    let fold = begin(&fixture);
    fold.fold_delta(1).unwrap();
    drop(fold);
    let names: Vec<_> = std::fs::read_dir(fixture.folder.path().join("models/pilot"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["0"]);
}

#[test]
fn a_chunk_that_was_sent_again_after_it_was_folded_is_noticed() {
    let fixture = fixture();
    put_all(&fixture);
    let fold = begin(&fixture);
    fold.fold_delta(0).unwrap();
    fixture.put(&key(1, "north"), 0, &bytes(&[3.0; 4]));
    let error = fold.finish(&accepted(&fixture)).unwrap_err();
    assert!(matches!(&error, ReduceError::OtherDelta { key, .. } if key.site.as_str() == "north"), "{error}");
    assert_eq!(fixture.models.versions(&run()).unwrap(), [0]);
    fixture.reduce(0, &accepted(&fixture)).unwrap();
}

#[test]
fn a_round_that_turned_out_otherwise_is_not_finished() {
    let fixture = fixture();
    put_all(&fixture);
    let contributions = accepted(&fixture);
    let other_weight = WeightedContribution { weight: 1.5, ..contributions[0].clone() };
    for others in
        [contributions[..2].to_vec(), vec![other_weight, contributions[1].clone(), contributions[2].clone()]]
    {
        let fold = begin(&fixture);
        assert!(!fold.is_of(&others));
        let error = fold.finish(&others).unwrap_err();
        assert!(matches!(error, ReduceError::OtherContributions { round: 1 }), "{error}");
    }
    assert!(begin(&fixture).is_of(&contributions));
}

#[test]
fn deltas_in_different_encodings_are_averaged_as_what_they_decode_to() {
    let mut fixture = Fixture::new(&[0.0; 10_000], 4096 + 100, Encoding::Fp32, OuterOptimizer::FedAvg {});
    let delta: Vec<f32> = (0..10_000u16).map(|at| (f32::from(at) * 0.01).sin()).collect();
    let mut expected = vec![0.0f64; delta.len()];
    let mut norms = Vec::new();
    let contributions: Vec<_> = Encoding::ALL
        .iter()
        .enumerate()
        .map(|(site, encoding)| {
            fixture.encoding = *encoding;
            let contribution = fixture.deliver(1, &format!("site-{site}"), 1.0, &delta);
            let weight = 1.0 / Encoding::ALL.len() as f64;
            let decoded = after_the_wire(*encoding, 4096 + 100, &delta);
            norms.push(decoded.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt());
            for (sum, value) in expected.iter_mut().zip(decoded) {
                *sum += weight * f64::from(value);
            }
            contribution
        })
        .collect();
    let treatments = fixture.reduce(0, &contributions).unwrap().treatments;
    let expected: Vec<f32> = expected.into_iter().map(|sum| sum as f32).collect();
    assert_eq!(fixture.parameters(1), expected);
    // In this order none is beside another of its encoding, so that all are decoded.
    for (treatment, norm) in treatments.iter().zip(norms) {
        let found = treatment.norm.unwrap();
        assert!((found / norm - 1.0).abs() < 1e-12, "{}: {found}, not {norm}", treatment.site);
    }
}

#[test]
fn the_canonical_order_is_by_site_and_then_by_round() {
    let fixture = Fixture::new(&[0.0; 10], 4, Encoding::Fp32, OuterOptimizer::FedAvg {});
    let deliver = |round, site| fixture.deliver(round, site, 1.0, &[0.25; 10]);
    fixture.reduce(0, &[deliver(1, "south")]).unwrap();
    let deltas = [deliver(2, "south"), deliver(2, "north"), deliver(1, "north"), deliver(2, "east")];
    let reduction = fixture.reduce(1, &deltas).unwrap();
    let order: Vec<_> = reduction.treatments.iter().map(|one| (one.site.as_str(), one.round)).collect();
    assert_eq!(order, [("east", 2), ("north", 1), ("north", 2), ("south", 2)]);
}
