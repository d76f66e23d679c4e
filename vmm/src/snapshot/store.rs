//! The content store of a snapshot directory, as its one writer sees it.
//!
//! ```text
//! <id>.names = "TERNPACK" | version u32 | pages u32 | name (32 bytes)* | SHA-256 of all before it
//! ```
//! A pack is complete when its `.pages` stands under its final name. It is written in `tmp/`, and renamed after its `.names`, so that names
//! without pages are all that a crash can leave behind in `packs/`, and mean nothing. Packs are never changed and never removed.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use page::{PAGE_SIZE, Page, PageHash, ShortId};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use super::{SnapshotError, is_name};
use crate::limits::{PACK_BUFFER_PAGES, PACK_PAGES_MAX, SNAPSHOT_PACKS_MAX};

const MAGIC: [u8; 8] = *b"TERNPACK";
const VERSION: u32 = 1;

/// Where snapshots stand in a directory.
pub(super) fn snapshots(dir: &Path) -> PathBuf {
    dir.join("snapshots")
}

/// A pack's pages.
pub(super) fn pages_file(dir: &Path, id: u64) -> PathBuf {
    dir.join("packs").join(format!("{id:016x}.pages"))
}

fn names_file(dir: &Path, id: u64) -> PathBuf {
    dir.join("packs").join(format!("{id:016x}.names"))
}

/// Where a page lies: a pack, as an index into [`Store::packs`], and a page of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Spot {
    pub(super) pack: u32,
    pub(super) page: u32,
}

/// A pack, complete or being written.
#[derive(Clone, Copy, Debug)]
pub(super) struct Pack {
    pub(super) id: u64,
    pub(super) pages: u32,
}

/// A pack that this process writes.
#[derive(Debug)]
struct Growing {
    pack: u32,
    file: File,
    names: Vec<PageHash>,
    /// The last pages, which are not in the file yet.
    buffer: Vec<u8>,
}

/// The store, held by this process alone until it is dropped.
#[derive(Debug)]
pub(super) struct Store {
    dir: PathBuf,
    packs: Vec<Pack>,
    /// How many of the packs were there before.
    old: usize,
    found: HashMap<ShortId, Spot>,
    /// The old pack that was read last: neighbours in memory are mostly neighbours in a pack, and there may be more packs than descriptors.
    reading: Option<(u32, File)>,
    growing: Vec<Growing>,
    written_bytes: u64,
    /// Keeps others out until it is closed.
    _lock: File,
}

impl Store {
    /// Opens the store in `dir`, which is made if it is not there, and takes it for this process. What a crash left is removed.
    pub(super) fn open(dir: &Path) -> Result<Self, SnapshotError> {
        for part in [dir.to_owned(), dir.join("packs"), snapshots(dir), dir.join("tmp")] {
            make_directory(&part)?;
        }
        let path = dir.join("lock");
        let lock = private(&path, OpenOptions::new().create(true).truncate(false))?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(SnapshotError::Locked(dir.to_owned())),
            Err(error) => return Err(SnapshotError::io("lock", &path)(error.into())),
        }
        let mut store = Self {
            dir: dir.to_owned(),
            packs: Vec::new(),
            old: 0,
            found: HashMap::new(),
            reading: None,
            growing: Vec::new(),
            written_bytes: 0,
            _lock: lock,
        };
        store.clean()?;
        store.read_packs()?;
        Ok(store)
    }

    /// Where something is put together before it gets its final name.
    pub(super) fn tmp(&self, name: &str) -> PathBuf {
        self.dir.join("tmp").join(name)
    }

    /// Every pack that a [`Spot`] can lie in.
    pub(super) fn packs(&self) -> &[Pack] {
        &self.packs
    }

    /// Whether a pack was there before this process came.
    pub(super) fn is_old(&self, pack: u32) -> bool {
        (pack as usize) < self.old
    }

    /// Bytes written so far.
    pub(super) fn written_bytes(&self) -> u64 {
        self.written_bytes
    }

    /// The name for a new snapshot: the one asked for, or else the lowest number above all that are there.
    pub(super) fn free_name(&self, asked: Option<&str>) -> Result<String, SnapshotError> {
        let there = list(&self.dir)?;
        let Some(name) = asked else {
            let highest = there.iter().filter_map(|name| name.parse::<u64>().ok()).max().unwrap_or(0);
            return Ok(highest.saturating_add(1).to_string());
        };
        if !is_name(name) {
            return Err(SnapshotError::Name(name.to_owned()));
        }
        if there.iter().any(|taken| taken == name) {
            return Err(SnapshotError::NameTaken { dir: self.dir.clone(), name: name.to_owned() });
        }
        Ok(name.to_owned())
    }

    /// Where a page lies: in a pack that has it, byte for byte, or at the end of a new one.
    pub(super) fn place(&mut self, name: &PageHash, page: &Page) -> Result<Spot, SnapshotError> {
        if let Some(spot) = self.found.get(&name.short()).copied()
            && self.holds(spot, page)
        {
            return Ok(spot);
        }
        let spot = self.append(name, page)?;
        self.found.insert(name.short(), spot);
        Ok(spot)
    }

    /// Whether the page at `spot` is `page`. A pack that cannot be read, or was damaged, does not have it.
    fn holds(&mut self, spot: Spot, page: &Page) -> bool {
        let mut there = [0; PAGE_SIZE];
        let (pack, at) = (self.packs[spot.pack as usize].id, spot.page);
        match self.read(spot, &mut there) {
            Ok(()) if there == *page => true,
            Ok(()) => {
                tracing::warn!(pack, page = at, "a pack's page is not what its name says: written again");
                false
            }
            Err(error) => {
                tracing::warn!(pack, page = at, %error, "a pack's page cannot be read: written again");
                false
            }
        }
    }

    fn read(&mut self, spot: Spot, into: &mut Page) -> std::io::Result<()> {
        let at = spot.page as usize;
        if let Some(growing) = self.growing.iter().find(|growing| growing.pack == spot.pack) {
            let flushed = growing.names.len() - growing.buffer.len() / PAGE_SIZE;
            return match at.checked_sub(flushed) {
                Some(at) => {
                    into.copy_from_slice(&growing.buffer[at * PAGE_SIZE..][..PAGE_SIZE]);
                    Ok(())
                }
                None => growing.file.read_exact_at(into, (at * PAGE_SIZE) as u64),
            };
        }
        if self.reading.as_ref().is_none_or(|(pack, _)| *pack != spot.pack) {
            let path = pages_file(&self.dir, self.packs[spot.pack as usize].id);
            self.reading = Some((spot.pack, File::open(path)?));
        }
        let (_, file) = self.reading.as_ref().expect("it was just opened");
        file.read_exact_at(into, (at * PAGE_SIZE) as u64)
    }

    fn append(&mut self, name: &PageHash, page: &Page) -> Result<Spot, SnapshotError> {
        if self.growing.last().is_none_or(|growing| growing.names.len() >= PACK_PAGES_MAX as usize) {
            self.begin_pack()?;
        }
        let growing = self.growing.last_mut().expect("a pack was begun");
        let spot = Spot { pack: growing.pack, page: self.packs[growing.pack as usize].pages };
        growing.buffer.extend_from_slice(page);
        growing.names.push(*name);
        self.packs[spot.pack as usize].pages += 1;
        if growing.buffer.len() >= PACK_BUFFER_PAGES * PAGE_SIZE {
            self.flush()?;
        }
        Ok(spot)
    }

    fn begin_pack(&mut self) -> Result<(), SnapshotError> {
        self.flush()?;
        let mut id = [0; 8];
        getrandom::fill(&mut id).map_err(SnapshotError::Random)?;
        let id = u64::from_le_bytes(id);
        let path = self.tmp(&format!("{id:016x}.pages"));
        let file = private(&path, OpenOptions::new().create_new(true))?;
        let pack = u32::try_from(self.packs.len()).expect("bounded when they were read");
        self.packs.push(Pack { id, pages: 0 });
        self.growing.push(Growing { pack, file, names: Vec::new(), buffer: Vec::new() });
        Ok(())
    }

    fn flush(&mut self) -> Result<(), SnapshotError> {
        let Some(growing) = self.growing.last_mut().filter(|growing| !growing.buffer.is_empty()) else {
            return Ok(());
        };
        let pack = &self.packs[growing.pack as usize];
        let end = growing.names.len() * PAGE_SIZE;
        let at = (end - growing.buffer.len()) as u64;
        let path = self.dir.join("tmp").join(format!("{:016x}.pages", pack.id));
        growing.file.write_all_at(&growing.buffer, at).map_err(SnapshotError::io("write", &path))?;
        self.written_bytes += growing.buffer.len() as u64;
        growing.buffer.clear();
        Ok(())
    }

    /// Makes the new packs durable and gives them their names.
    pub(super) fn commit_packs(&mut self) -> Result<(), SnapshotError> {
        self.flush()?;
        for growing in std::mem::take(&mut self.growing) {
            let pack = self.packs[growing.pack as usize];
            let tmp = self.tmp(&format!("{:016x}.pages", pack.id));
            growing.file.sync_all().map_err(SnapshotError::io("sync", &tmp))?;
            let names = encode_names(&growing.names);
            let names_tmp = self.tmp(&format!("{:016x}.names", pack.id));
            let (names_path, pages_path) = (names_file(&self.dir, pack.id), pages_file(&self.dir, pack.id));
            self.write(&names_tmp, &names)?;
            rename(&names_tmp, &names_path)?;
            rename(&tmp, &pages_path)?;
        }
        sync_directory(&self.dir.join("packs"))
    }

    /// Writes a whole file and makes it durable.
    pub(super) fn write(&mut self, path: &Path, bytes: &[u8]) -> Result<(), SnapshotError> {
        let mut file = private(path, OpenOptions::new().create_new(true))?;
        file.write_all(bytes).and_then(|()| file.sync_all()).map_err(SnapshotError::io("write", path))?;
        self.written_bytes += bytes.len() as u64;
        Ok(())
    }

    fn clean(&self) -> Result<(), SnapshotError> {
        let tmp = self.dir.join("tmp");
        for path in entries(&tmp)? {
            tracing::info!(path = %path.display(), "removing what an unfinished snapshot left");
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(SnapshotError::io("remove", &path))?;
        }
        for path in entries(&self.dir.join("packs"))? {
            if path.extension().is_some_and(|e| e == "names") && !path.with_extension("pages").exists() {
                fs::remove_file(&path).map_err(SnapshotError::io("remove", &path))?;
            }
        }
        Ok(())
    }

    /// Learns what is in the packs. One whose names are damaged is left out: its pages can still be restored from, and are not found.
    fn read_packs(&mut self) -> Result<(), SnapshotError> {
        for path in entries(&self.dir.join("packs"))? {
            let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
            let Ok(id) = u64::from_str_radix(stem, 16) else { continue };
            if path.extension().is_none_or(|e| e != "pages") || self.packs.len() >= SNAPSHOT_PACKS_MAX / 2 {
                continue;
            }
            let bytes = fs::metadata(&path).map_err(SnapshotError::io("look at", &path))?.len();
            let names_path = names_file(&self.dir, id);
            let names = fs::read(&names_path).ok().and_then(|names| decode_names(&names));
            let Some(names) = names.filter(|names| bytes == names.len() as u64 * PAGE_SIZE as u64) else {
                tracing::warn!(names = %names_path.display(), "a pack's names are damaged or missing: its pages are not reused");
                continue;
            };
            let pack = u32::try_from(self.packs.len()).expect("bounded above");
            for (name, page) in names.iter().zip(0..) {
                self.found.entry(name.short()).or_insert(Spot { pack, page });
            }
            let pages = u32::try_from(names.len()).expect("bounded when they were read");
            self.packs.push(Pack { id, pages });
        }
        self.old = self.packs.len();
        Ok(())
    }
}

impl Drop for Store {
    /// What is still in `tmp/` belongs to nothing: a snapshot that failed. The next one would remove it as well.
    fn drop(&mut self) {
        if let Err(error) = self.clean() {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "what a snapshot left could not be removed"
            );
        }
    }
}

/// The names of the snapshots in `dir`, sorted.
pub(super) fn list(dir: &Path) -> Result<Vec<String>, SnapshotError> {
    let path = snapshots(dir);
    let names = entries(&path)?.into_iter().filter_map(|path| Some(path.file_name()?.to_str()?.to_owned()));
    let mut names: Vec<String> = names.filter(|name| is_name(name)).collect();
    names.sort();
    Ok(names)
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>, SnapshotError> {
    let read = || fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>();
    read().map_err(SnapshotError::io("list", dir))
}

/// Guest memory is nobody else's: 0700.
pub(super) fn make_directory(path: &Path) -> Result<(), SnapshotError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(SnapshotError::io("make the directory", path))
}

/// A file that its owner alone may read, open for reading and writing.
fn private(path: &Path, how: &mut OpenOptions) -> Result<File, SnapshotError> {
    how.read(true).write(true).mode(0o600).open(path).map_err(SnapshotError::io("open", path))
}

pub(super) fn rename(from: &Path, to: &Path) -> Result<(), SnapshotError> {
    fs::rename(from, to).map_err(SnapshotError::io("give its name to", to))
}

/// Makes renames within a directory durable.
pub(super) fn sync_directory(path: &Path) -> Result<(), SnapshotError> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(SnapshotError::io("sync", path))
}

fn encode_names(names: &[PageHash]) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend(u32::try_from(names.len()).expect("a pack is bounded").to_le_bytes());
    names.iter().for_each(|name| out.extend(name.0));
    let digest = Sha256::digest(&out);
    out.extend(digest);
    out
}

/// None if they are damaged.
fn decode_names(bytes: &[u8]) -> Option<Vec<PageHash>> {
    let (body, digest) = bytes.split_last_chunk::<32>()?;
    let rest = body.strip_prefix(&MAGIC)?.strip_prefix(&VERSION.to_le_bytes())?;
    let (pages, names) = rest.split_first_chunk::<4>()?;
    let (names, left) = names.as_chunks::<32>();
    let whole = u32::from_le_bytes(*pages) as usize == names.len() && left.is_empty();
    let fits = whole && names.len() <= PACK_PAGES_MAX as usize && Sha256::digest(body).as_slice() == digest;
    fits.then(|| names.iter().map(|name| PageHash(*name)).collect())
}

#[cfg(test)]
mod tests {
    use page::Domain;

    use super::*;

    fn page(n: u8) -> Page {
        [n; PAGE_SIZE]
    }

    fn place(store: &mut Store, n: u8) -> Spot {
        store.place(&Domain::unkeyed().name(&page(n)), &page(n)).unwrap()
    }

    /// A directory with one pack of the pages 1 to 3.
    fn one_pack() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::open(dir.path()).unwrap();
        for n in 1..=3 {
            place(&mut store, n);
        }
        store.commit_packs().unwrap();
        dir
    }

    fn pack_files(dir: &Path, extension: &str) -> Vec<PathBuf> {
        let mut files = entries(&dir.join("packs")).unwrap();
        files.retain(|path| path.extension().is_some_and(|e| e == extension));
        files
    }

    #[test]
    fn a_page_is_written_once() {
        let dir = one_pack();
        assert_eq!(fs::read(&pack_files(dir.path(), "pages")[0]).unwrap().len(), 3 * PAGE_SIZE);
        let mut store = Store::open(dir.path()).unwrap();
        let old = place(&mut store, 2);
        assert!(store.is_old(old.pack));
        let new = place(&mut store, 9);
        assert_eq!((store.is_old(new.pack), place(&mut store, 9)), (false, new));
        store.flush().unwrap();
        assert_eq!(place(&mut store, 9), new, "also when it is in the file");
        assert_eq!(store.packs()[new.pack as usize].pages, 1);
    }

    #[test]
    fn what_was_not_committed_is_gone() {
        let dir = one_pack();
        let mut store = Store::open(dir.path()).unwrap();
        place(&mut store, 9);
        store.flush().unwrap();
        assert!(!entries(&dir.path().join("tmp")).unwrap().is_empty());
        // As a process does that is killed: without dropping what it holds, but for its descriptors.
        let store = std::mem::ManuallyDrop::new(store);
        flock(&store._lock, FlockOperation::Unlock).unwrap();
        fs::write(dir.path().join("packs/00000000000000aa.names"), "").unwrap();
        let mut store = Store::open(dir.path()).unwrap();
        assert!(entries(&dir.path().join("tmp")).unwrap().is_empty());
        assert_eq!(pack_files(dir.path(), "names").len(), 1, "names without pages mean nothing");
        let again = place(&mut store, 9);
        assert!(!store.is_old(again.pack));
    }

    #[test]
    fn one_process_writes() {
        let dir = one_pack();
        let store = Store::open(dir.path()).unwrap();
        assert!(matches!(Store::open(dir.path()), Err(SnapshotError::Locked(_))));
        drop(store);
        Store::open(dir.path()).unwrap();
    }

    #[test]
    fn damaged_packs_are_not_trusted_and_not_removed() {
        let dir = one_pack();
        let (pages, names) = (pack_files(dir.path(), "pages"), pack_files(dir.path(), "names"));
        let whole = fs::read(&pages[0]).unwrap();
        let mut damaged = whole.clone();
        damaged[PAGE_SIZE + 7] ^= 1;
        fs::write(&pages[0], &damaged).unwrap();
        let mut store = Store::open(dir.path()).unwrap();
        let (good, bad) = (place(&mut store, 1), place(&mut store, 2));
        assert!(store.is_old(good.pack));
        assert!(!store.is_old(bad.pack), "written again");
        drop(store);
        for bad in [&whole[..PAGE_SIZE], &[]] {
            fs::write(&pages[0], bad).unwrap();
            assert!(!Store::open(dir.path()).unwrap().is_old(0));
        }
        fs::write(&pages[0], whole).unwrap();
        let good = fs::read(&names[0]).unwrap();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert_eq!(decode_names(&bad), None, "{at}");
            assert_eq!(decode_names(&good[..at]), None, "{at}");
        }
        fs::remove_file(&names[0]).unwrap();
        drop(Store::open(dir.path()).unwrap());
        assert!(pages[0].exists(), "a snapshot may need it");
    }

    #[test]
    fn names_are_given_and_taken() {
        let dir = one_pack();
        let store = Store::open(dir.path()).unwrap();
        assert_eq!(store.free_name(None).unwrap(), "1");
        for taken in ["1", "41", "blue"] {
            make_directory(&snapshots(dir.path()).join(taken)).unwrap();
        }
        assert_eq!(store.free_name(None).unwrap(), "42");
        assert_eq!(store.free_name(Some("red")).unwrap(), "red");
        assert!(matches!(store.free_name(Some("blue")), Err(SnapshotError::NameTaken { .. })));
        for wrong in ["", "..", "a/b", "."] {
            assert!(matches!(store.free_name(Some(wrong)), Err(SnapshotError::Name(_))), "{wrong}");
        }
    }
}
