//! A guest that drives the register file and the queue of a disk as it likes. The disk's file stays as long as it was.
#![no_main]

use std::cell::LazyCell;

use libfuzzer_sys::fuzz_target;
use vmm::config::DiskOptions;
use vmm::devices::virtio::exercise::Exercise;

const DISK_BYTES: u64 = 64 * 1024;

struct Disk {
    file: tempfile::NamedTempFile,
    device: Exercise,
}

fn disk() -> Disk {
    let file = tempfile::NamedTempFile::new().expect("a place for a temporary file");
    file.as_file().set_len(DISK_BYTES).expect("room for a small file");
    let path = file.path().to_owned();
    let device = Exercise::block(DiskOptions { path, read_only: false, id: None, direct: false });
    Disk { file, device }
}

thread_local! {
    static DISK: LazyCell<Disk> = const { LazyCell::new(disk) };
}

fuzz_target!(|guest: &[u8]| {
    DISK.with(|disk| {
        disk.device.run(guest).expect("the host has memory and descriptors");
        let length = disk.file.as_file().metadata().expect("the file is there").len();
        assert_eq!(length, DISK_BYTES, "a guest has changed its disk's length");
    });
});
