//! Resting until something is due: halted, so that the host's CPU is free, or spinning.
//!
//! Ring 3 cannot halt, but its `hlt` raises #GP, and the stub's handler halts for it with interrupts on. What ends the halt
//! is the local APIC's timer (Intel SDM volume 3, 10.5.4), one shot a halt, set from ring 3 through the APIC's
//! registers in memory. If it fires before the halt, it stays pending and the halt ends at once: none is lost.

use core::arch::asm;

use super::clock::Clock;
use super::pagestorm::limits;
use super::pagestorm::options::Idle;
use super::ports;

/// The local APIC's registers, and those that are used.
const APIC: u64 = 0xfee0_0000;
const SPURIOUS: u64 = 0xf0;
const LVT_TIMER: u64 = 0x320;
const LVT_LINT0: u64 = 0x350;
const LVT_LINT1: u64 = 0x360;
const INITIAL_COUNT: u64 = 0x380;
const CURRENT_COUNT: u64 = 0x390;
const DIVIDE: u64 = 0x3e0;
/// A local vector that never interrupts.
const MASKED: u32 = 1 << 16;
/// Our vectors: #GP is the CPU's, the others are free to choose.
const GENERAL_PROTECTION: usize = 13;
const TIMER: u8 = 0x40;
const SPURIOUS_VECTOR: u8 = 0xff;
/// The two 8259s' mask registers.
const PIC_MASKS: [u16; 2] = [0x21, 0xa1];
/// For how long the timer is measured, nanoseconds.
const MEASURE_NS: u64 = 2_000_000;

/// A 64-bit interrupt gate.
#[repr(C)]
#[derive(Clone, Copy)]
struct Gate {
    offset_low: u16,
    selector: u16,
    kind: u16,
    offset_middle: u16,
    offset_high: u32,
    reserved: u32,
}

unsafe extern "C" {
    /// The interrupt descriptor table that the stub loaded, empty so far.
    static mut idt: [Gate; 256];
    /// The stub's handlers.
    fn halt_handler();
    fn timer_handler();
}

/// How to rest.
pub enum Rest {
    /// By looking at the clock.
    Spin,
    /// Halted; the timer's ticks in a millisecond.
    Halt(u64),
}

impl Rest {
    /// Sets up what `idle` needs. A machine whose APIC has no timer that counts gets a guest that spins.
    pub fn new(idle: Idle, clock: &Clock) -> Self {
        match idle {
            Idle::Spin => Self::Spin,
            Idle::Halt => {
                set_up();
                match ticks_per_ms(clock) {
                    0 => Self::Spin,
                    ticks => Self::Halt(ticks),
                }
            }
        }
    }

    /// Returns at `until_ns` of the clock, or somewhat later.
    pub fn until(&self, until_ns: u64, clock: &Clock) {
        loop {
            let left_ns = until_ns.saturating_sub(clock.now_ns());
            if left_ns == 0 {
                return;
            }
            match self {
                Self::Halt(ticks_per_ms) if left_ns >= limits::HALT_NS_MIN => {
                    let ticks = left_ns.min(limits::HALT_NS_MAX) * ticks_per_ms / 1_000_000;
                    write(INITIAL_COUNT, u32::try_from(ticks).unwrap_or(u32::MAX));
                    halt();
                }
                Self::Halt(_) | Self::Spin => core::hint::spin_loop(),
            }
        }
    }
}

/// Points the gates at the stub's handlers and leaves the timer as the only thing that interrupts.
fn set_up() {
    for port in PIC_MASKS {
        ports::out(port, 0xff);
    }
    let timer: unsafe extern "C" fn() = timer_handler;
    let halt: unsafe extern "C" fn() = halt_handler;
    set_gate(GENERAL_PROTECTION, halt as usize as u64);
    set_gate(usize::from(TIMER), timer as usize as u64);
    // A spurious interrupt wants no end-of-interrupt; one too many does no harm here, where no other is in service.
    set_gate(usize::from(SPURIOUS_VECTOR), timer as usize as u64);
    write(SPURIOUS, 1 << 8 | u32::from(SPURIOUS_VECTOR));
    write(LVT_LINT0, MASKED);
    write(LVT_LINT1, MASKED);
    write(DIVIDE, 0b1011);
    write(LVT_TIMER, MASKED);
}

fn set_gate(vector: usize, handler: u64) {
    let [b0, b1, b2, b3, b4, b5, b6, b7] = handler.to_le_bytes();
    let gate = Gate {
        offset_low: u16::from_le_bytes([b0, b1]),
        selector: 0x10,
        kind: 0x8e00,
        offset_middle: u16::from_le_bytes([b2, b3]),
        offset_high: u32::from_le_bytes([b4, b5, b6, b7]),
        reserved: 0,
    };
    let table = (&raw mut idt).cast::<Gate>();
    // SAFETY: every vector that is passed is below the table's 256.
    let place = unsafe { table.add(vector) };
    // SAFETY: the table is in the image, and nothing else refers to it but the CPU, which reads a gate only at an interrupt
    // or exception; volatile, because the compiler sees no reader.
    unsafe { place.write_volatile(gate) };
}

/// The timer's ticks in a millisecond, 0 if it does not count; arms its interrupt.
fn ticks_per_ms(clock: &Clock) -> u64 {
    let start_ns = clock.now_ns();
    write(INITIAL_COUNT, u32::MAX);
    while clock.now_ns() < start_ns + MEASURE_NS {
        core::hint::spin_loop();
    }
    let ticks = u64::from(u32::MAX - read(CURRENT_COUNT));
    let passed_ns = clock.now_ns() - start_ns;
    write(INITIAL_COUNT, 0);
    write(LVT_TIMER, u32::from(TIMER));
    ticks * 1_000_000 / passed_ns
}

fn halt() {
    // SAFETY: the #GP handler skips the instruction and returns after the next interrupt, with RAX lost; a plain `hlt` in ring
    // 3 touches no memory of ours. The red zone is not used (no-redzone), and the handlers have a stack of their own.
    unsafe { asm!("hlt", out("rax") _) };
}

fn write(register: u64, value: u32) {
    // SAFETY: the APIC's registers are mapped (identity) and no Rust object is there.
    unsafe { ((APIC + register) as *mut u32).write_volatile(value) };
}

fn read(register: u64) -> u32 {
    // SAFETY: as in `write`.
    unsafe { ((APIC + register) as *const u32).read_volatile() }
}
