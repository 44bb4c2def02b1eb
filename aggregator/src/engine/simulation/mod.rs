//! The engine under random schedules: first chaos, then calm.
//!
//! In the chaos sites come and go, deliver late, twice, wrongly or for others, operators pause and resume,
//! reductions fail, time jumps, and the process dies between any two effects. In the calm that follows
//! enough sites live and do as they are told, and the run must come to its end in a bounded number of turns.
//!
//! A failure prints its seed. `CONSORT_SIMULATION_SEED=<seed> CONSORT_SIMULATION_SCHEDULES=1` replays it,
//! with every event.

mod tally;
mod world;

use std::panic::catch_unwind;

use consort_common::{
    ids::{Digest, SiteName},
    spec::{AdaptiveDeadline, Aggregation, RunSpec, Sampling, Weighting},
};
use rand::{Rng, SeedableRng, seq::IndexedRandom};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use self::{
    tally::{Tally, Terms},
    world::World,
};
use super::{
    tests::{site, spec},
    *,
};

const SCHEDULES: u64 = 100_000;
const SEED: u64 = 20_240_611;
/// Random events per schedule, at most.
const CHAOS_EVENTS_MAX: u32 = 100;
/// Turns in which a calm run must take its next step towards the end, per round and for the whole.
const CALM_TURNS_PER_ROUND: u32 = 12;
const CALM_TURNS: u32 = 20;

#[test]
fn no_schedule_loses_repeats_or_stalls_a_round() {
    let number = |name: &str, default: u64| {
        std::env::var(name).map_or(default, |text| text.parse().expect("a whole number"))
    };
    let schedules = number("CONSORT_SIMULATION_SCHEDULES", SCHEDULES);
    let first = number("CONSORT_SIMULATION_SEED", SEED);
    let specification = spec();
    let trace = schedules == 1;
    let outcome: Result<Tally, u64> = (first..first + schedules)
        .into_par_iter()
        .map(|seed| catch_unwind(|| schedule(&specification, seed, trace)).map_err(|_| seed))
        .try_reduce(Tally::default, |one, other| Ok(one.add(other)));
    match outcome {
        Ok(tally) => {
            println!("{schedules} schedules from seed {first}: {tally:?}");
            if schedules >= SCHEDULES {
                check_tally(&tally, schedules);
            }
        }
        Err(seed) => panic!(
            "the schedule of seed {seed} fails; replay it with \
             CONSORT_SIMULATION_SEED={seed} CONSORT_SIMULATION_SCHEDULES=1"
        ),
    }
}

/// A simulation in which little happens proves little.
fn check_tally(tally: &Tally, schedules: u64) {
    assert!(tally.steps > 30 * schedules, "{tally:?}");
    for (what, count) in [
        ("commits", tally.commits),
        ("crashes", tally.crashes),
        ("rejections", tally.rejections),
        ("finished", tally.finished),
    ] {
        assert!(count > schedules / 2, "{what}: {count}");
    }
    for (what, count) in [
        ("commits amid chaos", tally.chaotic_commits),
        ("retried", tally.retried),
        ("replaced sites' deltas", tally.replaced),
        ("joined an attempt", tally.joined),
        ("duplicates", tally.duplicates),
        ("conflicts", tally.conflicts),
        ("late", tally.late),
        ("spared", tally.spared),
        ("adapted deadlines", tally.adapted),
        ("shortened assignments", tally.shortened),
        ("failed reductions", tally.failed_reductions),
        ("late deltas that counted", tally.folded),
        ("buffers", tally.buffers),
    ] {
        assert!(count > schedules / 50, "{what}: {count}");
    }
    for (what, count) in
        [("given up", tally.given_up), ("left out", tally.left_out), ("spoilt and kept", tally.kept)]
    {
        assert!(count > schedules / 500, "{what}: {count}");
    }
}

/// One schedule: a random plan, chaos, calm.
fn schedule(specification: &RunSpec, seed: u64, trace: bool) -> Tally {
    let mut dice = ChaCha8Rng::seed_from_u64(seed);
    let sites: Vec<SiteName> =
        (0..dice.random_range(1..=8)).map(|number| site(&format!("site-{number}"))).collect();
    let (plan, terms) = random_plan(specification, sites.len() as u32, &mut dice);
    let mut world = World::new(plan, terms, trace);
    world.note(|| format!("{} sites, {terms:?}", sites.len()));
    if dice.random_ratio(2, 3) {
        world.take(Event::Start);
        for site in &sites {
            world.take(ready(site));
        }
    }
    for _ in 0..dice.random_range(0..=CHAOS_EVENTS_MAX) {
        world.now += dice.random_range(0..200);
        chaos(&mut world, &sites, &mut dice);
        if let Some(one) = sites.choose(&mut dice) {
            world.check_words(one);
        }
    }
    world.tally.chaotic_commits = world.tally.commits;
    calm(&mut world, &sites, &mut dice);
    world.tally
}

fn random_plan(specification: &RunSpec, sites: u32, dice: &mut ChaCha8Rng) -> (Plan, Terms) {
    let mut spec = specification.clone();
    spec.seed = dice.random();
    spec.rounds = dice.random_range(1..=5);
    spec.outer.weighting = if dice.random() { Weighting::Tokens } else { Weighting::Uniform };
    spec.evaluation.every_rounds = dice.random_range(0..=2);
    spec.checkpoints.every_rounds = dice.random_range(0..=2);
    let participation = &mut spec.participation;
    // Now and then more than there are sites: then the run must wait.
    let most = if dice.random_ratio(1, 20) { sites + 1 } else { sites };
    participation.minimum_clients = dice.random_range(0..=most);
    participation.clients_per_round = if dice.random() { 0 } else { dice.random_range(1..=sites) };
    participation.sampling = if dice.random() { Sampling::Tokens } else { Sampling::Uniform };
    let may_over_select = participation.clients_per_round > 0 && dice.random_ratio(1, 3);
    participation.over_selection = if may_over_select { dice.random_range(1..=3) } else { 0 };
    participation.quorum = if dice.random() { 0 } else { dice.random_range(1..=most) };
    participation.deadline_seconds = if dice.random_ratio(2, 3) { dice.random_range(1..=100) } else { 0 };
    participation.minimum_steps = if dice.random() { 0 } else { dice.random_range(1..=4) };
    participation.adaptive_deadline = dice.random_ratio(1, 2).then(|| AdaptiveDeadline {
        deviations: dice.random_range(0.0..4.0),
        minimum_seconds: dice.random_range(1..=20),
    });
    participation.staleness_max = if dice.random() { 0 } else { dice.random_range(1..=3) };
    participation.staleness_exponent = dice.random_range(0.0..2.0);
    if dice.random_ratio(1, 4) {
        participation.buffer = dice.random_range(1..=participation.minimum_clients.max(1));
        participation.staleness_max = dice.random_range(1..=3);
        participation.clients_per_round = 0;
        participation.sampling = Sampling::Uniform;
        participation.over_selection = 0;
        participation.quorum = 0;
        participation.deadline_seconds = 0;
        participation.adaptive_deadline = None;
    }
    let adaptive = spec.participation.adaptive_deadline.as_ref();
    let mut terms = Terms {
        rounds: spec.rounds,
        minimum: spec.participation.minimum_clients.max(1) as usize,
        quorum: spec.participation.quorum as usize,
        deadline_ms: spec.participation.deadline_seconds * 1000,
        adaptive_minimum_ms: adaptive.map_or(0, |adaptive| adaptive.minimum_seconds * 1000),
        weighting: spec.outer.weighting,
        minimum_steps: spec.participation.minimum_steps,
        per_round: spec.participation.clients_per_round as usize,
        over_selection: spec.participation.over_selection as usize,
        staleness_max: spec.participation.staleness_max,
        staleness_exponent: spec.participation.staleness_exponent,
        buffer: spec.participation.buffer as usize,
        deltas_min: 1,
    };
    if terms.least() >= 3 && dice.random() {
        spec.outer.aggregation = Aggregation::Median {};
        terms.deltas_min = 3;
    }
    (Plan::new(&spec), terms)
}

/// One random thing.
fn chaos(world: &mut World, sites: &[SiteName], dice: &mut ChaCha8Rng) {
    let one = sites.choose(dice).expect("at least one site").clone();
    match dice.random_range(0..100) {
        0..18 => drop(world.take(ready(&one))),
        18..23 => drop(world.take(Event::SiteGone(one))),
        23..28 => drop(world.take(Event::Start)),
        28..30 => drop(world.take(Event::Pause)),
        30..33 => drop(world.take(Event::Resume)),
        33 if dice.random_ratio(1, 10) => drop(world.take(Event::Abort { reason: "chaos".into() })),
        33..56 => {
            let working = match &world.state().phase {
                Phase::Training(training) => training.working().next().cloned(),
                _ => None,
            };
            let deliverer = if dice.random() { one } else { working.unwrap_or(one) };
            let event = honest_delivery(world, deliverer);
            world.take(event);
        }
        56..66 => {
            let event = odd_delivery(world, one, dice);
            world.take(event);
        }
        66..70 => evaluate(world, one, dice),
        70..76 => tick(world, dice),
        76..86 => perform(world, dice),
        86..94 if !world.reductions.is_empty() => {
            let index = dice.random_range(0..world.reductions.len());
            match dice.random_range(0..8) {
                0..5 => world.finish_reduction(index),
                5 => world.fail_reduction(index, None),
                _ => {
                    let round = world.reductions[index];
                    let trained = round.saturating_sub(if dice.random_ratio(3, 4) { 0 } else { 1 });
                    world.fail_reduction(index, Some((one, trained)));
                }
            }
        }
        86..94 => perform(world, dice),
        94..96 => {
            if let Some(version) = world.publications.pop() {
                world.take(Event::Published { version });
            }
        }
        96..98 => world.crash(),
        _ => {
            let event = honest_delivery(world, one);
            world.crash_in_transaction(event);
        }
    }
}

fn ready(site: &SiteName) -> Event {
    let train_tokens = 1000 * site.as_str().bytes().map(u64::from).sum::<u64>();
    Event::SiteReady { site: site.clone(), train_tokens }
}

fn honest_delivery(world: &World, site: SiteName) -> Event {
    let behind = world.state().behind.get(&site).map(|behind| behind.round);
    let round = behind.unwrap_or(world.state().round());
    Event::Delivered { facts: world.honest_facts(&site, round), site, round }
}

/// Late, early, foreign, wrong, boasting or nonsensical.
fn odd_delivery(world: &World, site: SiteName, dice: &mut ChaCha8Rng) -> Event {
    let Event::Delivered { mut site, mut round, mut facts } = honest_delivery(world, site) else {
        unreachable!("a delivery")
    };
    match dice.random_range(0..7) {
        0 => round = round.saturating_sub(1),
        1 => round += 1,
        2 => site = "mallory".parse().expect("a name"),
        3 => facts.delta_digest = Digest::of(b"another delta"),
        4 => facts.tokens += 1,
        5 => facts.steps += 1,
        _ => facts.train_loss = f64::NAN,
    }
    Event::Delivered { site, round, facts }
}

fn evaluate(world: &mut World, site: SiteName, dice: &mut ChaCha8Rng) {
    let version = (world.state().version + 1).saturating_sub(dice.random_range(0..4));
    let loss = if dice.random_ratio(1, 10) { f64::NAN } else { 1.0 };
    let evaluation = Evaluation { version, loss, tokens: 10, text_bytes: 40 };
    let is_accepted = world.take(Event::Evaluated { site, evaluation });
    assert!(!is_accepted || (loss.is_finite() && version <= world.state().version));
}

fn tick(world: &mut World, dice: &mut ChaCha8Rng) {
    world.now = match (dice.random_range(0..4), world.run.next_timer()) {
        (0, Some(timer_ms)) => timer_ms,
        (1, Some(timer_ms)) => timer_ms - 1,
        (2, _) => world.now.saturating_sub(dice.random_range(0..5_000)),
        _ => world.now + dice.random_range(0..150_000),
    };
    world.take(Event::Tick);
}

/// Performs the next few effects, now and then twice, or the one after it first.
fn perform(world: &mut World, dice: &mut ChaCha8Rng) {
    for _ in 0..dice.random_range(1..=4) {
        if world.pending.len() > 1 && dice.random_ratio(1, 4) {
            world.pending.swap(0, 1);
        }
        if let Some(effect) = world.pending.pop_front() {
            if dice.random_ratio(1, 5) {
                world.perform(effect.clone());
            }
            world.perform(effect);
        }
    }
}

/// Enough sites live and do as they are told: the run must finish.
fn calm(world: &mut World, sites: &[SiteName], dice: &mut ChaCha8Rng) {
    let needed = world.terms.minimum.max(world.terms.quorum);
    let live_count =
        if dice.random() { sites.len() } else { dice.random_range(needed.min(sites.len())..=sites.len()) };
    let live: Vec<SiteName> = sites.choose_multiple(dice, live_count).cloned().collect();
    world.note(|| format!("calm; {live:?} live"));
    for site in sites.iter().filter(|site| !live.contains(site)) {
        world.take(Event::SiteGone(site.clone()));
    }
    for _ in 0..CALM_TURNS + world.terms.rounds * CALM_TURNS_PER_ROUND {
        match world.state().status {
            RunStatus::Finished => {
                assert_eq!(world.state().version, world.terms.rounds);
                world.tally.finished += 1;
                return;
            }
            RunStatus::Aborted { .. } => return,
            RunStatus::Created => drop(world.take(Event::Start)),
            RunStatus::Paused => drop(world.take(Event::Resume)),
            RunStatus::Active => {
                if cooperate(world, &live) {
                    continue;
                }
                if live.len() < needed {
                    assert_eq!(world.state().phase, Phase::Waiting, "too few sites for any round");
                    return;
                }
                let is_helped = live.len() < sites.len() && world.terms.deadline_ms == 0;
                match world.run.next_timer() {
                    Some(timer_ms) => {
                        world.now = timer_ms;
                        world.take(Event::Tick);
                    }
                    // Without a deadline a round waits for sites that are gone until an operator resumes it.
                    None if is_helped => drop(world.take(Event::Pause)),
                    None => panic!("stalled: {}", world.run.waiting_for(&world.plan, world.now)),
                }
            }
        }
    }
    panic!("not finished in time: {}", world.run.waiting_for(&world.plan, world.now));
}

/// One turn of a driver and sites that do what is asked of them; whether there was anything to do.
fn cooperate(world: &mut World, live: &[SiteName]) -> bool {
    let mut was_busy = false;
    while let Some(effect) = world.pending.pop_front() {
        was_busy |= !matches!(effect, Effect::InstructionsChanged | Effect::Duplicate { .. });
        world.perform(effect);
    }
    while !world.reductions.is_empty() {
        was_busy = true;
        world.finish_reduction(0);
    }
    while let Some(version) = world.publications.pop() {
        was_busy = true;
        world.take(Event::Published { version });
    }
    for site in live {
        world.now += 1;
        let event = match world.run.instruction(&world.plan, site) {
            Instruction::Idle { .. } => continue,
            Instruction::Prepare => ready(site),
            Instruction::Train { round, .. } => {
                Event::Delivered { site: site.clone(), round, facts: world.honest_facts(site, round) }
            }
            Instruction::Evaluate { version } => {
                let evaluation = Evaluation { version, loss: 1.0, tokens: 10, text_bytes: 40 };
                Event::Evaluated { site: site.clone(), evaluation }
            }
        };
        was_busy = true;
        assert!(world.take(event), "what was asked for is accepted");
        world.check_words(site);
    }
    was_busy
}
