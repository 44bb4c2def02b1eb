//! The harness of the whole-system tests: real binaries as real processes, a PKI made by `consort pki`,
//! ports chosen by the system, everything under one temporary directory per test.
//!
//! Tests wait for what they are waiting for (a run's state, a log line, a process's end), never for time.

pub mod binaries;
pub mod federation;
pub mod forgery;
pub mod gateway;
pub mod hostile;
pub mod limits;
pub mod line;
pub mod load;
pub mod machine;
pub mod phases;
pub mod postgres;
pub mod process;
pub mod proxy;
pub mod python;
pub mod raw;
mod relay;
pub mod texts;

pub use self::{federation::TestFederation, process::Process};
