//! The demo's VMs: one `vmm` process each.

use std::path::{Path, PathBuf};
use std::time::Duration;

use guest_images::pagestorm::report::Report as SelfCheck;
use tokio::io::{AsyncWriteExt, BufReader, Lines};
use tokio::process::{ChildStdin, ChildStdout};
use vmm::control::api::VmStatus;
use vmm::control::client::{Client, ClientError};

use crate::demo::error::DemoError;
use crate::demo::guest::Guest;
use crate::demo::process::{Args, Process, Stage, until};
use crate::limits;

/// A vmm process and its control socket.
#[derive(Debug)]
pub(crate) struct Vm {
    name: &'static str,
    process: Process,
    client: Client,
    serial: (ChildStdin, Lines<BufReader<ChildStdout>>),
}

/// Where a vmm finds its host's things.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Host<'a> {
    /// The directory for its sockets and keys.
    pub(crate) dir: &'a Path,
    /// The host's key.
    pub(crate) identity: &'a Path,
    /// The keys that it lets in.
    pub(crate) authorized_keys: &'a Path,
    /// The local socket of its peer.
    pub(crate) site: &'a Path,
}

impl Vm {
    /// Launches `guest` and waits for its heartbeat.
    ///
    /// # Errors
    /// If it does not come up.
    pub(crate) async fn launch(
        stage: &Stage,
        name: &'static str,
        host: Host<'_>,
        guest: &Guest,
        kernel: &Path,
    ) -> Result<Self, DemoError> {
        let mut load = std::ffi::OsString::from("file=");
        load.push(commas_doubled(&guest.content));
        load.push(format!(",addr={:#x}", guest.layout.content_addr));
        let args = Args::new(&["vmm", "run", "--name", name])
            .with("--kernel", kernel)
            .with("--cmdline", guest.layout.cmdline())
            .with("--memory", guest.memory_bytes().to_string())
            .with("--load", load);
        let mut vm = Self::start(stage, name, host, args)?;
        vm.wait_for("the guest's heart beats", limits::START, |status| {
            status.heartbeat.is_some_and(|heartbeat| heartbeat.count > 0).then_some(())
        })
        .await?;
        Ok(vm)
    }

    /// Starts a vmm that waits for a VM; gives it and its ticket.
    ///
    /// # Errors
    /// If it does not come up.
    pub(crate) async fn receive(
        stage: &Stage,
        name: &'static str,
        host: Host<'_>,
    ) -> Result<(Self, String), DemoError> {
        let args = Args::new(&["vmm", "receive", "--listen", "127.0.0.1:0"]);
        let mut vm = Self::start(stage, name, host, args)?;
        let ticket = vm.wait_for("the destination listens", limits::START, |status| status.ticket).await?;
        Ok((vm, ticket))
    }

    fn start(stage: &Stage, name: &'static str, host: Host<'_>, args: Args) -> Result<Self, DemoError> {
        let control: PathBuf = host.dir.join(format!("{name}.sock"));
        let args = args
            .with("--serial", "stdio")
            .with("--site", host.site)
            .with("--identity", host.identity)
            .with("--authorized-keys", host.authorized_keys)
            .with("--control", &control);
        let client = Client::new(&control).map_err(|source| DemoError::Vmm {
            what: "get a socket",
            vm: name,
            source,
        })?;
        let mut process = stage.spawn(name, &args)?;
        let serial = process.take_pipes()?;
        Ok(Self { name, process, client, serial })
    }

    /// Its control socket.
    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// Asks for the status until `answer` finds in it what it looks for.
    ///
    /// # Errors
    /// If that does not come true in time, or the process ends.
    pub(crate) async fn wait_for<T>(
        &mut self,
        what: &'static str,
        limit: Duration,
        answer: impl Fn(VmStatus) -> Option<T>,
    ) -> Result<T, DemoError> {
        let Self { name, process, client, .. } = self;
        until(what, limit, &mut [process], async || match client.status().await {
            Ok(status) => Ok(answer(status)),
            // The socket comes with the process.
            Err(ClientError::Connect { .. }) => Ok(None),
            Err(source) => Err(DemoError::Vmm { what: "say how it is", vm: name, source }),
        })
        .await
    }

    /// Has the guest check every page that it ever wrote.
    ///
    /// # Errors
    /// If it does not answer.
    pub(crate) async fn self_check(&mut self) -> Result<SelfCheck, DemoError> {
        let Self { name, process, serial: (input, output), .. } = self;
        let broken =
            |source| DemoError::Process { what: "ask the guest of", process: (*name).to_owned(), source };
        input.write_all(b"c").await.map_err(broken)?;
        input.flush().await.map_err(broken)?;
        let answer = async {
            while let Some(line) = output.next_line().await.map_err(broken)? {
                match SelfCheck::parse(line.trim()) {
                    Some(check) if check.check > 0 => return Ok(check),
                    Some(_) | None => tracing::debug!(line, "the guest says"),
                }
            }
            process.check()?;
            Err(DemoError::Answer(format!("the guest of `{name}` closed its serial port unasked")))
        };
        let timeout = DemoError::Timeout {
            what: "the guest answers its self-check",
            seconds: limits::SELF_CHECK.as_secs(),
        };
        tokio::time::timeout(limits::SELF_CHECK, answer).await.unwrap_or(Err(timeout))
    }

    /// Ends the VM and waits for its process; says whether that ended well.
    ///
    /// # Errors
    /// If it refuses.
    pub(crate) async fn stop(&mut self) -> Result<bool, DemoError> {
        let name = self.name;
        self.client.operate("stop").await.map_err(|source| DemoError::Vmm {
            what: "stop",
            vm: name,
            source,
        })?;
        self.finish().await
    }

    /// Waits for a process that ends by itself; says whether it ended well.
    ///
    /// # Errors
    /// If it cannot be waited for.
    pub(crate) async fn finish(&mut self) -> Result<bool, DemoError> {
        self.process.finish().await
    }
}

/// A path as a value in `key=value,…`: a comma in it is written twice.
fn commas_doubled(path: &Path) -> std::ffi::OsString {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let bytes = path.as_os_str().as_bytes().iter();
    let doubled = bytes.flat_map(|&byte| [Some(byte), (byte == b',').then_some(b',')]).flatten();
    std::ffi::OsString::from_vec(doubled.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_in_a_path_are_doubled() {
        assert_eq!(commas_doubled(Path::new("/a,b/c")), "/a,,b/c");
    }
}
