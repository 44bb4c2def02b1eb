//! Where the binaries under test are.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

/// The directory of the freshly built binaries. A test of one package does not make cargo build the
/// binaries of another, so this does, once per process; when nothing changed it takes a moment.
fn directory() -> &'static Path {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
        let status = Command::new(env!("CARGO"))
            .args(["build", "--quiet", "--workspace", "--bins", "--manifest-path"])
            .arg(manifest)
            .status()
            .expect("cargo can be run");
        assert!(status.success(), "the binaries under test do not build");
        let test = std::env::current_exe().expect("a test knows its own path");
        test.ancestors().nth(2).expect("tests lie in target/<profile>/deps").to_owned()
    })
}

/// Path of `consort-aggregator`.
pub fn aggregator() -> PathBuf {
    directory().join("consort-aggregator")
}

/// Path of `consort-client`.
pub fn client() -> PathBuf {
    directory().join("consort-client")
}

/// Path of the CLI, `consort`.
pub fn consort() -> PathBuf {
    directory().join("consort")
}
