//! The kernel's ELF file: what it loads where, and its PVH note. linux-loader does the loading; the program headers are
//! read here as well, because it does not say which addresses it writes.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::Path;

use linux_loader::loader::KernelLoader as _;
use linux_loader::loader::elf::{Elf, PvhBootCapability};

use super::BootError;
use super::layout::Area;
use crate::limits::ELF_SEGMENTS_MAX;
use crate::memory::Memory;

/// Sizes and the one program header type of interest: System V ABI, chapters 4 and 5.
const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const PT_LOAD: u32 = 1;

/// What an ELF file will load.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) segments: Vec<Area>,
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// Reads the program headers.
pub(crate) fn inspect(path: &Path, file: &mut File) -> Result<Image, BootError> {
    let bad = |what: &str| BootError::BadElf { path: path.to_owned(), what: what.to_owned() };
    let short = |e: io::Error| match e.kind() {
        io::ErrorKind::UnexpectedEof => bad("it is too short"),
        _ => BootError::File { what: "the kernel", path: path.to_owned(), source: e },
    };
    let mut header = [0; HEADER_BYTES];
    file.read_exact(&mut header).map_err(short)?;
    if !header.starts_with(b"\x7fELF") {
        return Err(bad("it does not begin as one"));
    }
    // Class 64-bit, data little-endian; machine x86-64.
    if header[4] != 2 || header[5] != 1 || u16_at(&header, 18) != 62 {
        return Err(bad("it is for another kind of machine"));
    }
    let count = u16_at(&header, 56);
    if usize::from(u16_at(&header, 54)) != PROGRAM_HEADER_BYTES || count == 0 || count > ELF_SEGMENTS_MAX {
        return Err(bad("its program headers are missing or too many"));
    }
    file.seek(SeekFrom::Start(u64_at(&header, 32))).map_err(short)?;
    let mut segments = Vec::new();
    for _ in 0..count {
        let mut entry = [0; PROGRAM_HEADER_BYTES];
        file.read_exact(&mut entry).map_err(short)?;
        let (in_file, in_memory) = (u64_at(&entry, 32), u64_at(&entry, 40));
        if entry[..4] == PT_LOAD.to_le_bytes() && in_memory > 0 {
            if in_file > in_memory {
                return Err(bad("a segment is longer in the file than in memory"));
            }
            segments.push(Area::new("a segment of the kernel", u64_at(&entry, 24), in_memory));
        }
    }
    if segments.is_empty() {
        return Err(bad("it loads nothing"));
    }
    Ok(Image { segments })
}

/// Puts the segments into memory; returns the PVH entry.
pub(crate) fn load(path: &Path, file: &mut File, memory: &Memory) -> Result<u64, BootError> {
    let result = Elf::load(memory.mapping(), None, file, None)
        .map_err(|e| BootError::BadElf { path: path.to_owned(), what: e.to_string() })?;
    match result.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) => Ok(entry.0),
        PvhBootCapability::PvhEntryNotPresent | PvhBootCapability::PvhEntryIgnored => {
            Err(BootError::NoPvhNote { path: path.to_owned() })
        }
    }
}
