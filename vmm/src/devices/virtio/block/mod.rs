//! The block device (virtio 1.2, 5.2): a raw file or block device of the host as a disk.
//!
//! Requests are carried out one after the other by the device's thread, straight between guest memory and the file; there is none in flight
//! when the thread is parked. With VIRTIO_BLK_F_FLUSH the host's cache is a write-back cache and a flush is fdatasync(2); a driver that
//! turns write-back off gets one after each write.

mod direct;
mod disk;
mod request;
mod stored;
#[cfg(test)]
mod tests;

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};

pub(crate) use self::disk::Disk;
use super::queue::{QueueError, VirtQueue};
use super::{DeviceDescription, VirtioDevice, Wait};
use crate::config::DiskOptions;
use crate::devices::DeviceError;
use crate::devices::quiet::Quiet;
use crate::kvm::StateError;
use crate::limits::{
    BLOCK_DISCARD_SECTORS, BLOCK_RANGES, BLOCK_SEGMENT_BYTES, BLOCK_SEGMENTS, BLOCK_WRITE_ZEROES_SECTORS,
};
use crate::memory::Mapping;

/// The unit of addresses, bytes, whatever the block size (5.2.4).
const SECTOR_BYTES: u32 = 512;
/// What the guest should align to, bytes: the host's pages and most file systems' blocks.
const PHYSICAL_BLOCK_BYTES: u32 = 4096;
/// Where the configuration has the cache's mode.
const WRITE_BACK_OFFSET: u64 = 32;

const READ_FEATURES: u64 = 1 << VIRTIO_BLK_F_SEG_MAX
    | 1 << VIRTIO_BLK_F_SIZE_MAX
    | 1 << VIRTIO_BLK_F_BLK_SIZE
    | 1 << VIRTIO_BLK_F_TOPOLOGY;
const WRITE_FEATURES: u64 = 1 << VIRTIO_BLK_F_FLUSH
    | 1 << VIRTIO_BLK_F_CONFIG_WCE
    | 1 << VIRTIO_BLK_F_DISCARD
    | 1 << VIRTIO_BLK_F_WRITE_ZEROES;

/// The device.
#[derive(Debug)]
pub(crate) struct Block {
    disk: Arc<Disk>,
    driver_features: u64,
    /// The cache's mode as the driver has set it.
    write_back: bool,
    quiet: Quiet,
}

impl Block {
    /// Opens the disk, without its lock.
    /// # Errors
    /// If it cannot be opened, or is no disk.
    pub(crate) fn open(options: &DiskOptions) -> Result<Self, DeviceError> {
        let disk = Arc::new(Disk::open(options)?);
        Ok(Self { disk, driver_features: 0, write_back: true, quiet: Quiet::default() })
    }

    /// What it keeps the driver's data on.
    pub(crate) fn disk(&self) -> Arc<Disk> {
        Arc::clone(&self.disk)
    }

    fn took(&self, bit: u32) -> bool {
        self.driver_features & 1 << bit != 0
    }

    /// Whether a write may be answered before it is safe (5.2.5.2).
    fn writes_back(&self) -> bool {
        self.took(VIRTIO_BLK_F_FLUSH) && (!self.took(VIRTIO_BLK_F_CONFIG_WCE) || self.write_back)
    }
}

impl VirtioDevice for Block {
    fn describe(&self) -> DeviceDescription {
        let options = self.disk.options();
        DeviceDescription::Block {
            id: options.id.clone().unwrap_or_default(),
            read_only: options.read_only,
            capacity_bytes: self.disk.capacity_bytes(),
            block_bytes: self.disk.block_bytes(),
        }
    }

    fn features(&self) -> u64 {
        let read_only = self.disk.options().read_only;
        READ_FEATURES | if read_only { 1 << VIRTIO_BLK_F_RO } else { WRITE_FEATURES }
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[256]
    }

    /// `struct virtio_blk_config` (5.2.4).
    fn config(&self) -> Vec<u8> {
        let block = self.disk.block_bytes();
        let exponent = (PHYSICAL_BLOCK_BYTES / block).checked_ilog2().unwrap_or(0);
        let mut config = Vec::with_capacity(60);
        config.extend((self.disk.capacity_bytes() / u64::from(SECTOR_BYTES)).to_le_bytes());
        config.extend(BLOCK_SEGMENT_BYTES.to_le_bytes());
        config.extend(BLOCK_SEGMENTS.to_le_bytes());
        config.extend([0; 4]); // geometry: not offered
        config.extend(block.to_le_bytes());
        config.extend([exponent.to_le_bytes()[0], 0]); // blocks per physical block, offset of the first
        config.extend(1u16.to_le_bytes()); // smallest good I/O, blocks
        config.extend(0u32.to_le_bytes()); // best I/O: nothing to say
        config.extend([u8::from(self.write_back), 0]);
        config.extend(1u16.to_le_bytes()); // queues
        config.extend(BLOCK_DISCARD_SECTORS.to_le_bytes());
        config.extend(BLOCK_RANGES.to_le_bytes());
        config.extend((block / SECTOR_BYTES).to_le_bytes()); // a discard's alignment, sectors
        config.extend(BLOCK_WRITE_ZEROES_SECTORS.to_le_bytes());
        config.extend(BLOCK_RANGES.to_le_bytes());
        config.extend([1, 0, 0, 0]); // a write of zeros may give storage back
        config
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if offset != WRITE_BACK_OFFSET || !self.took(VIRTIO_BLK_F_CONFIG_WCE) {
            return;
        }
        match data {
            [1] => self.write_back = true,
            [0] => {
                self.write_back = false;
                // From here on what has been answered is safe.
                if let Err(error) = self.disk.flush() {
                    self.quiet.say(|dropped| tracing::error!(%error, dropped, "a disk could not be flushed"));
                }
            }
            _ => {}
        }
    }

    fn set_features(&mut self, features: u64) {
        self.driver_features = features;
    }

    fn reset(&mut self) {
        (self.driver_features, self.write_back) = (0, true);
    }

    fn serve(&mut self, _: usize, queue: &mut VirtQueue, memory: &Mapping) -> Result<Wait, QueueError> {
        while let Some(chain) = queue.pop(memory)? {
            let done = request::carry_out(&self.disk, self.writes_back(), chain)?;
            if let Some((kind, refusal)) = done.refusal {
                self.quiet.say(|dropped| {
                    tracing::warn!(
                        disk = %self.disk.options().path.display(),
                        kind,
                        error = &refusal as &dyn std::error::Error,
                        dropped,
                        "a disk's request failed; its driver was told"
                    );
                });
            }
            queue.push_used(memory, done.head, done.written)?;
        }
        Ok(Wait::Driver)
    }

    fn backend(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn save(&self) -> Vec<u8> {
        vec![u8::from(self.write_back)]
    }

    fn load(&mut self, state: &[u8]) -> Result<(), StateError> {
        match state {
            [flag @ (0 | 1)] => {
                self.write_back = *flag == 1;
                Ok(())
            }
            other => Err(StateError::Length { field: "disk's own state", expected: 1, got: other.len() }),
        }
    }
}
