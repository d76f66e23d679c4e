//! The VM: capabilities, memory slots, interrupt controllers and timers in the kernel.
#![expect(unsafe_code, reason = "hands guest memory to KVM")]

use std::ffi::CString;
use std::io;
use std::os::fd::{FromRawFd as _, IntoRawFd as _, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{
    KVM_API_VERSION, KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_X86_TRIPLE_FAULT_EVENT, KVM_MEM_LOG_DIRTY_PAGES,
    KVM_PIT_SPEAKER_DUMMY, kvm_enable_cap, kvm_pit_config, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use page::PageSet;
use vmm_sys_util::eventfd::EventFd;

use super::vcpu::Vcpu;
use super::{KvmError, call};
use crate::memory::{Memory, add_words};

/// Where KVM is found.
pub const KVM_PATH: &str = "/dev/kvm";

/// Three pages that Intel's virtualisation uses in guest-physical space to run real-mode code, and one for its page table:
/// in the hole below 4 GiB, where neither RAM nor a device is.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// What a KVM must have, and why.
const REQUIRED: &[(Cap, &str, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY", "guest memory"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP", "the interrupt controllers in the kernel"),
    (Cap::Pit2, "KVM_CAP_PIT2", "the programmable timer"),
    (Cap::PitState2, "KVM_CAP_PIT_STATE2", "moving the programmable timer"),
    (Cap::Irqfd, "KVM_CAP_IRQFD", "device interrupts"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD", "notifications of virtio devices"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID", "CPUID templates"),
    (Cap::MpState, "KVM_CAP_MP_STATE", "moving virtual CPUs"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS", "moving pending interrupts and exceptions"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS", "moving debug registers"),
    (Cap::Xsave, "KVM_CAP_XSAVE", "moving vector registers"),
    (Cap::Xcrs, "KVM_CAP_XCRS", "moving extended control registers"),
    (Cap::AdjustClock, "KVM_CAP_ADJUST_CLOCK", "guest time that goes on after a move"),
    (Cap::GetTscKhz, "KVM_CAP_GET_TSC_KHZ", "the time-stamp counter's rate"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR", "real mode on Intel processors"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT", "pausing"),
    (Cap::DestroyMemoryRegionWorks, "KVM_CAP_DESTROY_MEMORY_REGION_WORKS", "memory slots"),
];

/// Opens KVM and checks what it can do.
///
/// # Errors
/// [`KvmError`]: absent, no permission, too old, or a capability missing.
pub fn open(path: &str) -> Result<Kvm, KvmError> {
    let name = CString::new(path).map_err(|_| KvmError::Absent { path: path.to_owned() })?;
    let kvm = Kvm::new_with_path(&name).map_err(|e| open_error(path, e.into()))?;
    let version = kvm.get_api_version();
    if u32::try_from(version) != Ok(KVM_API_VERSION) {
        return Err(KvmError::ApiVersion(version));
    }
    check(|cap| kvm.check_extension(cap))?;
    Ok(kvm)
}

fn open_error(path: &str, source: io::Error) -> KvmError {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::NotFound => KvmError::Absent { path },
        io::ErrorKind::PermissionDenied => KvmError::Permission { path },
        _ => KvmError::Open { path, source },
    }
}

/// Has VCPU_EVENTS say all that there is: a triple fault that was not seen yet, and what comes with a pending exception. A KVM that is
/// too old for them settles both before it tells its state.
fn tell_all_events(kvm: &Kvm, vm: &VmFd) -> Result<(), KvmError> {
    for cap in [KVM_CAP_EXCEPTION_PAYLOAD, KVM_CAP_X86_TRIPLE_FAULT_EVENT] {
        if kvm.check_extension_raw(cap.into()) > 0 {
            let on = kvm_enable_cap { cap, args: [1, 0, 0, 0], ..Default::default() };
            vm.enable_cap(&on).map_err(call("KVM_ENABLE_CAP"))?;
        }
    }
    Ok(())
}

fn check(has: impl Fn(Cap) -> bool) -> Result<(), KvmError> {
    match REQUIRED.iter().find(|(cap, _, _)| !has(*cap)) {
        None => Ok(()),
        Some((_, capability, purpose)) => Err(KvmError::Capability { capability, purpose }),
    }
}

/// A VM with its memory; virtual CPUs are made from it.
#[derive(Debug)]
pub struct Vm {
    kvm: Kvm,
    fd: VmFd,
    memory: Arc<Memory>,
}

impl Vm {
    /// Makes a VM around `memory`, with interrupt controllers and timer.
    /// # Errors
    /// [`KvmError`].
    pub fn new(kvm: Kvm, memory: Arc<Memory>) -> Result<Self, KvmError> {
        let fd = kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
        fd.set_tss_address(TSS_ADDRESS).map_err(call("KVM_SET_TSS_ADDR"))?;
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(call("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.create_irq_chip().map_err(call("KVM_CREATE_IRQCHIP"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).map_err(call("KVM_CREATE_PIT2"))?;
        tell_all_events(&kvm, &fd)?;
        let vm = Self { kvm, fd, memory };
        vm.set_slots(false)?;
        Ok(vm)
    }

    /// Makes `count` virtual CPUs.
    /// # Errors
    /// [`KvmError::Cpus`] if that is more than KVM gives, or [`KvmError::Call`].
    pub(crate) fn create_vcpus(&self, count: u8) -> Result<Vec<Vcpu>, KvmError> {
        let most = self.kvm.get_max_vcpus();
        if usize::from(count) > most {
            return Err(KvmError::Cpus { asked: usize::from(count), most });
        }
        (0..count)
            .map(|index| {
                let fd = self.fd.create_vcpu(u64::from(index)).map_err(call("KVM_CREATE_VCPU"))?;
                Vcpu::new(index, fd).map_err(|source| KvmError::Call { call: "mmap of kvm_run", source })
            })
            .collect()
    }

    /// The descriptor of /dev/kvm.
    pub(crate) fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// The VM's descriptor.
    pub(crate) fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// An event that raises interrupt line `line`.
    pub(crate) fn interrupt(&self, line: u32) -> Result<EventFd, KvmError> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(|source| KvmError::Call { call: "eventfd", source })?;
        self.fd.register_irqfd(&event, line).map_err(call("KVM_IRQFD"))?;
        Ok(event)
    }

    /// An event that is set when the guest writes the 32-bit number `value` to `address`, without an exit.
    pub(crate) fn notification(&self, address: u64, value: u32) -> Result<OwnedFd, KvmError> {
        let event = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
            .map_err(|source| KvmError::Call { call: "eventfd", source })?;
        self.fd
            .register_ioevent(&event, &IoEventAddress::Mmio(address), value)
            .map_err(call("KVM_IOEVENTFD"))?;
        // SAFETY: the descriptor was this event's alone, and `into_raw_fd` gave it up.
        Ok(unsafe { OwnedFd::from_raw_fd(event.into_raw_fd()) })
    }

    fn set_slots(&self, log_dirty: bool) -> Result<(), KvmError> {
        for (slot, (extent, host)) in (0u32..).zip(self.memory.host_addresses()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: if log_dirty { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
                guest_phys_addr: extent.start(),
                memory_size: extent.bytes(),
                userspace_addr: host,
            };
            // SAFETY: the range is a mapping that `self.memory` owns and keeps at least as long as this VM's descriptor; the
            // extents do not overlap; all access from this process goes through volatile copies.
            unsafe { self.fd.set_user_memory_region(region) }.map_err(call("KVM_SET_USER_MEMORY_REGION"))?;
        }
        Ok(())
    }

    /// Turns KVM's dirty log on, empty, or off.
    pub(crate) fn log_dirty(&self, on: bool) -> Result<(), KvmError> {
        self.set_slots(on)
    }

    /// The pages that the guest or KVM wrote since the log was turned on or last taken; clears them in the log.
    pub(crate) fn take_log(&self, set: &mut PageSet) -> Result<(), KvmError> {
        for (slot, extent) in (0u32..).zip(self.memory.extents()) {
            let bytes = usize::try_from(extent.bytes()).expect("RAM fits a 64-bit address space");
            let words = self.fd.get_dirty_log(slot, bytes).map_err(call("KVM_GET_DIRTY_LOG"))?;
            add_words(set, extent, &words);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_device_says_so() {
        let error = open("/nonexistent/kvm").unwrap_err();
        assert!(matches!(error, KvmError::Absent { .. }), "{error}");
        assert!(error.to_string().contains("modprobe"), "{error}");
    }

    #[test]
    fn a_refused_device_names_the_group() {
        let error = open_error(KVM_PATH, io::ErrorKind::PermissionDenied.into());
        assert!(error.to_string().contains("group kvm"), "{error}");
        assert!(matches!(open_error(KVM_PATH, io::ErrorKind::OutOfMemory.into()), KvmError::Open { .. }));
    }

    #[test]
    fn each_capability_is_missed_by_name() {
        for (index, (_, name, _)) in REQUIRED.iter().enumerate() {
            let asked = std::cell::Cell::new(0);
            let error = check(|_| asked.replace(asked.get() + 1) != index).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
        check(|_| true).unwrap();
    }
}
