//! Machines on the real /dev/kvm. Where there is none, these tests fail and say so.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail the test")]

mod tiny;

use std::time::Duration;

use page::{Gfn, PAGE_SIZE, Page};
use tiny::{COUNTERS, Place, wait, wait_for_beats, wait_for_text};
use vmm::boot::{BootError, KernelError};
use vmm::config::{BootProtocol, CpuChoice, DeviceOptions, Level, Load, Serial, VmConfig};
use vmm::kvm::{KvmError, StateError};
use vmm::machine::{Machine, MachineError, RunState, StopReason};

fn launch(config: &VmConfig) -> std::sync::Arc<Machine> {
    Machine::launch(config).unwrap_or_else(|e| panic!("these tests need a working /dev/kvm: {e}"))
}

fn refused(config: &VmConfig) -> MachineError {
    Machine::launch(config).expect_err("it should have been refused")
}

fn page(machine: &Machine, gfn: Gfn) -> Box<Page> {
    let mut page = Box::new([0; PAGE_SIZE]);
    machine.memory().read_page(gfn, &mut page);
    page
}

fn count(machine: &Machine) -> u32 {
    u32::from_le_bytes(page(machine, COUNTERS[0])[..4].try_into().unwrap())
}

#[test]
fn a_guest_boots_with_its_command_line_initramfs_and_files() {
    let place = Place::new();
    let mut config = place.config();
    config.initramfs = Some(place.file("initramfs", &[b'!'; 5000]));
    let data: Vec<u8> = (0..3 * PAGE_SIZE + 5).map(|i| u8::try_from(i % 251).unwrap()).collect();
    config.loads = vec![Load { file: place.file("data", &data), addr: 0x40_0800 }];
    let machine = launch(&config);
    assert_eq!(machine.heartbeat().count, 0);
    assert_eq!(*machine.watch().borrow(), RunState::Created);
    machine.resume().unwrap();
    wait_for_text(&place.path("console"), "hello!\n");
    wait_for_beats(&machine, 10);
    assert_eq!(page(&machine, Gfn(0x400))[0x800..], data[..0x800]);
    assert_eq!(page(&machine, Gfn(0x403))[0x7ff..0x806], [data[0x2fff..0x3005].to_vec(), vec![0]].concat());
    assert_eq!(machine.serial_input(b"e"), 1);
    wait_for_text(&place.path("console"), "e");
}

#[test]
fn paused_means_still_and_resumed_means_going_on() {
    let place = Place::new();
    let machine = launch(&place.config());
    for _ in 0..20 {
        machine.resume().unwrap();
        wait_for_beats(&machine, 5);
        machine.pause().unwrap();
        assert_eq!(*machine.watch().borrow(), RunState::Paused);
        let (beats, counted) = (machine.heartbeat().count, count(&machine));
        assert_eq!(machine.serial_input(b"c"), 0, "no input while paused");
        std::thread::sleep(Duration::from_millis(3));
        assert_eq!((machine.heartbeat().count, count(&machine)), (beats, counted));
        machine.pause().unwrap();
    }
    machine.resume().unwrap();
    machine.resume().unwrap();
    wait("room", || machine.serial_input(b"c") == 1);
    wait_for_text(&place.path("console"), "Y");
}

#[test]
fn the_dirty_log_holds_what_guest_and_monitor_wrote_and_nothing_else() {
    let place = Place::new();
    let mut config = place.config();
    config.memory_bytes = (3 << 30) + (4 << 20);
    let machine = launch(&config);
    assert!(matches!(machine.take_dirty(), Err(MachineError::NotLogging)));
    machine.resume().unwrap();
    wait_for_beats(&machine, 5);
    machine.memory().write_page(Gfn(0x300), &[1; PAGE_SIZE]);
    machine.start_dirty_log().unwrap();
    wait_for_beats(&machine, 5);
    let high = Gfn((1 << 20) + 7);
    machine.memory().write_page(high, &[9; PAGE_SIZE]);
    let dirty = machine.take_dirty().unwrap();
    assert_eq!(dirty.bound(), machine.memory().bound());
    assert_eq!(dirty.iter().collect::<Vec<_>>(), [COUNTERS[0], COUNTERS[1], high]);
    machine.pause().unwrap();
    machine.take_dirty().unwrap();
    assert!(machine.take_dirty().unwrap().is_empty(), "a paused guest writes nothing");
    machine.resume().unwrap();
    wait_for_beats(&machine, 5);
    assert_eq!(machine.take_dirty().unwrap().iter().collect::<Vec<_>>(), COUNTERS);
    machine.stop_dirty_log().unwrap();
    assert!(matches!(machine.take_dirty(), Err(MachineError::NotLogging)));
}

fn copy_memory(from: &Machine, to: &Machine) {
    for extent in from.memory().extents() {
        for gfn in (extent.first_gfn..extent.first_gfn + extent.pages).map(Gfn) {
            let page = page(from, gfn);
            if !page::is_zero(&page) {
                to.memory().write_page(gfn, &page);
            }
        }
    }
}

fn moves(cpus: u8, cpu: CpuChoice) {
    let place = Place::new();
    let config = VmConfig { cpus, cpu, ..place.config() };
    let mut machine = launch(&config);
    machine.resume().unwrap();
    for round in 0..5 {
        wait_for_beats(&machine, 50);
        machine.pause().unwrap();
        let counted = count(&machine);
        let bytes = machine.save_state().unwrap();
        let console = place.path(&format!("console{round}"));
        let moved = Machine::prepare(
            &machine.description(),
            &Serial::File(console.clone()),
            &DeviceOptions::default(),
        )
        .unwrap();
        copy_memory(&machine, &moved);
        machine.stop(StopReason::Migrated);
        assert_eq!(*machine.watch().borrow(), RunState::Stopped(StopReason::Migrated));
        assert!(matches!(machine.resume(), Err(MachineError::Stopped(StopReason::Migrated))));
        moved.load_state(&bytes).unwrap();
        assert_eq!(count(&moved), counted);
        moved.resume().unwrap();
        wait_for_beats(&moved, 5);
        assert!(count(&moved) > counted);
        assert_eq!(moved.serial_input(b"c"), 1);
        wait_for_text(&console, "Y");
        machine = moved;
    }
}

#[test]
fn a_guest_moves_from_machine_to_machine() {
    moves(1, CpuChoice::Host);
}

#[test]
fn a_guest_with_two_cpus_and_the_v2_template_moves() {
    moves(2, CpuChoice::Level(Level::V2));
}

#[test]
fn state_is_taken_standing_still_and_put_where_nothing_ran() {
    let place = Place::new();
    let machine = launch(&place.config());
    machine.resume().unwrap();
    assert!(matches!(machine.save_state(), Err(MachineError::Running)));
    machine.pause().unwrap();
    let bytes = machine.save_state().unwrap();
    assert!(matches!(machine.load_state(&bytes), Err(MachineError::HasRun)));

    let mut description = machine.description();
    let wrong = Machine::prepare(&description, &Serial::Off, &DeviceOptions::default()).unwrap();
    let error = wrong.load_state(&bytes[..bytes.len() - 1]).unwrap_err();
    assert!(matches!(error, MachineError::State(StateError::Digest)), "{error}");
    description.cpus = 2;
    let two = Machine::prepare(&description, &Serial::Off, &DeviceOptions::default()).unwrap();
    let error = two.load_state(&bytes).unwrap_err();
    assert!(matches!(error, MachineError::Kvm(KvmError::CpuCount { saved: 1, built: 2 })), "{error}");
    description.version += 1;
    assert!(matches!(
        Machine::prepare(&description, &Serial::Off, &DeviceOptions::default()),
        Err(MachineError::DescriptionVersion(_))
    ));
}

#[test]
fn the_guest_ends_itself() {
    let place = Place::new();
    let machine = launch(&place.config());
    machine.resume().unwrap();
    wait("room", || machine.serial_input(b"q") == 1);
    wait("the end", || *machine.watch().borrow() == RunState::Stopped(StopReason::Guest));
    assert!(matches!(machine.pause(), Err(MachineError::Stopped(StopReason::Guest))));
    assert!(matches!(machine.resume(), Err(MachineError::Stopped(StopReason::Guest))));
}

#[test]
fn a_fault_without_a_handler_stops_the_vm_and_says_why() {
    let place = Place::new();
    let config = VmConfig { cpus: 2, ..place.config() };
    let machine = launch(&config);
    machine.resume().unwrap();
    wait("room", || machine.serial_input(b"x") == 1);
    wait(
        "the end",
        || matches!(&*machine.watch().borrow(), RunState::Stopped(StopReason::Failed(why)) if !why.is_empty()),
    );
}

#[test]
fn a_dropped_machine_leaves_no_thread_and_no_memory() {
    let place = Place::new();
    let machine = launch(&place.config());
    machine.resume().unwrap();
    wait_for_beats(&machine, 1);
    let memory = std::sync::Arc::downgrade(machine.memory());
    let state = machine.watch();
    drop(machine);
    assert!(memory.upgrade().is_none());
    assert_eq!(*state.borrow(), RunState::Stopped(StopReason::Requested));
}

fn kernel_error(error: &BootError) -> &KernelError {
    match error {
        BootError::Kernel { source, .. } => source,
        other => panic!("{other}"),
    }
}

#[test]
fn what_is_missing_or_wrong_is_said() {
    let place = Place::new();
    let good = place.config();
    let boot_error = |config: VmConfig| match refused(&config) {
        MachineError::Boot(error) => error,
        other => panic!("{other}"),
    };

    let error = boot_error(VmConfig { kernel: place.path("absent"), ..good.clone() });
    assert!(matches!(&error, BootError::File { what: "the kernel", .. }), "{error}");
    let error = boot_error(VmConfig { initramfs: Some(place.path("absent")), ..good.clone() });
    assert!(matches!(&error, BootError::File { what: "the initramfs", .. }), "{error}");
    let error = boot_error(VmConfig { kernel: place.file("text", &[b'#'; 99]), ..good.clone() });
    assert!(matches!(kernel_error(&error), KernelError::UnknownFormat { .. }), "{error}");
    let error = boot_error(VmConfig { kernel: place.file("short", b"\x7fELF"), ..good.clone() });
    assert!(matches!(kernel_error(&error), KernelError::Truncated { .. }), "{error}");
    let noteless = place.file("noteless", &tiny::elf(false));
    let error = boot_error(VmConfig { kernel: noteless, boot: BootProtocol::Pvh, ..good.clone() });
    assert!(matches!(kernel_error(&error), KernelError::NoPvhNote), "{error}");
    let error = boot_error(VmConfig { cmdline: "x".repeat(70_000), ..good.clone() });
    assert!(matches!(&error, BootError::CmdlineLength { .. }), "{error}");

    let load = |addr, bytes: usize| VmConfig {
        loads: vec![Load { file: place.file("load", &vec![1; bytes]), addr }],
        ..good.clone()
    };
    for (addr, bytes) in [(0x10_0010, 1), (0xf_ffff, 2), (0x2_0000, 1), (0x6000, 1)] {
        let error = boot_error(load(addr, bytes));
        assert!(matches!(&error, BootError::Overlap { .. }), "{addr:#x}: {error}");
    }
    for addr in [16 << 20, (16 << 20) - 1, u64::MAX] {
        let error = boot_error(load(addr, 2));
        assert!(matches!(&error, BootError::OutOfMemory { .. }), "{addr:#x}: {error}");
    }
    let big = place.file("big", &vec![0; 15 << 20]);
    let error = boot_error(VmConfig { initramfs: Some(big), ..good.clone() });
    assert!(matches!(&error, BootError::NoRoomForInitramfs { .. }), "{error}");

    assert!(matches!(refused(&VmConfig { memory_bytes: 3 << 19, ..good.clone() }), MachineError::Memory(_)));
    assert!(matches!(refused(&VmConfig { cpus: 0, ..good.clone() }), MachineError::Cpus(0)));
    assert!(matches!(refused(&VmConfig { cpus: 255, ..good.clone() }), MachineError::Cpus(255)));
    let serial = Serial::File(place.path("no/such/folder/console"));
    assert!(matches!(refused(&VmConfig { serial, ..good }), MachineError::Device(_)));
}
