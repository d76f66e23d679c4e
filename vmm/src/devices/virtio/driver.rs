//! A driver for the tests of devices: it does by the book what Linux does, and what a test makes it do besides.

use std::sync::Arc;

use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes as _, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::VirtioDevice;
use super::mmio::VirtioMmio;
use crate::devices::mmio::MmioDevice as _;
use crate::devices::wake::Wake;
use crate::memory::{Mapping, Memory, layout};

/// The status bits of a driver that is done (virtio 1.2, 2.1).
pub(crate) const LIVE: u32 = 15;
pub(crate) const NEEDS_RESET: u32 = 64;
/// VIRTIO_F_VERSION_1, and with it VIRTIO_F_EVENT_IDX.
pub(crate) const VERSION_1: u64 = 1 << 32;
pub(crate) const EVENT_IDX: u64 = 1 << 29;
/// Where the driver has its queues, 64 KiB each, and where its buffers begin.
const QUEUES: u64 = 0x1_0000;
const QUEUE_BYTES: u64 = 0x1_0000;
pub(crate) const BUFFERS: u64 = 0x10_0000;
const SIZE: u16 = 16;

/// One buffer of a request: where, how long, and whether the device writes it.
pub(crate) type Part = (u64, u32, bool);

/// The driver with its guest's memory.
#[derive(Debug)]
pub(crate) struct Driver {
    pub(crate) device: Arc<VirtioMmio>,
    pub(crate) memory: Arc<Memory>,
    pub(crate) interrupt: EventFd,
    /// For each queue, the descriptor and the available entry that come next.
    next: Vec<(u16, u16)>,
}

pub(crate) fn memory() -> Arc<Memory> {
    Arc::new(Memory::new(&layout(4 << 20).unwrap()).unwrap())
}

impl Driver {
    /// A device without a thread: [`Driver::pass`] serves it.
    pub(crate) fn new(device: Box<dyn VirtioDevice>, memory: Arc<Memory>) -> Self {
        let driver = Self::with(device, memory, VirtioMmio::without_thread);
        driver.device.run();
        driver
    }

    /// A device with its thread, parked.
    pub(crate) fn threaded(device: Box<dyn VirtioDevice>, memory: Arc<Memory>) -> Self {
        Self::with(device, memory, VirtioMmio::start)
    }

    fn with(
        device: Box<dyn VirtioDevice>,
        memory: Arc<Memory>,
        start: impl Fn(Box<dyn VirtioDevice>, Arc<Memory>, EventFd, Vec<Arc<Wake>>) -> std::io::Result<VirtioMmio>,
    ) -> Self {
        let queues = device.queue_sizes().len();
        let interrupt = EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let events = (0..queues).map(|_| Arc::new(Wake::new().unwrap())).collect();
        let device = start(device, Arc::clone(&memory), interrupt.try_clone().unwrap(), events).unwrap();
        Self { device: Arc::new(device), memory, interrupt, next: vec![(0, 0); queues] }
    }

    pub(crate) fn mapping(&self) -> &Mapping {
        self.memory.mapping()
    }

    pub(crate) fn read(&self, register: u32) -> u32 {
        let mut data = [0xff; 4];
        self.device.read(register.into(), &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn write(&self, register: u32, value: u32) {
        self.device.write(register.into(), &value.to_le_bytes());
    }

    pub(crate) fn status(&self) -> u32 {
        self.read(reg::VIRTIO_MMIO_STATUS)
    }

    pub(crate) fn set_status(&self, status: u32) {
        self.write(reg::VIRTIO_MMIO_STATUS, status);
    }

    /// What the device offers.
    pub(crate) fn offered(&self) -> u64 {
        let half = |select| {
            self.write(reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL, select);
            u64::from(self.read(reg::VIRTIO_MMIO_DEVICE_FEATURES))
        };
        half(0) | half(1) << 32
    }

    pub(crate) fn take_features(&self, features: u64) {
        for select in 0..2u32 {
            self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            let half = features >> (32 * select) & u64::from(u32::MAX);
            self.write(reg::VIRTIO_MMIO_DRIVER_FEATURES, u32::try_from(half).unwrap());
        }
    }

    /// From reset to FEATURES_OK.
    pub(crate) fn greet(&self, features: u64) {
        self.set_status(0);
        self.set_status(1);
        self.set_status(3);
        self.take_features(features);
        self.set_status(11);
    }

    /// The addresses of queue `index`: descriptors, available ring, used ring.
    pub(crate) fn rings(index: usize) -> [u64; 3] {
        let base = QUEUES + index as u64 * QUEUE_BYTES;
        [base, base + 0x4000, base + 0x8000]
    }

    /// Sets queue `index` up at `rings` and says whether the device took it.
    pub(crate) fn set_up(&self, index: usize, size: u32, rings: [u64; 3]) -> bool {
        self.write(reg::VIRTIO_MMIO_QUEUE_SEL, u32::try_from(index).unwrap());
        self.write(reg::VIRTIO_MMIO_QUEUE_NUM, size);
        let registers = [
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW,
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW,
            reg::VIRTIO_MMIO_QUEUE_USED_LOW,
        ];
        for (register, address) in registers.into_iter().zip(rings) {
            self.write(register, u32::try_from(address & u64::from(u32::MAX)).unwrap());
            self.write(register + 4, u32::try_from(address >> 32).unwrap());
        }
        self.write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
        self.read(reg::VIRTIO_MMIO_QUEUE_READY) == 1
    }

    /// From reset to DRIVER_OK, with all queues.
    pub(crate) fn start(&mut self, features: u64) {
        self.greet(features | VERSION_1);
        for index in 0..self.next.len() {
            self.mapping().write_slice(&[0; 0x9000], GuestAddress(Self::rings(index)[0])).unwrap();
            assert!(self.set_up(index, SIZE.into(), Self::rings(index)));
            self.next[index] = (0, 0);
        }
        self.set_status(LIVE);
        assert_eq!(self.status(), LIVE);
    }

    /// Writes a descriptor.
    pub(crate) fn descriptor(&self, queue: usize, at: u16, address: u64, length: u32, flags: u32, next: u16) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(length.to_le_bytes());
        bytes.extend(u16::try_from(flags).unwrap().to_le_bytes());
        bytes.extend(next.to_le_bytes());
        let at = Self::rings(queue)[0] + u64::from(at) * 16;
        self.mapping().write_slice(&bytes, GuestAddress(at)).unwrap();
    }

    /// Makes the chain that begins at `head` available.
    pub(crate) fn make_available(&mut self, queue: usize, head: u16) {
        let ring = Self::rings(queue)[1];
        let (_, available) = &mut self.next[queue];
        let slot = ring + 4 + u64::from(*available % SIZE) * 2;
        *available = available.wrapping_add(1);
        let index = *available;
        self.mapping().write_obj(head, GuestAddress(slot)).unwrap();
        self.mapping().write_obj(index, GuestAddress(ring + 2)).unwrap();
    }

    /// Queues a request and returns the descriptor that names it.
    pub(crate) fn request(&mut self, queue: usize, parts: &[Part]) -> u16 {
        let head = self.next[queue].0;
        for (index, (address, length, writable)) in parts.iter().enumerate() {
            let at = self.next[queue].0;
            self.next[queue].0 = (at + 1) % SIZE;
            let more = if index + 1 < parts.len() { VRING_DESC_F_NEXT } else { 0 };
            let flags = more | if *writable { VRING_DESC_F_WRITE } else { 0 };
            self.descriptor(queue, at, *address, *length, flags, (at + 1) % SIZE);
        }
        self.make_available(queue, head);
        head
    }

    /// Notifies, as KVM would.
    pub(crate) fn notify(&self, queue: usize) {
        self.write(reg::VIRTIO_MMIO_QUEUE_NOTIFY, u32::try_from(queue).unwrap());
    }

    /// Serves until there is nothing to do.
    pub(crate) fn pass(&self) {
        while self.device.engine().pass().more {}
    }

    /// How many requests have come back on a queue.
    pub(crate) fn used(&self, queue: usize) -> u16 {
        self.mapping().read_obj(GuestAddress(Self::rings(queue)[2] + 2)).unwrap()
    }

    /// The request that came back as number `at`: its descriptor, and how much was written.
    pub(crate) fn used_element(&self, queue: usize, at: u16) -> (u32, u32) {
        let element = Self::rings(queue)[2] + 4 + u64::from(at % SIZE) * 8;
        let read = |address| self.mapping().read_obj(GuestAddress(address)).unwrap();
        (read(element), read(element + 4))
    }

    /// Takes the interrupts since the last call.
    pub(crate) fn interrupts(&self) -> u64 {
        self.interrupt.read().unwrap_or(0)
    }

    pub(crate) fn put(&self, address: u64, bytes: &[u8]) {
        self.mapping().write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub(crate) fn get(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.mapping().read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }
}
