//! Lines out and single letters in, a few bytes at a time.

use core::fmt::{self, Write as _};

use super::limits;

/// The machine's ports, as far as pagestorm's work needs them.
pub trait Ports {
    /// Writes a byte to the heartbeat port 0xe9.
    fn heartbeat(&mut self, byte: u8);
    /// Whether the serial port takes a byte now.
    fn serial_can_write(&mut self) -> bool;
    /// Gives a byte to the serial port.
    fn serial_write(&mut self, byte: u8);
    /// A byte that came in on the serial port, if there is one.
    fn serial_read(&mut self) -> Option<u8>;
}

/// Bytes waiting for the serial port.
#[derive(Debug)]
pub struct Console {
    queue: [u8; limits::SERIAL_QUEUE_BYTES],
    first: usize,
    count: usize,
}

impl Default for Console {
    fn default() -> Self {
        Self { queue: [0; limits::SERIAL_QUEUE_BYTES], first: 0, count: 0 }
    }
}

impl Console {
    /// Whether nothing waits.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether `lines` more lines of any length fit.
    #[must_use]
    pub const fn has_room(&self, lines: usize) -> bool {
        self.queue.len() - self.count >= lines * limits::LINE_BYTES
    }

    /// Queues a line and its newline. Ask [`Console::has_room`] first.
    /// # Panics
    /// If the line is longer than [`limits::LINE_BYTES`] or does not fit: both are bugs of the caller.
    pub fn line(&mut self, line: fmt::Arguments<'_>) {
        let before = self.count;
        writeln!(self, "{line}").expect("the caller made sure that it fits");
        assert!(self.count - before <= limits::LINE_BYTES, "a line is longer than LINE_BYTES");
    }

    /// Sends a few bytes if the port takes them.
    pub fn drain(&mut self, ports: &mut impl Ports) {
        let mut budget = limits::SERIAL_BYTES_PER_TURN;
        while self.count > 0 && budget > 0 && ports.serial_can_write() {
            ports.serial_write(self.queue[self.first]);
            self.first = (self.first + 1) % self.queue.len();
            self.count -= 1;
            budget -= 1;
        }
    }
}

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if text.len() > self.queue.len() - self.count {
            return Err(fmt::Error);
        }
        for byte in text.bytes() {
            let at = (self.first + self.count) % self.queue.len();
            self.queue[at] = byte;
            self.count += 1;
        }
        Ok(())
    }
}
