//! What a guest finds where a PC's firmware begins.
//!
//! A kernel that has no better way to restart goes back to real mode and jumps to the firmware's first instruction. Linux does so when ACPI is
//! hardware-reduced and it was built with EFI, as distributions' kernels are: it asks EFI first, and then, before the keyboard controller
//! or ACPI's reset register, the BIOS (arch/x86/kernel/reboot.c). There is no firmware here, and a guest would run through zeros for
//! ever. So there is an instruction that resets the machine.

use crate::devices::reset;

/// The guest-physical address of that instruction, ffff:0000 in real mode.
pub(super) const ENTRY: u64 = 0xf_fff0;

const PORT: [u8; 2] = reset::PORT.to_le_bytes();
const _: () = assert!(PORT[1] == 0, "`out` has room for a port of one byte");

/// `mov al, PULSE_RESET; out PORT, al`, and for whom that does not end: `hlt` and back to it.
pub(super) const CODE: [u8; 7] = [0xb0, reset::PULSE_RESET, 0xe6, PORT[0], 0xf4, 0xeb, 0xfd];
