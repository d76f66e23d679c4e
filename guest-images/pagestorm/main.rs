//! pagestorm on its machine: boot, then [`pagestorm::engine`] for ever. The crate's README says what it does.
#![no_std]
#![no_main]
#![deny(unsafe_op_in_unsafe_fn)]

mod boot;
mod clock;
mod idle;
mod memory;
#[path = "../src/pagestorm/mod.rs"]
#[allow(dead_code, reason = "the library's hosts use parts that the guest does not")]
mod pagestorm;
mod ports;
mod start;

use core::fmt::Write as _;
use core::panic::PanicInfo;

use boot::BootInfo;
use clock::Clock;
use idle::Rest;
use memory::WorkingSet;
use pagestorm::engine::Engine;
use pagestorm::layout::Layout;
use pagestorm::options::Options;
use pagestorm::storm::Storm;
use ports::{LastWords, MachinePorts};

/// From the stub, in ring 3: the address of `hvm_start_info`, and whether it registered a kvmclock.
#[unsafe(no_mangle)]
extern "C" fn pagestorm_main(start_info_gpa: u64, kvmclock: bool) -> ! {
    let mut ports = MachinePorts::new();
    let boot = BootInfo::read(start_info_gpa).unwrap_or_else(|error| give_up(format_args!("{error}")));
    let cmdline = boot.cmdline().unwrap_or_else(|error| give_up(format_args!("{error}")));
    let options = Options::parse(cmdline).unwrap_or_else(|error| give_up(format_args!("{error}")));
    let layout = Layout::new(&options);
    let ram = WorkingSet::new(&layout, &boot.ram()).unwrap_or_else(|error| give_up(format_args!("{error}")));
    let Ok(clock) = Clock::new(kvmclock) else {
        give_up(format_args!("no clock: neither a kvmclock (KVM) nor an 8254 timer that counts"));
    };
    let rest = Rest::new(options.idle, &clock);
    let storm = Storm::create(ram, &options, layout);
    let mut engine = Engine::new(options, storm, clock.name(), clock.now_ns());
    loop {
        let next_ns = engine.turn(clock.now_ns(), &mut ports);
        rest.until(next_ns, &clock);
    }
}

/// Says why on the serial port and ends the machine.
fn give_up(why: core::fmt::Arguments<'_>) -> ! {
    // It cannot fail: LastWords takes everything.
    let _ = writeln!(LastWords, "pagestorm: cannot start: {why}");
    ports::power_off()
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let _ = writeln!(LastWords, "\npagestorm: a bug: {info}");
    ports::power_off()
}
