//! A guest made of bytes: drives a device's registers and queues in this process, without KVM. For fuzzing, and for property tests.
//!
//! Whatever the bytes are ([`script`] says what they mean), the device must answer in bounded time and memory, nothing may panic, what is saved can
//! be loaded, and what the device writes to memory is noted as written. A device has no thread of its own here, so that the same bytes
//! always do the same; [`Exercise::race`] gives it one.

use std::cell::{Cell, OnceCell};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;

use page::{Gfn, PAGE_SIZE, PageSet};
use vmm_sys_util::eventfd::EventFd;

use super::VirtioDevice;
use super::balloon::Balloon;
use super::block::Block;
use super::console::Console;
use super::mmio::VirtioMmio;
use super::net::{Mac, Net, Tap};
use super::rng::Rng;
use crate::config::{DiskOptions, Serial};
use crate::devices::DeviceError;
use crate::devices::wake::Wake;
use crate::limits::MEMORY_GRANULE_BYTES;
use crate::memory::{Memory, MemoryError, layout};

mod guest;
pub mod script;
#[cfg(test)]
mod tests;

use guest::Guest;

/// That what is not noted as written is still zero is looked at once in so many exercises, the first among them.
const NOTES_EVERY: u32 = 256;

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

/// Makes so many bytes arrive from outside.
type Arrive = Box<dyn Fn(u16)>;
type Make = Box<dyn Fn() -> Result<(Box<dyn VirtioDevice>, Arrive), DeviceError>>;

/// A kind of device to exercise.
pub struct Exercise {
    make: Make,
    /// Made once: all zeros between two exercises.
    memory: OnceCell<Arc<Memory>>,
    done: Cell<u32>,
}

impl std::fmt::Debug for Exercise {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Exercise").finish_non_exhaustive()
    }
}

/// A device without or with its thread, and what brings it something from outside.
struct Subject {
    device: VirtioMmio,
    arrive: Arrive,
    threaded: bool,
}

fn nothing_arrives() -> Arrive {
    Box::new(|_| {})
}

impl Exercise {
    fn new(make: impl Fn() -> Result<(Box<dyn VirtioDevice>, Arrive), DeviceError> + 'static) -> Self {
        Self { make: Box::new(make), memory: OnceCell::new(), done: Cell::new(0) }
    }

    /// The source of random numbers.
    #[must_use]
    pub fn rng() -> Self {
        Self::new(|| Ok((Box::new(Rng::default()), nothing_arrives())))
    }

    /// A disk.
    #[must_use]
    pub fn block(options: DiskOptions) -> Self {
        Self::new(move || Ok((Box::new(Block::open(&options)?), nothing_arrives())))
    }

    /// The console, whose output goes nowhere.
    #[must_use]
    pub fn console() -> Self {
        Self::new(|| {
            let (device, line) = Console::open(&Serial::Off)?;
            line.set_open(true);
            // A user who types faster than the guest reads loses what there is no room for.
            let arrive = move |bytes: u16| {
                line.port.give(&vec![b'a'; usize::from(bytes)]);
            };
            Ok((Box::new(device), Box::new(arrive)))
        })
    }

    /// The memory balloon.
    #[must_use]
    pub fn balloon() -> Self {
        Self::new(|| Ok((Box::new(Balloon::default()), nothing_arrives())))
    }

    /// A network interface. What it sends comes back.
    #[must_use]
    pub fn net() -> Self {
        Self::new(|| {
            let unset = |source| DeviceError::Start { device: "net".to_owned(), source };
            let name = format!("tern-exercise-{:x}", getrandom::u64().map_err(DeviceError::Random)?);
            let address = SocketAddr::from_abstract_name(name).map_err(unset)?;
            let socket = UnixDatagram::bind_addr(&address).map_err(unset)?;
            socket.connect_addr(&address).map_err(unset)?;
            let outside = socket.try_clone().map_err(unset)?;
            let mac = Mac::random().map_err(DeviceError::Random)?;
            let device = Net::new("net0".to_owned(), mac, Tap::stand_in(socket).map_err(unset)?);
            let arrive = move |bytes| {
                // One that finds no room is lost, as on any network.
                if let Err(error) = outside.send(&vec![0; usize::from(bytes) * 2]) {
                    tracing::trace!(%error, "a packet was lost");
                }
            };
            Ok((Box::new(device), Box::new(arrive)))
        })
    }

    /// Lets the guest that `bytes` describe loose on a new device.
    /// # Errors
    /// If the device cannot be made.
    /// # Panics
    /// If the device breaks its own rules.
    pub fn run(&self, bytes: &[u8]) -> Result<(), ExerciseError> {
        self.exercise(bytes, false)
    }

    /// The same with the device's own thread, which looks while the guest goes on: what comes of it differs from run to run.
    /// # Errors
    /// If the device or its thread cannot be made.
    /// # Panics
    /// If the device breaks its own rules.
    pub fn race(&self, bytes: &[u8]) -> Result<(), ExerciseError> {
        self.exercise(bytes, true)
    }

    fn exercise(&self, bytes: &[u8], threaded: bool) -> Result<(), ExerciseError> {
        let memory = self.memory()?;
        Guest::new(bytes, &memory, &|| self.subject(&memory, threaded))?.run()?;
        let noted = self.done.get().is_multiple_of(NOTES_EVERY);
        self.done.set(self.done.get().wrapping_add(1));
        clear(&memory, noted);
        Ok(())
    }

    fn memory(&self) -> Result<Arc<Memory>, MemoryError> {
        if let Some(memory) = self.memory.get() {
            return Ok(Arc::clone(memory));
        }
        let memory = Arc::new(Memory::new(&layout(MEMORY_GRANULE_BYTES)?)?);
        Ok(Arc::clone(self.memory.get_or_init(|| memory)))
    }

    fn subject(&self, memory: &Arc<Memory>, threaded: bool) -> Result<Subject, ExerciseError> {
        let (device, arrive) = (self.make)()?;
        let events = device.queue_sizes().iter().map(|_| Ok(Arc::new(Wake::new()?)));
        let events = events.collect::<Result<_, std::io::Error>>()?;
        let interrupt = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let start = if threaded { VirtioMmio::start } else { VirtioMmio::without_thread };
        let device = start(device, Arc::clone(memory), interrupt, events)?;
        device.run();
        Ok(Subject { device, arrive, threaded })
    }
}

/// Memory as it was; if `all`, what is not noted as written is looked at as well.
fn clear(memory: &Memory, all: bool) {
    let mut written = PageSet::empty(memory.bound());
    memory.take_monitor_writes(&mut written);
    let zeros = [0; PAGE_SIZE];
    written.iter().for_each(|gfn| memory.write_page(gfn, &zeros));
    memory.take_monitor_writes(&mut written);
    if all {
        let mut page = zeros;
        for gfn in (0..memory.bound()).map(Gfn) {
            memory.read_page(gfn, &mut page);
            assert!(page == zeros, "the device wrote page {} and did not note it", gfn.0);
        }
    }
}
