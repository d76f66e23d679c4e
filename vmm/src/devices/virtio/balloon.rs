//! The memory balloon (virtio 1.2, 5.5) with free page reporting: pages that the guest gives back or says are free are dropped from the
//! guest's memory file. They read as zeros from then on, so they take no memory of the host and do not travel with the VM.
//!
//! A page is dropped before its request is answered, and counts as written after it is dropped: whoever takes the set of dirty pages in between
//! sees it again. The queues stand as Linux numbers them, without gaps for those that are not offered: inflate, deflate, reports.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::queue::{Chain, QueueError, VirtQueue};
use super::{DeviceDescription, VirtioDevice, Wait};
use crate::devices::quiet::Quiet;
use crate::kvm::StateError;
use crate::limits::{BALLOON_PAGES_A_REQUEST, BALLOON_REPORT_BYTES};
use crate::memory::Mapping;
use crate::memory::buffers::Buffers;
use page::PAGE_SIZE;

/// Bits of features (5.5.3).
const VIRTIO_BALLOON_F_DEFLATE_ON_OOM: u32 = 2;
const VIRTIO_BALLOON_F_REPORTING: u32 = 5;

const INFLATE: usize = 0;
const DEFLATE: usize = 1;

/// Where the configuration has the number of pages that the guest has given.
const ACTUAL_OFFSET: u64 = 4;
/// A page's number in a request to inflate.
const NUMBER_BYTES: usize = 4;

const FEATURES: u64 = 1 << VIRTIO_BALLOON_F_DEFLATE_ON_OOM | 1 << VIRTIO_BALLOON_F_REPORTING;

/// How many pages of the guest a balloon has, and is to have: of the device and of the operator who asks for more or less.
#[derive(Debug, Default)]
pub(crate) struct Level {
    target: AtomicU32,
    actual: AtomicU32,
}

impl Level {
    /// What the guest is asked for, pages.
    pub(crate) fn target(&self) -> u32 {
        self.target.load(Ordering::SeqCst)
    }

    /// Changes it. The guest hears of it when its device says that the configuration has changed.
    pub(crate) fn set_target(&self, pages: u32) {
        self.target.store(pages, Ordering::SeqCst);
    }

    /// What the guest says that it has given, pages.
    pub(crate) fn actual(&self) -> u32 {
        self.actual.load(Ordering::SeqCst)
    }

    fn set_actual(&self, pages: u32) {
        self.actual.store(pages, Ordering::SeqCst);
    }
}

/// The device.
#[derive(Debug, Default)]
pub(crate) struct Balloon {
    level: Arc<Level>,
    quiet: Quiet,
}

impl Balloon {
    /// Its level, which changes with it.
    pub(crate) fn level(&self) -> Arc<Level> {
        Arc::clone(&self.level)
    }

    /// Drops the pages whose numbers a request has.
    fn inflate(&self, chain: &Chain<'_>, memory: &Mapping) -> Result<(), QueueError> {
        let bytes = chain.readable.bytes();
        if bytes > BALLOON_PAGES_A_REQUEST * NUMBER_BYTES {
            return Err(QueueError::Request {
                head: chain.head,
                what: "more pages than a balloon takes at once",
            });
        }
        let mut numbers = vec![0; bytes];
        chain.readable.copy_to(&mut numbers);
        let (numbers, rest) = numbers.as_chunks::<NUMBER_BYTES>();
        if !rest.is_empty() {
            return Err(QueueError::Request { head: chain.head, what: "half a page's number" });
        }
        let mut pages: Vec<u32> = numbers.iter().map(|number| u32::from_le_bytes(*number)).collect();
        pages.sort_unstable();
        pages.dedup();
        // Runs of neighbours: one call each.
        for run in pages.chunk_by(|a, b| a.checked_add(1) == Some(*b)) {
            let mut buffers = Buffers::default();
            let bytes = u32::try_from(run.len() * PAGE_SIZE).expect("bounded by the pages of a request");
            buffers.push(memory, u64::from(run[0]) * PAGE_SIZE as u64, bytes)?;
            self.discard(&buffers);
        }
        Ok(())
    }

    /// Drops the pages that a report names.
    fn report(&self, chain: &Chain<'_>) -> Result<(), QueueError> {
        if chain.writable.bytes() > BALLOON_REPORT_BYTES {
            return Err(QueueError::Request { head: chain.head, what: "a report of more than a gibibyte" });
        }
        self.discard(&chain.writable);
        Ok(())
    }

    fn discard(&self, pages: &Buffers<'_>) {
        if let Err(error) = pages.discard() {
            self.quiet.say(|dropped| {
                tracing::warn!(%error, dropped, "the host did not take back pages that the guest does not need: they stay as they are");
            });
        }
    }
}

impl VirtioDevice for Balloon {
    fn describe(&self) -> DeviceDescription {
        DeviceDescription::Balloon
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[128, 128, 128]
    }

    /// `struct virtio_balloon_config` (5.5.4), as far as the features offered reach.
    fn config(&self) -> Vec<u8> {
        [self.level.target(), self.level.actual()].map(u32::to_le_bytes).concat()
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (ACTUAL_OFFSET, Ok(actual)) = (offset, data.try_into()) {
            self.level.set_actual(u32::from_le_bytes(actual));
        }
    }

    fn set_features(&mut self, _: u64) {}

    fn reset(&mut self) {
        self.level.set_actual(0);
    }

    fn serve(&mut self, index: usize, queue: &mut VirtQueue, memory: &Mapping) -> Result<Wait, QueueError> {
        while let Some(chain) = queue.pop(memory)? {
            match index {
                INFLATE => self.inflate(&chain, memory)?,
                // A page that comes back is there when it is touched.
                DEFLATE => {}
                _ => self.report(&chain)?,
            }
            queue.push_used(memory, chain.head, 0)?;
        }
        Ok(Wait::Driver)
    }

    fn backend(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn save(&self) -> Vec<u8> {
        self.config()
    }

    fn load(&mut self, state: &[u8]) -> Result<(), StateError> {
        let bytes: [u8; 8] = state.try_into().map_err(|_| StateError::Length {
            field: "balloon's own state",
            expected: 8,
            got: state.len(),
        })?;
        let [a, b, c, d, actual @ ..] = bytes;
        self.level.set_target(u32::from_le_bytes([a, b, c, d]));
        self.level.set_actual(u32::from_le_bytes(actual));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use page::{Gfn, PageSet};

    use super::*;
    use crate::devices::virtio::driver::{BUFFERS, Driver, LIVE, NEEDS_RESET, memory};

    const REPORTS: usize = 2;

    fn drive() -> Driver {
        let mut driver = Driver::new(Box::new(Balloon::default()), memory());
        driver.start(driver.offered());
        for page in 600..620 {
            driver.memory.write_page(Gfn(page), &[1; PAGE_SIZE]);
        }
        dirty(&driver);
        driver
    }

    fn dirty(driver: &Driver) -> Vec<u64> {
        let mut set = PageSet::empty(driver.memory.bound());
        driver.memory.take_monitor_writes(&mut set);
        // The rings, which the driver and the device write, are below.
        set.iter().map(|gfn| gfn.0).filter(|gfn| *gfn >= 600).collect()
    }

    fn blank(driver: &Driver) -> Vec<u64> {
        (600..620).filter(|page| driver.get(page * PAGE_SIZE as u64, PAGE_SIZE) == [0; PAGE_SIZE]).collect()
    }

    #[test]
    fn pages_given_are_dropped_and_count_as_written() {
        let mut driver = drive();
        let numbers: Vec<u8> = [605u32, 603, 604, 610].into_iter().flat_map(u32::to_le_bytes).collect();
        driver.put(BUFFERS, &numbers);
        driver.request(INFLATE, &[(BUFFERS, 16, false)]);
        driver.request(DEFLATE, &[(BUFFERS, 16, false)]);
        driver.pass();
        assert_eq!((driver.used(INFLATE), driver.used(DEFLATE), driver.status()), (1, 1, LIVE));
        assert_eq!(blank(&driver), [603, 604, 605, 610]);
        assert_eq!(dirty(&driver), [603, 604, 605, 610]);
    }

    #[test]
    fn pages_reported_free_are_dropped_if_they_are_whole() {
        let mut driver = drive();
        let page = PAGE_SIZE as u64;
        driver.request(
            REPORTS,
            &[(601 * page, 8192, true), (606 * page + 1, 8192, true), (610 * page, 100, true)],
        );
        driver.pass();
        assert_eq!(driver.used(REPORTS), 1);
        assert_eq!(blank(&driver), [601, 602, 607]);
        assert_eq!(dirty(&driver), [601, 602, 607]);
    }

    #[test]
    fn what_is_not_memory_or_too_much_stops_the_device() {
        for (number, length) in [(u32::MAX, 4), (603, 3), (603, 0x2_0000)] {
            let mut driver = drive();
            driver.put(BUFFERS, &number.to_le_bytes());
            driver.request(INFLATE, &[(BUFFERS, length, false)]);
            driver.pass();
            assert_eq!(driver.status(), LIVE | NEEDS_RESET, "{number:#x} {length}");
            assert!(blank(&driver).is_empty());
        }
    }

    #[test]
    fn its_numbers_move_with_it() {
        let mut balloon = Balloon::default();
        balloon.level().set_target(7);
        balloon.write_config(ACTUAL_OFFSET, &5u32.to_le_bytes());
        balloon.write_config(0, &9u32.to_le_bytes());
        let mut other = Balloon::default();
        other.load(&balloon.save()).unwrap();
        assert_eq!(other.config(), [7, 0, 0, 0, 5, 0, 0, 0]);
        assert!(other.load(&[0; 7]).is_err());
        other.reset();
        assert_eq!(other.config(), [7, 0, 0, 0, 0, 0, 0, 0]);
    }
}
