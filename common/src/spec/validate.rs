//! Validation of the whole specification: every problem, with its path.

use std::fmt;

use super::RunSpec;

/// One thing that is wrong in a specification.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where: `training.batch_size`.
    pub path: String,
    /// What is there and what is allowed.
    pub message: String,
}

/// A specification that cannot be used: all of its problems.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub struct SpecError {
    /// In the order of the file's sections.
    pub problems: Vec<Problem>,
}

impl fmt::Display for SpecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the specification has {} problem(s):", self.problems.len())?;
        for problem in &self.problems {
            write!(f, "\n  {}: {}", problem.path, problem.message)?;
        }
        Ok(())
    }
}

pub(super) fn parse(toml: &str) -> Result<RunSpec, SpecError> {
    toml::from_str(toml).map_err(|error| SpecError {
        problems: vec![Problem { path: String::new(), message: error.to_string() }],
    })
}
