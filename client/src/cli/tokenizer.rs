//! `tokenizer`: a tokenizer of one's own, made from samples of text.
//!
//! Here and not among the operator's commands: whoever has text has this program, and the text is read by the
//! same rules as for training. The operator gets the file, which a run's specification then names.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use consort_common::{atomic_file::write_atomically, ids::Digest, tokenizer::BYTE_END_OF_TEXT, units};
use serde_json::json;

use super::{bar::Bar, data::DataArguments};
use crate::data::{TokenizerRequest, train_tokenizer};

/// Bytes in a megabyte of `--sample-megabytes`.
const MEGABYTE: u64 = 1_000_000;

/// What can be done with tokenizers.
#[derive(Debug, Subcommand)]
pub(super) enum TokenizerCommand {
    /// Make a byte-level BPE tokenizer (GPT-2's kind) from text: the same text gives the same file
    ///
    /// Its tokens show which words are frequent in the text: look whether they may leave the site.
    Train(TrainTokenizerArguments),
}

/// Arguments of `tokenizer train`.
#[derive(Debug, Args)]
pub(super) struct TrainTokenizerArguments {
    #[command(flatten)]
    data: DataArguments,
    /// Where the tokenizer.json goes; a file that is there is replaced
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Tokens, <|endoftext|> included
    #[arg(long, default_value_t = 32_768, value_name = "N")]
    vocabulary: usize,
    /// Megabytes of text to learn from at most: a sample over all of it, held in memory
    #[arg(long, default_value_t = 200, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    sample_megabytes: u64,
    /// Print one JSON document instead of text
    #[arg(long)]
    json: bool,
}

impl TokenizerCommand {
    pub(super) fn run(&self) -> Result<()> {
        let Self::Train(arguments) = self;
        let request = TokenizerRequest {
            sources: arguments.data.sources.clone(),
            vocabulary: arguments.vocabulary,
            sample_bytes_max: arguments.sample_megabytes.saturating_mul(MEGABYTE),
        };
        let bar = std::cell::RefCell::new(Bar::new("reading"));
        let trained = train_tokenizer(
            &request,
            &mut |read, total| bar.borrow_mut().update(read, total, ""),
            &mut || *bar.borrow_mut() = Bar::waiting("learning tokens"),
        )?;
        drop(bar);
        write_atomically(&arguments.out, trained.json.as_bytes())
            .with_context(|| format!("cannot write the tokenizer to {}", arguments.out.display()))?;
        if arguments.json {
            let result = json!({
                "vocabulary": trained.vocabulary,
                "documents": trained.documents,
                "sample_bytes": trained.sample_bytes,
                "skipped": trained.skipped,
                "digest": Digest::of(trained.json.as_bytes()).to_string(),
            });
            println!("{result}");
            return Ok(());
        }
        println!("vocabulary      {} tokens, {BYTE_END_OF_TEXT} among them", trained.vocabulary);
        if trained.vocabulary < arguments.vocabulary {
            println!("                fewer than asked for: the sample has no more to merge");
        }
        println!("learned from    {} in {} documents", units::bytes(trained.sample_bytes), trained.documents);
        if trained.skipped > 0 {
            println!("skipped         {} files, lines or rows", trained.skipped);
        }
        println!("tokenizer       {}", arguments.out.display());
        Ok(())
    }
}
