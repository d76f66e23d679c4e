//! Taking the state of virtual CPUs, interrupt controllers, timers and clock out of KVM, and putting it in.
//!
//! The order matters in both directions (found in KVM's source and proven by moving guests):
//! - MP_STATE is read first, for reading it settles pending start-up events; VCPU_EVENTS last.
//! - CPUID before everything that it governs. SREGS before LAPIC, for they hold the APIC's mode. LAPIC before MSRS, or the
//!   TSC-deadline timer never fires again; within them the deadline comes last, for it counts by the others. REGS clear pending
//!   exceptions, so VCPU_EVENTS come after them.

use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, Msrs,
    kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vm_superio::serial::SerialState;

use super::time::{MSR_TSC, Moment};
use super::{KvmError, call, hwcr, raw};

/// Everything but memory.
#[derive(Debug)]
pub(crate) struct MachineState {
    /// The paravirtual clock when the machine was paused, nanoseconds.
    pub(crate) clock_ns: u64,
    pub(crate) chips: ChipState,
    pub(crate) serial: SerialState,
    /// The devices that the machine was given, in its order.
    pub(crate) devices: Vec<DeviceState>,
    pub(crate) vcpus: Vec<VcpuState>,
}

/// One device's state, in a form of the device's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DeviceState {
    /// What it is: a virtio device id (virtio 1.2, section 5).
    pub(crate) kind: u32,
    /// At most [`crate::limits::STATE_DEVICE_MAX_BYTES`].
    pub(crate) bytes: Vec<u8>,
}

/// The interrupt controllers (two PICs and the I/O APIC) and the timer.
#[derive(Debug)]
pub(crate) struct ChipState {
    pub(crate) irqchips: [kvm_irqchip; 3],
    pub(crate) pit: kvm_pit_state2,
}

/// One virtual CPU.
#[derive(Debug)]
pub(crate) struct VcpuState {
    pub(crate) cpuid: Vec<kvm_cpuid_entry2>,
    /// 0 where KVM does not know it.
    pub(crate) tsc_khz: u32,
    pub(crate) mp_state: kvm_mp_state,
    pub(crate) regs: kvm_regs,
    pub(crate) sregs: kvm_sregs,
    /// The page-directory pointers, where the guest's paging mode has them and KVM tells them.
    pub(crate) pdptrs: Option<[u64; 4]>,
    /// [`crate::limits::STATE_XSAVE_MIN_BYTES`] or more.
    pub(crate) xsave: Vec<u8>,
    pub(crate) xcrs: kvm_xcrs,
    pub(crate) debug: kvm_debugregs,
    pub(crate) lapic: kvm_lapic_state,
    pub(crate) msrs: Vec<kvm_msr_entry>,
    pub(crate) events: kvm_vcpu_events,
}

/// IA32_TSC_DEADLINE (Intel SDM volume 4, table 2-2).
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// CPUID 0x80000007: EDX bit 8 says that the counter's rate never changes, which makes Linux prefer it to the paravirtual clock.
pub(super) const ADVANCED_POWER_MANAGEMENT: u32 = 0x8000_0007;
pub(super) const INVARIANT_TSC: u32 = 1 << 8;

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// How far apart two hosts' TSC rates may be without scaling, parts per million: what NTP corrects.
const TSC_TOLERANCE_PPM: u64 = 250;

impl ChipState {
    pub(crate) fn save(vm: &VmFd) -> Result<Self, KvmError> {
        let mut irqchips = CHIPS.map(|chip_id| kvm_irqchip { chip_id, ..Default::default() });
        for chip in &mut irqchips {
            vm.get_irqchip(chip).map_err(call("KVM_GET_IRQCHIP"))?;
        }
        Ok(Self { irqchips, pit: vm.get_pit2().map_err(call("KVM_GET_PIT2"))? })
    }

    pub(crate) fn load(&self, vm: &VmFd) -> Result<(), KvmError> {
        vm.set_pit2(&self.pit).map_err(call("KVM_SET_PIT2"))?;
        for (chip, chip_id) in self.irqchips.iter().zip(CHIPS) {
            let chip = kvm_irqchip { chip_id, ..*chip };
            vm.set_irqchip(&chip).map_err(call("KVM_SET_IRQCHIP"))?;
        }
        Ok(())
    }
}

impl MachineState {
    /// When it was paused.
    pub(crate) fn time(&self) -> Moment {
        Moment { clock_ns: self.clock_ns, tsc: self.tsc() }
    }

    /// The first virtual CPU's time-stamp counter.
    fn tsc(&self) -> Option<u64> {
        self.vcpus.first().and_then(VcpuState::tsc)
    }

    /// Sets the counters back to what they were when the first one read `tsc`: at the pause, and not when the state was taken.
    pub(crate) fn set_back_tsc(&mut self, tsc: u64) {
        let Some(ticks) = self.tsc().map(|now| now.wrapping_sub(tsc)) else { return };
        let msrs = self.vcpus.iter_mut().flat_map(|vcpu| &mut vcpu.msrs);
        msrs.filter(|msr| msr.index == MSR_TSC).for_each(|msr| msr.data = msr.data.wrapping_sub(ticks));
    }
}

impl VcpuState {
    fn tsc(&self) -> Option<u64> {
        self.msrs.iter().find(|msr| msr.index == MSR_TSC).map(|msr| msr.data)
    }

    pub(crate) fn save(kvm: &Kvm, fd: &VcpuFd) -> Result<Self, KvmError> {
        let mp_state = fd.get_mp_state().map_err(call("KVM_GET_MP_STATE"))?;
        let regs = fd.get_regs().map_err(call("KVM_GET_REGS"))?;
        let sregs = fd.get_sregs().map_err(call("KVM_GET_SREGS"))?;
        let pdptrs = raw::pdptrs(kvm, fd)?;
        let xsave = raw::xsave(kvm, fd)?;
        let xcrs = fd.get_xcrs().map_err(call("KVM_GET_XCRS"))?;
        let debug = fd.get_debug_regs().map_err(call("KVM_GET_DEBUGREGS"))?;
        let lapic = fd.get_lapic().map_err(call("KVM_GET_LAPIC"))?;
        let tsc_khz = match fd.get_tsc_khz() {
            Ok(khz) => khz,
            Err(error) => {
                tracing::debug!(%error, "KVM does not know the time-stamp counter's rate");
                0
            }
        };
        let cpuid = fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).map_err(call("KVM_GET_CPUID2"))?;
        let msrs = save_msrs(kvm, fd)?;
        let events = fd.get_vcpu_events().map_err(call("KVM_GET_VCPU_EVENTS"))?;
        let cpuid = cpuid.as_slice().to_vec();
        Ok(Self { cpuid, tsc_khz, mp_state, regs, sregs, pdptrs, xsave, xcrs, debug, lapic, msrs, events })
    }

    pub(crate) fn load(&self, kvm: &Kvm, fd: &VcpuFd) -> Result<(), KvmError> {
        super::cpu::check_entries(kvm, fd, &self.cpuid)?;
        let cpuid = CpuId::from_entries(&self.cpuid).expect("bounded when it was decoded");
        fd.set_cpuid2(&cpuid).map_err(call("KVM_SET_CPUID2"))?;
        self.load_tsc_rate(kvm, fd)?;
        fd.set_mp_state(self.mp_state).map_err(call("KVM_SET_MP_STATE"))?;
        fd.set_regs(&self.regs).map_err(call("KVM_SET_REGS"))?;
        raw::set_sregs(kvm, fd, &self.sregs, self.pdptrs)?;
        raw::set_xsave(kvm, fd, &self.xsave)?;
        fd.set_xcrs(&self.xcrs).map_err(call("KVM_SET_XCRS"))?;
        fd.set_debug_regs(&self.debug).map_err(call("KVM_SET_DEBUGREGS"))?;
        fd.set_lapic(&self.lapic).map_err(call("KVM_SET_LAPIC"))?;
        let (deadline, others): (Vec<_>, Vec<_>) =
            self.msrs.iter().copied().partition(|msr| msr.index == MSR_TSC_DEADLINE);
        load_msrs(fd, &others)?;
        load_msrs(fd, &deadline)?;
        fd.set_vcpu_events(&self.events).map_err(call("KVM_SET_VCPU_EVENTS"))
    }

    fn load_tsc_rate(&self, kvm: &Kvm, fd: &VcpuFd) -> Result<(), KvmError> {
        let (saved, here) = (u64::from(self.tsc_khz), u64::from(fd.get_tsc_khz().unwrap_or(0)));
        if saved == 0 || here == 0 || saved.abs_diff(here) * 1_000_000 <= here * TSC_TOLERANCE_PPM {
            return Ok(());
        }
        if kvm.check_extension(Cap::TscControl) {
            return fd.set_tsc_khz(self.tsc_khz).map_err(call("KVM_SET_TSC_KHZ"));
        }
        let invariant =
            |e: &kvm_cpuid_entry2| e.function == ADVANCED_POWER_MANAGEMENT && e.edx & INVARIANT_TSC != 0;
        if self.cpuid.iter().any(invariant) {
            return Err(KvmError::TscRate { saved_khz: saved, here_khz: here });
        }
        tracing::warn!(
            saved_khz = saved,
            here_khz = here,
            "this host cannot give the VM's time-stamp counter its old rate; it was never told that the rate does not change, and keeps time \
             by the paravirtual clock"
        );
        Ok(())
    }
}

/// All that KVM lists and this host can read.
fn save_msrs(kvm: &Kvm, fd: &VcpuFd) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let list = kvm.get_msr_index_list().map_err(call("KVM_GET_MSR_INDEX_LIST"))?;
    let wanted: Vec<_> =
        list.as_slice().iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut saved = Vec::with_capacity(wanted.len());
    let mut left = wanted.as_slice();
    while !left.is_empty() {
        let mut batch = Msrs::from_entries(left).expect("KVM's own list is within KVM's own bound");
        let read = fd.get_msrs(&mut batch).map_err(call("KVM_GET_MSRS"))?;
        saved.extend_from_slice(&batch.as_slice()[..read]);
        if let Some(refused) = left.get(read) {
            // Listed for this kernel, but not there for this CPU: it holds nothing to save.
            tracing::debug!(
                index = refused.index,
                "KVM lists a model-specific register that it does not read"
            );
        }
        left = left.get(read + 1..).unwrap_or_default();
    }
    Ok(saved)
}

fn load_msrs(fd: &VcpuFd, msrs: &[kvm_msr_entry]) -> Result<(), KvmError> {
    let mut left = msrs;
    while !left.is_empty() {
        let batch = Msrs::from_entries(left).expect("bounded when it was decoded");
        let written = fd.set_msrs(&batch).map_err(call("KVM_SET_MSRS"))?;
        if let Some(refused) = left.get(written) {
            accept_refusal(fd, refused)?;
        }
        left = left.get(written + 1..).unwrap_or_default();
    }
    Ok(())
}

/// A register that cannot be written may be left alone if it holds the value anyway, or if the value says nothing.
fn accept_refusal(fd: &VcpuFd, refused: &kvm_msr_entry) -> Result<(), KvmError> {
    let mut now = Msrs::from_entries(&[kvm_msr_entry { index: refused.index, ..Default::default() }])
        .expect("one entry is within the bound");
    let readable = fd.get_msrs(&mut now).map_err(call("KVM_GET_MSRS"))? == 1;
    let there = readable && now.as_slice()[0].data == refused.data;
    if refused.data == 0 || there || hwcr::load_without(fd, refused)? {
        return Ok(());
    }
    Err(KvmError::Msr { index: refused.index, value: refused.data })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_set_back_together() {
        let msr = |index, data| kvm_msr_entry { index, data, ..Default::default() };
        let vcpu = |tsc| VcpuState {
            cpuid: Vec::new(),
            tsc_khz: 0,
            mp_state: Default::default(),
            regs: Default::default(),
            sregs: Default::default(),
            pdptrs: None,
            xsave: Vec::new(),
            xcrs: Default::default(),
            debug: Default::default(),
            lapic: Default::default(),
            msrs: vec![msr(0x174, 7), msr(MSR_TSC, tsc), msr(MSR_TSC_DEADLINE, 9_000)],
            events: Default::default(),
        };
        let mut state = MachineState {
            clock_ns: 0,
            chips: ChipState { irqchips: Default::default(), pit: Default::default() },
            serial: SerialState::default(),
            devices: Vec::new(),
            vcpus: vec![vcpu(5_000), vcpu(5_010)],
        };
        state.set_back_tsc(1_000);
        let counters: Vec<_> = state.vcpus.iter().filter_map(VcpuState::tsc).collect();
        assert_eq!(counters, [1_000, 1_010]);
        assert!(state.vcpus.iter().all(|vcpu| vcpu.msrs[0].data == 7 && vcpu.msrs[2].data == 9_000));
    }
}
