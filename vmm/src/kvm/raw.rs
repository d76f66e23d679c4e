//! The ioctls that need care or that `kvm_ioctls` lacks: vector state of any size, system registers with the page-directory pointers, the
//! offset of the time-stamp counter.
#![expect(unsafe_code, reason = "hands structures to ioctls of KVM")]

use std::io;

use kvm_bindings::{
    KVM_CAP_SREGS2, KVM_SREGS2_FLAGS_PDPTRS_VALID, KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, Xsave,
    kvm_device_attr, kvm_sregs, kvm_sregs2,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_ior_nr, ioctl_iow_nr};
use zerocopy::{FromBytes as _, IntoBytes as _};

use super::{KvmError, call};
use crate::limits::{STATE_XSAVE_MAX_BYTES, STATE_XSAVE_MIN_BYTES};

ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, kvm_sregs2);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
ioctl_iow_nr!(KVM_HAS_DEVICE_ATTR, KVMIO, 0xe3, kvm_device_attr);

/// How many bytes KVM reads and writes as a virtual CPU's vector state.
fn xsave_bytes(kvm: &Kvm) -> Result<usize, KvmError> {
    let bytes = usize::try_from(kvm.check_extension_int(Cap::Xsave2)).unwrap_or(0).max(STATE_XSAVE_MIN_BYTES);
    if bytes > STATE_XSAVE_MAX_BYTES {
        return Err(KvmError::XsaveSize { bytes, most: STATE_XSAVE_MAX_BYTES });
    }
    Ok(bytes)
}

fn xsave_buffer(bytes: usize) -> Xsave {
    let extra = (bytes - STATE_XSAVE_MIN_BYTES).div_ceil(size_of::<u32>());
    Xsave::new(extra).expect("a few kibibytes are within the wrapper's bound")
}

/// The vector state: at least 4 KiB, and more where the processor has more.
pub(super) fn xsave(kvm: &Kvm, fd: &VcpuFd) -> Result<Vec<u8>, KvmError> {
    let bytes = xsave_bytes(kvm)?;
    if bytes == STATE_XSAVE_MIN_BYTES {
        let xsave = fd.get_xsave().map_err(call("KVM_GET_XSAVE"))?;
        return Ok(xsave.region.as_bytes().to_vec());
    }
    let mut xsave = xsave_buffer(bytes);
    // SAFETY: the buffer has the size that KVM has just named, and it cannot have grown since: this process never asks for
    // dynamically enabled features with arch_prctl.
    unsafe { fd.get_xsave2(&mut xsave) }.map_err(call("KVM_GET_XSAVE2"))?;
    let whole = xsave.as_fam_struct_ref();
    Ok([whole.xsave.region.as_bytes(), xsave.as_slice().as_bytes()].concat())
}

/// Puts vector state in that may have been taken on a processor with more or less of it: what this one lacks must be empty.
pub(super) fn set_xsave(kvm: &Kvm, fd: &VcpuFd, saved: &[u8]) -> Result<(), KvmError> {
    let bytes = xsave_bytes(kvm)?;
    if saved.iter().skip(bytes).any(|byte| *byte != 0) {
        return Err(KvmError::XsaveSize { bytes: saved.len(), most: bytes });
    }
    let mut xsave = xsave_buffer(bytes);
    let mut words = saved.chunks_exact(4).map(|word| u32::read_from_bytes(word).expect("four bytes"));
    // SAFETY: only the contents are written, never the length that the wrapper keeps.
    let whole = unsafe { xsave.as_mut_fam_struct() };
    for (slot, word) in whole.xsave.region.iter_mut().zip(&mut words) {
        *slot = word;
    }
    for (slot, word) in xsave.as_mut_slice().iter_mut().zip(words) {
        *slot = word;
    }
    // SAFETY: KVM reads as many bytes as it has named, and the buffer has as many.
    unsafe { fd.set_xsave2(&xsave) }.map_err(call("KVM_SET_XSAVE"))
}

/// The page-directory pointers, where the guest's paging mode (PAE, 32 bits) has them: they are loaded when CR3 is, and the table in
/// memory may have changed since.
pub(super) fn pdptrs(kvm: &Kvm, fd: &VcpuFd) -> Result<Option<[u64; 4]>, KvmError> {
    if kvm.check_extension_raw(KVM_CAP_SREGS2.into()) <= 0 {
        return Ok(None);
    }
    let mut sregs = kvm_sregs2::default();
    // SAFETY: KVM writes one structure of this type, which is plain numbers.
    if unsafe { ioctl_with_mut_ref(fd, KVM_GET_SREGS2(), &mut sregs) } != 0 {
        return Err(last("KVM_GET_SREGS2"));
    }
    let valid = sregs.flags & u64::from(KVM_SREGS2_FLAGS_PDPTRS_VALID) != 0;
    Ok(valid.then_some(sregs.pdptrs))
}

/// Sets the system registers. Without page-directory pointers, KVM takes those of the table in memory.
pub(super) fn set_sregs(
    kvm: &Kvm,
    fd: &VcpuFd,
    saved: &kvm_sregs,
    pdptrs: Option<[u64; 4]>,
) -> Result<(), KvmError> {
    let Some(pdptrs) = pdptrs.filter(|_| kvm.check_extension_raw(KVM_CAP_SREGS2.into()) > 0) else {
        return fd.set_sregs(saved).map_err(call("KVM_SET_SREGS"));
    };
    let kvm_sregs {
        cs, ds, es, fs, gs, ss, tr, ldt, gdt, idt, cr0, cr2, cr3, cr4, cr8, efer, apic_base, ..
    } = *saved;
    let flags = KVM_SREGS2_FLAGS_PDPTRS_VALID.into();
    #[rustfmt::skip]
    let sregs = kvm_sregs2 {
        cs, ds, es, fs, gs, ss, tr, ldt, gdt, idt, cr0, cr2, cr3, cr4, cr8, efer, apic_base, flags, pdptrs,
    };
    // SAFETY: KVM reads one structure of this type.
    if unsafe { ioctl_with_ref(fd, KVM_SET_SREGS2(), &sregs) } != 0 {
        return Err(last("KVM_SET_SREGS2"));
    }
    Ok(())
}

/// What the guest's time-stamp counter is ahead of the host's (Linux, Documentation/virt/kvm/devices/vcpu.rst, 4.1); none where KVM is too
/// old to tell.
pub(super) fn tsc_offset(fd: &VcpuFd) -> Result<Option<u64>, KvmError> {
    let mut offset = 0u64;
    let attribute = tsc_offset_attribute(std::ptr::from_mut(&mut offset).expose_provenance());
    // SAFETY: KVM reads one structure of this type, and does not look at the address in it.
    if unsafe { ioctl_with_ref(fd, KVM_HAS_DEVICE_ATTR(), &attribute) } != 0 {
        return Ok(None);
    }
    // SAFETY: KVM writes one u64 at the address, which is that of `offset`.
    if unsafe { ioctl_with_ref(fd, KVM_GET_DEVICE_ATTR(), &attribute) } != 0 {
        return Err(last("KVM_GET_DEVICE_ATTR(KVM_VCPU_TSC_OFFSET)"));
    }
    Ok(Some(offset))
}

/// Sets it.
pub(super) fn set_tsc_offset(fd: &VcpuFd, offset: u64) -> Result<(), KvmError> {
    let attribute = tsc_offset_attribute(std::ptr::from_ref(&offset).expose_provenance());
    // SAFETY: KVM reads one u64 at the address, which is that of `offset`.
    if unsafe { ioctl_with_ref(fd, KVM_SET_DEVICE_ATTR(), &attribute) } != 0 {
        return Err(last("KVM_SET_DEVICE_ATTR(KVM_VCPU_TSC_OFFSET)"));
    }
    Ok(())
}

fn tsc_offset_attribute(address: usize) -> kvm_device_attr {
    let (group, attr) = (KVM_VCPU_TSC_CTRL, u64::from(KVM_VCPU_TSC_OFFSET));
    kvm_device_attr { group, attr, addr: address as u64, ..Default::default() }
}

fn last(call: &'static str) -> KvmError {
    KvmError::Call { call, source: io::Error::last_os_error() }
}
