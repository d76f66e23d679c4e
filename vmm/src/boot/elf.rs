//! An ELF kernel: what it loads where, its entry, and its PVH note (System V ABI, chapters 4 and 5; Xen, elfnote.h).

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use vm_memory::{Bytes as _, GuestAddress};

use super::error::KernelError;
use super::kernel::Source;
use crate::limits::{ELF_NOTES_MAX_BYTES, ELF_SEGMENTS_MAX};
use crate::memory::Memory;

pub(crate) const MAGIC: &[u8] = b"\x7fELF";

const HEADER_BYTES: usize = 64;
const PROGRAM_HEADER_BYTES: usize = 56;
const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const NOTE_HEADER_BYTES: usize = 12;
/// XEN_ELFNOTE_PHYS32_ENTRY: the 32-bit entry of the PVH protocol.
const PVH_NOTE: u32 = 18;

/// Bytes of the file that go to guest memory, with zeros behind them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Where it stands in the file.
    pub(crate) offset: u64,
    /// How much of it does.
    pub(crate) file_bytes: u64,
    /// The guest-physical address.
    pub(crate) start: u64,
    /// Its length in guest memory.
    pub(crate) bytes: u64,
}

/// What an ELF file will load.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) segments: Vec<Segment>,
    /// The ELF header's entry: for a vmlinux, the physical address of Linux's 64-bit entry.
    pub(crate) entry: u64,
    /// The entry of the PVH note, if it has one.
    pub(crate) pvh_entry: Option<u64>,
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// Reads the program headers and the notes.
pub(crate) fn inspect<F: Read + Seek>(source: &mut Source<'_, F>) -> Result<Image, KernelError> {
    let bad = |what| Err(KernelError::BadElf { what });
    let mut header = [0; HEADER_BYTES];
    source.read("its ELF header", 0, &mut header)?;
    if header[4] != CLASS_64 || header[5] != LITTLE_ENDIAN || u16_at(&header, 18) != MACHINE_X86_64 {
        let bits = if header[4] == CLASS_64 { 64 } else { 32 };
        let what = format!("a {bits}-bit ELF file for machine {}", u16_at(&header, 18));
        return Err(KernelError::WrongMachine { what });
    }
    let count = u16_at(&header, 56);
    if usize::from(u16_at(&header, 54)) != PROGRAM_HEADER_BYTES || count == 0 || count > ELF_SEGMENTS_MAX {
        return bad("its program headers are missing or too many");
    }
    let mut image = Image { segments: Vec::new(), entry: u64_at(&header, 24), pvh_entry: None };
    let mut headers = vec![0; usize::from(count) * PROGRAM_HEADER_BYTES];
    source.read("its program headers", u64_at(&header, 32), &mut headers)?;
    for entry in headers.chunks_exact(PROGRAM_HEADER_BYTES) {
        let segment = Segment {
            offset: u64_at(entry, 8),
            file_bytes: u64_at(entry, 32),
            start: u64_at(entry, 24),
            bytes: u64_at(entry, 40),
        };
        match u32_at(entry, 0) {
            PT_LOAD if segment.bytes > 0 => {
                if segment.file_bytes > segment.bytes {
                    return bad("a segment is longer in the file than in memory");
                }
                source.must_hold("a segment", segment.offset, segment.file_bytes)?;
                image.segments.push(segment);
            }
            PT_NOTE if image.pvh_entry.is_none() => image.pvh_entry = pvh_entry(source, &segment)?,
            _ => {}
        }
    }
    if image.segments.is_empty() {
        return bad("it loads nothing");
    }
    Ok(image)
}

/// Looks for the PVH note among the notes of a segment: each is three words (length of the name, of the content, type), the name
/// and the content, each padded to four bytes.
fn pvh_entry<F: Read + Seek>(
    source: &mut Source<'_, F>,
    segment: &Segment,
) -> Result<Option<u64>, KernelError> {
    if segment.file_bytes > ELF_NOTES_MAX_BYTES {
        return Err(KernelError::BadElf { what: "its notes are too long" });
    }
    let mut notes = vec![0; usize::try_from(segment.file_bytes).expect("it is bounded")];
    source.read("its notes", segment.offset, &mut notes)?;
    let mut rest = &notes[..];
    while rest.len() >= NOTE_HEADER_BYTES {
        let padded = |bytes: u32| (bytes as usize).next_multiple_of(4);
        let (name, content) = (padded(u32_at(rest, 0)), padded(u32_at(rest, 4)));
        let Some(end) = NOTE_HEADER_BYTES.checked_add(name).and_then(|n| n.checked_add(content)) else {
            break;
        };
        let body = &rest[NOTE_HEADER_BYTES..];
        if u32_at(rest, 8) == PVH_NOTE && u32_at(rest, 0) == 4 && body.starts_with(b"Xen\0") {
            let address = body.get(4..8).filter(|_| content >= 4);
            return match address {
                Some(bytes) => Ok(Some(u64::from(u32_at(bytes, 0)))),
                None => Err(KernelError::BadElf { what: "its PVH note holds no address" }),
            };
        }
        // The padding of the last note may be missing.
        rest = rest.get(end..).unwrap_or_default();
    }
    Ok(None)
}

impl Image {
    /// Checks that `entry` is in something that it loads, and below 4 GiB.
    pub(crate) fn must_hold(&self, entry: u64) -> Result<(), KernelError> {
        let holds = |s: &Segment| entry.checked_sub(s.start).is_some_and(|offset| offset < s.bytes);
        if !self.segments.iter().any(holds) {
            return Err(KernelError::EntryOutside { entry });
        }
        // Both protocols enter a kernel below: PVH in 32-bit mode, Linux's on page tables that go no further.
        if entry >= 1 << 32 { Err(KernelError::EntryHigh { entry }) } else { Ok(()) }
    }

    /// Puts the segments, whose places are claimed, into memory, which holds zeros.
    pub(crate) fn load(&self, file: &mut File, memory: &Memory) -> Result<(), KernelError> {
        for segment in &self.segments {
            let bytes = usize::try_from(segment.file_bytes).expect("the segment is within RAM");
            file.seek(SeekFrom::Start(segment.offset)).map_err(KernelError::Read)?;
            memory
                .mapping()
                .read_exact_volatile_from(GuestAddress(segment.start), file, bytes)
                .map_err(|e| KernelError::Read(io::Error::other(e)))?;
        }
        Ok(())
    }
}
