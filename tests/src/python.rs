//! Python packages that tests compare with: `torch` and `transformers` in an environment of their own.

use std::{
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// What `environment.py` exits with where packages cannot be had.
const CANNOT_BE_HAD: i32 = 77;

/// The Python of an environment with `torch` and `transformers` (600 MB, kept in `.cache/venv`); none where it
/// cannot be had, after saying so.
///
/// # Panics
/// If the environment cannot be made for another reason.
pub fn environment() -> Option<PathBuf> {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let output = Command::new("python3")
        .arg(tests.join("interop/environment.py"))
        .arg(tests.parent().expect("the workspace holds this package").join(".cache/venv"))
        .stderr(Stdio::inherit())
        .output();
    let output = match output {
        Ok(output) => output,
        Err(error) => {
            eprintln!("SKIPPED: python3 cannot be run: {error}");
            return None;
        }
    };
    if output.status.code() == Some(CANNOT_BE_HAD) {
        eprintln!("SKIPPED: no Python environment with torch and transformers (the reason is above)");
        return None;
    }
    assert!(output.status.success(), "the Python environment cannot be made");
    Some(PathBuf::from(String::from_utf8(output.stdout).expect("a path is text").trim()))
}

/// A command that runs `script`, a path inside this package, in the environment of `python`.
pub fn script(python: &Path, script: &str) -> Command {
    let mut command = Command::new(python);
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join(script)).env("HF_HUB_OFFLINE", "1");
    command
}
