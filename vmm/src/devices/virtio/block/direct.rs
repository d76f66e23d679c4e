//! Direct I/O (`O_DIRECT`): what a file wants of offsets, lengths and addresses, and how a request that is not so is carried out all the same.
//!
//! A disk's guest is told the file's unit as its block size, and Linux keeps to it; but its memory need only be aligned to 512 bytes, and a
//! driver may leave the block size aside (virtio 1.2, 5.2.5). Such requests go through a buffer of the monitor. Requests of one disk are
//! carried out one after the other, so a block that is read, changed and written back is nobody else's meanwhile.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;

use rustix::fs::{AtFlags, StatxFlags};

use super::SECTOR_BYTES;
use crate::memory::buffers::Buffers;

/// The largest unit that a guest's disk can have: a page of memory.
const BLOCK_MAX_BYTES: u32 = 4096;

/// What a file wants.
#[derive(Clone, Copy, Debug)]
pub(super) struct Direct {
    /// Offsets and lengths are multiples of this: a power of two, at least a sector.
    pub(super) block_bytes: u32,
    /// Addresses are multiples of this.
    memory_bytes: usize,
}

impl Direct {
    /// As the file system says, or, where it does not, as a read shows.
    /// # Errors
    /// The system call's, or that there is no direct I/O on this file.
    pub(super) fn of(file: &File) -> io::Result<Self> {
        let stat = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)?;
        if stat.stx_mask & StatxFlags::DIOALIGN.bits() == 0 {
            return Self::probe(file);
        }
        match (stat.stx_dio_offset_align, usize::try_from(stat.stx_dio_mem_align)) {
            (0, _) => Err(none()),
            (block, Ok(memory_bytes)) if block <= BLOCK_MAX_BYTES => {
                Ok(Self { block_bytes: block.max(SECTOR_BYTES), memory_bytes: memory_bytes.max(1) })
            }
            (block, _) => Err(io::Error::other(format!(
                "its file system does direct I/O in units of {block} bytes, and a guest's disk has at most {BLOCK_MAX_BYTES}: leave direct=on out"
            ))),
        }
    }

    /// The smallest unit that can be read into memory of the same alignment.
    fn probe(file: &File) -> io::Result<Self> {
        for block_bytes in [SECTOR_BYTES, BLOCK_MAX_BYTES] {
            let bytes = usize::try_from(block_bytes).expect("a page");
            let this = Self { block_bytes, memory_bytes: BLOCK_MAX_BYTES as usize };
            match file.read_at(this.bounce(bytes).bytes(), 0) {
                Ok(_) => return Ok(this),
                Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
                Err(error) => return Err(error),
            }
        }
        Err(none())
    }

    /// Fills `into` from the file, beginning at `offset`; the file has all blocks that this touches.
    pub(super) fn read(self, file: &File, offset: u64, into: &Buffers<'_>) -> io::Result<()> {
        let around = self.around(offset, into.bytes());
        if around.is_exact() && into.is_aligned(self.memory_bytes, self.block()) {
            return into.fill_at(file.as_fd(), offset);
        }
        let mut bounce = self.bounce(around.bytes);
        file.read_exact_at(bounce.bytes(), around.offset)?;
        into.copy_from(&bounce.bytes()[around.skip..][..into.bytes()]);
        Ok(())
    }

    /// Writes `from` to the file, beginning at `offset`; the file has all blocks that this touches.
    pub(super) fn write(self, file: &File, offset: u64, from: &Buffers<'_>) -> io::Result<()> {
        if self.around(offset, from.bytes()).is_exact() && from.is_aligned(self.memory_bytes, self.block()) {
            return from.drain_at(file.as_fd(), offset);
        }
        self.write_with(file, offset, from.bytes(), |into| {
            from.copy_to(into);
        })
    }

    /// Writes zeros.
    pub(super) fn write_zeros(self, file: &File, offset: u64, bytes: usize) -> io::Result<()> {
        self.write_with(file, offset, bytes, |into| into.fill(0))
    }

    fn write_with(
        self,
        file: &File,
        offset: u64,
        bytes: usize,
        fill: impl FnOnce(&mut [u8]),
    ) -> io::Result<()> {
        let around = self.around(offset, bytes);
        let mut bounce = self.bounce(around.bytes);
        if !around.is_exact() {
            file.read_exact_at(bounce.bytes(), around.offset)?;
        }
        fill(&mut bounce.bytes()[around.skip..][..bytes]);
        file.write_all_at(bounce.bytes(), around.offset)
    }

    fn block(self) -> usize {
        usize::try_from(self.block_bytes).expect("at most a page")
    }

    fn around(self, offset: u64, bytes: usize) -> Around {
        let skip = usize::try_from(offset % u64::from(self.block_bytes)).expect("less than a block");
        let whole = (skip + bytes).next_multiple_of(self.block());
        Around { offset: offset - skip as u64, bytes: whole, skip, wanted: bytes }
    }

    fn bounce(self, bytes: usize) -> Bounce {
        let memory = vec![0; bytes + self.memory_bytes];
        let start = memory.as_ptr().align_offset(self.memory_bytes);
        Bounce { memory, start, bytes }
    }
}

/// The whole blocks around a request.
struct Around {
    offset: u64,
    bytes: usize,
    /// What of them comes before the request, and how much is of it.
    skip: usize,
    wanted: usize,
}

impl Around {
    fn is_exact(&self) -> bool {
        self.bytes == self.wanted
    }
}

/// Memory that is aligned as the file wants it.
struct Bounce {
    memory: Vec<u8>,
    start: usize,
    bytes: usize,
}

impl Bounce {
    fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..][..self.bytes]
    }
}

/// What a file without direct I/O is told as.
pub(super) fn none() -> io::Error {
    io::Error::other("its file system has no direct I/O: leave direct=on out")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Memory, layout};

    /// A file of two blocks, both with a pattern, opened for I/O that no file system refuses: the arithmetic alone is looked at.
    fn file() -> (File, Vec<u8>) {
        let file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..8192u32).map(|at| (at / 7).to_le_bytes()[0]).collect();
        file.write_all_at(&content, 0).unwrap();
        (file, content)
    }

    #[test]
    fn what_is_not_aligned_is_read_and_written_all_the_same_and_nothing_beside_it_changes() {
        let memory = Memory::new(&layout(2 << 20).unwrap()).unwrap();
        let direct = Direct { block_bytes: 4096, memory_bytes: 4096 };
        for (address, offset, bytes) in
            [(0x1_0000, 0, 8192u32), (0x1_0200, 4096, 4096), (0x1_0001, 512, 4096), (0x1_0200, 7680, 512)]
        {
            let (file, mut content) = file();
            let mut buffers = Buffers::default();
            buffers.push(memory.mapping(), address, bytes).unwrap();
            let range = usize::try_from(offset).unwrap()..usize::try_from(offset + u64::from(bytes)).unwrap();
            direct.read(&file, offset, &buffers).unwrap();
            let mut seen = vec![0; range.len()];
            buffers.copy_to(&mut seen);
            assert_eq!(seen, content[range.clone()], "{address:#x} {offset}");
            seen.iter_mut().for_each(|byte| *byte ^= 0x55);
            buffers.copy_from(&seen);
            direct.write(&file, offset, &buffers).unwrap();
            content[range].copy_from_slice(&seen);
            let mut now = vec![0; content.len()];
            file.read_exact_at(&mut now, 0).unwrap();
            assert_eq!(now, content, "{address:#x} {offset}");
        }
        let (file, mut content) = file();
        direct.write_zeros(&file, 512, 1024).unwrap();
        content[512..1536].fill(0);
        let mut now = vec![0; content.len()];
        file.read_exact_at(&mut now, 0).unwrap();
        assert_eq!(now, content);
    }

    #[test]
    fn a_bounce_buffer_is_aligned() {
        for memory_bytes in [1, 4, 512, 4096] {
            let direct = Direct { block_bytes: 512, memory_bytes };
            let mut bounce = direct.bounce(1024);
            assert!(bounce.bytes().as_ptr().addr().is_multiple_of(memory_bytes));
            assert_eq!(bounce.bytes().len(), 1024);
        }
    }
}
