//! The 16550 serial port (vm-superio's), and what it is connected to.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial as Uart, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::input::InputPort;
use super::line::Line;
use super::output::Output;
use super::{DeviceError, Effect, PortDevice};
use crate::config::Serial;
use crate::kvm::threads::lock;

/// COM1's first port, its number of ports, and its interrupt line.
pub(crate) const PORT: u16 = 0x3f8;
pub(crate) const PORTS: u16 = 8;
pub(crate) const INTERRUPT_LINE: u32 = 4;

/// The most bytes that the port holds for the guest: a state with more is refused.
pub(crate) const FIFO_BYTES: usize = 64;

/// The modem control register (16550 data sheet, 8.6.7), and its loopback bit.
const MODEM_CONTROL: u8 = 4;
const MODEM_CONTROL_LOOPBACK: u8 = 0x10;

/// The interrupt identification register's bit that says that none waits (8.6.5).
const NO_INTERRUPT: u8 = 0x01;

#[derive(Debug)]
struct Interrupt(Arc<EventFd>);

impl Trigger for Interrupt {
    type E = io::Error;
    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

#[derive(Debug)]
struct Inner {
    uart: Uart<Interrupt, NoEvents, Output>,
    /// Whether input is let in: not while the machine stands still, or a byte might come after its state was saved.
    open: bool,
    closed_for_good: bool,
}

impl Inner {
    /// In loopback mode the line is cut: what comes then waits, too.
    fn takes_input(&self) -> bool {
        self.open
            && self.uart.fifo_capacity() > 0
            && self.uart.state().modem_control & MODEM_CONTROL_LOOPBACK == 0
    }
}

/// The port.
#[derive(Debug)]
pub(crate) struct SerialPort {
    inner: Mutex<Inner>,
    room: Condvar,
    interrupt: Arc<EventFd>,
    output: Output,
}

/// Builds the port and connects it.
pub(crate) fn connect(
    to: &Serial,
    interrupt: EventFd,
    on_quit: impl Fn() + Send + 'static,
) -> Result<(Arc<SerialPort>, Line), DeviceError> {
    let output = Output::open(to)?;
    let interrupt = Arc::new(interrupt);
    let uart = Uart::new(Interrupt(Arc::clone(&interrupt)), output.clone());
    let inner = Mutex::new(Inner { uart, open: false, closed_for_good: false });
    let port = Arc::new(SerialPort { inner, room: Condvar::new(), interrupt, output: output.clone() });
    let mut line = Line::new(Arc::clone(&port) as _, output, to);
    line.start(on_quit)?;
    Ok((port, line))
}

impl SerialPort {
    /// Its registers, and what the guest has not read yet.
    pub(crate) fn state(&self) -> SerialState {
        lock(&self.inner).uart.state()
    }

    /// Puts saved registers and unread input in. The caller has checked the input's length, and loaded the interrupt controllers before.
    ///
    /// An interrupt that the guest has not asked about is raised again, for it may have been on its way when the controllers were saved, and the
    /// port raises none while one waits. The same interrupt twice is nothing new to a driver.
    pub(crate) fn set_state(&self, state: &SerialState) -> io::Result<()> {
        let raise = Interrupt(Arc::clone(&self.interrupt));
        let uart = Uart::from_state(state, raise, NoEvents, self.output.clone()).map_err(io::Error::other)?;
        lock(&self.inner).uart = uart;
        if state.interrupt_identification & NO_INTERRUPT == 0 {
            // Also one that is masked now (vm-superio raises the others): unmasking would not raise it, since it waits already.
            self.interrupt.write(1)?;
        }
        Ok(())
    }
}

impl InputPort for SerialPort {
    fn wait_for_room(&self) -> bool {
        let full = |inner: &mut Inner| !inner.closed_for_good && !inner.takes_input();
        let inner = self.room.wait_while(lock(&self.inner), full).unwrap_or_else(PoisonError::into_inner);
        !inner.closed_for_good
    }

    fn give(&self, bytes: &[u8]) -> usize {
        let mut inner = lock(&self.inner);
        if bytes.is_empty() || !inner.takes_input() {
            return 0;
        }
        match inner.uart.enqueue_raw_bytes(bytes) {
            Ok(taken) => taken,
            Err(error) => {
                tracing::error!(%error, "serial input was lost");
                bytes.len()
            }
        }
    }

    fn set_open(&self, open: bool) {
        lock(&self.inner).open = open;
        self.room.notify_all();
    }

    fn close_for_good(&self) {
        lock(&self.inner).closed_for_good = true;
        self.room.notify_all();
    }
}

impl PortDevice for SerialPort {
    fn read(&self, offset: u16, data: &mut [u8]) {
        let Ok(offset) = u8::try_from(offset) else { return };
        let mut inner = lock(&self.inner);
        data[0] = inner.uart.read(offset);
        if inner.uart.fifo_capacity() > 0 {
            drop(inner);
            self.room.notify_all();
        }
    }

    fn write(&self, offset: u16, data: &[u8]) -> Effect {
        let Ok(offset) = u8::try_from(offset) else { return Effect::None };
        if let Err(error) = lock(&self.inner).uart.write(offset, data[0]) {
            tracing::debug!(%error, "a write to the serial port failed");
        }
        if offset == MODEM_CONTROL {
            self.room.notify_all();
        }
        Effect::None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn port() -> (Arc<SerialPort>, Line) {
        connect(&Serial::Off, EventFd::new(libc::EFD_NONBLOCK).unwrap(), || {}).unwrap()
    }

    fn read(port: &SerialPort, offset: u16) -> u8 {
        let mut byte = [0xff];
        port.read(offset, &mut byte);
        byte[0]
    }

    #[test]
    fn input_waits_while_the_machine_stands_still() {
        let (port, _line) = port();
        assert_eq!(port.give(b"x"), 0);
        port.set_open(true);
        assert_eq!(port.give(&[b'y'; 100]), FIFO_BYTES);
        assert_eq!(read(&port, 5) & 1, 1);
        assert_eq!(read(&port, 0), b'y');
    }

    #[test]
    fn an_interrupt_that_waits_is_raised_again_where_the_state_is_loaded_masked_or_not() {
        let (ier, received, sent) = (1, 1, 2);
        for (enabled, cause) in [(received, Some(b'x')), (sent, None)] {
            for masked in [false, true] {
                let (port, _line) = self::port();
                port.set_open(true);
                port.write(ier, &[enabled]);
                match cause {
                    Some(byte) => assert_eq!(port.give(&[byte]), 1),
                    None => assert_eq!(port.write(0, b"y"), Effect::None),
                }
                assert!(port.interrupt.read().is_ok());
                if masked {
                    port.write(ier, &[0]);
                }
                let (moved, _line) = self::port();
                moved.set_state(&port.state()).unwrap();
                assert!(moved.interrupt.read().is_ok(), "{enabled} {masked}");
                // Once the guest has asked what it was, a state has nothing to raise.
                assert_eq!(read(&moved, 2) & NO_INTERRUPT, 0);
                let (again, _line) = self::port();
                again.set_state(&moved.state()).unwrap();
                assert!(again.interrupt.read().is_err(), "{enabled} {masked}");
            }
        }
    }

    #[test]
    fn unread_input_moves_with_the_state() {
        let (port, _line) = self::port();
        port.set_open(true);
        port.give(b"abc");
        assert_eq!(read(&port, 0), b'a');
        port.write(7, &[0x5a]);
        let (moved, _line) = self::port();
        moved.set_state(&port.state()).unwrap();
        assert_eq!((read(&moved, 7), read(&moved, 0), read(&moved, 0)), (0x5a, b'b', b'c'));
    }
}
