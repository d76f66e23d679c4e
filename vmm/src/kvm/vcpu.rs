//! One virtual CPU: its descriptor, its first registers, and what its exits mean.
#![expect(unsafe_code, reason = "reads the union in kvm_run")]

use std::io;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_EXIT_INTERNAL_ERROR, KVM_INTERNAL_ERROR_EMULATION,
    KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN,
    kvm_lapic_state, kvm_segment,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::run_page::RunPage;
use super::{KvmError, call, hwcr};
use crate::boot::{BootRegisters, Mode};
use crate::devices::{Devices, Effect};
use crate::memory::Memory;

/// What one turn in the guest came to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// An exit was handled; its completion is pending until the next turn.
    Handled,
    /// A kick: nothing is pending.
    Kicked,
    /// The guest asked for power-off or reset.
    PowerOff,
    /// The guest or KVM failed: what happened, in a few words.
    Failed(String),
}

/// A virtual CPU. Only one thread at a time may use it.
#[derive(Debug)]
pub(crate) struct Vcpu {
    index: u8,
    fd: VcpuFd,
    page: Arc<RunPage>,
}

impl Vcpu {
    pub(crate) fn new(index: u8, fd: VcpuFd) -> io::Result<Self> {
        // SAFETY: the descriptor is open: `fd` owns it and is borrowed for the call.
        let borrowed = unsafe { std::os::fd::BorrowedFd::borrow_raw(std::os::fd::AsRawFd::as_raw_fd(&fd)) };
        let page = Arc::new(RunPage::map(borrowed)?);
        Ok(Self { index, fd, page })
    }

    pub(crate) fn index(&self) -> u8 {
        self.index
    }

    pub(crate) fn fd(&self) -> &VcpuFd {
        &self.fd
    }

    /// The page through which other threads kick it.
    pub(crate) fn page(&self) -> &Arc<RunPage> {
        &self.page
    }

    /// Sets what CPUID says, and the register that a guest compares with it.
    pub(crate) fn set_cpuid(&self, entries: &CpuId) -> Result<(), KvmError> {
        self.fd.set_cpuid2(entries).map_err(call("KVM_SET_CPUID2"))?;
        hwcr::promise_constant_rate(&self.fd, entries)
    }

    /// Lets the guest know that it was paused, so that its watchdogs do not take the gap for a hang.
    pub(crate) fn tell_guest_it_stood_still(&self) -> Result<(), KvmError> {
        match self.fd.kvmclock_ctrl() {
            // A guest that does not use the paravirtual clock cannot be told.
            Err(e) if e.errno() == libc::EINVAL => Ok(()),
            other => other.map_err(call("KVM_KVMCLOCK_CTRL")),
        }
    }

    /// Sets the registers that the boot protocol asks for: flat segments, no interrupts, and either 32-bit protected mode without
    /// paging (Xen, docs/misc/pvh.pandoc) or 64-bit mode (the kernel's Documentation/arch/x86/boot.rst).
    pub(crate) fn set_boot_registers(&self, boot: &BootRegisters) -> Result<(), KvmError> {
        let mut regs = self.fd.get_regs().map_err(call("KVM_GET_REGS"))?;
        (regs.rip, regs.rflags) = (boot.entry, 2);
        match boot.mode {
            Mode::Protected => regs.rbx = boot.info,
            Mode::Long { .. } => regs.rsi = boot.info,
        }
        self.fd.set_regs(&regs).map_err(call("KVM_SET_REGS"))?;

        let long = matches!(boot.mode, Mode::Long { .. });
        let flat = |type_, selector, long: bool| kvm_segment {
            base: 0,
            limit: 0xffff_ffff,
            selector,
            type_,
            present: 1,
            dpl: 0,
            db: u8::from(!long),
            l: u8::from(long),
            s: 1,
            g: 1,
            ..Default::default()
        };
        let mut sregs = self.fd.get_sregs().map_err(call("KVM_GET_SREGS"))?;
        sregs.cs = flat(11, boot.code_selector, long);
        let data = flat(3, boot.data_selector, false);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = kvm_segment {
            limit: 0x67,
            type_: 11,
            selector: boot.tss_selector,
            present: 1,
            ..Default::default()
        };
        (sregs.gdt.base, sregs.gdt.limit) = (boot.gdt_base, boot.gdt_limit);
        (sregs.idt.base, sregs.idt.limit) = (0, 0);
        match boot.mode {
            // Protected mode (PE) with the bit that says "387" (ET, always one); no paging, no extensions.
            Mode::Protected => (sregs.cr0, sregs.cr4, sregs.efer) = (0x11, 0, 0),
            // Paging (PG) with physical-address extensions (PAE), long mode enabled and active (LME, LMA).
            Mode::Long { page_tables } => {
                (sregs.cr0, sregs.cr4, sregs.efer) = (0x8000_0011, 1 << 5, 1 << 8 | 1 << 10);
                sregs.cr3 = page_tables;
            }
        }
        self.fd.set_sregs(&sregs).map_err(call("KVM_SET_SREGS"))
    }

    /// Routes LINT0 to the old interrupt controller and LINT1 to NMI, as firmware leaves them for the boot processor.
    pub(crate) fn set_virtual_wire(&self) -> Result<(), KvmError> {
        let mut lapic = self.fd.get_lapic().map_err(call("KVM_GET_LAPIC"))?;
        // Intel SDM volume 3, 11.5.1: LVT LINT0 at 0x350 with delivery mode ExtINT, LINT1 at 0x360 with NMI.
        set_lvt(&mut lapic, 0x350, 0x700);
        set_lvt(&mut lapic, 0x360, 0x400);
        self.fd.set_lapic(&lapic).map_err(call("KVM_SET_LAPIC"))
    }

    /// Runs the guest until its next exit and answers that exit.
    pub(crate) fn turn(&mut self, devices: &Devices) -> Turn {
        match self.fd.run() {
            Ok(VcpuExit::IoOut(port, data)) => match devices.write(port, self.page.io_access_bytes(), data) {
                Effect::None => Turn::Handled,
                Effect::PowerOff => Turn::PowerOff,
            },
            Ok(VcpuExit::IoIn(port, data)) => {
                devices.read(port, self.page.io_access_bytes(), data);
                Turn::Handled
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                devices.bus().read(address, data);
                Turn::Handled
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                devices.bus().write(address, data);
                Turn::Handled
            }
            Ok(VcpuExit::Intr) => Turn::Handled,
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET | KVM_SYSTEM_EVENT_SHUTDOWN, _)) => {
                Turn::PowerOff
            }
            Ok(VcpuExit::Shutdown) => Turn::Failed("triple fault".to_owned()),
            Ok(VcpuExit::InternalError) => self.internal_error(),
            Ok(other) => Turn::Failed(format!("KVM exit {other:?}, which this monitor has no use for")),
            Err(e) if e.errno() == libc::EINTR => Turn::Kicked,
            // A virtual CPU that another one has just started reports EAGAIN once.
            Err(e) if e.errno() == libc::EAGAIN => Turn::Handled,
            Err(e) => Turn::Failed(format!("KVM_RUN failed: {e}")),
        }
    }

    fn internal_error(&mut self) -> Turn {
        let run = self.fd.get_kvm_run();
        if run.exit_reason != KVM_EXIT_INTERNAL_ERROR {
            return Turn::Failed("internal error of KVM".to_owned());
        }
        // SAFETY: the exit reason says that this member of the union is the one KVM filled in; it is plain numbers.
        let internal = unsafe { run.__bindgen_anon_1.internal };
        let mut what = format!("internal error of KVM, suberror {}", internal.suberror);
        if internal.suberror == KVM_INTERNAL_ERROR_EMULATION {
            // SAFETY: the suberror says that this member of the union is filled in; it is plain numbers.
            let emulation = unsafe { run.__bindgen_anon_1.emulation_failure };
            if emulation.ndata >= 3
                && emulation.flags & u64::from(KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES) != 0
            {
                // SAFETY: the flag says that the instruction's bytes are filled in; they are plain numbers.
                let insn = unsafe { emulation.__bindgen_anon_1.__bindgen_anon_1 };
                let bytes = &insn.insn_bytes[..usize::from(insn.insn_size).min(insn.insn_bytes.len())];
                what = format!("{what}: an instruction that it cannot emulate, {}", hex::encode(bytes));
            }
        }
        Turn::Failed(what)
    }

    /// Writes registers and the bytes at the instruction pointer to the log.
    pub(crate) fn log_failure(&self, what: &str, memory: &Memory) {
        let (regs, sregs) = match (self.fd.get_regs(), self.fd.get_sregs()) {
            (Ok(regs), Ok(sregs)) => (regs, sregs),
            (Err(error), _) | (_, Err(error)) => {
                tracing::error!(vcpu = self.index, what, %error, "the guest failed, and its registers cannot be read");
                return;
            }
        };
        let linear = sregs.cs.base.wrapping_add(regs.rip);
        let code = match self.fd.translate_gva(linear) {
            Ok(at) if at.valid != 0 => hex::encode(memory.peek(at.physical_address, 16)),
            Ok(_) => "not mapped".to_owned(),
            Err(error) => format!("not readable: {error}"),
        };
        tracing::error!(vcpu = self.index, what, code, ?regs, ?sregs, "the guest failed");
    }
}

fn set_lvt(lapic: &mut kvm_lapic_state, offset: usize, value: u32) {
    for (slot, byte) in lapic.regs[offset..offset + 4].iter_mut().zip(value.to_le_bytes()) {
        *slot = byte.cast_signed();
    }
}
