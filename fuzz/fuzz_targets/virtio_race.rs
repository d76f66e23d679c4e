//! A guest that drives a device as it likes while the device's own thread serves it. The first byte says which device. What is found here
//! may need several runs to be found again.
#![no_main]

use std::cell::LazyCell;

use libfuzzer_sys::fuzz_target;
use tern_fuzz::Disk;
use vmm::devices::virtio::exercise::Exercise;

struct Devices {
    disk: Disk,
    others: [Exercise; 4],
}

thread_local! {
    static DEVICES: LazyCell<Devices> = LazyCell::new(|| Devices {
        disk: Disk::new(),
        others: [Exercise::net(), Exercise::console(), Exercise::balloon(), Exercise::rng()],
    });
}

fuzz_target!(|bytes: &[u8]| {
    let Some((which, guest)) = bytes.split_first() else { return };
    DEVICES.with(|devices| match devices.others.get(usize::from(*which) % 5) {
        Some(device) => device.race(guest).expect("the host has memory, descriptors and threads"),
        None => {
            devices.disk.clear();
            devices.disk.device.race(guest).expect("the host has memory, descriptors and threads");
            devices.disk.check();
        }
    });
});
