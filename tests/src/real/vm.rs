//! A vmm process, its control socket, and the guest behind its serial port.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use guest_images::pagestorm::options::Options;
use guest_images::pagestorm::report::Report as SelfCheck;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::ChildStdin;
use tokio::sync::mpsc;
use tokio::time::timeout;
use vmm::control::api::{VmState, VmStatus};
use vmm::control::client::{Client, ClientError};

use super::lab::{Said, run};
use super::{Host, Lab, Process, binaries, limits, timed_out, until};

/// A guest to launch: pagestorm in so much memory, with such a command line.
#[derive(Clone, Debug)]
pub struct Guest {
    /// RAM, bytes.
    pub memory_bytes: u64,
    /// What it does.
    pub options: Options,
    /// Files in its memory.
    pub loads: Vec<Load>,
    /// The site's peer of its host.
    pub site: Option<PathBuf>,
}

/// A file in a guest's memory.
#[derive(Clone, Debug)]
pub struct Load {
    /// The file.
    pub file: PathBuf,
    /// The guest-physical address of its first byte.
    pub addr: u64,
}

impl Default for Guest {
    /// 32 MiB, of which 8 MiB are written at 2000 pages a second.
    fn default() -> Self {
        let options = Options { rate_pps: 2000, ws_bytes: 8 << 20, base: 4 << 20, ..Options::default() };
        Self { memory_bytes: 32 << 20, options, loads: Vec::new(), site: None }
    }
}

/// A vmm process. Dropping it kills it.
#[derive(Debug)]
pub struct Vm {
    name: String,
    process: Process,
    control: PathBuf,
    client: Client,
    input: ChildStdin,
    lines: mpsc::Receiver<String>,
}

impl Vm {
    /// `vmm run`: launches `guest` on `host` and waits until its heart beats and it says that it is ready.
    pub async fn launch(lab: &Lab, host: &Host, name: &str, guest: &Guest) -> Self {
        let mut args: Vec<OsString> = ["run", "--name", name, "--kernel"].map(Into::into).into();
        args.push(lab.kernel().into());
        args.extend(["--cmdline".into(), guest.options.to_string().into()]);
        args.extend(["--memory".into(), guest.memory_bytes.to_string().into()]);
        for Load { file, addr } in &guest.loads {
            // The lab's paths have no commas.
            args.extend(["--load".into(), format!("file={},addr={addr:#x}", file.display()).into()]);
        }
        let mut vm = Self::start(lab, host, name, guest.site.as_deref(), args);
        vm.line_that("says that the guest is ready", |line| line.starts_with("pagestorm: ready")).await;
        vm.beats().await;
        vm
    }

    /// `vmm restore`: makes a VM of a snapshot in `from`, with `more` options; waits until it answers.
    pub async fn restore(lab: &Lab, host: &Host, name: &str, from: &Path, more: &[&str]) -> Self {
        Self::restore_of(lab, host, name, from, more, None).await
    }

    /// The same with a site's peer.
    pub async fn restore_at(
        lab: &Lab,
        host: &Host,
        name: &str,
        from: &Path,
        more: &[&str],
        site: &Path,
    ) -> Self {
        Self::restore_of(lab, host, name, from, more, Some(site)).await
    }

    async fn restore_of(
        lab: &Lab,
        host: &Host,
        name: &str,
        from: &Path,
        more: &[&str],
        site: Option<&Path>,
    ) -> Self {
        let mut args: Vec<OsString> = vec!["restore".into(), "--from".into(), from.into()];
        args.extend(more.iter().map(Into::into));
        let mut vm = Self::start(lab, host, name, site, args);
        vm.wait_for("it is restored", limits::START, |status| {
            matches!(status.state, VmState::Running | VmState::Paused)
        })
        .await;
        vm
    }

    /// `vmm restore` of the newest snapshot in `from`, which is expected to end by itself.
    pub async fn refused_restore(lab: &Lab, from: &Path) -> Said {
        let mut args: Vec<OsString> = vec!["restore".into(), "--from".into(), from.into()];
        args.extend(["--control".into(), lab.fresh("refused.sock").into(), "--serial".into(), "off".into()]);
        args.extend(["--identity".into(), lab.dir().join("refused.key").into()]);
        run("vmm", &args).await
    }

    /// `vmm snapshot --json`, as an operator types it.
    pub async fn snapshot(&self, to: &Path, name: Option<&str>) -> Said {
        let mut args: Vec<OsString> = vec!["snapshot".into(), "--json".into(), "--to".into(), to.into()];
        args.extend(["--control".into(), self.control.clone().into()]);
        if let Some(name) = name {
            args.extend(["--name".into(), name.into()]);
        }
        run("vmm", &args).await
    }

    /// `vmm receive`: waits for a VM on `host`.
    pub async fn receive(lab: &Lab, host: &Host, name: &str, site: Option<&Path>) -> Self {
        Self::receive_with(lab, host, name, site, &[]).await
    }

    /// The same with `more` options: the devices of the VM that is to come.
    pub async fn receive_with(
        lab: &Lab,
        host: &Host,
        name: &str,
        site: Option<&Path>,
        more: &[OsString],
    ) -> Self {
        let mut args: Vec<OsString> = ["receive", "--listen", "127.0.0.1:0"].map(Into::into).into();
        args.extend_from_slice(more);
        let mut vm = Self::start(lab, host, name, site, args);
        vm.listens().await;
        vm
    }

    /// `vmm receive` in a process that may have `bytes` of address space (RLIMIT_AS, by prlimit of util-linux).
    pub async fn receive_within(lab: &Lab, host: &Host, name: &str, bytes: u64) -> Self {
        let mut words: Vec<OsString> = vec![format!("--as={bytes}").into(), binaries::path("vmm").into()];
        words.extend(["receive", "--listen", "127.0.0.1:0"].map(Into::into));
        let mut vm = Self::start_program(lab, host, name, None, Path::new("prlimit"), words);
        vm.listens().await;
        vm
    }

    pub(super) async fn listens(&mut self) {
        self.wait_for("it listens", limits::START, |status| status.ticket.is_some()).await;
    }

    /// Starts a vmm with `args`, those that every vmm has, and, unless `args` say where it goes, its serial port on our pipes. Waits for nothing.
    #[must_use]
    pub fn start(lab: &Lab, host: &Host, name: &str, site: Option<&Path>, args: Vec<OsString>) -> Self {
        Self::start_program(lab, host, name, site, &binaries::path("vmm"), args)
    }

    pub(super) fn start_program(
        lab: &Lab,
        host: &Host,
        name: &str,
        site: Option<&Path>,
        program: &Path,
        mut args: Vec<OsString>,
    ) -> Self {
        let control = lab.fresh(&format!("{name}.sock"));
        args.extend(["--control".into(), control.clone().into()]);
        if !args.iter().any(|word| word == "--serial") {
            args.extend(["--serial".into(), "stdio".into()]);
        }
        if let Some(site) = site {
            args.extend(["--site".into(), site.into()]);
        }
        args.extend(host.options());
        let client = Client::new(&control).expect("the lab's paths are short");
        let mut process = lab.start(name, program, &args);
        let (input, output) = process.take_pipes();
        let (sender, lines) = mpsc::channel(limits::SERIAL_LINES);
        tokio::spawn(async move {
            let mut output = BufReader::new(output);
            let mut line = Vec::new();
            // What a guest says need not be UTF-8: a migration can cut a line anywhere.
            while matches!(output.read_until(b'\n', &mut line).await, Ok(1..)) {
                if sender.send(String::from_utf8_lossy(&line).trim_end().to_owned()).await.is_err() {
                    return;
                }
                line.clear();
            }
        });
        Self { name: name.to_owned(), process, control, client, input, lines }
    }

    /// Its name in the lab.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The process.
    pub fn process(&mut self) -> &mut Process {
        &mut self.process
    }

    /// Its control socket, for requests.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Its control socket's path, for the command line.
    #[must_use]
    pub fn control(&self) -> &Path {
        &self.control
    }

    /// What it says it is doing.
    pub async fn status(&self) -> VmStatus {
        match self.client.status().await {
            Ok(status) => status,
            Err(error) => panic!("{} does not say how it is: {error:?}", self.name),
        }
    }

    /// Asks for the status until it is as `wanted`.
    pub async fn wait_for(
        &mut self,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&VmStatus) -> bool,
    ) -> VmStatus {
        let Self { name, process, client, .. } = self;
        until(&format!("{name}: {what}"), limit, async || {
            process.assert_alive();
            match client.status().await {
                Ok(status) => wanted(&status).then_some(status),
                // The socket comes with the process.
                Err(ClientError::Connect { .. }) => None,
                Err(error) => panic!("{name} does not say how it is: {error:?}"),
            }
        })
        .await
    }

    /// Waits until it is in `state`.
    pub async fn wait_for_state(&mut self, state: VmState, limit: Duration) -> VmStatus {
        self.wait_for(&format!("it is {state}"), limit, |status| status.state == state).await
    }

    /// Waits for more heartbeats than there have been: the guest runs here.
    pub async fn beats(&mut self) {
        let count = |status: &VmStatus| status.heartbeat.map_or(0, |heartbeat| heartbeat.count);
        let before =
            self.wait_for("it answers", limits::START, |status| status.state != VmState::Created).await;
        let before = count(&before);
        self.wait_for("the guest's heart beats on", limits::HEARTBEAT, |status| count(status) > before).await;
    }

    /// Has the guest check every page that it ever wrote, and panics if one is not as it should be.
    pub async fn self_check(&mut self) -> SelfCheck {
        let check = self.ask_self_check().await;
        assert_eq!(check.failures, 0, "{}: the guest lost pages: {check}", self.name);
        check
    }

    async fn ask_self_check(&mut self) -> SelfCheck {
        self.forget_lines();
        self.type_in("c").await;
        let is_check = |line: &str| SelfCheck::parse(line).is_some_and(|check| check.check > 0);
        let line = self.line_that("answers the self-check", is_check).await;
        SelfCheck::parse(&line).expect("it was looked at")
    }

    /// Passes over what the serial port has said: answers to a question asked before a migration may come after it.
    pub fn forget_lines(&mut self) {
        while self.lines.try_recv().is_ok() {}
    }

    /// Types a line at the guest's serial port.
    pub async fn type_line(&mut self, line: &str) {
        self.type_in(&format!("{line}\n")).await;
    }

    /// Types `text` at the guest's serial port.
    async fn type_in(&mut self, text: &str) {
        self.input.write_all(text.as_bytes()).await.expect("the serial port takes bytes");
        self.input.flush().await.expect("the serial port takes bytes");
    }

    /// The next line on the serial port that is as `wanted`.
    pub async fn line_that(&mut self, what: &str, wanted: impl Fn(&str) -> bool) -> String {
        self.line_within(what, limits::SELF_CHECK, wanted).await
    }

    /// The same for a guest that takes longer.
    pub async fn line_within(
        &mut self,
        what: &str,
        limit: Duration,
        wanted: impl Fn(&str) -> bool,
    ) -> String {
        let Self { name, lines, .. } = self;
        let mut seen = Vec::new();
        let found = timeout(limit, async {
            while let Some(line) = lines.recv().await {
                if wanted(&line) {
                    return Some(line);
                }
                seen.push(line);
            }
            None
        });
        match found.await {
            Ok(Some(line)) => line,
            Ok(None) => panic!("{name} closed the serial port before a line that {what}: {seen:#?}"),
            Err(_) => timed_out(format_args!("{name}: no line on the serial port {what}: {seen:#?}")),
        }
    }

    /// The ticket of a vmm that waits for a VM.
    pub async fn ticket(&self) -> String {
        self.status().await.ticket.unwrap_or_else(|| panic!("{} gives no ticket", self.name))
    }

    /// Panics unless the guest runs here, undamaged.
    pub async fn assert_lives(&mut self) -> SelfCheck {
        self.wait_for_state(VmState::Running, limits::SETTLED).await;
        self.beats().await;
        self.self_check().await
    }

    /// Panics unless the process ends by itself with code 0.
    pub async fn assert_ends_well(&mut self) {
        let status: ExitStatus = self.process.end().await;
        assert!(status.success(), "{} ended with {status}", self.name);
    }
}
