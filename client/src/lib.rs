//! Consort's daemon for partner sites: it joins a federation, tokenises the site's text, trains rounds and
//! delivers deltas. Connections are outbound only, and no text leaves.
//!
//! `session` keeps the connection and hears instructions; `supervisor` starts and stops the `work` that they
//! ask for; `prepare` and `round` do it, with `transfer` (models over the network), `data` (the site's text),
//! `local_steps`, `steps` (the loop that trains) and `trainer` (libtorch, the only user of `tch`). `daemon` puts
//! the parts together. `local_training` is that loop without a federation.

pub mod backoff;
pub mod check;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod data;
#[cfg(test)]
mod fake;
pub mod link;
pub mod local;
pub mod local_steps;
pub mod local_training;
pub mod model_file;
pub mod overlap;
pub mod prepare;
pub mod progress;
pub mod round;
pub mod session;
pub mod state;
pub mod steps;
pub mod supervisor;
pub mod trainer;
pub mod transfer;
pub mod work;
