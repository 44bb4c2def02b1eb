//! The spool: uploaded deltas, durable before they are acknowledged.
//!
//! In a local directory (see `directory`) or in an object store (see `objects`); the rules are the same. A
//! chunk is there whole or not at all, and is verified again whenever it is read: the spool never returns
//! bytes that it did not accept. It does not know what a payload means, and decides neither who may write nor
//! when a round's deltas are no longer needed. Calls block: async callers use `spawn_blocking`.

mod chunks;
mod delta;
mod delta_file;
mod delta_objects;
mod directory;
mod error;
mod layout;
mod objects;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use consort_common::ids::{DeltaId, Digest, RunName, SiteName};

use self::{chunks::Chunk, delta::Medium, delta_file::DeltaFile, directory::Directory, objects::Objects};
pub use self::{
    delta::SpooledDelta,
    error::{Bound, SpoolError},
    layout::DeltaLayout,
};
use crate::storage::{Storage, StorageError};

/// Which delta a chunk belongs to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContributionKey {
    /// The run.
    pub run: RunName,
    /// The round, from 1; 0: the model that the run starts from.
    pub round: u32,
    /// The site that trained.
    pub site: SiteName,
    /// Drawn by the site when it computed the delta: chunks of two deltas are never mixed.
    pub delta: DeltaId,
}

impl fmt::Display for ContributionKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.round == 0 {
            return write!(f, "the model that run {} starts from", self.run);
        }
        write!(f, "{}'s delta for round {} of run {}", self.site, self.round, self.run)
    }
}

/// A complete delta, as spooled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeltaSummary {
    /// BLAKE3 over its chunks' digests, in chunk order.
    pub digest: Digest,
    /// Total of its encoded chunks' lengths.
    pub bytes: u64,
}

/// What a spool may occupy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SpoolLimits {
    /// What stays free on the filesystem, for reduction and the database to finish; of no concern to deltas
    /// in an object store.
    pub disk_reserve_bytes: u64,
    /// Most that all deltas take together; 0: what there is.
    pub total_bytes_max: u64,
    /// Most that the deltas of one site take together; 0: what there is.
    pub site_bytes_max: u64,
}

impl SpoolLimits {
    /// Whether `bytes` fit, where so many are taken over all sites and by the one.
    fn check(&self, total_bytes: u64, site_bytes: u64, bytes: u64) -> Result<(), Bound> {
        let exceeds = |taken: u64, max| max > 0 && taken.saturating_add(bytes) > max;
        if exceeds(total_bytes, self.total_bytes_max) {
            return Err(Bound::Total { bytes_max: self.total_bytes_max });
        }
        if exceeds(site_bytes, self.site_bytes_max) {
            return Err(Bound::Site { bytes_max: self.site_bytes_max });
        }
        Ok(())
    }
}

/// A delta's place in the table of open ones: locked while it is opened, which can take a while.
type Place = Arc<Mutex<Option<Arc<SpooledDelta>>>>;

/// Where all deltas are.
#[derive(Debug)]
enum Deltas {
    Directory(Directory),
    Objects(Objects),
}

/// The deltas of all runs that wait to be averaged.
#[derive(Debug)]
pub struct Spool {
    deltas: Deltas,
    limits: SpoolLimits,
    /// Deltas that this process has opened, until they are discarded.
    open: Mutex<BTreeMap<ContributionKey, Place>>,
}

impl Spool {
    /// A spool under `root`, which is created with the first delta.
    pub fn new(root: impl Into<PathBuf>, limits: SpoolLimits) -> Self {
        Self { deltas: Deltas::Directory(Directory::new(root.into())), limits, open: Mutex::default() }
    }

    /// The spool in an object store, with what an earlier process left there.
    ///
    /// # Errors
    /// The store's refusal.
    pub async fn in_storage(storage: Storage, limits: SpoolLimits) -> Result<Self, StorageError> {
        let deltas = Deltas::Objects(Objects::open(storage).await?);
        Ok(Self { deltas, limits, open: Mutex::default() })
    }

    /// The site's delta of that key, to be received: its space is taken, and in a directory its name is
    /// durable. What an earlier process stored of it is verified and held.
    ///
    /// # Errors
    /// [`SpoolError::Full`], or the system's or the store's refusal. Nothing is stored then.
    pub fn receive(
        &self,
        key: &ContributionKey,
        layout: DeltaLayout,
    ) -> Result<Arc<SpooledDelta>, SpoolError> {
        self.open(key, layout, || match &self.deltas {
            Deltas::Directory(directory) => in_file(directory.create(key, layout, &self.limits)?, layout),
            Deltas::Objects(objects) => {
                objects.take_space(key, layout, &self.limits)?;
                let (delta, chunks) = objects.open_delta(key, layout)?;
                Ok((Medium::Objects(delta), chunks))
            }
        })
    }

    /// The delta of that key, to be read.
    ///
    /// # Errors
    /// [`SpoolError::Missing`] with its first chunk if there is none, or the system's or the store's refusal.
    pub fn stored(
        &self,
        key: &ContributionKey,
        layout: DeltaLayout,
    ) -> Result<Arc<SpooledDelta>, SpoolError> {
        self.open(key, layout, || match &self.deltas {
            Deltas::Directory(directory) => in_file(directory.open(key, layout)?, layout),
            Deltas::Objects(objects) => {
                let (delta, chunks) = objects.open_delta(key, layout)?;
                if chunks.iter().all(|chunk| *chunk == Chunk::Missing) {
                    return Err(SpoolError::Missing { key: Box::new(key.clone()), index: 0 });
                }
                Ok((Medium::Objects(delta), chunks))
            }
        })
    }

    fn open(
        &self,
        key: &ContributionKey,
        layout: DeltaLayout,
        open: impl FnOnce() -> Result<(Medium, Vec<Chunk>), SpoolError>,
    ) -> Result<Arc<SpooledDelta>, SpoolError> {
        let place = lock(&self.open).entry(key.clone()).or_default().clone();
        let mut place = lock(&place);
        if let Some(delta) = place.as_ref().filter(|delta| delta.layout() == layout) {
            return Ok(delta.clone());
        }
        let delta = Arc::new(SpooledDelta::new(key.clone(), layout, open()?));
        *place = Some(delta.clone());
        Ok(delta)
    }

    /// Forgets what the site has spooled for the round under other delta ids than this one's: what a site
    /// can occupy stays bounded however often it computes its delta anew.
    pub fn discard_other_deltas(&self, key: &ContributionKey) -> Result<(), SpoolError> {
        self.close(|other| {
            (&other.run, other.round, &other.site) == (&key.run, key.round, &key.site)
                && other.delta != key.delta
        });
        match &self.deltas {
            Deltas::Directory(directory) => Ok(directory.remove_other_deltas(key)?),
            Deltas::Objects(objects) => objects.remove_other_deltas(key),
        }
    }

    /// Forgets a round's deltas.
    pub fn discard_round(&self, run: &RunName, round: u32) -> Result<(), SpoolError> {
        self.close(|key| key.run == *run && key.round == round);
        match &self.deltas {
            Deltas::Directory(directory) => Ok(directory.remove_round(run, round)?),
            Deltas::Objects(objects) => objects.remove(run, |key| key.round == round),
        }
    }

    /// Forgets the deltas of all rounds of a run up to `round`, which included, but for those of `keep`.
    pub fn discard_rounds_through(
        &self,
        run: &RunName,
        round: u32,
        keep: &BTreeSet<u32>,
    ) -> Result<(), SpoolError> {
        let is_spent = |spooled: u32| spooled <= round && !keep.contains(&spooled);
        match &self.deltas {
            Deltas::Directory(directory) => directory
                .rounds(run)?
                .into_iter()
                .filter(|spooled| is_spent(*spooled))
                .try_for_each(|spooled| self.discard_round(run, spooled)),
            Deltas::Objects(objects) => {
                self.close(|key| key.run == *run && is_spent(key.round));
                objects.remove(run, |key| is_spent(key.round))
            }
        }
    }

    /// Takes deltas off the table of open ones; those that use them see to what that means.
    fn close(&self, unwanted: impl Fn(&ContributionKey) -> bool) {
        let closed: Vec<Place> =
            lock(&self.open).extract_if(.., |key, _| unwanted(key)).map(|(_, place)| place).collect();
        for place in closed {
            if let Some(delta) = lock(&place).as_ref() {
                delta.discard();
            }
        }
    }
}

fn in_file(file: std::fs::File, layout: DeltaLayout) -> Result<(Medium, Vec<Chunk>), SpoolError> {
    let (file, chunks) = DeltaFile::open(file, layout)?;
    Ok((Medium::File(file), chunks))
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
