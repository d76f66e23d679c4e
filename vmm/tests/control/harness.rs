//! Real `vmm` processes, each with a directory of its own, and nothing left behind.

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmm::control::client::Client;

/// Longer than anything here takes on a loaded machine.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);

/// A directory of one test: hosts' keys, sockets, logs.
pub(crate) struct Place(tempfile::TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// `vmm` with arguments, its identity in this place.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_vmm"));
        command.args(arguments).env("XDG_CONFIG_HOME", self.path("config")).env_remove("TERN_LOG");
        command.current_dir(self.0.path()).stdin(Stdio::null());
        command
    }

    /// Runs a command of the client to its end.
    pub(crate) fn client(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// A running VM whose control socket answers, with pagestorm inside.
    pub(crate) fn run(&self, control: &str, cmdline: &str, more: &[&str]) -> Vm {
        let kernel = self.path("pagestorm");
        guest_images::write_pagestorm(&kernel).unwrap();
        let mut arguments = vec!["run", "--kernel", "pagestorm", "--memory", "64M", "--serial", "off"];
        arguments.extend(["--control", control, "--cmdline", cmdline, "--log-format", "json"]);
        arguments.extend(more);
        let vm = Vm::spawn(self.command(&arguments), self.path(control));
        vm.wait_for_log("\"state\":\"running\"");
        vm
    }

    /// A process that waits for a VM, and its ticket.
    pub(crate) fn receive(&self, control: &str) -> (Vm, String) {
        let arguments = ["receive", "--control", control, "--listen", "127.0.0.1:0", "--log-format", "json"];
        let mut vm = Vm::spawn(self.command(&arguments), self.path(control));
        let ticket = vm.first_line();
        (vm, ticket)
    }
}

/// A `vmm run` or `vmm receive`. Dropping it kills the process, if it still runs, and shows its log in a failed test.
pub(crate) struct Vm {
    child: Child,
    control: PathBuf,
    lines: Receiver<String>,
    log: Arc<Mutex<Vec<String>>>,
}

impl Vm {
    pub(crate) fn spawn(mut command: Command, control: PathBuf) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let stderr = child.stderr.take().unwrap();
        let log = Arc::new(Mutex::new(Vec::new()));
        // Nobody may have to read the lines for the process to go on: what does not fit is in `log` all the same.
        let (sender, lines) = sync_channel(1024);
        let kept = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                kept.lock().unwrap().push(line.clone());
                let _full = sender.try_send(line);
            }
        });
        Self { child, control, lines, log }
    }

    pub(crate) fn client(&self) -> Client {
        Client::new(&self.control).unwrap()
    }

    pub(crate) fn control(&self) -> &Path {
        &self.control
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().join("\n")
    }

    /// Waits for a line that contains `part` and has not been waited for yet.
    pub(crate) fn wait_for_log(&self, part: &str) -> String {
        let deadline = Instant::now() + DEADLINE;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) if line.contains(part) => return line,
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => panic!("no {part:?} within {DEADLINE:?}:\n{}", self.log()),
                Err(RecvTimeoutError::Disconnected) => {
                    panic!("ended before it said {part:?}:\n{}", self.log())
                }
            }
        }
    }

    fn first_line(&mut self) -> String {
        let stdout: ChildStdout = self.child.stdout.take().unwrap();
        let mut line = String::new();
        BufReader::new(stdout.take(1024)).read_line(&mut line).unwrap();
        assert!(line.ends_with('\n'), "no ticket: {line:?}\n{}", self.log());
        line.trim().to_owned()
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.pid().try_into().unwrap()).unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Waits for the process's end: standard error's end is the end of its log.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let deadline = Instant::now() + DEADLINE;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => return self.child.wait().unwrap(),
                Err(RecvTimeoutError::Timeout) => panic!("still there after {DEADLINE:?}:\n{}", self.log()),
            }
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if self.child.try_wait().unwrap().is_none() {
            self.child.kill().unwrap();
            self.child.wait().unwrap();
        }
        if std::thread::panicking() {
            eprintln!("log of process {}:\n{}", self.child.id(), self.log());
        }
    }
}
