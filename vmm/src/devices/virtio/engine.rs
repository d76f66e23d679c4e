//! A device with its live queues: who may touch it when, and what it tells its driver.
//!
//! ```text
//!                 ┌──────────── run ────────────┐
//!  parked ────────┘                             ▼
//!    ▲                          serving: worker, request by request ◄──► waiting (poll)
//!    └──────────── park ────────────────┘         (any) ── quit ──► gone
//! ```
//! The worker serves only between `enter` and `leave`. A virtual CPU that needs the device (`with_core`) raises its claim first; the worker
//! then begins no further request, and comes back only when no claim is left.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::EventFd;

use super::queue::{Looked, QueueError, VirtQueue};
use super::{VirtioDevice, Wait};
use crate::devices::quiet::Quiet;
use crate::devices::wake::Wake;
use crate::kvm::threads::lock;
use crate::memory::{Mapping, Memory};

/// What a device tells its driver without its registers' lock.
#[derive(Debug)]
pub(crate) struct Signals {
    name: String,
    interrupt_status: AtomicU32,
    config_generation: AtomicU32,
    driver_ok: AtomicBool,
    needs_reset: AtomicBool,
    interrupt: EventFd,
    pub(super) quiet: Quiet,
}

impl Signals {
    fn raise(&self, bit: u32) {
        // Before the event: the driver reads the status in its handler.
        self.interrupt_status.fetch_or(bit, Ordering::SeqCst);
        self.send_interrupt();
    }

    fn send_interrupt(&self) {
        match self.interrupt.write(1) {
            Ok(()) => {}
            // A full counter is an interrupt that is still to be delivered.
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => tracing::error!(device = self.name, %error, "an interrupt was lost"),
        }
    }

    /// The configuration has changed: by the monitor, not by the driver.
    pub(crate) fn config_changed(&self) {
        self.config_generation.fetch_add(1, Ordering::SeqCst);
        if self.driver_ok.load(Ordering::SeqCst) {
            self.raise(VIRTIO_MMIO_INT_CONFIG);
        }
    }

    /// The driver did what it may not: the device stands still until it is reset.
    pub(super) fn fail(&self, error: &QueueError) {
        self.quiet.say(|dropped| {
            tracing::warn!(
                device = self.name,
                %error,
                dropped,
                "the guest's driver broke the rules: its device stands still until it is reset"
            );
        });
        self.needs_reset.store(true, Ordering::SeqCst);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    pub(super) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    pub(super) fn interrupt_status(&self) -> u32 {
        self.interrupt_status.load(Ordering::SeqCst)
    }

    pub(super) fn acknowledge(&self, bits: u32) {
        self.interrupt_status.fetch_and(!bits, Ordering::SeqCst);
    }

    pub(super) fn config_generation(&self) -> u32 {
        self.config_generation.load(Ordering::SeqCst)
    }

    /// As saved.
    pub(super) fn load(&self, interrupt_status: u32, config_generation: u32, needs_reset: bool) {
        self.interrupt_status.store(interrupt_status, Ordering::SeqCst);
        self.config_generation.store(config_generation, Ordering::SeqCst);
        self.needs_reset.store(needs_reset, Ordering::SeqCst);
    }
}

/// The device and its queues.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) device: Box<dyn VirtioDevice>,
    /// Those that the driver has set up; none before DRIVER_OK.
    pub(super) queues: Vec<Option<VirtQueue>>,
    /// Whether they are served.
    live: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Park,
    Run,
    Quit,
}

#[derive(Debug)]
struct Gate {
    wanted: Wanted,
    serving: bool,
    claims: u32,
}

/// What one turn of the worker came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pass {
    /// There is more to do at once.
    pub(crate) more: bool,
    /// The backend is to be waited for as well.
    pub(crate) wants_backend: bool,
}

/// A device and who may touch it.
#[derive(Debug)]
pub(crate) struct Engine {
    core: Mutex<Core>,
    gate: Mutex<Gate>,
    changed: Condvar,
    hurry: Arc<AtomicBool>,
    memory: Arc<Memory>,
    pub(super) wake: Wake,
    signals: Arc<Signals>,
}

impl Engine {
    /// A device without live queues, parked.
    pub(super) fn new(
        device: Box<dyn VirtioDevice>,
        memory: Arc<Memory>,
        interrupt: EventFd,
    ) -> std::io::Result<Self> {
        let signals = Signals {
            name: device.describe().name(),
            interrupt_status: AtomicU32::new(0),
            config_generation: AtomicU32::new(0),
            driver_ok: AtomicBool::new(false),
            needs_reset: AtomicBool::new(false),
            interrupt,
            quiet: Quiet::default(),
        };
        Ok(Self {
            core: Mutex::new(Core { device, queues: Vec::new(), live: false }),
            gate: Mutex::new(Gate { wanted: Wanted::Park, serving: false, claims: 0 }),
            changed: Condvar::new(),
            hurry: Arc::default(),
            memory,
            wake: Wake::new()?,
            signals: Arc::new(signals),
        })
    }

    /// What it tells its driver.
    pub(crate) fn signals(&self) -> &Arc<Signals> {
        &self.signals
    }

    pub(super) fn memory(&self) -> &Mapping {
        self.memory.mapping()
    }

    /// Set while somebody waits for the worker.
    pub(super) fn hurry(&self) -> &Arc<AtomicBool> {
        &self.hurry
    }

    /// Changes what is wanted of the worker.
    fn set(&self, change: impl FnOnce(&mut Gate)) {
        let mut gate = lock(&self.gate);
        change(&mut gate);
        self.hurry.store(gate.wanted != Wanted::Run || gate.claims > 0, Ordering::Relaxed);
        self.changed.notify_all();
    }

    /// Does something with the device between two requests; waits for the one that is being served.
    pub(super) fn with_core<R>(&self, act: impl FnOnce(&mut Core) -> R) -> R {
        struct Claim<'a>(&'a Engine);
        impl Drop for Claim<'_> {
            fn drop(&mut self) {
                self.0.set(|gate| gate.claims -= 1);
            }
        }
        self.set(|gate| gate.claims += 1);
        let _claim = Claim(self);
        act(&mut lock(&self.core))
    }

    /// Brings the queues to life: from here on they are served.
    pub(super) fn activate(&self, core: &mut Core, queues: Vec<Option<VirtQueue>>) {
        core.queues = queues;
        core.live = true;
        self.signals.driver_ok.store(true, Ordering::SeqCst);
        self.wake.wake();
    }

    /// Takes the queues away and puts the device back to how it was.
    pub(super) fn reset(&self) {
        self.with_core(|core| {
            core.live = false;
            core.queues.clear();
            core.device.reset();
            self.signals.driver_ok.store(false, Ordering::SeqCst);
            self.signals.needs_reset.store(false, Ordering::SeqCst);
            self.signals.interrupt_status.store(0, Ordering::SeqCst);
        });
    }

    /// Stops serving: a driver's error that no look at a queue found.
    pub(super) fn fail(&self, core: &mut Core, error: &QueueError) {
        core.live = false;
        self.signals.fail(error);
    }

    /// One look at every queue.
    pub(crate) fn pass(&self) -> Pass {
        let mut core = lock(&self.core);
        if !core.live {
            return Pass::default();
        }
        let (mut more, mut interrupt, mut wants_backend) = (false, false, false);
        for index in 0..core.queues.len() {
            match core.look(index, self.memory.mapping()) {
                Ok(None) => {}
                Ok(Some((looked, wait))) => {
                    more |= looked.more;
                    interrupt |= looked.interrupt;
                    wants_backend |= wait == Wait::Backend;
                }
                Err(error) => {
                    self.fail(&mut core, &error);
                    return Pass::default();
                }
            }
        }
        if interrupt {
            self.signals.raise(VIRTIO_MMIO_INT_VRING);
        }
        Pass { more, wants_backend }
    }

    /// Lets the worker serve. What the driver was told before is told again: an interrupt on its way when the machine was saved is not
    /// in the saved interrupt controllers.
    pub(super) fn run(&self) {
        self.set(|gate| {
            if gate.wanted == Wanted::Park {
                gate.wanted = Wanted::Run;
            }
        });
        if self.signals.interrupt_status() != 0 {
            self.signals.send_interrupt();
        }
        // It looks at all queues once, whatever was notified while it stood still.
        self.wake.wake();
    }

    /// Returns when the worker serves nothing, and will not until [`Engine::run`].
    pub(super) fn park(&self) {
        self.set(|gate| {
            if gate.wanted == Wanted::Run {
                gate.wanted = Wanted::Park;
            }
        });
        let gate = lock(&self.gate);
        drop(self.changed.wait_while(gate, |gate| gate.serving).unwrap_or_else(PoisonError::into_inner));
    }

    /// Tells the worker to end.
    pub(super) fn quit(&self) {
        self.set(|gate| gate.wanted = Wanted::Quit);
        self.wake.wake();
    }

    /// Waits until the worker may serve; `None` when it is to end. It serves until what it gets here is dropped.
    pub(super) fn enter(&self) -> Option<Serving<'_>> {
        let gate = lock(&self.gate);
        let mut gate = self
            .changed
            .wait_while(gate, |gate| match gate.wanted {
                Wanted::Park => true,
                Wanted::Run => gate.claims > 0,
                Wanted::Quit => false,
            })
            .unwrap_or_else(PoisonError::into_inner);
        if gate.wanted == Wanted::Quit {
            return None;
        }
        gate.serving = true;
        Some(Serving(self))
    }
}

impl Core {
    /// One look at a queue, if the driver has set it up.
    fn look(&mut self, index: usize, memory: &Mapping) -> Result<Option<(Looked, Wait)>, QueueError> {
        let Some(queue) = &mut self.queues[index] else { return Ok(None) };
        queue.begin(memory)?;
        let wait = self.device.serve(index, queue, memory)?;
        Ok(Some((queue.end(memory)?, wait)))
    }
}

/// The worker's right to serve; given back also when it panics, or whoever parks it would wait for ever.
pub(super) struct Serving<'a>(&'a Engine);

impl Drop for Serving<'_> {
    fn drop(&mut self) {
        self.0.set(|gate| gate.serving = false);
    }
}
