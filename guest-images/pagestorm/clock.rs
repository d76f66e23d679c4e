//! Time since some moment before boot, in nanoseconds: KVM's paravirtual clock, which goes on through pause, save and
//! migration; without KVM the TSC, whose rate is measured against the 8254 timer.

use core::arch::asm;
use core::sync::atomic::{Ordering, compiler_fence};

use super::ports;

/// `struct pvclock_vcpu_time_info` (Linux, arch/x86/include/asm/pvclock-abi.h). KVM rewrites it when the host's clock
/// changes and after each migration, with an odd version meanwhile.
#[repr(C)]
struct PvClock {
    version: u32,
    pad: u32,
    tsc_timestamp: u64,
    system_time_ns: u64,
    tsc_to_system_mul: u32,
    tsc_shift: i8,
    flags: u8,
    pad2: [u8; 2],
}

unsafe extern "C" {
    /// The page registered with MSR_KVM_SYSTEM_TIME_NEW by the stub.
    static kvmclock_page: PvClock;
}

/// Where time comes from.
pub enum Clock {
    /// The kvmclock page.
    Kvm,
    /// TSC ticks in a millisecond.
    Tsc(u64),
}

/// Why there is no clock.
pub struct NoClock;

/// 8254: ticks a second, its command port, its channel 0.
const PIT_HZ: u64 = 1_193_182;
const PIT_COMMAND: u16 = 0x43;
const PIT_CHANNEL_0: u16 = 0x40;
/// How long the TSC is measured, in 8254 ticks: 40 ms, below the 65,536 that the counter can tell apart.
const PIT_TICKS: u16 = 47_727;
/// Readings after which a counter that does not move is given up.
const PIT_READINGS_MAX: u32 = 1_000_000;

impl Clock {
    /// Takes the kvmclock if the stub could register it.
    pub fn new(kvmclock: bool) -> Result<Self, NoClock> {
        if kvmclock && version() != 0 { Ok(Self::Kvm) } else { calibrate().map(Self::Tsc) }
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Kvm => "kvmclock",
            Self::Tsc(_) => "tsc",
        }
    }

    /// Now, in nanoseconds.
    pub fn now_ns(&self) -> u64 {
        match self {
            Self::Kvm => kvmclock_ns(),
            Self::Tsc(ticks_per_ms) => {
                let ns = u128::from(tsc()) * 1_000_000 / u128::from(*ticks_per_ms);
                u64::try_from(ns).unwrap_or(u64::MAX)
            }
        }
    }
}

fn tsc() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: CR4.TSD is clear, so ring 3 may read the TSC; lfence keeps it behind the loads before it.
    unsafe { asm!("lfence", "rdtsc", out("eax") low, out("edx") high, options(nostack, preserves_flags)) };
    u64::from(high) << 32 | u64::from(low)
}

fn version() -> u32 {
    // SAFETY: the static is in the image and aligned; KVM may write it at any moment, hence volatile.
    unsafe { (&raw const kvmclock_page.version).read_volatile() }
}

fn kvmclock_ns() -> u64 {
    loop {
        let before = version();
        compiler_fence(Ordering::SeqCst);
        // SAFETY: as in `version`; the version tells below whether the copy is of one piece.
        let page = unsafe { (&raw const kvmclock_page).read_volatile() };
        let ticks = tsc();
        compiler_fence(Ordering::SeqCst);
        if before & 1 == 0 && before == version() {
            // A TSC below the page's (another core's, or a new host's) must not become centuries.
            let delta = ticks.saturating_sub(page.tsc_timestamp);
            let shift = u32::from(page.tsc_shift.unsigned_abs());
            let scaled = if page.tsc_shift >= 0 {
                u128::from(delta) << shift.min(31)
            } else {
                u128::from(delta >> shift.min(63))
            };
            let ns = (scaled * u128::from(page.tsc_to_system_mul)) >> 32;
            return page.system_time_ns.wrapping_add(u64::try_from(ns).unwrap_or(u64::MAX));
        }
    }
}

/// TSC ticks in a millisecond, by channel 0 of the 8254 counting down from 65,536 once (mode 0). Its one interrupt goes
/// nowhere: they are off.
fn calibrate() -> Result<u64, NoClock> {
    ports::out(PIT_COMMAND, 0x30);
    ports::out(PIT_CHANNEL_0, 0xff);
    ports::out(PIT_CHANNEL_0, 0xff);
    let (first_count, first_tsc) = (pit_count(), tsc());
    for _ in 0..PIT_READINGS_MAX {
        let (count, ticks) = (pit_count(), tsc());
        let passed = first_count.wrapping_sub(count);
        if passed >= PIT_TICKS {
            let per_ms = (ticks - first_tsc) * PIT_HZ / (u64::from(passed) * 1000);
            return if per_ms == 0 { Err(NoClock) } else { Ok(per_ms) };
        }
    }
    Err(NoClock)
}

/// Channel 0's counter, latched.
fn pit_count() -> u16 {
    ports::out(PIT_COMMAND, 0);
    u16::from_le_bytes([ports::input(PIT_CHANNEL_0), ports::input(PIT_CHANNEL_0)])
}
