//! Tests of the order: completeness, resumption, mixture.

use std::collections::HashSet;

use proptest::prelude::*;

use super::{
    super::{
        mixture::{Share, Source},
        shard::tests::shard_of,
    },
    *,
};

/// A sampler over the tokens 0, 1, 2, ...: a window shows where it lies.
fn sampler(tokens: u32, sequence_length: usize, seed: u64, site: &str) -> Sampler {
    let ids: Vec<u32> = (0..tokens).collect();
    Sampler::new(mixture_of(shard_of(&ids, 1 << 20)), sequence_length, seed, site).unwrap()
}

/// The only source's shard.
pub(in super::super) fn mixture_of(shard: Shard) -> Mixture {
    Mixture::new(&[Source::new("text")], vec![shard])
}

/// A sampler over sources of `tokens` and `shares` each; a token says which source it is of, and where in it.
fn mixed(sources: &[(u32, Share)], sequence_length: usize, seed: u64) -> Sampler {
    let named = |(index, (_, share)): (usize, &(u32, Share))| Source {
        name: index.to_string(),
        share: *share,
        ..Source::new("text")
    };
    let shards = sources.iter().zip(0u32..).map(|((tokens, _), index)| {
        let ids: Vec<u32> = (0..*tokens).map(|token| index * SOURCE_TOKENS + token).collect();
        shard_of(&ids, 1 << 20)
    });
    let sources: Vec<Source> = sources.iter().enumerate().map(named).collect();
    Sampler::new(Mixture::new(&sources, shards.collect()), sequence_length, seed, "a").unwrap()
}

/// More than a test's source has.
const SOURCE_TOKENS: u32 = 10_000;

fn draw(sampler: &mut Sampler, sequences: usize) -> Vec<i64> {
    let mut out = Vec::new();
    sampler.next_batch(sequences, &mut out).unwrap();
    out
}

/// Back to the beginning of the epoch.
fn rewind(sampler: &mut Sampler) {
    let SourceCursor { epoch, sequences, .. } = sampler.cursor().sources[0];
    sampler.seek(&Cursor { sources: vec![SourceCursor { epoch, position: 0, sequences }] });
}

/// First tokens of the windows of the sampler's current epoch.
fn epoch(sampler: &mut Sampler) -> Vec<i64> {
    let windows = sampler.sources[0].order().windows.len();
    let length = usize::try_from(sampler.sources[0].plan.sequence_length).unwrap();
    draw(sampler, windows).chunks(length + 1).map(|window| window[0]).collect()
}

proptest! {
    #[test]
    fn every_token_is_predicted_once_per_epoch(length in 1usize..20, more in 1u32..200, seed: u64) {
        let tokens = u32::try_from(length).unwrap() + more;
        let mut sampler = sampler(tokens, length, seed, "a");
        for _ in 0..3 {
            let offset = i64::try_from(sampler.sources[0].order().offset).unwrap();
            let windows = sampler.sources[0].order().windows.len();
            prop_assert!(offset < i64::try_from(length).unwrap());
            let batch = draw(&mut sampler, windows);
            let mut predicted = Vec::new();
            for window in batch.chunks(length + 1) {
                prop_assert!(window.windows(2).all(|pair| pair[1] == pair[0] + 1));
                predicted.extend_from_slice(&window[1..]);
            }
            predicted.sort_unstable();
            let last = offset + i64::try_from(windows * length).unwrap();
            prop_assert_eq!(predicted, (offset + 1..=last).collect::<Vec<_>>());
            prop_assert!(i64::from(tokens) - 1 - last < i64::try_from(length).unwrap());
            draw(&mut sampler, 1); // steps into the next epoch
            rewind(&mut sampler);
        }
    }

    #[test]
    fn a_saved_cursor_continues_the_sequence(
        batches in prop::collection::vec(0usize..9, 1..12), stop in 0usize..12, seed: u64, sources in 1usize..4,
    ) {
        let sources = &[(57, Share::Weight(2.0)), (200, Share::Weight(1.0)), (30, Share::ReplayPercent(10.0))][..sources];
        let mut whole = mixed(sources, 5, seed);
        let expected: Vec<_> = batches.iter().map(|sequences| draw(&mut whole, *sequences)).collect();
        let stop = stop.min(batches.len());
        let mut before = mixed(sources, 5, seed);
        for sequences in &batches[..stop] {
            draw(&mut before, *sequences);
        }
        let saved = serde_json::to_string(&before.cursor()).unwrap();
        let mut after = mixed(sources, 5, seed);
        after.seek(&serde_json::from_str(&saved).unwrap());
        for (sequences, expected) in batches.iter().zip(&expected).skip(stop) {
            prop_assert_eq!(&draw(&mut after, *sequences), expected);
        }
        prop_assert_eq!(after.cursor(), whole.cursor());
        prop_assert_eq!(whole.cursor().sequences(), batches.iter().sum::<usize>() as u64);
    }

    #[test]
    fn batch_size_does_not_change_the_sequence(first in 1usize..40, seed: u64, sources in 1usize..3) {
        let sources = &[(100, Share::Tokens), (300, Share::Tokens)][..sources];
        let expected = draw(&mut mixed(sources, 7, seed), 40);
        let mut split = mixed(sources, 7, seed);
        let mut drawn = draw(&mut split, first);
        drawn.extend(draw(&mut split, 40 - first));
        prop_assert_eq!(drawn, expected);
    }

    #[test]
    fn each_source_gives_its_share_in_its_own_order(percent in 1u32..60, seed: u64) {
        let sources = [(2_000, Share::Tokens), (90, Share::ReplayPercent(percent.into()))];
        let mut sampler = mixed(&sources, 8, seed);
        let drawn = draw(&mut sampler, 1_000);
        let of = |source: u32| -> Vec<i64> {
            let of_source = |row: &&[i64]| row[0] / i64::from(SOURCE_TOKENS) == i64::from(source);
            let within = drawn.chunks(9).filter(of_source).flatten();
            within.map(|token| token % i64::from(SOURCE_TOKENS)).collect()
        };
        let replayed = of(1).len() / 9;
        prop_assert!(replayed.abs_diff(10 * percent as usize) <= 4, "{replayed}");
        prop_assert_eq!(sampler.cursor().sources[1].sequences, replayed as u64);
        // A source's own sequences are those that it gives alone, however many others there are.
        for (source, tokens) in [(0, 2_000), (1, 90)] {
            let rows = of(source).len() / 9;
            prop_assert_eq!(of(source), draw(&mut mixed(&[(tokens, Share::Tokens)], 8, seed), rows));
        }
    }
}

#[test]
fn order_differs_between_epochs_seeds_and_sites() {
    let mut first = sampler(2_000, 10, 1, "a");
    let orders = [
        epoch(&mut first),
        {
            draw(&mut first, 1);
            rewind(&mut first);
            epoch(&mut first)
        },
        epoch(&mut sampler(2_000, 10, 2, "a")),
        epoch(&mut sampler(2_000, 10, 1, "b")),
    ];
    assert_eq!(orders.iter().collect::<HashSet<_>>().len(), orders.len());
    assert_eq!(orders[0], epoch(&mut sampler(2_000, 10, 1, "a")));
}

#[test]
fn windows_are_cut_at_every_offset() {
    let plan = Plan { tokens: 1_000, sequence_length: 4, seed: 9, site: "a".to_owned() };
    let offsets: HashSet<u64> = (0..100).map(|epoch| plan.order(epoch).offset).collect();
    assert_eq!(offsets, HashSet::from([0, 1, 2, 3]));
}

/// A change here silently changes what every resumed run trains on.
#[test]
fn order_is_the_same_in_every_version() {
    let order = Plan { tokens: 100, sequence_length: 10, seed: 7, site: "literature".to_owned() }.order(3);
    assert_eq!((order.offset, order.windows), (0, vec![4, 3, 6, 5, 1, 2, 0, 7, 8]));
}

#[test]
fn permutations_are_uniform() {
    let mut counts = std::collections::HashMap::new();
    for seed in 0..6_000 {
        let plan = Plan { tokens: 4, sequence_length: 1, seed, site: "a".to_owned() };
        *counts.entry(plan.order(0).windows).or_insert(0) += 1;
    }
    // Six permutations, 1,000 each expected with a deviation of 29.
    assert_eq!(counts.len(), 6);
    assert!(counts.values().all(|count| (850..1_150).contains(count)), "{counts:?}");
}

#[test]
fn the_shortest_shard_has_one_window() {
    let mut sampler = sampler(11, 10, 3, "a");
    for _ in 0..5 {
        assert_eq!(draw(&mut sampler, 1), (0..11).collect::<Vec<_>>());
    }
    assert_eq!(sampler.cursor().sources, [SourceCursor { epoch: 4, position: 1, sequences: 5 }]);
}

#[test]
fn a_shard_without_a_whole_sequence_is_an_error() {
    for (tokens, sequence_length) in [(0, 10), (10, 10), (10, 0)] {
        let shard = shard_of(&vec![1; tokens], 10);
        let error = Sampler::new(mixture_of(shard), sequence_length, 0, "a").unwrap_err();
        assert!(matches!(error, DataError::TooShort { .. }), "{error}");
    }
}

/// Whoever opens a sampler does not wait for an order, and none is made in vain when it goes on at a cursor.
#[test]
fn an_order_is_made_once_where_the_first_sequence_is_drawn() {
    let mut sampler = sampler(100, 10, 3, "a");
    sampler.seek(&Cursor { sources: vec![SourceCursor { epoch: 5, position: 2, sequences: 50 }] });
    assert!(sampler.sources[0].order.is_none());
    draw(&mut sampler, 1);
    let made = |sampler: &Sampler| {
        let order = sampler.sources[0].order.as_ref().unwrap();
        (order.epoch, order.windows.as_ptr())
    };
    let first = made(&sampler);
    draw(&mut sampler, 2);
    assert_eq!((first.0, made(&sampler)), (5, first));
}

#[test]
fn a_cursor_of_another_shard_begins_the_next_epoch() {
    let mut sampler = sampler(100, 10, 3, "a");
    sampler.seek(&Cursor { sources: vec![SourceCursor { epoch: 2, position: u64::MAX, sequences: 1 }] });
    draw(&mut sampler, 1);
    assert_eq!(sampler.cursor().sources, [SourceCursor { epoch: 3, position: 1, sequences: 2 }]);
}

#[test]
fn a_cursor_of_other_sources_begins_anew() {
    let mut two = mixed(&[(100, Share::Tokens), (100, Share::Tokens)], 10, 3);
    let beginning = draw(&mut two, 6);
    for sources in [0, 1, 3] {
        two.seek(&Cursor { sources: vec![SourceCursor { epoch: 7, position: 1, sequences: 9 }; sources] });
        assert_eq!(draw(&mut two, 6), beginning, "{sources}");
    }
}

#[test]
fn a_cursor_from_before_there_were_sources_is_none() {
    let old = serde_json::json!({ "epoch": 1, "position": 2, "tokens": 3 });
    assert!(serde_json::from_value::<Cursor>(old).is_err());
}

/// A change here silently changes what every resumed run trains on.
#[test]
fn mixture_is_the_same_in_every_version() {
    let mut sampler = mixed(&[(100, Share::Tokens), (50, Share::ReplayPercent(25.0))], 10, 7);
    let sources: Vec<i64> =
        draw(&mut sampler, 24).chunks(11).map(|row| row[0] / i64::from(SOURCE_TOKENS)).collect();
    assert_eq!(sources, [1, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0]);
}
