//! The memory of a VM on this host, read through a descriptor that the VM's process passed.

use std::{
    fs::File,
    io,
    os::{fd::OwnedFd, unix::fs::FileExt},
};

use page::PAGE_SIZE;

use crate::{error::ContentError, limits::CONTENT_PAGES, local::protocol::MemoryExtent};

/// A registered memory. Its pages are numbered through its extents in order. Read with pread, never mapped: a VM that
/// shrinks its memory gives short reads here and no SIGBUS.
#[derive(Debug)]
pub(crate) struct Memory {
    file: File,
    extents: Vec<MemoryExtent>,
    pages: u32,
}

impl Memory {
    pub(crate) fn new(name: &str, fd: OwnedFd, extents: Vec<MemoryExtent>) -> Result<Self, ContentError> {
        let file = File::from(fd);
        let unreadable = |source| ContentError::Unreadable { name: name.to_owned(), source };
        let metadata = file.metadata().map_err(unreadable)?;
        if !metadata.is_file() {
            return Err(ContentError::NotAFile { name: name.to_owned() });
        }
        let bytes = metadata.len();
        let mut pages = 0u64;
        for extent in &extents {
            let MemoryExtent { file_offset, pages: count, .. } = *extent;
            let end = count.checked_mul(PAGE_SIZE as u64).and_then(|length| file_offset.checked_add(length));
            if !file_offset.is_multiple_of(PAGE_SIZE as u64) || end.is_none_or(|end| end > bytes) {
                return Err(ContentError::Extent { name: name.to_owned(), file_offset, pages: count, bytes });
            }
            pages = pages.saturating_add(count);
        }
        let too_large =
            |_| ContentError::TooLarge { name: name.to_owned(), pages, bound: u64::from(CONTENT_PAGES) };
        let pages = u32::try_from(pages).map_err(too_large)?;
        if pages > CONTENT_PAGES {
            return Err(ContentError::TooLarge {
                name: name.to_owned(),
                pages: pages.into(),
                bound: u64::from(CONTENT_PAGES),
            });
        }
        Ok(Self { file, extents, pages })
    }

    pub(crate) fn pages(&self) -> u32 {
        self.pages
    }

    /// The extent of page `page`, and the page's number within it.
    fn locate(&self, page: u32) -> Option<(&MemoryExtent, u64)> {
        let mut within = u64::from(page);
        for extent in &self.extents {
            if within < extent.pages {
                return Some((extent, within));
            }
            within -= extent.pages;
        }
        None
    }

    /// The guest frame of page `page`.
    pub(crate) fn gfn(&self, page: u32) -> Option<u64> {
        self.locate(page).map(|(extent, within)| extent.first_gfn.saturating_add(within))
    }

    /// Reads whole pages from page `first` on, as many as `into` holds and the extent has; returns the bytes read. Holes are
    /// told by `None`: the number of pages from `first` on that were never written, at most as many as `into` holds.
    pub(crate) fn read(&self, first: u32, into: &mut [u8]) -> io::Result<ReadPages> {
        let Some((extent, within)) = self.locate(first) else { return Ok(ReadPages::Data(0)) };
        let left =
            usize::try_from((extent.pages - within).saturating_mul(PAGE_SIZE as u64)).unwrap_or(usize::MAX);
        let length = into.len().min(left);
        let offset = extent.file_offset + within * PAGE_SIZE as u64;
        let hole = self.hole_from(offset, length as u64)?;
        if hole > 0 {
            return Ok(ReadPages::Zero(hole));
        }
        self.file.read_exact_at(&mut into[..length], offset)?;
        Ok(ReadPages::Data(length))
    }

    /// Pages from `offset` on, at most `length` bytes of them, that are a hole of the file.
    fn hole_from(&self, offset: u64, length: u64) -> io::Result<u32> {
        let data = match rustix::fs::seek(&self.file, rustix::fs::SeekFrom::Data(offset)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => u64::MAX,
            Err(error) => return Err(error.into()),
        };
        let pages = data.saturating_sub(offset).min(length) / PAGE_SIZE as u64;
        Ok(u32::try_from(pages).expect("a read is at most a few MiB"))
    }

    /// Reads whole pages from page `first` on, across extents; `false` if there are not so many.
    pub(crate) fn read_run(&self, first: u32, mut into: &mut [u8]) -> io::Result<bool> {
        let mut page = first;
        while !into.is_empty() {
            let Some((extent, within)) = self.locate(page) else { return Ok(false) };
            let left = usize::try_from((extent.pages - within).saturating_mul(PAGE_SIZE as u64));
            let (bytes, rest) = into.split_at_mut(into.len().min(left.unwrap_or(usize::MAX)));
            self.file.read_exact_at(bytes, extent.file_offset + within * PAGE_SIZE as u64)?;
            page += u32::try_from(bytes.len() / PAGE_SIZE).expect("a run is at most a few MiB");
            into = rest;
        }
        Ok(true)
    }
}

/// What a read found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum ReadPages {
    /// This many bytes, whole pages; none at the end.
    Data(usize),
    /// This many pages of zeros, not read.
    Zero(u32),
}
