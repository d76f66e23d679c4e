//! Virtio devices of machines on the real /dev/kvm: a guest of a few dozen instructions drives the registers, KVM carries notifications and
//! interrupts, and a disk moves from one machine to another.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail the test")]

mod tiny;

use std::path::PathBuf;
use std::sync::Arc;

use page::{Gfn, PAGE_SIZE, Page};
use tiny::{COUNTERS, Place, wait_for_beats, wait_for_text};
use vmm::config::{DeviceOptions, DiskOptions, Load, Serial, VmConfig};
use vmm::devices::DeviceError;
use vmm::machine::{Machine, MachineError};

/// The first device's registers, and its interrupt's bit in the first interrupt controller's request register.
const REGISTERS: u32 = 0xd000_0000;
const IRQ_5: u8 = 1 << 5;
/// Where the guest's queue and its buffer are.
const QUEUE: u32 = 0x30_0000;
const BUFFER: u32 = 0x31_0000;

fn launch(config: &VmConfig) -> Arc<Machine> {
    Machine::launch(config).unwrap_or_else(|e| panic!("these tests need a working /dev/kvm: {e}"))
}

fn disk(place: &Place) -> DiskOptions {
    let path = place.path("disk");
    if !path.exists() {
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
    }
    DiskOptions { path, read_only: false, id: None, direct: false }
}

fn page(machine: &Machine, gfn: Gfn) -> Page {
    let mut page = [0; PAGE_SIZE];
    machine.memory().read_page(gfn, &mut page);
    page
}

fn copy_memory(from: &Machine, to: &Machine) {
    (0..from.memory().bound()).map(Gfn).for_each(|gfn| to.memory().write_page(gfn, &page(from, gfn)));
}

fn with_disk(place: &Place) -> VmConfig {
    VmConfig {
        devices: DeviceOptions { disks: vec![disk(place)], ..DeviceOptions::default() },
        ..place.config()
    }
}

/// `mov dword [address], value`.
fn poke(code: &mut Vec<u8>, register: u32, value: u32) {
    code.extend([0xc7, 0x05]);
    code.extend((REGISTERS + register).to_le_bytes());
    code.extend(value.to_le_bytes());
}

/// Drives the rng from reset to one request, waits for it, and says what it saw: `v` for a request that came back, then the interrupt
/// controller's request register.
fn rng_driver() -> Vec<u8> {
    let mut code = Vec::new();
    for (register, value) in [
        (0x70, 0),
        (0x70, 1),
        (0x70, 3),
        (0x24, 0),
        (0x20, 0),
        (0x24, 1),
        (0x20, 1),
        (0x70, 11),
        (0x30, 0),
        (0x38, 16),
        (0x80, QUEUE),
        (0x90, QUEUE + 0x1000),
        (0xa0, QUEUE + 0x2000),
        (0x44, 1),
        (0x70, 15),
        (0x50, 0),
    ] {
        poke(&mut code, register, value);
    }
    // wait: cmp word [used index], 0; je wait
    code.extend([0x66, 0x83, 0x3d]);
    code.extend((QUEUE + 0x2002).to_le_bytes());
    code.extend([0x00, 0x74, 0xf6]);
    // The interrupt comes after the used index: mov eax, [interrupt status]; test al, 1; je back
    code.push(0xa1);
    code.extend((REGISTERS + 0x60).to_le_bytes());
    code.extend([0xa8, 0x01, 0x74, 0xf7]);
    // again: in al, 0x20; test al, 32; je again; mov dx, 0x3f8; mov al, 'v'; out dx, al; hlt
    code.extend([0xe4, 0x20, 0xa8, IRQ_5, 0x74, 0xfa]);
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xb0, b'v', 0xee, 0xf4]);
    code
}

fn queue_image() -> Vec<u8> {
    let mut image = vec![0; 0x3000];
    image[..8].copy_from_slice(&u64::from(BUFFER).to_le_bytes());
    image[8..12].copy_from_slice(&64u32.to_le_bytes());
    image[12] = 2; // the device writes
    image[0x1002] = 1; // one request is available: descriptor 0
    image
}

#[test]
fn a_guest_gets_random_bytes_by_notification_and_interrupt() {
    let place = Place::new();
    let mut config = place.config();
    config.kernel = place.file("driver", &tiny::elf_of(&rng_driver(), true));
    config.loads = vec![Load { file: place.file("queue", &queue_image()), addr: QUEUE.into() }];
    let machine = launch(&config);
    machine.start_dirty_log().unwrap();
    machine.resume().unwrap();
    wait_for_text(&place.path("console"), "v");
    machine.pause().unwrap();
    let frame = |address: u32| Gfn(u64::from(address) / 4096);
    let bytes = page(&machine, frame(BUFFER));
    assert_ne!(bytes[..64], [0; 64]);
    assert_eq!(bytes[64..], [0; PAGE_SIZE - 64]);
    let dirty = machine.take_dirty().unwrap();
    assert!(dirty.contains(frame(BUFFER)) && dirty.contains(frame(QUEUE + 0x2000)), "the device wrote them");
}

#[test]
fn a_live_device_moves_with_its_machine() {
    let place = Place::new();
    let mut config = with_disk(&place);
    config.kernel = place.file("driver", &tiny::elf_of(&rng_driver(), true));
    config.loads = vec![Load { file: place.file("queue", &queue_image()), addr: QUEUE.into() }];
    let machine = launch(&config);
    machine.resume().unwrap();
    wait_for_text(&place.path("console"), "v");
    machine.pause_for_hand_over().unwrap();
    let state = machine.save_state().unwrap();
    let moved = Machine::prepare(&machine.description(), &Serial::Off, &config.devices).unwrap();
    copy_memory(&machine, &moved);
    moved.load_state(&state).unwrap();
    assert_eq!(moved.save_state().unwrap().len(), state.len());
    moved.resume().unwrap();
    moved.pause().unwrap();
}

#[test]
fn a_disk_is_at_one_machine_at_a_time() {
    let place = Place::new();
    let config = with_disk(&place);
    let source = launch(&config);
    source.resume().unwrap();
    wait_for_beats(&source, 5);
    let rival = launch(&config);
    let in_use = |error: &MachineError| matches!(error, MachineError::Device(DeviceError::DiskInUse { .. }));
    assert!(in_use(&rival.resume().unwrap_err()));
    source.pause().unwrap();
    assert!(in_use(&rival.resume().unwrap_err()), "an operator's pause keeps the disk");
    source.resume().unwrap();

    source.pause_for_hand_over().unwrap();
    let destination = Machine::prepare(&source.description(), &Serial::Off, &config.devices).unwrap();
    destination.load_state(&source.save_state().unwrap()).unwrap();
    // Until it runs there, the source may go on.
    source.resume().unwrap();
    source.pause_for_hand_over().unwrap();
    copy_memory(&source, &destination);
    destination.resume().unwrap();
    assert!(in_use(&source.resume().unwrap_err()), "it runs elsewhere");
    assert!(in_use(&source.stay().unwrap_err()), "it runs elsewhere");
    wait_for_beats(&destination, 5);
    destination.pause_for_hand_over().unwrap();
    assert_ne!(page(&destination, COUNTERS[0]), page(&source, COUNTERS[0]), "it went on there");
    source.resume().unwrap();
}

#[test]
fn a_destination_opens_what_its_operator_says_and_refuses_another_vm() {
    let place = Place::new();
    let described = launch(&with_disk(&place)).description();
    assert_eq!(described.devices.len(), 2, "a source of random numbers and a disk");
    let refused = |devices: DeviceOptions| {
        Machine::prepare(&described, &Serial::Off, &devices)
            .expect_err("it should have been refused")
            .to_string()
    };
    let other = |path: PathBuf, read_only| DiskOptions { path, read_only, ..disk(&place) };
    let short = place.file("short", &[0; 4096]);
    let disks = |disks: Vec<DiskOptions>| DeviceOptions { disks, ..DeviceOptions::default() };
    for (devices, says) in [
        (disks(vec![]), "device 2 of the VM is a writable disk (--disk)"),
        (disks(vec![other(place.path("disk"), true)]), "here it is a read-only disk"),
        (disks(vec![other(short, false)]), "here it is a writable disk (--disk) of 4096 bytes"),
        (disks(vec![disk(&place), disk(&place)]), "device 3 of the VM is absent"),
        (disks(vec![DiskOptions { id: Some("other".to_owned()), ..disk(&place) }]), "id `other`"),
        (DeviceOptions { rng: Some(false), ..disks(vec![disk(&place)]) }, "a source of random numbers"),
    ] {
        let error = refused(devices);
        assert!(error.contains(says), "{error}");
    }
    let mut old = described;
    (old.version, old.devices) = (1, Vec::new());
    Machine::prepare(&old, &Serial::Off, &DeviceOptions::default()).unwrap();
}
