//! A frame on a terminal, redrawn in its place: one write per frame, so that nothing flickers.

use std::io::{self, Write};

use console::Term;

use crate::text::width;

/// Size taken for a terminal that does not tell, in rows and columns.
const SIZE_DEFAULT: (u16, u16) = (24, 80);

/// The part of the terminal that a live view fills. Hides the cursor while it lives.
#[derive(Debug)]
pub struct Screen {
    terminal: Term,
    /// Columns of each line that stands there now.
    drawn: Vec<usize>,
}

impl Screen {
    /// Below whatever the terminal shows now.
    pub fn new() -> Self {
        let terminal = Term::stdout();
        // A terminal that cannot hide its cursor shows it: no harm.
        let _ = terminal.hide_cursor();
        Self { terminal, drawn: Vec::new() }
    }

    /// Rows and columns, as they are now.
    pub fn size(&self) -> (usize, usize) {
        let (rows, columns) = self.terminal.size_checked().unwrap_or(SIZE_DEFAULT);
        (usize::from(rows), usize::from(columns))
    }

    /// Replaces the last frame.
    pub fn draw(&mut self, lines: &[String]) -> io::Result<()> {
        let (_, columns) = self.size();
        let frame = replacement(rows_of(&self.drawn, columns), lines);
        self.drawn = lines.iter().map(|line| width(line)).collect();
        write(&frame)
    }
}

/// The last frame stays; the cursor is visible, on a line of its own.
impl Drop for Screen {
    fn drop(&mut self) {
        // Over what the terminal echoed for Ctrl-C. Nothing can be done about a terminal that is gone.
        let _ = write("\r\x1b[J");
        let _ = self.terminal.show_cursor();
    }
}

fn write(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// Rows that lines of these widths take where the terminal, made narrower since, has wrapped them.
fn rows_of(widths: &[usize], columns: usize) -> usize {
    widths.iter().map(|width| width.div_ceil(columns.max(1)).max(1)).sum()
}

/// Up to the old frame's first row, each new line over what stood there, then nothing below.
fn replacement(rows_up: usize, lines: &[String]) -> String {
    let mut text = String::from("\r");
    if rows_up > 0 {
        text += &format!("\x1b[{rows_up}A");
    }
    for line in lines {
        text += line;
        text += "\x1b[K\n";
    }
    text + "\x1b[J"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_replaces_the_one_before_it() {
        let lines = ["a".to_owned(), "b".to_owned()];
        assert_eq!(replacement(0, &lines), "\ra\x1b[K\nb\x1b[K\n\x1b[J");
        assert_eq!(replacement(2, &lines[..1]), "\r\x1b[2Aa\x1b[K\n\x1b[J");
    }

    #[test]
    fn a_terminal_made_narrower_has_wrapped_the_last_frame() {
        assert_eq!(rows_of(&[80, 10, 0], 80), 3);
        assert_eq!(rows_of(&[80, 10, 0], 60), 4);
        assert_eq!(rows_of(&[], 60), 0);
    }
}
