//! Log output of every Consort program: who writes what, where, in which form.
//!
//! Logs go to standard error, so that standard output stays for what a command was asked to print.

use std::{
    env,
    io::{self, IsTerminal},
    str::FromStr,
};

use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;

/// Variables that hold a filter, the one that wins first.
const FILTER_VARIABLES: [&str; 2] = ["CONSORT_LOG", "RUST_LOG"];

/// The form of a log line.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One line for people; coloured on a terminal.
    #[default]
    Human,
    /// One JSON object per line, for collectors.
    Json,
}

impl FromStr for LogFormat {
    type Err = TelemetryError;
    fn from_str(text: &str) -> Result<Self, TelemetryError> {
        match text {
            "human" => Ok(Self::Human),
            "json" => Ok(Self::Json),
            _ => Err(TelemetryError::Format(text.to_owned())),
        }
    }
}

/// Why logging was not set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// No such form.
    #[error("{0:?} is not a log format: expected human or json")]
    Format(String),
    /// A filter that cannot be read.
    #[error(
        "{source_name}={filter:?} is not a log filter: {reason}; examples: info, debug, consort_aggregator=debug,info"
    )]
    Filter {
        /// The variable that holds it, or "default filter".
        source_name: &'static str,
        /// The filter.
        filter: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Called twice in one process.
    #[error("logging is already set up in this process")]
    AlreadySetUp,
}

/// Sets up logging for the whole process. `CONSORT_LOG`, else `RUST_LOG`, else `default_filter` says what
/// is logged; `NO_COLOR` switches colours off.
pub fn init(format: LogFormat, default_filter: &str) -> Result<(), TelemetryError> {
    let filter = filter(|variable| env::var(variable).ok(), default_filter)?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    match format {
        LogFormat::Human => {
            let colours = io::stderr().is_terminal() && env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
            builder.with_ansi(colours).with_target(false).try_init()
        }
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    }
    .map_err(|_| TelemetryError::AlreadySetUp)
}

fn filter(
    variable: impl Fn(&'static str) -> Option<String>,
    default_filter: &str,
) -> Result<EnvFilter, TelemetryError> {
    let (source_name, filter) = FILTER_VARIABLES
        .into_iter()
        .find_map(|name| variable(name).filter(|value| !value.trim().is_empty()).map(|value| (name, value)))
        .unwrap_or_else(|| ("default filter", default_filter.to_owned()));
    EnvFilter::try_new(&filter).map_err(|error| TelemetryError::Filter {
        source_name,
        filter,
        reason: error.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(consort_log: Option<&str>, rust_log: Option<&str>, expected: &str) {
        let variable = |name| match name {
            "CONSORT_LOG" => consort_log.map(str::to_owned),
            "RUST_LOG" => rust_log.map(str::to_owned),
            other => panic!("asked for {other}"),
        };
        let outcome = match filter(variable, "info") {
            Ok(filter) => filter.to_string(),
            Err(error) => error.to_string(),
        };
        assert!(outcome.contains(expected), "{consort_log:?} {rust_log:?} gave {outcome:?}");
    }

    #[test]
    fn the_own_variable_wins_over_the_common_one_and_over_the_default() {
        check(None, None, "info");
        check(None, Some("debug"), "debug");
        check(Some("warn"), Some("debug"), "warn");
        check(Some(""), Some("trace"), "trace");
    }

    #[test]
    fn a_wrong_filter_is_named_with_its_variable() {
        check(Some("consort=loud"), None, "CONSORT_LOG=\"consort=loud\"");
        check(None, Some("a=b=c"), "RUST_LOG");
    }

    #[test]
    fn formats_are_named_in_lower_case() {
        assert_eq!("json".parse::<LogFormat>().unwrap(), LogFormat::Json);
        assert_eq!("human".parse::<LogFormat>().unwrap(), LogFormat::Human);
        assert!("JSON".parse::<LogFormat>().is_err());
    }
}
