//! The console (virtio 1.2, 5.3) with one port: hvc0 in Linux.
//!
//! Output goes through the same bounded buffer and thread as the serial port's, so a reader who does not read cannot stall the guest. Input
//! waits in a bounded buffer for the guest's own, and moves with the VM from there.

use std::collections::VecDeque;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::queue::{QueueError, VirtQueue};
use super::{DeviceDescription, VirtioDevice, Wait};
use crate::config::Serial;
use crate::devices::DeviceError;
use crate::devices::input::InputPort;
use crate::devices::line::Line;
use crate::devices::output::Output;
use crate::devices::wake::Wake;
use crate::kvm::StateError;
use crate::kvm::threads::lock;
use crate::limits::{CONSOLE_INPUT_BYTES, CONSOLE_REQUEST_BYTES};
use crate::memory::Mapping;

const RECEIVE: usize = 0;

#[derive(Debug, Default)]
struct Waiting {
    bytes: VecDeque<u8>,
    /// Whether input is let in: not while the machine stands still, or a byte might come after its state was saved.
    open: bool,
    closed_for_good: bool,
}

/// Input on its way to the guest.
#[derive(Debug)]
pub(crate) struct ConsolePort {
    waiting: Mutex<Waiting>,
    room: Condvar,
    arrived: Wake,
}

impl ConsolePort {
    fn new() -> io::Result<Self> {
        Ok(Self { waiting: Mutex::default(), room: Condvar::new(), arrived: Wake::new()? })
    }

    fn take(&self, most: usize) -> Vec<u8> {
        let mut waiting = lock(&self.waiting);
        let count = most.min(waiting.bytes.len());
        let taken = waiting.bytes.drain(..count).collect();
        drop(waiting);
        self.room.notify_all();
        taken
    }

    fn is_empty(&self) -> bool {
        lock(&self.waiting).bytes.is_empty()
    }
}

impl InputPort for ConsolePort {
    fn wait_for_room(&self) -> bool {
        let full = |waiting: &mut Waiting| {
            !waiting.closed_for_good && (!waiting.open || waiting.bytes.len() >= CONSOLE_INPUT_BYTES)
        };
        let waiting = self.room.wait_while(lock(&self.waiting), full).unwrap_or_else(PoisonError::into_inner);
        !waiting.closed_for_good
    }

    fn give(&self, bytes: &[u8]) -> usize {
        let mut waiting = lock(&self.waiting);
        if !waiting.open {
            return 0;
        }
        let count = bytes.len().min(CONSOLE_INPUT_BYTES.saturating_sub(waiting.bytes.len()));
        waiting.bytes.extend(&bytes[..count]);
        drop(waiting);
        self.arrived.wake();
        count
    }

    fn set_open(&self, open: bool) {
        lock(&self.waiting).open = open;
        self.room.notify_all();
    }

    fn close_for_good(&self) {
        lock(&self.waiting).closed_for_good = true;
        self.room.notify_all();
    }
}

/// The device.
#[derive(Debug)]
pub(crate) struct Console {
    port: Arc<ConsolePort>,
    output: Output,
}

impl Console {
    /// A console, and the line that connects it to `to`.
    /// # Errors
    /// If the file cannot be opened, or there are no descriptors or threads left.
    pub(crate) fn open(to: &Serial) -> Result<(Self, Line), DeviceError> {
        let output = Output::open(to)?;
        let port = ConsolePort::new();
        let port = port.map_err(|source| DeviceError::Start { device: "console".to_owned(), source })?;
        let port = Arc::new(port);
        let line = Line::new(Arc::clone(&port) as _, output.clone(), to);
        Ok((Self { port, output }, line))
    }

    fn receive(&self, queue: &mut VirtQueue, memory: &Mapping) -> Result<Wait, QueueError> {
        // Before looking: what comes after that sets it again.
        self.port.arrived.clear();
        while !self.port.is_empty() {
            let Some(chain) = queue.pop(memory)? else { break };
            let bytes = self.port.take(chain.writable.bytes());
            let written = chain.writable.copy_from(&bytes);
            queue.push_used(memory, chain.head, written)?;
        }
        Ok(Wait::Backend)
    }

    fn send(&mut self, queue: &mut VirtQueue, memory: &Mapping) -> Result<Wait, QueueError> {
        while let Some(chain) = queue.pop(memory)? {
            let bytes = chain.readable.bytes();
            if bytes > CONSOLE_REQUEST_BYTES {
                return Err(QueueError::Request {
                    head: chain.head,
                    what: "more output than a console takes at once",
                });
            }
            let mut text = vec![0; bytes];
            chain.readable.copy_to(&mut text);
            if let Err(error) = self.output.write_all(&text) {
                tracing::debug!(%error, "the console's output was lost");
            }
            queue.push_used(memory, chain.head, 0)?;
        }
        Ok(Wait::Driver)
    }
}

impl VirtioDevice for Console {
    fn describe(&self) -> DeviceDescription {
        DeviceDescription::Console
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[64, 64]
    }

    /// `struct virtio_console_config` (5.3.4): none of its fields without the features that bring them.
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    fn write_config(&mut self, _: u64, _: &[u8]) {}

    fn set_features(&mut self, _: u64) {}

    fn reset(&mut self) {}

    fn serve(&mut self, index: usize, queue: &mut VirtQueue, memory: &Mapping) -> Result<Wait, QueueError> {
        if index == RECEIVE { self.receive(queue, memory) } else { self.send(queue, memory) }
    }

    fn backend(&self) -> Option<BorrowedFd<'_>> {
        Some(self.port.arrived.as_fd())
    }

    /// Input that the guest has not taken yet.
    fn save(&self) -> Vec<u8> {
        lock(&self.port.waiting).bytes.iter().copied().collect()
    }

    fn load(&mut self, state: &[u8]) -> Result<(), StateError> {
        if state.len() > CONSOLE_INPUT_BYTES {
            let (got, most) = (state.len(), CONSOLE_INPUT_BYTES);
            return Err(StateError::TooMany { field: "console's waiting input", got, most });
        }
        lock(&self.port.waiting).bytes = state.iter().copied().collect();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::virtio::driver::{BUFFERS, Driver, LIVE, NEEDS_RESET, memory};

    const SEND: usize = 1;

    #[test]
    fn what_the_guest_writes_reaches_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        let (device, line) = Console::open(&Serial::File(path.clone())).unwrap();
        let mut driver = Driver::new(Box::new(device), memory());
        driver.start(driver.offered());
        driver.put(BUFFERS, b"hello\n");
        driver.request(SEND, &[(BUFFERS, 3, false), (BUFFERS + 3, 3, false)]);
        driver.pass();
        line.shut_down();
        assert_eq!(std::fs::read(path).unwrap(), b"hello\n");
        driver.request(SEND, &[(BUFFERS, 0x10_0000, false)]);
        driver.pass();
        assert_eq!((driver.used(SEND), driver.status()), (1, LIVE | NEEDS_RESET));
    }

    #[test]
    fn input_waits_for_the_guests_buffers_and_is_bounded() {
        let (device, line) = Console::open(&Serial::Off).unwrap();
        let mut driver = Driver::new(Box::new(device), memory());
        driver.start(driver.offered());
        assert_eq!(line.port.give(b"x"), 0, "not while the machine stands still");
        line.set_open(true);
        assert_eq!(line.port.give(&[b'a'; CONSOLE_INPUT_BYTES + 7]), CONSOLE_INPUT_BYTES);
        driver.pass();
        driver.request(RECEIVE, &[(BUFFERS, 10, true)]);
        driver.pass();
        assert_eq!((driver.used_element(RECEIVE, 0).1, driver.interrupts()), (10, 1));
        assert_eq!(driver.get(BUFFERS, 11), b"aaaaaaaaaa\0");
        assert!(line.port.wait_for_room());
        assert_eq!(line.port.give(b"bcdefghijklm"), 10);
    }

    #[test]
    fn input_that_waits_moves_with_the_machine() {
        let (device, line) = Console::open(&Serial::Off).unwrap();
        line.set_open(true);
        line.port.give(b"ls\n");
        let (mut other, _line) = Console::open(&Serial::Off).unwrap();
        other.load(&device.save()).unwrap();
        assert_eq!(other.save(), b"ls\n");
        assert!(other.load(&[0; CONSOLE_INPUT_BYTES + 1]).is_err());
    }
}
