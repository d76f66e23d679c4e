//! Guest time over a pause: the paravirtual clock and the time-stamp counters stand still and go on together.
//!
//! No guest time passes while a machine stands still, is saved, or travels. The paravirtual clock (KVM_SET_CLOCK) and the
//! counters (KVM_VCPU_TSC_OFFSET, by the same difference on each virtual CPU, so that they stay in step) go on from where they
//! stood at the pause, whichever of them the guest takes for its clock. A KVM without control over the counter lets it run on, which a
//! guest with the paravirtual clock does not see.
//!
//! A guest compares the two: Linux' clocksource watchdog wants them within 400 microseconds of each other, and gives the counter up for
//! ever if they are not. KVM reads and sets one at a time, and on a busy host a quarter of a second has been seen to pass in between. So
//! readings of both are taken a few times, and those count that lie closest together; and after the clock was set the counters are moved
//! to where it then stands, which no delay can spoil.

use std::sync::{Arc, Mutex};

use kvm_bindings::{Msrs, kvm_clock_data, kvm_msr_entry};
use kvm_ioctls::{VcpuFd, VmFd};

use super::threads::lock;
use super::vcpu::Vcpu;
use super::{KvmError, call, raw};
use crate::limits::CLOCK_READINGS;

/// IA32_TIME_STAMP_COUNTER (Intel SDM volume 4, table 2-2).
pub(super) const MSR_TSC: u32 = 0x10;

/// Guest time at one moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Moment {
    /// The paravirtual clock, nanoseconds.
    pub(crate) clock_ns: u64,
    /// The first virtual CPU's time-stamp counter, if there is one to go on from.
    pub(crate) tsc: Option<u64>,
}

/// A reading of the clock, and of the counter before and after it.
#[derive(Clone, Copy, Debug)]
struct Reading {
    before: u64,
    clock_ns: u64,
    after: u64,
}

impl Reading {
    fn take(vm: &VmFd, first: &VcpuFd) -> Result<Self, KvmError> {
        Ok(Self { before: tsc(first)?, clock_ns: clock(vm)?, after: tsc(first)? })
    }

    fn ticks(&self) -> u64 {
        self.after.wrapping_sub(self.before)
    }

    /// The clock was read in between.
    fn moment(&self) -> Moment {
        Moment { clock_ns: self.clock_ns, tsc: Some(self.before.wrapping_add(self.ticks() / 2)) }
    }
}

/// Now, as the guest of `vm` would read it.
/// # Errors
/// If KVM refuses.
pub(crate) fn now(vm: &VmFd, vcpus: &[Arc<Mutex<Vcpu>>]) -> Result<Moment, KvmError> {
    match vcpus.first() {
        Some(first) => read(vm, lock(first).fd()),
        None => Ok(Moment { clock_ns: clock(vm)?, tsc: None }),
    }
}

fn read(vm: &VmFd, first: &VcpuFd) -> Result<Moment, KvmError> {
    let mut best = Reading::take(vm, first)?;
    for _ in 1..CLOCK_READINGS {
        let next = Reading::take(vm, first)?;
        if next.ticks() < best.ticks() {
            best = next;
        }
    }
    Ok(best.moment())
}

/// Has guest time go on from `from`, where the machine stood still since then or was saved then.
/// # Errors
/// If KVM refuses.
pub(crate) fn go_on(vm: &VmFd, vcpus: &[Arc<Mutex<Vcpu>>], from: Moment) -> Result<(), KvmError> {
    let data = kvm_clock_data { clock: from.clock_ns, ..Default::default() };
    vm.set_clock(&data).map_err(call("KVM_SET_CLOCK"))?;
    let Some(first) = vcpus.first() else { return Ok(()) };
    let (khz, now) = {
        let first = lock(first);
        // A KVM that does not know the rate has no control over the counter either.
        (first.fd().get_tsc_khz().unwrap_or(0), read(vm, first.fd())?)
    };
    let ahead = ticks_ahead(from, now, khz);
    for vcpu in vcpus {
        let vcpu = lock(vcpu);
        if let Some(offset) = raw::tsc_offset(vcpu.fd())? {
            raw::set_tsc_offset(vcpu.fd(), offset.wrapping_sub(ahead))?;
        }
    }
    tracing::debug!(?from, ?now, khz, ahead, "guest time goes on");
    Ok(())
}

/// How far the counter is ahead of the clock at `now`, if they were together at `from`: modulo 2^64, as the counter counts.
fn ticks_ahead(from: Moment, now: Moment, khz: u32) -> u64 {
    let (Some(tsc_from), Some(tsc_now)) = (from.tsc, now.tsc) else { return 0 };
    let passed_ns = now.clock_ns.saturating_sub(from.clock_ns);
    let passed_ticks = u128::from(passed_ns) * u128::from(khz) / 1_000_000;
    let passed_ticks = u64::try_from(passed_ticks).unwrap_or(u64::MAX);
    tsc_now.wrapping_sub(tsc_from).wrapping_sub(passed_ticks)
}

/// The paravirtual clock, nanoseconds.
fn clock(vm: &VmFd) -> Result<u64, KvmError> {
    Ok(vm.get_clock().map_err(call("KVM_GET_CLOCK"))?.clock)
}

/// A virtual CPU's time-stamp counter as its guest would read it now.
fn tsc(fd: &VcpuFd) -> Result<u64, KvmError> {
    let mut msr = Msrs::from_entries(&[kvm_msr_entry { index: MSR_TSC, ..Default::default() }])
        .expect("one entry is within the bound");
    fd.get_msrs(&mut msr).map_err(call("KVM_GET_MSRS"))?;
    Ok(msr.as_slice()[0].data)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KHZ: u32 = 2_000_000;

    fn moment(clock_ns: u64, tsc: u64) -> Moment {
        Moment { clock_ns, tsc: Some(tsc) }
    }

    #[test]
    fn a_counter_that_ran_on_is_ahead_by_what_the_clock_did_not_see() {
        let from = moment(1_000, 5_000);
        assert_eq!(ticks_ahead(from, moment(1_000, 5_000), KHZ), 0);
        assert_eq!(ticks_ahead(from, moment(1_500, 6_000), KHZ), 0, "500 ns at 2 GHz");
        assert_eq!(ticks_ahead(from, moment(1_500, 9_000), KHZ), 3_000);
    }

    /// A host whose counter began later than the source's.
    #[test]
    fn a_counter_that_is_behind_is_ahead_modulo_its_width() {
        let ahead = ticks_ahead(moment(1_000, 5_000), moment(1_000, 10), KHZ);
        assert_eq!(10u64.wrapping_sub(ahead), 5_000);
    }

    #[test]
    fn a_state_without_a_counter_moves_none() {
        let without = Moment { clock_ns: 7, tsc: None };
        assert_eq!(ticks_ahead(without, moment(9, 100), KHZ), 0);
    }

    #[test]
    fn the_clock_was_read_in_the_middle() {
        let reading = Reading { before: u64::MAX - 1, clock_ns: 3, after: 4 };
        assert_eq!(reading.ticks(), 6);
        assert_eq!(reading.moment(), moment(3, 1));
    }
}
