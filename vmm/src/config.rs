//! What a user asks for when they launch a VM.

use std::path::PathBuf;

pub use crate::devices::virtio::net::Mac;
pub use crate::kvm::cpu::{CpuChoice, Level};

/// A VM to launch: `vmm run`'s options.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// A name for people; shown in status and logs.
    pub name: String,
    /// The kernel: an ELF vmlinux or a bzImage.
    pub kernel: PathBuf,
    /// By which protocol it is started.
    pub boot: BootProtocol,
    /// Whether ACPI tables describe the machine; if not, an MP table and words on the command line do.
    pub acpi: bool,
    /// An initial RAM file system.
    pub initramfs: Option<PathBuf>,
    /// The kernel's command line.
    pub cmdline: String,
    /// RAM in bytes: a multiple of 2 MiB.
    pub memory_bytes: u64,
    /// Virtual CPUs.
    pub cpus: u8,
    /// Files put into RAM before the VM starts.
    pub loads: Vec<Load>,
    /// Where the serial port goes.
    pub serial: Serial,
    /// Which CPU the guest sees.
    pub cpu: CpuChoice,
    /// Its virtio devices.
    pub devices: DeviceOptions,
}

/// The virtio devices of a VM: the same options wherever it is launched, received or restored.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DeviceOptions {
    /// Whether there is a source of random numbers. Left open, a new VM has one, and an arriving one what it had.
    pub rng: Option<bool>,
    /// Disks, in the order in which the guest finds them.
    pub disks: Vec<DiskOptions>,
    /// Network interfaces, in the order in which the guest finds them.
    pub nets: Vec<NetOptions>,
    /// Where the virtio console goes. Left open, a new VM has none, and an arriving one, if it had one, keeps it without a reader.
    pub console: Option<Serial>,
    /// The memory balloon. Left open, a new VM has none, and an arriving one what it had.
    pub balloon: Option<BalloonOptions>,
}

/// The memory balloon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BalloonOptions {
    /// None.
    Off,
    /// One that reports free pages, and asks a new VM's guest for memory.
    On {
        /// How much it asks for.
        bytes: u64,
    },
}

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetOptions {
    /// The host's TAP interface.
    pub tap: String,
    /// The guest's address. Left open, a new VM's is random, and an arriving one keeps what it had.
    pub mac: Option<Mac>,
    /// A name for people. Left open, a new VM's is `net0`, `net1`, …, and an arriving one keeps what it had.
    pub id: Option<String>,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskOptions {
    /// A raw file, or a block device.
    pub path: PathBuf,
    /// Whether the guest may only read it.
    pub read_only: bool,
    /// What the guest sees as its serial number. Left open, a new VM's is `disk0`, `disk1`, …, and an arriving one keeps what it had.
    pub id: Option<String>,
    /// Whether the host's page cache is passed by (`O_DIRECT`).
    pub direct: bool,
}

/// By which protocol a kernel is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BootProtocol {
    /// What its file allows: PVH for an ELF file with a PVH note, otherwise Linux's 64-bit protocol.
    Auto,
    /// PVH.
    Pvh,
    /// Linux's 64-bit protocol.
    Linux64,
}

/// A file put into RAM as it is, as QEMU's loader device does it (`-device loader,file=,addr=,force-raw=on`).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Load {
    /// The file.
    pub file: PathBuf,
    /// The guest-physical address of its first byte.
    pub addr: u64,
}

/// Where the 16550 serial port's output goes, and whence its input comes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Serial {
    /// Standard input and output; a terminal is put into raw mode and restored.
    Stdio,
    /// Output appended to a file; no input.
    File(PathBuf),
    /// Neither.
    Off,
}
