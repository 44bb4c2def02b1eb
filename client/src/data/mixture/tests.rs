//! Tests of sources taken together: shares, choice, what can be written on a command line.

use proptest::prelude::*;

use super::*;

fn source(name: &str, share: Share) -> Source {
    Source { name: name.to_owned(), share, ..Source::new("/text") }
}

/// How often each source is chosen in `range`.
fn counts(chooser: &Chooser, range: std::ops::Range<u64>) -> Vec<u64> {
    let mut counts = vec![0; chooser.ends.len()];
    for number in range {
        counts[chooser.source(number)] += 1;
    }
    counts
}

/// The largest difference between a count and its share.
fn difference(counts: &[u64], shares: &[f64]) -> f64 {
    let total: u64 = counts.iter().sum();
    let differences =
        counts.iter().zip(shares).map(|(count, share)| (*count as f64 - share * total as f64).abs());
    differences.fold(0.0, f64::max)
}

proptest! {
    #[test]
    fn every_stretch_holds_the_shares(
        weights in prop::collection::vec(0.01f64..1.0, 1..6), start: u64, begin in 0u64..1 << 40,
        length in 1u64..20_000, every in 1u64..40,
    ) {
        let total: f64 = weights.iter().sum();
        let shares: Vec<f64> = weights.iter().map(|weight| weight / total).collect();
        let chooser = Chooser::new(shares.iter().copied(), start);
        let stretch = counts(&chooser, begin..begin + length);
        prop_assert!(difference(&stretch, &shares) < 3.0 + (length as f64).ln() / 4.0, "{stretch:?} of {shares:?}");
        // Two GPUs that take turns see the same mixture as one.
        let mut subset = vec![0; shares.len()];
        for number in (0..length).map(|number| begin + number * every) {
            subset[chooser.source(number)] += 1;
        }
        prop_assert!(
            difference(&subset, &shares) < 3.0 + every as f64 + (length as f64).ln(), "every {every}: {subset:?} of {shares:?}"
        );
    }

    #[test]
    fn shares_are_what_was_asked_and_one_together(
        weights in prop::collection::vec(0.1f64..10.0, 1..5), percents in prop::collection::vec(0.1f64..20.0, 0..4),
    ) {
        let asked: Vec<(Share, u64)> = weights.iter().map(|weight| (Share::Weight(*weight), 7))
            .chain(percents.iter().map(|percent| (Share::ReplayPercent(*percent), 1_000)))
            .collect();
        let shares = shares(&asked);
        prop_assert!((shares.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        for (percent, share) in percents.iter().zip(&shares[weights.len()..]) {
            prop_assert!((share - percent / 100.0).abs() < 1e-15);
        }
        for index in 1..weights.len() {
            prop_assert!((shares[index] / shares[0] - weights[index] / weights[0]).abs() < 1e-9);
        }
    }
}

#[test]
fn five_percent_of_replay_are_five_percent() {
    let shares = shares(&[(Share::Tokens, 1_000), (Share::ReplayPercent(5.0), 9_000_000)]);
    for seed in 0u64..20 {
        let chooser = Chooser::new(shares.iter().copied(), seed.wrapping_mul(0x1234_5678_9ABC_DEF1));
        for (sequences, expected) in [(1_000, 50), (100_000, 5_000), (1_000_000, 50_000)] {
            let replayed = counts(&chooser, 0..sequences)[1];
            assert!(replayed.abs_diff(expected) < 5, "{replayed} of {sequences}");
        }
    }
}

#[test]
fn sources_without_weights_give_what_they_have() {
    let shares = shares(&[(Share::Tokens, 300), (Share::Tokens, 100), (Share::ReplayPercent(20.0), 5)]);
    assert!(difference(&[60, 20, 20], &shares) < 1e-9, "{shares:?}");
}

#[test]
fn one_source_is_always_chosen() {
    let chooser = Chooser::new([1.0].into_iter(), u64::MAX);
    assert_eq!(counts(&chooser, 0..100), [100]);
}

#[test]
fn every_problem_with_sources_is_listed() {
    let check = |sources: &[Source], expected: &[&str]| {
        let found = problems(sources);
        assert_eq!(found.len(), expected.len(), "{found:?}");
        for (found, expected) in found.iter().zip(expected) {
            assert!(found.contains(expected), "{found:?} has no {expected:?}");
        }
    };
    let [tokens, weight, replay] = [Share::Tokens, Share::Weight(2.0), Share::ReplayPercent(5.0)];
    check(&[source("a", tokens)], &[]);
    check(&[source("a", weight), source("b", weight), source("c", replay)], &[]);
    check(&[], &["0 sources"]);
    check(&[source("a", tokens), source("a", replay)], &["\"a\": give each source a name of its own"]);
    check(&[source("a", tokens), source("b", weight)], &["\"b\" has a weight and source \"a\" has none"]);
    check(&[source("a", replay)], &["all sources are replayed"]);
    check(&[source("a", Share::Weight(0.0)), source("b", Share::Weight(f64::NAN))], &["is 0", "is NaN"]);
    check(
        &[
            source("a", tokens),
            source("b", Share::ReplayPercent(60.0)),
            source("c", Share::ReplayPercent(40.0)),
        ],
        &["100 percent are replayed in all"],
    );
    check(
        &[source("a", tokens), source("b", Share::ReplayPercent(100.0))],
        &["\"b\": 100 percent", "in all"],
    );
}

#[test]
fn a_source_is_a_path_or_keys_with_values() {
    let check = |text: &str, expected: Source| assert_eq!(text.parse(), Ok(expected), "{text}");
    check("/srv/wiki", Source { name: "wiki".to_owned(), ..Source::new("/srv/wiki") });
    check("a,b=c", Source { name: "a,b=c".to_owned(), ..Source::new("a,b=c") });
    check("path=/srv/wiki,weight=2.5", Source { share: Share::Weight(2.5), ..Source::new("/srv/wiki") });
    check(
        "path=old,name=before,replay=5,key=content",
        Source {
            name: "before".to_owned(),
            path: "old".into(),
            text_key: "content".to_owned(),
            share: Share::ReplayPercent(5.0),
        },
    );
    for (text, part) in [
        ("", "a path is missing"),
        ("path=", "not KEY=VALUE"),
        ("path=a,b", "not KEY=VALUE"),
        ("path=a,path=b", "two paths"),
        ("path=a,wieght=2", "no key \"wieght\""),
        ("path=a,weight=two", "\"two\" is not a number"),
        ("path=a,weight=1,replay=5", "once"),
    ] {
        let error = text.parse::<Source>().unwrap_err();
        assert!(error.contains(part), "{error}");
    }
}
