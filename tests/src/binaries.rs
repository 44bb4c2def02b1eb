//! Where the binaries under test are.

use std::{
    fs::File,
    io::{Read, Seek, Write},
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

/// The directory of the freshly built binaries. A test of one package does not make cargo build the
/// binaries of another, so this does.
fn directory() -> &'static Path {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| {
        let test = std::env::current_exe().expect("a test knows its own path");
        let directory = test.ancestors().nth(2).expect("tests lie in target/<profile>/deps");
        build_once(&directory.join("consort-tests.built"), directory.ends_with("release"));
        directory.to_owned()
    })
}

/// Builds, unless another test of the same run did: nextest gives each test a process of its own, and
/// cargo takes a second to see that nothing changed. `marker` holds the name of the run that built last.
fn build_once(marker: &Path, release: bool) {
    let mut file = File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(marker)
        .expect("the target directory can be written");
    file.lock().expect("a file can be locked");
    let run = std::env::var("NEXTEST_RUN_ID").unwrap_or_default();
    let mut built = String::new();
    file.read_to_string(&mut built).expect("the marker can be read");
    if !run.is_empty() && run == built {
        return;
    }
    build(release);
    file.set_len(0).expect("the marker can be emptied");
    file.rewind().expect("the marker can be rewound");
    file.write_all(run.as_bytes()).expect("the marker can be written");
}

/// Benchmarks, which cargo builds for release, need the aggregator and the CLI only, and no libtorch.
fn build(release: bool) {
    cargo_build(if release { &["--release", "--package=consort-aggregator"] } else { &["--workspace"] });
}

fn cargo_build(which: &[&str]) {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("../Cargo.toml");
    let status = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--bins"])
        .args(which)
        .arg("--manifest-path")
        .arg(manifest)
        .status()
        .expect("cargo can be run");
    assert!(status.success(), "the binaries under test do not build");
}

/// Path of `consort-aggregator`.
pub fn aggregator() -> PathBuf {
    directory().join("consort-aggregator")
}

/// Path of `consort-client`. Of the benchmarks, only those that ask for it build it, with libtorch's bindings.
pub fn client() -> PathBuf {
    static BUILT: OnceLock<()> = OnceLock::new();
    let directory = directory();
    if directory.ends_with("release") {
        BUILT.get_or_init(|| cargo_build(&["--release", "--package=consort-client"]));
    }
    directory.join("consort-client")
}

/// Path of the CLI, `consort`.
pub fn consort() -> PathBuf {
    directory().join("consort")
}
