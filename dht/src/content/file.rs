//! A file of this host, in blocks of a page; the last one is padded with zeros.

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    sync::Mutex,
};

use page::PAGE_SIZE;

use super::memory::ReadPages;
use crate::{error::ContentError, limits::CONTENT_PAGES};

/// What tells that a file is still the one that was read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct FileId {
    device: u64,
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
}

impl FileId {
    fn of(metadata: &std::fs::Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        }
    }
}

/// A file that this peer serves.
#[derive(Debug)]
pub(crate) struct ServedFile {
    file: File,
    path: PathBuf,
    seen: Mutex<FileId>,
    pages: u32,
}

impl ServedFile {
    pub(crate) fn open(path: &Path) -> Result<Self, ContentError> {
        let name = path.display().to_string();
        let unreadable = |source| ContentError::Unreadable { name: name.clone(), source };
        // A fifo would block the open: look before.
        if !std::fs::metadata(path).map_err(unreadable)?.is_file() {
            return Err(ContentError::NotAFile { name });
        }
        let file = File::open(path).map_err(unreadable)?;
        let metadata = file.metadata().map_err(unreadable)?;
        if !metadata.is_file() {
            return Err(ContentError::NotAFile { name });
        }
        let pages = metadata.len().div_ceil(PAGE_SIZE as u64);
        let bound = CONTENT_PAGES;
        match u32::try_from(pages) {
            Ok(pages) if pages <= bound => {
                Ok(Self { file, path: path.to_owned(), seen: Mutex::new(FileId::of(&metadata)), pages })
            }
            Ok(_) | Err(_) => Err(ContentError::TooLarge { name, pages, bound: bound.into() }),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn pages(&self) -> u32 {
        self.pages
    }

    /// Whether the file was changed in place since it was last seen; takes note of what it is now.
    pub(crate) fn changed(&self) -> io::Result<bool> {
        let now = FileId::of(&self.file.metadata()?);
        let mut seen = self.seen.lock().expect("nothing panics while it holds this lock");
        Ok(std::mem::replace(&mut *seen, now) != now)
    }

    fn still_as_seen(&self) -> io::Result<bool> {
        let now = FileId::of(&self.file.metadata()?);
        Ok(*self.seen.lock().expect("nothing panics while it holds this lock") == now)
    }

    /// Reads pages from page `first` on; see [`ReadPages`]. A file that shrank reads as zeros behind its end.
    pub(crate) fn read(&self, first: u32, into: &mut [u8]) -> io::Result<ReadPages> {
        let left = usize::try_from(self.pages.saturating_sub(first)).expect("32 bits fit the address space");
        let length = into.len().min(left.saturating_mul(PAGE_SIZE));
        self.fill(first, &mut into[..length])?;
        Ok(ReadPages::Data(length))
    }

    /// Reads one page; `false` if the file has changed or has no such page.
    pub(crate) fn read_page(&self, page: u32, into: &mut page::Page) -> io::Result<bool> {
        if page >= self.pages || !self.still_as_seen()? {
            return Ok(false);
        }
        self.fill(page, into)?;
        Ok(true)
    }

    fn fill(&self, first: u32, into: &mut [u8]) -> io::Result<()> {
        let start = u64::from(first) * PAGE_SIZE as u64;
        let mut filled = 0;
        while filled < into.len() {
            match self.file.read_at(&mut into[filled..], start + filled as u64) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        into[filled..].fill(0);
        Ok(())
    }
}
