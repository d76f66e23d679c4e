//! Runs of guest memory that a device reads or writes, copied or handed to the kernel as they are.
//!
//! The guest may change them at any moment: nothing here looks at a byte twice, and no Rust reference to them exists.
#![expect(unsafe_code, reason = "hands guest memory to readv, writev, preadv and pwritev")]

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use page::PAGE_SIZE;
use vm_memory::bitmap::{AtomicBitmap, BS, Bitmap as _};
use vm_memory::{GuestAddress, GuestMemory as _, Permissions, VolatileSlice};

use super::Mapping;

/// The most runs in one call (`IOV_MAX` of Linux, limits.h).
const RUNS_A_CALL: usize = 1024;

type Slice<'m> = VolatileSlice<'m, BS<'m, AtomicBitmap>>;

/// An address range that is not RAM from end to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{bytes} bytes at guest-physical address {address:#x} are not all RAM")]
pub(crate) struct NotRam {
    /// Its first address.
    pub(crate) address: u64,
    /// Its length.
    pub(crate) bytes: u32,
}

/// A list of runs of guest memory, in the order in which a device fills or drains them.
#[derive(Debug, Default)]
pub(crate) struct Buffers<'m> {
    slices: Vec<Slice<'m>>,
    bytes: usize,
}

impl<'m> Buffers<'m> {
    /// Adds a run.
    /// # Errors
    /// [`NotRam`]: nothing is added then.
    pub(crate) fn push(&mut self, memory: &'m Mapping, address: u64, bytes: u32) -> Result<(), NotRam> {
        let refused = || NotRam { address, bytes };
        let length = usize::try_from(bytes).map_err(|_| refused())?;
        let slices = memory
            .get_slices(GuestAddress(address), length, Permissions::ReadWrite)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .map_err(|_| refused())?;
        self.slices.extend(slices);
        self.bytes += length;
        Ok(())
    }

    /// Their length together, bytes.
    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Whether each run begins at a multiple of `address` and has a multiple of `length`, bytes.
    pub(crate) fn is_aligned(&self, address: usize, length: usize) -> bool {
        let run = |slice: &Slice<'_>| {
            slice.ptr_guard().as_ptr().addr().is_multiple_of(address) && slice.len().is_multiple_of(length)
        };
        self.slices.iter().all(run)
    }

    /// The first `at` bytes, and the rest; `None` if there are fewer.
    pub(crate) fn split_at(mut self, at: usize) -> Option<(Self, Self)> {
        if at > self.bytes {
            return None;
        }
        let mut left = at;
        let mut rest = Self { slices: Vec::new(), bytes: self.bytes - at };
        let mut first = Self { slices: Vec::with_capacity(self.slices.len()), bytes: at };
        for slice in self.slices.drain(..) {
            let here = left.min(slice.len());
            left -= here;
            let (front, back) = slice.split_at(here).ok()?;
            if !front.is_empty() {
                first.slices.push(front);
            }
            if !back.is_empty() {
                rest.slices.push(back);
            }
        }
        Some((first, rest))
    }

    /// Copies from their beginning as much as there is and as `into` takes; returns how much.
    pub(crate) fn copy_to(&self, into: &mut [u8]) -> usize {
        self.slices.iter().fold(0, |done, slice| done + slice.copy_to(&mut into[done..]))
    }

    /// Copies to their beginning as much as there is room for and as `from` has; returns how much. What was written counts as dirty.
    pub(crate) fn copy_from(&self, from: &[u8]) -> usize {
        self.slices.iter().fold(0, |done, slice| {
            let count = slice.len().min(from.len() - done);
            slice.copy_from(&from[done..done + count]);
            done + count
        })
    }

    /// Fills them from a file, beginning at `offset`.
    /// # Errors
    /// The system call's, or [`io::ErrorKind::UnexpectedEof`]; some may have been filled.
    pub(crate) fn fill_at(&self, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        // SAFETY: `each_run` passes runs of guest memory that stay mapped during the call and may be written.
        self.each_run(offset, io::ErrorKind::UnexpectedEof, |runs, count, at| unsafe {
            libc::preadv64(file.as_raw_fd(), runs, count, at)
        })?;
        self.note_written(self.bytes);
        Ok(())
    }

    /// Writes them to a file, beginning at `offset`.
    /// # Errors
    /// The system call's, or [`io::ErrorKind::WriteZero`]; some may have been written.
    pub(crate) fn drain_at(&self, file: BorrowedFd<'_>, offset: u64) -> io::Result<()> {
        // SAFETY: `each_run` passes runs of guest memory that stay mapped during the call; the kernel only reads them.
        self.each_run(offset, io::ErrorKind::WriteZero, |runs, count, at| unsafe {
            libc::pwritev64(file.as_raw_fd(), runs, count, at)
        })
    }

    /// One write of them, as for a packet; returns how much was taken.
    /// # Errors
    /// The system call's; [`io::ErrorKind::WouldBlock`] if there is no room.
    pub(crate) fn drain(&self, file: BorrowedFd<'_>) -> io::Result<usize> {
        let runs = self.runs(0);
        // SAFETY: the runs are guest memory that stays mapped as long as `self` borrows it; the kernel only reads them.
        call(|| unsafe { libc::writev(file.as_raw_fd(), runs.as_ptr(), count(&runs)) })
    }

    /// Gives the pages that lie within one run each back to the host: they read as zeros afterwards, and count as dirty.
    /// # Errors
    /// The system call's; some may have been given back.
    pub(crate) fn discard(&self) -> io::Result<()> {
        for slice in &self.slices {
            let base = slice.ptr_guard_mut().as_ptr();
            let skip = base.addr().next_multiple_of(PAGE_SIZE) - base.addr();
            let bytes = slice.len().saturating_sub(skip) / PAGE_SIZE * PAGE_SIZE;
            if bytes == 0 {
                continue;
            }
            // SAFETY: the range lies within a run of guest memory, which stays mapped as long as `self` borrows it; guest memory may
            // change at any moment, and no Rust reference to it exists.
            let done = unsafe { libc::madvise(base.wrapping_add(skip).cast(), bytes, libc::MADV_REMOVE) };
            if done != 0 {
                return Err(io::Error::last_os_error());
            }
            slice.bitmap().mark_dirty(skip, bytes);
        }
        Ok(())
    }

    /// Calls until everything is done: a call may do less than it was asked for.
    fn each_run(
        &self,
        offset: u64,
        nothing: io::ErrorKind,
        transfer: impl Fn(*const libc::iovec, libc::c_int, libc::off64_t) -> libc::ssize_t,
    ) -> io::Result<()> {
        let mut done = 0;
        while done < self.bytes {
            let runs = self.runs(done);
            let at = offset
                .checked_add(done as u64)
                .and_then(|at| i64::try_from(at).ok())
                .ok_or(io::ErrorKind::InvalidInput)?;
            match call(|| transfer(runs.as_ptr(), count(&runs), at))? {
                0 => return Err(nothing.into()),
                more => done += more,
            }
        }
        Ok(())
    }

    /// The runs from byte `skip` on, at most as many as one call takes.
    fn runs(&self, mut skip: usize) -> Vec<libc::iovec> {
        let mut runs = Vec::with_capacity(self.slices.len().min(RUNS_A_CALL));
        for slice in &self.slices {
            let past = skip.min(slice.len());
            skip -= past;
            if past < slice.len() && runs.len() < RUNS_A_CALL {
                let base = slice.ptr_guard_mut().as_ptr().wrapping_add(past);
                runs.push(libc::iovec { iov_base: base.cast(), iov_len: slice.len() - past });
            }
        }
        runs
    }

    /// After the write, so that whoever takes the set of dirty pages before it sees the page again.
    fn note_written(&self, bytes: usize) {
        let mut left = bytes;
        for slice in &self.slices {
            let here = left.min(slice.len());
            slice.bitmap().mark_dirty(0, here);
            left -= here;
        }
    }
}

fn count(runs: &[libc::iovec]) -> libc::c_int {
    libc::c_int::try_from(runs.len()).expect("at most as many as one call takes")
}

fn call(transfer: impl Fn() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        match usize::try_from(transfer()) {
            Ok(count) => return Ok(count),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;
    use std::os::unix::fs::FileExt as _;

    use page::PageSet;

    use super::*;
    use crate::memory::{Memory, layout};

    #[test]
    fn they_are_filled_and_drained_across_the_hole_and_noted_as_dirty() {
        let memory = Memory::new(&layout((3 << 30) + (2 << 20)).unwrap()).unwrap();
        let file = tempfile::tempfile().unwrap();
        let text: Vec<u8> = (0..20_000u32).map(|i| i.to_le_bytes()[0] ^ 0x5a).collect();
        file.write_at(&text, 100).unwrap();
        let mut buffers = Buffers::default();
        buffers.push(memory.mapping(), 0x1ff0, 32).unwrap();
        buffers.push(memory.mapping(), 4 << 30, 10_000).unwrap();
        buffers.fill_at(file.as_fd(), 100).unwrap();
        let mut set = PageSet::empty(memory.bound());
        memory.take_monitor_writes(&mut set);
        let high = (4u64 << 30) / 4096;
        assert_eq!(set.iter().map(|gfn| gfn.0).collect::<Vec<_>>(), [1, 2, high, high + 1, high + 2]);
        let (head, tail) = buffers.split_at(40).unwrap();
        let mut bytes = [0; 64];
        assert_eq!((head.copy_to(&mut bytes), &bytes[..40]), (40, &text[..40]));
        tail.drain_at(file.as_fd(), 50_000).unwrap();
        let mut back = vec![0; 10_032 - 40];
        file.read_exact_at(&mut back, 50_000).unwrap();
        assert_eq!(back, text[40..10_032]);
        assert_eq!(tail.copy_from(&[7; 20_000]), 9_992);
        assert!(tail.split_at(9_993).is_none());
    }

    #[test]
    fn what_is_not_ram_is_refused() {
        let memory = Memory::new(&layout(2 << 20).unwrap()).unwrap();
        let mut buffers = Buffers::default();
        for (address, bytes) in [(2 << 20, 1), ((2 << 20) - 1, 2), (u64::MAX, 2), (0, u32::MAX)] {
            assert_eq!(buffers.push(memory.mapping(), address, bytes), Err(NotRam { address, bytes }));
        }
        assert_eq!(buffers.bytes(), 0);
        let file = tempfile::tempfile().unwrap();
        buffers.push(memory.mapping(), 0, 10).unwrap();
        assert_eq!(buffers.fill_at(file.as_fd(), 5).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert!(buffers.fill_at(file.as_fd(), u64::MAX).is_err());
    }
}
