//! Text on a terminal: measured, cut, padded and painted. Pure.
//!
//! Much of what is shown was written by others (a site's device, its reason to leave): nothing reaches the
//! terminal but through [`printable`], which leaves no control sequence, no bidirectional override and no
//! zero-width character. What remains is as wide as its characters' widths add up to, or narrower, so
//! that pieces that fit make lines that fit.

use console::{Style, measure_text_width};

/// What a cut text ends with; one column wide.
const ELLIPSIS: char = '…';
/// Heights of a sparkline, lowest first.
const SPARKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// `text` on one line, without anything that could drive a terminal. Combining marks are lost.
pub fn printable(text: &str) -> String {
    let blank = |character: char| if character.is_control() { ' ' } else { character };
    text.chars().map(blank).filter(|character| character_width(*character) > 0).collect()
}

/// Columns that `text` takes; styles take none.
pub fn width(text: &str) -> usize {
    measure_text_width(text)
}

fn character_width(character: char) -> usize {
    measure_text_width(character.encode_utf8(&mut [0; 4]))
}

/// `text`, printable and cut to `columns`.
pub fn fit(text: &str, columns: usize) -> String {
    let text = printable(text);
    if width(&text) <= columns {
        return text;
    }
    if columns == 0 {
        return String::new();
    }
    let mut cut = String::new();
    let mut used = 1;
    for character in text.chars() {
        used += character_width(character);
        if used > columns {
            break;
        }
        cut.push(character);
    }
    cut.push(ELLIPSIS);
    cut
}

/// [`fit`], then filled with blanks on the right.
pub fn left(text: &str, columns: usize) -> String {
    let text = fit(text, columns);
    let blanks = columns - width(&text);
    format!("{text}{:blanks$}", "")
}

/// [`fit`], then filled with blanks on the left.
pub fn right(text: &str, columns: usize) -> String {
    let text = fit(text, columns);
    let blanks = columns - width(&text);
    format!("{:blanks$}{text}", "")
}

/// `text`, printable, broken at blanks into lines of at most `columns`; a longer word is cut in pieces.
pub fn wrap(text: &str, columns: usize) -> Vec<String> {
    let columns = columns.max(2);
    let mut lines = vec![String::new()];
    for word in printable(text).split(' ').filter(|word| !word.is_empty()) {
        for piece in pieces(word, columns) {
            let line = lines.last_mut().filter(|line| !line.is_empty());
            match line {
                Some(line) if width(line) + 1 + width(&piece) <= columns => {
                    line.push(' ');
                    line.push_str(&piece);
                }
                Some(_) => lines.push(piece),
                None => lines = vec![piece],
            }
        }
    }
    lines
}

/// `word` in pieces of at most `columns` (which is at least 2, the widest character).
fn pieces(word: &str, columns: usize) -> Vec<String> {
    let mut pieces = vec![String::new()];
    let mut used = 0;
    for character in word.chars() {
        let columns_more = character_width(character);
        if used + columns_more > columns {
            pieces.push(String::new());
            used = 0;
        }
        used += columns_more;
        if let Some(piece) = pieces.last_mut() {
            piece.push(character);
        }
    }
    pieces
}

/// A bar of `columns` of which `fraction` (0 to 1) is full; full only when all is done.
pub fn bar(fraction: f64, columns: usize) -> String {
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let full = (fraction.clamp(0.0, 1.0) * columns as f64).floor() as usize;
    let full = full.min(columns);
    "█".repeat(full) + &"░".repeat(columns - full)
}

/// A sparkline of at most `columns`, the lowest value lowest. Where there are more values than columns,
/// each column shows the last of its share. Values that are not finite show as the highest.
pub fn sparkline(values: &[f64], columns: usize) -> String {
    let shown: Vec<f64> = match values.len() {
        count if count <= columns => values.to_vec(),
        count => (1..=columns).map(|column| values[column * count / columns - 1]).collect(),
    };
    let finite = || shown.iter().copied().filter(|value| value.is_finite());
    let lowest = finite().fold(f64::INFINITY, f64::min);
    let highest = finite().fold(f64::NEG_INFINITY, f64::max);
    shown.iter().map(|value| spark(*value, lowest, highest)).collect()
}

fn spark(value: f64, lowest: f64, highest: f64) -> char {
    let top = SPARKS.len() - 1;
    if !value.is_finite() {
        return SPARKS[top];
    }
    // Halves first: the difference of two finite values may not be finite.
    let range = highest / 2.0 - lowest / 2.0;
    if range <= 0.0 {
        return SPARKS[0];
    }
    #[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    let height = ((value / 2.0 - lowest / 2.0) / range * top as f64).round() as usize;
    SPARKS[height.min(top)]
}

/// Whether, and how, texts are painted. Painting comes last: after measuring and cutting.
#[derive(Debug, Clone, Copy)]
pub struct Paint {
    /// False in a pipe, with NO_COLOR, and in tests.
    pub colours: bool,
}

impl Paint {
    fn apply(self, style: Style, text: &str) -> String {
        style.force_styling(self.colours).apply_to(text).to_string()
    }

    /// Headings and names.
    pub fn strong(self, text: &str) -> String {
        self.apply(Style::new().bold(), text)
    }

    /// What matters less.
    pub fn faint(self, text: &str) -> String {
        self.apply(Style::new().dim(), text)
    }

    /// Done, well.
    pub fn good(self, text: &str) -> String {
        self.apply(Style::new().green(), text)
    }

    /// Under way.
    pub fn busy(self, text: &str) -> String {
        self.apply(Style::new().cyan(), text)
    }

    /// Worth a look.
    pub fn alarming(self, text: &str) -> String {
        self.apply(Style::new().yellow(), text)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn texts_are_cut_to_their_columns() {
        for (text, columns, expected) in [
            ("books", 5, "books"),
            ("books", 4, "boo…"),
            ("books", 1, "…"),
            ("books", 0, ""),
            ("日本語", 5, "日本…"),
            ("日本語", 4, "日…"),
        ] {
            assert_eq!(fit(text, columns), expected, "{text:?} in {columns}");
        }
        assert_eq!((left("ab", 4).as_str(), right("ab", 4).as_str()), ("ab  ", "  ab"));
        assert_eq!(left("日本語", 4), "日… ");
    }

    #[test]
    fn nothing_that_drives_a_terminal_is_printable() {
        assert_eq!(printable("a\u{1b}[31mb\r\nc\u{202e}d\u{200b}e\u{7}"), "a [31mb  cde ");
    }

    #[test]
    fn lines_break_at_blanks_and_long_words_anywhere() {
        assert_eq!(wrap("the quick brown fox", 9), ["the quick", "brown fox"]);
        assert_eq!(wrap("0123456789 ab", 4), ["0123", "4567", "89", "ab"]);
        assert_eq!(wrap("", 4), [""]);
    }

    #[test]
    fn a_bar_is_full_only_at_the_end() {
        assert_eq!(bar(0.0, 4), "░░░░");
        assert_eq!(bar(0.999, 4), "███░");
        assert_eq!(bar(1.0, 4), "████");
        assert_eq!(bar(f64::NAN, 2), "░░");
    }

    #[test]
    fn a_sparkline_spans_its_values() {
        assert_eq!(sparkline(&[5.5, 4.0, 3.0, 2.0], 10), "█▅▃▁");
        assert_eq!(sparkline(&[1.0, 1.0], 10), "▁▁");
        assert_eq!(sparkline(&[1.0, f64::NAN, 2.0], 10), "▁██");
        assert_eq!(sparkline(&[f64::MIN, f64::MAX], 2), "▁█");
        assert_eq!(sparkline(&[], 10), "");
        // Eight values in four columns: the second, fourth, sixth and eighth.
        assert_eq!(sparkline(&[9.0, 7.0, 9.0, 5.0, 9.0, 2.0, 9.0, 0.0], 4), "█▆▃▁");
    }

    proptest! {
        #[test]
        fn no_text_is_wider_than_its_columns(text in any::<String>(), more in any::<String>(), columns in 0usize..40) {
            prop_assert!(width(&fit(&text, columns)) <= columns);
            let pair = left(&text, columns) + &right(&more, columns);
            prop_assert!(width(&pair) <= 2 * columns, "{pair:?}");
            for line in wrap(&text, columns) {
                prop_assert!(width(&line) <= columns.max(2), "{line:?}");
            }
        }

        #[test]
        fn a_sparkline_has_a_character_per_column(values in prop::collection::vec(any::<f64>(), 0..50), columns in 0usize..40) {
            prop_assert_eq!(sparkline(&values, columns).chars().count(), values.len().min(columns));
        }
    }
}
