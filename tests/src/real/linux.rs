//! A Linux guest behind a vmm's serial port: the one that `guest-images/linux/build` makes.
//!
//! Tests begin with one that was booted before them ([`super::Booted`]). It runs workloads that check themselves; [`LinuxVm::check`] asks for every verdict, and [`Verdict::follows`] compares two of
//! them: whatever a migration may do to a guest, time goes on, nothing is lost and the kernel finds nothing to complain about.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::Path;

use guest_images::linux::Linux;
use serde::{Deserialize, Serialize};
use vmm::control::api::VmState;

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
        let mut vm = Self::start(lab, host, name, net, None, args);
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
        net: Option<&Net>,
    ) -> Self {
        Self::restore_at(lab, host, name, from, of, net, None).await
    }

    /// The same with a site's peer.
    pub async fn restore_at(
        lab: &Lab,
        host: &Host,
        name: &str,
        from: &Path,
        of: &str,
        net: Option<&Net>,
        site: Option<&Path>,
    ) -> Self {
        let args = vec!["restore".into(), "--from".into(), from.into(), "--name".into(), of.into()];
        let mut vm = Self::start(lab, host, name, net, site, args);
        vm.vm.wait_for("it is restored", limits::START, |status| status.state == VmState::Running).await;
        vm
    }

    /// `vmm receive`: waits for a Linux guest on `host`.
    pub async fn receive(lab: &Lab, host: &Host, name: &str, net: Option<&Net>) -> Self {
        Self::receive_at(lab, host, name, net, None).await
    }

    /// The same with a site's peer.
    pub async fn receive_at(
        lab: &Lab,
        host: &Host,
        name: &str,
        net: Option<&Net>,
        site: Option<&Path>,
    ) -> Self {
        let args = ["receive", "--listen", "127.0.0.1:0"].map(Into::into).into();
        let mut vm = Self::start(lab, host, name, net, site, args);
        vm.vm.listens().await;
        vm
    }

    /// Any vmm command with such a guest: in the network's namespace, with one of its TAPs.
    fn start(
        lab: &Lab,
        host: &Host,
        name: &str,
        net: Option<&Net>,
        site: Option<&Path>,
        mut args: Vec<OsString>,
    ) -> Self {
        let vmm = super::binaries::path("vmm");
        let vm = match net {
            None => Vm::start_program(lab, host, name, site, &vmm, args),
            Some(net) => {
                args.extend(["--net".into(), format!("tap={}", net.tap()).into()]);
                let words = net.inside(&vmm, args);
                Vm::start_program(lab, host, name, site, Path::new("ip"), words)
            }
        };
        Self { vm }
    }

    /// Has the guest judge itself, and panics if a verdict is bad.
    pub async fn check(&mut self) -> Verdict {
        self.vm.forget_lines();
        self.vm.type_line("tern-check").await;
        let is_check = |line: &str| line.contains(CHECK);
        let line = self.vm.line_within("answers tern-check", limits::LINUX_CHECK, is_check).await;
        let json = line.split_once(CHECK).map_or("", |(_, json)| json);
        let verdict: Verdict = serde_json::from_str(json).unwrap_or_else(|error| {
            panic!("{}: a verdict that cannot be read ({error}): {line}", self.vm.name())
        });
        assert!(verdict.is_well(), "{}: the guest found something wrong: {line}", self.vm.name());
        verdict
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
            first.follows(earlier);
        }
        until("every workload goes on", limits::LINUX_CHECK, async || {
            let now = self.check().await;
            now.follows(&first);
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

/// What a kernel says once when its CPU was taken away in the middle of a timer interrupt, as a busy host does: it was late, and nothing
/// is wrong. A clock that jumped would show in the workload that watches clocks.
const LATE: &str = "hrtimer: interrupt took";

/// What stands before the JSON of a verdict.
const CHECK: &str = "tern: CHECK ";

/// The guest's judgement of itself (guest-images/linux/guest/check.rs).
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Verdict {
    /// /proc/uptime, seconds.
    pub uptime_s: f64,
    /// Each workload's status.
    pub workloads: BTreeMap<String, Workload>,
    /// Whether the files that stay have the sums that they were given.
    pub kept_files_ok: Option<bool>,
    /// Lines of the journal, if it has no gap.
    pub journal_lines: Option<u64>,
    /// What is wrong with it.
    pub journal_failure: Option<String>,
    /// The kernel's warnings since the boot was done.
    pub warnings: usize,
    /// The first of them.
    pub warning_lines: Vec<String>,
}

/// A workload's status.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Workload {
    /// Whether all its checks held.
    pub ok: bool,
    /// Rounds that it has done, each with its checks.
    pub rounds: u64,
}

impl Verdict {
    /// Whether every check held.
    fn is_well(&self) -> bool {
        self.workloads.values().all(|workload| workload.ok)
            && self.kept_files_ok != Some(false)
            && self.journal_failure.is_none()
            && self.warnings == self.warning_lines.len()
            && self.warning_lines.iter().all(|line| line.starts_with(LATE))
    }

    /// Panics unless this verdict can come after `earlier` from the same guest: its time and its files go on.
    pub fn follows(&self, earlier: &Self) {
        assert!(self.uptime_s > earlier.uptime_s, "uptime did not go on: {earlier:#?} and then {self:#?}");
        assert!(
            self.journal_lines >= earlier.journal_lines,
            "the journal got shorter: {earlier:#?} and then {self:#?}"
        );
        for (name, before) in &earlier.workloads {
            let now = self.workloads.get(name);
            assert!(
                now.is_some_and(|now| now.rounds >= before.rounds),
                "the workload {name} went back: {before:?} and then {now:?}"
            );
        }
    }

    /// Whether every workload has done a round since `earlier`.
    #[must_use]
    pub fn all_went_on(&self, earlier: &Self) -> bool {
        earlier
            .workloads
            .iter()
            .all(|(name, before)| self.workloads.get(name).is_some_and(|now| now.rounds > before.rounds))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_lateness_is_forgiven() {
        let verdict = |ok: bool, more: &str| -> Verdict {
            let json =
                format!(r#"{{"uptime_s":12.05,"workloads":{{"files":{{"ok":{ok},"rounds":2}}}},{more}}}"#);
            serde_json::from_str(&json).unwrap()
        };
        let late = r#""warnings":1,"warning_lines":["hrtimer: interrupt took 86621810 ns"]"#;
        assert!(verdict(true, r#""warnings":0,"warning_lines":[]"#).is_well());
        assert!(verdict(true, late).is_well());
        assert!(!verdict(false, late).is_well());
        assert!(!verdict(true, &format!(r#"{late},"kept_files_ok":false"#)).is_well());
        assert!(!verdict(true, &format!(r#"{late},"journal_failure":"line 3""#)).is_well());
        assert!(!verdict(true, r#""warnings":1,"warning_lines":["rcu: INFO"]"#).is_well());
        assert!(!verdict(true, r#""warnings":9,"warning_lines":["hrtimer: interrupt took 1 ns"]"#).is_well());
    }
}
