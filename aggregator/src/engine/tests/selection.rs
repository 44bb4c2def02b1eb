//! Who is selected.

use std::collections::{BTreeMap, BTreeSet};

use consort_common::{ids::SiteName, spec::Sampling};
use rand::RngCore;

use super::{
    super::participation::{Draw, select},
    World, site,
};

#[test]
fn selection_depends_on_the_seed_and_the_set_only() {
    let names: BTreeMap<SiteName, u64> = ('a'..='h').map(|c| (site(&c.to_string()), 1)).collect();
    let sampling = Sampling::Uniform;
    let draw = |seed, round, attempt| select(Draw { seed, round, attempt, sampling }, &names, 3);
    assert_eq!(draw(1, 1, 1), draw(1, 1, 1));
    assert!(draw(1, 1, 1).is_sorted());
    let draws: BTreeSet<Vec<SiteName>> = (0..50).map(|round| draw(1, round, 1)).collect();
    assert!(draws.len() > 20, "rounds differ");
    assert!((0..10).any(|attempt| draw(1, 1, attempt) != draw(1, 1, 1)), "attempts differ");
    assert!((0..10).any(|seed| draw(seed, 1, 1) != draw(1, 1, 1)), "seeds differ");
    let mut selected = BTreeMap::<SiteName, u32>::new();
    for round in 0..8000 {
        for one in draw(7, round, 1) {
            *selected.entry(one).or_default() += 1;
        }
    }
    for (name, times) in selected {
        assert!((2800..3200).contains(&times), "{name} was selected {times} times, 3000 expected");
    }

    let forwards = World::with((4, 2, 0, 0), &["a", "b", "c", "d"]);
    let backwards = World::with((4, 2, 0, 0), &["d", "c", "b", "a"]);
    assert_eq!(forwards.working(), backwards.working());
    assert_eq!(forwards.working().len(), 2);
}

/// Sites with 1, 2, 3 and 4 million tokens.
fn unequal_sites() -> BTreeMap<SiteName, u64> {
    ["a", "b", "c", "d"].into_iter().map(site).zip((1..).map(|number| number * 1_000_000)).collect()
}

#[test]
fn sites_are_drawn_in_proportion_to_their_tokens() {
    const ROUNDS: u32 = 20_000;
    let sites = unequal_sites();
    let share = |tokens: &u64| *tokens as f64 / 1e7;
    for count in [1, 2] {
        let mut times = BTreeMap::<SiteName, u32>::new();
        for round in 1..=ROUNDS {
            let draw = Draw { seed: 11, round, attempt: 1, sampling: Sampling::Tokens };
            let chosen = select(draw, &sites, count);
            assert!(chosen.len() == count && chosen.is_sorted());
            chosen.into_iter().for_each(|one| *times.entry(one).or_default() += 1);
        }
        for (name, tokens) in &sites {
            // Drawn first, or second after another: p + sum over others q of q x p / (1 - q).
            let (p, others) = (share(tokens), sites.iter().filter(|(other, _)| *other != name));
            let second: f64 = others.map(|(_, tokens)| share(tokens) * p / (1.0 - share(tokens))).sum();
            let expected = if count == 1 { p } else { p + second };
            let deviation = (expected * (1.0 - expected) / f64::from(ROUNDS)).sqrt();
            let found = f64::from(times[name]) / f64::from(ROUNDS);
            assert!((found - expected).abs() < 4.0 * deviation, "{name}: {found}, expected {expected}");
        }
    }
}

#[test]
fn a_weighted_draw_is_that_of_efraimidis_and_spirakis_and_the_same_everywhere() {
    let sites = unequal_sites();
    let mut first = Vec::new();
    for round in 1..=200 {
        let draw = Draw { seed: 5, round, attempt: 2, sampling: Sampling::Tokens };
        let mut generator = draw.generator(&sites);
        // Their algorithm A, to the letter: the largest u^(1/w). Weights of 1 to 4 rank as millions do.
        let keys = sites.iter().map(|(name, tokens)| {
            let uniform = ((generator.next_u64() >> 11) + 1) as f64 / (1_u64 << 53) as f64;
            (uniform.powf(1e6 / *tokens as f64), name.clone())
        });
        let mut keys: Vec<(f64, SiteName)> = keys.collect();
        keys.sort_by(|a, b| b.0.total_cmp(&a.0));
        let mut expected: Vec<SiteName> = keys.into_iter().take(2).map(|(_, name)| name).collect();
        expected.sort();
        let chosen = select(draw, &sites, 2);
        assert_eq!(chosen, expected, "round {round}");
        if round <= 8 {
            first.push(chosen.iter().map(SiteName::as_str).collect::<String>());
        }
    }
    assert_eq!(
        first,
        ["cd", "bc", "bc", "cd", "cd", "bd", "ad", "ac"],
        "a run that began elsewhere, or long ago, selects the same sites"
    );
}

#[test]
fn a_site_that_reports_no_tokens_can_still_be_drawn() {
    let sites = BTreeMap::from([(site("a"), 0), (site("b"), 1), (site("c"), u64::MAX)]);
    let drawn = |round| select(Draw { seed: 1, round, attempt: 1, sampling: Sampling::Tokens }, &sites, 2);
    let times = (0..1000).filter(|round| drawn(*round).contains(&site("a"))).count();
    assert!((400..600).contains(&times), "{times} of 1000, as often as b beside c");
}
