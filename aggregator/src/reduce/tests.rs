use std::sync::Arc;

use consort_common::{chunk::ChunkPlan, codec::ModelEncoding, ids::RunName};
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::{
    models::ModelLayout,
    spool::{SpoolLimits, SpooledDelta},
};

mod broadcast;
mod fold;
mod fragments;
mod robust;

const NESTEROV: OuterOptimizer = OuterOptimizer::Nesterov { learning_rate: 0.7, momentum: 0.9 };
const SGD: OuterOptimizer = OuterOptimizer::Sgd { learning_rate: 0.7, momentum: 0.9 };
const FEDADAM: OuterOptimizer =
    OuterOptimizer::FedAdam { learning_rate: 0.1, beta1: 0.9, beta2: 0.99, tau: 1e-3 };
const FEDYOGI: OuterOptimizer =
    OuterOptimizer::FedYogi { learning_rate: 0.1, beta1: 0.9, beta2: 0.99, tau: 1e-3 };
const OPTIMIZERS: [OuterOptimizer; 5] = [OuterOptimizer::FedAvg {}, SGD, NESTEROV, FEDADAM, FEDYOGI];

/// What an optimizer keeps of one parameter.
#[derive(Default, Clone, Copy)]
struct ReferenceMoments {
    momentum: f32,
    second: f32,
}

impl ReferenceMoments {
    fn new(optimizer: &OuterOptimizer) -> Self {
        Self { momentum: 0.0, second: initial_second_moment(optimizer).unwrap_or_default() }
    }

    /// A step of one parameter from `start`, written as plainly as can be, in the stated order and precision.
    fn step(&mut self, optimizer: &OuterOptimizer, start: f64, d: f64) -> f32 {
        let Self { momentum, second } = self;
        let decayed = |decay: f64, value: &mut f32, new: f64| {
            *value = (decay * f64::from(*value) + new) as f32;
            f64::from(*value)
        };
        let update = match optimizer {
            OuterOptimizer::FedAvg {} => d,
            OuterOptimizer::Sgd { learning_rate, momentum: mu } => learning_rate * decayed(*mu, momentum, d),
            OuterOptimizer::Nesterov { learning_rate, momentum: mu } => {
                learning_rate * (d + mu * decayed(*mu, momentum, d))
            }
            OuterOptimizer::FedAdam { learning_rate, beta1, beta2, tau } => {
                let m = decayed(*beta1, momentum, (1.0 - beta1) * d);
                let v = decayed(*beta2, second, (1.0 - beta2) * (d * d));
                learning_rate * m / (v.sqrt() + tau)
            }
            OuterOptimizer::FedYogi { learning_rate, beta1, beta2, tau } => {
                let m = decayed(*beta1, momentum, (1.0 - beta1) * d);
                let (v, square) = (f64::from(*second), d * d);
                let change = (1.0 - beta2) * square;
                *second = match v.partial_cmp(&square) {
                    Some(std::cmp::Ordering::Greater) => v - change,
                    Some(std::cmp::Ordering::Less) => v + change,
                    _ => v,
                } as f32;
                learning_rate * m / (f64::from(*second).sqrt() + tau)
            }
        };
        (start + update) as f32
    }
}

/// What the sites of one round deliver, in canonical order.
type WeightedDeltas = Vec<(f64, Vec<f32>)>;

/// A run on disk, with version 0 and what sites deliver to it.
struct Fixture {
    folder: TempDir,
    spool: Spool,
    models: ModelFiles,
    layout: ModelLayout,
    encoding: Encoding,
    optimizer: OuterOptimizer,
    aggregation: Aggregation,
}

fn run() -> RunName {
    "pilot".parse().unwrap()
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn key(round: u32, site: &str) -> ContributionKey {
    ContributionKey { run: run(), round, site: site.parse().unwrap(), delta: [1; 16].into() }
}

impl Fixture {
    fn new(initial: &[f32], chunk: u32, encoding: Encoding, optimizer: OuterOptimizer) -> Self {
        Self::with_form(initial, chunk, encoding, optimizer, ModelEncoding::Fp32)
    }

    fn with_form(
        initial: &[f32],
        chunk: u32,
        encoding: Encoding,
        optimizer: OuterOptimizer,
        form: ModelEncoding,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let spool = Spool::new(folder.path().join("spool"), SpoolLimits::default());
        let models = ModelFiles::new(folder.path().join("models"));
        let plan = ChunkPlan::new(initial.len() as u64, chunk);
        let layout = ModelLayout {
            plan,
            encoding: form,
            momentum: has_momentum(&optimizer),
            second_moment: initial_second_moment(&optimizer).is_some(),
            fragments: 1,
        };
        let fill = |start, values: &mut [f32]| {
            let start = start as usize;
            values.copy_from_slice(&initial[start..start + values.len()]);
            Ok::<_, ModelError>(())
        };
        create_initial(&models, &run(), layout, fill).unwrap();
        let aggregation = Aggregation::default();
        Self { folder, spool, models, layout, encoding, optimizer, aggregation }
    }

    fn deliver(&self, round: u32, site: &str, weight: f64, delta: &[f32]) -> WeightedContribution {
        let key = key(round, site);
        let chunks = delta.chunks(self.layout.plan.chunk_parameters() as usize);
        for (index, values) in (0..).zip(chunks) {
            self.put(&key, index, &self.encoding.encode(values));
        }
        self.accepted(key, weight)
    }

    /// The contribution as it is accepted, from what is spooled of it.
    fn accepted(&self, key: ContributionKey, weight: f64) -> WeightedContribution {
        let delta_digest = self.spooled(&key).summary().unwrap().digest;
        WeightedContribution { key, weight, encoding: self.encoding, delta_digest }
    }

    fn payload(&self, delta: &[f32], index: u32) -> Vec<u8> {
        let range = self.layout.plan.range(index).unwrap();
        self.encoding.encode(&delta[range.start as usize..range.end as usize])
    }

    fn spooled(&self, key: &ContributionKey) -> Arc<SpooledDelta> {
        self.spool
            .receive(key, DeltaLayout::new(self.layout.fragment(key.round).plan(), self.encoding))
            .unwrap()
    }

    fn put(&self, key: &ContributionKey, index: u32, payload: &[u8]) {
        let delta = self.spooled(key);
        delta.write(index, payload, Digest::of(payload)).unwrap();
        delta.sync(|_| true).unwrap();
    }

    fn base(&self, version: u32) -> ModelVersion {
        self.models.open(&run(), version, self.layout).unwrap()
    }

    fn reduce(&self, base: u32, contributions: &[WeightedContribution]) -> Result<Reduction, ReduceError> {
        reduce(ReduceInputs {
            contributions: contributions.to_vec(),
            base: self.base(base),
            optimizer: self.optimizer.clone(),
            aggregation: self.aggregation.clone(),
            tensors: self.tensors(),
            spool: &self.spool,
            models: &self.models,
        })
    }

    /// Two tensors, of a third of the values and of the rest.
    fn tensors(&self) -> TensorPlan {
        let parameters = self.layout.plan.parameters();
        TensorPlan::with_ends([parameters / 3, parameters])
    }

    fn parameters(&self, version: u32) -> Vec<f32> {
        let version = self.base(version);
        let content = std::fs::read(version.parameters_path()).unwrap();
        assert_eq!(Digest::of(&content), version.digest());
        content.chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
    }

    /// Where a contribution is spooled.
    fn delta_path(&self, contribution: &WeightedContribution) -> std::path::PathBuf {
        let site = contribution.key.site.as_str();
        let name = format!("spool/pilot/{}/{site}/{}.delta", contribution.key.round, "01".repeat(16));
        self.folder.path().join(name)
    }
}

/// Both steps of every element written as plainly as can be, in the stated order and precision.
fn reference(optimizer: &OuterOptimizer, initial: &[f32], rounds: &[WeightedDeltas]) -> Vec<f32> {
    let mut parameters = initial.to_vec();
    let mut moments = vec![ReferenceMoments::new(optimizer); initial.len()];
    for deltas in rounds {
        let total: f64 = deltas.iter().map(|(weight, _)| weight).sum();
        for i in 0..parameters.len() {
            let mean: f64 =
                deltas.iter().fold(0.0, |sum, (weight, delta)| sum + weight / total * f64::from(delta[i]));
            let d = f64::from(mean as f32);
            parameters[i] = moments[i].step(optimizer, f64::from(parameters[i]), d);
        }
    }
    parameters
}

/// Decoded chunk by chunk, as it was encoded.
fn after_the_wire(encoding: Encoding, chunk: u32, delta: &[f32]) -> Vec<f32> {
    let chunks = delta.chunks(chunk as usize).flat_map(|values| {
        let mut decoded = vec![0.0; values.len()];
        encoding.codec().decode(&encoding.encode(values), &mut decoded).unwrap();
        decoded
    });
    chunks.collect()
}

fn any_vector(length: usize) -> impl Strategy<Value = Vec<f32>> {
    // Values of very different size, so that any other order or precision shows.
    prop::collection::vec(
        (-1f32..1.0, -20i32..20).prop_map(|(value, exponent)| value * 2f32.powi(exponent)),
        length,
    )
}

fn any_optimizer() -> impl Strategy<Value = OuterOptimizer> {
    prop::sample::select(OPTIMIZERS.to_vec())
}

/// A number of parameters, an initial model, two rounds of up to eight weighted deltas.
fn any_run() -> impl Strategy<Value = (Vec<f32>, Vec<WeightedDeltas>)> {
    (1usize..60).prop_flat_map(|length| {
        let round = prop::collection::vec((1f64..1e6, any_vector(length)), 1..9);
        (any_vector(length), prop::collection::vec(round, 2))
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn the_global_model_is_the_same_bits_for_every_arrival_order_thread_count_and_chunk_size(
        (initial, rounds) in any_run(),
        optimizer in any_optimizer(),
        encoding in prop::sample::select(Encoding::ALL.to_vec()),
        chunk in 3u32..70,
        shuffle in any::<u64>(),
    ) {
        for (threads, chunk) in [(1, 4096), (1, chunk), (2, chunk), (3, 7), (8, chunk)] {
            // What the sites' values are after the wire.
            let decoded: Vec<WeightedDeltas> = rounds.iter().map(|deltas| {
                deltas.iter().map(|(weight, delta)| (*weight, after_the_wire(encoding, chunk, delta))).collect()
            }).collect();
            let expected = Digest::of(&bytes(&reference(&optimizer, &initial, &decoded)));
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let fixture = Fixture::new(&initial, chunk, encoding, optimizer.clone());
            let mut digest = None;
            for (round, deltas) in (1..).zip(&rounds) {
                let mut contributions: Vec<_> = (0..).zip(deltas)
                    .map(|(site, (weight, delta))| fixture.deliver(round, &format!("site-{site}"), *weight, delta))
                    .collect();
                let turn = shuffle.wrapping_mul(threads as u64) as usize % contributions.len();
                contributions.rotate_left(turn);
                if shuffle % 2 == 0 {
                    contributions.reverse();
                }
                let reduction = pool.install(|| fixture.reduce(round - 1, &contributions)).unwrap();
                digest = Some(reduction.version.digest());
            }
            prop_assert_eq!(digest, Some(expected), "threads {}, chunk {}", threads, chunk);
        }
    }

    #[test]
    fn the_mean_of_identical_deltas_is_that_delta(
        delta in any_vector(40), weights in prop::collection::vec(1f64..1e6, 1..6),
    ) {
        let fixture = Fixture::new(&[0.0; 40], 16, Encoding::Fp32, OuterOptimizer::FedAvg {});
        let contributions: Vec<_> = (0..).zip(&weights)
            .map(|(site, weight)| fixture.deliver(1, &format!("site-{site}"), *weight, &delta))
            .collect();
        fixture.reduce(0, &contributions).unwrap();
        prop_assert_eq!(fixture.parameters(1), delta);
    }
}

#[test]
fn norms_are_those_of_the_mean_and_of_the_applied_update() {
    let fixture = Fixture::new(
        &[0.0; 4],
        2,
        Encoding::Fp32,
        OuterOptimizer::Nesterov { learning_rate: 0.5, momentum: 0.5 },
    );
    // Mean (3, 4, 0, 12), norm 13; the first step is lr (1 + mu) = 0.75 of it.
    let contributions = [
        fixture.deliver(1, "north", 1.0, &[0.0, 4.0, 0.0, 0.0]),
        fixture.deliver(1, "south", 3.0, &[4.0, 4.0, 0.0, 16.0]),
    ];
    let reduction = fixture.reduce(0, &contributions).unwrap();
    assert_eq!((reduction.delta_norm, reduction.update_norm), (13.0, 9.75));
    assert_eq!(fixture.parameters(1), [2.25, 3.0, 0.0, 9.0]);
}

/// Updates (1, 0, 0, 0) and (1, 1, 0, 0): at 45 degrees.
#[test]
fn successive_updates_are_compared() {
    let fixture = Fixture::new(&[0.0; 4], 2, Encoding::Fp32, OuterOptimizer::FedAvg {});
    let first = fixture.deliver(1, "north", 1.0, &[1.0, 0.0, 0.0, 0.0]);
    let first = fixture.reduce(0, &[first]).unwrap().statistics;
    assert_eq!((first.parameter_norm, first.momentum_norm, first.update_cosine), (1.0, None, None));
    let second = fixture.deliver(2, "north", 1.0, &[1.0, 1.0, 0.0, 0.0]);
    let second = fixture.reduce(1, &[second]).unwrap().statistics;
    assert!((second.parameter_norm - 5f64.sqrt()).abs() < 1e-12);
    assert!((second.update_cosine.unwrap() - 0.5f64.sqrt()).abs() < 1e-12);
}

/// Two rounds of 10 values in chunks of 4, of which the first three are one tensor.
#[test]
fn norms_of_tensors_are_those_of_their_values() {
    let fixture = Fixture::new(
        &[1.0; 10],
        4,
        Encoding::Fp32,
        OuterOptimizer::Sgd { learning_rate: 1.0, momentum: 0.5 },
    );
    let delta = [0.0, 3.0, 4.0, 0.0, 0.0, 5.0, 0.0, 12.0, 0.0, 0.0];
    let norms = |delta, momentum, parameters| TensorNorms { delta, momentum: Some(momentum), parameters };
    let first = fixture.deliver(1, "north", 1.0, &delta);
    let first = fixture.reduce(0, &[first]).unwrap();
    // Values 1, 4, 5; and 1 five times, 6 and 13.
    assert_eq!(first.tensors, [norms(5.0, 5.0, 42f64.sqrt()), norms(13.0, 13.0, 210f64.sqrt())]);
    let second = fixture.deliver(2, "north", 1.0, &[0.0; 10]);
    let second = fixture.reduce(1, &[second]).unwrap();
    assert_eq!(second.tensors[0].delta, 0.0);
    assert_eq!(second.tensors[1].momentum, Some(6.5));
}

#[test]
fn a_second_moment_that_overflows_is_refused() {
    let fixture = Fixture::new(&[0.0; 3], 2, Encoding::Fp32, FEDADAM);
    let contribution = fixture.deliver(1, "north", 1.0, &[0.0, 0.0, 1e30]);
    let error = fixture.reduce(0, &[contribution]).unwrap_err();
    assert!(matches!(error, ReduceError::NotFinite { version: 1, parameter: 2 }), "{error}");
}

#[test]
fn when_every_site_is_at_zero_the_global_model_goes_to_zero() {
    for optimizer in OPTIMIZERS {
        let fixture = Fixture::new(&[1.0, -2.0, 0.5], 2, Encoding::Bf16, optimizer.clone());
        let delta = [-1.0, 2.0, -0.5];
        let contributions = ["a", "b"].map(|site| fixture.deliver(1, site, 2.0, &delta));
        fixture.reduce(0, &contributions).unwrap();
        let before_and_after = [1.0f32, -2.0, 0.5].into_iter().zip(fixture.parameters(1));
        for (before, after) in before_and_after {
            assert!(after.abs() < before.abs() * 0.99, "{optimizer:?}: {before} became {after}");
        }
    }
}

#[test]
fn reducing_again_after_a_crash_gives_the_same_version() {
    let fixture = Fixture::new(&[1.0; 10], 4, Encoding::Fp32, NESTEROV);
    let contributions = [fixture.deliver(1, "north", 1.0, &[0.1; 10])];
    // Killed while writing: the partial version is still there. Killed before the commit: an orphan is.
    std::mem::forget(fixture.models.begin(&run(), 1, fixture.layout).unwrap());
    let first = fixture.reduce(0, &contributions).unwrap().version.digest();
    let second = fixture.reduce(0, &contributions).unwrap().version.digest();
    assert_eq!(first, second);
    assert_eq!(fixture.models.versions(&run()).unwrap(), [0, 1]);
}

/// Reduces a round after `damage` to north's delta: the error must name north and leave no version, and
/// the others can be reduced without it.
fn check_damage(
    damage: impl FnOnce(&Fixture, &mut WeightedContribution),
    expected: fn(&ReduceError) -> bool,
) {
    let fixture = Fixture::new(&[0.0; 10], 4, Encoding::Fp32, OuterOptimizer::FedAvg {});
    let mut north = fixture.deliver(1, "north", 1.0, &[0.5; 10]);
    let south = fixture.deliver(1, "south", 1.0, &[0.25; 10]);
    damage(&fixture, &mut north);
    let error = fixture.reduce(0, &[north, south.clone()]).unwrap_err();
    assert!(expected(&error), "{error:?}");
    assert_eq!(error.spoilt().map(|key| key.site.as_str()), Some("north"));
    assert!(error.to_string().contains("north"), "{error}");
    assert_eq!(fixture.models.versions(&run()).unwrap(), [0]);
    fixture.reduce(0, &[south]).unwrap();
    assert_eq!(fixture.parameters(1), [0.25; 10]);
}

#[test]
fn a_damaged_contribution_is_named_and_can_be_left_out() {
    use std::fs;
    check_damage(
        |fixture, north| {
            let path = fixture.delta_path(north);
            let mut content = fs::read(&path).unwrap();
            *content.last_mut().unwrap() ^= 1;
            fs::write(path, content).unwrap();
        },
        |error| {
            matches!(
                error,
                ReduceError::Damaged { chunk: 2, source: ChunkFault::Spool(SpoolError::Corrupt { .. }), .. }
            )
        },
    );
    check_damage(
        |fixture, north| {
            let other = ContributionKey { delta: [9; 16].into(), ..north.key.clone() };
            fixture.spool.discard_other_deltas(&other).unwrap();
        },
        |error| {
            matches!(
                error,
                ReduceError::Damaged { chunk: 0, source: ChunkFault::Spool(SpoolError::Missing { .. }), .. }
            )
        },
    );
    check_damage(
        |fixture, north| {
            fixture.put(&north.key, 0, &bytes(&[9.0; 4]));
        },
        |error| matches!(error, ReduceError::OtherDelta { .. }),
    );
    check_damage(
        |fixture, north| {
            fixture.put(&north.key, 0, &bytes(&[0.0, f32::NAN, 0.0, 0.0]));
            north.delta_digest = fixture.spooled(&north.key).summary().unwrap().digest;
        },
        |error| matches!(error, ReduceError::Damaged { chunk: 0, source: ChunkFault::Decode(_), .. }),
    );
}

#[test]
fn a_model_that_overflows_is_refused_with_the_parameter() {
    let fixture = Fixture::new(&[f32::MAX; 6], 4, Encoding::Fp32, OuterOptimizer::FedAvg {});
    let contribution = fixture.deliver(1, "north", 1.0, &[0.0, 0.0, 0.0, 0.0, 0.0, f32::MAX]);
    let error = fixture.reduce(0, &[contribution]).unwrap_err();
    assert!(matches!(error, ReduceError::NotFinite { version: 1, parameter: 5 }), "{error}");
    assert_eq!(fixture.models.versions(&run()).unwrap(), [0]);
}

#[test]
fn lists_that_no_round_can_have_are_refused() {
    let fixture = Fixture::new(&[0.0; 4], 4, Encoding::Fp32, OuterOptimizer::FedAvg {});
    let good = fixture.deliver(1, "north", 1.0, &[0.5; 4]);
    assert!(matches!(fixture.reduce(0, &[]), Err(ReduceError::NoContributions { round: 1 })));
    let early = fixture.deliver(2, "south", 1.0, &[0.5; 4]);
    let weightless = |weight| WeightedContribution { weight, ..good.clone() };
    for list in [
        vec![good.clone(), good.clone()],
        vec![good.clone(), early],
        vec![weightless(0.0)],
        vec![weightless(-1.0)],
        vec![weightless(f64::NAN)],
    ] {
        assert!(matches!(fixture.reduce(0, &list), Err(ReduceError::Unfit { round: 1, .. })));
    }
}
