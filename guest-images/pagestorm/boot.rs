//! What the monitor says: Xen's `hvm_start_info` (xen/include/public/arch-x86/hvm/start_info.h), version 1.

use core::fmt;
use core::ops::Range;

use super::pagestorm::limits;

/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336e_c578;
/// `XEN_HVM_MEMMAP_TYPE_RAM`.
const RAM: u32 = 1;

/// The structure as it lies in memory.
#[repr(C)]
#[derive(Clone, Copy)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    modules_gpa: u64,
    cmdline_gpa: u64,
    rsdp_gpa: u64,
    memory_map_gpa: u64,
    memory_map_entries: u32,
    reserved: u32,
}

/// `hvm_memmap_table_entry`.
#[repr(C)]
#[derive(Clone, Copy)]
struct MemoryMapEntry {
    gpa: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

/// What is taken from it, copied: the working set may cover the originals.
pub struct BootInfo {
    cmdline: [u8; limits::CMDLINE_BYTES_MAX],
    cmdline_len: usize,
    ram: [Range<u64>; limits::MEMORY_MAP_ENTRIES_MAX],
}

/// What is wrong with it.
pub enum BootError {
    /// Not a start info at all.
    Magic(u32),
    /// Version 0 has no memory map.
    Version(u32),
    /// It lies where the page tables do not reach.
    Address(u64),
    /// No memory map, or too long a one.
    MemoryMap(u32),
    /// The command line does not end.
    CmdlineTooLong,
    /// The command line is not UTF-8.
    CmdlineNotText,
}

impl fmt::Display for BootError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Magic(found) => write!(f, "PVH start info has magic {found:#x}: boot by the PVH protocol"),
            Self::Version(found) => {
                write!(
                    f,
                    "PVH start info has version {found}: version 1 or later is needed for the memory map"
                )
            }
            Self::Address(gpa) => {
                write!(f, "PVH boot data at {gpa:#x} cannot be reached: put it below 16 GiB")
            }
            Self::MemoryMap(entries) => {
                write!(
                    f,
                    "PVH memory map has {entries} entries: 1 to {} are needed",
                    limits::MEMORY_MAP_ENTRIES_MAX
                )
            }
            Self::CmdlineTooLong => {
                write!(f, "the command line is longer than {} bytes: shorten it", limits::CMDLINE_BYTES_MAX)
            }
            Self::CmdlineNotText => f.write_str("the command line is not UTF-8: use ASCII"),
        }
    }
}

/// Copies a `T` from guest memory.
fn read<T: Copy>(gpa: u64) -> Result<T, BootError> {
    if gpa == 0 || gpa > limits::MAPPED_BYTES - size_of::<T>() as u64 {
        return Err(BootError::Address(gpa));
    }
    // SAFETY: the address is not null and mapped (identity) for reading; every T here is plain integers, for which any
    // bytes are a value; nothing else runs in this machine, so nobody writes meanwhile.
    Ok(unsafe { core::ptr::read_unaligned(gpa as *const T) })
}

impl BootInfo {
    /// Reads it.
    pub fn read(start_info_gpa: u64) -> Result<Self, BootError> {
        let info: StartInfo = read(start_info_gpa)?;
        if info.magic != MAGIC {
            return Err(BootError::Magic(info.magic));
        }
        if info.version == 0 {
            return Err(BootError::Version(info.version));
        }
        let entries = info.memory_map_entries;
        if entries == 0 || entries as usize > limits::MEMORY_MAP_ENTRIES_MAX {
            return Err(BootError::MemoryMap(entries));
        }
        let mut boot = Self {
            cmdline: [0; limits::CMDLINE_BYTES_MAX],
            cmdline_len: 0,
            ram: [const { 0..0 }; limits::MEMORY_MAP_ENTRIES_MAX],
        };
        for number in 0..entries as usize {
            let gpa = info.memory_map_gpa + (number * size_of::<MemoryMapEntry>()) as u64;
            let entry: MemoryMapEntry = read(gpa)?;
            if entry.kind == RAM {
                boot.ram[number] = entry.gpa..entry.gpa.saturating_add(entry.size);
            }
        }
        if info.cmdline_gpa != 0 {
            boot.read_cmdline(info.cmdline_gpa)?;
        }
        Ok(boot)
    }

    fn read_cmdline(&mut self, gpa: u64) -> Result<(), BootError> {
        loop {
            let byte: u8 = read(gpa + self.cmdline_len as u64)?;
            if byte == 0 {
                return Ok(());
            }
            *self.cmdline.get_mut(self.cmdline_len).ok_or(BootError::CmdlineTooLong)? = byte;
            self.cmdline_len += 1;
        }
    }

    /// The command line.
    pub fn cmdline(&self) -> Result<&str, BootError> {
        core::str::from_utf8(&self.cmdline[..self.cmdline_len]).map_err(|_| BootError::CmdlineNotText)
    }

    /// The ranges of usable RAM.
    pub fn ram(&self) -> impl Iterator<Item = Range<u64>> + Clone {
        self.ram.iter().filter(|range| !range.is_empty()).cloned()
    }
}
