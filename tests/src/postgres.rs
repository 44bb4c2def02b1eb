//! A real PostgreSQL server: the machine's own, or the one in the package `pgserver` (11 MB, taken once into
//! `.cache/postgres`). It listens on a socket in its own folder, so that it needs no port, and can be killed and
//! brought back.

use std::{
    env,
    fs::{self, File, Permissions},
    os::unix::{
        fs::{PermissionsExt, chown},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

use crate::process::{Process, wait_for};

/// The user that owns the server's databases.
pub const USER: &str = "consort";
/// The user's password.
pub const PASSWORD: &str = "secret";
/// Name of the server's socket in its folder.
pub const SOCKET: &str = ".s.PGSQL.5432";

/// Linux's user "nobody": the server refuses to run as root.
const NOBODY: u32 = 65534;
/// Programs of the package, whatever Python this machine has.
const PACKAGE: [&str; 10] = [
    "pgserver==0.1.4",
    "--no-deps",
    "--only-binary=:all:",
    "--python-version=3.12",
    "--implementation=cp",
    "--abi=cp312",
    "--platform=manylinux2014_x86_64",
    "--quiet",
    "--disable-pip-version-check",
    "--root-user-action=ignore",
];

/// The server. Dropping it kills it.
pub struct Postgres {
    process: Option<Process>,
    programs: PathBuf,
    /// Holds the server's files and its socket; who runs the server can reach it.
    directory: TempDir,
    starts: u32,
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // Not SIGKILL: it leaves shared memory behind.
        if let Some(process) = self.process.take() {
            process.end_by(libc::SIGQUIT);
        }
    }
}

impl Postgres {
    /// Starts a server; none, after saying why, where there is no PostgreSQL to be had.
    pub fn start() -> Option<Self> {
        let usable = |folder: PathBuf| match program(&folder, "initdb").arg("--version").output() {
            Ok(_) => Ok(folder),
            Err(error) => Err(format!("{} cannot be run: {error}", folder.display())),
        };
        let programs = match programs().and_then(usable) {
            Ok(programs) => programs,
            Err(reason) => {
                println!(
                    "skipped: there is no PostgreSQL on this machine, and its package cannot be had: {reason}"
                );
                return None;
            }
        };
        let directory = tempfile::tempdir().expect("a temporary directory can be made");
        if is_root() {
            chown(directory.path(), Some(NOBODY), Some(NOBODY)).expect("root gives folders away");
        }
        let mut postgres = Self { process: None, programs, directory, starts: 0 };
        let password = postgres.directory.path().join("password");
        fs::write(&password, PASSWORD).expect("the folder can be written");
        fs::set_permissions(&password, Permissions::from_mode(0o644)).expect("the file is ours");
        let initdb = |locale: &[&str]| {
            let mut command = postgres.program("initdb");
            command.arg("--pgdata").arg(postgres.data()).arg("--pwfile").arg(&password).args(locale);
            command.args(["--username", USER, "--auth", "scram-sha-256", "--encoding", "UTF8"]);
            command.output().expect("initdb can be run")
        };
        // A locale that sorts names unlike bytes, where the server was built with one.
        let mut made = initdb(&["--locale", "C.UTF-8", "--locale-provider", "icu", "--icu-locale", "en"]);
        if !made.status.success() {
            println!("the server sorts by bytes: {}", String::from_utf8_lossy(&made.stderr));
            made = initdb(&["--locale", "C.UTF-8"]);
        }
        assert!(made.status.success(), "initdb: {}", String::from_utf8_lossy(&made.stderr));
        postgres.bring_back();
        Some(postgres)
    }

    /// `postgres://...`, for whoever knows the password; the server's socket is in `folder`.
    pub fn url_at(folder: &Path) -> String {
        format!("postgres://{USER}@localhost/postgres?host={}", folder.display())
    }

    /// The same at the server itself.
    pub fn url(&self) -> String {
        Self::url_at(self.folder())
    }

    /// Where its socket is.
    pub fn folder(&self) -> &Path {
        self.directory.path()
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        self.process.take().expect("the server runs").kill();
    }

    /// Starts the server again, and waits until it takes connections.
    pub fn bring_back(&mut self) {
        // What a server that was killed leaves running may keep a new one from starting for an instant.
        let process = wait_for("the server to start", || {
            self.starts += 1;
            let mut process = Process::start(
                self.program("postgres")
                    .arg("-D")
                    .arg(self.data())
                    .arg("-k")
                    .arg(self.folder())
                    .args(["-c", "listen_addresses="]),
                &self.folder().join(format!("log-{}", self.starts)),
            );
            wait_for("the server to be ready or to give up", || {
                let ready = process.output().contains("ready to accept connections");
                (ready || !process.is_running()).then_some(())
            });
            process.is_running().then_some(process)
        });
        self.process = Some(process);
    }

    fn data(&self) -> PathBuf {
        self.folder().join("data")
    }

    /// One of its programs, as a user that it accepts.
    fn program(&self, name: &str) -> Command {
        let mut command = program(&self.programs, name);
        command.current_dir(self.folder());
        command
    }
}

/// A program of `folder`, as a user that it accepts.
fn program(folder: &Path, name: &str) -> Command {
    let mut command = Command::new(folder.join(name));
    if is_root() {
        command.uid(NOBODY).gid(NOBODY);
    }
    command
}

fn is_root() -> bool {
    // SAFETY: geteuid(2) takes nothing and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// The folder with the server's programs.
fn programs() -> Result<PathBuf, String> {
    let has_both = |folder: &PathBuf| ["initdb", "postgres"].iter().all(|name| folder.join(name).is_file());
    let path = env::var_os("PATH").unwrap_or_default();
    // Where Debian has it, newest first.
    let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
    let mut debian: Vec<_> = versions.map(|version| version.path().join("bin")).collect();
    debian.sort();
    if let Some(folder) = env::split_paths(&path).chain(debian.into_iter().rev()).find(has_both) {
        return Ok(folder);
    }
    let cache = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.cache/postgres");
    let folder = cache.join("pgserver/pginstall/bin");
    fs::create_dir_all(&cache).map_err(|error| error.to_string())?;
    // Tests run beside each other, and the first of them takes it.
    let lock = File::create(cache.join("lock")).map_err(|error| error.to_string())?;
    lock.lock().map_err(|error| error.to_string())?;
    if !cache.join("complete").exists() {
        let taken = Command::new("python3")
            .args(["-m", "pip", "install", "--upgrade", "--target"])
            .arg(&cache)
            .args(PACKAGE)
            .output()
            .map_err(|error| error.to_string())?;
        if !taken.status.success() {
            return Err(String::from_utf8_lossy(&taken.stderr).into_owned());
        }
        fs::write(cache.join("complete"), "").map_err(|error| error.to_string())?;
    }
    Ok(folder)
}
