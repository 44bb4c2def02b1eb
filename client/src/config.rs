//! The site's own configuration: one TOML file, then environment variables over it.
//!
//! `CONSORT_CLIENT_ENDPOINT` overrides `endpoint`, `CONSORT_CLIENT_TLS__KEY` overrides `tls.key`: two
//! underscores go one table down. It holds only what is the site's; what a run asks for is in the run's
//! specification.

use std::path::{Path, PathBuf};

use consort_common::{
    telemetry::LogFormat,
    tls::{CredentialFiles, ServerAddress},
};
use figment::{
    Figment, Provider,
    error::Kind,
    providers::{Env, Format, Toml},
    value::{Dict, Value},
};
use serde::Deserialize;

use crate::{
    data::{Share, Source, source_problems},
    trainer::DeviceChoice,
};

/// Prefix of the environment variables that override the file.
pub const ENVIRONMENT_PREFIX: &str = "CONSORT_CLIENT_";

/// After the prefix: what names the file itself, for the command line.
const PATH_VARIABLE: &str = "config";

/// Every key with its meaning and its default, in the form of a file; the defaults are taken from here.
pub const REFERENCE: &str = include_str!("client.reference.toml");

/// Keys that have no default: the reference's values for them are examples. One of each row must be given.
const REQUIRED: [(&[&str], &str); 2] = [
    (&["endpoint"], "write the aggregator's address, as in endpoint = \"aggregator.example.org:7443\""),
    (
        &["data.path", "data.sources"],
        "write the folder with this site's text, as in [data] path = \"/srv/text\"",
    ),
];

/// Least and most seconds between two local checkpoints.
const CHECKPOINT_SECONDS: std::ops::RangeInclusive<u64> = 1..=3600;
/// Most CPU threads that can be asked for.
const THREADS_MAX: u32 = 1024;
/// Connections that a transfer can share: as many as the protocol lets it have.
const CONNECTIONS: std::ops::RangeInclusive<u32> = 1..=16;
/// Least bytes per second for each connection, where there is a limit: a chunk of 4 MiB then passes within
/// 64 s, before either side takes the other's silence for a broken connection.
const CONNECTION_BYTES_PER_SECOND_MIN: u64 = 64 << 10;

/// A site's configuration.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The aggregator, as HOST:PORT.
    pub endpoint: ServerAddress,
    /// Where the daemon keeps what it needs to resume.
    pub state_directory: PathBuf,
    /// This site's certificate, its key, the federation's CA.
    pub tls: CredentialFiles,
    /// The site's text.
    pub data: Data,
    /// What computes.
    pub device: Device,
    /// Local training, as far as it is the site's business.
    pub training: Training,
    /// What moving models may take of the site's network.
    pub transfer: Transfer,
    /// What is logged, to standard error.
    pub log: Log,
}

/// The site's text.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// A folder of .txt, .jsonl (each also .gz or .zst) and .parquet files, searched recursively. Means
    /// nothing where there are `sources`.
    pub path: PathBuf,
    /// The field of .jsonl lines, or the column of .parquet files, that is the text.
    pub text_key: String,
    /// Several folders instead of one.
    pub sources: Vec<DataSource>,
}

/// One of several sources.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataSource {
    /// What the site calls it.
    pub name: String,
    /// As `data.path`.
    pub path: PathBuf,
    /// As `data.text_key`, which is the default.
    pub text_key: Option<String>,
    /// Its part of the sequences, relative to the other sources' that are not replayed.
    pub weight: Option<f64>,
    /// Its part of all sequences.
    pub replay_percent: Option<f64>,
}

impl Data {
    /// The sources: those that are listed, or the one of `path`.
    pub fn sources(&self) -> Vec<Source> {
        if self.sources.is_empty() {
            return vec![Source { text_key: self.text_key.clone(), ..Source::new(&self.path) }];
        }
        let source = |source: &DataSource| Source {
            name: source.name.clone(),
            path: source.path.clone(),
            text_key: source.text_key.clone().unwrap_or_else(|| self.text_key.clone()),
            share: match (source.replay_percent, source.weight) {
                (Some(percent), _) => Share::ReplayPercent(percent),
                (None, Some(weight)) => Share::Weight(weight),
                (None, None) => Share::Tokens,
            },
        };
        self.sources.iter().map(source).collect()
    }
}

/// What computes.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Device {
    /// The device.
    pub kind: DeviceChoice,
    /// CPU threads for training; 0: all cores.
    pub threads: u32,
    /// Whether a GPU gives the same bits each time.
    pub deterministic: bool,
}

/// Local training, as far as it is the site's business.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Training {
    /// Seconds between two local checkpoints.
    pub checkpoint_seconds: u64,
}

/// What moving models may take of the site's network.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Transfer {
    /// Connections that a transfer shares.
    pub connections: u32,
    /// Limit on sending deltas; 0: none.
    pub upload_bytes_per_second: u64,
    /// Limit on receiving models; 0: none.
    pub download_bytes_per_second: u64,
}

/// What is logged, to standard error.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    /// "human" or "json".
    pub format: LogFormat,
    /// A `tracing` filter.
    pub filter: String,
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// There is no such file.
    #[error("there is no configuration at {path}; `consort pki issue site NAME` writes one, or name yours with --config", path = .0.display())]
    Missing(PathBuf),
    /// Something in it, or in the environment, is wrong.
    #[error("the configuration {path} cannot be used:{problems}", path = path.display(), problems = lines(problems))]
    Invalid {
        /// The file.
        path: PathBuf,
        /// All that is wrong, each with the path of its key.
        problems: Vec<String>,
    },
}

fn lines(problems: &[String]) -> String {
    problems.iter().map(|problem| format!("\n  {problem}")).collect()
}

impl Config {
    /// Reads the file and the environment; relative paths start at the file's folder.
    ///
    /// # Errors
    /// If the file is missing, or with everything in it that is not allowed.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        if !path.is_file() {
            return Err(ConfigError::Missing(path.to_owned()));
        }
        let environment = Env::prefixed(ENVIRONMENT_PREFIX).ignore(&[PATH_VARIABLE]).split("__");
        let mut config = read(Toml::file_exact(path), environment)
            .map_err(|problems| ConfigError::Invalid { path: path.to_owned(), problems })?;
        let folder = std::path::absolute(path)
            .ok()
            .and_then(|path| path.parent().map(Path::to_owned))
            .unwrap_or_default();
        config.state_directory = folder.join(&config.state_directory);
        config.data.path = folder.join(&config.data.path);
        for source in &mut config.data.sources {
            source.path = folder.join(&source.path);
        }
        config.tls = config.tls.relative_to(&folder);
        Ok(config)
    }
}

fn read(file: impl Provider, environment: impl Provider) -> Result<Config, Vec<String>> {
    let mut given = Vec::new();
    for provider in [provided(&file)?, provided(&environment)?] {
        leaves("", provider, &mut given);
    }
    // Key by key over a file that is right, so that each wrong key is found and not only the first.
    let mut problems: Vec<String> = given
        .iter()
        .filter_map(|(key, value)| {
            let figment = Figment::from(Toml::string(REFERENCE)).merge((key.as_str(), value));
            let error = figment.extract::<Config>().err()?;
            // In a list, the path goes on below the key.
            let within = error.path.join(".");
            let key = if within.len() > key.len() { &within } else { key };
            Some(match error.kind {
                Kind::UnknownField(_, allowed) => {
                    format!("{key}: there is no such key; there are {}", allowed.join(", "))
                }
                kind => format!("{key}: {kind}"),
            })
        })
        .collect();
    let is_empty = |value: &Value| matches!(value, Value::Array(_, values) if values.is_empty());
    let is_given = |key: &str| given.iter().any(|(given, value)| given == key && !is_empty(value));
    for (keys, advice) in REQUIRED {
        if !keys.iter().any(|key| is_given(key)) {
            problems.push(format!("{}: is missing; {advice}", keys[0]));
        }
    }
    if is_given("data.path") && is_given("data.sources") {
        problems.push("data.path: is given beside data.sources; leave one of them out".to_owned());
    }
    let figment = given.iter().fold(Figment::from(Toml::string(REFERENCE)), |figment, (key, value)| {
        figment.merge((key.as_str(), value))
    });
    match figment.extract::<Config>() {
        Ok(config) => {
            problems.extend(check(&config));
            if problems.is_empty() { Ok(config) } else { Err(problems) }
        }
        Err(error) if problems.is_empty() => Err(vec![error.to_string()]),
        Err(_) => Err(problems),
    }
}

fn provided(provider: &impl Provider) -> Result<Dict, Vec<String>> {
    match provider.data() {
        Ok(profiles) => Ok(profiles.into_values().flatten().collect()),
        Err(error) => Err(vec![error.to_string()]),
    }
}

fn leaves(prefix: &str, dict: Dict, given: &mut Vec<(String, Value)>) {
    for (key, value) in dict {
        let key = if prefix.is_empty() { key } else { format!("{prefix}.{key}") };
        match value {
            Value::Dict(_, dict) if !dict.is_empty() => leaves(&key, dict, given),
            // An empty table says nothing.
            Value::Dict(..) => {}
            value => given.push((key, value)),
        }
    }
}

fn check(config: &Config) -> Vec<String> {
    let mut problems = Vec::new();
    if !CHECKPOINT_SECONDS.contains(&config.training.checkpoint_seconds) {
        problems.push(format!(
            "training.checkpoint_seconds: is {}; allowed: {} to {}",
            config.training.checkpoint_seconds,
            CHECKPOINT_SECONDS.start(),
            CHECKPOINT_SECONDS.end()
        ));
    }
    if config.device.threads > THREADS_MAX {
        problems.push(format!("device.threads: is {}; allowed: 0 to {THREADS_MAX}", config.device.threads));
    }
    check_data(&config.data, &mut problems);
    check_transfer(&config.transfer, &mut problems);
    problems
}

fn check_data(data: &Data, problems: &mut Vec<String>) {
    for source in &data.sources {
        if source.weight.is_some() && source.replay_percent.is_some() {
            problems.push(format!(
                "data.sources: source {:?} has a weight and a replay_percent; leave one of them out",
                source.name
            ));
        }
    }
    problems.extend(
        source_problems(&data.sources()).into_iter().map(|problem| format!("data.sources: {problem}")),
    );
}

fn check_transfer(transfer: &Transfer, problems: &mut Vec<String>) {
    let connections = transfer.connections;
    if !CONNECTIONS.contains(&connections) {
        problems.push(format!(
            "transfer.connections: is {connections}; allowed: {} to {}",
            CONNECTIONS.start(),
            CONNECTIONS.end()
        ));
    }
    let least = CONNECTION_BYTES_PER_SECOND_MIN * u64::from(connections);
    for (key, limit) in [
        ("upload_bytes_per_second", transfer.upload_bytes_per_second),
        ("download_bytes_per_second", transfer.download_bytes_per_second),
    ] {
        if (1..least).contains(&limit) {
            problems.push(format!(
                "transfer.{key}: is {limit}; allowed: 0 for no limit, or at least {least} ({CONNECTION_BYTES_PER_SECOND_MIN} for each of transfer.connections)"
            ));
        }
    }
}

#[cfg(test)]
mod tests {
    use figment::providers::Serialized;

    use super::*;

    const LEAST: &str = "endpoint = 'localhost:1'\n[data]\npath = 'text'\n";

    fn check_problems(file: &str, environment: &[(&str, &str)], expected: &[&str]) {
        let environment: Dict =
            environment.iter().map(|(key, value)| ((*key).to_owned(), Value::from(*value))).collect();
        let problems = read(Toml::string(file), Serialized::defaults(environment)).err().unwrap_or_default();
        assert_eq!(problems.len(), expected.len(), "{problems:?}");
        for word in expected {
            assert!(
                problems.iter().any(|problem| problem.starts_with(word)),
                "{word:?} is not in {problems:?}"
            );
        }
    }

    #[test]
    fn the_reference_is_a_configuration() {
        let config = read(Toml::string(REFERENCE), Serialized::defaults(Dict::new())).unwrap();
        assert_eq!(config.endpoint.to_string(), "aggregator.example.org:7443");
        assert_eq!(config.device.kind, DeviceChoice::Auto);
    }

    #[test]
    fn the_required_keys_are_enough() {
        check_problems(LEAST, &[], &[]);
    }

    #[test]
    fn every_problem_is_listed_with_its_key() {
        check_problems("", &[], &["endpoint: is missing", "data.path: is missing"]);
        check_problems(
            "endpoint = 'nowhere'\nlisten = 3\n[data]\npath = 7\n[device]\nkind = 'tpu'\nthreads = -1\n[tsl]\nkey = 'k'",
            &[],
            &[
                "endpoint: ",
                "listen: there is no such key",
                "data.path: ",
                "device.kind: ",
                "device.threads: ",
                "tsl.key: ",
            ],
        );
        check_problems(
            &format!("{LEAST}[training]\ncheckpoint_seconds = 0"),
            &[],
            &["training.checkpoint_seconds: is 0"],
        );
        check_problems("endpoint = ", &[], &[""]);
    }

    #[test]
    fn a_limit_that_would_look_like_a_broken_connection_is_refused() {
        let with = |transfer: &str, expected: &[&str]| {
            check_problems(&format!("{LEAST}[transfer]\n{transfer}"), &[], expected);
        };
        with("upload_bytes_per_second = 65536\ndownload_bytes_per_second = 0", &[]);
        with("upload_bytes_per_second = 65535", &["transfer.upload_bytes_per_second: is 65535"]);
        with(
            "connections = 4\ndownload_bytes_per_second = 200000",
            &["transfer.download_bytes_per_second: is 200000; allowed: 0 for no limit, or at least 262144"],
        );
        with("connections = 0", &["transfer.connections: is 0; allowed: 1 to 16"]);
        with("connections = 17", &["transfer.connections: is 17"]);
        with("upload_bytes_per_second = -1", &["transfer.upload_bytes_per_second: "]);
    }

    #[test]
    fn several_sources_have_weights_or_are_replayed() {
        // The reference's own example, as it is when it is no comment.
        let example: String = REFERENCE
            .lines()
            .skip_while(|line| *line != "# [[data.sources]]")
            .take_while(|line| line.starts_with('#'))
            .map(|line| format!("{}\n", &line[2..]))
            .collect();
        let sources = |example: &str| {
            let file = format!("endpoint = 'localhost:1'\n{example}");
            read(Toml::string(&file), Serialized::defaults(Dict::new())).map(|config| config.data.sources())
        };
        let found = sources(&example).unwrap();
        assert_eq!(
            found.iter().map(|source| source.name.as_str()).collect::<Vec<_>>(),
            ["notes", "letters", "general"]
        );
        assert_eq!(found[0].share, Share::Weight(2.0));
        assert_eq!(found[1].text_key, "content");
        assert_eq!(found[2].share, Share::ReplayPercent(5.0));

        let check = |example: &str, expected: &[&str]| {
            let found = sources(example).unwrap_err();
            assert_eq!(found.len(), expected.len(), "{found:?}");
            assert!(
                found.iter().zip(expected).all(|(found, expected)| found.starts_with(expected)),
                "{found:?}"
            );
        };
        check("data.sources = []", &["data.path: is missing"]);
        check(&format!("data.path = 'x'\n{example}"), &["data.path: is given beside"]);
        check(
            &example.replace("weight = 2.0", "wieght = 2.0"),
            &["data.sources.0.wieght: there is no such key"],
        );
        check(
            &example.replace("weight = 2.0", "weight = -1"),
            &["data.sources: source \"notes\": the weight is -1"],
        );
        check(&example.replace("weight = 1.0", ""), &["data.sources: source \"notes\" has a weight and"]);
        check(
            &example.replace("weight = 2.0", "weight = 2.0\nreplay_percent = 5"),
            &["data.sources: source \"notes\" has a weight and a replay_percent"],
        );
        check(&example.replace("\"letters\"", "\"notes\""), &["data.sources: source \"notes\": give each"]);
    }

    #[test]
    fn the_environment_wins_over_the_file() {
        let environment = Serialized::global("log.format", "json");
        let config = read(Toml::string(&format!("{LEAST}[log]\nformat = 'human'")), environment).unwrap();
        assert_eq!(config.log.format, LogFormat::Json);
        check_problems(LEAST, &[("endpoint", "http://x:1")], &["endpoint: "]);
    }

    #[test]
    fn relative_paths_start_at_the_files_folder() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("client.toml");
        std::fs::write(&path, LEAST).unwrap();
        let config = Config::load(&path).unwrap();
        assert_eq!(config.data.path, folder.path().join("text"));
        assert_eq!(config.tls.key, folder.path().join("key.pem"));
        assert!(matches!(Config::load(&folder.path().join("other.toml")), Err(ConfigError::Missing(_))));
    }
}
