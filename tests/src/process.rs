//! A child process whose output is kept and that dies with the test.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

/// Longest that a test waits for anything; far above what any wait should take, so that a hang fails.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// Pause between two looks at a condition that nothing announces.
const POLL: Duration = Duration::from_millis(20);
const POLL_CLOSE: Duration = Duration::from_micros(500);

/// A running child process. Dropping it kills it.
pub struct Process {
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `command`; both outputs are appended to `log`.
    pub fn start(command: &mut Command, log: &Path) -> Self {
        let output = File::options().create(true).append(true).open(log).expect("the log can be written");
        let errors = output.try_clone().expect("the log can be shared");
        let child = command
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?} cannot be started: {error}"));
        Self { child, log: log.to_owned() }
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(mut self) {
        self.child.kill().expect("a child can be killed");
        self.child.wait().expect("a child can be waited for");
    }

    /// SIGTERM, and waits for the end.
    pub fn terminate(self) -> ExitStatus {
        self.end_by(libc::SIGTERM)
    }

    /// Another signal that ends it, and waits for the end.
    pub fn end_by(mut self, signal: i32) -> ExitStatus {
        let id = i32::try_from(self.child.id()).expect("a process id fits");
        // SAFETY: kill(2) takes no pointers; the child is ours and not yet waited for, so the id is its.
        assert_eq!(unsafe { libc::kill(id, signal) }, 0);
        self.wait()
    }

    /// Waits for the process to end by itself.
    pub fn wait(&mut self) -> ExitStatus {
        wait_for("the process to end", || self.child.try_wait().expect("a child can be waited for"))
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().expect("a child can be waited for").is_none()
    }

    /// Process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// The most memory that it had resident so far, in bytes.
    pub fn peak_memory_bytes(&self) -> u64 {
        self.memory("VmHWM:")
    }

    /// The memory that it has resident, in bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.memory("VmRSS:")
    }

    /// From now on, the peak is of what comes (proc(5), `clear_refs`).
    pub fn forget_peak_memory(&self) {
        fs::write(format!("/proc/{}/clear_refs", self.id()), "5").expect("a child's peak can be set back");
    }

    fn memory(&self, name: &str) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id())).expect("Linux has /proc");
        let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a process has memory");
        let kibibytes: u64 = line.trim().trim_end_matches(" kB").parse().expect("its size is a number");
        kibibytes * 1024
    }

    /// Everything that it has printed.
    pub fn output(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Waits until it has printed `text`.
    pub fn wait_for_output(&mut self, text: &str) {
        wait_for(&format!("{text:?} in {}", self.log.display()), || {
            if self.output().contains(text) {
                return Some(());
            }
            assert!(self.is_running(), "the process ended without printing {text:?}:\n{}", self.output());
            None
        });
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // It may have ended, or been killed, already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("---- {}\n{}", self.log.display(), self.output());
        }
    }
}

/// Looks until `look` finds something.
pub fn wait_for<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    wait(what, POLL, look)
}

/// The same for what does not last, with a `look` that costs little.
pub fn wait_closely_for<T>(what: &str, look: impl FnMut() -> Option<T>) -> T {
    wait(what, POLL_CLOSE, look)
}

fn wait<T>(what: &str, pause: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let begin = Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(begin.elapsed() < PATIENCE, "waited {} s for {what}", PATIENCE.as_secs());
        std::thread::sleep(pause);
    }
}
