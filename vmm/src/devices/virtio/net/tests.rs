//! The network device, driven by a driver in this process, with a socket in place of the TAP; and once with a real TAP.

use std::os::unix::net::UnixDatagram;

use super::*;
use crate::devices::DeviceError;
use crate::devices::virtio::driver::{BUFFERS, Driver, EVENT_IDX, LIVE, NEEDS_RESET, memory};

const SEND: usize = 1;
const BUFFER_BYTES: u32 = 1500;

fn mac() -> Mac {
    "52:54:00:12:34:56".parse().unwrap()
}

fn net() -> (Box<Net>, UnixDatagram) {
    let (here, there) = UnixDatagram::pair().unwrap();
    there.set_nonblocking(true).unwrap();
    let tap = Tap::stand_in(here).unwrap();
    (Box::new(Net::new("lan".to_owned(), mac(), tap)), there)
}

fn drive(without: u64) -> (Driver, UnixDatagram) {
    let (device, there) = net();
    let mut driver = Driver::new(device, memory());
    driver.start(driver.offered() & !without);
    (driver, there)
}

fn buffer(at: u16) -> u64 {
    BUFFERS + u64::from(at) * 0x1000
}

/// A packet of `bytes` bytes with its header.
fn packet(bytes: usize) -> Vec<u8> {
    let content = (0..bytes).map(|at| (at % 251).to_le_bytes()[0]);
    [0; HEADER_BYTES].into_iter().chain(content).collect()
}

impl Driver {
    fn give_buffers(&mut self, from: u16, count: u16) {
        for at in from..from + count {
            self.request(RECEIVE, &[(buffer(at), BUFFER_BYTES, true)]);
        }
    }

    /// What stands in the buffers that came back as numbers `from` to the end.
    fn received(&self, from: u16) -> Vec<u8> {
        let back = (from..self.used(RECEIVE)).map(|at| self.used_element(RECEIVE, at));
        back.flat_map(|(head, bytes)| self.get(buffer(u16::try_from(head).unwrap()), bytes as usize))
            .collect()
    }
}

#[test]
fn packets_come_and_go() {
    let (mut driver, there) = drive(0);
    driver.give_buffers(0, 2);
    there.send(&packet(60)).unwrap();
    driver.pass();
    let mut expected = packet(60);
    expected[10] = 1;
    assert_eq!(driver.received(0), expected);
    assert_eq!(driver.interrupts(), 1);
    driver.put(buffer(5), &packet(100));
    driver.request(SEND, &[(buffer(5), 12, false), (buffer(5) + 12, 100, false)]);
    driver.pass();
    let mut got = [0; 200];
    let bytes = there.recv(&mut got).unwrap();
    assert_eq!(&got[..bytes], packet(100));
    assert_eq!((driver.used(SEND), driver.status()), (1, LIVE));
}

#[test]
fn a_long_packet_takes_several_buffers_that_come_back_together() {
    for features in [0, EVENT_IDX] {
        let (mut driver, there) = drive(features ^ EVENT_IDX);
        // Too few at first: nothing comes back before the last one is there.
        there.send(&packet(7000)).unwrap();
        driver.give_buffers(0, 4);
        driver.pass();
        assert_eq!((driver.used(RECEIVE), driver.interrupts()), (0, 0));
        driver.give_buffers(4, 3);
        driver.pass();
        assert_eq!((driver.used(RECEIVE), driver.interrupts()), (5, 1));
        let mut expected = packet(7000);
        expected[10] = 5;
        assert_eq!(driver.received(0), expected);
        there.send(&packet(64)).unwrap();
        driver.pass();
        assert_eq!(driver.used(RECEIVE), 6);
    }
}

#[test]
fn the_longest_packet_passes_and_a_longer_one_does_not() {
    let (mut driver, there) = drive(0);
    let big = 0x2_0000;
    driver.request(RECEIVE, &[(BUFFERS, big, true)]);
    there.send(&packet(PACKET_MAX_BYTES + 1 - HEADER_BYTES)).unwrap();
    there.send(&packet(PACKET_MAX_BYTES - HEADER_BYTES)).unwrap();
    driver.pass();
    assert_eq!(driver.used_element(RECEIVE, 0).1 as usize, PACKET_MAX_BYTES);
    for bytes in [PACKET_MAX_BYTES, PACKET_MAX_BYTES + 1, 25, 0] {
        driver.request(SEND, &[(BUFFERS, u32::try_from(bytes).unwrap(), false)]);
    }
    driver.pass();
    let mut got = vec![0; PACKET_MAX_BYTES + 10];
    assert_eq!(there.recv(&mut got).unwrap(), PACKET_MAX_BYTES);
    assert!(there.recv(&mut got).is_err());
    assert_eq!((driver.used(SEND), driver.status()), (4, LIVE));
}

#[test]
fn without_merging_a_packet_that_does_not_fit_is_dropped_and_the_buffer_kept() {
    let (mut driver, there) = drive(1 << VIRTIO_NET_F_MRG_RXBUF);
    driver.give_buffers(0, 1);
    there.send(&packet(3000)).unwrap();
    there.send(&packet(300)).unwrap();
    driver.pass();
    assert_eq!((driver.used(RECEIVE), driver.used_element(RECEIVE, 0).1), (1, 312));
}

#[test]
fn a_buffer_without_room_stops_the_device() {
    let (mut driver, there) = drive(0);
    driver.request(RECEIVE, &[(BUFFERS, 100, false)]);
    there.send(&packet(60)).unwrap();
    driver.pass();
    assert_eq!(driver.status(), LIVE | NEEDS_RESET);
    driver.start(driver.offered());
    driver.give_buffers(0, 1);
    there.send(&packet(61)).unwrap();
    driver.pass();
    assert_eq!(driver.used_element(RECEIVE, 0).1, 73);
}

#[test]
fn its_configuration_is_its_address() {
    let (driver, _there) = drive(0);
    assert_eq!(driver.read(0x100).to_le_bytes(), [0x52, 0x54, 0x00, 0x12]);
    assert_eq!(driver.read(0x104).to_le_bytes()[..3], [0x34, 0x56, 1]);
}

#[test]
fn who_arrives_is_announced_once() {
    let (mut device, there) = net();
    device.station.announce();
    device.load(&device.save()).unwrap();
    device.station.announce();
    device.station.announce();
    let mut got = [0; 100];
    assert_eq!(there.recv(&mut got).unwrap(), HEADER_BYTES + 60);
    assert_eq!(&got[12..26], &[&[0xff; 6][..], &mac().bytes(), &[0x80, 0x35]].concat());
    assert!(there.recv(&mut got).is_err(), "once");
    assert!(device.load(&[0]).is_err());
}

#[test]
fn a_tap_that_cannot_be_had_says_what_to_do() {
    let error = Tap::open("a-name-that-is-too-long").unwrap_err();
    assert!(matches!(error, DeviceError::Tap { .. }), "{error}");
    assert!(error.to_string().contains("a-name-that-is-too-long"), "{error}");
}

/// As root with /dev/net/tun; otherwise it says that it tested nothing.
#[test]
fn a_real_tap_is_made_and_belongs_to_one_device() {
    if !rustix::process::geteuid().is_root() || !std::path::Path::new("/dev/net/tun").exists() {
        eprintln!("SKIPPED: making a TAP interface needs root and /dev/net/tun");
        return;
    }
    let name = format!("tern{}", std::process::id());
    let tap = Tap::open(&name).unwrap();
    tap.set_offloads(libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN).unwrap();
    let error = Tap::open(&name).unwrap_err();
    assert!(error.to_string().contains("another process has it"), "{error}");
    let mut device = Net::new("lan".to_owned(), mac(), tap);
    device.load(&[]).unwrap();
    device.station.announce();
    let sent = format!("/sys/class/net/{name}/statistics/rx_packets");
    assert_eq!(std::fs::read_to_string(sent).unwrap().trim(), "1", "the announcement");
    let error = Tap::open("lo").unwrap_err();
    assert!(error.to_string().contains("no TAP"), "{error}");
}
