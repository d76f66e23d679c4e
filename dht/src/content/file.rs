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

/// What became of a file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum FileNow {
    /// It is as it was.
    Same,
    /// It was written in place.
    Rewritten,
    /// Another file stands at its path, or it has another number of pages.
    Replaced,
    /// No file stands at its path any more. Whoever holds it open keeps its room on the disk.
    Gone,
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

    /// What became of the file since it was last seen; takes note of what it is now.
    pub(crate) fn look(&self) -> io::Result<FileNow> {
        let at_path = match std::fs::metadata(&self.path) {
            Ok(metadata) if metadata.is_file() => FileId::of(&metadata),
            Ok(_) => return Ok(FileNow::Gone),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(FileNow::Gone),
            Err(error) => return Err(error),
        };
        let now = FileId::of(&self.file.metadata()?);
        if (at_path.device, at_path.inode) != (now.device, now.inode)
            || now.bytes.div_ceil(PAGE_SIZE as u64) != u64::from(self.pages)
        {
            return Ok(FileNow::Replaced);
        }
        let mut seen = self.seen.lock().expect("nothing panics while it holds this lock");
        let same = std::mem::replace(&mut *seen, now) == now;
        Ok(if same { FileNow::Same } else { FileNow::Rewritten })
    }

    /// Reads pages from page `first` on; see [`ReadPages`]. A file that shrank reads as zeros behind its end.
    pub(crate) fn read(&self, first: u32, into: &mut [u8]) -> io::Result<ReadPages> {
        let left = usize::try_from(self.pages.saturating_sub(first)).expect("32 bits fit the address space");
        let length = into.len().min(left.saturating_mul(PAGE_SIZE));
        self.fill(first, &mut into[..length])?;
        Ok(ReadPages::Data(length))
    }

    /// Reads whole pages from page `first` on; `false` if there are not so many. Whether they have changed, whoever reads must see.
    pub(crate) fn read_run(&self, first: u32, into: &mut [u8]) -> io::Result<bool> {
        let left = usize::try_from(self.pages.saturating_sub(first)).expect("32 bits fit the address space");
        if into.len() > left.saturating_mul(PAGE_SIZE) {
            return Ok(false);
        }
        self.fill(first, into)?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_seen_rewritten_replaced_grown_cut_and_gone() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("image"), dir.path().join("other"));
        let write = |path: &Path, pages: usize| std::fs::write(path, vec![7; pages * PAGE_SIZE - 5]).unwrap();
        let open = || ServedFile::open(&path).unwrap();
        write(&path, 3);
        let file = open();
        assert_eq!(file.look().unwrap(), FileNow::Same);
        let writable = File::options().write(true).open(&path).unwrap();
        writable.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
        assert_eq!(file.look().unwrap(), FileNow::Rewritten);
        assert_eq!(file.look().unwrap(), FileNow::Same);
        // Within its last page it has as many pages as before.
        writable.set_len(3 * PAGE_SIZE as u64).unwrap();
        assert_eq!(file.look().unwrap(), FileNow::Rewritten);
        for bytes in [3 * PAGE_SIZE as u64 + 1, 2 * PAGE_SIZE as u64, 0] {
            writable.set_len(bytes).unwrap();
            assert_eq!(file.look().unwrap(), FileNow::Replaced);
        }
        write(&path, 3);
        let file = open();
        write(&other, 3);
        std::fs::rename(&other, &path).unwrap();
        assert_eq!(file.look().unwrap(), FileNow::Replaced);
        let file = open();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(file.look().unwrap(), FileNow::Gone);
        std::fs::create_dir(&path).unwrap();
        assert_eq!(file.look().unwrap(), FileNow::Gone);
    }
}
