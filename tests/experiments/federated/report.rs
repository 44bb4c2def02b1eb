//! Tables: as text, and as CSV.

use std::{fs, path::Path};

use anyhow::{Context, Result};

/// Columns of numbers, kept as CSV.
#[derive(Debug, Clone)]
pub(super) struct Figures {
    names: Vec<String>,
    columns: Vec<Vec<f64>>,
}

impl Figures {
    pub(super) fn new(names: &[&str], columns: Vec<Vec<f64>>) -> Self {
        Self { names: names.iter().map(|name| (*name).to_owned()).collect(), columns }
    }

    pub(super) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let mut lines = text.lines();
        let names: Vec<String> = lines.next().unwrap_or_default().split(',').map(str::to_owned).collect();
        let mut columns = vec![Vec::new(); names.len()];
        for line in lines {
            for (column, value) in columns.iter_mut().zip(line.split(',')) {
                column.push(value.parse()?);
            }
        }
        Ok(Self { names, columns })
    }

    pub(super) fn column(&self, name: &str) -> Option<Vec<f64>> {
        let at = self.names.iter().position(|one| one == name)?;
        self.columns.get(at).cloned()
    }

    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let rows = self.columns.first().map_or(0, Vec::len);
        let row = |at: usize| {
            self.columns.iter().map(|column| column[at].to_string()).collect::<Vec<_>>().join(",")
        };
        let lines: Vec<String> = [self.names.join(",")].into_iter().chain((0..rows).map(row)).collect();
        // Written whole or not at all: what is there counts as finished.
        let partial = path.with_extension("partial");
        fs::write(&partial, lines.join("\n") + "\n")?;
        Ok(fs::rename(partial, path)?)
    }
}

/// Steps and held-out losses of `consort-client train`'s table of metrics.
pub(super) fn metrics(path: &Path) -> Result<Vec<(f64, f64)>> {
    let table = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let point = |row: &str| {
        let columns: Vec<&str> = row.split(',').collect();
        Some((columns.first()?.parse().ok()?, columns.get(7)?.parse().ok()?))
    };
    Ok(table.lines().filter_map(point).collect())
}

/// A table for people and, as CSV, for programs.
#[derive(Debug)]
pub(super) struct Table {
    header: Vec<&'static str>,
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(super) fn new(header: &[&'static str]) -> Self {
        Self { header: header.to_vec(), rows: Vec::new() }
    }

    pub(super) fn row<const COLUMNS: usize>(&mut self, cells: [String; COLUMNS]) {
        self.rows.push(Vec::from(cells));
    }

    /// Prints the table, and writes it to `path`.
    pub(super) fn show(&self, title: &str, path: &Path) -> Result<()> {
        let header: Vec<String> = self.header.iter().map(|name| (*name).to_owned()).collect();
        let lines: Vec<&Vec<String>> = std::iter::once(&header).chain(&self.rows).collect();
        let width = |at: usize| lines.iter().map(|line| line[at].chars().count()).max().unwrap_or_default();
        println!("\n{title}\n");
        for line in &lines {
            let cells = line.iter().enumerate().map(|(at, cell)| match at {
                0 => format!("{cell:<width$}", width = width(at)),
                _ => format!("{cell:>width$}", width = width(at) + 2),
            });
            println!("{}", cells.collect::<String>());
        }
        println!();
        let quoted = |cell: &String| if cell.contains(',') { format!("\"{cell}\"") } else { cell.clone() };
        let row = |line: &&Vec<String>| line.iter().map(quoted).collect::<Vec<_>>().join(",");
        let csv: Vec<String> = lines.iter().map(row).collect();
        Ok(fs::write(path, csv.join("\n") + "\n")?)
    }
}

/// The mean.
pub(super) fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// The standard deviation of a sample; 0 of one value.
pub(super) fn deviation(values: &[f64]) -> f64 {
    let mean = mean(values);
    let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
    (squares / (values.len().max(2) - 1) as f64).sqrt()
}

/// `+1.2 %`.
pub(super) fn percent(ratio: f64) -> String {
    format!("{:+.2} %", 100.0 * (ratio - 1.0))
}

/// A loss.
pub(super) fn loss(loss: f64) -> String {
    format!("{loss:.4}")
}

/// Bytes as megabytes.
pub(super) fn megabytes(bytes: f64) -> String {
    format!("{:.1}", bytes / 1e6)
}
