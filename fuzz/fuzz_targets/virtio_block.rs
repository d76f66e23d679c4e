//! A guest that drives the register file and the queue of a disk as it likes. The disk's file stays as long as it was.
#![no_main]

use std::cell::LazyCell;

use libfuzzer_sys::fuzz_target;
use tern_fuzz::Disk;

thread_local! {
    static DISK: LazyCell<Disk> = const { LazyCell::new(Disk::new) };
}

fuzz_target!(|guest: &[u8]| {
    DISK.with(|disk| {
        disk.clear();
        disk.device.run(guest).expect("the host has memory and descriptors");
        disk.check();
    });
});
