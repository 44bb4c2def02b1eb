//! `consort tokenizer`: a tokenizer for a run, made from samples of text on this machine.

use std::{
    cell::RefCell,
    io::{IsTerminal, stderr},
    path::PathBuf,
    time::Duration,
};

use clap::{Args, Subcommand};
use consort_common::{
    atomic_file::write_atomically,
    ids::Digest,
    text::{TEXT_KEY, TokenizerRequest, TrainedTokenizer, train_tokenizer},
    tokenizer::BYTE_END_OF_TEXT,
    units,
};
use indicatif::ProgressBar;
use serde_json::{Value, json};

use crate::{Context, checkpoints::progress_bar, failure::Failure, table::facts};

/// Bytes in a megabyte of `--sample-megabytes`.
const MEGABYTE: u64 = 1_000_000;
/// Between two turns of the spinner.
const TURN: Duration = Duration::from_millis(100);

/// Make a tokenizer from text
#[derive(Debug, Subcommand)]
pub enum TokenizerCommand {
    /// Make a byte-level BPE tokenizer (GPT-2's kind) from text: the same text gives the same file
    ///
    /// Its tokens show which words are frequent in the text: look whether all sites may see them. A run's
    /// specification names the file in [tokenizer].
    #[command(
        after_help = "Example:\n  consort tokenizer train --data samples --vocabulary 32768 --out tokenizer.json"
    )]
    Train(TrainArguments),
}

/// Arguments of `tokenizer train`.
#[derive(Debug, Args)]
pub struct TrainArguments {
    /// Folder or file with text: .txt or .jsonl, also .gz or .zst, or .parquet; repeat it for several
    #[arg(long, value_name = "PATH", required = true)]
    data: Vec<PathBuf>,
    /// The field of .jsonl lines, or the column of .parquet files, that is the text
    #[arg(long, value_name = "NAME", default_value = TEXT_KEY)]
    text_key: String,
    /// Where the tokenizer.json goes; a file that is there is replaced
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Tokens, <|endoftext|> included
    #[arg(long, default_value_t = 32_768, value_name = "N")]
    vocabulary: usize,
    /// Megabytes of text to learn from at most: a sample over all of it, held in memory
    #[arg(long, default_value_t = 200, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    sample_megabytes: u64,
}

/// Does what is asked.
pub fn run(context: &Context, command: TokenizerCommand) -> Result<(), Failure> {
    let TokenizerCommand::Train(TrainArguments { data, text_key, out, vocabulary, sample_megabytes }) =
        command;
    let sample_bytes_max = sample_megabytes.saturating_mul(MEGABYTE);
    let request = TokenizerRequest { sources: data, text_key, vocabulary, sample_bytes_max };
    let bar = RefCell::new(progress_bar(0));
    let tell = |phase: &str| {
        // On a terminal the bar and the spinner show it.
        if !stderr().is_terminal() {
            eprintln!("{phase}");
        }
    };
    tell("reading the text");
    let read = |read, total| {
        bar.borrow().set_length(total);
        bar.borrow().set_position(read);
    };
    let learning = || {
        tell("learning tokens");
        bar.borrow().finish_and_clear();
        let spinner = ProgressBar::new_spinner().with_message("learning tokens");
        spinner.enable_steady_tick(TURN);
        *bar.borrow_mut() = spinner;
    };
    let trained = train_tokenizer(&request, &read, &learning);
    bar.borrow().finish_and_clear();
    let trained = trained.map_err(|error| Failure::Refused(error.to_string()))?;
    write_atomically(&out, trained.json.as_bytes()).map_err(|error| {
        Failure::Refused(format!("cannot write the tokenizer to {}: {error}", out.display()))
    })?;
    let mut shown = shown(&trained, vocabulary);
    shown.push(("tokenizer", out.display().to_string()));
    context.output.show(&document(&trained), &facts(&shown, context.output.columns, context.output.paint))
}

fn document(trained: &TrainedTokenizer) -> Value {
    json!({
        "vocabulary": trained.vocabulary,
        "documents": trained.documents,
        "sample_bytes": trained.sample_bytes,
        "skipped": trained.skipped,
        "digest": Digest::of(trained.json.as_bytes()).to_string(),
    })
}

fn shown(trained: &TrainedTokenizer, asked: usize) -> Vec<(&'static str, String)> {
    let mut vocabulary = format!("{} tokens, {BYTE_END_OF_TEXT} among them", trained.vocabulary);
    if trained.vocabulary < asked {
        vocabulary += "; fewer than asked for: the sample has no more to merge";
    }
    let sample = format!(
        "{} in {} documents or parts of long ones",
        units::bytes(trained.sample_bytes),
        trained.documents
    );
    let mut shown = vec![("vocabulary", vocabulary), ("learned from", sample)];
    if trained.skipped > 0 {
        shown.push(("skipped", format!("{} files, lines or rows", trained.skipped)));
    }
    shown
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{output::Output, text::Paint};

    fn train(folder: &std::path::Path, vocabulary: usize) -> Result<PathBuf, Failure> {
        let output = Output { json: true, columns: 80, paint: Paint { colours: false } };
        let out = folder.join("tokenizer.json");
        let arguments = TrainArguments {
            data: vec![folder.join("text")],
            text_key: "body".to_owned(),
            out: out.clone(),
            vocabulary,
            sample_megabytes: 1,
        };
        run(&Context { config: None, output }, TokenizerCommand::Train(arguments)).map(|()| out)
    }

    #[test]
    fn a_tokenizer_is_made_of_text_and_what_went_wrong_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let error = train(folder.path(), 300).unwrap_err();
        assert!(error.to_string().contains("cannot read the data source"), "{error}");
        std::fs::create_dir(folder.path().join("text")).unwrap();
        let line = "{\"body\": \"the words of the text\"}\n";
        std::fs::write(folder.path().join("text/a.jsonl"), line).unwrap();
        let json: Value =
            serde_json::from_slice(&std::fs::read(train(folder.path(), 260).unwrap()).unwrap()).unwrap();
        assert_eq!(consort_common::tokenizer::vocabulary_size(&json), 260);
        let error = train(folder.path(), 256).unwrap_err();
        assert!(error.to_string().contains("no room for the 256 bytes"), "{error}");
    }

    #[test]
    fn a_vocabulary_that_came_out_smaller_is_said_to_be() {
        let trained = TrainedTokenizer {
            json: String::new(),
            vocabulary: 300,
            documents: 2,
            sample_bytes: 1_000,
            skipped: 1,
        };
        assert!(!shown(&trained, 300)[0].1.contains("fewer"));
        assert!(shown(&trained, 301)[0].1.contains("fewer than asked for"));
        assert_eq!(shown(&trained, 300)[2].1, "1 files, lines or rows");
    }
}
