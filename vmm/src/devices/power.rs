//! ACPI's sleep control and status registers (ACPI 6.5, section 4.8.3.7), by which a guest without fixed hardware powers off.

use super::{Effect, PortDevice};

/// The sleep control register, and the status register behind it.
pub(crate) const CONTROL: u16 = 0x600;
pub(crate) const STATUS: u16 = CONTROL + 1;
pub(crate) const PORTS: u16 = 2;

/// The sleep type that `\_S5` gives for soft-off. There is no other.
pub(crate) const SOFT_OFF: u8 = 5;

const TYPE_SHIFT: u8 = 2;
const TYPE_MASK: u8 = 0b111;
const ENABLE: u8 = 1 << 5;

/// The registers. They have no state: the machine never woke up.
#[derive(Debug)]
pub(crate) struct PowerPorts;

impl PortDevice for PowerPorts {
    fn read(&self, _offset: u16, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u16, data: &[u8]) -> Effect {
        match data.first() {
            Some(value)
                if offset == 0 && value & ENABLE != 0 && value >> TYPE_SHIFT & TYPE_MASK == SOFT_OFF =>
            {
                Effect::PowerOff
            }
            Some(_) | None => Effect::None,
        }
    }
}
