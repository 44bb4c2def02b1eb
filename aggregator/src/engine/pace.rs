//! The sites' pace, as earlier rounds showed it: what deadlines and assignments follow. Stored with the run.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use consort_common::{ids::SiteName, units::UnixMs};
use serde::{Deserialize, Serialize};

use super::{Contribution, SITES_MAX, Standing, Training};

/// Rounds whose durations are remembered, the newest...
pub const ROUNDS_MAX: usize = 8;
/// ...so many must be known before anything follows from them...
pub const ROUNDS_MIN: usize = 3;
/// ...and of each at most so many durations: of more, as many evenly spaced ones of the sorted list.
pub const DURATIONS_PER_ROUND_MAX: usize = 64;

/// What is remembered of earlier rounds; empty where the specification does not ask for it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Pace {
    /// Of each of the newest [`ROUNDS_MAX`] rounds, oldest first, the milliseconds from when a site was put to
    /// work to when its delta was accepted; ascending.
    #[serde(default)]
    durations_ms: VecDeque<Vec<u64>>,
    /// Nanoseconds of training per local step, of each site in the last round to which it contributed; beyond
    /// [`SITES_MAX`] sites only those of the newest round.
    #[serde(default)]
    step_ns: BTreeMap<SiteName, u64>,
}

impl Pace {
    /// Remembers a round that ends at `now`. A site that did not deliver counts with the time that it had: it
    /// would have taken at least as long, and without it the deadline would close in on the fastest.
    pub(super) fn record_durations(&mut self, training: &Training, now: UnixMs) {
        let duration_ms = |(site, standing): (&_, &Standing)| {
            let began_ms = training.assignments.get(site)?.began_ms?;
            let ended_ms = match standing {
                Standing::Delivered(contribution) => contribution.accepted_ms,
                Standing::Working | Standing::Replaced => now,
            };
            Some(ended_ms.saturating_sub(began_ms))
        };
        let mut durations_ms: Vec<u64> = training.sites.iter().filter_map(duration_ms).collect();
        durations_ms.sort_unstable();
        if durations_ms.is_empty() {
            return;
        }
        self.durations_ms.push_back(thinned(durations_ms));
        if self.durations_ms.len() > ROUNDS_MAX {
            self.durations_ms.pop_front();
        }
    }

    /// Remembers how fast the contributors of a round were.
    pub(super) fn record_speeds<'a>(&mut self, contributions: impl Iterator<Item = &'a Contribution>) {
        let mut newest = BTreeSet::new();
        for Contribution { site, facts, .. } in contributions {
            // Nothing and infinity come out as 0 and the greatest number; steps are at least 1 here.
            let step_ns = (facts.train_seconds * 1e9 / f64::from(facts.steps.max(1))) as u64;
            self.step_ns.insert(site.clone(), step_ns.max(1));
            newest.insert(site);
        }
        if self.step_ns.len() > SITES_MAX {
            self.step_ns.retain(|site, _| newest.contains(site));
        }
    }

    /// Local steps of the sites of a round: `full`, but for one that is slower than the site in the middle (of
    /// two, the faster) as many as that one's `full` steps leave time for, and at least `minimum`. Sites of
    /// unknown speed take the full number.
    pub(super) fn steps<'a>(
        &self,
        sites: impl Iterator<Item = &'a SiteName>,
        minimum: u32,
        full: u32,
    ) -> BTreeMap<SiteName, u32> {
        let speeds: Vec<(&SiteName, u64)> =
            sites.filter_map(|site| Some((site, *self.step_ns.get(site)?))).collect();
        let mut ascending: Vec<u64> = speeds.iter().map(|(_, step_ns)| *step_ns).collect();
        ascending.sort_unstable();
        let Some(&middle_ns) = ascending.get(ascending.len().saturating_sub(1) / 2) else {
            return BTreeMap::new();
        };
        let steps = |step_ns: u64| {
            let fitting = u128::from(full) * u128::from(middle_ns) / u128::from(step_ns.max(1));
            u32::try_from(fitting).unwrap_or(full).max(minimum).min(full)
        };
        speeds.into_iter().map(|(site, step_ns)| (site.clone(), steps(step_ns))).collect()
    }

    /// median + `deviations` x MAD of the durations, in milliseconds, rounded up; none before [`ROUNDS_MIN`]
    /// rounds are known. All of them count the same, whatever round they are of.
    pub(super) fn usual_ms(&self, deviations: f64) -> Option<u64> {
        if self.durations_ms.len() < ROUNDS_MIN {
            return None;
        }
        let durations_ms: Vec<u64> = self.durations_ms.iter().flatten().copied().collect();
        let median_ms = median(durations_ms.clone())?;
        let mad_ms = median(durations_ms.into_iter().map(|ms| ms.abs_diff(median_ms)).collect())?;
        // The cast saturates, and NaN gives 0.
        Some(median_ms.saturating_add((deviations * mad_ms as f64).ceil() as u64))
    }
}

/// Every value, or [`DURATIONS_PER_ROUND_MAX`] evenly spaced ones with the least and the greatest among them.
fn thinned(ascending: Vec<u64>) -> Vec<u64> {
    const LAST: usize = DURATIONS_PER_ROUND_MAX - 1;
    if ascending.len() <= DURATIONS_PER_ROUND_MAX {
        return ascending;
    }
    (0..=LAST).map(|index| ascending[index * (ascending.len() - 1) / LAST]).collect()
}

/// The middle value; of an even number the mean of the middle two, rounded down.
fn median(mut values: Vec<u64>) -> Option<u64> {
    values.sort_unstable();
    let upper = *values.get(values.len() / 2)?;
    let lower = values[(values.len() - 1) / 2];
    Some(lower + (upper - lower) / 2)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pace(rounds: &[&[u64]]) -> Pace {
        Pace { durations_ms: rounds.iter().map(|round| round.to_vec()).collect(), ..Pace::default() }
    }

    #[test]
    fn slower_sites_take_as_many_steps_as_fit_into_the_time_of_the_middle_one() {
        let check = |known: &[(&str, u64)], expected: &[(&str, u32)]| {
            let name = |name: &str| name.parse::<SiteName>().unwrap();
            let step_ns = known.iter().map(|(site, step_ns)| (name(site), *step_ns)).collect();
            let pace = Pace { step_ns, ..Pace::default() };
            let sites: Vec<SiteName> = ["a", "b", "c", "d"].into_iter().map(name).collect();
            let expected: BTreeMap<SiteName, u32> =
                expected.iter().map(|(site, steps)| (name(site), *steps)).collect();
            assert_eq!(pace.steps(sites.iter(), 10, 100), expected);
        };
        check(&[], &[]);
        check(&[("a", 5)], &[("a", 100)]);
        check(&[("a", 3), ("b", 1)], &[("a", 33), ("b", 100)]);
        check(&[("a", 2), ("b", 1), ("d", 3)], &[("a", 100), ("b", 100), ("d", 66)]);
        check(&[("a", 1), ("b", 1), ("c", 2), ("d", 99)], &[("a", 100), ("b", 100), ("c", 50), ("d", 10)]);
        check(&[("a", u64::MAX), ("b", 1), ("elsewhere", 7)], &[("a", 10), ("b", 100)]);
    }

    #[test]
    fn the_usual_time_is_the_median_and_so_many_median_absolute_deviations() {
        // By hand: 1 2 2 4 6 9 have the median 3, and deviate from it by 1 1 1 2 3 6, whose median is 1.5.
        let known = pace(&[&[2, 4], &[1, 6, 9], &[2]]);
        assert_eq!(known.usual_ms(0.0), Some(3));
        assert_eq!(known.usual_ms(2.0), Some(3 + 2), "medians are rounded down");
        assert_eq!(known.usual_ms(2.5), Some(3 + 3), "rounded up");
        assert_eq!(pace(&[&[5], &[5], &[5, 500]]).usual_ms(10.0), Some(5), "one straggler moves nothing");
        assert_eq!(pace(&[&[5], &[5]]).usual_ms(1.0), None, "two rounds are too few");
        assert_eq!(pace(&[&[u64::MAX], &[0], &[u64::MAX]]).usual_ms(1e300), Some(u64::MAX));
    }

    proptest! {
        #[test]
        fn a_thinned_list_keeps_its_ends_and_about_its_median(mut values in prop::collection::vec(0..10_000_u64, 1..500)) {
            values.sort_unstable();
            let thin = thinned(values.clone());
            prop_assert!(thin.len() <= DURATIONS_PER_ROUND_MAX && thin.is_sorted());
            prop_assert_eq!((thin[0], thin.last()), (values[0], values.last()));
            let rank = values.len() / 2;
            let slack = values.len() / DURATIONS_PER_ROUND_MAX + 1;
            let middle = thin[thin.len() / 2];
            prop_assert!(values[rank.saturating_sub(slack)] <= middle);
            prop_assert!(middle <= values[(rank + slack).min(values.len() - 1)]);
        }
    }
}
