//! AMD's hardware configuration register (HWCR, MSR 0xC001_0015): the one bit of it that a guest's kernel looks at.
//!
//! Bit 24 (TscFreqSel, AMD64 Architecture Programmer's Manual volume 2, appendix A, and the processors' PPRs) says that the time-stamp counter
//! counts with the frequency of P0. Every processor with an invariant counter has it set, so Linux calls a machine without it buggy firmware
//! ("TSC doesn't count with P0 frequency!"). KVM leaves it clear and lets the monitor set it, since Linux 6.8; to set it is firmware's job,
//! and there is none here.

use kvm_bindings::{CpuId, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use super::state::{ADVANCED_POWER_MANAGEMENT, INVARIANT_TSC};
use super::{KvmError, call};

/// The register.
pub(super) const MSR_HWCR: u32 = 0xc001_0015;
const TSC_FREQ_SEL: u64 = 1 << 24;

/// AuthenticAMD and HygonGenuine: the first four bytes, as leaf 0 has them in EBX.
const VENDORS: [u32; 2] = [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"Hygo")];

/// Sets the bit, if the guest sees a processor of AMD's or Hygon's whose counter is invariant and KVM lets it be set.
pub(super) fn promise_constant_rate(fd: &VcpuFd, cpuid: &CpuId) -> Result<(), KvmError> {
    if !expects_it(cpuid) {
        return Ok(());
    }
    let mut now = one(MSR_HWCR, 0);
    let value = match fd.get_msrs(&mut now).map_err(call("KVM_GET_MSRS"))? {
        1 => now.as_slice()[0].data | TSC_FREQ_SEL,
        _ => return Ok(()),
    };
    if fd.set_msrs(&one(MSR_HWCR, value)).map_err(call("KVM_SET_MSRS"))? == 0 {
        tracing::debug!(
            "this KVM does not let HWCR.TscFreqSel be set: Linux guests will warn of their firmware"
        );
    }
    Ok(())
}

/// Loads a saved value that KVM has refused, but for the bit: a KVM before Linux 6.8 does not know it, and a guest reads it when it boots
/// and never again. Whether that went well.
pub(super) fn load_without(fd: &VcpuFd, saved: &kvm_msr_entry) -> Result<bool, KvmError> {
    if saved.index != MSR_HWCR || saved.data & TSC_FREQ_SEL == 0 {
        return Ok(false);
    }
    let written = fd.set_msrs(&one(MSR_HWCR, saved.data & !TSC_FREQ_SEL)).map_err(call("KVM_SET_MSRS"))?;
    Ok(written == 1)
}

fn expects_it(cpuid: &CpuId) -> bool {
    let leaf = |function| cpuid.as_slice().iter().find(|entry| entry.function == function);
    leaf(0).is_some_and(|entry| VENDORS.contains(&entry.ebx))
        && leaf(ADVANCED_POWER_MANAGEMENT).is_some_and(|entry| entry.edx & INVARIANT_TSC != 0)
}

fn one(index: u32, data: u64) -> Msrs {
    Msrs::from_entries(&[kvm_msr_entry { index, data, ..Default::default() }])
        .expect("one entry is within the bound")
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_cpuid_entry2;

    use super::*;

    #[test]
    fn amds_processors_with_an_invariant_counter_have_the_bit() {
        let cpuid = |vendor: &[u8; 4], edx| {
            let ebx = u32::from_le_bytes(*vendor);
            let vendor = kvm_cpuid_entry2 { function: 0, ebx, ..Default::default() };
            let power = kvm_cpuid_entry2 { function: ADVANCED_POWER_MANAGEMENT, edx, ..Default::default() };
            CpuId::from_entries(&[vendor, power]).unwrap()
        };
        assert!(expects_it(&cpuid(b"Auth", INVARIANT_TSC)));
        assert!(expects_it(&cpuid(b"Hygo", INVARIANT_TSC | 1)));
        assert!(!expects_it(&cpuid(b"Auth", 1)), "its rate may change");
        assert!(!expects_it(&cpuid(b"Genu", INVARIANT_TSC)), "Intel has no such register");
        assert!(!expects_it(&CpuId::from_entries(&[]).unwrap()));
    }
}
