//! What Consort's aggregator and its clients must agree on: names and digests, model architectures and
//! their tensor manifest, the run specification, delta encodings, chunking and fragments, learning-rate schedules,
//! identity and TLS, telemetry, how text is read and tokenizers are made of it.
//!
//! This crate serves no sockets, knows no database and never links libtorch.
#![warn(missing_docs)]

pub mod atomic_file;
pub mod checkpoint;
pub mod chunk;
pub mod codec;
pub mod fragment;
pub mod identity;
pub mod ids;
pub mod model;
pub mod schedule;
pub mod spec;
pub mod telemetry;
pub mod text;
pub mod tls;
pub mod tokenizer;
pub mod units;
