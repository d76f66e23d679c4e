//! Guest RAM: one memfd, mapped shared, so that a site's peer can read it through a descriptor of its own.

use std::os::fd::OwnedFd;

use page::{Gfn, Page};

/// A run of RAM, contiguous in guest-physical addresses and in the memfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Extent {
    /// The first frame: a multiple of 512.
    pub first_gfn: u64,
    /// Its pages: a multiple of 512.
    pub pages: u64,
    /// Where it begins in the memfd, bytes.
    pub file_offset: u64,
}

/// A VM's RAM.
#[derive(Debug)]
pub struct Memory {}

impl Memory {
    /// The extents, ascending. Up to 3 GiB there is one, at frame 0; the rest stands from 4 GiB up.
    pub fn extents(&self) -> &[Extent] {
        todo!()
    }
    /// One more than the highest frame: the bound of page sets over this memory.
    pub fn bound(&self) -> u64 {
        todo!()
    }
    /// Copies a page out. The guest may be writing it: the copy is what verification is done on.
    /// # Panics
    /// If `gfn` is not RAM.
    pub fn read_page(&self, _gfn: Gfn, _into: &mut Page) {
        todo!()
    }
    /// Writes a page as the monitor: it counts as dirty.
    /// # Panics
    /// If `gfn` is not RAM.
    pub fn write_page(&self, _gfn: Gfn, _page: &Page) {
        todo!()
    }
    /// A new read-only descriptor of the memfd.
    /// # Errors
    /// If the kernel refuses to open it.
    pub fn read_only_fd(&self) -> std::io::Result<OwnedFd> {
        todo!()
    }
}
