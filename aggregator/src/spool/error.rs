//! Why the spool did not do what was asked.

use std::{fmt, io};

use consort_common::units;

use super::ContributionKey;
use crate::storage::{Fault, StorageError};

/// What there is no room under.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// The filesystem.
    Disk {
        /// What it has left.
        available_bytes: u64,
        /// What must stay free.
        reserve_bytes: u64,
    },
    /// The bound for all sites together.
    Total {
        /// As configured.
        bytes_max: u64,
    },
    /// The bound for each site.
    Site {
        /// As configured.
        bytes_max: u64,
    },
    /// The object store's own.
    Store,
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Disk { available_bytes, reserve_bytes } => write!(
                f,
                "the aggregator's disk has {} left and {} are kept in reserve",
                units::bytes(*available_bytes),
                units::bytes(*reserve_bytes)
            ),
            Self::Total { bytes_max } => {
                write!(
                    f,
                    "the deltas of all sites may take {} (limits.spool_bytes_max)",
                    units::bytes(*bytes_max)
                )
            }
            Self::Site { bytes_max } => {
                write!(
                    f,
                    "the deltas of a site may take {} (limits.spool_bytes_per_site_max)",
                    units::bytes(*bytes_max)
                )
            }
            Self::Store => f.write_str("the object store takes no more data"),
        }
    }
}

/// Why the spool did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    /// There is no room; retrying later makes sense.
    #[error("{key} was not stored: {bound}; retry when the aggregator's operator has made room")]
    Full {
        /// Whose delta.
        key: Box<ContributionKey>,
        /// What it does not fit under.
        bound: Bound,
    },
    /// The delta is accepted and does not change any more.
    #[error("{key} is being accepted and takes no further chunks")]
    Sealed {
        /// Whose delta.
        key: Box<ContributionKey>,
    },
    /// The chunk was never stored, or its round was discarded.
    #[error("chunk {index} of {key} is not in the spool")]
    Missing {
        /// Whose chunk.
        key: Box<ContributionKey>,
        /// Which chunk.
        index: u32,
    },
    /// The chunk changed after it was stored.
    #[error(
        "chunk {index} of {key} is damaged in the aggregator's spool ({reason}); it must be sent again or left out"
    )]
    Corrupt {
        /// Whose chunk.
        key: Box<ContributionKey>,
        /// Which chunk.
        index: u32,
        /// What is wrong with it.
        reason: String,
    },
    /// The system refused an operation; the error names it and the path.
    #[error("the spool failed: {0}")]
    Io(#[from] io::Error),
    /// The object store did not do what was asked; it was asked several times.
    #[error(transparent)]
    Storage(StorageError),
}

impl SpoolError {
    /// The chunk that the error is about; 0 where it is about none.
    pub(crate) fn chunk(&self) -> u32 {
        match self {
            Self::Missing { index, .. } | Self::Corrupt { index, .. } => *index,
            Self::Full { .. } | Self::Sealed { .. } | Self::Io(_) | Self::Storage(_) => 0,
        }
    }

    /// What the object store said of a delta.
    pub(super) fn of_storage(key: &ContributionKey, error: StorageError) -> Self {
        if error.fault() == Fault::Full {
            return Self::Full { key: Box::new(key.clone()), bound: Bound::Store };
        }
        Self::Storage(error)
    }

    /// What the system said of a delta.
    pub(super) fn of_system(key: &ContributionKey, error: io::Error) -> Self {
        if is_full(&error) {
            // Where the system could not reserve the space beforehand.
            let bound = Bound::Disk { available_bytes: 0, reserve_bytes: 0 };
            return Self::Full { key: Box::new(key.clone()), bound };
        }
        error.into()
    }
}

pub(super) fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
