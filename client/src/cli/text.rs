//! Text made ready for a command, and the loss measured on it.

use std::path::Path;

use anyhow::Result;

use super::bar::Bar;
use crate::{
    data::{self, Dataset, HeldOut, PrepareProgress, PrepareRequest, Source, Stats, Tokenizer},
    local,
    trainer::{EvaluationSum, LanguageModel},
};

/// Faults that are printed one by one.
const FAULTS_SHOWN_MAX: usize = 5;

/// As [`tokenise`]; what of the text was left out is told on standard error.
pub(super) fn prepare(
    sources: &[Source],
    cache: Option<&Path>,
    tokenizer: Tokenizer,
    held_out_fraction: f64,
    vocabulary_size: usize,
    cancelled: &(dyn Fn() -> bool + Sync),
) -> Result<Dataset> {
    let dataset = tokenise(sources, cache, tokenizer, held_out_fraction, vocabulary_size, cancelled)?;
    for line in left_out(&dataset.stats) {
        eprintln!("{line}");
    }
    Ok(dataset)
}

/// What of the text was not used, in words; nothing if all was.
fn left_out(stats: &Stats) -> Vec<String> {
    let total = stats.total();
    if [total.duplicates, total.blank, total.skipped] == [0; 3] {
        return Vec::new();
    }
    let mut lines = vec![format!(
        "left out: {} documents that repeat an earlier one, {} blank ones, {} files, lines or rows with faults",
        total.duplicates, total.blank, total.skipped
    )];
    let faults = stats.skipped().take(FAULTS_SHOWN_MAX);
    lines.extend(faults.map(|(source, skipped)| format!("  in {source:?}: {skipped}")));
    let rest = total.skipped.saturating_sub(lines.len() as u64 - 1);
    if rest > 0 {
        lines.push(format!("  and {rest} more; `data prepare --json` lists them"));
    }
    lines
}

/// Tokenises as a site would. Without a `cache` folder the tokens are gone when the dataset is.
pub(super) fn tokenise(
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

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_is_left_out_is_told_with_the_first_faults() {
        let folder = tempfile::tempdir().unwrap();
        let bad = "not json\n".repeat(7);
        let good = "{\"text\": \"one\"}\n{\"text\": \"two\"}\n";
        let told = |content: String| {
            fs::write(folder.path().join("a.jsonl"), content).unwrap();
            let sources = [Source::new(folder.path())];
            let dataset = tokenise(&sources, None, Tokenizer::byte(), 0.0, 257, &|| false).unwrap();
            left_out(&dataset.stats)
        };
        assert!(told(good.to_owned()).is_empty());
        let lines = told(format!("{good}{good}{{\"text\": \" \"}}\n{bad}"));
        assert_eq!(lines.len(), 1 + FAULTS_SHOWN_MAX + 1, "{lines:?}");
        assert!(
            lines[0].contains("2 documents") && lines[0].contains("1 blank") && lines[0].contains("7 files")
        );
        assert!(lines[1].contains("a.jsonl, line 6"), "{lines:?}");
        assert!(lines[6].contains("and 2 more"), "{lines:?}");
    }
}
