//! The network device (virtio 1.2, 5.1): one pair of queues on a TAP interface.
//!
//! A packet to the guest is read into a buffer of the device first, for its length says how many of the guest's buffers it takes
//! (VIRTIO_NET_F_MRG_RXBUF); there it waits until there are enough of them, and the interface's own queue behind it. A packet from the guest goes
//! straight out of its memory. What cannot be sent or placed is dropped, as on any network. Checksums and segmentation are left to
//! whoever is last to need them.

mod mac;
mod tap;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

pub use mac::{Mac, NoMac};
pub(crate) use tap::Tap;

use super::queue::{Chain, QueueError, VirtQueue};
use super::{DeviceDescription, VirtioDevice, Wait};
use crate::devices::quiet::Quiet;
use crate::kvm::StateError;
use crate::limits::{CHAINS_A_LOOK, PACKET_MAX_BYTES, PACKET_MIN_BYTES};
use crate::memory::Mapping;

/// The header before each packet (5.1.6): offloads, and how many buffers a packet to the guest takes.
pub(super) const HEADER_BYTES: usize = 12;
/// Where the header has that number.
const BUFFERS_AT: std::ops::Range<usize> = 10..12;

const RECEIVE: usize = 0;

const FEATURES: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_STATUS;

/// The guest's features, and what the interface is told because of them.
const OFFLOADS: [(u32, u32); 4] = [
    (VIRTIO_NET_F_GUEST_CSUM, libc::TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, libc::TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, libc::TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, libc::TUN_F_TSO_ECN),
];

/// The guest's place in the network. It outlives no device, but whoever lets the VM run has a word with it as well.
#[derive(Debug)]
pub(crate) struct Station {
    mac: Mac,
    tap: Tap,
    /// Whether the network is to learn where the guest is now.
    arrived: AtomicBool,
}

impl Station {
    /// Tells the network where the guest is now, if it has come from elsewhere: once.
    pub(crate) fn announce(&self) {
        if self.arrived.swap(false, Ordering::SeqCst)
            && let Err(error) = self.tap.send(&announcement(self.mac))
        {
            tracing::warn!(
                tap = self.tap.name(),
                %error,
                "the network was not told where the guest is now: it finds out by the guest's next packet"
            );
        }
    }
}

/// The device.
#[derive(Debug)]
pub(crate) struct Net {
    id: String,
    station: Arc<Station>,
    driver_features: u64,
    packet: Box<[u8]>,
    /// The bytes of `packet` that wait for the guest's buffers; 0 if there is none.
    waiting: usize,
    /// Whether the interface is gone.
    dead: bool,
    quiet: Quiet,
}

/// What became of a packet for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Placed {
    /// The guest has it.
    Done,
    /// There are not enough buffers yet.
    Waits,
    /// The guest's buffers are such that it never fits.
    Never,
}

impl Net {
    /// A device on `tap`.
    pub(crate) fn new(id: String, mac: Mac, tap: Tap) -> Self {
        Self {
            id,
            station: Arc::new(Station { mac, tap, arrived: AtomicBool::new(false) }),
            driver_features: 0,
            // One byte more, to see that a packet is longer than it may be.
            packet: vec![0; PACKET_MAX_BYTES + 1].into(),
            waiting: 0,
            dead: false,
            quiet: Quiet::default(),
        }
    }

    /// Its place in the network.
    pub(crate) fn station(&self) -> Arc<Station> {
        Arc::clone(&self.station)
    }

    fn took(&self, bit: u32) -> bool {
        self.driver_features & 1 << bit != 0
    }

    fn set_offloads(&self) {
        let checksums = self.took(VIRTIO_NET_F_GUEST_CSUM);
        let wanted = OFFLOADS.iter().filter(|(bit, _)| checksums && self.took(*bit));
        let offloads = wanted.fold(0, |all, (_, offload)| all | offload);
        if let Err(error) = self.station.tap.set_offloads(offloads) {
            self.quiet.say(|dropped| {
                tracing::error!(tap = self.station.tap.name(), %error, dropped, "the TAP interface takes no offloads");
            });
        }
    }

    /// Takes the next packet from the interface; false if there is none.
    fn fetch(&mut self) -> bool {
        match self.station.tap.receive(&mut self.packet) {
            Ok(0) => self.dead = true,
            Ok(bytes @ HEADER_BYTES..=PACKET_MAX_BYTES) => {
                self.waiting = bytes;
                return true;
            }
            Ok(bytes) => self.drop_packet("it has a length that no packet has", bytes),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return false,
            // The interface is down: it says so once each time.
            Err(error) if error.raw_os_error() == Some(libc::EIO) => return false,
            Err(error) => {
                tracing::error!(tap = self.station.tap.name(), %error, "the TAP interface is gone: the guest receives nothing any more");
                self.dead = true;
            }
        }
        !self.dead
    }

    fn drop_packet(&self, why: &'static str, bytes: usize) {
        self.quiet.say(|dropped| {
            tracing::warn!(tap = self.station.tap.name(), why, bytes, dropped, "a packet was dropped");
        });
    }

    /// Gives the guest the packet that waits.
    fn place(&mut self, queue: &mut VirtQueue, memory: &Mapping) -> Result<Placed, QueueError> {
        let merges = self.took(VIRTIO_NET_F_MRG_RXBUF);
        let (mut chains, mut room): (Vec<Chain<'_>>, usize) = (Vec::new(), 0);
        while room < self.waiting {
            let full = !merges && !chains.is_empty() || chains.len() == CHAINS_A_LOOK;
            let next = if full { None } else { queue.pop(memory)? };
            let Some(chain) = next else {
                let count = chains.len();
                queue.put_back(memory, count)?;
                return Ok(if full { Placed::Never } else { Placed::Waits });
            };
            if chain.writable.bytes() == 0 {
                return Err(QueueError::Request {
                    head: chain.head,
                    what: "a buffer for packets without room",
                });
            }
            room += chain.writable.bytes();
            chains.push(chain);
        }
        let buffers = u16::try_from(chains.len()).expect("at most as many as a look takes");
        self.packet[BUFFERS_AT].copy_from_slice(&buffers.to_le_bytes());
        let mut rest = &self.packet[..self.waiting];
        let mut used = Vec::with_capacity(chains.len());
        for chain in &chains {
            let bytes = chain.writable.copy_from(&rest[..rest.len().min(chain.writable.bytes())]);
            rest = &rest[bytes..];
            used.push((chain.head, bytes));
        }
        queue.push_used_together(memory, &used)?;
        Ok(Placed::Done)
    }

    fn receive(&mut self, queue: &mut VirtQueue, memory: &Mapping) -> Result<(), QueueError> {
        for _ in 0..CHAINS_A_LOOK {
            if self.waiting == 0 && (self.dead || !self.fetch()) {
                return Ok(());
            }
            if self.waiting == 0 {
                continue;
            }
            match self.place(queue, memory)? {
                Placed::Done => {}
                Placed::Waits => return Ok(()),
                Placed::Never => self.drop_packet("the guest's buffers are too small for it", self.waiting),
            }
            self.waiting = 0;
        }
        // Enough for once; what is left in the interface wakes this thread again.
        Ok(())
    }

    fn send(&mut self, queue: &mut VirtQueue, memory: &Mapping) -> Result<(), QueueError> {
        while let Some(chain) = queue.pop(memory)? {
            let bytes = chain.readable.bytes();
            if (HEADER_BYTES + PACKET_MIN_BYTES..=PACKET_MAX_BYTES).contains(&bytes) {
                match chain.readable.drain(self.station.tap.as_fd()) {
                    Ok(_) => {}
                    // The interface's queue is full.
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => self.quiet.say(|dropped| {
                        tracing::warn!(tap = self.station.tap.name(), %error, dropped, "the guest's packet was not taken");
                    }),
                }
            } else {
                self.drop_packet("the guest gave it a length that no packet has", bytes);
            }
            queue.push_used(memory, chain.head, 0)?;
        }
        Ok(())
    }
}

impl VirtioDevice for Net {
    fn describe(&self) -> DeviceDescription {
        DeviceDescription::Net { id: self.id.clone(), mac: self.station.mac }
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[256, 256]
    }

    /// `struct virtio_net_config` (5.1.4), as far as the features offered reach.
    fn config(&self) -> Vec<u8> {
        let mut config = self.station.mac.bytes().to_vec();
        config.extend(u16::try_from(VIRTIO_NET_S_LINK_UP).expect("one").to_le_bytes());
        config
    }

    fn write_config(&mut self, _: u64, _: &[u8]) {}

    fn set_features(&mut self, features: u64) {
        self.driver_features = features;
        self.set_offloads();
    }

    fn reset(&mut self) {
        (self.driver_features, self.waiting) = (0, 0);
        self.set_offloads();
    }

    fn serve(&mut self, index: usize, queue: &mut VirtQueue, memory: &Mapping) -> Result<Wait, QueueError> {
        if index != RECEIVE {
            self.send(queue, memory)?;
            return Ok(Wait::Driver);
        }
        self.receive(queue, memory)?;
        Ok(if self.waiting == 0 && !self.dead { Wait::Backend } else { Wait::Driver })
    }

    fn backend(&self) -> Option<BorrowedFd<'_>> {
        Some(self.station.tap.as_fd())
    }

    /// Nothing: a packet that waits is dropped, as packets are.
    fn save(&self) -> Vec<u8> {
        Vec::new()
    }

    fn load(&mut self, state: &[u8]) -> Result<(), StateError> {
        if !state.is_empty() {
            return Err(StateError::Length {
                field: "network device's own state",
                expected: 0,
                got: state.len(),
            });
        }
        self.station.arrived.store(true, Ordering::SeqCst);
        Ok(())
    }
}

/// A reverse ARP request (RFC 903) from the guest's address to all, so that the network's switches learn where it is, as after any
/// hypervisor's migration.
fn announcement(mac: Mac) -> Vec<u8> {
    let (mac, everybody) = (mac.bytes(), [0xff; 6]);
    let mut packet = vec![0; HEADER_BYTES];
    packet.extend(everybody);
    packet.extend(mac);
    packet.extend(0x8035u16.to_be_bytes()); // RARP
    packet.extend(1u16.to_be_bytes()); // Ethernet
    packet.extend(0x0800u16.to_be_bytes()); // IPv4
    packet.extend([6, 4]);
    packet.extend(3u16.to_be_bytes()); // request reverse
    for address in [mac, mac] {
        packet.extend(address);
        packet.extend([0; 4]);
    }
    // The shortest frame that Ethernet has, without its check sequence.
    packet.resize(HEADER_BYTES + 60, 0);
    packet
}
