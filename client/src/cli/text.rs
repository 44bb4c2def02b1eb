//! Text made ready for a command, and the loss measured on it.

use std::path::Path;

use anyhow::Result;

use super::bar::Bar;
use crate::{
    data::{self, Dataset, HeldOut, PrepareProgress, PrepareRequest, Source, Tokenizer},
    local,
    trainer::{EvaluationSum, LanguageModel},
};

/// Tokenises as a site would. Without a `cache` folder the tokens are gone when the dataset is.
pub(super) fn prepare(
    sources: &[Source],
    cache: Option<&Path>,
    tokenizer: Tokenizer,
    held_out_fraction: f64,
    vocabulary_size: usize,
    cancelled: &(dyn Fn() -> bool + Sync),
) -> Result<Dataset> {
    let temporary = tempfile::tempdir()?;
    let cache = cache.unwrap_or(temporary.path()).to_owned();
    let request =
        PrepareRequest { sources: sources.to_owned(), cache, tokenizer, held_out_fraction, vocabulary_size };
    let bar = std::sync::Mutex::new(Bar::new("tokenising"));
    let tell = |progress: PrepareProgress| {
        if let Ok(mut bar) = bar.lock() {
            bar.update(progress.bytes_read, progress.bytes_total, "");
        }
    };
    // Shards are mapped: they stay readable after their temporary files have gone.
    Ok(data::prepare(&request, &tell, cancelled)?)
}

/// The loss of `model` on `held_out`, with progress.
pub(super) fn measure(model: &LanguageModel, held_out: &HeldOut) -> Result<EvaluationSum> {
    let bar = std::cell::RefCell::new(Bar::new("measuring"));
    let tell = |tokens| bar.borrow_mut().update(tokens, held_out.tokens(), "");
    Ok(local::evaluate(model, held_out, &tell, &|| false)?)
}
