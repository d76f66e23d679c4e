//! Virtio devices on the memory-mapped transport (virtio 1.2, 4.2), split queues, version-1 drivers only.
//!
//! ```text
//!  vCPU thread ── registers ──► mmio.rs ──────► engine.rs ◄────── worker.rs ◄── ioeventfds, backend, wake
//!                                 │ status, features,   │ the device and its live queues, under one lock
//!                                 │ queue set-up        ▼
//!                                 │               queue.rs (chains) ──► block, rng, … (`VirtioDevice`)
//!                                 └─ interrupt status, irqfd: `Signals`, without a lock
//! ```
//! - A device is served by one thread of its own, request by request; nothing is in flight between two. So a device that is parked has
//!   no state but its registers, where it stands in its queues, and what `VirtioDevice::save` gives.
//! - Registers are a virtual CPU's business. The writes that touch the queues (DRIVER_OK, reset, taking a queue away) wait for the
//!   thread to come to a request's end, and the thread begins no other while somebody waits.
//! - What a driver may not do stops its device and sets DEVICE_NEEDS_RESET (2.1.2). The monitor and the other devices go on.

use std::os::fd::BorrowedFd;

use crate::boot::MmioDevice as Placement;
use crate::kvm::StateError;
use crate::limits::DEVICES_MAX;
use crate::memory::Mapping;

pub mod assemble;
pub(crate) mod balloon;
pub(crate) mod block;
pub(crate) mod console;
#[cfg(test)]
pub(crate) mod driver;
pub(crate) mod engine;
pub mod exercise;
pub(crate) mod mmio;
pub mod net;
pub(crate) mod queue;
pub(crate) mod rng;
pub mod state;
#[cfg(test)]
mod tests;
pub(crate) mod worker;

use queue::{QueueError, VirtQueue};

/// Where the first device's registers are, and how far the next one's are from them: in the hole below 4 GiB, above RAM.
const FIRST_ADDRESS: u64 = 0xd000_0000;
const WINDOW_BYTES: u64 = 4096;
/// The first device's interrupt: the first pin of the I/O APIC that no older device has.
const FIRST_GSI: u32 = 5;

const _: () = assert!(FIRST_GSI as usize + DEVICES_MAX == 24, "an I/O APIC has 24 pins");
const _: () = assert!(FIRST_ADDRESS >= crate::limits::LOW_RAM_END);

/// What a device is: as another host needs to know it before the VM's state arrives.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum DeviceDescription {
    /// A source of random numbers.
    Rng,
    /// A disk.
    Block {
        /// What the guest sees as its serial number.
        id: String,
        /// Whether the guest may only read it.
        read_only: bool,
        /// Its length.
        capacity_bytes: u64,
        /// Its smallest unit of I/O.
        block_bytes: u32,
    },
    /// A network interface.
    Net {
        /// A name for people.
        id: String,
        /// The guest's address.
        mac: net::Mac,
    },
    /// A console.
    Console,
    /// A memory balloon.
    Balloon,
}

impl DeviceDescription {
    /// The kind, as virtio numbers it (virtio 1.2, 5).
    #[must_use]
    pub fn device_id(&self) -> u32 {
        match self {
            Self::Rng => virtio_bindings::virtio_ids::VIRTIO_ID_RNG,
            Self::Block { .. } => virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK,
            Self::Net { .. } => virtio_bindings::virtio_ids::VIRTIO_ID_NET,
            Self::Console => virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE,
            Self::Balloon => virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON,
        }
    }

    /// What an operator calls it: the option, and its id where there may be several.
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Self::Rng => "rng".to_owned(),
            Self::Block { id, .. } => format!("disk {id}"),
            Self::Net { id, .. } => format!("net {id}"),
            Self::Console => "console".to_owned(),
            Self::Balloon => "balloon".to_owned(),
        }
    }
}

impl std::fmt::Display for DeviceDescription {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Rng => f.write_str("a source of random numbers (--rng on)"),
            Self::Block { id, read_only, capacity_bytes, block_bytes } => {
                let access = if *read_only { "read-only" } else { "writable" };
                write!(
                    f,
                    "a {access} disk (--disk) of {capacity_bytes} bytes in blocks of {block_bytes}, id `{id}`"
                )
            }
            Self::Console => f.write_str("a console (--console)"),
            Self::Balloon => f.write_str("a memory balloon (--balloon on)"),
            Self::Net { id, mac } => {
                write!(f, "a network interface (--net) with the address {mac}, id `{id}`")
            }
        }
    }
}

/// What brings a queue's device more to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wait {
    /// The driver's next notification alone.
    Driver,
    /// The backend as well: it has a use for what there is to read. Never after the backend's end, or its thread would turn for ever.
    Backend,
}

/// A kind of device. What of it concerns the running VM rather than the driver, such as the lock of a disk, is not here but in
/// [`assemble::Ends`]. One thread at a time calls it; what it does for one request ends in bounded time.
pub(crate) trait VirtioDevice: Send + std::fmt::Debug {
    /// What it is.
    fn describe(&self) -> DeviceDescription;
    /// The features of its kind that it offers (bits 0 to 23); those of queues and transport are not its own.
    fn features(&self) -> u64;
    /// Its queues' greatest sizes, powers of two.
    fn queue_sizes(&self) -> &'static [u16];
    /// Its configuration space as the driver reads it now.
    fn config(&self) -> Vec<u8>;
    /// A driver's write to its configuration space; one that its kind does not allow has no effect.
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// The features that the driver has taken, before the queues come to life.
    fn set_features(&mut self, features: u64);
    /// Back to how it was before the driver came.
    fn reset(&mut self);
    /// Takes requests from queue `index` until [`VirtQueue::pop`] gives none, or leaves them there until it can serve them.
    /// Says what brings it more to do there.
    fn serve(&mut self, index: usize, queue: &mut VirtQueue, memory: &Mapping) -> Result<Wait, QueueError>;
    /// What wakes it besides its driver; asked for once.
    fn backend(&self) -> Option<BorrowedFd<'_>>;
    /// Its state beyond registers and queues.
    fn save(&self) -> Vec<u8>;
    /// Puts saved state in.
    fn load(&mut self, state: &[u8]) -> Result<(), StateError>;
}

/// Where the registers and interrupts of `count` devices are.
pub(crate) fn placements(count: usize) -> Vec<Placement> {
    (0..u32::try_from(count).expect("bounded by DEVICES_MAX"))
        .map(|index| Placement {
            base: FIRST_ADDRESS + u64::from(index) * WINDOW_BYTES,
            bytes: WINDOW_BYTES,
            gsi: FIRST_GSI + index,
        })
        .collect()
}
