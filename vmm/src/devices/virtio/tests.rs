//! The transport and its threads, driven by a driver in this process.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use page::PageSet;
use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

use super::driver::{BUFFERS, Driver, EVENT_IDX, LIVE, NEEDS_RESET, VERSION_1, memory};
use super::rng::Rng;
use super::state::VirtioState;
use crate::devices::mmio::MmioDevice as _;

fn rng() -> Driver {
    Driver::new(Box::new(Rng::default()), memory())
}

fn live() -> Driver {
    let mut driver = rng();
    driver.start(0);
    driver
}

/// Waits for what another thread does; fails the test if it does not come.
fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < end, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_driver_finds_the_device_and_its_features() {
    let driver = rng();
    let read = |register| driver.read(register);
    assert_eq!(read(reg::VIRTIO_MMIO_MAGIC_VALUE).to_le_bytes(), *b"virt");
    assert_eq!((read(reg::VIRTIO_MMIO_VERSION), read(reg::VIRTIO_MMIO_DEVICE_ID)), (2, 4));
    assert_eq!(driver.offered(), VERSION_1 | EVENT_IDX | 1 << 28);
    driver.write(reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, 2);
    assert_eq!(read(reg::VIRTIO_MMIO_DEVICE_FEATURES), 0);
    assert_eq!((read(reg::VIRTIO_MMIO_QUEUE_NUM_MAX), read(reg::VIRTIO_MMIO_SHM_LEN_LOW)), (64, u32::MAX));
    driver.write(reg::VIRTIO_MMIO_QUEUE_SEL, 1);
    assert_eq!((read(reg::VIRTIO_MMIO_QUEUE_NUM_MAX), read(reg::VIRTIO_MMIO_QUEUE_READY)), (0, 0));
    let mut half = [0xff; 2];
    driver.device.read(0, &mut half);
    assert_eq!(half, [0; 2], "registers are read whole");
}

#[test]
fn features_that_were_not_offered_and_drivers_of_before_1_0_are_refused() {
    let driver = rng();
    for features in [0, EVENT_IDX, VERSION_1 | 1, VERSION_1 | 1 << 33] {
        driver.greet(features);
        assert_eq!(driver.status(), 3, "{features:#x}");
        driver.set_status(15);
        assert_eq!(driver.status(), 3, "{features:#x}");
    }
    driver.greet(VERSION_1 | EVENT_IDX);
    assert_eq!(driver.status(), 11);
    driver.take_features(VERSION_1);
    driver.set_status(3);
    assert_eq!(driver.status(), 11, "bits are not taken back one by one");
    driver.set_status(0);
    assert_eq!(driver.status(), 0);
}

#[test]
fn queues_are_checked_when_they_are_made_ready() {
    let driver = rng();
    assert!(!driver.set_up(0, 16, Driver::rings(0)), "before FEATURES_OK");
    driver.greet(VERSION_1);
    let good = Driver::rings(0);
    for (size, rings) in [
        (0, good),
        (3, good),
        (128, good),
        (u32::MAX, good),
        (0x1_0010, good),
        (16, [good[0] + 8, good[1], good[2]]),
        (16, [good[0], good[1] + 1, good[2]]),
        (16, [good[0], good[1], good[2] + 2]),
        (16, [0xd000_0000, good[1], good[2]]),
        (16, [good[0], 0, good[2]]),
        (16, [good[0], (4 << 20) - 36, good[2]]),
        (16, [good[0], good[1], u64::MAX - 3]),
        (16, [u64::MAX - 15, good[1], good[2]]),
    ] {
        assert!(!driver.set_up(0, size, rings), "{size} {rings:x?}");
    }
    assert!(driver.set_up(0, 16, good));
    driver.write(reg::VIRTIO_MMIO_QUEUE_NUM, 8);
    driver.write(reg::VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(driver.read(reg::VIRTIO_MMIO_QUEUE_READY), 0);
    assert!(!driver.set_up(1, 16, good), "there is one queue");
}

#[test]
fn requests_are_served_and_the_driver_is_told_and_what_was_written_is_dirty() {
    let mut driver = live();
    let mut forget = PageSet::empty(driver.memory.bound());
    driver.memory.take_monitor_writes(&mut forget);
    driver.request(0, &[(BUFFERS, 100, true), (BUFFERS + 0x5000, 28, true)]);
    let head = driver.request(0, &[(BUFFERS + 0x8000, 8, true)]);
    // The driver's own writes are the monitor's in this test: they are forgotten before the device's.
    driver.memory.take_monitor_writes(&mut forget);
    driver.pass();
    assert_eq!((driver.used(0), driver.used_element(0, 0).1), (2, 128));
    assert_eq!(driver.used_element(0, 1), (head.into(), 8));
    assert_ne!(driver.get(BUFFERS, 100), vec![0; 100]);
    assert_eq!((driver.interrupts(), driver.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS)), (1, 1));
    driver.write(reg::VIRTIO_MMIO_INTERRUPT_ACK, 1);
    assert_eq!(driver.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    let mut dirty = PageSet::empty(driver.memory.bound());
    driver.memory.take_monitor_writes(&mut dirty);
    let frame = |address: u64| page::Gfn(address / 4096);
    let expected = [Driver::rings(0)[2], BUFFERS, BUFFERS + 0x5000, BUFFERS + 0x8000].map(frame);
    assert_eq!(dirty.iter().collect::<Vec<_>>(), expected);
    driver.pass();
    assert_eq!((driver.used(0), driver.interrupts()), (2, 0), "nothing more was asked for");
}

#[test]
fn broken_chains_stop_the_device_until_it_is_reset() {
    let next = VRING_DESC_F_NEXT;
    let write = VRING_DESC_F_WRITE;
    type Break = fn(&mut Driver);
    let breaks: [(&str, Break); 9] = [
        ("a loop", |d| d.descriptor(0, 0, BUFFERS, 1, VRING_DESC_F_NEXT, 0)),
        ("a next outside", |d| d.descriptor(0, 0, BUFFERS, 1, VRING_DESC_F_NEXT, 16)),
        ("beyond RAM", |d| d.descriptor(0, 0, 4 << 20, 1, VRING_DESC_F_WRITE, 0)),
        ("around the end", |d| d.descriptor(0, 0, u64::MAX, 2, VRING_DESC_F_WRITE, 0)),
        ("a huge one", |d| d.descriptor(0, 0, BUFFERS, u32::MAX, VRING_DESC_F_WRITE, 0)),
        ("readable after writable", |d| {
            d.descriptor(0, 0, BUFFERS, 1, VRING_DESC_F_NEXT | VRING_DESC_F_WRITE, 1);
            d.descriptor(0, 1, BUFFERS, 1, 0, 0);
        }),
        ("an indirect table of half a descriptor", |d| {
            d.descriptor(0, 0, BUFFERS, 8, VRING_DESC_F_INDIRECT, 0);
        }),
        ("an indirect table in an indirect table", |d| {
            d.descriptor(0, 0, Driver::rings(0)[0], 16, VRING_DESC_F_INDIRECT, 0);
        }),
        ("more in the available ring than it holds", |d| {
            (0..17).for_each(|_| d.make_available(0, 1));
        }),
    ];
    assert_eq!((next, write), (1, 2));
    for (what, break_it) in breaks {
        let mut driver = live();
        break_it(&mut driver);
        driver.make_available(0, 0);
        driver.pass();
        assert_eq!(driver.status(), LIVE | NEEDS_RESET, "{what}");
        assert_eq!((driver.used(0), driver.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS)), (0, 2), "{what}");
        driver.start(0);
        driver.request(0, &[(BUFFERS, 16, true)]);
        driver.pass();
        assert_eq!((driver.used(0), driver.status()), (1, LIVE), "{what}: it works again");
    }
}

#[test]
fn long_chains_and_heads_outside_are_refused() {
    let mut driver = live();
    for at in 0..16 {
        driver.descriptor(0, at, BUFFERS, 1, VRING_DESC_F_WRITE | VRING_DESC_F_NEXT, at + 1);
    }
    driver.make_available(0, 300);
    driver.pass();
    assert_eq!(driver.status(), LIVE | NEEDS_RESET);

    // An indirect table may be longer than the queue: the device's own bound holds.
    let mut driver = live();
    let table: Vec<u8> = (0..200u16)
        .flat_map(|at| {
            let mut one = BUFFERS.to_le_bytes().to_vec();
            one.extend(1u32.to_le_bytes());
            one.extend([3, 0]);
            one.extend((at + 1).to_le_bytes());
            one
        })
        .collect();
    driver.put(BUFFERS + 0x1_0000, &table);
    driver.descriptor(0, 0, BUFFERS + 0x1_0000, 200 * 16, VRING_DESC_F_INDIRECT, 0);
    driver.make_available(0, 0);
    driver.pass();
    assert_eq!(driver.status(), LIVE | NEEDS_RESET);
}

#[test]
fn interrupts_come_when_the_driver_asked_for_them() {
    let mut driver = rng();
    driver.start(EVENT_IDX);
    // used_event stands behind the available ring: an interrupt at the third request.
    driver.put(Driver::rings(0)[1] + 4 + 16 * 2, &2u16.to_le_bytes());
    for told in [0, 0, 1, 0] {
        driver.request(0, &[(BUFFERS, 8, true)]);
        driver.pass();
        assert_eq!(driver.interrupts(), told);
    }
    // avail_event stands behind the used ring: the device wants to hear of the next request.
    assert_eq!(driver.get(Driver::rings(0)[2] + 4 + 16 * 8, 2), 4u16.to_le_bytes());
}

#[test]
fn a_saved_device_goes_on_elsewhere_and_tells_its_driver_again() {
    let mut driver = rng();
    driver.start(EVENT_IDX);
    driver.request(0, &[(BUFFERS, 8, true)]);
    driver.pass();
    driver.request(0, &[(BUFFERS, 24, true)]);
    let state = VirtioState::decode(&driver.device.save().encode()).unwrap();
    assert_eq!((state.queues[0].next_avail, state.queues[0].next_used, state.interrupt_status), (1, 1, 1));

    let moved = Driver::new(Box::new(Rng::default()), Arc::clone(&driver.memory));
    moved.device.load(&state).unwrap();
    assert_eq!(moved.device.save(), state);
    assert_eq!(moved.status(), LIVE);
    moved.device.run();
    assert_eq!(moved.interrupts(), 1, "one may have been on its way");
    moved.pass();
    assert_eq!((moved.used(0), moved.used_element(0, 1).1), (2, 24));
}

#[test]
fn states_that_no_device_has_are_refused() {
    let good = live().device.save();
    let broken: [fn(&mut VirtioState); 7] = [
        |s| s.kind = 2,
        |s| s.driver_features |= 1,
        |s| s.driver_features = 0,
        |s| s.status = 7,
        |s| s.queues.clear(),
        |s| s.queues[0].size = 100,
        |s| s.queues[0].used = 0xd000_0000,
    ];
    for (number, break_it) in broken.into_iter().enumerate() {
        let mut state = good.clone();
        break_it(&mut state);
        assert!(rng().device.load(&state).is_err(), "{number}");
    }
    rng().device.load(&good).unwrap();
}

#[test]
fn the_thread_serves_while_it_runs_and_not_while_it_is_parked() {
    let mut driver = Driver::threaded(Box::new(Rng::default()), memory());
    driver.start(0);
    driver.request(0, &[(BUFFERS, 8, true)]);
    driver.notify(0);
    driver.device.park();
    assert_eq!(driver.used(0), 0);
    driver.device.run();
    wait("the first request", || driver.used(0) == 1);
    driver.request(0, &[(BUFFERS, 8, true)]);
    driver.notify(0);
    wait("the second request", || driver.used(0) == 2);
    driver.device.park();
    driver.request(0, &[(BUFFERS, 8, true)]);
    driver.notify(0);
    std::thread::sleep(Duration::from_millis(5));
    assert_eq!(driver.used(0), 2, "it is parked");
    driver.device.run();
    wait("what was asked for meanwhile", || driver.used(0) == 3);
    driver.device.quit();
    driver.device.park();
}

/// Resets at any moment, from another virtual CPU, while the queue is full and machines are paused: nothing hangs, and no request is served
/// after its reset.
#[test]
fn reset_storms_and_pauses_end() {
    let mut driver = Driver::threaded(Box::new(Rng::default()), memory());
    let device = Arc::clone(&driver.device);
    let over = Arc::new(AtomicBool::new(false));
    let (pausing, done) = (Arc::clone(&device), Arc::clone(&over));
    let pauser = std::thread::spawn(move || {
        while !done.load(Ordering::Relaxed) {
            pausing.run();
            pausing.park();
        }
        pausing.run();
    });
    for _ in 0..300 {
        driver.start(EVENT_IDX);
        for _ in 0..8 {
            driver.request(0, &[(BUFFERS, 0x1000, true)]);
            driver.notify(0);
        }
        driver.set_status(0);
        let used = driver.used(0);
        assert!(used <= 8);
        std::thread::yield_now();
        assert_eq!((driver.used(0), driver.status()), (used, 0));
    }
    over.store(true, Ordering::Relaxed);
    pauser.join().unwrap();
    driver.start(0);
    driver.request(0, &[(BUFFERS, 8, true)]);
    driver.notify(0);
    wait("it still works", || driver.used(0) == 1);
}
