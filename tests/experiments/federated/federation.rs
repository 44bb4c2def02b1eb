//! The processes of a trial, and what lies between them.

use std::{thread, time::Duration};

use anyhow::{Context, Result, bail};
use consort_tests::{TestFederation, gateway::Gateway};
use serde_json::Value;

use super::{
    network::Network,
    trial::{Links, Trial},
};

/// How often `consort` is asked before its failure counts, and the pause between.
const ANSWERS_MAX: u32 = 5;
const ANSWER_PAUSE: Duration = Duration::from_secs(2);

/// What `consort` answers. A machine that is busy with training may not answer at once.
pub(super) fn asked(federation: &TestFederation, arguments: &[&str]) -> Result<Value> {
    let ask = || -> Result<Value> {
        let output = federation.consort(&[arguments, &["--json"]].concat());
        let why = || String::from_utf8_lossy(&output.stderr).into_owned();
        serde_json::from_slice(&output.stdout).with_context(why)
    };
    let mut answer = ask();
    for _ in 1..ANSWERS_MAX {
        if answer.is_ok() {
            break;
        }
        thread::sleep(ANSWER_PAUSE);
        answer = ask();
    }
    answer.with_context(|| format!("consort {}", arguments.join(" ")))
}

/// The processes of a trial, and what lies between them.
pub(super) struct Federation {
    // Processes end before their ways to each other do.
    pub processes: TestFederation,
    running: Vec<usize>,
    gateways: Vec<Gateway>,
    network: Option<Network>,
}

impl Federation {
    pub(super) fn new(trial: &Trial, names: &[&str]) -> Result<Self> {
        let network = match trial.links {
            Links::Loopback => None,
            Links::Namespaces(megabits) => Some(Network::new(names.len(), megabits)?),
        };
        let addresses = Network::addresses(names.len());
        let hosts: Vec<&str> = match network {
            None => Vec::new(),
            Some(_) => addresses.iter().map(String::as_str).collect(),
        };
        let mut processes = TestFederation::reachable_at(names, &hosts);
        if network.is_some() {
            processes.set_aggregator_environment("CONSORT_AGGREGATOR_LISTEN", "0.0.0.0:0");
        }
        Ok(Self { processes, running: Vec::new(), gateways: Vec::new(), network })
    }

    pub(super) fn start(&mut self, trial: &Trial, site: usize) {
        let name = format!("site-{site}");
        let mut endpoint = self.processes.endpoint().to_owned();
        let alterations = trial.alterations.iter().filter(|(altered, _)| *altered == site);
        for (_, alteration) in alterations {
            let gateway = Gateway::start(&self.processes, &name, alteration.function(site as u64));
            gateway.endpoint().clone_into(&mut endpoint);
            self.gateways.push(gateway);
        }
        if self.network.is_some() {
            let port = endpoint.rsplit(':').next().unwrap_or_default();
            endpoint = format!("{}:{port}", Network::addresses(site)[site - 1]);
        }
        let mut command = self.processes.client_command(&name, &endpoint);
        if self.network.is_some() {
            command = Network::within(site, &command);
        }
        self.processes.start_client_by(&name, &mut command);
        self.running.push(site);
    }

    pub(super) fn kill(&mut self, site: usize) {
        self.processes.kill_client(&format!("site-{site}"));
        self.running.retain(|one| *one != site);
    }

    /// Finds a daemon that ended by itself.
    pub(super) fn check(&mut self) -> Result<()> {
        for site in &self.running {
            let client = self.processes.client(&format!("site-{site}"));
            if !client.is_running() {
                bail!("site {site} ended:\n{}", client.output());
            }
        }
        Ok(())
    }
}
