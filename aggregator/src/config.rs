//! The aggregator's own configuration: one TOML file, then environment variables over it.
//!
//! `CONSORT_AGGREGATOR_LISTEN` overrides `listen`, `CONSORT_AGGREGATOR_LIMITS__UPLOADS_MAX` overrides
//! `limits.uploads_max`: two underscores go one table down.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use consort_common::{telemetry::LogFormat, tls::CredentialFiles};
use figment::{
    Figment,
    providers::{Env, Format, Serialized, Toml},
};
use serde::{Deserialize, Serialize};
use sqlx::any::AnyConnectOptions;

use crate::{spool::SpoolLimits, store::Location};

/// Prefix of the environment variables that override the file.
pub const ENVIRONMENT_PREFIX: &str = "CONSORT_AGGREGATOR_";

/// Every key, with its default, as `consort-aggregator reference` prints it.
pub const REFERENCE: &str = include_str!("config.reference.toml");

/// The aggregator's configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Address and port to listen on; port 0 lets the system choose (see `<state_directory>/listening`).
    pub listen: String,
    /// Database, spool, models and checkpoints; relative to the file's folder.
    pub state_directory: PathBuf,
    /// This aggregator's certificate, its key, the federation's CA.
    pub tls: CredentialFiles,
    /// The database, if not a file in the state directory.
    pub database: Database,
    /// Where uploaded deltas wait and checkpoints are published, if not in the state directory alone.
    pub storage: Storage,
    /// Bounds that protect the machine.
    pub limits: Limits,
    /// What is logged, to standard error.
    pub log: Log,
}

/// The database. A password comes from the environment.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Database {
    /// `postgres://USER@HOST:PORT/DATABASE`; empty: SQLite in the state directory.
    pub url: String,
}

impl Database {
    /// What the URL may say after a question mark.
    const PARAMETERS: [&str; 5] = ["host", "sslmode", "sslrootcert", "sslcert", "sslkey"];

    /// Where it is.
    pub fn location(&self, state_directory: &Path) -> Location {
        if self.url.is_empty() {
            Location::File(state_directory.join("consort.db"))
        } else {
            Location::Server(self.url.clone())
        }
    }

    fn check(&self, problems: &mut String) {
        if self.url.is_empty() {
            return;
        }
        let url = match self.url.parse::<AnyConnectOptions>() {
            Ok(options) if ["postgres", "postgresql"].contains(&options.database_url.scheme()) => {
                options.database_url
            }
            _ => {
                *problems +=
                    "\n  database.url: must be postgres://USER@HOST:PORT/DATABASE, or empty for SQLite";
                return;
            }
        };
        for (key, value) in url.query_pairs() {
            // One that is misspelt would be passed over, and TLS with it.
            if !Self::PARAMETERS.contains(&key.as_ref()) {
                let allowed = Self::PARAMETERS.join(", ");
                *problems += &format!("\n  database.url: has the parameter {key}; allowed: {allowed}");
            } else if key.starts_with("ssl") && key != "sslmode" && !Path::new(&*value).is_absolute() {
                *problems += &format!("\n  database.url: {key} is {value:?}; must be an absolute path");
            }
        }
        // It would be seen in logs, and by whoever may read the file.
        if url.password().is_some() {
            *problems += "\n  database.url: holds a password; give that in PGPASSWORD, or in the file that PGPASSFILE names";
        }
    }
}

/// Where uploaded deltas wait and checkpoints are published. Credentials come from the environment.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Storage {
    /// `s3://BUCKET/PREFIX`; empty: the state directory.
    pub url: String,
    /// URL of a store other than Amazon's.
    pub endpoint: String,
    /// Region of the bucket.
    pub region: String,
}

impl Storage {
    const SCHEME: &str = "s3://";

    /// Where requests go, in words.
    pub fn endpoint(&self) -> &str {
        if self.endpoint.is_empty() { "Amazon S3" } else { &self.endpoint }
    }

    /// The parts of the URL.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn bucket_and_prefix(&self) -> Result<(&str, &str), String> {
        let path = self.url.strip_prefix(Self::SCHEME);
        let (bucket, prefix) = path.map_or(("", ""), |path| path.split_once('/').unwrap_or((path, "")));
        if bucket.is_empty() {
            return Err(format!("is {:?}; must be s3://BUCKET or s3://BUCKET/PREFIX", self.url));
        }
        Ok((bucket, prefix))
    }

    fn check(&self, problems: &mut String) {
        if self.url.is_empty() {
            for (key, value) in [("endpoint", &self.endpoint), ("region", &self.region)] {
                if !value.is_empty() {
                    *problems += &format!("\n  storage.{key}: is set without storage.url; set both or none");
                }
            }
            return;
        }
        if let Err(problem) = self.bucket_and_prefix() {
            *problems += &format!("\n  storage.url: {problem}");
        }
        let is_url = ["http://", "https://"].iter().any(|scheme| self.endpoint.starts_with(scheme));
        if !self.endpoint.is_empty() && !is_url {
            *problems +=
                &format!("\n  storage.endpoint: is {:?}; must begin with https:// or http://", self.endpoint);
        }
    }
}

/// Bounds that protect the machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Uploads are refused that would leave the disk less than this, in bytes.
    pub disk_reserve_bytes: u64,
    /// Most that uploaded deltas take together until they are averaged, in bytes; 0: what the disk has.
    pub spool_bytes_max: u64,
    /// The same for the deltas of one site.
    pub spool_bytes_per_site_max: u64,
    /// Transfers that have not moved for this long are cut, in seconds. Slow ones live.
    pub stall_seconds: u64,
    /// Uploads at a time, over all sites.
    pub uploads_max: usize,
    /// Downloads at a time, over all sites.
    pub downloads_max: usize,
}

impl Limits {
    /// What the spool may occupy.
    pub fn spool(&self) -> SpoolLimits {
        SpoolLimits {
            disk_reserve_bytes: self.disk_reserve_bytes,
            total_bytes_max: self.spool_bytes_max,
            site_bytes_max: self.spool_bytes_per_site_max,
        }
    }

    /// How long a transfer may stand still.
    pub fn stall(&self) -> Duration {
        Duration::from_secs(self.stall_seconds)
    }
}

/// What is logged, to standard error.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Log {
    /// "human" or "json".
    pub format: LogFormat,
    /// A `tracing` filter: "info", "consort_aggregator=debug,warn".
    pub filter: String,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: "0.0.0.0:7443".to_owned(),
            state_directory: "state".into(),
            tls: CredentialFiles {
                certificate: "cert.pem".into(),
                key: "key.pem".into(),
                ca: "ca.pem".into(),
            },
            database: Database::default(),
            storage: Storage::default(),
            limits: Limits::default(),
            log: Log::default(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            disk_reserve_bytes: 512 << 20,
            spool_bytes_max: 0,
            spool_bytes_per_site_max: 0,
            stall_seconds: 120,
            uploads_max: 64,
            downloads_max: 64,
        }
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { format: LogFormat::Human, filter: "info".to_owned() }
    }
}

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// There is no such file.
    #[error("there is no configuration at {path}; `consort pki issue aggregator NAME` writes one, or name yours with --config", path = .0.display())]
    Missing(PathBuf),
    /// Something in it, or in the environment, is wrong.
    #[error("the configuration {path} cannot be used:{problems}", path = path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// One line each.
        problems: String,
    },
}

impl Config {
    /// Reads the file and the environment; paths become relative to the file's folder.
    ///
    /// # Errors
    /// If the file is missing, or any key or value is not allowed: all of them.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        if !path.is_file() {
            return Err(ConfigError::Missing(path.to_owned()));
        }
        let mut config: Self = Figment::from(Serialized::defaults(Self::default()))
            .merge(Toml::file_exact(path))
            // CONSORT_AGGREGATOR_CONFIG names the file itself.
            .merge(Env::prefixed(ENVIRONMENT_PREFIX).ignore(&["config"]).split("__"))
            .extract()
            .map_err(|errors| ConfigError::Invalid {
                path: path.to_owned(),
                problems: errors.into_iter().map(|error| format!("\n  {error}")).collect(),
            })?;
        config.check().map_err(|problems| ConfigError::Invalid { path: path.to_owned(), problems })?;
        // Absolute, since the database remembers where checkpoints are.
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let folder = path.parent().unwrap_or(Path::new("/"));
        config.state_directory = folder.join(&config.state_directory);
        config.tls = config.tls.relative_to(folder);
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        let mut problems = String::new();
        self.database.check(&mut problems);
        self.storage.check(&mut problems);
        for (key, value) in [
            ("limits.stall_seconds", self.limits.stall_seconds),
            ("limits.uploads_max", self.limits.uploads_max as u64),
            ("limits.downloads_max", self.limits.downloads_max as u64),
        ] {
            if value == 0 {
                problems += &format!("\n  {key}: is 0; must be at least 1");
            }
        }
        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn load(toml: &str) -> Result<Config, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("aggregator.toml");
        fs::write(&path, toml).unwrap();
        Config::load(&path).map(|mut config| {
            config.state_directory = config.state_directory.strip_prefix(folder.path()).unwrap().to_owned();
            config
        })
    }

    #[test]
    fn the_reference_names_every_key_with_its_default() {
        let reference: toml::Table = toml::from_str(REFERENCE).unwrap();
        assert_eq!(reference, toml::Table::try_from(Config::default()).unwrap());
    }

    #[test]
    fn an_empty_file_is_the_defaults() {
        assert_eq!(load("").unwrap().limits, Limits::default());
    }

    #[test]
    fn unknown_keys_and_wrong_types_are_named() {
        for (toml, word) in [
            ("lisen = '0.0.0.0:1'", "lisen"),
            ("[limits]\nuploads_max = 'many'", "uploads_max"),
            ("[limits]\nstall_seconds = 0", "limits.stall_seconds"),
            ("[database]\nurl = 'mysql://db/consort'", "database.url: must be"),
            ("[database]\nurl = 'db/consort'", "database.url: must be"),
            ("[database]\nurl = 'postgres://consort:secret@db/consort'", "PGPASSWORD"),
            (
                "[database]\nurl = 'postgres://db/consort?ssl_mode=verify-full'",
                "parameter ssl_mode; allowed: host",
            ),
            (
                "[database]\nurl = 'postgres://db/consort?sslrootcert=ca.pem'",
                "sslrootcert is \"ca.pem\"; must be an absolute path",
            ),
            ("[storage]\nurl = '/srv/spool'", "storage.url"),
            ("[storage]\nurl = 's3:///prefix'", "storage.url"),
            ("[storage]\nendpoint = 'https://minio:9000'", "storage.endpoint: is set without storage.url"),
            ("[storage]\nurl = 's3://bucket'\nendpoint = 'minio:9000'", "storage.endpoint"),
        ] {
            let message = load(toml).unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        }
    }

    #[test]
    fn a_database_is_a_file_of_the_state_directory_or_at_a_server() {
        let location = |toml: &str| load(toml).unwrap().database.location(Path::new("/state"));
        assert_eq!(location(""), Location::File("/state/consort.db".into()));
        let url = "postgresql://consort@db:5433/consort?sslmode=verify-full";
        assert_eq!(location(&format!("[database]\nurl = '{url}'")), Location::Server(url.to_owned()));
    }

    #[test]
    fn a_storage_url_names_a_bucket_and_perhaps_a_prefix() {
        for (url, expected) in [("s3://b", ("b", "")), ("s3://b/", ("b", "")), ("s3://b/p/q", ("b", "p/q"))] {
            let storage = load(&format!("[storage]\nurl = '{url}'")).unwrap().storage;
            assert_eq!(storage.bucket_and_prefix(), Ok(expected));
        }
    }

    #[test]
    fn a_missing_file_is_said_to_be_missing() {
        let error = Config::load(Path::new("/nonexistent/aggregator.toml")).unwrap_err();
        assert!(matches!(error, ConfigError::Missing(_)));
    }
}
