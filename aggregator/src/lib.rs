//! Consort's aggregator: coordinates rounds, collects deltas over mutual TLS and averages them.
//!
//! | module | owns | must never |
//! |---|---|---|
//! | [`engine`] | every decision about rounds: a pure state machine | do I/O, read a clock, panic |
//! | [`driver`] | the one place where the engine meets the world | decide about rounds |
//! | [`sessions`] | who is connected, in memory | be durable |
//! | [`store`] | the database: state, records, log | hold model data |
//! | [`spool`] | uploaded chunks, durable before they are acknowledged | know what a payload means |
//! | [`checkpoints`] | published checkpoints in an object store | decide which are kept |
//! | [`storage`] | an S3-compatible object store, where one is configured | know what an object means |
//! | [`models`] | versions of the global model and the outer optimizer's state | know who asked |
//! | [`reduce`] | decode, weighted mean, outer step, chunk by chunk | depend on arrival order |
//! | [`service`] | gRPC: translate, authorise, call the driver | decide anything |
//! | [`views`] | what people see | write anything |
//! | [`aligned`] | vectors that begin at a cache line | |
//! | [`allocator`] | which threads share the memory that was freed | |
//! | [`server`], [`config`], [`check`] | the process: configuration, listener, signals, preflight | |
//! | [`pki`] | certificates for a start; used by the CLI only | run in the server |

pub mod aligned;
pub mod allocator;
pub mod check;
pub mod checkpoints;
pub mod config;
pub mod driver;
pub mod engine;
pub mod models;
pub mod pki;
pub mod reduce;
pub mod server;
pub mod service;
pub mod sessions;
pub mod spool;
pub mod storage;
pub mod store;
pub mod views;
