//! KVM: the VM, its virtual CPUs and their threads, and their state.

use std::io;

pub mod cpu;
mod hwcr;
mod raw;
pub(crate) mod run_page;
pub mod state;
pub(crate) mod state_bytes;
pub(crate) mod threads;
pub(crate) mod time;
pub(crate) mod tun;
pub(crate) mod vcpu;
pub mod vm;

pub use cpu::CpuError;
pub use state_bytes::{STATE_VERSION, STATE_VERSION_OLDEST, StateError, check_state};

/// Errors of KVM.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// No device node.
    #[error(
        "{path} does not exist: load the kernel module (modprobe kvm_intel or kvm_amd), turn virtualisation on in the \
         firmware, or, inside a VM, ask for nested virtualisation"
    )]
    Absent {
        /// The device node looked for.
        path: String,
    },
    /// The device node may not be opened.
    #[error(
        "no permission to open {path}: add the user to the group kvm (sudo usermod -aG kvm \"$USER\") and log in again"
    )]
    Permission {
        /// The device node.
        path: String,
    },
    /// Opening it failed otherwise.
    #[error("could not open {path}")]
    Open {
        /// The device node.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// A kernel with another KVM interface.
    #[error("KVM's interface has version {0} and not 12: this kernel is too old")]
    ApiVersion(i32),
    /// Something that this monitor cannot do without.
    #[error("this host's KVM lacks {capability}, needed for {purpose}: use a newer kernel (5.10 or later)")]
    Capability {
        /// KVM's name for it.
        capability: &'static str,
        /// What it is needed for.
        purpose: &'static str,
    },
    /// More virtual CPUs than KVM takes.
    #[error("{asked} virtual CPUs asked for, and this host's KVM gives a VM at most {most}: change --cpus")]
    Cpus {
        /// How many were asked for.
        asked: usize,
        /// How many there may be.
        most: usize,
    },
    /// A call that should not fail failed.
    #[error("KVM refused {call}")]
    Call {
        /// The ioctl's name, or the call's.
        call: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A CPU that this host cannot give.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// A model-specific register that this host does not take.
    #[error(
        "this host's KVM does not take the value {value:#x} of the VM's model-specific register {index:#x}"
    )]
    Msr {
        /// The register.
        index: u32,
        /// Its saved value.
        value: u64,
    },
    /// The saved VM's counter has another rate, and its guest relies on it.
    #[error(
        "the VM's time-stamp counter runs at {saved_khz} kHz and this host's at {here_khz} kHz, its KVM cannot scale it, and the guest was shown \
         a counter of constant rate (CPUID 0x80000007): its clock would drift; use a host whose rate differs by less than 250 ppm or whose \
         processor scales the counter"
    )]
    TscRate {
        /// Saved.
        saved_khz: u64,
        /// Here.
        here_khz: u64,
    },
    /// More vector state than there is room for.
    #[error(
        "the VM's vector state has {bytes} bytes and there is room for {most}: a processor with fewer vector registers cannot take it"
    )]
    XsaveSize {
        /// What there is.
        bytes: usize,
        /// What there may be.
        most: usize,
    },
    /// The saved VM has another number of virtual CPUs.
    #[error("the saved state has {saved} virtual CPUs and this machine {built}")]
    CpuCount {
        /// In the state.
        saved: usize,
        /// Here.
        built: usize,
    },
}

/// Names the call that failed.
pub(crate) fn call(call: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> KvmError {
    move |e| KvmError::Call { call, source: e.into() }
}
