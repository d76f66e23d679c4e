//! A guest made of bytes: drives a device's registers and queues in this process, without KVM and without a thread. For fuzzing, and for
//! property tests.
//!
//! ```text
//! bytes = step*      step = kind (1 byte) , what it takes; where the bytes end, zeros are read
//! ```
//! Whatever the bytes are, the device must answer in bounded time and memory, and nothing may panic.

use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;

use virtio_bindings::virtio_mmio as reg;
use vm_memory::{Bytes as _, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::VirtioDevice;
use super::balloon::Balloon;
use super::block::Block;
use super::console::Console;
use super::mmio::VirtioMmio;
use super::net::{Mac, Net, Tap};
use super::rng::Rng;
use super::state::VirtioState;
use crate::config::{DiskOptions, Serial};
use crate::devices::DeviceError;
use crate::devices::mmio::MmioDevice as _;
use crate::devices::wake::Wake;
use crate::limits::{MEMORY_GRANULE_BYTES, PACKET_MAX_BYTES};
use crate::memory::{Memory, MemoryError, layout};

/// Looks at the queues after one step: a device that always has more would never end.
const PASSES: usize = 4;
/// Where the steps that do it by the book have their queues: one each so many bytes, rings within it.
const QUEUES: u64 = 0x1_0000;
const QUEUE_BYTES: u64 = 0x1000;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x800;
const QUEUE_SIZE: u16 = 16;

/// Why an exercise could not be set up: nothing that the bytes can do.
#[derive(Debug, thiserror::Error)]
pub enum ExerciseError {
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// Descriptors.
    #[error("no descriptors for a device")]
    Descriptors(#[from] std::io::Error),
}

type Make = Box<dyn Fn() -> Result<Box<dyn VirtioDevice>, DeviceError>>;

/// A kind of device to exercise.
pub struct Exercise(Make);

impl std::fmt::Debug for Exercise {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Exercise").finish_non_exhaustive()
    }
}

fn random() -> Result<u64, DeviceError> {
    getrandom::u64().map_err(DeviceError::Random)
}

struct Guest<'a> {
    bytes: &'a [u8],
    memory: Arc<Memory>,
    device: VirtioMmio,
    available: u16,
}

impl Exercise {
    /// The source of random numbers.
    #[must_use]
    pub fn rng() -> Self {
        Self(Box::new(|| Ok(Box::new(Rng::default()))))
    }

    /// A disk.
    #[must_use]
    pub fn block(options: DiskOptions) -> Self {
        Self(Box::new(move || Ok(Box::new(Block::open(&options)?))))
    }

    /// The console, connected to nothing.
    #[must_use]
    pub fn console() -> Self {
        Self(Box::new(|| Ok(Box::new(Console::open(&Serial::Off)?.0))))
    }

    /// The memory balloon.
    #[must_use]
    pub fn balloon() -> Self {
        Self(Box::new(|| Ok(Box::new(Balloon::default()))))
    }

    /// A network interface. Its other end has sent packets of all lengths, and takes what comes until its queue is full.
    #[must_use]
    pub fn net() -> Self {
        Self(Box::new(|| {
            let unset = |source| DeviceError::Start { device: "net".to_owned(), source };
            // Connected to itself: what the guest sends comes back.
            let address =
                SocketAddr::from_abstract_name(format!("tern-exercise-{:x}", random()?)).map_err(unset)?;
            let socket = UnixDatagram::bind_addr(&address).map_err(unset)?;
            socket.connect_addr(&address).map_err(unset)?;
            for length in [0, 60, PACKET_MAX_BYTES, 1514, 4000] {
                socket.send(&vec![0; length]).map_err(unset)?;
            }
            let mac = Mac::random().map_err(DeviceError::Random)?;
            Ok(Box::new(Net::new("net0".to_owned(), mac, Tap::stand_in(socket).map_err(unset)?)))
        }))
    }

    /// Lets the guest that `bytes` describe loose on a new device.
    /// # Errors
    /// If the device cannot be made.
    /// # Panics
    /// If the device breaks its own rules.
    pub fn run(&self, bytes: &[u8]) -> Result<(), ExerciseError> {
        let memory = Arc::new(Memory::new(&layout(MEMORY_GRANULE_BYTES)?)?);
        let mut guest = Guest { bytes, device: self.device(&memory)?, memory, available: 0 };
        while !guest.bytes.is_empty() {
            if guest.step() {
                let state = guest.device.save();
                let read = VirtioState::decode(&state.encode());
                assert_eq!(read.as_ref(), Ok(&state), "what is saved can be read");
                let other = self.device(&guest.memory)?;
                // A guest may leave registers that no live device has; then it is refused elsewhere as well.
                if other.load(&state).is_ok() {
                    assert_eq!(other.save(), state, "what is loaded is what was saved");
                    guest.device = other;
                }
            }
        }
        guest.write(reg::VIRTIO_MMIO_STATUS, 0);
        assert_eq!(guest.read(reg::VIRTIO_MMIO_STATUS), 0, "a device can be reset at any time");
        Ok(())
    }

    fn device(&self, memory: &Arc<Memory>) -> Result<VirtioMmio, ExerciseError> {
        let device = (self.0)()?;
        let events = device.queue_sizes().iter().map(|_| Ok(Arc::new(Wake::new()?)));
        let events = events.collect::<Result<_, std::io::Error>>()?;
        let interrupt = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let device = VirtioMmio::without_thread(device, Arc::clone(memory), interrupt, events)?;
        device.run();
        Ok(device)
    }
}

impl Guest<'_> {
    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let (taken, rest) = self.bytes.split_at(N.min(self.bytes.len()));
        array[..taken.len()].copy_from_slice(taken);
        self.bytes = rest;
        array
    }

    fn byte(&mut self) -> u8 {
        let [byte] = self.array();
        byte
    }

    fn half(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    fn word(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    fn read(&self, register: u32) -> u32 {
        let mut data = [0; 4];
        self.device.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, register: u32, value: u32) {
        self.device.write(register.into(), &value.to_le_bytes());
    }

    /// Writes guest memory; what is outside is left out.
    fn put(&self, address: u64, bytes: &[u8]) {
        if let Err(error) = self.memory.mapping().write_slice(bytes, GuestAddress(address)) {
            tracing::trace!(%error, "the guest cannot write there");
        }
    }

    /// One step; true if the device is to be saved and loaded.
    fn step(&mut self) -> bool {
        match self.byte() {
            0..=39 => {
                let (register, value) = (u32::from(self.byte()) * 4, self.word());
                self.write(register, value);
            }
            40..=49 => {
                let (register, width) = (self.half(), usize::from(self.byte() % 9));
                self.device.read(register.into(), &mut [0; 8][..width]);
            }
            50..=69 => {
                let (offset, width, bytes) = (self.half(), usize::from(self.byte() % 9), self.array::<8>());
                self.device.write((0xf0 + offset % 0x110).into(), &bytes[..width]);
            }
            70..=109 => {
                let (address, bytes) = (u64::from(self.half()) * 8, self.array::<16>());
                self.put(address, &bytes);
            }
            110..=129 => self.set_up(),
            130..=199 => self.request(),
            200..=209 => return true,
            _ => self.look(),
        }
        false
    }

    fn look(&self) {
        for _ in 0..PASSES {
            if !self.device.engine().pass().more {
                break;
            }
        }
    }

    /// By the book, but for what the bytes say otherwise.
    fn set_up(&mut self) {
        let features = self.word();
        for status in [0, 1, 3] {
            self.write(reg::VIRTIO_MMIO_STATUS, status);
        }
        self.write(reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0);
        let offered = self.read(reg::VIRTIO_MMIO_DEVICE_FEATURES);
        for (select, features) in [(0, features & offered), (1, 1)] {
            self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES, features);
        }
        self.write(reg::VIRTIO_MMIO_STATUS, 11);
        for queue in 0..8u32 {
            let base = u32::try_from(QUEUES + u64::from(queue) * QUEUE_BYTES).expect("low memory");
            self.write(reg::VIRTIO_MMIO_QUEUE_SEL, queue);
            self.write(reg::VIRTIO_MMIO_QUEUE_NUM, QUEUE_SIZE.into());
            self.write(reg::VIRTIO_MMIO_QUEUE_DESC_LOW, base);
            self.write(reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, base + u32::try_from(AVAILABLE).expect("small"));
            self.write(reg::VIRTIO_MMIO_QUEUE_USED_LOW, base + u32::try_from(USED).expect("small"));
            self.write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
        }
        self.put(QUEUES, &[0; 0x8000]);
        self.available = 0;
        self.write(reg::VIRTIO_MMIO_STATUS, 15);
    }

    /// A chain of up to eight descriptors, made available on a queue, and a look.
    fn request(&mut self) {
        let base = QUEUES + u64::from(self.byte() % 8) * QUEUE_BYTES;
        let count = u16::from(self.byte() % 8) + 1;
        let head = self.half() % QUEUE_SIZE;
        for index in 0..count {
            let (place, length, flags) = (self.half(), self.half(), self.byte());
            let at = (head + index) % QUEUE_SIZE;
            let goes_on = u16::from(index + 1 < count);
            let mut descriptor = (u64::from(place) * 64).to_le_bytes().to_vec();
            descriptor.extend(u32::from(length).to_le_bytes());
            descriptor.extend((u16::from(flags & 6) | goes_on ^ u16::from(flags >> 7)).to_le_bytes());
            descriptor.extend(((at + 1) % QUEUE_SIZE).to_le_bytes());
            self.put(base + u64::from(at) * 16, &descriptor);
        }
        self.put(base + AVAILABLE + 4 + u64::from(self.available % QUEUE_SIZE) * 2, &head.to_le_bytes());
        self.available = self.available.wrapping_add(1);
        self.put(base + AVAILABLE + 2, &self.available.to_le_bytes());
        self.look();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn disk() -> (tempfile::NamedTempFile, Exercise) {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(64 * 1024).unwrap();
        let path = file.path().to_owned();
        (file, Exercise::block(DiskOptions { path, read_only: false, id: None, direct: false }))
    }

    proptest! {
        #[test]
        fn no_guest_breaks_the_rng(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            Exercise::rng().run(&bytes).unwrap();
        }

        #[test]
        fn no_guest_breaks_a_console(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            Exercise::console().run(&bytes).unwrap();
        }

        #[test]
        fn no_guest_breaks_a_balloon(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            Exercise::balloon().run(&bytes).unwrap();
        }

        #[test]
        fn no_guest_breaks_a_network(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            Exercise::net().run(&bytes).unwrap();
        }

        #[test]
        fn no_guest_breaks_a_disk(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            let (_file, exercise) = disk();
            exercise.run(&bytes).unwrap();
        }
    }

    #[test]
    fn a_request_by_the_book_reaches_the_disk() {
        let (file, exercise) = disk();
        let mut bytes = vec![110, 0, 0, 0, 0];
        // The header stands at 0x20000: a write of the sector at 0x28000.
        bytes.extend([70, 0x00, 0x40, 1, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend([70, 0x00, 0x50, 0xaa, 0xbb]);
        bytes.extend([0; 14]);
        bytes.extend([130, 0, 2, 0, 0, 0x00, 0x08, 16, 0, 0, 0x00, 0x0a, 0, 2, 0, 0x00, 0x0c, 1, 0, 2]);
        exercise.run(&bytes).unwrap();
        assert_eq!(std::fs::read(file.path()).unwrap()[3 * 512..3 * 512 + 3], [0xaa, 0xbb, 0]);
    }
}
