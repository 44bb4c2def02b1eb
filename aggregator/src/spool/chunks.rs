//! What is known of each chunk of one delta, shared by those who send it and by the tasks that store it.

use std::{
    collections::BTreeMap,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

use super::layout::Entry;
use crate::storage::StorageError;

/// What is known of one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Chunk {
    /// Not there, or damaged.
    Missing,
    /// On its way to the object store, which has not said that it has it.
    Sent(Entry),
    /// In the file; a power failure could still take it.
    Written(Entry),
    /// There for good.
    Durable(Entry),
}

/// What is known of one delta.
#[derive(Debug)]
pub(super) struct State {
    pub(super) chunks: Vec<Chunk>,
    /// Written or sent since the last sync.
    pub(super) unsynced: Vec<u32>,
    /// Why chunks that were sent are missing, until a sync tells it.
    pub(super) failures: BTreeMap<u32, StorageError>,
    /// How many chunks are on their way.
    pub(super) sent: usize,
    /// Whether the delta is accepted: it does not change any more.
    pub(super) sealed: bool,
    /// Whether the delta is no longer wanted.
    pub(super) discarded: bool,
}

/// The state, and who waits for chunks that are on their way.
#[derive(Debug)]
pub(super) struct Progress {
    state: Mutex<State>,
    settled: Condvar,
}

impl Progress {
    pub(super) fn new(chunks: Vec<Chunk>) -> Self {
        let state = State {
            chunks,
            unsynced: Vec::new(),
            failures: BTreeMap::new(),
            sent: 0,
            sealed: false,
            discarded: false,
        };
        Self { state: Mutex::new(state), settled: Condvar::new() }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The state once chunks that were waited for have arrived or failed.
    pub(super) fn state_after(&self, waiting: impl Fn(&State) -> bool) -> MutexGuard<'_, State> {
        let state = self.settled.wait_while(self.state(), |state| waiting(state));
        state.unwrap_or_else(PoisonError::into_inner)
    }

    /// A chunk that was on its way has arrived or failed.
    pub(super) fn settle(&self, index: u32, entry: Entry, outcome: Result<(), StorageError>) {
        let mut state = self.state();
        state.sent -= 1;
        state.chunks[index as usize] = match outcome {
            Ok(()) => Chunk::Durable(entry),
            Err(error) => {
                state.failures.insert(index, error);
                Chunk::Missing
            }
        };
        drop(state);
        self.settled.notify_all();
    }
}
