//! One test's directory, hosts and logs.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering};

use tempfile::TempDir;
use tokio::process::Command;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::process::read_log;
use super::{Process, binaries, limits, timed_out};

/// How many labs there are at one time in this process: guests that starve each other prove nothing.
static STORIES: Semaphore = Semaphore::const_new(limits::STORIES);

/// Everything of one test. Make it first, so that it is dropped last: then it prints the logs if the test fails.
#[derive(Debug)]
pub struct Lab {
    dir: TempDir,
    processes: AtomicUsize,
    _turn: SemaphorePermit<'static>,
}

/// A host: a directory with its key and the keys that it lets in.
#[derive(Clone, Debug)]
pub struct Host {
    dir: PathBuf,
    line: String,
}

impl Lab {
    /// Waits for a turn and checks that tests of this kind can run here.
    pub async fn new() -> Self {
        let turn = STORIES.acquire().await.expect("the semaphore is never closed");
        if let Err(error) = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
            panic!("this test runs real virtual machines and /dev/kvm cannot be opened: {error}");
        }
        // Sockets have short paths: the directory stands in /tmp whatever TMPDIR says.
        let dir = TempDir::with_prefix_in("tern-", "/tmp").expect("a directory in /tmp");
        guest_images::write_pagestorm(&dir.path().join("pagestorm")).expect("the guest is written out");
        Self { dir, processes: AtomicUsize::new(0), _turn: turn }
    }

    /// The lab's directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The kernel that guests boot.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.dir().join("pagestorm")
    }

    /// Makes a host, its key by `vmm identity`, which lets nobody in yet.
    pub async fn host(&self, name: &str) -> Host {
        let dir = self.dir().join(name);
        fs::create_dir(&dir).expect("a directory for a host");
        let identity = dir.join("host.key");
        let line = run("vmm", &["identity".into(), "--identity".into(), identity.into()]).await;
        assert!(line.ok, "vmm identity: {}", line.stderr);
        Host { dir, line: line.stdout.trim().to_owned() }
    }

    /// Makes two hosts that let each other in.
    pub async fn two_hosts(&self) -> (Host, Host) {
        let (a, b) = (self.host("a").await, self.host("b").await);
        a.let_in(&b);
        b.let_in(&a);
        (a, b)
    }

    /// Starts a process that logs here. Names may repeat; logs do not.
    #[must_use]
    pub fn start(&self, name: &str, program: &Path, args: &[OsString]) -> Process {
        let number = self.processes.fetch_add(1, Ordering::Relaxed);
        let log = self.dir().join(format!("{number:02}-{name}.log"));
        Process::start(name, program, args, log)
    }

    /// A path for a socket or a file that nobody else of this lab uses.
    #[must_use]
    pub fn fresh(&self, name: &str) -> PathBuf {
        self.dir().join(format!("{:02}-{name}", self.processes.load(Ordering::Relaxed)))
    }
}

impl Lab {
    /// Prints the end of every process' log.
    pub fn print_logs(&self) {
        let mut logs: Vec<PathBuf> = fs::read_dir(self.dir())
            .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
            .unwrap_or_default();
        logs.retain(|path| path.extension().is_some_and(|extension| extension == "log"));
        logs.sort();
        for log in logs {
            let text = read_log(&log);
            let lines: Vec<&str> = text.lines().collect();
            eprintln!("---- {}", log.file_name().unwrap_or_default().to_string_lossy());
            lines[lines.len().saturating_sub(limits::LOG_LINES)..]
                .iter()
                .for_each(|line| eprintln!("{line}"));
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.print_logs();
        }
    }
}

impl Host {
    /// Its key's line for the authorised keys of others.
    #[must_use]
    pub fn line(&self) -> &str {
        &self.line
    }

    /// Lets `other` in.
    pub fn let_in(&self, other: &Self) {
        let path = self.authorized_keys();
        let known = fs::read_to_string(&path).unwrap_or_default();
        fs::write(&path, format!("{known}{}\n", other.line)).expect("a host's keys can be written");
    }

    /// The file of the keys that it lets in.
    #[must_use]
    pub fn authorized_keys(&self) -> PathBuf {
        self.dir.join("authorized_keys")
    }

    /// The options that every vmm process of this host has.
    #[must_use]
    pub fn options(&self) -> Vec<OsString> {
        vec![
            "--identity".into(),
            self.dir.join("host.key").into(),
            "--authorized-keys".into(),
            self.authorized_keys().into(),
        ]
    }
}

/// What a command said, that was run to its end.
#[derive(Debug)]
pub struct Said {
    /// Whether it succeeded.
    pub ok: bool,
    /// Its exit code; none if a signal ended it.
    pub code: Option<i32>,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

/// Runs a command of `binary` to its end.
pub async fn run(binary: &str, args: &[OsString]) -> Said {
    let mut command = Command::new(binaries::path(binary));
    finish(command.args(args)).await
}

/// Runs any command to its end.
pub async fn finish(command: &mut Command) -> Said {
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(limits::START, command.output()).await;
    let output = output.unwrap_or_else(|_| timed_out(format_args!("{command:?} did not end")));
    let output = output.unwrap_or_else(|error| panic!("{command:?} cannot be started: {error}"));
    Said {
        ok: output.status.success(),
        code: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}
