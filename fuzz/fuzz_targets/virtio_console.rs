//! A guest that drives the register file and the queues of a console as it likes.
#![no_main]

use std::cell::LazyCell;

use libfuzzer_sys::fuzz_target;
use vmm::devices::virtio::exercise::Exercise;

thread_local! {
    static DEVICE: LazyCell<Exercise> = const { LazyCell::new(Exercise::console) };
}

fuzz_target!(|guest: &[u8]| {
    DEVICE.with(|device| device.run(guest).expect("the host has memory and descriptors"));
});
