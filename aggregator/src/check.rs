//! `consort-aggregator --check`: what would keep this configuration from serving, and the effective
//! settings. Creates the state directory, and removes the probe file that it writes there.

use std::{fs, net::TcpListener, path::Path, time::SystemTime};

use consort_common::{identity::Role, tls::Credentials, units};

use crate::{config::Config, storage::Storage, store::Store};

/// Free space below which a warning is due beside the configured reserve: room for a small model's rounds.
const COMFORTABLE_BYTES: u64 = 5 << 30;

/// Prints a line per check, then the settings. Tells whether all passed.
pub fn run(config: &Config) -> bool {
    let checks = [
        ("certificate", credentials(config)),
        ("state directory", state_directory(&config.state_directory)),
        ("disk space", disk_space(config)),
        ("database", database(config)),
        ("storage", storage(config)),
        ("listen", listen(config)),
    ];
    for (what, result) in &checks {
        match result {
            Ok(text) => println!("ok    {what}: {text}"),
            Err(text) => println!("FAIL  {what}: {text}"),
        }
    }
    println!(
        "\n# effective settings\n{}",
        toml::to_string(config).unwrap_or_else(|error| format!("# {error}"))
    );
    checks.iter().all(|(_, result)| result.is_ok())
}

fn credentials(config: &Config) -> Result<String, String> {
    let credentials = Credentials::load(&config.tls).map_err(|error| error.to_string())?;
    let credentials = credentials.require_role(Role::Aggregator).map_err(|error| error.to_string())?;
    let left = credentials.validity().not_after.duration_since(SystemTime::now()).unwrap_or_default();
    let warnings: String =
        credentials.warnings().iter().map(|warning| format!("\n      warning: {warning}")).collect();
    if left.is_zero() {
        return Err(format!("{} has expired{warnings}", credentials.identity()));
    }
    Ok(format!("{}, valid for {} more days{warnings}", credentials.identity(), left.as_secs() / 86_400))
}

fn state_directory(path: &Path) -> Result<String, String> {
    fs::create_dir_all(path)
        .map_err(|error| format!("cannot create {}: {error}; change state_directory", path.display()))?;
    let probe = path.join(".check");
    fs::write(&probe, b"check").and_then(|()| fs::remove_file(&probe)).map_err(|error| {
        format!("cannot write in {}: {error}; change its owner or permissions", path.display())
    })?;
    Ok(format!("{} is writable", path.display()))
}

fn disk_space(config: &Config) -> Result<String, String> {
    let available = fs4::available_space(&config.state_directory).map_err(|error| {
        format!("cannot measure the space left in {}: {error}", config.state_directory.display())
    })?;
    let reserve = config.limits.disk_reserve_bytes;
    let text = format!("{} free, {} kept in reserve", units::bytes(available), units::bytes(reserve));
    if available <= reserve {
        return Err(format!(
            "{text}: every upload would be refused; free space or lower limits.disk_reserve_bytes"
        ));
    }
    let advice = if available < COMFORTABLE_BYTES { "; little for a large model" } else { "" };
    Ok(text + advice)
}

fn database(config: &Config) -> Result<String, String> {
    let location = config.database.location(&config.state_directory);
    runtime()?.block_on(Store::reach(&location)).map_err(|error| error.to_string())
}

/// For what is reached over the network.
fn runtime() -> Result<tokio::runtime::Runtime, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(|error| format!("cannot start a runtime: {error}"))
}

fn storage(config: &Config) -> Result<String, String> {
    match runtime()?.block_on(Storage::reach(&config.storage)) {
        Ok(None) => Ok("deltas and checkpoints are kept in the state directory".to_owned()),
        Ok(Some(_)) => Ok(format!("{} can be written, read, listed and cleared", config.storage.url)),
        Err(error) => Err(error.to_string()),
    }
}

fn listen(config: &Config) -> Result<String, String> {
    TcpListener::bind(&config.listen).map(|_| format!("{} is free", config.listen)).map_err(|error| {
        format!("cannot listen on {}: {error}; stop what listens there or change listen", config.listen)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_in_use_and_an_unwritable_directory_fail_with_advice() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, b"").unwrap();
        let config = Config {
            listen: taken.local_addr().unwrap().to_string(),
            state_directory: file,
            ..Config::default()
        };
        assert!(listen(&config).unwrap_err().contains("change listen"));
        assert!(state_directory(&config.state_directory).unwrap_err().contains("change state_directory"));
    }
}
