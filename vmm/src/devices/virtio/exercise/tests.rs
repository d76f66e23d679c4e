//! Exercises of random bytes, and of bytes that do it by the book.

use proptest::prelude::*;

use super::script::{FAR, INDIRECT, LOOP, Part, SECTORS, Script, WAIT, WRITABLE};
use super::*;

fn disk() -> (tempfile::NamedTempFile, Exercise) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(64 * 1024).unwrap();
    let path = file.path().to_owned();
    (file, Exercise::block(DiskOptions { path, read_only: false, id: None, direct: false }))
}

fn devices() -> (tempfile::NamedTempFile, [Exercise; 5]) {
    let (file, block) = disk();
    (file, [Exercise::rng(), block, Exercise::net(), Exercise::console(), Exercise::balloon()])
}

/// The header of a disk's request: its type, and its sector.
fn header(kind: u8, sector: u8) -> Part {
    let mut bytes = [0; 16];
    (bytes[0], bytes[8]) = (kind, sector);
    Part::filled(0x1000, bytes)
}

const DATA: u16 = 0x1100;
const STATUS: Part = Part::STATUS;

proptest! {
    #[test]
    fn no_guest_breaks_a_device(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let (_file, devices) = devices();
        for device in devices {
            device.run(&bytes).unwrap();
        }
    }

    #[test]
    fn no_guest_that_has_set_its_device_up_breaks_it(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let (_file, devices) = devices();
        let bytes = [Script::live().bytes(), bytes].concat();
        for device in devices {
            device.run(&bytes).unwrap();
            device.race(&bytes).unwrap();
        }
    }
}

#[test]
fn a_request_by_the_book_reaches_the_disk() {
    let (file, exercise) = disk();
    let write = |how| {
        let script = Script::live().put(DATA * 8, [0xaa; 16]);
        script.request(0, how, &[header(1, 3), Part::new(SECTORS, DATA, 1), STATUS]).bytes()
    };
    for how in [0, INDIRECT] {
        file.as_file().set_len(0).and_then(|()| file.as_file().set_len(64 * 1024)).unwrap();
        exercise.run(&write(how)).unwrap();
        assert_eq!(
            std::fs::read(file.path()).unwrap()[3 * 512..3 * 512 + 17],
            [[0xaa; 16].as_slice(), &[0]].concat()
        );
    }
    for how in [WAIT, LOOP] {
        file.as_file().set_len(0).and_then(|()| file.as_file().set_len(64 * 1024)).unwrap();
        exercise.run(&write(how)).unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap(), [0; 64 * 1024]);
    }
}

#[test]
fn memory_is_zeros_between_two_exercises() {
    let exercise = Exercise::rng();
    let random = Script::live().request(0, 0, &[Part::new(WRITABLE, 0x1000, 4096)]).bytes();
    exercise.run(&random).unwrap();
    let memory = exercise.memory().unwrap();
    assert_eq!(memory.peek(0, 2 << 20), vec![0; 2 << 20]);
    exercise.run(&Script::live().request(0, 0, &[Part::new(WRITABLE | FAR, 0x1000, 4096)]).bytes()).unwrap();
}
