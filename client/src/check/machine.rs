//! What can be checked on this machine alone: credentials, data, disk, device.

use std::path::Path;

use consort_common::{
    identity::Role,
    spec::RunSpec,
    text::survey,
    tls::{CredentialFiles, Credentials},
    units,
};

use super::{Finding, failed, passed, warning};
use crate::trainer::{
    Device, DeviceChoice, checkpoint_bytes_needed, describe, memory, memory_bytes_needed, set_threads,
};

/// Vectors of the model's size that the state directory holds at most: while a round's result is made
/// durable, the base model, the local checkpoint (parameters and two moments), the site's state before and
/// after the round (two moments and what the encoding dropped, each), the delta, and what an interrupted write
/// of an earlier one has left; while a checkpoint is replaced, the base model, two checkpoints and the state
/// before, which is fewer; while a model arrives, it and the one before it.
const MODELS_ON_DISK: u64 = 12;
/// Further ones with streaming: the site's own model in both of its states.
const MODELS_ON_DISK_STREAMING: u64 = 2;
/// Free space below which a warning is due when there is no run to compare with.
const DISK_BYTES_LOW: u64 = 5_000_000_000;

pub(super) fn key_file(path: &Path) -> Finding {
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) => return failed(format!("cannot look at {}: {error}; check tls.key", path.display())),
    };
    let mode = mode(&metadata);
    if mode & 0o077 == 0 {
        return passed(format!("{} is readable by its owner only", path.display()));
    }
    failed(format!(
        "other users of this machine can read {} (mode {mode:04o}); run: chmod 600 {}",
        path.display(),
        path.display()
    ))
}

#[cfg(unix)]
fn mode(metadata: &std::fs::Metadata) -> u32 {
    std::os::unix::fs::PermissionsExt::mode(&metadata.permissions()) & 0o777
}

#[cfg(not(unix))]
fn mode(_: &std::fs::Metadata) -> u32 {
    0
}

pub(super) fn certificate(files: &CredentialFiles) -> Result<(Credentials, Finding), Finding> {
    let credentials = Credentials::load(files)
        .and_then(|credentials| credentials.require_role(Role::Site))
        .map_err(|error| failed(error.to_string()))?;
    let validity = credentials.validity();
    let now = std::time::SystemTime::now();
    // The key's mode has a line of its own.
    let warnings: Vec<&str> = credentials
        .warnings()
        .iter()
        .map(String::as_str)
        .filter(|warning| !warning.contains("chmod"))
        .collect();
    let finding = if now > validity.not_after || now < validity.not_before {
        failed(warnings.join("; "))
    } else if warnings.is_empty() {
        let days = validity.not_after.duration_since(now).unwrap_or_default().as_secs() / (24 * 3600);
        passed(format!("{}, valid for {days} more days", credentials.identity()))
    } else {
        warning(warnings.join("; "))
    };
    Ok((credentials, finding))
}

pub(super) fn data(path: &Path) -> Finding {
    match survey(path) {
        Err(error) => failed(error.to_string()),
        Ok(survey) => {
            let files =
                if survey.files == 1 { "1 file".to_owned() } else { format!("{} files", survey.files) };
            let found = format!("{files} with {} of text in {}", units::bytes(survey.bytes), path.display());
            match survey.faults.first() {
                None => passed(found),
                Some(fault) => warning(format!(
                    "{found}; {} more cannot be read, the first: {fault}; check their owner and mode",
                    survey.faults.len()
                )),
            }
        }
    }
}

pub(super) fn disk(state_directory: &Path, active: Option<&RunSpec>) -> Finding {
    let path = state_directory.display();
    if let Err(error) = writable(state_directory) {
        return failed(format!("cannot write in {path}: {error}; check state_directory and its owner"));
    }
    let free = match fs4::available_space(state_directory) {
        Ok(free) => free,
        Err(error) => return failed(format!("cannot tell the free space at {path}: {error}")),
    };
    let found = format!("{} free at {path}", units::bytes(free));
    match active {
        Some(spec) => {
            let further = spec.outer.streaming.as_ref().map_or(0, |_| MODELS_ON_DISK_STREAMING);
            let needed = spec.model.manifest().parameters() * 4 * (MODELS_ON_DISK + further);
            let needs = format!("run {} needs up to {}", spec.name, units::bytes(needed));
            if free < needed {
                failed(format!(
                    "{found}, {needs} and the site's text as tokens: make room or move state_directory"
                ))
            } else {
                passed(format!("{found}, {needs} and the site's text as tokens"))
            }
        }
        None if free < DISK_BYTES_LOW => {
            warning(format!("{found}, which is little for a model and its checkpoints"))
        }
        None => passed(found),
    }
}

fn writable(directory: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(directory)?;
    tempfile::tempfile_in(directory).map(drop)
}

pub(super) fn device(choice: DeviceChoice, threads: u32, active: Option<&RunSpec>) -> Finding {
    let device = match choice.open() {
        Ok(device) => device,
        Err(error) => return failed(error.to_string()),
    };
    set_threads(threads as usize);
    let found = match (choice, device) {
        (DeviceChoice::Auto, Device::Cpu) => {
            format!("{}; no GPU that libtorch can use was found", describe(device))
        }
        _ => describe(device),
    };
    let Some(spec) = active else { return passed(found) };
    let mut needed = memory_bytes_needed(&spec.model, &spec.training, device);
    if matches!(device, Device::Cpu) {
        needed += checkpoint_bytes_needed(&spec.model);
    }
    let needs = format!("run {} needs about {}", spec.name, units::bytes(needed));
    match memory(device) {
        Err(error) => failed(format!("{found}: {error}")),
        Ok(memory) if memory.available_bytes < needed => failed(format!(
            "{found}: {needs} of memory and {} are available: free some, use another device, or ask the run's \
             operator for a smaller micro_batch_size",
            units::bytes(memory.available_bytes)
        )),
        Ok(memory) => {
            passed(format!("{found}; {needs} of its {} of free memory", units::bytes(memory.available_bytes)))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::Outcome, *};

    const SPEC: &str = "name = 'r'\nrounds = 1\n[model]\narchitecture = 'llama'\n";

    #[cfg(unix)]
    #[test]
    fn a_key_that_others_can_read_is_a_failure_with_the_command_that_mends_it() {
        use std::os::unix::fs::PermissionsExt;
        let file = tempfile::NamedTempFile::new().unwrap();
        for (mode, expected) in [(0o600, Outcome::Passed), (0o640, Outcome::Failed), (0o604, Outcome::Failed)]
        {
            std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(mode)).unwrap();
            let (outcome, detail) = key_file(file.path());
            assert_eq!(outcome, expected);
            assert_eq!(detail.contains("chmod 600"), expected == Outcome::Failed);
        }
    }

    #[test]
    fn an_empty_data_folder_is_a_failure() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(data(folder.path()).0, Outcome::Failed);
        std::fs::write(folder.path().join("a.jsonl"), "{}").unwrap();
        let (outcome, detail) = data(folder.path());
        assert_eq!(outcome, Outcome::Passed);
        assert!(detail.starts_with("1 file with 2 B of text"), "{detail}");
    }

    #[test]
    fn disk_and_memory_are_compared_with_what_the_run_needs() {
        let folder = tempfile::tempdir().unwrap();
        let small = RunSpec::parse(SPEC).unwrap();
        assert_eq!(disk(folder.path(), Some(&small)).0, Outcome::Passed);
        assert_eq!(device(DeviceChoice::Cpu, 1, Some(&small)).0, Outcome::Passed);
        let sizes = "hidden_size = 8192\nintermediate_size = 28672\nnum_hidden_layers = 80\n[wire]\nchunk_parameters = 1048576\n";
        let huge = RunSpec::parse(&format!("{SPEC}{sizes}")).unwrap();
        assert_eq!(disk(folder.path(), Some(&huge)).0, Outcome::Failed);
        assert_eq!(device(DeviceChoice::Cpu, 1, Some(&huge)).0, Outcome::Failed);
    }
}
