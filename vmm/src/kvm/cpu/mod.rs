//! The guest's CPU: what it shows, and whether another host can go on with it.
//!
//! ```text
//! KVM_GET_SUPPORTED_CPUID ─► Host ─ --cpu host | v2 | v3 | v4 | FILE ─► CpuModel ─► CPUID entries of each virtual CPU
//!                             ▲                                           │
//!                             └──────── check, on another host ◄── MachineDescription ── what the virtual CPU then shows
//! ```
//! `features` has the table of names and bits, `levels` the x86-64 levels, `model` makes entries of a set of features, `file` is the baseline
//! file, `check` compares a guest with a host. What is recorded is what a virtual CPU shows after KVM has taken its entries, not what was asked
//! for: some KVMs cannot hide all that the processor has, and a guest may use whatever it sees.

mod check;
mod features;
mod file;
mod levels;
mod model;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

pub use features::{FeatureSet, UnknownFeature};
pub use file::{BASELINE_VERSION, BaselineError, denominator};
pub use levels::Level;
pub use model::CpuModel;

use self::model::{Host, Shape};
use super::vcpu::Vcpu;
use super::{KvmError, call, vm};

/// `--cpu`: which CPU a guest sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CpuChoice {
    /// All that this host's KVM supports and that can move.
    Host,
    /// A level of the x86-64 psABI and no more.
    Level(Level),
    /// What a baseline file has.
    Baseline(PathBuf),
}

/// Why a guest's CPU cannot be had here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CpuError {
    /// The host is below the level.
    #[error("this host's CPU or KVM cannot give x86-64-{level}: it lacks {missing}; choose a lower --cpu")]
    Level {
        /// What was asked for.
        level: Level,
        /// What the host lacks.
        missing: FeatureSet,
    },
    /// The guest sees features that this host cannot give.
    #[error(
        "this host's CPU or KVM lacks features that the VM's CPU has: {missing}; launch VMs that move between such hosts with --cpu v2, v3 or \
         v4, or with their common baseline (vmm cpu-baseline)"
    )]
    Features {
        /// Which.
        missing: FeatureSet,
    },
    /// Another maker's processor.
    #[error(
        "the VM's CPU is {guest} and this host's is {host}: a VM moves only between hosts of one CPU vendor"
    )]
    Vendor {
        /// The guest's.
        guest: String,
        /// The host's.
        host: String,
    },
    /// Physical addresses too narrow.
    #[error(
        "the VM's CPU has physical addresses of {guest} bits and this host's of {host}: launch the VM with a baseline (vmm cpu-baseline) \
         that has the narrower ones"
    )]
    AddressBits {
        /// The guest's.
        guest: u8,
        /// The host's.
        host: u8,
    },
    /// A baseline file that cannot be used.
    #[error(transparent)]
    Baseline(#[from] BaselineError),
}

/// Gives all virtual CPUs the chosen CPU, and says what they show.
/// # Errors
/// If this host cannot give it, or KVM refuses.
pub(crate) fn give(kvm: &Kvm, vcpus: &[Vcpu], choice: &CpuChoice) -> Result<CpuModel, KvmError> {
    let first = vcpus.first().ok_or(KvmError::CpuCount { saved: 1, built: 0 })?;
    let host = measure(kvm, first.fd())?;
    let (mut model, shape) = match choice {
        CpuChoice::Host => (host.own(), Shape::Whole),
        CpuChoice::Level(level) => (host.at_level(*level)?, Shape::Portable),
        CpuChoice::Baseline(path) => {
            let baseline = CpuModel::read(path).map_err(CpuError::from)?;
            (host.with_baseline(baseline)?, Shape::Portable)
        }
    };
    let cpus = u8::try_from(vcpus.len()).map_err(|_| KvmError::Cpus { asked: vcpus.len(), most: 255 })?;
    let set = |model: &CpuModel| -> Result<CpuModel, KvmError> {
        for vcpu in vcpus {
            vcpu.set_cpuid(&host.entries(model, shape, vcpu.index(), cpus))?;
        }
        Ok(CpuModel::of(shown(first.fd())?.as_slice()))
    };
    let mut seen = set(&model)?;
    let forced = seen.features.without(&model.features);
    if !forced.is_empty() {
        tracing::info!(%forced, "this host's KVM cannot hide these features: the VM sees them, and its destinations must have them");
        // Once more, so that what goes with them (the XSAVE leaf) is shown as well.
        model.features = model.features.or(&forced);
        seen = set(&model)?;
    }
    Ok(seen)
}

/// Checks that this host can go on with a guest that sees `guest`. Leaves `fd` with another CPUID.
/// # Errors
/// [`CpuError`] with what is missing, or KVM's.
pub(crate) fn check_host(kvm: &Kvm, fd: &VcpuFd, guest: &CpuModel) -> Result<(), KvmError> {
    Ok(check::check(guest, &measure(kvm, fd)?.gives)?)
}

/// As [`check_host`], for saved CPUID entries.
/// # Errors
/// As [`check_host`].
pub(crate) fn check_entries(kvm: &Kvm, fd: &VcpuFd, saved: &[kvm_cpuid_entry2]) -> Result<(), KvmError> {
    check_host(kvm, fd, &CpuModel::of(saved))
}

/// All that a guest on this host can see and other hosts can have alike: what `vmm cpu-baseline` writes.
/// # Errors
/// If there is no KVM, or it refuses.
pub fn this_host() -> Result<CpuModel, KvmError> {
    let kvm = vm::open(vm::KVM_PATH)?;
    let vm = kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
    // As in a VM that runs: some features are there only with the interrupt controllers in the kernel.
    vm.create_irq_chip().map_err(call("KVM_CREATE_IRQCHIP"))?;
    let vcpu = vm.create_vcpu(0).map_err(call("KVM_CREATE_VCPU"))?;
    Ok(measure(&kvm, &vcpu)?.portable())
}

fn measure(kvm: &Kvm, fd: &VcpuFd) -> Result<Host, KvmError> {
    const TSC_DEADLINE: u32 = 1 << 24;
    let mut supported =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(call("KVM_GET_SUPPORTED_CPUID"))?;
    // Older kernels tell of this feature only here.
    if kvm.check_extension(Cap::TscDeadlineTimer) {
        supported.as_mut_slice().iter_mut().filter(|e| e.function == 1).for_each(|e| e.ecx |= TSC_DEADLINE);
    }
    fd.set_cpuid2(&supported).map_err(call("KVM_SET_CPUID2"))?;
    Ok(Host::new(supported.as_slice(), shown(fd)?.as_slice()))
}

fn shown(fd: &VcpuFd) -> Result<kvm_bindings::CpuId, KvmError> {
    fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(call("KVM_GET_CPUID2"))
}
