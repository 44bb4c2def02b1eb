//! Tables for people and pipes: a heading, columns two blanks apart, no lines around. Pure.
//!
//! A table always fits its width. What is too wide first loses its optional columns, least wanted first,
//! then has its cells cut, the widest column first. A column that names things (a run, a site) is cut
//! last, so that scripts and fingers can copy it.

use crate::text::{Paint, left, right, width};

const GAP: &str = "  ";

/// A column's heading, alignment and worth.
#[derive(Debug, Clone, Copy)]
pub struct Column {
    heading: &'static str,
    numeric: bool,
    /// 0: never dropped; else the higher, the earlier.
    optional: u8,
    names: bool,
}

impl Column {
    /// A column of names: never dropped, cut last.
    pub const fn name(heading: &'static str) -> Self {
        Self { heading, numeric: false, optional: 0, names: true }
    }

    /// A column of words.
    pub const fn words(heading: &'static str) -> Self {
        Self { heading, numeric: false, optional: 0, names: false }
    }

    /// A column of numbers, aligned on the right.
    pub const fn number(heading: &'static str) -> Self {
        Self { heading, numeric: true, optional: 0, names: false }
    }

    /// Dropped where there is no room, the highest `rank` first (from 1).
    pub const fn optional(self, rank: u8) -> Self {
        Self { optional: rank, ..self }
    }
}

/// A heading and rows.
#[derive(Debug, Clone)]
pub struct Table<const COLUMNS: usize> {
    columns: [Column; COLUMNS],
    rows: Vec<[String; COLUMNS]>,
}

impl<const COLUMNS: usize> Table<COLUMNS> {
    /// A table without rows.
    pub fn new(columns: [Column; COLUMNS]) -> Self {
        Self { columns, rows: Vec::new() }
    }

    /// Adds a row.
    pub fn row(&mut self, cells: [String; COLUMNS]) {
        self.rows.push(cells.map(|cell| crate::text::printable(&cell)));
    }

    /// The lines, none wider than `columns_max`; only the heading where there are no rows.
    pub fn render(&self, columns_max: usize, paint: Paint) -> Vec<String> {
        let widths = self.widths(columns_max);
        let heading = self.line(&widths, |column| self.columns[column].heading);
        let rows = self.rows.iter().map(|row| self.line(&widths, |column| &row[column]));
        std::iter::once(paint.strong(&heading)).chain(rows).collect()
    }

    fn line<'a>(&self, widths: &[Option<usize>; COLUMNS], cell: impl Fn(usize) -> &'a str) -> String {
        let cells = widths.iter().enumerate().filter_map(|(column, width)| {
            let align = if self.columns[column].numeric { right } else { left };
            width.map(|width| align(cell(column), width))
        });
        cells.collect::<Vec<_>>().join(GAP).trim_end().to_owned()
    }

    /// Each column's width; `None` where it was dropped.
    fn widths(&self, columns_max: usize) -> [Option<usize>; COLUMNS] {
        let natural = |column: usize| {
            let cells = self.rows.iter().map(|row| width(&row[column]));
            cells.chain([width(self.columns[column].heading)]).max().unwrap_or(0)
        };
        let mut widths: [Option<usize>; COLUMNS] = std::array::from_fn(|column| Some(natural(column)));
        while total(&widths) > columns_max {
            let present = (0..COLUMNS).filter(|column| widths[*column].is_some());
            let least_wanted = present
                .filter(|column| self.columns[*column].optional > 0)
                .max_by_key(|column| self.columns[*column].optional);
            match least_wanted {
                Some(column) => widths[column] = None,
                None => break,
            }
        }
        self.shrink(&mut widths, columns_max, false);
        self.shrink(&mut widths, columns_max, true);
        // Narrower than the gaps between the columns: keep the first ones.
        for column in (0..COLUMNS).rev() {
            if total(&widths) > columns_max {
                widths[column] = None;
            }
        }
        widths
    }

    /// Narrows the widest of the columns of one kind, down to one blank each, until the table fits.
    fn shrink(&self, widths: &mut [Option<usize>; COLUMNS], columns_max: usize, names: bool) {
        while total(widths) > columns_max {
            let candidates =
                widths.iter_mut().enumerate().filter(|(column, _)| self.columns[*column].names == names);
            let widest = candidates.filter_map(|(_, width)| width.as_mut()).max_by_key(|width| **width);
            match widest {
                Some(width) if *width > 1 => *width -= 1,
                _ => return,
            }
        }
    }
}

fn total(widths: &[Option<usize>]) -> usize {
    let present: Vec<usize> = widths.iter().flatten().copied().collect();
    present.iter().sum::<usize>() + GAP.len() * present.len().saturating_sub(1)
}

/// Lines of "label  value"; a value that is too wide goes on in the next lines, under itself.
pub fn facts(facts: &[(&str, String)], columns_max: usize, paint: Paint) -> Vec<String> {
    let label_width = facts.iter().map(|(label, _)| width(label)).max().unwrap_or(0);
    let value_width = columns_max.saturating_sub(label_width + GAP.len());
    let mut lines = Vec::new();
    for (label, value) in facts {
        for (index, piece) in crate::text::wrap(value, value_width).into_iter().enumerate() {
            let label = if index == 0 { *label } else { "" };
            lines.push(
                format!("{}{GAP}{piece}", paint.faint(&left(label, label_width))).trim_end().to_owned(),
            );
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PLAIN: Paint = Paint { colours: false };

    fn runs(name: &str) -> Table<4> {
        let mut table = Table::new([
            Column::name("NAME"),
            Column::words("STATUS"),
            Column::number("ROUND"),
            Column::number("TOKENS").optional(1),
        ]);
        table.row([name.into(), "active".into(), "3/20".into(), "1.20M".into()]);
        table.row(["b".into(), "finished".into(), "20/20".into(), "8k".into()]);
        table
    }

    fn check(name: &str, columns: usize, expected: &[&str]) {
        assert_eq!(runs(name).render(columns, PLAIN), expected, "{columns} columns");
    }

    #[test]
    fn columns_are_aligned_and_as_wide_as_their_cells() {
        check(
            "demo",
            80,
            &[
                "NAME  STATUS    ROUND  TOKENS",
                "demo  active     3/20   1.20M",
                "b     finished  20/20      8k",
            ],
        );
    }

    #[test]
    fn optional_columns_go_first_then_words_are_cut_and_names_last() {
        check("demo", 22, &["NAME  STATUS    ROUND", "demo  active     3/20", "b     finished  20/20"]);
        check("demo", 18, &["NAME  STAT…  ROUND", "demo  acti…   3/20", "b     fini…  20/20"]);
        check(
            "demonstration",
            22,
            &["NAME           ST…  R…", "demonstration  ac…  3…", "b              fi…  2…"],
        );
    }

    #[test]
    fn facts_wrap_under_their_value() {
        let lines = facts(&[("run", "demo".into()), ("reason", "the quick brown fox".into())], 18, PLAIN);
        assert_eq!(lines, ["run     demo", "reason  the quick", "        brown fox"]);
    }

    proptest! {
        #[test]
        fn no_line_is_wider_than_allowed(cells in prop::collection::vec(any::<[String; 4]>(), 0..4), columns in 0usize..90) {
            let mut table = runs("x");
            for row in cells {
                table.row(row);
            }
            for line in table.render(columns, PLAIN) {
                prop_assert!(width(&line) <= columns, "{line:?} in {columns}");
            }
        }
    }
}
