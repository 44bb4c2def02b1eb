use std::time::Duration;

use consort_common::{
    chunk::ChunkPlan,
    codec::{Encoding, ModelEncoding},
    ids::{DeltaId, Digest},
};
use tempfile::TempDir;

use super::*;
use crate::{
    reduce::{self, ReduceInputs},
    spool::{ContributionKey, DeltaLayout, Spool, SpoolLimits},
};

/// A run of 12 values in 3 chunks, and what its two sites send.
struct World {
    folder: TempDir,
    spool: Spool,
    models: ModelFiles,
    early: EarlyFolds,
}

fn run() -> RunName {
    "pilot".parse().unwrap()
}

fn layout() -> ModelLayout {
    let (plan, encoding) = (ChunkPlan::new(12, 4), ModelEncoding::Fp32);
    ModelLayout { plan, encoding, momentum: false, second_moment: false, fragments: 1 }
}

fn expected(sites: &[&str]) -> Option<ExpectedRound> {
    let weight = 1.0 / sites.len() as f64;
    Some(ExpectedRound {
        round: 1,
        weights: sites.iter().map(|site| (site.parse().unwrap(), weight)).collect(),
        layout: layout(),
        optimizer: OuterOptimizer::FedAvg {},
        aggregation: Aggregation::default(),
        tensors: TensorPlan::with_ends([12]),
    })
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let models = ModelFiles::new(folder.path().join("models"));
        let fill = |_, values: &mut [f32]| {
            values.fill(0.5);
            Ok::<_, ReduceError>(())
        };
        reduce::create_initial(&models, &run(), layout(), fill).unwrap();
        let early = EarlyFolds::new(models.clone(), 0, TaskTracker::new(), CancellationToken::new());
        early.expect(&run(), expected(&["north", "south"]));
        let spool = Spool::new(folder.path().join("spool"), SpoolLimits::default());
        Self { folder, spool, models, early }
    }

    fn delta(&self, site: &str, id: u8) -> Arc<SpooledDelta> {
        let delta = DeltaId::from([id; 16]);
        let key = ContributionKey { run: run(), round: 1, site: site.parse().unwrap(), delta };
        self.spool.receive(&key, DeltaLayout::new(layout().plan, Encoding::Fp32)).unwrap()
    }

    /// The site's delta `id` has chunks with that value; some of them arrive.
    fn store(&self, site: &str, id: u8, indices: &[u32]) {
        let delta = self.delta(site, id);
        for index in indices {
            let payload = Encoding::Fp32.encode(&[f32::from(id) * 0.3; 4]);
            delta.write(*index, &payload, Digest::of(&payload)).unwrap();
        }
        delta.sync(|_| true).unwrap();
        self.early.chunks_stored(&delta, indices);
    }

    fn accepted(&self, deltas: &[(&str, u8)]) -> Vec<WeightedContribution> {
        let accepted = |(site, id): &(&str, u8)| {
            let delta = self.delta(site, *id);
            WeightedContribution {
                key: delta.key().clone(),
                weight: 1.0 / deltas.len() as f64,
                encoding: Encoding::Fp32,
                delta_digest: delta.summary().unwrap().digest,
            }
        };
        deltas.iter().map(accepted).collect()
    }

    /// Waits until the fold in progress has `count` chunks; none: until there is no fold.
    async fn folded(&self, count: Option<usize>) {
        let run = self.early.run(&run());
        let reached = async {
            while run.slot.lock().await.as_ref().map(|begun| begun.fold.folded()) != count {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), reached).await.expect("it is never reached");
    }

    /// The digest of the version that a reduction makes, with what was folded early or without.
    fn reduce(&self, early: Option<RoundFold>, contributions: &[WeightedContribution]) -> Digest {
        let inputs = ReduceInputs {
            contributions: contributions.to_vec(),
            base: self.models.open(&run(), 0, layout()).unwrap(),
            optimizer: OuterOptimizer::FedAvg {},
            aggregation: Aggregation::default(),
            tensors: TensorPlan::with_ends([12]),
            spool: &self.spool,
            models: &self.models,
        };
        let reduction = match early {
            Some(fold) => fold.finish(contributions),
            None => reduce::reduce(inputs),
        };
        reduction.unwrap().version.digest()
    }

    fn model_directories(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.folder.path().join("models/pilot")).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

#[tokio::test]
async fn a_round_is_folded_while_it_arrives_and_reduced_to_the_same_version() {
    let world = World::new();
    world.store("north", 1, &[0, 1, 2]);
    world.store("south", 2, &[2]);
    world.folded(Some(1)).await;
    world.store("south", 2, &[0]);
    world.folded(Some(2)).await;
    world.store("south", 2, &[1]);
    world.folded(Some(3)).await;

    let contributions = world.accepted(&[("north", 1), ("south", 2)]);
    let mut claim = world.early.claim(&run()).await;
    let fold = claim.take(&contributions).expect("it is folded early");
    let early = world.reduce(Some(fold), &contributions);
    assert_eq!(early, world.reduce(None, &contributions));
}

#[tokio::test]
async fn what_was_folded_for_another_set_of_sites_is_thrown_away() {
    let world = World::new();
    world.store("north", 1, &[0, 1, 2]);
    world.store("south", 2, &[0, 1, 2]);
    world.folded(Some(3)).await;
    // South is replaced: north and east are expected now.
    world.early.expect(&run(), expected(&["east", "north"]));
    world.folded(None).await;
    assert_eq!(world.model_directories(), ["0"]);
    world.store("east", 3, &[1]);
    world.folded(Some(1)).await;

    // In the end only north is there.
    let contributions = world.accepted(&[("north", 1)]);
    let mut claim = world.early.claim(&run()).await;
    assert!(claim.take(&contributions).is_none());
    assert_eq!(world.model_directories(), ["0"]);
    world.reduce(None, &contributions);
}

#[tokio::test]
async fn a_delta_that_a_site_computed_anew_takes_the_place_of_the_first() {
    let world = World::new();
    world.store("north", 1, &[0, 1, 2]);
    world.store("south", 2, &[0, 1]);
    world.folded(Some(2)).await;
    world.store("south", 4, &[0]);
    world.folded(Some(1)).await;
    world.store("south", 4, &[1, 2]);
    world.folded(Some(3)).await;

    let contributions = world.accepted(&[("north", 1), ("south", 4)]);
    let mut claim = world.early.claim(&run()).await;
    let early = world.reduce(claim.take(&contributions), &contributions);
    assert_eq!(early, world.reduce(None, &contributions));
}

#[tokio::test]
async fn a_run_that_is_aborted_leaves_nothing() {
    let world = World::new();
    world.store("north", 1, &[0, 1, 2]);
    world.store("south", 2, &[0]);
    world.folded(Some(1)).await;
    assert_eq!(world.model_directories(), [".1.partial", "0"]);
    world.early.expect(&run(), None);
    world.folded(None).await;
    assert_eq!(world.model_directories(), ["0"]);
    world.store("south", 2, &[1, 2]);
    assert!(lock(&world.early.run(&run()).arrivals).deltas.is_empty());
}

#[tokio::test]
async fn nothing_is_folded_while_the_round_is_being_reduced() {
    let world = World::new();
    world.store("north", 1, &[0, 1, 2]);
    let claim = world.early.claim(&run()).await;
    // The engine still reduces this round, and a message comes late.
    world.early.expect(&run(), expected(&["north", "south"]));
    world.store("north", 1, &[0, 1, 2]);
    world.store("south", 2, &[0, 1, 2]);
    tokio::task::yield_now().await;
    assert_eq!(world.model_directories(), ["0"]);
    drop(claim);
    // The reduction failed; the engine expects the round again.
    world.early.expect(&run(), expected(&["north", "south"]));
    world.store("north", 1, &[0, 1, 2]);
    world.store("south", 2, &[0, 1, 2]);
    world.folded(Some(3)).await;
}

#[tokio::test]
async fn a_disk_that_others_need_is_left_to_them() {
    let world = World::new();
    let early = EarlyFolds::new(world.models.clone(), u64::MAX, TaskTracker::new(), CancellationToken::new());
    let world = World { early, ..world };
    world.early.expect(&run(), expected(&["north", "south"]));
    world.store("north", 1, &[0, 1, 2]);
    world.store("south", 2, &[0, 1, 2]);
    // The task has done all that it was given when no chunk is left to fold.
    while !lock(&world.early.run(&run()).arrivals).ready.is_empty() {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    assert_eq!(world.model_directories(), ["0"]);
    let contributions = world.accepted(&[("north", 1), ("south", 2)]);
    let mut claim = world.early.claim(&run()).await;
    assert!(claim.take(&contributions).is_none());
}
