//! Progress on standard error: a bar on a terminal, a line now and then in a pipe.

use std::{
    io::IsTerminal,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// Time between two lines in a pipe; work that is over sooner prints none.
const LINE_INTERVAL: Duration = Duration::from_secs(5);

/// How far something is.
pub(super) struct Bar {
    what: &'static str,
    bar: Option<ProgressBar>,
    last_line: Instant,
}

impl Bar {
    pub(super) fn new(what: &'static str) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            let template = "{prefix} {wide_bar} {percent}% {eta} {msg}";
            bar.set_style(
                ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()),
            );
            bar.set_prefix(what);
            bar
        });
        Self { what, bar, last_line: Instant::now() }
    }

    /// So much of so much is done; `message` says more.
    pub(super) fn update(&mut self, done: u64, total: u64, message: &str) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            bar.set_message(message.to_owned());
        } else if self.last_line.elapsed() >= LINE_INTERVAL {
            self.last_line = Instant::now();
            eprintln!("{}: {}% {message}", self.what, done * 100 / total.max(1));
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
