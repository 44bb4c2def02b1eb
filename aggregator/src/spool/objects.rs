//! The spool in an object store: `spool/<run>/<round>/<site>/<delta id>/<index>`, an object per chunk.
//!
//! What the deltas take is counted here, in memory: the store has no bound of its own that could be asked,
//! and nobody else writes below the aggregator's prefix.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use consort_common::ids::RunName;
use futures::TryStreamExt;
use tokio::sync::Semaphore;

use super::{
    ContributionKey, DeltaLayout, SpoolError, SpoolLimits,
    chunks::Chunk,
    delta_objects::{DeltaObjects, PUTS_MAX},
    lock,
};
use crate::storage::{Storage, StorageError};

/// Below which all deltas are.
const ROOT: &str = "spool";

#[derive(Debug)]
pub(super) struct Objects {
    storage: Storage,
    puts: Arc<Semaphore>,
    /// What each delta takes: its whole space once its upload has begun, else what is stored of it, in bytes.
    taken: Mutex<BTreeMap<ContributionKey, u64>>,
}

impl Objects {
    /// Finds out what there is.
    pub(super) async fn open(storage: Storage) -> Result<Self, StorageError> {
        let mut taken = BTreeMap::new();
        let mut stored = std::pin::pin!(storage.list(ROOT));
        while let Some((name, bytes)) = stored.try_next().await? {
            // Anything else is none of the spool's.
            if let Some(key) = key(&name) {
                *taken.entry(key).or_insert(0) += bytes;
            }
        }
        Ok(Self { storage, puts: Arc::new(Semaphore::new(PUTS_MAX)), taken: Mutex::new(taken) })
    }

    #[cfg(test)]
    pub(super) fn storage(&self) -> &Storage {
        &self.storage
    }

    /// Takes the space of a delta that is to be received.
    pub(super) fn take_space(
        &self,
        key: &ContributionKey,
        layout: DeltaLayout,
        limits: &SpoolLimits,
    ) -> Result<(), SpoolError> {
        let mut taken = lock(&self.taken);
        let bytes = layout.objects_bytes();
        let others = || taken.iter().filter(|(other, _)| *other != key);
        let total_bytes = others().map(|(_, bytes)| bytes).sum();
        let of_site = others().filter(|(other, _)| (&other.run, &other.site) == (&key.run, &key.site));
        let site_bytes = of_site.map(|(_, bytes)| bytes).sum();
        limits
            .check(total_bytes, site_bytes, bytes)
            .map_err(|bound| SpoolError::Full { key: Box::new(key.clone()), bound })?;
        taken.insert(key.clone(), bytes);
        Ok(())
    }

    /// What the store holds of a delta.
    pub(super) fn open_delta(
        &self,
        key: &ContributionKey,
        layout: DeltaLayout,
    ) -> Result<(DeltaObjects, Vec<Chunk>), SpoolError> {
        let opened = DeltaObjects::open(self.storage.clone(), name(key), self.puts.clone(), layout);
        self.storage.wait(opened).map_err(SpoolError::Storage)
    }

    /// Removes what the store holds of those of a run's deltas that are `unwanted`. Looks at what is there
    /// and not at what is known to be: a write that was given up may have arrived since.
    pub(super) fn remove(
        &self,
        run: &RunName,
        unwanted: impl Fn(&ContributionKey) -> bool,
    ) -> Result<(), SpoolError> {
        self.remove_below(&format!("{ROOT}/{run}"), unwanted)
    }

    /// Removes what the site has spooled for the round but this delta.
    pub(super) fn remove_other_deltas(&self, key: &ContributionKey) -> Result<(), SpoolError> {
        let site = format!("{ROOT}/{}/{}/{}", key.run, key.round, key.site);
        self.remove_below(&site, |other| other.delta != key.delta)
    }

    fn remove_below(
        &self,
        below: &str,
        unwanted: impl Fn(&ContributionKey) -> bool,
    ) -> Result<(), SpoolError> {
        let removal = async {
            let stored: Vec<(String, u64)> = self.storage.list(below).try_collect().await?;
            let names = stored.into_iter().map(|(name, _)| name);
            let names: Vec<String> =
                names.filter(|name| key(name).is_some_and(|key| unwanted(&key))).collect();
            self.storage.delete(&names).await
        };
        self.storage.wait(removal).map_err(SpoolError::Storage)?;
        let is_below =
            |key: &ContributionKey| name(key).strip_prefix(below).is_some_and(|rest| rest.starts_with('/'));
        lock(&self.taken).retain(|key, _| !is_below(key) || !unwanted(key));
        Ok(())
    }
}

/// Name of a delta.
fn name(key: &ContributionKey) -> String {
    let ContributionKey { run, round, site, delta } = key;
    format!("{ROOT}/{run}/{round}/{site}/{delta}")
}

/// The delta that an object is a chunk of.
fn key(name: &str) -> Option<ContributionKey> {
    let parts: Vec<&str> = name.split('/').collect();
    let [ROOT, run, round, site, delta, _index] = parts[..] else { return None };
    Some(ContributionKey {
        run: run.parse().ok()?,
        round: round.parse().ok()?,
        site: site.parse().ok()?,
        delta: delta.to_owned().try_into().ok()?,
    })
}
