//! The demo's processes: this same binary, started again as `tern vmm …` and `tern dht …`.
//!
//! None outlives the demo: each asks the kernel to be killed with its parent (`--die-with-parent`), and dropping a [`Process`]
//! kills it. Each is in a process group of its own, so that Ctrl-C reaches the demo alone, which then ends them in order.

use std::ffi::OsString;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::Instant;

use crate::demo::error::DemoError;
use crate::limits;

/// Where processes are started from.
#[derive(Debug)]
pub(crate) struct Stage {
    binary: PathBuf,
    logs: PathBuf,
}

impl Stage {
    /// Processes of this binary that log into the directory `logs`.
    ///
    /// # Errors
    /// If the binary cannot be found.
    pub(crate) fn new(logs: &Path) -> Result<Self, DemoError> {
        let binary = std::env::current_exe().map_err(DemoError::file("find", "this program"))?;
        Ok(Self { binary, logs: logs.to_owned() })
    }

    /// Starts a process with `tern`'s arguments `args`; `name` names its log.
    ///
    /// # Errors
    /// If it cannot be started.
    pub(crate) fn spawn(&self, name: &str, args: &Args) -> Result<Process, DemoError> {
        let log = self.logs.join(name).with_extension("log");
        let stderr = std::fs::File::create(&log).map_err(DemoError::file("create", &log))?;
        let child = Command::new(&self.binary)
            .args(["--die-with-parent", &std::process::id().to_string()])
            .args(&args.words)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(stderr)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|source| DemoError::Process { what: "start", process: name.to_owned(), source })?;
        Ok(Process { name: name.to_owned(), child, log })
    }
}

/// The arguments of a process.
#[derive(Debug, Default)]
pub(crate) struct Args {
    words: Vec<OsString>,
}

impl Args {
    /// `words`, as they are.
    pub(crate) fn new(words: &[&str]) -> Self {
        Self { words: words.iter().map(Into::into).collect() }
    }

    /// Adds an option and its value.
    #[must_use]
    pub(crate) fn with(mut self, option: &str, value: impl Into<OsString>) -> Self {
        self.words.extend([option.into(), value.into()]);
        self
    }
}

/// A running process of the demo. Dropping it kills it.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Its standard input and the lines of its standard output; once.
    ///
    /// # Errors
    /// If they have been taken before.
    pub(crate) fn take_pipes(&mut self) -> Result<(ChildStdin, Lines<BufReader<ChildStdout>>), DemoError> {
        use tokio::io::AsyncBufReadExt;
        match (self.child.stdin.take(), self.child.stdout.take()) {
            (Some(input), Some(output)) => Ok((input, BufReader::new(output).lines())),
            _ => Err(DemoError::Answer(format!("the pipes of `{}` are taken already", self.name))),
        }
    }

    /// Checks that it still runs.
    ///
    /// # Errors
    /// If it has ended.
    pub(crate) fn check(&mut self) -> Result<(), DemoError> {
        match self.child.try_wait().map_err(|source| self.error("watch", source))? {
            None => Ok(()),
            Some(status) => {
                Err(DemoError::Ended { process: self.name.clone(), status, log: log_tail(&self.log) })
            }
        }
    }

    /// Waits for its end; says whether it ended well. A process that does not end in time is killed.
    ///
    /// # Errors
    /// If it cannot be waited for.
    pub(crate) async fn finish(&mut self) -> Result<bool, DemoError> {
        match tokio::time::timeout(limits::SHUTDOWN, self.child.wait()).await {
            Ok(Ok(status)) => {
                if !status.success() {
                    tracing::warn!(process = self.name, %status, "a process of the demo did not end well");
                }
                Ok(status.success())
            }
            Ok(Err(source)) => Err(self.error("wait for", source)),
            Err(_) => {
                tracing::warn!(
                    process = self.name,
                    "a process of the demo did not end when told to: killing it"
                );
                self.child.kill().await.map_err(|source| self.error("kill", source))?;
                Ok(false)
            }
        }
    }

    /// Tells it to end (SIGTERM).
    ///
    /// # Errors
    /// If it cannot be told.
    pub(crate) fn terminate(&mut self) -> Result<(), DemoError> {
        let Some(id) = self.child.id().and_then(|id| i32::try_from(id).ok()) else { return Ok(()) };
        let Some(id) = rustix::process::Pid::from_raw(id) else { return Ok(()) };
        rustix::process::kill_process(id, rustix::process::Signal::TERM)
            .map_err(|source| self.error("end", source.into()))
    }

    fn error(&self, what: &'static str, source: std::io::Error) -> DemoError {
        DemoError::Process { what, process: self.name.clone(), source }
    }
}

/// Asks `question` again and again until it has an answer.
///
/// # Errors
/// If `question` fails, if `process` ends, or if there is no answer within `limit`.
pub(crate) async fn until<T>(
    what: &'static str,
    limit: Duration,
    processes: &mut [&mut Process],
    mut question: impl AsyncFnMut() -> Result<Option<T>, DemoError>,
) -> Result<T, DemoError> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = question().await? {
            return Ok(answer);
        }
        processes.iter_mut().try_for_each(|process| process.check())?;
        if Instant::now() >= deadline {
            return Err(DemoError::Timeout { what, seconds: limit.as_secs() });
        }
        tokio::time::sleep(limits::ASK_AGAIN).await;
    }
}

/// The end of a log, for an error message.
fn log_tail(log: &Path) -> String {
    let read = || {
        let mut file = std::fs::File::open(log)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(limits::LOG_TAIL_BYTES)))?;
        let mut tail = Vec::new();
        file.take(limits::LOG_TAIL_BYTES).read_to_end(&mut tail)?;
        Ok::<_, std::io::Error>(String::from_utf8_lossy(&tail).into_owned())
    };
    read().unwrap_or_else(|error| format!("(the log cannot be read: {error})"))
}
