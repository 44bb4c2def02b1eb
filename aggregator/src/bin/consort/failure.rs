//! What can go wrong, as the caller's script and the person at the terminal need to tell it apart: an exit
//! code and one sentence.

use std::io;

use consort_common::tls::{ConnectError, explain};
use tonic::{Code, Status};

use crate::text::printable;

/// The exit codes, as `--help` documents them.
pub const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  the operation was refused, or failed
  2  wrong usage, configuration or run specification
  3  the aggregator cannot be reached
  4  no such run, round, client or checkpoint
  5  `runs watch` ended because the run was aborted

Example:
  consort runs create run.toml --start && consort runs watch demo";

/// Longest part of an aggregator's message that is shown, in characters; a specification's problems may
/// take some lines.
const MESSAGE_CHARACTERS_MAX: usize = 16_384;

/// Why a command did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// The operation was refused, or failed.
    #[error("{0}")]
    Refused(String),
    /// Wrong usage, configuration or run specification.
    #[error("{0}")]
    Usage(String),
    /// The aggregator cannot be reached.
    #[error("{0}")]
    Unreachable(String),
    /// No such run, round, client or checkpoint.
    #[error("{0}")]
    NotFound(String),
    /// The run that was watched was aborted.
    #[error("{0}")]
    Aborted(String),
    /// Whoever read the output (`| head`) has enough: not an error to speak of.
    #[error("the reader of the output went away")]
    PipeClosed,
}

impl Failure {
    /// The process's exit code.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::PipeClosed => 0,
            Self::Refused(_) => 1,
            Self::Usage(_) => 2,
            Self::Unreachable(_) => 3,
            Self::NotFound(_) => 4,
            Self::Aborted(_) => 5,
        }
    }

    /// From a call's status; `attempt` completes "cannot ...".
    pub fn from_status(attempt: &str, status: &Status) -> Self {
        if let Some(error) = explain(status) {
            return Self::from_connect(attempt, &error);
        }
        let reason = reason(status);
        let message = format!("cannot {attempt}: {reason}");
        match status.code() {
            Code::NotFound => Self::NotFound(message),
            Code::InvalidArgument => Self::Usage(message),
            _ if is_transport(status) => Self::Unreachable(format!(
                "cannot {attempt}: the connection to the aggregator was lost ({reason}); check that it runs, and try again"
            )),
            _ => Self::Refused(message),
        }
    }

    /// From a connection that could not be opened.
    pub fn from_connect(attempt: &str, error: &ConnectError) -> Self {
        Self::Unreachable(format!("cannot {attempt}: {error}"))
    }

    /// From writing to standard output.
    pub fn from_output(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::BrokenPipe => Self::PipeClosed,
            _ => Self::Refused(format!("cannot write to standard output: {error}")),
        }
    }
}

/// Whether a status stems from the connection and not from the aggregator's services: those have no
/// source, and say UNAVAILABLE where trying again is all that is needed.
fn is_transport(status: &Status) -> bool {
    status.code() == Code::Unavailable || std::error::Error::source(status).is_some()
}

/// The aggregator's sentence, or where it has none, the code's; lines are kept, control characters not.
fn reason(status: &Status) -> String {
    let message: String = status.message().chars().take(MESSAGE_CHARACTERS_MAX).collect();
    let lines: Vec<String> = message.lines().map(printable).collect();
    match lines.join("\n").trim_end() {
        "" => status.code().description().to_lowercase(),
        text => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(status: &Status, exit_code: u8, message: &str) {
        let failure = Failure::from_status("start the run demo", status);
        assert_eq!((failure.exit_code(), failure.to_string().as_str()), (exit_code, message));
    }

    #[test]
    fn each_kind_of_status_has_its_exit_code_and_sentence() {
        let prefix = "cannot start the run demo: ";
        check(&Status::not_found("no run demo"), 4, &format!("{prefix}no run demo"));
        check(&Status::invalid_argument("rounds: is 0"), 2, &format!("{prefix}rounds: is 0"));
        check(&Status::failed_precondition("it is active"), 1, &format!("{prefix}it is active"));
        check(&Status::permission_denied("no"), 1, &format!("{prefix}no"));
        check(
            &Status::unavailable("tcp connect error"),
            3,
            &format!(
                "{prefix}the connection to the aggregator was lost (tcp connect error); check that it runs, and try again"
            ),
        );
    }

    #[test]
    fn a_reset_connection_is_unreachable_whatever_its_code() {
        let status = Status::from_error(Box::new(io::Error::from(io::ErrorKind::ConnectionReset)));
        assert_eq!(Failure::from_status("list the runs", &status).exit_code(), 3);
    }

    #[test]
    fn the_reason_of_a_failed_connection_is_given_as_it_is() {
        let error = ConnectError::NotTls { address: "localhost:1".to_owned() };
        let failure = Failure::from_status("list the runs", &Status::from_error(Box::new(error)));
        assert_eq!(failure.exit_code(), 3);
        assert_eq!(
            failure.to_string(),
            "cannot list the runs: what listens at localhost:1 does not speak TLS: check the endpoint's port"
        );
    }

    #[test]
    fn messages_cannot_drive_the_terminal_but_keep_their_lines() {
        check(&Status::internal("one\n\u{1b}[2Jtwo\u{202e}"), 1, "cannot start the run demo: one\n [2Jtwo");
        check(&Status::new(Code::Internal, ""), 1, "cannot start the run demo: internal error");
    }

    #[test]
    fn a_closed_pipe_is_success() {
        assert_eq!(Failure::from_output(&io::ErrorKind::BrokenPipe.into()).exit_code(), 0);
        assert_eq!(Failure::from_output(&io::ErrorKind::StorageFull.into()).exit_code(), 1);
    }
}
