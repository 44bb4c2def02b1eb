//! `data`: text made ready in advance, looked at, and checked.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use consort_common::{spec::RunSpec, units};
use serde_json::{Value, json};

use super::{bar::Bar, start::Start, text, train};
use crate::data::{Inspected, Source, SourceStats, Stats, Tokenizer, inspect};

/// Faults of a source that are printed; JSON has more.
const SKIPPED_SHOWN_MAX: usize = 10;
/// Digits of a key that are printed.
const KEY_DIGITS: usize = 12;

/// What can be done with a site's text.
#[derive(Debug, Subcommand)]
pub(super) enum DataCommand {
    /// Tokenise text as a run asks for it, and keep it in a folder that `train --cache` finds it in
    Prepare(PrepareArguments),
    /// Print what prepared text consists of, and what was left out and why
    Stats(CacheArguments),
    /// Compare every file of prepared text with its digest
    ///
    /// Exit code 1 if a file is damaged; preparing again makes it anew.
    Verify(CacheArguments),
}

/// Arguments of `data prepare`.
#[derive(Debug, Args)]
pub(super) struct PrepareArguments {
    /// The run's specification, as given to `consort runs create`
    specification: PathBuf,
    #[command(flatten)]
    data: DataArguments,
    /// Folder where the tokenised text is kept
    #[arg(long, value_name = "FOLDER")]
    cache: PathBuf,
    /// Print one JSON document instead of text
    #[arg(long)]
    json: bool,
}

/// One source of text or several.
#[derive(Debug, Args)]
pub(super) struct DataArguments {
    /// Folder or file with text: .txt or .jsonl, also .gz or .zst, or .parquet; repeat it for several sources
    ///
    /// path=PATH may be followed, with commas between them, by name=NAME, weight=NUMBER (its part of the sequences
    /// relative to the other sources' [default: by tokens]) or replay=PERCENT (its part of all sequences), and
    /// key=TEXT (the field or column that is the text): --data path=new --data path=old,replay=5
    #[arg(long = "data", value_name = "PATH|path=PATH,...", required = true)]
    pub(super) sources: Vec<Source>,
}

/// Arguments of `data stats` and `data verify`.
#[derive(Debug, Args)]
pub(super) struct CacheArguments {
    /// The folder given as --cache; a daemon's is `text` in its state directory
    cache: PathBuf,
    /// Print one JSON document instead of text
    #[arg(long)]
    json: bool,
}

impl DataCommand {
    pub(super) fn run(&self) -> Result<()> {
        match self {
            Self::Prepare(arguments) => arguments.run(),
            Self::Stats(arguments) => stats(&arguments.cache, arguments.json),
            Self::Verify(arguments) => verify(&arguments.cache, arguments.json),
        }
    }
}

impl PrepareArguments {
    pub(super) fn run(&self) -> Result<()> {
        let toml = fs::read_to_string(&self.specification)
            .with_context(|| format!("cannot read the specification {}", self.specification.display()))?;
        let start = Start::named(&self.specification, &toml);
        let start = start.map(|directory| Start::open(directory, &toml)).transpose()?;
        let spec = RunSpec::parse(start.as_ref().map_or(&toml, |start| &start.specification))?;
        let (tokenizer_json, _) = train::tokenizer(&spec.tokenizer, &self.specification)?;
        if let Some(start) = &start {
            start.check(&spec, &tokenizer_json)?;
        }
        let tokenizer = Tokenizer::for_run(&spec.tokenizer, tokenizer_json.as_bytes())?;
        let began = Instant::now();
        let (fraction, vocabulary) = (spec.evaluation.held_out_fraction, spec.model.vocab_size());
        let dataset =
            text::tokenise(&self.data.sources, Some(&self.cache), tokenizer, fraction, vocabulary, &|| {
                false
            })?;
        let seconds = began.elapsed().as_secs_f64();
        let key = dataset.cache_key.to_string();
        let shares = dataset.train.parts().iter().map(|part| part.share);
        if self.json {
            let shares: Vec<f64> = shares.collect();
            let stats = stats_json(&dataset.stats);
            println!("{}", json!({ "key": key, "seconds": seconds, "shares": shares, "stats": stats }));
            return Ok(());
        }
        print_stats(&key, &dataset.stats);
        for (part, share) in dataset.train.parts().iter().zip(shares) {
            println!("{:.2}% of the sequences are from {}", share * 100.0, part.name);
        }
        #[allow(clippy::cast_precision_loss)]
        let rate = dataset.stats.total().file_bytes as f64 / seconds / 1e6;
        println!("ready after {seconds:.1} s ({rate:.1} MB of files per second)");
        Ok(())
    }
}

fn stats(cache: &Path, as_json: bool) -> Result<()> {
    let found = inspect(cache)?;
    if as_json {
        let entry = |inspected: &Inspected| match &inspected.stats {
            Ok(stats) => json!({ "key": inspected.key.to_string(), "stats": stats_json(stats) }),
            Err(error) => json!({ "key": inspected.key.to_string(), "damage": error.to_string() }),
        };
        println!("{}", Value::from(found.iter().map(entry).collect::<Vec<_>>()));
        return Ok(());
    }
    for inspected in found {
        match &inspected.stats {
            Ok(stats) => print_stats(&inspected.key.to_string(), stats),
            Err(error) => println!("{error}"),
        }
    }
    Ok(())
}

fn verify(cache: &Path, as_json: bool) -> Result<()> {
    let found = inspect(cache)?;
    let bytes_total = found.iter().map(Inspected::bytes).sum();
    let mut bar = Bar::new("verifying");
    let mut read = 0;
    let mut told = |bytes| {
        read += bytes;
        bar.update(read, bytes_total, "");
    };
    let mut files = Vec::new();
    for inspected in found {
        files.extend(
            inspected.verify(&mut told).into_iter().map(|file| (file.path, file.tokens, file.damage)),
        );
        files.extend(inspected.stats.err().map(|error| (inspected.folder, 0, Some(error))));
    }
    drop(bar);
    let damaged = files.iter().filter(|(.., damage)| damage.is_some()).count();
    if as_json {
        let entries = files.iter().map(|(path, tokens, damage)| {
            let damage = damage.as_ref().map(ToString::to_string);
            json!({ "file": path, "tokens": tokens, "damage": damage })
        });
        println!("{}", json!({ "ok": damaged == 0, "files": entries.collect::<Vec<_>>() }));
    } else {
        for (path, tokens, damage) in &files {
            match damage {
                None => println!("ok       {} ({} tokens)", path.display(), units::count(*tokens)),
                Some(error) => println!("damaged  {error}"),
            }
        }
    }
    if damaged > 0 {
        bail!("{damaged} of {} files are damaged", files.len());
    }
    Ok(())
}

fn stats_json(stats: &Stats) -> Value {
    let sources: Vec<Value> = stats.sources.iter().map(source_json).collect();
    json!({ "sources": sources, "total": source_json(&stats.total()) })
}

fn source_json(source: &SourceStats) -> Value {
    json!({
        "name": source.name,
        "files": source.files,
        "file_bytes": source.file_bytes,
        "documents": source.documents(),
        "tokens": source.tokens(),
        "bytes_per_token": bytes_per_token(source),
        "train": source.train,
        "held_out": source.held_out,
        "tokens_per_document": {
            "median": source.lengths.percentile(50),
            "p90": source.lengths.percentile(90),
            "p99": source.lengths.percentile(99),
            "max": source.lengths.max(),
        },
        "duplicates": source.duplicates,
        "blank": source.blank,
        "not_compared": source.not_compared,
        "skipped": source.skipped,
        "skipped_listed": source.skipped_listed,
    })
}

#[allow(clippy::cast_precision_loss)]
fn bytes_per_token(source: &SourceStats) -> f64 {
    source.all().text_bytes as f64 / source.tokens().max(1) as f64
}

fn print_stats(key: &str, stats: &Stats) {
    println!("prepared text {}", key.get(..KEY_DIGITS).unwrap_or(key));
    for source in &stats.sources {
        print!("{}", source_text(&source.name, source));
    }
    if stats.sources.len() > 1 {
        print!("{}", source_text("all sources", &stats.total()));
    }
}

fn source_text(name: &str, source: &SourceStats) -> String {
    let [of_all, train, held_out] = [source.all(), source.train, source.held_out];
    let mut lines = vec![
        format!("{name}: {} files, {}", source.files, units::bytes(source.file_bytes)),
        format!(
            "  documents            {}, counted on each side of the split ({} to train on, {} held out)",
            of_all.documents, train.documents, held_out.documents
        ),
        format!(
            "  tokens               {} ({} to train on, {} held out)",
            of_all.tokens, train.tokens, held_out.tokens
        ),
        format!(
            "  text                 {}, {:.3} bytes per token",
            units::bytes(of_all.text_bytes),
            bytes_per_token(source)
        ),
        format!(
            "  tokens per document  median {}, 90% at most {}, 99% at most {}, longest {}",
            source.lengths.percentile(50),
            source.lengths.percentile(90),
            source.lengths.percentile(99),
            source.lengths.max()
        ),
        format!(
            "  left out             {} duplicates, {} blank documents, {} files, lines or rows skipped",
            source.duplicates, source.blank, source.skipped
        ),
    ];
    if source.not_compared > 0 {
        lines.push(format!("  not compared         {} documents: too many to remember", source.not_compared));
    }
    let shown = source.skipped_listed.iter().take(SKIPPED_SHOWN_MAX);
    lines.extend(shown.map(|skipped| format!("    {skipped}")));
    let rest = source.skipped.saturating_sub(SKIPPED_SHOWN_MAX as u64);
    if rest > 0 && !source.skipped_listed.is_empty() {
        lines.push(format!("    and {rest} more"));
    }
    lines.join("\n") + "\n"
}
