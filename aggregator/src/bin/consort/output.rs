//! Standard output: one JSON document or lines of text, and notes on standard error.

use std::io::{self, IsTerminal, Write};

use serde_json::Value;

use crate::{failure::Failure, text::Paint};

/// Columns of a pipe, and of a terminal that does not tell.
pub const COLUMNS_DEFAULT: usize = 80;
/// Narrowest terminal that is laid out for; a narrower one wraps.
pub const COLUMNS_MIN: usize = 60;

/// Where and how results are shown.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    /// One JSON document instead of text.
    pub json: bool,
    /// Columns that a line may take.
    pub columns: usize,
    /// Colours, on a terminal that has them.
    pub paint: Paint,
}

impl Output {
    /// As standard output is.
    pub fn detect(json: bool) -> Self {
        let terminal = console::Term::stdout();
        let columns = if terminal.is_term() {
            terminal.size_checked().map(|(_, columns)| usize::from(columns))
        } else {
            None
        };
        Self {
            json,
            columns: columns.unwrap_or(COLUMNS_DEFAULT).max(COLUMNS_MIN),
            paint: Paint { colours: terminal.is_term() && console::colors_enabled() },
        }
    }

    /// Shows a result: the document with `--json`, else the lines.
    pub fn show(&self, document: &Value, lines: &[String]) -> Result<(), Failure> {
        if self.json { print_document(document) } else { print(&(lines.join("\n") + "\n")) }
    }

    /// Tells a person what to know or do next, on standard error; not with `--json`.
    pub fn hint(&self, text: &str) {
        if !self.json && io::stdout().is_terminal() {
            eprintln!("{text}");
        }
    }
}

/// One JSON document on one line.
pub fn print_document(document: &Value) -> Result<(), Failure> {
    print(&format!("{document}\n"))
}

/// Writes `text` to standard output, at once.
pub fn print(text: &str) -> Result<(), Failure> {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
    written.map_err(|error| Failure::from_output(&error))
}
