//! Validation of the whole specification: every problem, with its path.
//!
//! Two passes over one text: `structure` says what is no specification at all (unknown and missing keys,
//! wrong types) and repairs it in memory so that the rest can be judged; `rules` says what no run can
//! be made of. A specification is valid when neither finds anything.

use std::fmt;

use super::{RunSpec, SPEC_BYTES_MAX, rules, structure};

/// One thing that is wrong in a specification.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where: `training.batch_size`; empty for the text as a whole.
    pub path: String,
    /// What is there and what is allowed.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.is_empty() {
            f.write_str(&self.message)
        } else {
            write!(f, "{} {}", self.path, self.message)
        }
    }
}

/// A specification that cannot be used: all of its problems.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct SpecError {
    /// In the order of the reference's sections.
    pub problems: Vec<Problem>,
}

impl fmt::Display for SpecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.problems.len() {
            1 => write!(f, "the specification has a problem:")?,
            count => write!(f, "the specification has {count} problems:")?,
        }
        self.problems.iter().try_for_each(|problem| write!(f, "\n  {problem}"))
    }
}

/// Sections and keys of the root in the order in which people read them.
const ORDER: [&str; 12] = [
    "name",
    "seed",
    "rounds",
    "model",
    "tokenizer",
    "start",
    "training",
    "outer",
    "participation",
    "wire",
    "evaluation",
    "checkpoints",
];

/// Most keys that are judged: a specification has fewer than 100, and each problem costs a few readings of
/// the whole table.
const KEYS_MAX: usize = 1000;

pub(super) fn parse(text: &str) -> Result<RunSpec, SpecError> {
    if text.len() > SPEC_BYTES_MAX {
        return Err(whole(format!("the specification has {} bytes; allowed: {SPEC_BYTES_MAX}", text.len())));
    }
    let table = text.parse::<toml::Table>().map_err(|error| whole(syntax_error(text, &error)))?;
    let keys = count_keys(&table);
    if keys > KEYS_MAX {
        return Err(whole(format!("the specification has {keys} keys; allowed: {KEYS_MAX}")));
    }
    let structure::Reading { spec, mut problems } = structure::read(table);
    if let Some(spec) = &spec {
        let faulty: Vec<String> = problems.iter().map(|problem| problem.path.clone()).collect();
        problems.extend(rules::problems(spec, &faulty));
    }
    let rank = |problem: &Problem| {
        let section = problem.path.split('.').next().unwrap_or_default();
        ORDER.iter().position(|name| *name == section).unwrap_or(ORDER.len())
    };
    problems.sort_by_key(rank);
    match spec {
        Some(spec) if problems.is_empty() => Ok(spec),
        _ => Err(SpecError { problems }),
    }
}

/// Keys of a table and of the tables in it. The parser has limited the nesting.
fn count_keys(table: &toml::Table) -> usize {
    table.values().map(|value| 1 + value.as_table().map_or(0, count_keys)).sum()
}

fn whole(message: String) -> SpecError {
    SpecError { problems: vec![Problem { path: String::new(), message }] }
}

/// "line 3, column 8: ..." of a text that is not TOML.
fn syntax_error(text: &str, error: &toml::de::Error) -> String {
    let start = error.span().map_or(0, |span| span.start).min(text.len());
    let before = String::from_utf8_lossy(&text.as_bytes()[..start]);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    format!("line {line}, column {column}: not TOML: {}", error.message())
}

#[cfg(test)]
mod tests;
