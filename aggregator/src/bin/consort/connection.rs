//! Finding the operator's configuration and opening the connection to the aggregator.

use std::{
    future::Future,
    path::{Path, PathBuf},
    time::Duration,
};

use consort_common::{
    identity::Role,
    tls::{CredentialFiles, Credentials, ServerAddress, connect_channel},
};
use consort_proto::{MESSAGE_BYTES_MAX, v1::operator_client::OperatorClient};
use serde::Deserialize;
use tonic::{Response, Status, transport::Channel};

use crate::failure::Failure;

/// Name of the configuration file, as `consort pki issue operator NAME` writes it.
const FILE_NAME: &str = "operator.toml";
/// A call whose answer is one message has it after this long, or never: the connection's own keepalive
/// notices a dead machine, not a stuck process.
const REPLY_TIMEOUT: Duration = Duration::from_secs(60);

/// The Operator service of an aggregator.
pub type Operator = OperatorClient<Channel>;

/// The operator's configuration file.
#[derive(Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct OperatorConfig {
    /// The aggregator, as HOST:PORT.
    endpoint: ServerAddress,
    /// The operator's certificate, its key, the federation's CA; relative paths start at the file.
    tls: CredentialFiles,
}

/// Connects as the configuration says: the one at `explicit`, or the one that is found.
pub async fn connect(explicit: Option<&Path>) -> Result<Operator, Failure> {
    let home = std::env::home_dir();
    let path = locate(explicit, &candidates(home.as_deref()), Path::is_file)?;
    let config = load(&path)?;
    let credentials = Credentials::load(&config.tls)
        .and_then(|credentials| credentials.require_role(Role::Operator))
        .map_err(|error| Failure::Usage(format!("{}: {error}", path.display())))?;
    for warning in credentials.warnings() {
        eprintln!("consort: warning: {warning}");
    }
    let channel = connect_channel(&config.endpoint, &credentials)
        .await
        .map_err(|error| Failure::from_connect("reach the aggregator", &error))?;
    Ok(OperatorClient::new(channel)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX))
}

/// The answer to a call of one answer; `attempt` completes "cannot ...".
pub async fn reply<T>(
    attempt: &str,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Failure> {
    match tokio::time::timeout(REPLY_TIMEOUT, call).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(Failure::from_status(attempt, &status)),
        Err(_) => Err(Failure::Unreachable(format!(
            "cannot {attempt}: the aggregator did not answer within {} s; look at its log",
            REPLY_TIMEOUT.as_secs()
        ))),
    }
}

/// What a response lacks that the protocol says it has.
pub fn missing(attempt: &str, what: &str) -> Failure {
    Failure::Refused(format!(
        "cannot {attempt}: the aggregator's answer has no {what}; is it of another version?"
    ))
}

fn candidates(home: Option<&Path>) -> Vec<PathBuf> {
    let in_home = home.map(|home| home.join(".config").join("consort").join(FILE_NAME));
    std::iter::once(PathBuf::from(FILE_NAME)).chain(in_home).collect()
}

fn locate(
    explicit: Option<&Path>,
    candidates: &[PathBuf],
    exists: impl Fn(&Path) -> bool,
) -> Result<PathBuf, Failure> {
    if let Some(path) = explicit {
        return Ok(path.to_owned());
    }
    candidates.iter().find(|path| exists(path)).cloned().ok_or_else(|| {
        let searched: Vec<String> = candidates.iter().map(|path| path.display().to_string()).collect();
        Failure::Usage(format!(
            "no operator configuration: looked for {}; name one with --config FILE or CONSORT_OPERATOR_CONFIG, or make one with `consort pki issue operator NAME`",
            searched.join(" and ")
        ))
    })
}

fn load(path: &Path) -> Result<OperatorConfig, Failure> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        Failure::Usage(format!(
            "cannot read the operator configuration {}: {error}; name another with --config FILE",
            path.display()
        ))
    })?;
    let mut config: OperatorConfig = toml::from_str(&text).map_err(|error| {
        Failure::Usage(format!(
            "the operator configuration {} is wrong: {}",
            path.display(),
            error.to_string().trim_end()
        ))
    })?;
    config.tls = config.tls.relative_to(path.parent().unwrap_or(Path::new("")));
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONFIG: &str = r#"
        endpoint = "aggregator.example.org:7443"
        [tls]
        certificate = "alice.pem"
        key = "/secret/alice.key"
        ca = "ca.pem"
    "#;

    fn write(text: &str) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(FILE_NAME);
        std::fs::write(&path, text).unwrap();
        (folder, path)
    }

    fn check_refused(text: &str, expected: &str) {
        let (_folder, path) = write(text);
        let failure = load(&path).unwrap_err();
        assert_eq!(failure.exit_code(), 2);
        assert!(failure.to_string().contains(expected), "{failure}");
        assert!(failure.to_string().contains(FILE_NAME), "{failure}");
    }

    #[test]
    fn credentials_lie_beside_the_file() {
        let (folder, path) = write(CONFIG);
        let config = load(&path).unwrap();
        assert_eq!(config.endpoint.to_string(), "aggregator.example.org:7443");
        assert_eq!(config.tls.certificate, folder.path().join("alice.pem"));
        assert_eq!(config.tls.key, Path::new("/secret/alice.key"));
    }

    #[test]
    fn a_wrong_file_is_named_with_its_mistake() {
        check_refused(&CONFIG.replace(":7443", ""), "the port is missing");
        check_refused(&CONFIG.replace("ca =", "certificate_authority ="), "certificate_authority");
        check_refused("endpoint = ", "expected");
    }

    #[test]
    fn an_explicit_file_wins_then_the_folder_then_the_home() {
        let candidates = candidates(Some(Path::new("/home/alice")));
        let home = Path::new("/home/alice/.config/consort/operator.toml");
        let find = |explicit: Option<&str>, exists: fn(&Path) -> bool| {
            locate(explicit.map(Path::new), &candidates, exists)
        };
        assert_eq!(find(Some("x.toml"), |_| true).unwrap(), Path::new("x.toml"));
        assert_eq!(find(None, |_| true).unwrap(), Path::new("operator.toml"));
        assert_eq!(find(None, Path::is_absolute).unwrap(), home);
    }

    #[test]
    fn where_nothing_is_found_the_message_says_what_to_do() {
        let failure = locate(None, &candidates(None), |_| false).unwrap_err();
        assert_eq!(failure.exit_code(), 2);
        for part in ["looked for operator.toml", "--config", "CONSORT_OPERATOR_CONFIG", "pki issue operator"]
        {
            assert!(failure.to_string().contains(part), "{failure}");
        }
    }
}
