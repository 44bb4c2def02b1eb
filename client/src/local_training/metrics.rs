//! The table of a training's metrics: comma-separated, a header, then a row every so many steps.
//!
//! Rows are appended; a training that goes on first drops those that it will write again.

use std::{
    fs::{self, File},
    io::{self, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use crate::steps::Tally;

/// Of the steps since the row before: means of `loss` (nats per token), `gradient_norm` (before clipping) and
/// `tokens_per_second`, the last `learning_rate`, and the share of time that batches were waited for. `tokens`
/// and `seconds` are of the whole training, measurements not counted. What is not known is left empty.
const HEADER: &str =
    "step,tokens,loss,learning_rate,gradient_norm,tokens_per_second,waited_share,held_out_loss,seconds\n";

/// Why the table cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The file system refused.
    #[error("cannot {action} the metrics {}: {source}; check the disk's space and the folder's owner", path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Rows that the checkpoint counts on are not there.
    #[error("the metrics {} have no row of step {step}, which the training checkpoint counts on", path.display())]
    Missing {
        /// The file.
        path: PathBuf,
        /// The last row that must be there.
        step: u64,
    },
}

/// A row.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Row {
    /// Steps done.
    pub(super) step: u64,
    /// Tokens of the whole training.
    pub(super) tokens: u64,
    /// Seconds of the whole training.
    pub(super) seconds: f64,
    /// Of the steps since the row before.
    pub(super) tally: Tally,
    /// Nats per token.
    pub(super) held_out_loss: Option<f64>,
}

impl Row {
    fn text(&self) -> String {
        let Self { step, tokens, seconds, tally, held_out_loss } = self;
        let known = |value: Option<f64>| value.map(|value| value.to_string()).unwrap_or_default();
        // Before the first step nothing is known of steps.
        let of_steps = |value: f64| known((tally.tokens > 0).then_some(value));
        let columns = [
            step.to_string(),
            tokens.to_string(),
            known(tally.loss()),
            of_steps(tally.learning_rate),
            known(tally.gradient_norm()),
            of_steps(tally.tokens_per_second().round()),
            of_steps((tally.waited_share() * 1e6).round() / 1e6),
            known(*held_out_loss),
            format!("{seconds:.3}"),
        ];
        columns.join(",") + "\n"
    }
}

/// The table, open at its end.
#[derive(Debug)]
pub(super) struct Metrics {
    path: PathBuf,
    file: File,
}

impl Metrics {
    /// Opens the table behind the row of step `through`; with none, a new table that replaces what is there.
    pub(super) fn open(path: &Path, through: Option<u64>) -> Result<Self, MetricsError> {
        let failed = |action| move |source| MetricsError::Io { action, path: path.to_owned(), source };
        let open = || File::options().create(true).truncate(false).write(true).open(path);
        let mut metrics = Self { path: path.to_owned(), file: open().map_err(failed("open"))? };
        let kept = match through {
            None => 0,
            Some(step) => {
                let text = fs::read_to_string(path).map_err(failed("read"))?;
                length_through(&text, step)
                    .ok_or_else(|| MetricsError::Missing { path: path.to_owned(), step })?
            }
        };
        metrics.file.set_len(kept).map_err(failed("shorten"))?;
        metrics.file.seek(SeekFrom::End(0)).map_err(failed("shorten"))?;
        if through.is_none() {
            metrics.append(HEADER)?;
        }
        Ok(metrics)
    }

    /// Another handle of the file.
    pub(super) fn handle(&self) -> Result<File, MetricsError> {
        self.file.try_clone().map_err(|error| self.failed(error))
    }

    /// Appends a row.
    pub(super) fn write(&mut self, row: &Row) -> Result<(), MetricsError> {
        self.append(&row.text())
    }

    /// Brings all rows to the disk.
    pub(super) fn sync(&self) -> Result<(), MetricsError> {
        self.file.sync_all().map_err(|error| self.failed(error))
    }

    fn append(&mut self, text: &str) -> Result<(), MetricsError> {
        self.file.write_all(text.as_bytes()).map_err(|error| self.failed(error))
    }

    fn failed(&self, source: io::Error) -> MetricsError {
        MetricsError::Io { action: "write", path: self.path.clone(), source }
    }
}

/// Bytes of a table up to and with the row of step `through`; nothing if that row is not there.
fn length_through(table: &str, through: u64) -> Option<u64> {
    let mut length = HEADER.len();
    for row in table.strip_prefix(HEADER)?.split_inclusive('\n') {
        length += row.len();
        let step: u64 = row.strip_suffix('\n')?.split(',').next()?.parse().ok()?;
        if step == through {
            return Some(length as u64);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(step: u64) -> Row {
        let tally = Tally { tokens: 8, seconds: 2.0, learning_rate: 0.25, ..Tally::default() };
        Row { step, tokens: 8 * step, seconds: 2.0, tally, held_out_loss: (step == 2).then_some(1.5) }
    }

    fn write(path: &Path, through: Option<u64>, steps: impl IntoIterator<Item = u64>) {
        let mut metrics = Metrics::open(path, through).unwrap();
        for step in steps {
            metrics.write(&row(step)).unwrap();
        }
    }

    #[test]
    fn what_is_not_known_is_left_empty() {
        assert_eq!(row(1).text(), "1,8,,0.25,,4,0,,2.000\n");
        assert_eq!(row(2).text(), "2,16,,0.25,,4,0,1.5,2.000\n");
        let first =
            Row { step: 0, tokens: 0, seconds: 0.0, tally: Tally::default(), held_out_loss: Some(5.5) };
        assert_eq!(first.text(), "0,0,,,,,,5.5,0.000\n");
        for text in [row(1).text(), first.text()] {
            assert_eq!(text.split(',').count(), HEADER.split(',').count());
        }
    }

    #[test]
    fn rows_that_come_again_are_dropped_and_no_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.csv");
        write(&path, None, 1..=5);
        let whole = fs::read_to_string(&path).unwrap();
        for through in 1..=5 {
            write(&path, Some(through), through + 1..=5);
            assert_eq!(fs::read_to_string(&path).unwrap(), whole);
            // As a process that is killed while it writes a row.
            fs::write(&path, whole.clone() + "6,48,0.1").unwrap();
        }
        write(&path, None, 1..=5);
        assert_eq!(fs::read_to_string(&path).unwrap(), whole);
    }

    #[test]
    fn a_table_without_a_row_that_must_be_there_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.csv");
        write(&path, None, 1..=3);
        let whole = fs::read_to_string(&path).unwrap();
        for table in ["", "step\n1\n", whole.trim_end(), &whole.replace("3,24", "three,24")] {
            fs::write(&path, table).unwrap();
            let error = Metrics::open(&path, Some(3)).unwrap_err();
            assert!(error.to_string().contains("no row of step 3"), "{error}");
            assert_eq!(fs::read_to_string(&path).unwrap(), table, "it is left as it was");
        }
    }
}
