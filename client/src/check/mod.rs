//! The preflight: what a site's IT runs before the daemon, and after anything has changed. Each line
//! passes or says what to do; lines that depend on a failed one are skipped.
//!
//! It changes nothing but that it creates the state directory, and needs no running daemon.

mod machine;
mod network;

use std::path::Path;

use consort_common::{
    spec::RunSpec,
    tls::{Credentials, ServerAddress},
};
use serde::Serialize;

use crate::config::Config;

/// How a line came out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// All is well.
    Passed,
    /// It works, but somebody should see to it.
    Warning,
    /// It does not work; the detail says what to do.
    Failed,
    /// It depends on a line that failed.
    Skipped,
}

/// One thing that was checked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Line {
    /// What was checked, in a word or two.
    pub name: &'static str,
    /// How it came out.
    pub outcome: Outcome,
    /// What was found, and what to do about it.
    pub detail: String,
}

/// What a line found: its detail, with the outcome.
type Finding = (Outcome, String);

fn passed(detail: impl Into<String>) -> Finding {
    (Outcome::Passed, detail.into())
}

fn warning(detail: impl Into<String>) -> Finding {
    (Outcome::Warning, detail.into())
}

fn failed(detail: impl Into<String>) -> Finding {
    (Outcome::Failed, detail.into())
}

/// The lines so far; each is told to `told` as soon as it is known.
struct Report<'a> {
    lines: Vec<Line>,
    told: &'a dyn Fn(&Line),
}

impl Report<'_> {
    fn add(&mut self, name: &'static str, (outcome, detail): Finding) -> bool {
        let line = Line { name, outcome, detail };
        (self.told)(&line);
        self.lines.push(line);
        outcome != Outcome::Failed
    }

    fn skip(&mut self, names: &[&'static str], because: &str) {
        for name in names {
            self.add(name, (Outcome::Skipped, format!("not checked: {because}")));
        }
    }
}

/// Checks everything; `told` hears each line as it comes.
pub async fn check(config_path: &Path, config: &Config, told: &dyn Fn(&Line)) -> Vec<Line> {
    let mut report = Report { lines: Vec::new(), told };
    report.add("configuration", passed(format!("{} is understood", config_path.display())));
    report.add("key file", machine::key_file(&config.tls.key));
    let credentials = match machine::certificate(&config.tls) {
        Ok((credentials, finding)) => {
            report.add("certificate", finding);
            Some(credentials)
        }
        Err(finding) => {
            report.add("certificate", finding);
            None
        }
    };
    let active = online(&mut report, &config.endpoint, credentials.as_ref()).await;
    for source in config.data.sources() {
        report.add("data", machine::data(&source.path));
    }
    report.add("disk", machine::disk(&config.state_directory, active.as_ref()));
    report.add("device", machine::device(config.device.kind, config.device.threads, active.as_ref()));
    report.lines
}

/// The lines that need the aggregator; returns the specification of its active run.
async fn online(
    report: &mut Report<'_>,
    endpoint: &ServerAddress,
    credentials: Option<&Credentials>,
) -> Option<RunSpec> {
    const BEYOND: [&str; 5] = ["identity", "protocol", "clock", "upload", "run"];
    let resolved = report.add("name", network::name(endpoint).await);
    if !resolved {
        report.skip(&["port", "tls"], "the name has no address");
        report.skip(&BEYOND, "there is no connection");
        return None;
    }
    if !report.add("port", network::port(endpoint).await) {
        report.skip(&["tls"], "the port does not answer");
        report.skip(&BEYOND, "there is no connection");
        return None;
    }
    let Some(credentials) = credentials else {
        report.skip(&["tls"], "the certificate is not usable");
        report.skip(&BEYOND, "there is no connection");
        return None;
    };
    if !report.add("tls", network::tls(endpoint, credentials).await) {
        report.skip(&BEYOND, "there is no connection");
        return None;
    }
    let mut probe = match network::Probe::open(endpoint, credentials).await {
        Ok(probe) => probe,
        Err(finding) => {
            report.add("identity", finding);
            report.skip(&BEYOND[1..], "the aggregator does not answer");
            return None;
        }
    };
    report.add("identity", probe.identity());
    report.add("protocol", probe.protocol());
    report.add("clock", probe.clock());
    report.add("upload", probe.upload().await);
    let (finding, active) = probe.active_run();
    report.add("run", finding);
    active
}

/// Whether nothing failed.
pub fn all_well(lines: &[Line]) -> bool {
    lines.iter().all(|line| matches!(line.outcome, Outcome::Passed | Outcome::Warning))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_depends_on_a_failed_line_is_skipped_and_the_rest_is_checked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("client.toml");
        std::fs::create_dir(folder.path().join("data")).unwrap();
        std::fs::write(folder.path().join("data/a.txt"), "text").unwrap();
        std::fs::write(&path, "endpoint = 'localhost:9'\n[data]\npath = 'data'\n[device]\nkind = 'cpu'")
            .unwrap();
        let config = Config::load(&path).unwrap();
        let told = std::cell::RefCell::new(Vec::new());
        let lines = check(&path, &config, &|line| told.borrow_mut().push(line.clone())).await;
        assert_eq!(lines, told.into_inner());
        let outcome = |name| lines.iter().find(|line| line.name == name).unwrap().outcome;
        for (name, expected) in [
            ("configuration", Outcome::Passed),
            ("key file", Outcome::Failed),
            ("certificate", Outcome::Failed),
            ("name", Outcome::Passed),
            ("port", Outcome::Failed),
            ("tls", Outcome::Skipped),
            ("clock", Outcome::Skipped),
            ("data", Outcome::Passed),
            ("device", Outcome::Passed),
        ] {
            assert_eq!(outcome(name), expected, "{name}: {lines:?}");
        }
        assert!(!all_well(&lines));
    }
}
