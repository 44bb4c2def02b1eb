//! A federation under test: its PKI, one aggregator, its sites, an operator.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Output},
    thread,
    time::Duration,
};

use consort_common::ids::Digest;
use serde_json::Value;
use tempfile::TempDir;

use crate::{Process, binaries, process::wait_for, texts};

/// The name of every federation under test.
pub const FEDERATION: &str = "test";

/// How often an aggregator is started that finds the port which it had before taken, and the pause between.
const STARTS_MAX: u32 = 5;
const START_PAUSE: Duration = Duration::from_secs(1);

/// A federation under test. Everything lies in one temporary directory; all processes die with it.
pub struct TestFederation {
    aggregator: Option<Process>,
    clients: BTreeMap<String, Process>,
    endpoint: Option<String>,
    aggregator_environment: Vec<(String, String)>,
    directory: TempDir,
}

impl TestFederation {
    /// Makes the PKI: an aggregator, an operator and the `sites`, each with a corpus of its own.
    pub fn new(sites: &[&str]) -> Self {
        Self::reachable_at(sites, &[])
    }

    /// The same, where the aggregator is reached by `hosts` as well as on this machine.
    pub fn reachable_at(sites: &[&str], hosts: &[&str]) -> Self {
        let federation = Self {
            aggregator: None,
            clients: BTreeMap::new(),
            endpoint: None,
            aggregator_environment: Vec::new(),
            directory: tempfile::tempdir().expect("a temporary directory can be made"),
        };
        federation.pki(&["init", "--federation", FEDERATION]);
        let hosts = ["localhost", "127.0.0.1"].iter().chain(hosts).flat_map(|host| ["--host", host]);
        federation.pki(&["issue", "aggregator", "main"].into_iter().chain(hosts).collect::<Vec<_>>());
        for (seed, site) in sites.iter().enumerate() {
            federation.pki(&["issue", "site", site, "--endpoint", "localhost:1"]);
            texts::write(&federation.kit(&format!("site-{site}")).join("data"), seed as u64, 200);
        }
        federation
    }

    /// The directory that everything lies in.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// A kit: `site-bank`, `operator-alice`, `aggregator-main`.
    pub fn kit(&self, name: &str) -> PathBuf {
        self.path().join("pki/kits").join(name)
    }

    /// The aggregator's state directory.
    pub fn aggregator_state(&self) -> PathBuf {
        self.kit("aggregator-main").join("state")
    }

    /// What the aggregator has stored of runs, models and deltas: every file with its content's BLAKE3.
    pub fn stored(&self) -> BTreeMap<PathBuf, Digest> {
        let mut stored = BTreeMap::new();
        let mut folders: Vec<PathBuf> =
            ["runs", "models", "spool"].map(|name| self.aggregator_state().join(name)).to_vec();
        while let Some(folder) = folders.pop() {
            // A folder may not be there yet.
            for entry in fs::read_dir(&folder).into_iter().flatten() {
                let path = entry.expect("the folder can be read").path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    let bytes = fs::read(&path).expect("the file can be read");
                    stored.insert(path, Digest::of(&bytes));
                }
            }
        }
        stored
    }

    /// A site's state directory.
    pub fn site_state(&self, site: &str) -> PathBuf {
        self.kit(&format!("site-{site}")).join("state")
    }

    /// Runs `consort pki ...`.
    pub fn pki(&self, arguments: &[&str]) {
        let directory = self.path().join("pki");
        let output = Command::new(binaries::consort())
            .arg("pki")
            .args(arguments)
            .arg("--directory")
            .arg(directory)
            .output()
            .expect("consort can be run");
        assert!(
            output.status.success(),
            "consort pki {arguments:?}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
    }

    /// Sets an environment variable of the aggregator from its next start on.
    pub fn set_aggregator_environment(&mut self, name: &str, value: &str) {
        self.aggregator_environment.push((name.to_owned(), value.to_owned()));
    }

    /// Starts the aggregator and waits until it listens. After the first start it keeps its port.
    pub fn start_aggregator(&mut self) {
        assert!(self.aggregator.is_none(), "the aggregator runs already");
        let announcement = self.aggregator_state().join("listening");
        let _ = fs::remove_file(&announcement);
        let port = self.endpoint.as_ref().map_or("0", |endpoint| endpoint.rsplit(':').next().unwrap_or("0"));
        let start = || {
            Process::start(
                Command::new(binaries::aggregator())
                    .arg("--config")
                    .arg(self.kit("aggregator-main").join("aggregator.toml"))
                    .env("CONSORT_AGGREGATOR_LISTEN", format!("127.0.0.1:{port}"))
                    .env("CONSORT_AGGREGATOR_LIMITS__DISK_RESERVE_BYTES", "1000000")
                    .envs(self.aggregator_environment.iter().cloned()),
                &self.path().join("aggregator.log"),
            )
        };
        let log = fs::read(self.path().join("aggregator.log")).unwrap_or_default();
        let (mut starts, mut before) = (1, log.len());
        let mut process = start();
        let address = wait_for("the aggregator to listen", || {
            if !process.is_running() {
                // While it was down the system may have given its port to another test, for a while.
                let output = process.output();
                let is_taken = port != "0" && output[before..].contains("Address already in use");
                assert!(is_taken && starts < STARTS_MAX, "the aggregator ended:\n{output}");
                println!("port {port} is taken; starting the aggregator again");
                thread::sleep(START_PAUSE);
                (starts, before) = (starts + 1, output.len());
                process = start();
            }
            fs::read_to_string(&announcement).ok().filter(|address| !address.is_empty())
        });
        let port = address.rsplit(':').next().expect("an address has a port").to_owned();
        if self.endpoint.replace(format!("localhost:{port}")).is_none() {
            self.pki(&["issue", "operator", "alice", "--endpoint", self.endpoint()]);
        }
        self.aggregator = Some(process);
    }

    /// SIGKILL to the aggregator.
    pub fn kill_aggregator(&mut self) {
        self.aggregator.take().expect("the aggregator runs").kill();
    }

    /// SIGTERM to the aggregator, and its exit status.
    pub fn terminate_aggregator(&mut self) -> ExitStatus {
        self.aggregator.take().expect("the aggregator runs").terminate()
    }

    /// The aggregator's process.
    pub fn aggregator(&mut self) -> &mut Process {
        self.aggregator.as_mut().expect("the aggregator runs")
    }

    /// `localhost:PORT`.
    pub fn endpoint(&self) -> &str {
        self.endpoint.as_deref().expect("the aggregator was started")
    }

    /// Starts a site's daemon on one CPU thread.
    pub fn start_client(&mut self, site: &str) {
        let endpoint = self.endpoint().to_owned();
        self.start_client_through(site, &endpoint);
    }

    /// The same, by another way than the aggregator's own endpoint.
    pub fn start_client_through(&mut self, site: &str, endpoint: &str) {
        let mut command = self.client_command(site, endpoint);
        self.start_client_by(site, command.env("CONSORT_CLIENT_TRAINING__CHECKPOINT_SECONDS", "1"));
    }

    /// What starts a site's daemon on one CPU thread, by the way of `endpoint`.
    pub fn client_command(&self, site: &str, endpoint: &str) -> Command {
        let mut command = Command::new(binaries::client());
        command
            .arg("run")
            .arg("--config")
            .arg(self.kit(&format!("site-{site}")).join("client.toml"))
            .env("CONSORT_CLIENT_ENDPOINT", endpoint)
            .env("CONSORT_CLIENT_DEVICE__KIND", device())
            // Many tests compare runs bit by bit.
            .env("CONSORT_CLIENT_DEVICE__DETERMINISTIC", "true")
            .env("CONSORT_CLIENT_DEVICE__THREADS", "1");
        command
    }

    /// Starts a site's daemon by a command made of [`TestFederation::client_command`].
    pub fn start_client_by(&mut self, site: &str, command: &mut Command) {
        let process = Process::start(command, &self.path().join(format!("{site}.log")));
        self.clients.insert(site.to_owned(), process);
    }

    /// SIGKILL to a site's daemon.
    pub fn kill_client(&mut self, site: &str) {
        self.clients.remove(site).expect("the client runs").kill();
    }

    /// SIGTERM to a site's daemon, and its exit status.
    pub fn terminate_client(&mut self, site: &str) -> ExitStatus {
        self.clients.remove(site).expect("the client runs").terminate()
    }

    /// A site's daemon.
    pub fn client(&mut self, site: &str) -> &mut Process {
        self.clients.get_mut(site).expect("the client runs")
    }

    /// Runs the CLI as the operator.
    pub fn consort(&self, arguments: &[&str]) -> Output {
        Command::new(binaries::consort())
            .arg("--config")
            .arg(self.kit("operator-alice").join("operator.toml"))
            .args(arguments)
            .output()
            .expect("consort can be run")
    }

    /// Runs the CLI with `--json`; it must succeed.
    pub fn json(&self, arguments: &[&str]) -> Value {
        let output = self.consort(&[arguments, &["--json"]].concat());
        assert!(
            output.status.success(),
            "consort {arguments:?}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice(&output.stdout).expect("--json prints JSON")
    }

    /// Creates and starts a run.
    pub fn start_run(&self, spec: &str) {
        let path = self.path().join("spec.toml");
        fs::write(&path, spec).expect("the specification can be written");
        self.json(&["runs", "create", path.to_str().expect("a path is text"), "--start"]);
    }

    /// Who contributed to a round, with which weight, as `consort rounds show` tells.
    pub fn contributions(&self, run: &str, round: u32) -> Vec<(String, f64)> {
        let round = self.json(&["rounds", "show", run, &round.to_string()]);
        let contributions = round["contributions"].as_array().expect("a round has contributions");
        let contribution = |one: &Value| {
            let site = one["site"].as_str().expect("a contribution has a site").to_owned();
            (site, one["weight"].as_f64().expect("a contribution has a weight"))
        };
        contributions.iter().map(contribution).collect()
    }

    /// Waits until `ready` finds what it looks for in `consort runs show RUN --json`.
    pub fn wait_for_run<T>(&self, run: &str, what: &str, mut ready: impl FnMut(&Value) -> Option<T>) -> T {
        wait_for(what, || ready(&self.json(&["runs", "show", run])))
    }
}

/// Where the programs under test compute.
pub fn device() -> String {
    std::env::var("CONSORT_TEST_DEVICE").unwrap_or("cpu".to_owned())
}

/// A tiny run that trains in seconds.
pub fn tiny_spec(name: &str, rounds: u32, clients: u32) -> String {
    format!(
        r#"
name = "{name}"
seed = 7
rounds = {rounds}

[model]
architecture = "llama"
vocab_size = 257
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 2
num_attention_heads = 4
num_key_value_heads = 2
max_position_embeddings = 64

[training]
local_steps = 8
batch_size = 4
micro_batch_size = 2
sequence_length = 32

[participation]
minimum_clients = {clients}

[wire]
chunk_parameters = 4096

[evaluation]
tokens_max = 2000
"#
    )
}
