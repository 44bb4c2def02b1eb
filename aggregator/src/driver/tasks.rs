//! The effects that take time: reducing a round, publishing a checkpoint, discarding what is spent. Each
//! runs beside the calls and comes back with an event.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use consort_common::{
    checkpoint,
    ids::{RunName, SiteName},
    spec::{Aggregation, TokenizerSpec},
    tokenizer::{BYTE_END_OF_TEXT, token_id},
    units::{self, unix_ms_now},
};
use tokio::task::spawn_blocking;

use super::{Driver, DriverError, RunMaterial, write_error};
use crate::{
    engine::{Event, ReducedFacts, RoundStatistics, Treatment, Weighted},
    reduce::{self, ReduceInputs, WeightedContribution},
    spool::ContributionKey,
    store::{CheckpointRow, Record},
};

/// Pause before a checkpoint that could not be written is tried again.
const PUBLISH_RETRY: Duration = Duration::from_secs(30);
/// Pause before a reduction that could not be recorded is recorded again.
const RECORD_RETRY: Duration = Duration::from_secs(5);

impl Driver {
    pub(super) fn begin_reduce(
        self: &Arc<Self>,
        material: &Arc<RunMaterial>,
        round: u32,
        contributions: Vec<Weighted>,
    ) {
        if !self.claim(Work::Reduce(material.name.clone(), round)) {
            return;
        }
        let (driver, material) = (self.clone(), material.clone());
        self.tasks.spawn(async move {
            let event = match driver.reduce(&material, round, contributions).await {
                Ok(facts) => Event::Reduced { round, facts },
                Err(error) => {
                    tracing::error!(run = %material.name, round, %error, "the reduction failed");
                    let spoilt = match &error {
                        DriverError::Reduce(error) => error.spoilt().map(|key| (key.site.clone(), key.round)),
                        _ => None,
                    };
                    Event::ReduceFailed { round, reason: error.to_string(), spoilt }
                }
            };
            // The claim goes after the event: until then nothing may write the same version again.
            driver.record_reduction(&material.name, event).await;
            driver.release(&Work::Reduce(material.name.clone(), round));
        });
    }

    /// Applies a reduction's event, as often as it takes: the disk that has no room for a version may have
    /// none for the record of that either, and the round would stand still until the next start.
    async fn record_reduction(self: &Arc<Self>, run: &RunName, event: Event) {
        loop {
            match self.event(run, event.clone()).await {
                Ok(_) => return,
                Err(DriverError::Rejected(rejection)) => {
                    tracing::info!(%run, %rejection, "the run has moved on without the reduction");
                    return;
                }
                Err(error) => {
                    tracing::error!(%run, %error, "the reduction could not be recorded; trying again in {} s", RECORD_RETRY.as_secs());
                }
            }
            tokio::select! {
                () = tokio::time::sleep(RECORD_RETRY) => (),
                () = self.stopping.cancelled() => return,
            }
        }
    }

    async fn reduce(
        self: &Arc<Self>,
        material: &Arc<RunMaterial>,
        round: u32,
        contributions: Vec<Weighted>,
    ) -> Result<ReducedFacts, DriverError> {
        let (driver, material) = (self.clone(), material.clone());
        let begun = unix_ms_now();
        let contributors = contributions.len();
        // What another rule gives is not the deltas' mean.
        let is_mean = material.spec.outer.aggregation == Aggregation::default();
        let reported: BTreeMap<(SiteName, u32), f64> = contributions
            .iter()
            .map(|Weighted { contribution, .. }| {
                let key = (contribution.site.clone(), contribution.round(round));
                (key, contribution.facts.delta_norm)
            })
            .collect();
        let mut claim = driver.early.claim(&material.name).await;
        let outcome = spawn_blocking(move || -> Result<_, DriverError> {
            let contributions = contributions.into_iter().map(|weighted| {
                let contribution = weighted.contribution;
                let key = ContributionKey {
                    run: material.name.clone(),
                    round: contribution.round(round),
                    site: contribution.site,
                    delta: contribution.facts.delta,
                };
                WeightedContribution {
                    key,
                    weight: weighted.weight,
                    encoding: contribution.facts.encoding,
                    delta_digest: contribution.facts.delta_digest,
                }
            });
            let contributions: Vec<_> = contributions.collect();
            if let Some(fold) = claim.take(&contributions) {
                let early = fold.folded();
                match fold.finish(&contributions) {
                    Ok(reduction) => {
                        tracing::info!(round, chunks = material.plan.chunks(), early, "folded early");
                        return Ok(reduction);
                    }
                    Err(error) => {
                        tracing::warn!(round, %error, "what was folded early is of no use; reducing anew");
                    }
                }
            }
            Ok(reduce::reduce(ReduceInputs {
                contributions,
                base: driver.models.open(&material.name, round - 1, material.layout())?,
                optimizer: material.spec.outer.optimizer.clone(),
                aggregation: material.spec.outer.aggregation.clone(),
                tensors: material.tensors.clone(),
                spool: &driver.spool,
                models: &driver.models,
            })?)
        })
        .await
        .map_err(|_| DriverError::TaskFailed("the reduction"))??;
        let took = units::duration_ms(unix_ms_now().saturating_sub(begun));
        let digest = outcome.version.digest();
        tracing::info!(round, contributors, took, digest = %digest.short(), "reduced");
        let spread = spread(&outcome.treatments, &reported, outcome.delta_norm).filter(|_| is_mean);
        Ok(ReducedFacts {
            digest,
            delta_norm: outcome.delta_norm,
            update_norm: outcome.update_norm,
            statistics: RoundStatistics {
                parameter_norm: outcome.statistics.parameter_norm,
                momentum_norm: outcome.statistics.momentum_norm,
                update_cosine: outcome.statistics.update_cosine,
                spread,
            },
            treatments: outcome.treatments,
            tensors: outcome.tensors,
        })
    }

    pub(super) fn begin_publish(self: &Arc<Self>, material: &Arc<RunMaterial>, version: u32) {
        if !self.claim(Work::Publish(material.name.clone(), version)) {
            return;
        }
        let (driver, material) = (self.clone(), material.clone());
        self.tasks.spawn(async move {
            while let Err(error) = driver.publish(&material, version).await {
                if !driver.is_to_be_published(&material.name, version).await {
                    break;
                }
                tracing::error!(run = %material.name, version, %error, "the checkpoint could not be published; trying again in {} s", PUBLISH_RETRY.as_secs());
                tokio::select! {
                    () = tokio::time::sleep(PUBLISH_RETRY) => (),
                    () = driver.stopping.cancelled() => return,
                }
            }
            driver.release(&Work::Publish(material.name.clone(), version));
        });
    }

    async fn publish(self: &Arc<Self>, material: &Arc<RunMaterial>, version: u32) -> Result<(), DriverError> {
        let directory = self.checkpoint_directory(&material.name, version);
        let (driver, description, target) = (self.clone(), material.clone(), directory.clone());
        let (digest, bytes) = spawn_blocking(move || driver.write_checkpoint(&description, version, &target))
            .await
            .map_err(|_| DriverError::TaskFailed("the checkpoint"))??;
        let run = &material.name;
        let turn = self.checkpoints.turn().await;
        tokio::select! {
            uploaded = turn.upload(run, version, &directory) => uploaded?,
            // It goes on with the next start.
            () = self.stopping.cancelled() => return Ok(()),
        }
        tracing::info!(%run, version, path = %directory.display(), "checkpoint published");
        let row = CheckpointRow { version, path: directory, bytes, created_ms: unix_ms_now(), digest };
        let mut records = vec![Record::Checkpoint(row.clone())];
        let retired = {
            let mut core = self.core.lock().await;
            let retired =
                retired_checkpoints(self.store.checkpoints(run).await?, row, material.spec.checkpoints.keep);
            records.extend(retired.iter().map(|checkpoint| Record::CheckpointRetired(checkpoint.version)));
            self.apply_with(&mut core, run, Event::Published { version }, records).await?;
            retired
        };
        // The rows went first: a row never names a directory that is gone.
        for checkpoint in retired {
            if let Err(error) = tokio::fs::remove_dir_all(&checkpoint.path).await {
                let path = checkpoint.path.display();
                tracing::warn!(%run, %path, %error, "a retired checkpoint's folder was not deleted; delete it by hand");
            }
        }
        let kept: Vec<u32> = self.store.checkpoints(run).await?.iter().map(|row| row.version).collect();
        if let Err(error) = turn.retain(run, &kept).await {
            tracing::warn!(%run, %error, "retired checkpoints are still in the object store; the next one published deletes them");
        }
        Ok(())
    }

    async fn is_to_be_published(&self, run: &RunName, version: u32) -> bool {
        let core = self.core.lock().await;
        core.run(run).is_ok_and(|live| live.run.state().unpublished.contains(&version))
    }

    fn write_checkpoint(
        &self,
        material: &RunMaterial,
        version: u32,
        directory: &std::path::Path,
    ) -> Result<(consort_common::ids::Digest, u64), DriverError> {
        let model = self.models.open(&material.name, version, material.layout())?;
        let tokenizer_path = self.tokenizer_path(&material.name);
        let tokenizer = std::fs::read_to_string(&tokenizer_path)
            .map_err(|source| DriverError::Read { what: tokenizer_path.display().to_string(), source })?;
        let (end_of_text, end_of_text_id) = end_of_text(&material.spec.tokenizer, &tokenizer)?;
        if let Some(parent) = directory.parent() {
            std::fs::create_dir_all(parent).map_err(|source| write_error(parent, source))?;
        }
        let metadata = [
            ("consort_run", material.name.to_string()),
            ("consort_version", version.to_string()),
            ("consort_model_blake3", model.digest().to_string()),
            ("consort_spec_blake3", material.spec_digest.to_string()),
            (checkpoint::DOCUMENT_MASK, material.spec.training.document_mask.to_string()),
        ];
        let metadata = metadata.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        let mut values = model.reader();
        let written = checkpoint::write_from(
            directory,
            &material.spec.model,
            &mut values,
            &tokenizer,
            &end_of_text,
            end_of_text_id,
            &metadata,
        );
        if let Some(fault) = values.into_fault() {
            return Err(fault.into());
        }
        Ok((model.digest(), written?.bytes))
    }

    fn checkpoint_directory(&self, run: &RunName, version: u32) -> PathBuf {
        let checkpoints = self.state_directory.join("checkpoints");
        checkpoints.join(run.as_str()).join(format!("version-{version:06}"))
    }

    /// Deletes spooled chunks of rounds up to `round` but those of `rounds_to_keep`, and model versions that nobody
    /// needs any more: the newest is the base of the round in progress, the one before may still be on its way to a
    /// site, and sites that are behind may ask again for what they train from.
    pub(super) fn begin_discard(
        self: &Arc<Self>,
        material: &Arc<RunMaterial>,
        round: u32,
        rounds_to_keep: BTreeSet<u32>,
    ) {
        let (driver, material) = (self.clone(), material.clone());
        self.tasks.spawn(async move {
            let keep: Vec<u32> = {
                let core = driver.core.lock().await;
                let Ok(live) = core.run(&material.name) else { return };
                let state = live.run.state();
                let newest = [state.version, state.version.saturating_sub(1)];
                state.unpublished.iter().copied().chain(state.bases()).chain(newest).collect()
            };
            let name = material.name.clone();
            let discarded = spawn_blocking(move || -> Result<(), DriverError> {
                driver.spool.discard_rounds_through(&material.name, round, &rounds_to_keep)?;
                Ok(driver.models.retain(&material.name, &keep)?)
            });
            match discarded.await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(run = %name, %error, "spent files were not deleted; the next round or start tries again"),
                Err(error) => tracing::warn!(run = %name, %error, "spent files were not deleted; the next round or start tries again"),
            }
        });
    }

    /// Marks work as under way; false if it is already.
    pub(super) fn claim(&self, work: Work) -> bool {
        self.under_way.lock().unwrap_or_else(std::sync::PoisonError::into_inner).insert(work)
    }

    pub(super) fn release(&self, work: &Work) {
        self.under_way.lock().unwrap_or_else(std::sync::PoisonError::into_inner).remove(work);
    }
}

/// Weighted mean of the squared distances of the deltas to their mean, as a multiple of the mean's squared norm:
/// the mean of their squares, less the square of their mean. Norms are those that the reduction found; it finds none
/// of fp32 and bf16 deltas that it does not decode, which have those that the sites `reported`, but for bf16's rounding.
fn spread(
    treatments: &[Treatment],
    reported: &BTreeMap<(SiteName, u32), f64>,
    mean_norm: f64,
) -> Option<f64> {
    let total: f64 = treatments.iter().map(|one| one.weight).sum();
    let norm = |one: &Treatment| one.norm.or_else(|| reported.get(&(one.site.clone(), one.round)).copied());
    let squares: Option<Vec<f64>> =
        treatments.iter().map(|one| Some(one.weight / total * norm(one)?.powi(2))).collect();
    let spread = squares?.iter().sum::<f64>() / mean_norm.powi(2) - 1.0;
    spread.is_finite().then_some(spread.max(0.0))
}

/// What the specification does not keep (`keep` newest; 0: all) of the published checkpoints and `new`,
/// which may be older than some: it may have been tried for long.
fn retired_checkpoints(
    mut published: Vec<CheckpointRow>,
    new: CheckpointRow,
    keep: u32,
) -> Vec<CheckpointRow> {
    published.retain(|checkpoint| checkpoint.version != new.version);
    published.push(new);
    published.sort_by_key(|checkpoint| checkpoint.version);
    let kept = if keep == 0 { published.len() } else { keep as usize };
    published.truncate(published.len().saturating_sub(kept));
    published
}

/// Work that must not be under way twice.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Work {
    Create(RunName),
    Reduce(RunName, u32),
    Publish(RunName, u32),
}

fn end_of_text(spec: &TokenizerSpec, tokenizer_json: &str) -> Result<(String, u32), DriverError> {
    let text = match spec {
        TokenizerSpec::Byte {} => BYTE_END_OF_TEXT,
        TokenizerSpec::File { end_of_text, .. } => end_of_text,
    };
    let json =
        serde_json::from_str(tokenizer_json).map_err(|error| DriverError::Tokenizer(error.to_string()))?;
    let id = token_id(&json, text).ok_or_else(|| DriverError::Tokenizer(format!("has no token {text:?}")))?;
    Ok((text.to_owned(), id))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Deltas (3, 0) and (0, 3) with the weights 1 and 2: their mean is (1, 2), of squared norm 5; the first is
    /// (2, -2) from it, the second (-1, 1), of squares 8 and 2, in the mean 12 / 3 = 4.
    #[test]
    fn the_spread_is_the_mean_squared_distance_to_the_mean() {
        let treatment = |site: &str, weight, norm| {
            let site = site.parse().unwrap();
            Treatment { site, round: 1, weight, norm, clip: None, selected: None }
        };
        let reported =
            |norm| BTreeMap::from([(("a".parse().unwrap(), 1), norm), (("b".parse().unwrap(), 1), 500.0)]);
        // Of the first as its site reported it; of the second, whose site was wrong or lossy, as it was found.
        let both = [treatment("a", 1.0, None), treatment("b", 2.0, Some(3.0))];
        let found = spread(&both, &reported(3.0), 5f64.sqrt()).unwrap();
        assert!((found - 4.0 / 5.0).abs() < 1e-12, "{found}");
        // Nothing is known of the first.
        assert_eq!(spread(&both, &BTreeMap::new(), 5f64.sqrt()), None);
        // A little below 0 by rounding.
        assert_eq!(spread(&both[..1], &reported(3.0), 3.000_001), Some(0.0));
        assert_eq!(spread(&both[..1], &reported(0.0), 0.0), None);
        assert_eq!(spread(&both[..1], &reported(1.0), 0.0), None);
    }

    #[test]
    fn a_checkpoint_that_was_published_late_does_not_retire_a_newer_one() {
        let row = |version: u32| CheckpointRow {
            version,
            path: PathBuf::new(),
            bytes: 0,
            created_ms: 0,
            digest: consort_common::ids::Digest::of(b""),
        };
        let check = |published: &[u32], new, keep, expected: &[u32]| {
            let retired = retired_checkpoints(published.iter().copied().map(row).collect(), row(new), keep);
            assert_eq!(retired.iter().map(|row| row.version).collect::<Vec<_>>(), expected);
        };
        check(&[4], 3, 1, &[3]);
        check(&[1, 2, 3], 4, 3, &[1]);
        check(&[1, 2], 2, 3, &[]);
        check(&[1, 2, 3], 4, 0, &[]);
    }
}
