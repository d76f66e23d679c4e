//! The guest that the bytes of a [`script`](super::script) describe.

use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes as _, GuestAddress};

use super::script::{
    AGAIN, ARRIVE, DAMAGE, FAR, FILL, FLIP, FROM_END, HEAD_GIVEN, HUGE, INDIRECT, LOOK, LOOP, PARTS,
    POSITIONS, PUT, READ, REQUEST, SAVE, SECTORS, SET_UP, STEPS, TABLE, WAIT, WRITABLE, WRITE_CONFIG,
    WRITE_REGISTER,
};
use super::{ExerciseError, Subject};
use crate::devices::mmio::MmioDevice as _;
use crate::devices::virtio::state::VirtioState;
use crate::limits::QUEUES_MAX;
use crate::memory::Memory;

/// Looks at the queues after one step: a device that always has more would never end.
const PASSES: usize = 4;
/// Where a driver that does it by the book has its queues, one each so many bytes; rings within it, with room for 256 entries.
const QUEUES: u64 = 0x1_0000;
const QUEUE_BYTES: u64 = 0x2000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x1400;
const SIZE_LOGARITHM_MAX: u8 = 8;
/// Where indirect tables stand: one behind the other, so many.
const TABLES: u64 = 0x3_0000;
const TABLE_BYTES: u64 = 0x100;
const TABLES_AT_ONCE: u64 = 16;

/// What the guest has written to a queue that it has set up.
#[derive(Clone, Copy, Debug, Default)]
struct Ring {
    size: u16,
    /// The descriptor that comes next.
    next: u16,
    /// The available ring's index.
    available: u16,
}

/// The guest, on its device.
pub(super) struct Guest<'a> {
    bytes: &'a [u8],
    memory: &'a Memory,
    make: &'a dyn Fn() -> Result<Subject, ExerciseError>,
    subject: Subject,
    rings: [Ring; QUEUES_MAX],
    tables: u64,
}

impl<'a> Guest<'a> {
    pub(super) fn new(
        bytes: &'a [u8],
        memory: &'a Memory,
        make: &'a dyn Fn() -> Result<Subject, ExerciseError>,
    ) -> Result<Self, ExerciseError> {
        Ok(Self { bytes, memory, make, subject: make()?, rings: Default::default(), tables: 0 })
    }

    /// Does all its steps, and resets the device.
    pub(super) fn run(mut self) -> Result<(), ExerciseError> {
        while !self.bytes.is_empty() {
            self.step()?;
        }
        self.write(reg::VIRTIO_MMIO_STATUS, 0);
        assert_eq!(self.read(reg::VIRTIO_MMIO_STATUS), 0, "a device can be reset at any time");
        Ok(())
    }

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
        self.subject.device.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, register: u32, value: u32) {
        self.subject.device.write(register.into(), &value.to_le_bytes());
    }

    /// Writes guest memory; what is outside is left out.
    fn put(&self, address: u64, bytes: &[u8]) {
        if let Err(error) = self.memory.mapping().write_slice(bytes, GuestAddress(address)) {
            tracing::trace!(%error, "the guest cannot write there");
        }
    }

    fn step(&mut self) -> Result<(), ExerciseError> {
        match self.byte() % STEPS {
            WRITE_REGISTER => {
                let (register, value) = (u32::from(self.byte()) * 4, self.word());
                self.write(register, value);
            }
            READ => {
                let (register, width) = (self.half(), usize::from(self.byte() % 9));
                self.subject.device.read(register.into(), &mut [0; 8][..width]);
            }
            WRITE_CONFIG => {
                let (offset, width, bytes) = (self.half(), usize::from(self.byte() % 9), self.array::<8>());
                let at = u64::from(reg::VIRTIO_MMIO_CONFIG) + u64::from(offset);
                self.subject.device.write(at, &bytes[..width]);
            }
            PUT => {
                let (address, bytes) = (u64::from(self.half()) * 8, self.array::<16>());
                self.put(address, &bytes);
            }
            SET_UP => self.set_up(),
            REQUEST => self.request(),
            SAVE => self.save()?,
            LOOK => self.look(),
            ARRIVE => {
                let bytes = self.half();
                (self.subject.arrive)(bytes);
                self.look();
            }
            AGAIN => {
                let (queue, count) = (self.queue(), self.byte());
                self.publish(queue, count.into());
                self.look();
            }
            _ => unreachable!("a step's number is below {STEPS}"),
        }
        Ok(())
    }

    /// With a thread the device is only told; without, it looks here.
    fn look(&self) {
        if self.subject.threaded {
            (0..3).for_each(|queue| self.write(reg::VIRTIO_MMIO_QUEUE_NOTIFY, queue));
            return;
        }
        for _ in 0..PASSES {
            if !self.subject.device.engine().pass().more {
                break;
            }
        }
    }

    fn queue(&mut self) -> usize {
        usize::from(self.byte()) % QUEUES_MAX
    }

    fn base(queue: usize) -> u64 {
        QUEUES + queue as u64 * QUEUE_BYTES
    }

    /// By the book, but for the features and the size, which the bytes say.
    fn set_up(&mut self) {
        let (features, logarithm) = (self.word(), self.byte() % (SIZE_LOGARITHM_MAX + 1));
        for status in [0, 1, 3] {
            self.write(reg::VIRTIO_MMIO_STATUS, status);
        }
        self.write(reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, 0);
        let offered = self.read(reg::VIRTIO_MMIO_DEVICE_FEATURES);
        for (select, features) in [(0, offered & !features), (1, 1)] {
            self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES, features);
        }
        self.write(reg::VIRTIO_MMIO_STATUS, 11);
        let low = |address: u64| u32::try_from(address).expect("low memory");
        for queue in 0..QUEUES_MAX {
            let base = Self::base(queue);
            self.write(reg::VIRTIO_MMIO_QUEUE_SEL, low(queue as u64));
            let size = self.read(reg::VIRTIO_MMIO_QUEUE_NUM_MAX).min(1 << logarithm);
            if size == 0 {
                break;
            }
            self.write(reg::VIRTIO_MMIO_QUEUE_NUM, size);
            self.write(reg::VIRTIO_MMIO_QUEUE_DESC_LOW, low(base));
            self.write(reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, low(base + AVAILABLE));
            self.write(reg::VIRTIO_MMIO_QUEUE_USED_LOW, low(base + USED));
            // Flags and index of both rings.
            self.put(base + AVAILABLE, &[0; 4]);
            self.put(base + USED, &[0; 4]);
            self.write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
            let size = u16::try_from(size).expect("at most 256");
            self.rings[queue] = Ring { size, ..Ring::default() };
        }
        self.write(reg::VIRTIO_MMIO_STATUS, 15);
    }

    /// A chain of up to eight descriptors, made available on a queue, and a look.
    fn request(&mut self) {
        let (queue, how) = (self.queue(), self.byte());
        let Ring { size, mut next, .. } = self.rings[queue];
        let size = size.max(1);
        if how & HEAD_GIVEN != 0 {
            next = self.half();
        }
        let count = u16::from(how & PARTS) + 1;
        let indirect = how & INDIRECT != 0;
        let table = TABLES + self.tables % TABLES_AT_ONCE * TABLE_BYTES;
        let (to, first, modulus) =
            if indirect { (table, 0, u16::MAX) } else { (Self::base(queue), next, size) };
        for index in 0..count {
            let at = first.wrapping_add(index) % modulus;
            let last = index + 1 == count;
            let goes_on = if last && how & LOOP != 0 { first } else { (at + 1) % modulus };
            let descriptor = self.part(!last || how & LOOP != 0, goes_on);
            self.put(to + u64::from(at) * 16, &descriptor);
        }
        if indirect {
            self.tables += 1;
            let at = Self::base(queue) + u64::from(next % size) * 16;
            self.put(at, &descriptor(table, u32::from(count) * 16, VRING_DESC_F_INDIRECT, 0));
        }
        let head = if how & HEAD_GIVEN != 0 { next } else { next % size };
        let ring = &mut self.rings[queue];
        ring.next = next.wrapping_add(if indirect { 1 } else { count }) % size;
        let slot = AVAILABLE + 4 + u64::from(ring.available % size) * 2;
        self.put(Self::base(queue) + slot, &head.to_le_bytes());
        self.publish(queue, 1);
        if how & WAIT == 0 {
            self.look();
        }
    }

    /// One descriptor, and the bytes of its buffer.
    fn part(&mut self, more: bool, next: u16) -> [u8; 16] {
        let (kind, place, length) = (self.byte(), self.half(), self.half());
        let end = self.memory.bytes();
        let address = match (kind & FAR != 0, kind & FROM_END != 0) {
            (true, true) => u64::MAX - u64::from(place),
            (true, false) => u64::from(place) << 48,
            (false, true) => end.saturating_sub(place.into()),
            (false, false) => u64::from(place) * 64,
        };
        let unit = match (kind & HUGE != 0, kind & SECTORS != 0) {
            (true, _) => 0x1_0000,
            (false, true) => 512,
            (false, false) => 1,
        };
        if kind & FILL != 0 {
            let bytes = self.array::<16>();
            self.put(address, &bytes);
        }
        let flag = |set: bool, flag: u32| if set { flag } else { 0 };
        let flags = flag(more != (kind & FLIP != 0), VRING_DESC_F_NEXT)
            | flag(kind & WRITABLE != 0, VRING_DESC_F_WRITE)
            | flag(kind & TABLE != 0, VRING_DESC_F_INDIRECT);
        descriptor(address, u32::from(length) * unit, flags, next)
    }

    fn publish(&mut self, queue: usize, count: u16) {
        let ring = &mut self.rings[queue];
        ring.available = ring.available.wrapping_add(count);
        let index = ring.available.to_le_bytes();
        self.put(Self::base(queue) + AVAILABLE + 2, &index);
    }

    /// Goes on with another device, into which this one's state was loaded: as it was, or changed as by a source that lies.
    fn save(&mut self) -> Result<(), ExerciseError> {
        let (how, at, value) = (self.byte(), self.half(), self.half());
        self.subject.device.park();
        let mut state = self.subject.device.save();
        let read = VirtioState::decode(&state.encode());
        assert_eq!(read.as_ref(), Ok(&state), "what is saved can be read");
        if how & POSITIONS != 0 {
            for (queue, ring) in state.queues.iter_mut().zip(&mut self.rings) {
                (queue.next_avail, queue.next_used, ring.available) = (at, value, at);
            }
        }
        if how & DAMAGE != 0 {
            let mut bytes = state.encode();
            let place = usize::from(at) % bytes.len();
            bytes[place] = value.to_le_bytes()[0];
            match VirtioState::decode(&bytes) {
                Ok(damaged) => state = damaged,
                Err(error) => tracing::trace!(%error, "a damaged state was refused"),
            }
        }
        let other = (self.make)()?;
        other.device.park();
        // A guest may leave registers that no live device has; then it is refused elsewhere as well.
        if other.device.load(&state).is_ok() {
            if how & (POSITIONS | DAMAGE) == 0 {
                assert_eq!(other.device.save(), state, "what is loaded is what was saved");
            }
            self.subject = other;
        }
        self.subject.device.run();
        Ok(())
    }
}

fn descriptor(address: u64, length: u32, flags: u32, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&length.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes()[..2]);
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}
