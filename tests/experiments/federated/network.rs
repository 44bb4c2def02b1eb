//! Links of a chosen speed: each site in a network namespace of its own, at the end of a pair of virtual interfaces
//! whose two directions a token bucket limits (tc-tbf(8)). Needs root, and `ip` and `tc` of iproute2.

use std::process::Command;

use anyhow::{Context, Result, bail};

/// Namespaces and interfaces; they are gone when it is dropped. What a killed experiment left, the next removes.
#[derive(Debug)]
pub(super) struct Network {
    sites: usize,
}

impl Network {
    /// So many sites, each at the end of a link of so many Mbit/s in either direction; without, unlimited.
    pub(super) fn new(sites: usize, megabits: Option<u32>) -> Result<Self> {
        let network = Self { sites };
        for site in 1..=sites {
            let (namespace, outer, inner) = names(site);
            // An experiment that was killed has left them.
            remove(site);
            ip(&["netns", "add", &namespace])?;
            ip(&["link", "add", &outer, "type", "veth", "peer", "name", &inner])?;
            ip(&["link", "set", &inner, "netns", &namespace])?;
            ip(&["address", "add", &format!("{}/30", address(site)), "dev", &outer])?;
            ip(&["link", "set", &outer, "up"])?;
            let inner_address = format!("10.77.{site}.2/30");
            ip(&["-n", &namespace, "address", "add", &inner_address, "dev", &inner])?;
            ip(&["-n", &namespace, "link", "set", &inner, "up"])?;
            ip(&["-n", &namespace, "link", "set", "lo", "up"])?;
            if let Some(megabits) = megabits {
                let rate = format!("{megabits}mbit");
                // A bucket of 5 ms, and of two packets at least: what it holds is free after a pause.
                let burst = format!("{}", (u64::from(megabits) * 625).max(3200));
                let shape = ["root", "tbf", "rate", &rate, "burst", &burst, "latency", "200ms"];
                command("tc", &[&["qdisc", "add", "dev", &outer], &shape[..]].concat())?;
                command("tc", &[&["-n", &namespace, "qdisc", "add", "dev", &inner], &shape[..]].concat())?;
            }
        }
        Ok(network)
    }

    /// The aggregator's address as a site sees it.
    pub(super) fn addresses(sites: usize) -> Vec<String> {
        (1..=sites).map(address).collect()
    }

    /// The same command within a site's namespace.
    pub(super) fn within(site: usize, command: &Command) -> Command {
        let mut within = Command::new("ip");
        within.args(["netns", "exec", &names(site).0]).arg(command.get_program()).args(command.get_args());
        within.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
        within
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        (1..=self.sites).for_each(remove);
    }
}

fn remove(site: usize) {
    let (namespace, outer, _) = names(site);
    // Whichever was not made is not there.
    let _ = ip(&["link", "delete", &outer]);
    let _ = ip(&["netns", "delete", &namespace]);
}

/// The namespace, and the interfaces outside and inside of it.
fn names(site: usize) -> (String, String, String) {
    (format!("consort-{site}"), format!("consort-{site}o"), format!("consort-{site}i"))
}

fn address(site: usize) -> String {
    format!("10.77.{site}.1")
}

fn ip(arguments: &[&str]) -> Result<()> {
    command("ip", arguments)
}

fn command(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .with_context(|| format!("cannot run {program}: install iproute2"))?;
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        bail!("{program} {} failed: {} (shaped links need root)", arguments.join(" "), why.trim());
    }
    Ok(())
}
