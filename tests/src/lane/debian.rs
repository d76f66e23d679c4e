//! A guest with a stock Debian kernel and the test Linux' workloads, and what it says of itself.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use vmm::control::api::VmState;

use super::{dmesg, limits};
use crate::real::{Host, Lab, Verdict, Vm};

/// Where the first level keeps kernels and their initramfs.
const KERNELS: &str = "/kernels";
/// Ends the answer to a question.
const END: &str = "lane-end";

/// A guest to launch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Debian<'a> {
    /// The kernel's file.
    pub(super) kernel: &'static str,
    /// Its initramfs.
    pub(super) initramfs: &'static str,
    /// RAM, MiB.
    pub(super) memory_mib: u32,
    /// What it does, as guest-images/linux/README.md names it.
    pub(super) workloads: &'static str,
    /// A disk whose file system its workloads write to.
    pub(super) disk: &'a Path,
}

/// Makes a disk with an empty file system.
pub(super) fn make_disk(lab: &Lab, name: &str) -> PathBuf {
    let path = lab.dir().join(name);
    let file = std::fs::File::create(&path).expect("the lab's directory takes a disk");
    file.set_len(limits::DISK_BYTES).expect("a sparse file");
    let made = Command::new("mke2fs").arg("-F").arg(&path).output().expect("busybox has mke2fs");
    assert!(made.status.success(), "mke2fs: {}", String::from_utf8_lossy(&made.stderr));
    path
}

/// The option of `vmm run`, `receive` and `restore` that attaches it.
pub(super) fn disk_option(disk: &Path) -> [OsString; 2] {
    // The lab's paths have no commas.
    ["--disk".into(), format!("path={}", disk.display()).into()]
}

impl Debian<'_> {
    /// `vmm run`; returns when the guest says READY.
    pub(super) async fn launch(&self, lab: &Lab, host: &Host, name: &str) -> Vm {
        let Self { kernel, initramfs, memory_mib, workloads, disk } = self;
        let file = |name: &str| OsString::from(Path::new(KERNELS).join(name));
        // Quiet, because every character that the kernel says costs two levels of emulation; the guest looks at its log itself.
        let words = format!(
            "console=ttyS0 quiet panic=-1 rdinit=/guest-init tern.workload={workloads} tern.disk=vda"
        );
        let mut args = vec![
            "run".into(),
            "--name".into(),
            name.into(),
            "--kernel".into(),
            file(kernel),
            "--initramfs".into(),
            file(initramfs),
            "--cmdline".into(),
            words.into(),
            "--memory".into(),
            format!("{memory_mib}M").into(),
        ];
        args.extend(disk_option(disk));
        let mut vm = Vm::start(lab, host, name, None, args);
        let ready = vm.line_within("says READY", limits::BOOT, |line| line.contains("tern: READY")).await;
        assert!(ready.contains("dir=/mnt/"), "the disk is not mounted: {ready}");
        vm
    }
}

/// `vmm restore` in a fresh process; returns when the VM runs.
pub(super) async fn restore(lab: &Lab, host: &Host, name: &str, from: &Path, disk: &Path) -> Vm {
    let mut args: Vec<OsString> = vec!["restore".into(), "--from".into(), from.into()];
    args.extend(disk_option(disk));
    let mut vm = Vm::start(lab, host, name, None, args);
    vm.wait_for("it is restored", limits::SNAPSHOT, |status| status.state == VmState::Running).await;
    vm
}

/// Has the guest look at itself; panics if it finds anything wrong.
pub(super) async fn check(vm: &mut Vm) -> Verdict {
    Verdict::ask(vm, limits::CHECK, dmesg::unexplained).await
}

/// Panics if the guest's kernel has warned of anything since it started that is not known.
pub(super) async fn assert_quiet_log(vm: &mut Vm) {
    vm.type_line(&format!("dmesg -r | grep '^<[0-4]>'; echo {END}")).await;
    let mut warnings = Vec::new();
    loop {
        let line = vm.line_within("ends the kernel's log", limits::CHECK, |_| true).await;
        if line == END {
            break;
        }
        warnings.push(line);
    }
    warnings.retain(|line| line.starts_with('<'));
    let unexplained = dmesg::unexplained(&warnings);
    assert!(unexplained.is_empty(), "the guest's kernel warns: {unexplained:#?}");
}

/// How much memory the guest's kernel has after what it keeps for itself, MiB.
pub(super) async fn memory_mib(vm: &mut Vm) -> u32 {
    vm.type_line("grep MemTotal /proc/meminfo").await;
    let line = vm
        .line_within("says how much memory there is", limits::CHECK, |line| line.starts_with("MemTotal:"))
        .await;
    let kib: Option<u32> = line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok());
    kib.unwrap_or_else(|| panic!("this says no memory: {line}")) / 1024
}

/// What the guest's hardware random number generator is called, which it has by ACPI's word alone.
pub(super) async fn random_source(vm: &mut Vm) -> String {
    vm.type_line("cat /sys/class/misc/hw_random/rng_current").await;
    let is_name = |line: &str| {
        line.starts_with("virtio_rng") || line.starts_with("none") || line.contains("can't open")
    };
    vm.line_within("names the source of random numbers", limits::CHECK, is_name).await
}

/// Has the guest end itself by `command` from within, which must end its `vmm` well.
pub(super) async fn end_by(command: &str, vm: &mut Vm) -> String {
    vm.type_line(command).await;
    vm.assert_ends_well().await;
    "exit code 0".to_owned()
}
