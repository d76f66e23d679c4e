//! Test guests. Those that need no operating system are made by the workspace's build; one call writes them out.
//!
//! [`PAGESTORM`] is an ELF program that boots by the PVH protocol and does nothing but write memory at a given
//! pace, beat a heartbeat, and prove at any time that all it wrote is still there. What it does is in [`pagestorm`],
//! how it boots in the folder `pagestorm/` of this package. The README has its command line.
//!
//! A small Linux with workloads that check themselves is made by a recipe of its own; [`linux`] finds it.

use std::fs;
use std::io;
use std::path::Path;

pub mod image;
pub mod linux;
pub mod pagestorm;

/// The guest's sources proper are compiled by build.rs for a bare machine; here they stand for rustfmt alone.
#[cfg(guest_sources)]
#[path = "../pagestorm/main.rs"]
mod guest;

/// pagestorm: an ELF64 image with a PVH note (`XEN_ELFNOTE_PHYS32_ENTRY`).
pub const PAGESTORM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pagestorm"));

/// Writes [`PAGESTORM`] to `path`, replacing what is there.
/// # Errors
/// As of [`std::fs::write`].
pub fn write_pagestorm(path: &Path) -> io::Result<()> {
    fs::write(path, PAGESTORM)
}
