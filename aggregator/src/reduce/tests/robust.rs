//! Rules for sites that are not fully trusted, each against its definition in f64 over whole deltas.

use super::*;

const CLIPPED: Aggregation = Aggregation::ClippedMean { factor: 1.0 };
const TRIMMED: Aggregation = Aggregation::TrimmedMean { fraction: 0.25 };
const MEDIAN: Aggregation = Aggregation::Median {};
const KRUM: Aggregation = Aggregation::Krum { hostile: 1 };
const MULTI_KRUM: Aggregation = Aggregation::MultiKrum { hostile: 1, selected: 0 };
const RULES: [Aggregation; 5] = [CLIPPED, TRIMMED, MEDIAN, KRUM, MULTI_KRUM];

fn square_distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (f64::from(*a) - f64::from(*b)).powi(2)).sum()
}

fn weighted_mean(deltas: &[(f64, &[f32])], total: f64) -> Vec<f64> {
    let length = deltas[0].1.len();
    let value = |at: usize| deltas.iter().map(|(weight, delta)| weight / total * f64::from(delta[at])).sum();
    (0..length).map(value).collect()
}

/// What the papers define, as plainly as can be.
fn reference_mean(rule: &Aggregation, deltas: &WeightedDeltas) -> Vec<f64> {
    let all: Vec<(f64, &[f32])> = deltas.iter().map(|(weight, delta)| (*weight, &delta[..])).collect();
    let total = all.iter().map(|(weight, _)| weight).sum::<f64>();
    let n = all.len();
    let column = |at: usize| {
        let mut values: Vec<f64> = all.iter().map(|(_, delta)| f64::from(delta[at])).collect();
        values.sort_by(f64::total_cmp);
        values
    };
    let columns = 0..all[0].1.len();
    let ranked = |hostile: usize| {
        let score = |at: usize| -> f64 {
            let others = (0..n).filter(|other| *other != at);
            let mut distances: Vec<f64> =
                others.map(|other| square_distance(all[at].1, all[other].1)).collect();
            distances.sort_by(f64::total_cmp);
            distances[..n - hostile - 2].iter().sum()
        };
        let scores: Vec<f64> = (0..n).map(score).collect();
        let mut order: Vec<usize> = (0..n).collect();
        order.sort_by(|a, b| scores[*a].total_cmp(&scores[*b]));
        order
    };
    match *rule {
        Aggregation::Mean {} => weighted_mean(&all, total),
        Aggregation::ClippedMean { factor } => {
            let norm = |delta: &[f32]| square_distance(delta, &vec![0.0; delta.len()]).sqrt();
            let mut norms: Vec<f64> = all.iter().map(|(_, delta)| norm(delta)).collect();
            norms.sort_by(f64::total_cmp);
            let bound = factor * (norms[(n - 1) / 2] + norms[n / 2]) / 2.0;
            let clip = |(weight, delta): &(f64, &'_ [f32])| *weight * (bound / norm(delta)).min(1.0);
            let clipped: Vec<_> = all.iter().map(|one| (clip(one), one.1)).collect();
            weighted_mean(&clipped, total)
        }
        Aggregation::TrimmedMean { .. } | Aggregation::Median {} => {
            let trimmed = rule.trimmed(n).unwrap();
            let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
            columns.map(|at| mean(&column(at)[trimmed..n - trimmed])).collect()
        }
        Aggregation::Krum { hostile } => {
            let chosen = ranked(hostile as usize)[0];
            weighted_mean(&[(1.0, all[chosen].1)], 1.0)
        }
        Aggregation::MultiKrum { hostile, selected } => {
            let count = if selected == 0 { n - hostile as usize - 2 } else { selected as usize };
            let chosen: Vec<_> = ranked(hostile as usize)[..count].iter().map(|at| all[*at]).collect();
            weighted_mean(&chosen, chosen.iter().map(|(weight, _)| weight).sum())
        }
    }
}

/// `count` sites around one direction, the last of them hostile: turned around and 100 times as long.
fn one_hostile(count: usize, length: usize) -> WeightedDeltas {
    let honest = |site: usize, at: usize| (at as f32 * 0.3).sin() + 0.2 * ((site * 31 + at * 7) as f32).cos();
    let delta = |site: usize| {
        let scale = if site + 1 == count { -100.0 } else { 1.0 };
        (0..length).map(|at| scale * honest(site, at)).collect()
    };
    (0..count).map(|site| (1.0 + site as f64 / 4.0, delta(site))).collect()
}

fn fixture(rule: &Aggregation, length: usize, chunk: u32, encoding: Encoding) -> Fixture {
    let mut fixture = Fixture::new(&vec![0.0; length], chunk, encoding, OuterOptimizer::FedAvg {});
    fixture.aggregation = rule.clone();
    fixture
}

fn deliver(fixture: &Fixture, deltas: &WeightedDeltas) -> Vec<WeightedContribution> {
    let deliver = |(site, (weight, delta)): (u32, &(f64, Vec<f32>))| {
        fixture.deliver(1, &format!("site-{site:03}"), *weight, delta)
    };
    (0..).zip(deltas).map(deliver).collect()
}

fn assert_close(found: &[f32], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len());
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        let error = (f64::from(*found) - expected).abs();
        assert!(error <= 1e-6 * expected.abs().max(1e-3), "{what}, value {at}: {found}, not {expected}");
    }
}

#[test]
fn every_rule_is_its_definition_for_every_encoding() {
    for encoding in Encoding::ALL {
        for rule in RULES {
            for count in [5, 8] {
                let deltas = one_hostile(count, 6000);
                let fixture = fixture(&rule, 6000, 4096, encoding);
                let contributions = deliver(&fixture, &deltas);
                fixture.reduce(0, &contributions).unwrap();
                let decoded = deltas
                    .iter()
                    .map(|(weight, delta)| (*weight, after_the_wire(encoding, 4096, delta)))
                    .collect();
                let what = format!("{rule:?}, {encoding:?}, {count} deltas");
                assert_close(&fixture.parameters(1), &reference_mean(&rule, &decoded), &what);
            }
        }
    }
}

#[test]
fn a_hostile_site_ruins_the_mean_and_no_other_rule() {
    let deltas = one_hostile(5, 300);
    let honest: WeightedDeltas = deltas[..4].to_vec();
    let honest = reference_mean(&Aggregation::default(), &honest);
    let norm = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>().sqrt();
    let distance = |rule: &Aggregation| {
        let fixture = fixture(rule, 300, 100, Encoding::Fp32);
        fixture.reduce(0, &deliver(&fixture, &deltas)).unwrap();
        let error: Vec<f64> = fixture
            .parameters(1)
            .iter()
            .zip(&honest)
            .map(|(found, honest)| f64::from(*found) - honest)
            .collect();
        norm(&error) / norm(&honest)
    };
    assert!(distance(&Aggregation::default()) > 10.0);
    // What is left of the hostile delta after clipping still counts; the others leave it out.
    assert!(distance(&CLIPPED) < 0.7, "{}", distance(&CLIPPED));
    for rule in [TRIMMED, MEDIAN, KRUM, MULTI_KRUM] {
        assert!(distance(&rule) < 0.3, "{rule:?}: {}", distance(&rule));
    }
}

#[test]
fn the_record_says_what_was_done_with_each_delta() {
    let deltas: WeightedDeltas = [[3.0, 4.0], [4.0, 3.0], [3.5, 3.5], [5.0, 0.0], [0.0, -500.0]]
        .map(|delta| (2.0, delta.to_vec()))
        .to_vec();
    let encoded = |rule: &Aggregation, encoding: Encoding| {
        let fixture = fixture(rule, 2, 2, encoding);
        let mut contributions = deliver(&fixture, &deltas);
        contributions.reverse();
        fixture.reduce(0, &contributions).unwrap().treatments
    };
    let treatments = |rule: &Aggregation| encoded(rule, Encoding::Fp32);
    let norms = [Some(5.0), Some(5.0), Some(24.5f64.sqrt()), Some(5.0), Some(500.0)];
    let all = |treatments: &[Treatment]| treatments.iter().map(|one| one.norm).collect::<Vec<_>>();

    let clipped = treatments(&CLIPPED);
    assert_eq!(clipped[0].site.as_str(), "site-000");
    assert_eq!(all(&clipped), norms);
    assert_eq!(clipped.iter().map(|one| one.clip).collect::<Vec<_>>(), [1.0, 1.0, 1.0, 1.0, 0.01].map(Some));
    let krum = treatments(&KRUM);
    assert_eq!(all(&krum), norms);
    assert_eq!(
        krum.iter().map(|one| (one.selected, one.weight)).collect::<Vec<_>>(),
        [(false, 0.0), (false, 0.0), (true, 1.0), (false, 0.0), (false, 0.0)].map(|(s, w)| (Some(s), w))
    );
    let multi = treatments(&MULTI_KRUM);
    assert_eq!(multi.iter().filter(|one| one.weight == 0.5).count(), 2);
    let median = treatments(&MEDIAN);
    assert_eq!(all(&median), norms);
    assert!(median.iter().all(|one| (one.weight, one.clip, one.selected) == (0.2, None, None)));
    let mean = treatments(&Aggregation::default());
    assert!(mean.iter().all(|one| (one.weight, one.norm) == (2.0, None)));
    // What is decoded is measured.
    let mean = encoded(&Aggregation::default(), Encoding::Fp16);
    assert_eq!(all(&mean), norms);
}

#[test]
fn a_delta_that_was_left_out_must_still_be_the_accepted_one() {
    let fixture = fixture(&KRUM, 300, 100, Encoding::Fp32);
    let mut contributions = deliver(&fixture, &one_hostile(5, 300));
    contributions[4].delta_digest = Digest::of(b"another");
    let error = fixture.reduce(0, &contributions).unwrap_err();
    assert_eq!(error.spoilt().map(|key| key.site.as_str()), Some("site-004"), "{error}");
    assert_eq!(fixture.models.versions(&run()).unwrap(), [0]);
}

#[test]
fn krum_refuses_fewer_deltas_than_it_is_defined_for() {
    let fixture = fixture(&KRUM, 10, 10, Encoding::Fp32);
    let contributions = deliver(&fixture, &one_hostile(5, 10));
    let error = fixture.reduce(0, &contributions[..4]).unwrap_err();
    assert!(matches!(error, ReduceError::TooFew { round: 1, deltas: 4, needed: 5, .. }), "{error}");
    fixture.reduce(0, &contributions).unwrap();
    // In the next round they are all late.
    let error = fixture.reduce(1, &contributions[..4]).unwrap_err();
    assert!(matches!(error, ReduceError::TooFew { round: 2, deltas: 4, needed: 5, .. }), "{error}");
}

#[test]
fn a_value_that_is_not_finite_names_its_site_under_every_rule() {
    for rule in RULES {
        let fixture = fixture(&rule, 6000, 4096, Encoding::Fp32);
        let mut contributions = deliver(&fixture, &one_hostile(5, 6000));
        let mut values = [0.25; 1904];
        values[1500] = f32::INFINITY;
        let key = &contributions[2].key;
        fixture.put(key, 1, &bytes(&values));
        contributions[2].delta_digest = fixture.spooled(key).summary().unwrap().digest;
        let error = fixture.reduce(0, &contributions).unwrap_err();
        assert_eq!(error.spoilt().map(|key| key.site.as_str()), Some("site-002"), "{rule:?}: {error}");
        assert!(matches!(error, ReduceError::Damaged { chunk: 1, .. }), "{error}");
        assert!(error.to_string().contains("1500"), "{error}");
    }
}

/// Many deltas of large chunks: no core holds all of a chunk, and what comes of it is the same.
#[test]
fn chunks_that_do_not_fit_are_taken_in_pieces() {
    let (count, length) = (20, 1 << 19);
    let deltas: WeightedDeltas = (0..count)
        .map(|site: usize| {
            let value = |at: usize| ((site * 7919 + at * 31) % 1009) as f32 - 504.0;
            (1.0, (0..length).map(value).collect())
        })
        .collect();
    let fixture = fixture(&MEDIAN, length, 1 << 19, Encoding::Fp32);
    fixture.reduce(0, &deliver(&fixture, &deltas)).unwrap();
    let found = fixture.parameters(1);
    for at in (0..length).step_by(997) {
        let mut values: Vec<f32> = deltas.iter().map(|(_, delta)| delta[at]).collect();
        values.sort_by(f32::total_cmp);
        assert_eq!(found[at], (values[9] + values[10]) / 2.0, "value {at}");
    }
}

fn any_rule() -> impl Strategy<Value = Aggregation> {
    prop::sample::select([&RULES[..], &[Aggregation::Mean {}]].concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn no_order_of_arrival_and_no_number_of_threads_changes_a_bit(
        rule in any_rule(),
        deltas in prop::collection::vec((1f64..1e6, any_vector(50)), 5..12),
        encoding in prop::sample::select(Encoding::ALL.to_vec()),
        chunk in 3u32..70,
        turn in any::<prop::sample::Index>(),
    ) {
        let mut first = None;
        for threads in [1, 2, 3, 8] {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let fixture = fixture(&rule, 50, chunk, encoding);
            let mut contributions = deliver(&fixture, &deltas);
            contributions.rotate_left(turn.index(deltas.len()) * threads % deltas.len());
            let reduction = pool.install(|| fixture.reduce(0, &contributions)).unwrap();
            let found = (reduction.version.digest(), reduction.treatments);
            prop_assert_eq!(first.get_or_insert_with(|| found.clone()), &found, "{} threads", threads);
        }
    }

    #[test]
    fn identical_deltas_give_that_delta_under_every_rule(
        rule in any_rule(),
        delta in any_vector(40),
        weights in prop::collection::vec(1f64..1e6, 5..9),
    ) {
        let fixture = fixture(&rule, 40, 16, Encoding::Fp32);
        let deltas = weights.iter().map(|weight| (*weight, delta.clone())).collect();
        fixture.reduce(0, &deliver(&fixture, &deltas)).unwrap();
        prop_assert_eq!(fixture.parameters(1), delta);
    }

    /// Nothing that one site sends takes a value of a median or trimmed mean out of the others' range.
    #[test]
    fn values_stay_within_the_range_of_the_honest_ones(
        rule in prop::sample::select(vec![TRIMMED, MEDIAN]),
        honest in prop::collection::vec(any_vector(30), 4..9),
        hostile in prop::collection::vec(any::<f32>().prop_filter("finite", |value| value.is_finite()), 30),
    ) {
        let fixture = fixture(&rule, 30, 16, Encoding::Fp32);
        let mut deltas: WeightedDeltas = honest.iter().map(|delta| (1.0, delta.clone())).collect();
        deltas.insert(1, (1e9, hostile));
        fixture.reduce(0, &deliver(&fixture, &deltas)).unwrap();
        for (at, value) in fixture.parameters(1).into_iter().enumerate() {
            let column = || honest.iter().map(|delta| delta[at]);
            let range = column().fold(f32::MAX, f32::min)..=column().fold(f32::MIN, f32::max);
            prop_assert!(range.contains(&value), "{} is not in {:?}", value, range);
        }
    }
}
