//! pagestorm on the real /dev/kvm: a guest that writes all the time, moved by hand from machine to machine, proves that it
//! lost nothing.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail the test")]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use guest_images::pagestorm::report::Report;
use page::{Gfn, PAGE_SIZE, PageSet};
use vmm::config::{BootProtocol, CpuChoice, DeviceOptions, Level, Serial, VmConfig};
use vmm::machine::{Machine, StopReason};

const PATIENCE: Duration = Duration::from_secs(60);

fn wait<T>(what: &str, mut get: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(got) = get() {
            return got;
        }
        assert!(Instant::now() < end, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn console(path: &Path) -> String {
    std::fs::read(path).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default()
}

fn launch(place: &Path, cmdline: &str, cpus: u8, cpu: CpuChoice) -> Arc<Machine> {
    let kernel = place.join("pagestorm");
    guest_images::write_pagestorm(&kernel).unwrap();
    let config = VmConfig {
        name: "pagestorm".to_owned(),
        kernel,
        boot: BootProtocol::Auto,
        acpi: true,
        initramfs: None,
        cmdline: cmdline.to_owned(),
        memory_bytes: 64 << 20,
        cpus,
        loads: Vec::new(),
        serial: Serial::File(place.join("console")),
        cpu,
        devices: DeviceOptions::default(),
    };
    let machine =
        Machine::launch(&config).unwrap_or_else(|e| panic!("this test needs a working /dev/kvm: {e}"));
    machine.resume().unwrap();
    wait("the guest's first line", || {
        console(&place.join("console")).contains("pagestorm: ready").then_some(())
    });
    machine
}

/// Asks the guest to check its pages.
fn check(machine: &Machine, path: &Path) -> Report {
    let seen = console(path).lines().count();
    wait("room in the serial port", || (machine.serial_input(b"c") == 1).then_some(()));
    wait("the check's result", || {
        console(path).lines().skip(seen).filter_map(Report::parse).find(|report| report.check > 0)
    })
}

fn copy(set: &PageSet, from: &Machine, to: &Machine) {
    let mut page = Box::new([0; PAGE_SIZE]);
    for gfn in set.iter() {
        from.memory().read_page(gfn, &mut page);
        to.memory().write_page(gfn, &page);
    }
}

/// Pre-copy as a migration does it: all of RAM while the guest runs, what got dirty, and after the pause the rest.
fn migrate(from: &Machine, console: &Path) -> Arc<Machine> {
    let to =
        Machine::prepare(&from.description(), &Serial::File(console.to_owned()), &DeviceOptions::default())
            .unwrap();
    from.start_dirty_log().unwrap();
    copy(&PageSet::full(from.memory().bound()), from, &to);
    copy(&from.take_dirty().unwrap(), from, &to);
    from.pause().unwrap();
    let state = from.save_state().unwrap();
    copy(&from.take_dirty().unwrap(), from, &to);
    let (mut there, mut here) = (Box::new([0; PAGE_SIZE]), Box::new([0; PAGE_SIZE]));
    for gfn in (0..from.memory().bound()).map(Gfn) {
        from.memory().read_page(gfn, &mut here);
        to.memory().read_page(gfn, &mut there);
        assert!(here == there, "{gfn:?} was written without being in the dirty log");
    }
    from.stop(StopReason::Migrated);
    to.load_state(&state).unwrap();
    to.resume().unwrap();
    to
}

fn moves(words: &str, cpus: u8, cpu: CpuChoice) {
    let place = tempfile::tempdir().unwrap();
    let cmdline = format!("rate=2000 ws=32M {words}");
    let mut machine = launch(place.path(), &cmdline, cpus, cpu);
    let mut path = place.path().join("console");
    let mut before = check(&machine, &path);
    assert_eq!(before.failures, 0);
    for round in 0..6 {
        path = place.path().join(format!("console{round}"));
        machine = migrate(&machine, &path);
        let beats = machine.heartbeat().count;
        wait("heartbeats after the move", || (machine.heartbeat().count > beats + 50).then_some(()));
        let after = check(&machine, &path);
        assert_eq!((after.failures, after.first_bad), (0, None), "round {round}");
        assert!(after.pages_written > before.pages_written, "round {round}: it writes on");
        assert!(after.uptime_ms >= before.uptime_ms, "round {round}: its clock does not go back");
        assert!(after.uptime_ms - before.uptime_ms < 60_000, "round {round}: its clock does not jump");
        before = after;
    }
}

#[test]
fn a_writing_guest_that_halts_between_writes_moves_and_loses_nothing() {
    moves("idle=halt", 1, CpuChoice::Host);
}

#[test]
fn a_writing_guest_that_spins_moves_and_loses_nothing() {
    moves("idle=spin content=rewrite", 1, CpuChoice::Level(Level::V2));
}

#[test]
fn a_guest_with_a_waiting_second_cpu_moves_and_loses_nothing() {
    moves("idle=halt content=text", 2, CpuChoice::Host);
}

#[test]
fn a_pause_stops_the_guests_clock_and_a_hundred_lose_nothing() {
    let place = tempfile::tempdir().unwrap();
    let machine = launch(place.path(), "rate=5000 ws=32M", 1, CpuChoice::Host);
    let path = place.path().join("console");
    // From before the first report is asked for until after the second has come: longer than the guest's time between them,
    // by at least the time for which it stood still.
    let started = Instant::now();
    let before = check(&machine, &path);
    let mut stood_still = Duration::ZERO;
    for _ in 0..100 {
        machine.pause().unwrap();
        let since = Instant::now();
        std::thread::sleep(Duration::from_millis(20));
        stood_still += since.elapsed();
        machine.resume().unwrap();
    }
    let after = check(&machine, &path);
    let passed = Duration::from_millis(after.uptime_ms - before.uptime_ms);
    assert_eq!(after.failures, 0);
    assert!(
        passed + stood_still <= started.elapsed() + Duration::from_millis(100),
        "guest time passed: {passed:?}"
    );
}
