//! One process of the lab.

use std::ffi::OsString;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::{Instant, sleep, timeout};

use super::limits;

/// A running process. Dropping it kills it.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts `program` with `args`; its standard error goes to `log`.
    #[must_use]
    pub fn start(name: &str, program: &Path, args: &[OsString], log: PathBuf) -> Self {
        let stderr = std::fs::File::create(&log).expect("the lab's directory takes a log");
        let child = Command::new(program)
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .kill_on_drop(true)
            .spawn()
            .unwrap_or_else(|error| panic!("{} cannot be started: {error}", program.display()));
        Self { name: name.to_owned(), child, log }
    }

    /// Its standard input and output; once.
    pub fn take_pipes(&mut self) -> (ChildStdin, ChildStdout) {
        let input = self.child.stdin.take().expect("the pipes are taken once");
        (input, self.child.stdout.take().expect("the pipes are taken once"))
    }

    /// What it has logged so far.
    #[must_use]
    pub fn log(&self) -> String {
        read_log(&self.log)
    }

    /// Panics if it has ended.
    pub fn assert_alive(&mut self) {
        if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
            panic!("{} has ended: {status}", self.name);
        }
    }

    /// Whether it still runs.
    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().expect("a child can be waited for").is_none()
    }

    /// Kills it (SIGKILL), unless it has ended by itself, and waits until it is gone.
    pub async fn kill(&mut self) {
        if self.is_alive() {
            self.child.kill().await.expect("a child can be killed");
        }
    }

    /// Stops it without a word (SIGSTOP): its connections stay open and nobody answers on them.
    pub fn freeze(&mut self) {
        self.assert_alive();
        let pid = self.child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        kill_process(pid.expect("a child that lives has an id"), Signal::STOP)
            .expect("a child can be stopped");
    }

    /// Waits for its end.
    pub async fn end(&mut self) -> ExitStatus {
        match timeout(limits::END, self.child.wait()).await {
            Ok(status) => status.expect("a child can be waited for"),
            Err(_) => timed_out(format_args!("{} did not end within {:?}", self.name, limits::END)),
        }
    }
}

/// What the message of every panic begins with that is about time: whoever runs where machines stand still at times can tell it from others.
pub const TIMED_OUT: &str = "timed out: ";

/// Panics because what was waited for did not come in time.
#[track_caller]
pub fn timed_out(what: impl Display) -> ! {
    panic!("{TIMED_OUT}{what}")
}

/// Asks `question` again and again until it has an answer.
pub async fn until<T>(what: &str, limit: Duration, mut question: impl AsyncFnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = question().await {
            return answer;
        }
        if Instant::now() >= deadline {
            timed_out(format_args!("within {limit:?} it did not come true that {what}"));
        }
        sleep(limits::LOOK_AGAIN).await;
    }
}

/// A log as text, whatever is in it.
pub(super) fn read_log(path: &Path) -> String {
    match std::fs::read(path) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) => format!("({} cannot be read: {error})", path.display()),
    }
}
