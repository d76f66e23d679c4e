//! The register file of the memory-mapped transport, version 2 (virtio 1.2, 4.2.2), and the life of its device (2.1, 3.1).
//!
//! ```text
//! 0 ──ACKNOWLEDGE, DRIVER──► features are chosen ──FEATURES_OK──► queues are set up ──DRIVER_OK──► live ──0──► 0
//!                              (refused features: the bit stays off)                      │ a broken queue
//!                                                                                         ▼
//!                                                                       DEVICE_NEEDS_RESET ──0──► 0
//! ```
//! What does not fit where the driver is has no effect and is logged. Writes of 0 to Status reset the device at any moment.

use std::io;
use std::sync::{Arc, Mutex};

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vmm_sys_util::eventfd::EventFd;

use super::engine::{Core, Engine};
use super::queue::VirtQueue;
use super::state::{QueueState, VirtioState};
use super::worker::Worker;
use super::{DeviceDescription, VirtioDevice};
use crate::devices::mmio::MmioDevice;
use crate::devices::wake::Wake;
use crate::kvm::StateError;
use crate::kvm::threads::lock;
use crate::memory::Memory;

/// "virt", little-endian.
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "TERN", little-endian.
const VENDOR: u32 = 0x4e52_4554;
/// What the queues can do, whatever the device.
const QUEUE_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// The offset of the register that queue notifications are written to.
pub(crate) const QUEUE_NOTIFY: u64 = reg::VIRTIO_MMIO_QUEUE_NOTIFY as u64;

/// What the driver has written.
#[derive(Clone, Debug, Default)]
struct Registers {
    status: u32,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<QueueState>,
}

/// A device on the memory-mapped transport, with the thread that serves it.
#[derive(Debug)]
pub(crate) struct VirtioMmio {
    description: DeviceDescription,
    features: u64,
    queue_sizes: &'static [u16],
    registers: Mutex<Registers>,
    notifications: Vec<Arc<Wake>>,
    engine: Arc<Engine>,
    worker: Option<Worker>,
}

impl VirtioMmio {
    /// A device with its thread, parked. `interrupt` raises its line; `notifications` has an event for each queue.
    /// # Errors
    /// If there are no descriptors or threads left.
    pub(crate) fn start(
        device: Box<dyn VirtioDevice>,
        memory: Arc<Memory>,
        interrupt: EventFd,
        notifications: Vec<Arc<Wake>>,
    ) -> io::Result<Self> {
        let mut this = Self::without_thread(device, memory, interrupt, notifications)?;
        this.worker = Some(Worker::start(&this.engine, &this.description.name(), &this.notifications)?);
        Ok(this)
    }

    /// A device that is served only when [`Engine::pass`] is called.
    pub(super) fn without_thread(
        device: Box<dyn VirtioDevice>,
        memory: Arc<Memory>,
        interrupt: EventFd,
        notifications: Vec<Arc<Wake>>,
    ) -> io::Result<Self> {
        let queue_sizes = device.queue_sizes();
        Ok(Self {
            description: device.describe(),
            features: device.features() | QUEUE_FEATURES,
            queue_sizes,
            registers: Mutex::new(Registers::new(queue_sizes)),
            notifications,
            engine: Arc::new(Engine::new(device, memory, interrupt)?),
            worker: None,
        })
    }

    /// Its engine: to serve it, or to tell its driver of a changed configuration.
    pub(crate) fn engine(&self) -> &Arc<Engine> {
        &self.engine
    }

    /// Lets its thread serve it.
    pub(crate) fn run(&self) {
        self.engine.run();
    }

    /// Returns when its thread stands between two requests, and will begin none.
    pub(crate) fn park(&self) {
        self.engine.park();
    }

    /// Ends its thread.
    pub(crate) fn quit(&self) {
        if let Some(worker) = &self.worker {
            worker.quit();
        }
    }

    /// What it is.
    pub(crate) fn description(&self) -> &DeviceDescription {
        &self.description
    }

    /// Everything about it. It must be parked.
    pub(crate) fn save(&self) -> VirtioState {
        let registers = lock(&self.registers);
        let signals = self.engine.signals();
        self.engine.with_core(|core| {
            let mut queues = registers.queues.clone();
            for (state, queue) in queues.iter_mut().zip(&core.queues) {
                if let Some(queue) = queue {
                    (state.next_avail, state.next_used) = queue.positions();
                }
            }
            VirtioState {
                kind: self.description.device_id(),
                name: self.description.name(),
                status: self.status(&registers),
                driver_features: registers.driver_features,
                interrupt_status: signals.interrupt_status(),
                config_generation: signals.config_generation(),
                device_features_select: registers.device_features_select,
                driver_features_select: registers.driver_features_select,
                queue_select: registers.queue_select,
                queues,
                own: core.device.save(),
            }
        })
    }

    /// Puts saved state into a device that nobody has driven yet. It must be parked.
    /// # Errors
    /// A state that no device of this kind has, or one with features or queues that this one lacks.
    pub(crate) fn load(&self, state: &VirtioState) -> Result<(), StateError> {
        let refused = |what| StateError::Device { device: self.description.name(), what };
        if state.kind != self.description.device_id() {
            return Err(refused("it is of another kind"));
        }
        if state.queues.len() != self.queue_sizes.len() {
            return Err(refused("it has another number of queues"));
        }
        if state.driver_features & !self.features != 0 {
            return Err(refused("its driver uses features that the device lacks here"));
        }
        let live = state.status & VIRTIO_CONFIG_S_DRIVER_OK != 0;
        if live
            && (state.status & VIRTIO_CONFIG_S_FEATURES_OK == 0
                || !has(state.driver_features, VIRTIO_F_VERSION_1))
        {
            return Err(refused("its driver never agreed on features"));
        }
        let mut registers = lock(&self.registers);
        *registers = Registers {
            status: state.status & !VIRTIO_CONFIG_S_NEEDS_RESET,
            device_features_select: state.device_features_select,
            driver_features_select: state.driver_features_select,
            driver_features: state.driver_features,
            queue_select: state.queue_select,
            queues: state.queues.clone(),
        };
        let needs_reset = state.status & VIRTIO_CONFIG_S_NEEDS_RESET != 0;
        self.engine.signals().load(state.interrupt_status, state.config_generation, needs_reset);
        self.engine.with_core(|core| {
            core.device.load(&state.own)?;
            if live && !needs_reset {
                core.device.set_features(state.driver_features);
                let queues =
                    self.live_queues(&registers).map_err(|_| refused("one of its queues cannot be used"))?;
                self.engine.activate(core, queues);
            }
            Ok(())
        })
    }

    fn live_queues(&self, registers: &Registers) -> Result<Vec<Option<VirtQueue>>, super::QueueError> {
        let event_idx = has(registers.driver_features, VIRTIO_RING_F_EVENT_IDX);
        let build = |(state, max): (&QueueState, &u16)| {
            state
                .ready
                .then(|| VirtQueue::new(*max, state, event_idx, self.engine.hurry(), self.engine.memory()))
                .transpose()
        };
        registers.queues.iter().zip(self.queue_sizes).map(build).collect()
    }

    fn status(&self, registers: &Registers) -> u32 {
        registers.status | if self.engine.signals().needs_reset() { VIRTIO_CONFIG_S_NEEDS_RESET } else { 0 }
    }

    fn refuse(&self, what: &str, value: u32) {
        self.engine.signals().quiet.say(|dropped| {
            tracing::warn!(
                device = self.description.name(),
                what,
                value,
                dropped,
                "a write of the guest's driver has no effect"
            );
        });
    }

    fn read_register(&self, offset: u32) -> u32 {
        let signals = self.engine.signals();
        match offset {
            reg::VIRTIO_MMIO_MAGIC_VALUE => return MAGIC,
            reg::VIRTIO_MMIO_VERSION => return VERSION,
            reg::VIRTIO_MMIO_DEVICE_ID => return self.description.device_id(),
            reg::VIRTIO_MMIO_VENDOR_ID => return VENDOR,
            reg::VIRTIO_MMIO_INTERRUPT_STATUS => return signals.interrupt_status(),
            reg::VIRTIO_MMIO_CONFIG_GENERATION => return signals.config_generation(),
            // No shared memory regions: "not there" is a length of all ones (4.2.2).
            reg::VIRTIO_MMIO_SHM_LEN_LOW
            | reg::VIRTIO_MMIO_SHM_LEN_HIGH
            | reg::VIRTIO_MMIO_SHM_BASE_LOW
            | reg::VIRTIO_MMIO_SHM_BASE_HIGH => return u32::MAX,
            _ => {}
        }
        let registers = lock(&self.registers);
        let queue = usize::try_from(registers.queue_select).unwrap_or(usize::MAX);
        match offset {
            reg::VIRTIO_MMIO_DEVICE_FEATURES => half(self.features, registers.device_features_select),
            reg::VIRTIO_MMIO_QUEUE_NUM_MAX => self.queue_sizes.get(queue).copied().map_or(0, u32::from),
            reg::VIRTIO_MMIO_QUEUE_READY => {
                registers.queues.get(queue).map_or(0, |queue| u32::from(queue.ready))
            }
            reg::VIRTIO_MMIO_STATUS => self.status(&registers),
            _ => 0,
        }
    }

    fn write_register(&self, offset: u32, value: u32) {
        match offset {
            reg::VIRTIO_MMIO_INTERRUPT_ACK => return self.engine.signals().acknowledge(value),
            // KVM takes these; only one for a queue that does not exist comes here.
            reg::VIRTIO_MMIO_QUEUE_NOTIFY => {
                let index = usize::try_from(value).unwrap_or(usize::MAX);
                return match self.notifications.get(index) {
                    Some(event) => event.wake(),
                    None => self.refuse("a notification of a queue that is not there", value),
                };
            }
            _ => {}
        }
        let mut registers = lock(&self.registers);
        match offset {
            reg::VIRTIO_MMIO_DEVICE_FEATURES_SEL => registers.device_features_select = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES_SEL => registers.driver_features_select = value,
            reg::VIRTIO_MMIO_DRIVER_FEATURES => self.write_features(&mut registers, value),
            reg::VIRTIO_MMIO_QUEUE_SEL => registers.queue_select = value,
            reg::VIRTIO_MMIO_QUEUE_READY => self.write_queue_ready(&mut registers, value),
            reg::VIRTIO_MMIO_STATUS => self.write_status(&mut registers, value),
            _ => self.write_queue(&mut registers, offset, value),
        }
    }

    fn write_features(&self, registers: &mut Registers, value: u32) {
        if registers.status & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            return self.refuse("driver features after FEATURES_OK", value);
        }
        let shift = match registers.driver_features_select {
            0 => 0,
            1 => 32,
            // The bits from 64 on: none of them is offered.
            _ if value == 0 => return,
            _ => return self.refuse("driver features beyond bit 63", value),
        };
        registers.driver_features &= !(u64::from(u32::MAX) << shift);
        registers.driver_features |= u64::from(value) << shift;
    }

    fn write_queue(&self, registers: &mut Registers, offset: u32, value: u32) {
        let setting_up = registers.setting_up();
        let index = usize::try_from(registers.queue_select).unwrap_or(usize::MAX);
        let Some(queue) = registers.queues.get_mut(index) else {
            return self.refuse("a register of a queue that is not there", offset);
        };
        if !setting_up || queue.ready {
            return self.refuse("a queue's register, but queues are not being set up", offset);
        }
        match offset {
            reg::VIRTIO_MMIO_QUEUE_NUM => queue.size = value,
            reg::VIRTIO_MMIO_QUEUE_DESC_LOW => set_half(&mut queue.descriptors, 0, value),
            reg::VIRTIO_MMIO_QUEUE_DESC_HIGH => set_half(&mut queue.descriptors, 32, value),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW => set_half(&mut queue.available, 0, value),
            reg::VIRTIO_MMIO_QUEUE_AVAIL_HIGH => set_half(&mut queue.available, 32, value),
            reg::VIRTIO_MMIO_QUEUE_USED_LOW => set_half(&mut queue.used, 0, value),
            reg::VIRTIO_MMIO_QUEUE_USED_HIGH => set_half(&mut queue.used, 32, value),
            _ => self.refuse("a register that is not there", offset),
        }
    }

    fn write_queue_ready(&self, registers: &mut Registers, value: u32) {
        let setting_up = registers.setting_up();
        let event_idx = has(registers.driver_features, VIRTIO_RING_F_EVENT_IDX);
        let index = usize::try_from(registers.queue_select).unwrap_or(usize::MAX);
        let (Some(queue), Some(&max)) = (registers.queues.get_mut(index), self.queue_sizes.get(index)) else {
            return self.refuse("readiness of a queue that is not there", value);
        };
        if value == 0 {
            *queue = QueueState { ready: false, ..*queue };
            self.engine.with_core(|core| {
                if let Some(live) = core.queues.get_mut(index) {
                    *live = None;
                }
            });
        } else if setting_up {
            match VirtQueue::new(max, queue, event_idx, self.engine.hurry(), self.engine.memory()) {
                Ok(_) => queue.ready = true,
                Err(error) => self.engine.signals().quiet.say(|dropped| {
                    let device = self.description.name();
                    tracing::warn!(device, index, %error, dropped, "the guest's driver set up a queue that cannot be used");
                }),
            }
        } else {
            self.refuse("readiness of a queue, but queues are not being set up", value);
        }
    }

    fn write_status(&self, registers: &mut Registers, value: u32) {
        // Whether the device needs a reset is not the driver's to say.
        let value = value & !VIRTIO_CONFIG_S_NEEDS_RESET;
        if value == 0 {
            self.engine.reset();
            *registers = Registers::new(self.queue_sizes);
            return;
        }
        if registers.status & !value != 0 {
            return self.refuse("a status that takes bits back", value);
        }
        let new = value & !registers.status;
        let mut status = registers.status | new & !(VIRTIO_CONFIG_S_FEATURES_OK | VIRTIO_CONFIG_S_DRIVER_OK);
        if new & VIRTIO_CONFIG_S_FEATURES_OK != 0 {
            let greeted = VIRTIO_CONFIG_S_ACKNOWLEDGE | VIRTIO_CONFIG_S_DRIVER;
            let features = registers.driver_features;
            if status & greeted == greeted
                && features & !self.features == 0
                && has(features, VIRTIO_F_VERSION_1)
            {
                status |= VIRTIO_CONFIG_S_FEATURES_OK;
            } else {
                self.refuse("FEATURES_OK: with these features the device cannot be driven", value);
            }
        }
        if new & VIRTIO_CONFIG_S_DRIVER_OK != 0 {
            if status & VIRTIO_CONFIG_S_FEATURES_OK == 0 {
                self.refuse("DRIVER_OK before FEATURES_OK", value);
            } else {
                status |= VIRTIO_CONFIG_S_DRIVER_OK;
                self.engine.with_core(|core| self.go_live(core, registers));
            }
        }
        registers.status = status;
    }

    fn go_live(&self, core: &mut Core, registers: &Registers) {
        core.device.set_features(registers.driver_features);
        match self.live_queues(registers) {
            Ok(queues) => self.engine.activate(core, queues),
            // Each was looked at when it was made ready, and RAM does not move: not to be expected.
            Err(error) => self.engine.fail(core, &error),
        }
    }
}

impl MmioDevice for VirtioMmio {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Ok(offset) = u32::try_from(offset) else { return };
        if let Some(at) = offset.checked_sub(reg::VIRTIO_MMIO_CONFIG) {
            let config = self.engine.with_core(|core| core.device.config());
            let there = config.get(usize::try_from(at).unwrap_or(usize::MAX)..).unwrap_or_default();
            data.iter_mut().zip(there).for_each(|(to, from)| *to = *from);
        } else if let (Ok(data), 0) = (<&mut [u8; 4]>::try_from(data), offset % 4) {
            *data = self.read_register(offset).to_le_bytes();
        } else {
            self.refuse("a read of a part of a register", offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Ok(offset) = u32::try_from(offset) else { return };
        if let Some(at) = offset.checked_sub(reg::VIRTIO_MMIO_CONFIG) {
            self.engine.with_core(|core| core.device.write_config(at.into(), data));
        } else if let (Ok(data), 0) = (<[u8; 4]>::try_from(data), offset % 4) {
            self.write_register(offset, u32::from_le_bytes(data));
        } else {
            self.refuse("a write of a part of a register", offset);
        }
    }
}

impl Registers {
    fn new(queue_sizes: &[u16]) -> Self {
        let queue = |max: &u16| QueueState { size: u32::from(*max), ..QueueState::default() };
        Self { queues: queue_sizes.iter().map(queue).collect(), ..Self::default() }
    }

    fn setting_up(&self) -> bool {
        self.status & VIRTIO_CONFIG_S_FEATURES_OK != 0 && self.status & VIRTIO_CONFIG_S_DRIVER_OK == 0
    }
}

fn has(features: u64, bit: u32) -> bool {
    features & 1 << bit != 0
}

fn half(features: u64, select: u32) -> u32 {
    let part = match select {
        0 => features,
        1 => features >> 32,
        _ => 0,
    };
    u32::try_from(part & u64::from(u32::MAX)).expect("masked")
}

fn set_half(address: &mut u64, shift: u32, value: u32) {
    *address = *address & !(u64::from(u32::MAX) << shift) | u64::from(value) << shift;
}
