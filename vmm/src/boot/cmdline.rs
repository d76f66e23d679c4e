//! The kernel's command line: the user's, and without ACPI the words that name the devices (the kernel's
//! Documentation/admin-guide/kernel-parameters.txt, `virtio_mmio.device=`).

use std::fmt::Write as _;

use super::{BootError, MmioDevice};
use crate::config::VmConfig;

/// The whole line, which has at most `most` bytes.
pub(crate) fn build(config: &VmConfig, devices: &[MmioDevice], most: usize) -> Result<String, BootError> {
    let mut line = config.cmdline.clone();
    if line.contains('\0') {
        return Err(BootError::CmdlineZero);
    }
    let named = if config.acpi { &[] } else { devices };
    for device in named {
        let gap = if line.is_empty() { "" } else { " " };
        let MmioDevice { base, bytes, gsi } = device;
        write!(line, "{gap}virtio_mmio.device={bytes:#x}@{base:#x}:{gsi}").expect("a string takes all");
    }
    if line.len() > most {
        let with_devices = if named.is_empty() { "" } else { " with the words for its devices" };
        return Err(BootError::CmdlineLength { bytes: line.len(), with_devices, most });
    }
    Ok(line)
}
