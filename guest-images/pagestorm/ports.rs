//! The machine's ports: a 16550 at 0x3f8, the heartbeat at 0xe9, the reset at 0x64. Polled; ring 3 may, with IOPL 3.

use core::arch::asm;
use core::fmt;

use super::pagestorm::console::Ports;

/// Heartbeat: QEMU's isa-debugcon.
const HEARTBEAT: u16 = 0xe9;
/// First port of COM1 (data; divisor's low byte while DLAB is set).
const COM1: u16 = 0x3f8;
/// Interrupt enable (divisor's high byte while DLAB is set).
const COM1_INTERRUPTS: u16 = COM1 + 1;
const COM1_FIFO: u16 = COM1 + 2;
const COM1_LINE: u16 = COM1 + 3;
const COM1_MODEM: u16 = COM1 + 4;
/// Line status: bit 0 a byte came in, bit 5 a byte may go out.
const COM1_STATUS: u16 = COM1 + 5;
/// The 8042 keyboard controller's command port; 0xfe pulses the CPU's reset line.
const RESET: u16 = 0x64;
/// How often a panic asks the port to take a byte before it goes on without.
const PANIC_POLLS: u32 = 10_000;

/// Writes a byte to a port.
pub fn out(port: u16, byte: u8) {
    // SAFETY: port I/O is allowed (IOPL 3), and no device of these machines writes memory when one of the ports above
    // is written.
    unsafe { asm!("out dx, al", in("dx") port, in("al") byte, options(nomem, nostack, preserves_flags)) };
}

/// Reads a byte from a port.
pub fn input(port: u16) -> u8 {
    let byte: u8;
    // SAFETY: as for `out`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") byte, options(nomem, nostack, preserves_flags)) };
    byte
}

/// The ports, once the serial port is set up.
pub struct MachinePorts(());

impl MachinePorts {
    /// Sets up COM1: 115200 baud, 8N1, FIFOs on, no interrupts.
    pub fn new() -> Self {
        out(COM1_INTERRUPTS, 0);
        out(COM1_LINE, 0x80);
        out(COM1, 1);
        out(COM1_INTERRUPTS, 0);
        out(COM1_LINE, 0x03);
        out(COM1_FIFO, 0x07);
        out(COM1_MODEM, 0x03);
        Self(())
    }
}

impl Ports for MachinePorts {
    fn heartbeat(&mut self, byte: u8) {
        out(HEARTBEAT, byte);
    }

    fn serial_can_write(&mut self) -> bool {
        input(COM1_STATUS) & 0x20 != 0
    }

    fn serial_write(&mut self, byte: u8) {
        out(COM1, byte);
    }

    fn serial_read(&mut self) -> Option<u8> {
        (input(COM1_STATUS) & 1 != 0).then(|| input(COM1))
    }
}

/// The serial port for last words: waits for it, though not for ever.
pub struct LastWords;

impl fmt::Write for LastWords {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            let ready = (0..PANIC_POLLS).any(|_| input(COM1_STATUS) & 0x20 != 0);
            if ready {
                out(COM1, byte);
            }
        }
        Ok(())
    }
}

/// Ends the machine: by the 8042's reset, and where there is none by a triple fault (`ud2`'s exception has no gate). A monitor takes either as the guest's end or reset.
pub fn power_off() -> ! {
    out(RESET, 0xfe);
    // SAFETY: it does not return: the machine is reset or stops.
    unsafe { asm!("ud2", options(noreturn)) }
}
