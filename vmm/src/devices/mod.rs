//! The devices that the guest sees, and the bus of their ports.

use std::sync::Arc;

use crate::config::Serial;

pub(crate) mod debugcon;
pub(crate) mod input;
pub(crate) mod output;
pub(crate) mod power;
pub(crate) mod reset;
pub(crate) mod serial;
pub mod terminal;
mod wake;

use debugcon::DebugConsole;
use power::PowerPorts;
use reset::ResetPort;
pub(crate) use serial::{SerialLine, SerialPort};

/// What a write did beyond its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Nothing.
    None,
    /// The guest asked for power-off or reset.
    PowerOff,
}

/// A device behind ports. Virtual CPUs call it concurrently.
pub(crate) trait PortDevice: Send + Sync + std::fmt::Debug {
    /// One read at `offset` from the device's first port; `data` is 1, 2 or 4 bytes long and holds ones.
    fn read(&self, offset: u16, data: &mut [u8]);
    /// One write at `offset` from the device's first port.
    fn write(&self, offset: u16, data: &[u8]) -> Effect;
}

#[derive(Debug)]
struct Claim {
    first: u16,
    ports: u16,
    device: Arc<dyn PortDevice>,
}

/// Errors of devices.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The serial port's file cannot be used.
    #[error("could not open {path} for the serial port's output")]
    SerialFile {
        /// The file.
        path: std::path::PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The serial port's thread or descriptors could not be had.
    #[error("could not set up the serial port ({step})")]
    SerialSetup {
        /// What failed.
        step: &'static str,
        /// Why.
        source: std::io::Error,
    },
}

/// The devices of a machine.
#[derive(Debug)]
pub(crate) struct Devices {
    serial: Arc<SerialPort>,
    line: SerialLine,
    debug_console: Arc<DebugConsole>,
    claims: Vec<Claim>,
}

impl Devices {
    /// Builds them. `interrupt` raises the serial port's line; `on_quit` is called when a user at the terminal asks for the end.
    pub(crate) fn new(
        serial: &Serial,
        interrupt: vmm_sys_util::eventfd::EventFd,
        on_quit: impl Fn() + Send + 'static,
    ) -> Result<Self, DeviceError> {
        let (port, line) = serial::connect(serial, interrupt, on_quit)?;
        let debug_console = Arc::new(DebugConsole::default());
        let claims = vec![
            Claim { first: serial::PORT, ports: serial::PORTS, device: Arc::clone(&port) as _ },
            Claim { first: debugcon::PORT, ports: 1, device: Arc::clone(&debug_console) as _ },
            Claim { first: reset::PORT, ports: 1, device: Arc::new(ResetPort) },
            Claim { first: power::CONTROL, ports: power::PORTS, device: Arc::new(PowerPorts) },
        ];
        Ok(Self { serial: port, line, debug_console, claims })
    }

    fn find(&self, port: u16) -> Option<(&dyn PortDevice, u16)> {
        self.claims.iter().find_map(|c| {
            let offset = port.checked_sub(c.first)?;
            (offset < c.ports).then(|| (c.device.as_ref(), offset))
        })
    }

    /// Answers reads from `port`, `access` bytes each (a string instruction makes many); unclaimed ports read as ones.
    pub(crate) fn read(&self, port: u16, access: usize, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((device, offset)) = self.find(port) {
            data.chunks_mut(access).for_each(|one| device.read(offset, one));
        }
    }

    /// Carries out writes to `port`, `access` bytes each; unclaimed ports swallow them.
    pub(crate) fn write(&self, port: u16, access: usize, data: &[u8]) -> Effect {
        let Some((device, offset)) = self.find(port) else { return Effect::None };
        data.chunks(access).map(|one| device.write(offset, one)).fold(Effect::None, |all, one| match one {
            Effect::None => all,
            Effect::PowerOff => Effect::PowerOff,
        })
    }

    /// The serial port.
    pub(crate) fn serial(&self) -> &SerialPort {
        &self.serial
    }

    /// The debug console.
    pub(crate) fn debug_console(&self) -> &DebugConsole {
        &self.debug_console
    }

    /// Lets input in, or holds it back so that the devices' state stands still.
    pub(crate) fn set_running(&self, running: bool) {
        self.serial.set_open(running);
    }

    /// Gives the user's terminal back, if this machine has it.
    pub(crate) fn release_terminal(&self) {
        self.line.release_terminal();
    }

    /// Writes what output can be written; called on the thread that saw the VM end.
    pub(crate) fn end_output(&self) {
        self.line.end_output();
    }

    /// Ends the threads behind the devices; output that can be written is written first.
    pub(crate) fn shut_down(&self) {
        self.line.shut_down();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn devices() -> Devices {
        Devices::new(&Serial::Off, vmm_sys_util::eventfd::EventFd::new(0).unwrap(), || {}).unwrap()
    }

    #[test]
    fn an_empty_port_reads_as_ones_and_swallows_writes() {
        let devices = devices();
        let mut data = [0; 4];
        devices.read(0x70, 4, &mut data);
        assert_eq!(data, [0xff; 4]);
        assert_eq!(devices.write(0x70, 1, &[1, 2, 3]), Effect::None);
    }

    #[test]
    fn a_string_write_counts_each_byte() {
        let devices = devices();
        devices.write(debugcon::PORT, 1, &[1, 2, 3]);
        assert_eq!(devices.debug_console().heartbeat().count, 3);
    }

    #[test]
    fn only_the_reset_command_ends_the_vm() {
        let devices = devices();
        assert_eq!(devices.write(reset::PORT, 1, &[0xd1]), Effect::None);
        assert_eq!(devices.write(reset::PORT, 1, &[0xfe]), Effect::PowerOff);
    }

    #[test]
    fn only_soft_off_powers_off() {
        let devices = devices();
        let soft_off = power::SOFT_OFF << 2;
        for (port, value) in [(power::CONTROL, soft_off), (power::CONTROL, 1 << 5), (power::STATUS, 0x34)] {
            assert_eq!(devices.write(port, 1, &[value]), Effect::None, "{port:#x} {value:#x}");
        }
        let mut status = [0xff];
        devices.read(power::STATUS, 1, &mut status);
        assert_eq!(status, [0], "it has not woken up");
        assert_eq!(devices.write(power::CONTROL, 1, &[soft_off | 1 << 5]), Effect::PowerOff);
    }
}
