//! The block device, driven by a driver in this process.

use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use tempfile::TempDir;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_SECURE_ERASE, VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::*;
use crate::devices::mmio::MmioDevice as _;
use crate::devices::virtio::driver::{BUFFERS, Driver, LIVE, NEEDS_RESET, Part, memory};

const OK: u8 = 0;
const FAILED: u8 = 1;
const UNSUPPORTED: u8 = 2;
const DISK_BYTES: usize = 1 << 20;
const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x100;
const DATA: u64 = BUFFERS + 0x1000;

struct Place(TempDir);

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let content: Vec<u8> = (0..DISK_BYTES).map(|at| (at / 512).to_le_bytes()[0] | 1).collect();
        std::fs::write(dir.path().join("disk"), content).unwrap();
        Self(dir)
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("disk")
    }

    fn options(&self) -> DiskOptions {
        DiskOptions { path: self.path(), read_only: false, id: Some("the-disk".to_owned()), direct: false }
    }

    fn content(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        std::fs::File::open(self.path()).unwrap().read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }
}

fn drive(options: &DiskOptions) -> Driver {
    let mut driver = Driver::new(Box::new(Block::open(options).unwrap()), memory());
    driver.start(driver.offered());
    driver
}

impl Driver {
    /// One request; its status, or what stands where the status would if the device stopped.
    fn ask(&mut self, kind: u32, sector: u64, data: &[Part]) -> u8 {
        let mut header = kind.to_le_bytes().to_vec();
        header.extend([0; 4]);
        header.extend(sector.to_le_bytes());
        self.put(HEADER, &header);
        self.put(STATUS, &[0xee]);
        let before = self.used(0);
        let parts = [&[(HEADER, 16, false)], data, &[(STATUS, 1, true)]].concat();
        self.request(0, &parts);
        self.pass();
        assert_eq!(self.used(0), before + 1);
        self.get(STATUS, 1)[0]
    }

    fn ranges(&mut self, kind: u32, ranges: &[(u64, u32, u32)]) -> u8 {
        let bytes: Vec<u8> = ranges
            .iter()
            .flat_map(|(sector, count, flags)| {
                [sector.to_le_bytes().to_vec(), count.to_le_bytes().to_vec(), flags.to_le_bytes().to_vec()]
                    .concat()
            })
            .collect();
        self.put(DATA, &bytes);
        self.ask(kind, 0, &[(DATA, u32::try_from(bytes.len()).unwrap(), false)])
    }
}

#[test]
fn sectors_are_read_and_written_however_the_buffers_are_cut() {
    let place = Place::new();
    let mut driver = drive(&place.options());
    assert_eq!(driver.ask(VIRTIO_BLK_T_IN, 7, &[(DATA, 500, true), (DATA + 0x2000, 524, true)]), OK);
    assert_eq!(driver.used_element(0, 0).1, 1025);
    assert_eq!(
        [driver.get(DATA, 500), driver.get(DATA + 0x2000, 524)].concat(),
        place.content(7 * 512, 1024)
    );
    driver.put(DATA, &[0xab; 512]);
    assert_eq!(driver.ask(VIRTIO_BLK_T_OUT, 3, &[(DATA, 100, false), (DATA + 100, 412, false)]), OK);
    assert_eq!(place.content(3 * 512, 513), [vec![0xab; 512], vec![5]].concat());
    assert_eq!(driver.ask(VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
    assert_eq!(driver.ask(VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 20, true)]), OK);
    assert_eq!(driver.get(DATA, 20), *b"the-disk\0\0\0\0\0\0\0\0\0\0\0\0");
}

#[test]
fn the_configuration_says_what_the_disk_is() {
    let place = Place::new();
    let driver = drive(&place.options());
    let read = |offset: u64, bytes: usize| {
        let mut data = vec![0xff; bytes];
        driver.device.read(0x100 + offset, &mut data);
        data
    };
    assert_eq!(read(0, 8), 2048u64.to_le_bytes());
    assert_eq!(read(12, 4), BLOCK_SEGMENTS.to_le_bytes());
    assert_eq!((read(20, 4), read(24, 1), read(32, 1)), (512u32.to_le_bytes().to_vec(), vec![3], vec![1]));
    assert_eq!((read(56, 4), read(60, 4), read(0xefc, 4)), (vec![1, 0, 0, 0], vec![0; 4], vec![0; 4]));
    driver.device.write(0x120, &[0]);
    assert_eq!(read(32, 1), [0]);
    driver.device.write(0x120, &[7]);
    driver.device.write(0x100, &[0; 8]);
    assert_eq!((read(32, 1), read(0, 8)), (vec![0], 2048u64.to_le_bytes().to_vec()));
    assert_eq!(driver.device.save().own, [0]);
    driver.set_status(0);
    assert_eq!(read(32, 1), [1]);
}

#[test]
fn what_a_driver_may_not_ask_for_fails_and_the_disk_is_as_it_was() {
    let place = Place::new();
    let before = place.content(0, DISK_BYTES);
    let mut driver = drive(&place.options());
    let long = u32::try_from(BLOCK_REQUEST_BYTES_TEST).unwrap();
    for (kind, sector, length) in [
        (VIRTIO_BLK_T_OUT, 2048, 512),
        (VIRTIO_BLK_T_OUT, 2047, 1024),
        (VIRTIO_BLK_T_OUT, u64::MAX, 512),
        (VIRTIO_BLK_T_OUT, u64::MAX / 512, 512),
        (VIRTIO_BLK_T_OUT, 0, 511),
        (VIRTIO_BLK_T_DISCARD, 0, 15),
        (VIRTIO_BLK_T_DISCARD, 0, 17 * 16),
    ] {
        assert_eq!(driver.ask(kind, sector, &[(DATA, length, false)]), FAILED, "{kind} {sector} {length}");
    }
    assert_eq!(driver.ask(VIRTIO_BLK_T_OUT, 0, &[]), FAILED);
    assert_eq!(driver.ask(VIRTIO_BLK_T_IN, 2048, &[(DATA, 512, true)]), FAILED);
    assert_eq!(driver.ask(VIRTIO_BLK_T_IN, 0, &vec![(DATA, long, true); 13]), FAILED);
    assert_eq!(driver.ask(VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 19, true)]), FAILED);
    assert_eq!(driver.ask(VIRTIO_BLK_T_SECURE_ERASE, 0, &[]), UNSUPPORTED);
    assert_eq!(driver.ask(u32::MAX, 0, &[]), UNSUPPORTED);
    assert_eq!(driver.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 8, 1)]), UNSUPPORTED);
    assert_eq!(driver.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, 8, 0), (2040, 9, 0)]), FAILED);
    assert_eq!(driver.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(0, u32::MAX, 0)]), FAILED);
    assert_eq!(place.content(0, DISK_BYTES), before);
    assert_eq!(driver.status(), LIVE);
}

/// As long as guest memory in these tests allows; thirteen of them are more than a request may have.
const BLOCK_REQUEST_BYTES_TEST: usize = 1 << 20;

#[test]
fn a_request_without_header_or_status_stops_the_device() {
    let place = Place::new();
    for parts in [&[(HEADER, 16, false)][..], &[(HEADER, 15, false), (STATUS, 1, true)], &[(STATUS, 1, true)]]
    {
        let mut driver = drive(&place.options());
        driver.request(0, parts);
        driver.pass();
        assert_eq!(driver.status(), LIVE | NEEDS_RESET, "{parts:?}");
    }
}

#[test]
fn ranges_are_discarded_and_zeroed() {
    let place = Place::new();
    let mut driver = drive(&place.options());
    assert_eq!(driver.ranges(VIRTIO_BLK_T_DISCARD, &[(8, 8, 0), (32, 0, 0), (64, 16, 0)]), OK);
    assert_eq!(driver.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(100, 1, 0), (200, 3, 1)]), OK);
    for (sector, count) in [(8, 8), (64, 16), (100, 1), (200, 3)] {
        assert_eq!(place.content(sector * 512, count * 512), vec![0; count * 512]);
        assert_ne!(place.content((sector + count as u64) * 512, 1), [0]);
    }
    assert_eq!(std::fs::metadata(place.path()).unwrap().len(), DISK_BYTES as u64);
}

#[test]
fn a_read_only_disk_is_not_written() {
    let place = Place::new();
    let before = place.content(0, DISK_BYTES);
    let mut driver = drive(&DiskOptions { read_only: true, ..place.options() });
    assert_ne!(driver.offered() & 1 << VIRTIO_BLK_F_RO, 0);
    assert_eq!(driver.ask(VIRTIO_BLK_T_IN, 0, &[(DATA, 512, true)]), OK);
    assert_eq!(driver.ask(VIRTIO_BLK_T_OUT, 0, &[(DATA, 512, false)]), FAILED);
    assert_eq!(driver.ranges(VIRTIO_BLK_T_DISCARD, &[(0, 8, 0)]), FAILED);
    assert_eq!(driver.ask(VIRTIO_BLK_T_FLUSH, 0, &[]), OK);
    assert_eq!(place.content(0, DISK_BYTES), before);
}

#[test]
fn a_file_that_fails_is_an_error_for_its_driver() {
    let place = Place::new();
    let mut driver = drive(&place.options());
    std::fs::File::options().write(true).open(place.path()).unwrap().set_len(512).unwrap();
    assert_eq!(driver.ask(VIRTIO_BLK_T_IN, 0, &[(DATA, 512, true)]), OK);
    assert_eq!(driver.ask(VIRTIO_BLK_T_IN, 1, &[(DATA, 512, true)]), FAILED);
    assert_eq!(driver.status(), LIVE);
}

/// On a file system with direct I/O; otherwise the refusal is looked at.
#[test]
fn a_disk_that_passes_the_hosts_cache_by_takes_what_is_not_aligned() {
    let place = Place::new();
    let options = DiskOptions { direct: true, ..place.options() };
    if let Err(error) = Block::open(&options) {
        let why = std::error::Error::source(&error).unwrap().to_string();
        assert!(why.contains("leave direct=on out"), "{error}: {why}");
        return;
    }
    let mut driver = drive(&options);
    for (at, sector, bytes) in
        [(DATA, 0, 4096), (DATA + 0x200, 8, 4096), (DATA + 1, 3, 1536), (DATA + 0x204, 15, 512)]
    {
        let (offset, length) = (sector * 512, usize::try_from(bytes).unwrap());
        let beside = place.content(offset + u64::from(bytes), 512);
        assert_eq!(driver.ask(VIRTIO_BLK_T_IN, sector, &[(at, bytes, true)]), OK);
        assert_eq!(driver.get(at, length), place.content(offset, length), "{at:#x} {sector}");
        let new = vec![u8::try_from(sector).unwrap() ^ 0xa5; length];
        driver.put(at, &new);
        assert_eq!(driver.ask(VIRTIO_BLK_T_OUT, sector, &[(at, bytes, false)]), OK);
        assert_eq!(place.content(offset, length), new, "{at:#x} {sector}");
        assert_eq!(place.content(offset + u64::from(bytes), 512), beside);
    }
    assert_eq!(driver.ranges(VIRTIO_BLK_T_WRITE_ZEROES, &[(5, 3, 0)]), OK);
    assert_eq!(place.content(5 * 512, 3 * 512), [0; 3 * 512]);
}

#[test]
fn one_vm_writes_a_disk_or_many_read_it() {
    let place = Place::new();
    let open = |read_only| Disk::open(&DiskOptions { read_only, ..place.options() }).unwrap();
    let (writer, second, reader, another) = (open(false), open(false), open(true), open(true));
    writer.lock().unwrap();
    writer.lock().unwrap();
    assert!(matches!(second.lock(), Err(DeviceError::DiskInUse { .. })));
    assert!(matches!(reader.lock(), Err(DeviceError::DiskInUse { .. })));
    writer.unlock().unwrap();
    writer.unlock().unwrap();
    second.lock().unwrap();
    assert!(matches!(writer.lock(), Err(DeviceError::DiskInUse { .. })), "it runs elsewhere");
    drop(second);
    reader.lock().unwrap();
    another.lock().unwrap();
    assert!(matches!(writer.lock(), Err(DeviceError::DiskInUse { .. })));
}

#[test]
fn what_is_no_disk_is_refused() {
    let place = Place::new();
    let at = |path: PathBuf| Block::open(&DiskOptions { path, ..place.options() }).unwrap_err();
    assert!(matches!(at(place.0.path().join("absent")), DeviceError::Disk { .. }));
    assert!(matches!(at(place.0.path().to_owned()), DeviceError::Disk { .. }));
    assert!(matches!(at("/dev/null".into()), DeviceError::Disk { .. }));
    for length in [0, 100] {
        let odd = place.0.path().join("odd");
        std::fs::write(&odd, vec![0; length]).unwrap();
        assert!(matches!(at(odd), DeviceError::DiskSize { block: 512, .. }));
    }
}

#[test]
fn a_saved_disk_keeps_its_cache_mode() {
    let place = Place::new();
    let driver = drive(&place.options());
    driver.device.write(0x120, &[0]);
    let state = driver.device.save();
    let moved = Driver::new(Box::new(Block::open(&place.options()).unwrap()), Arc::clone(&driver.memory));
    moved.device.load(&state).unwrap();
    assert_eq!(moved.device.save(), state);
    let mut wrong = state;
    wrong.own = vec![2];
    let fresh = Driver::new(Box::new(Block::open(&place.options()).unwrap()), memory());
    assert!(fresh.device.load(&wrong).is_err());
}
