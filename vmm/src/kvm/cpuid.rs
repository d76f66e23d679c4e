//! What CPUID tells the guest: named templates, and KVM's paravirtual features.
//!
//! Leaves and bits as in Intel's SDM volume 2 (CPUID) and AMD's APM volume 3, appendix E; KVM's own leaves as in the kernel's
//! Documentation/virt/kvm/x86/cpuid.rst.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm, VcpuFd};

use super::{KvmError, call};
use crate::config::CpuTemplate;

const KVM_FEATURES: u32 = 0x4000_0001;

/// KVM's paravirtual features that guests see: the clock (bit 0), its second register layout (3), and the word that it is
/// stable across virtual CPUs (24). The others (paravirtual IPIs, yields, unhalt, asynchronous faults, stolen time) change nothing
/// about what a guest computes, and each one is one more thing that a destination must have: they are masked.
pub const PARAVIRTUAL_FEATURES: u32 = 1 | 1 << 3 | 1 << 24;

const HYPERVISOR: u32 = 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPER_THREADING: u32 = 1 << 28;

/// x86-64-v2 in leaf 1 ECX (SSE3, SSSE3, CX16, SSE4.1, SSE4.2, POPCNT), and what is KVM's own: x2APIC, TSC deadline, hypervisor.
const V2_1_ECX: u32 =
    1 | 1 << 9 | 1 << 13 | 1 << 19 | 1 << 20 | 1 << 23 | 1 << 21 | TSC_DEADLINE | HYPERVISOR;
/// The x86-64 baseline in leaf 1 EDX: all up to PSE36, CLFLUSH, MMX, FXSR, SSE, SSE2, and the number of logical CPUs.
const V2_1_EDX: u32 = 0x0003_fbff | 1 << 19 | 1 << 23 | 1 << 24 | 1 << 25 | 1 << 26 | HYPER_THREADING;
/// LAHF in long mode.
const V2_EXT_ECX: u32 = 1;
/// SYSCALL, NX, long mode, and AMD's repetition of leaf 1 EDX.
const V2_EXT_EDX: u32 = 1 << 11 | 1 << 20 | 1 << 29 | 0x0183_f3ff;
/// The highest leaves that v2 shows.
const V2_LAST: u32 = 0xb;
const V2_EXT_LAST: u32 = 0x8000_0008;

/// The entries for virtual CPU `index` of `cpus`.
/// # Errors
/// If KVM does not say what it supports.
pub fn entries(kvm: &Kvm, template: CpuTemplate, index: u8, cpus: u8) -> Result<CpuId, KvmError> {
    let mut cpuid =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(call("KVM_GET_SUPPORTED_CPUID"))?;
    let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
    for entry in cpuid.as_mut_slice() {
        match template {
            CpuTemplate::Host => {}
            CpuTemplate::V2 => mask_v2(entry),
        }
        set_own(entry, index, cpus, deadline);
    }
    Ok(cpuid)
}

/// What differs from CPU to CPU, and what KVM leaves to the monitor.
fn set_own(entry: &mut kvm_cpuid_entry2, index: u8, cpus: u8, deadline: bool) {
    let (id, count) = (u32::from(index), u32::from(cpus));
    match entry.function {
        1 => {
            entry.ebx = entry.ebx & 0x0000_ffff | count << 16 | id << 24;
            entry.ecx |= HYPERVISOR | if deadline { TSC_DEADLINE } else { 0 };
            entry.edx = entry.edx & !HYPER_THREADING | if cpus > 1 { HYPER_THREADING } else { 0 };
        }
        // Caches are each CPU's own, and each CPU is a core of one package.
        4 => entry.eax = entry.eax & 0x0000_3fff | (count - 1).min(63) << 26,
        0xb | 0x1f => {
            let bits = u32::from(cpus).next_power_of_two().trailing_zeros();
            (entry.eax, entry.ebx, entry.ecx) = match entry.index {
                0 => (0, 1, 1 << 8),
                1 => (bits, count, 2 << 8 | 1),
                other => (0, 0, other),
            };
            entry.edx = id;
        }
        0x8000_0008 => entry.ecx = entry.ecx & !0xff | (count - 1),
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
        KVM_FEATURES => entry.eax &= PARAVIRTUAL_FEATURES,
        _ => {}
    }
}

/// Hides what is above x86-64-v2. A host may still show some of it (one without hardware virtualisation does).
fn mask_v2(entry: &mut kvm_cpuid_entry2) {
    let mut hide = |kept: bool| {
        if !kept {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
        }
    };
    match entry.function {
        0 => entry.eax = entry.eax.min(V2_LAST),
        1 => (entry.ecx, entry.edx) = (entry.ecx & V2_1_ECX, entry.edx & V2_1_EDX),
        // Vendor's cache and topology descriptions.
        2 | 4 | 0xb => {}
        0x8000_0000 => entry.eax = entry.eax.min(V2_EXT_LAST),
        0x8000_0001 => (entry.ecx, entry.edx) = (entry.ecx & V2_EXT_ECX, entry.edx & V2_EXT_EDX),
        // An invariant TSC.
        0x8000_0007 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, entry.edx & 1 << 8),
        // Address sizes.
        0x8000_0008 => (entry.ebx, entry.edx) = (0, 0),
        // Names, caches, and KVM's own leaves, which have a mask of their own.
        other => hide(matches!(other, 0x8000_0002..=0x8000_0006 | 0x4000_0000..=0x4fff_ffff)),
    }
}

/// Checks that this host can give a virtual CPU each feature that `saved` shows. Leaves `fd` with another CPUID.
///
/// The measure is what a virtual CPU shows that was given all that KVM supports: a KVM that lets the guest run natively in user
/// mode cannot hide some of the processor's features, shows them whatever it is told, and does not list them as supported.
/// # Errors
/// [`KvmError::CpuFeatures`] for the first register with bits that it lacks.
pub(crate) fn check_supported(kvm: &Kvm, fd: &VcpuFd, saved: &[kvm_cpuid_entry2]) -> Result<(), KvmError> {
    let supported =
        kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(call("KVM_GET_SUPPORTED_CPUID"))?;
    fd.set_cpuid2(&supported).map_err(call("KVM_SET_CPUID2"))?;
    let here = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(call("KVM_GET_CPUID2"))?;
    saved.iter().try_for_each(|entry| check_entry(entry, here.as_slice()))
}

fn check_entry(saved: &kvm_cpuid_entry2, here: &[kvm_cpuid_entry2]) -> Result<(), KvmError> {
    // The index means something only where the flag says so; elsewhere KVM leaves anything in it.
    let indexed = saved.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
    let same = |e: &&kvm_cpuid_entry2| e.function == saved.function && (!indexed || e.index == saved.index);
    let found = here.iter().find(same);
    let has = found.copied().unwrap_or_default();
    let all = u32::MAX;
    // Leaf 1's ECX: OSXSAVE (27) mirrors CR4, the TSC deadline and hypervisor bits are the monitor's; EDX: so is bit 28, and
    // bit 9 mirrors the APIC's base register. Leaf 7's and 0x80000001's registers are features throughout.
    let checks = match (saved.function, saved.index) {
        (1, _) => vec![
            ("ECX", saved.ecx & !has.ecx & !(HYPERVISOR | TSC_DEADLINE | 1 << 27)),
            ("EDX", saved.edx & !has.edx & !(HYPER_THREADING | 1 << 9)),
        ],
        (7, 0) => vec![
            ("EBX", saved.ebx & !has.ebx),
            // OSPKE mirrors CR4.
            ("ECX", saved.ecx & !has.ecx & !(1 << 4)),
            ("EDX", saved.edx & !has.edx & all),
        ],
        (7, 1) | (0xd, 1) => vec![("EAX", saved.eax & !has.eax)],
        // The vector state that XCR0 may enable.
        (0xd, 0) => vec![("EAX", saved.eax & !has.eax), ("EDX", saved.edx & !has.edx)],
        (0x8000_0001, _) => vec![("ECX", saved.ecx & !has.ecx), ("EDX", saved.edx & !has.edx)],
        (KVM_FEATURES, _) => vec![("EAX", saved.eax & !has.eax)],
        _ => Vec::new(),
    };
    match checks.into_iter().find(|(_, missing)| *missing != 0) {
        None => Ok(()),
        Some((register, missing)) => Err(KvmError::CpuFeatures { leaf: saved.function, register, missing }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full(function: u32, index: u32) -> kvm_cpuid_entry2 {
        let (eax, ebx, ecx, edx) = (u32::MAX, u32::MAX, u32::MAX, u32::MAX);
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    #[test]
    fn v2_hides_avx_and_shows_sse42() {
        let mut one = full(1, 0);
        mask_v2(&mut one);
        assert_eq!(one.ecx & 1 << 28, 0, "AVX");
        assert_eq!(one.ecx & 1 << 26, 0, "XSAVE");
        assert_ne!(one.ecx & 1 << 20, 0, "SSE4.2");
        let mut seven = full(7, 0);
        mask_v2(&mut seven);
        assert_eq!((seven.eax, seven.ebx, seven.ecx, seven.edx), (0, 0, 0, 0));
        let mut kvm = full(KVM_FEATURES, 0);
        mask_v2(&mut kvm);
        set_own(&mut kvm, 0, 1, true);
        assert_eq!(kvm.eax, PARAVIRTUAL_FEATURES);
    }

    #[test]
    fn each_cpu_has_its_own_id() {
        for index in 0..3 {
            let (mut one, mut topology) = (full(1, 0), full(0xb, 1));
            set_own(&mut one, index, 3, true);
            set_own(&mut topology, index, 3, true);
            assert_eq!(one.ebx >> 24, u32::from(index));
            assert_eq!(one.ebx >> 16 & 0xff, 3);
            assert_eq!((topology.eax, topology.ebx, topology.edx), (2, 3, u32::from(index)));
        }
    }

    #[test]
    fn a_missing_feature_is_named() {
        let mut here = full(7, 0);
        here.ebx = !(1 << 16);
        let error = check_entry(&full(7, 0), &[here]).unwrap_err();
        assert!(
            matches!(error, KvmError::CpuFeatures { leaf: 7, register: "EBX", missing: 0x1_0000 }),
            "{error}"
        );
        check_entry(&full(1, 0), &[full(1, 0)]).unwrap();
        check_entry(&full(2, 0), &[]).unwrap();
    }
}
