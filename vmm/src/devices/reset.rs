//! The keyboard controller's command port, of which only the processor reset is there.

use super::{Effect, PortDevice};

/// The command and status port of the 8042.
pub(crate) const PORT: u16 = 0x64;

/// The command that pulses the processor's reset line; it ends the VM, as it does in other small monitors.
pub(crate) const PULSE_RESET: u8 = 0xfe;

/// The port. It has no state.
#[derive(Debug)]
pub(crate) struct ResetPort;

impl PortDevice for ResetPort {
    fn read(&self, _offset: u16, data: &mut [u8]) {
        // Both buffers are empty: a guest waits for that before it sends a command.
        data.fill(0);
    }

    fn write(&self, _offset: u16, data: &[u8]) -> Effect {
        if data.first() == Some(&PULSE_RESET) { Effect::PowerOff } else { Effect::None }
    }
}
