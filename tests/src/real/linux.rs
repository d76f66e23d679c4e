//! A Linux guest behind a vmm's serial port: the one that `guest-images/linux/build` makes.
//!
//! Tests begin with one that was booted before them ([`super::Booted`]). It runs workloads that check themselves, and says what they found
//! ([`LinuxVm::check`]).

use std::ffi::OsString;
use std::path::Path;

use guest_images::linux::Linux;
use vmm::control::api::VmState;

use super::verdict::{Verdict, but_late};
use super::{Host, Lab, Net, Vm, limits, until};

/// How a Linux guest is launched.
#[derive(Clone, Debug)]
pub struct LinuxGuest {
    /// Virtual CPUs.
    pub cpus: u8,
    /// RAM, MiB.
    pub memory_mib: u32,
    /// Its workloads, apart by commas.
    pub workload: &'static str,
}

impl Default for LinuxGuest {
    fn default() -> Self {
        Self { cpus: 1, memory_mib: 128, workload: "files,checksum,journal,clock,count" }
    }
}

impl LinuxGuest {
    /// The words of `vmm run` for it, but for the network's.
    pub(super) fn args(&self, net: Option<&Net>) -> Vec<OsString> {
        let linux = Linux::find().unwrap_or_else(|error| panic!("{error}"));
        let own = linux.command_line().unwrap_or_else(|error| panic!("{error}"));
        let ip = net.map(|_| format!(" tern.ip={}/24", Net::GUEST)).unwrap_or_default();
        let mut args: Vec<OsString> = vec!["run".into(), "--kernel".into(), linux.vmlinux().into()];
        args.extend(["--initramfs".into(), linux.initramfs().into()]);
        args.extend(["--memory".into(), format!("{}M", self.memory_mib).into()]);
        args.extend(["--cpus".into(), self.cpus.to_string().into()]);
        args.extend(["--cmdline".into(), format!("{own} tern.workload={}{ip}", self.workload).into()]);
        args
    }
}

/// What of its host a guest's vmm is connected to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Links<'a> {
    /// The network that has its TAP.
    pub net: Option<&'a Net>,
    /// The local socket of its site's peer.
    pub site: Option<&'a Path>,
}

impl<'a> From<Option<&'a Net>> for Links<'a> {
    fn from(net: Option<&'a Net>) -> Self {
        Self { net, site: None }
    }
}

/// A vmm with a Linux guest, or one that waits for it.
#[derive(Debug)]
pub struct LinuxVm {
    /// The process.
    pub vm: Vm,
}

impl LinuxVm {
    /// `vmm run`: boots `guest` on `host` and waits until its workloads have started. Gives what the guest then says, too.
    pub async fn launch(
        lab: &Lab,
        host: &Host,
        name: &str,
        guest: &LinuxGuest,
        net: Option<&Net>,
    ) -> (Self, String) {
        let mut args = guest.args(net);
        args.extend(["--name".into(), name.into()]);
        let mut vm = Self::start(lab, host, name, net.into(), args);
        let is_ready = |line: &str| line.contains("tern: READY");
        let ready = vm.vm.line_within("says that Linux is up", limits::LINUX_BOOT, is_ready).await;
        (vm, ready)
    }

    /// `vmm restore`: makes one of the snapshot `of` in `from`, and waits until it runs.
    pub async fn restore(
        lab: &Lab,
        host: &Host,
        name: &str,
        from: &Path,
        of: &str,
        links: impl Into<Links<'_>>,
    ) -> Self {
        let args = vec!["restore".into(), "--from".into(), from.into(), "--name".into(), of.into()];
        let mut vm = Self::start(lab, host, name, links.into(), args);
        vm.vm.wait_for("it is restored", limits::START, |status| status.state == VmState::Running).await;
        vm
    }

    /// `vmm receive`: waits for a Linux guest on `host`.
    pub async fn receive(lab: &Lab, host: &Host, name: &str, links: impl Into<Links<'_>>) -> Self {
        let args = ["receive", "--listen", "127.0.0.1:0"].map(Into::into).into();
        let mut vm = Self::start(lab, host, name, links.into(), args);
        vm.vm.listens().await;
        vm
    }

    /// Any vmm command with such a guest: in the network's namespace, with one of its TAPs.
    fn start(lab: &Lab, host: &Host, name: &str, links: Links<'_>, mut args: Vec<OsString>) -> Self {
        let vmm = super::binaries::path("vmm");
        let vm = match links.net {
            None => Vm::start_program(lab, host, name, links.site, &vmm, args),
            Some(net) => {
                args.extend(["--net".into(), format!("tap={}", net.tap()).into()]);
                let words = net.inside(&vmm, args);
                Vm::start_program(lab, host, name, links.site, Path::new("ip"), words)
            }
        };
        Self { vm }
    }

    /// Has the guest judge itself, and panics if a verdict is bad.
    pub async fn check(&mut self) -> Verdict {
        Verdict::ask(&mut self.vm, limits::LINUX_CHECK, but_late).await
    }

    /// Starts more workloads, and waits until each has done a round.
    pub async fn begin(&mut self, workloads: &[&str]) {
        for workload in workloads {
            self.vm.type_line(&format!("tern-guest work {workload} &")).await;
        }
        until(&format!("{workloads:?} do their rounds"), limits::LINUX_CHECK, async || {
            let works = self.check().await.workloads;
            workloads.iter().all(|name| works.get(*name).is_some_and(|work| work.rounds > 0)).then_some(())
        })
        .await;
    }

    /// Waits until every workload has done a round since `earlier`, all checks good; the last verdict.
    pub async fn works(&mut self, earlier: Option<&Verdict>) -> Verdict {
        let first = self.check().await;
        if let Some(earlier) = earlier {
            first.assert_follows(earlier);
        }
        until("every workload goes on", limits::LINUX_CHECK, async || {
            let now = self.check().await;
            now.assert_follows(&first);
            now.all_went_on(&first).then_some(now)
        })
        .await
    }

    /// Has the guest reset the machine, and panics unless the process then ends with code 0.
    pub async fn reboot(&mut self) {
        self.vm.type_line("reboot -f").await;
        self.vm.assert_ends_well().await;
    }
}
