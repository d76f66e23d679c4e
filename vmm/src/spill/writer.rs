//! Writing a spill file: at the source, before Commit.

use std::fs::{self, File, OpenOptions};
use std::io::{Seek as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use migration_proto::{Epoch, Layout, MigrationId, VmId};
use page::{Domain, Gfn, PAGE_SIZE, Page, PageHash, is_zero};
use sha2::{Digest as _, Sha256};

use super::{Head, SpillError, format};
use crate::file_size;
use crate::memory::Memory;

/// Bytes that are collected before they are written.
const CHUNK_BYTES: usize = 1 << 20;

/// A spill file that is being written. Dropped, it removes the file.
#[derive(Debug)]
pub struct Writer {
    file: File,
    dir: PathBuf,
    part: PathBuf,
    whose: (MigrationId, VmId, Epoch, Layout),
    has_head: bool,
    digest: Sha256,
    records: u64,
    bytes: u64,
    chunk: Vec<u8>,
    over: bool,
}

impl Writer {
    /// Makes the file, so that a directory which takes none is found out at once.
    ///
    /// # Errors
    /// [`SpillError`].
    pub fn create(
        dir: &Path,
        migration: MigrationId,
        vm: VmId,
        epoch: Epoch,
        layout: Layout,
    ) -> Result<Self, SpillError> {
        if !dir.is_absolute() {
            return Err(SpillError::Relative(dir.to_owned()));
        }
        file_size::limit_is_an_error().map_err(SpillError::io("prepare for", dir))?;
        let part = dir.join(format!("{vm:?}-{migration:?}.spill.part"));
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&part)
            .map_err(SpillError::io("make the spill file", &part))?;
        Ok(Self {
            file,
            dir: dir.to_owned(),
            part,
            whose: (migration, vm, epoch, layout),
            has_head: false,
            digest: Sha256::new(),
            records: 0,
            bytes: 0,
            chunk: Vec::with_capacity(CHUNK_BYTES + 2 * PAGE_SIZE),
            over: false,
        })
    }

    /// Bytes written so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Drops what was written: the VM ran on after all, and other pages may be absent when it goes.
    ///
    /// # Errors
    /// [`SpillError`]: the file is of no further use.
    pub fn begin_anew(&mut self) -> Result<(), SpillError> {
        if self.bytes > 0 {
            self.file
                .set_len(0)
                .and_then(|()| self.file.rewind())
                .map_err(SpillError::io("empty the spill file", &self.part))?;
        }
        (self.has_head, self.digest, self.records, self.bytes) = (false, Sha256::new(), 0, 0);
        self.chunk.clear();
        Ok(())
    }

    /// Writes these pages as they are now, and returns when they are on stable storage.
    ///
    /// # Errors
    /// [`SpillError`]: the file is of no further use.
    pub fn write(&mut self, memory: &Memory, domain: &Domain, frames: &[Gfn]) -> Result<(), SpillError> {
        self.head(domain)?;
        let mut page: Page = [0; PAGE_SIZE];
        for gfn in frames {
            memory.read_page(*gfn, &mut page);
            let name = (!is_zero(&page)).then(|| domain.name(&page));
            format::record(&mut self.chunk, *gfn, name.as_ref().map(|name| (name, &page)));
            self.records += 1;
            if self.chunk.len() >= CHUNK_BYTES {
                self.put()?;
            }
        }
        self.put()?;
        self.file.sync_data().map_err(SpillError::io("put on stable storage", &self.part))
    }

    /// The domain is known when the destination has accepted the VM.
    fn head(&mut self, domain: &Domain) -> Result<(), SpillError> {
        if std::mem::replace(&mut self.has_head, true) {
            return Ok(());
        }
        let (migration, vm, epoch, layout) = self.whose.clone();
        let head = Head { migration, vm, epoch, domain: domain.id(), zero: domain.zero_name(), layout };
        self.chunk.extend(format::head(&head));
        self.put()
    }

    fn put(&mut self) -> Result<(), SpillError> {
        self.digest.update(&self.chunk);
        self.file.write_all(&self.chunk).map_err(SpillError::io("write the spill file", &self.part))?;
        self.bytes += self.chunk.len() as u64;
        self.chunk.clear();
        Ok(())
    }

    /// Makes it whole: from here on it stands under its name, on stable storage.
    ///
    /// # Errors
    /// [`SpillError`]: it is gone.
    pub fn seal(mut self, domain: &Domain, root: &PageHash) -> Result<Sealed, SpillError> {
        self.head(domain)?;
        self.chunk.extend(format::end(root, self.records));
        self.put()?;
        self.chunk.extend(self.digest.clone().finalize());
        self.put()?;
        self.file.sync_all().map_err(SpillError::io("put on stable storage", &self.part))?;
        let path = self.part.with_extension("");
        fs::rename(&self.part, &path).map_err(SpillError::io("rename", &self.part))?;
        self.over = true;
        let sealed = Sealed { path, bytes: self.bytes, kept: false };
        File::open(&self.dir)
            .and_then(|dir| dir.sync_all())
            .map_err(SpillError::io("put on stable storage", &self.dir))?;
        Ok(sealed)
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.over {
            remove(&self.part);
        }
    }
}

/// A whole spill file. Dropped before it was kept, it removes the file.
#[derive(Debug)]
pub struct Sealed {
    path: PathBuf,
    bytes: u64,
    kept: bool,
}

impl Sealed {
    /// The file stays, whatever becomes of this process: Commit may be sent.
    #[must_use]
    pub fn keep(mut self) -> Self {
        self.kept = true;
        self
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How large it is.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Nobody needs it any more.
    pub fn remove(mut self) {
        self.kept = false;
    }
}

impl Drop for Sealed {
    fn drop(&mut self) {
        if !self.kept {
            remove(&self.path);
        }
    }
}

fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path) {
        tracing::warn!(path = %path.display(), %error, "the spill file, which holds guest memory and is needed no more, cannot be removed");
    }
}

#[cfg(test)]
mod tests {
    use page::RegionId;

    use super::super::SpillFile;
    use super::*;
    use crate::memory::layout;

    #[test]
    fn a_file_that_was_begun_anew_holds_what_was_written_since_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let extents = layout(8 << 20).unwrap();
        let memory = Memory::new(&extents).unwrap();
        let domain = Domain::unkeyed();
        let ids = (MigrationId([1; 16]), VmId([2; 16]), Epoch(3));
        let all = migration_proto::Extent { first: RegionId(0), regions: 4 };
        let whose = Layout::new(vec![all]).unwrap();
        let mut writer = Writer::create(dir.path(), ids.0, ids.1, ids.2, whose).unwrap();
        let (before, after) = ([1; PAGE_SIZE], [2; PAGE_SIZE]);
        (0..300).for_each(|gfn| memory.write_page(Gfn(gfn), &before));
        writer.write(&memory, &domain, &(0..300).map(Gfn).collect::<Vec<_>>()).unwrap();
        memory.write_page(Gfn(7), &after);
        writer.begin_anew().unwrap();
        assert_eq!(writer.bytes(), 0);
        writer.write(&memory, &domain, &[Gfn(7), Gfn(8)]).unwrap();
        let sealed = writer.seal(&domain, &PageHash([9; 32])).unwrap();

        let file = SpillFile::open(sealed.path()).unwrap();
        let names: Vec<_> = file.names().into_iter().collect();
        assert_eq!(names, [(Gfn(7), domain.name(&after)), (Gfn(8), domain.name(&before))]);
        assert_eq!(*file.page(Gfn(7)).unwrap().1, after);
        assert_eq!(std::fs::metadata(sealed.path()).unwrap().len(), sealed.bytes());
    }
}
