//! A site's text: read (by `consort_common::text`), tokenised once into memory-mapped shards, and handed out as
//! training sequences and held-out windows in an order that a seed determines and a cursor resumes.
//!
//! Nothing here knows of tensors or of the network, and no text leaves this module but as token ids: errors
//! and reports name files, lines and columns, never content.

mod cache;
mod error;
mod feed;
mod held_out;
mod inspect;
mod lengths;
mod mixture;
mod prepare;
mod sampler;
mod shard;
mod stats;
mod tokenizer;
mod words;

pub use self::{
    error::DataError,
    feed::Feed,
    held_out::HeldOut,
    inspect::{Inspected, Verified, inspect},
    lengths::Lengths,
    mixture::{Mixture, Part, Share, Source, problems as source_problems},
    prepare::{Dataset, PrepareProgress, PrepareRequest, prepare},
    sampler::{Cursor, Sampler, SourceCursor},
    shard::Shard,
    stats::{SourceStats, SplitStats, Stats},
    tokenizer::Tokenizer,
};
