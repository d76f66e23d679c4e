//! The directory of retained checkpoints: what was left by VMs that left.
//!
//! One checkpoint is written at a time, into a file that is moved into place when it is complete; only then the longest unused ones give way. So a
//! full disk loses nothing, and the directory holds at most its budget and the one file that is being written.

use std::{
    collections::HashMap,
    fs::{DirBuilder, File, OpenOptions},
    io,
    os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use page::{PAGE_SIZE, ShortId, is_zero, page_chunks};
use rustix::fs::{FallocateFlags, FlockOperation, fallocate, flock};
use thiserror::Error;

use super::{
    Content, Contents, Source,
    memory::ReadPages,
    retained::RetainedFile,
    workers::{Urgency, Workers},
};
use crate::{
    checkpoint::{Header, evict, front},
    config::Retention,
    error::{ContentError, NodeError},
    index::{ContentId, Look},
    limits::{CHECKPOINTS, SCAN_CHUNK_PAGES, TABLE_CHUNK_IDS},
};

const COMPLETE: &str = "checkpoint";
const INCOMPLETE: &str = "new";

/// A checkpoint that is served, and the ids of its pages, which are not in the index yet.
pub(crate) type Unindexed = (Arc<Content>, Vec<ShortId>);

/// Why nothing was retained. What was retained before is as it was.
#[derive(Debug, Error)]
pub(crate) enum RetainError {
    #[error("this peer retains nothing: it was started without --retain")]
    Off,
    #[error("the checkpoint would have {bytes} bytes or more, and the budget (--retain-budget) is {budget}")]
    Budget { bytes: u64, budget: u64 },
    #[error("cannot write {}: {source}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot read the memory of {name}: {source}")]
    Read { name: String, source: io::Error },
    #[error(transparent)]
    Content(#[from] ContentError),
}

/// The directory, of which this process has the lock.
#[derive(Debug)]
pub(crate) struct Store {
    dir: PathBuf,
    budget: u64,
    /// Held open for its lock.
    _lock: File,
    /// Whoever writes a checkpoint holds this.
    writing: tokio::sync::Mutex<()>,
}

/// Makes the directory if it is absent, but not those above it: on a volume that is not mounted the checkpoints would fill the disk below.
fn make(dir: &Path) -> Result<(), NodeError> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
        Err(error) => Err(match dir.parent() {
            Some(parent) if error.kind() == io::ErrorKind::NotFound => {
                NodeError::RetainNowhere { path: dir.to_owned(), parent: parent.to_owned() }
            }
            Some(_) | None => NodeError::Retain { path: dir.to_owned(), source: error },
        }),
    }
}

/// A file that goes unless it is finished.
struct Unfinished<'a> {
    path: &'a Path,
    finished: bool,
}

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if !self.finished
            && let Err(error) = std::fs::remove_file(self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "an unfinished checkpoint could not be removed");
        }
    }
}

impl Store {
    /// Takes the directory, made if absent (in one that is there), and clears away what a killed peer did not finish.
    pub(crate) fn open(retention: &Retention) -> Result<Self, NodeError> {
        let dir = retention.dir.clone();
        let failed = |source| NodeError::Retain { path: dir.clone(), source };
        make(&dir)?;
        let lock = File::open(&dir).map_err(failed)?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(NodeError::RetainInUse { path: dir }),
            Err(error) => return Err(failed(error.into())),
        }
        let store = Self {
            budget: retention.budget_bytes,
            _lock: lock,
            writing: tokio::sync::Mutex::new(()),
            dir: dir.clone(),
        };
        for path in store.files(INCOMPLETE).map_err(failed)? {
            std::fs::remove_file(&path).map_err(failed)?;
        }
        Ok(store)
    }

    fn files(&self, extension: &str) -> io::Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&self.dir)? {
            let path = entry?.path();
            if path.extension().is_some_and(|other| other == extension) {
                files.push(path);
            }
        }
        Ok(files)
    }

    /// Takes the checkpoints of earlier runs, as many as the budget has room for. What is damaged or of another domain stays where it is, with a warning.
    pub(crate) fn load(&self, contents: &Contents) -> Result<Vec<Unindexed>, NodeError> {
        let failed = |source| NodeError::Retain { path: self.dir.clone(), source };
        let mut taken = Vec::new();
        for path in self.files(COMPLETE).map_err(failed)? {
            match RetainedFile::open(&path, contents.domain.id()) {
                Ok((file, ids)) => match contents.add_checkpoint(file) {
                    Ok(content) => taken.push((content, ids)),
                    Err(error) => {
                        tracing::warn!(path = %path.display(), %error, "a checkpoint is not served")
                    }
                },
                Err(error) => {
                    tracing::warn!(path = %path.display(), error = &error as &dyn std::error::Error, "a file among the checkpoints is not taken");
                }
            }
        }
        // The budget may be smaller than it was.
        for id in self.leaving(contents, 0).unwrap_or_default() {
            self.give_way(contents, id);
            taken.retain(|(content, _)| content.id != id);
        }
        Ok(taken)
    }

    fn leaving(&self, contents: &Contents, coming: u64) -> Option<Vec<ContentId>> {
        evict(contents.checkpoints(), coming, self.budget, CHECKPOINTS)
    }

    fn give_way(&self, contents: &Contents, id: ContentId) {
        let Some(content) = contents.get(id) else { return };
        contents.remove(id);
        let Source::Checkpoint(file) = &content.source else { return };
        tracing::info!(
            name = content.name,
            bytes = file.file_bytes(),
            "a retained checkpoint gives way: it was unused for longest"
        );
        if let Err(error) = std::fs::remove_file(file.path()) {
            tracing::warn!(path = %file.path().display(), %error, "a checkpoint's file could not be removed");
        }
    }

    /// Copies of a memory the distinct pages that no lasting content of this host has; `None` if there are none. The copy is served when this returns,
    /// but for its index: see [`index`]. Dropping the future leaves nothing behind.
    pub(crate) async fn retain(
        &self,
        contents: &Arc<Contents>,
        workers: &Workers,
        memory: &Arc<Content>,
    ) -> Result<Option<Unindexed>, RetainError> {
        let _turn = self.writing.lock().await;
        let (ids, pages) = self.choose(contents, workers, memory).await?;
        if ids.is_empty() {
            return Ok(None);
        }
        let count = u32::try_from(ids.len()).expect("they are pages of one content");
        let header = Header { domain: contents.domain.id(), pages: count, name: memory.name.clone() };
        let nanos = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_nanos();
        let path = self.dir.join(format!("{nanos:024x}.{INCOMPLETE}"));
        let failed = |source| RetainError::Write { path: self.dir.clone(), source };
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).map_err(failed)?;
        let mut unfinished = Unfinished { path: &path, finished: false };
        // All the room at once: a disk that is too full says so before anything is copied.
        match fallocate(&file, FallocateFlags::empty(), 0, header.file_bytes()) {
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
            Err(error) => return Err(failed(error.into())),
        }
        file.write_all_at(&front(&header, &ids), 0).map_err(failed)?;
        self.copy(workers, memory, &pages, Arc::new(file), header.pages_at()).await?;

        let complete = path.with_extension(COMPLETE);
        std::fs::rename(&path, &complete).map_err(failed)?;
        unfinished.finished = true;
        let opened = RetainedFile::open(&complete, contents.domain.id());
        let (file, ids) = opened.map_err(|error| failed(io::Error::other(error)))?;
        let leaving = self.leaving(contents, file.file_bytes()).unwrap_or_default();
        leaving.into_iter().for_each(|id| self.give_way(contents, id));
        Ok(Some((contents.add_checkpoint(file)?, ids)))
    }

    /// The ids of the pages to copy, ascending, and where in the memory each is.
    async fn choose(
        &self,
        contents: &Arc<Contents>,
        workers: &Workers,
        memory: &Arc<Content>,
    ) -> Result<(Vec<ShortId>, Vec<u32>), RetainError> {
        let mut chosen: HashMap<ShortId, u32> = HashMap::new();
        for first in (0..memory.source.pages()).step_by(SCAN_CHUNK_PAGES as usize) {
            let (contents, memory) = (Arc::clone(contents), Arc::clone(memory));
            let name = memory.name.clone();
            let names = workers.run(Urgency::First, move || not_lasting(&contents, &memory, first)).await;
            let names = names.map_err(|source| RetainError::Read { name, source })?;
            for (id, page) in names {
                chosen.entry(id).or_insert(page);
            }
            let bytes = chosen.len() as u64 * PAGE_SIZE as u64;
            if bytes > self.budget {
                return Err(RetainError::Budget { bytes, budget: self.budget });
            }
        }
        let header = Header {
            domain: contents.domain.id(),
            pages: u32::try_from(chosen.len()).expect("they are pages of one content"),
            name: String::new(),
        };
        if header.file_bytes() > self.budget {
            return Err(RetainError::Budget { bytes: header.file_bytes(), budget: self.budget });
        }
        let mut chosen: Vec<(ShortId, u32)> = chosen.into_iter().collect();
        chosen.sort_unstable();
        Ok(chosen.into_iter().unzip())
    }

    async fn copy(
        &self,
        workers: &Workers,
        memory: &Arc<Content>,
        pages: &[u32],
        file: Arc<File>,
        mut at: u64,
    ) -> Result<(), RetainError> {
        for chunk in pages.chunks(SCAN_CHUNK_PAGES as usize) {
            let (memory, file, chunk) = (Arc::clone(memory), Arc::clone(&file), chunk.to_vec());
            let (name, bytes) = (memory.name.clone(), chunk.len() as u64 * PAGE_SIZE as u64);
            let work = move || {
                let mut buffer = vec![0; chunk.len() * PAGE_SIZE];
                for (page, into) in chunk.iter().zip(buffer.as_chunks_mut::<PAGE_SIZE>().0) {
                    memory.source.read_run(*page, into).map_err(CopyError::Read)?;
                }
                file.write_all_at(&buffer, at).map_err(CopyError::Write)
            };
            workers.run(Urgency::First, work).await.map_err(|error| match error {
                CopyError::Read(source) => RetainError::Read { name, source },
                CopyError::Write(source) => RetainError::Write { path: self.dir.clone(), source },
            })?;
            at += bytes;
        }
        Ok(())
    }
}

enum CopyError {
    Read(io::Error),
    Write(io::Error),
}

/// The ids of a chunk's pages that are not zero and that no lasting content has, with their places.
fn not_lasting(contents: &Contents, memory: &Content, first: u32) -> io::Result<Vec<(ShortId, u32)>> {
    let count = SCAN_CHUNK_PAGES.min(memory.source.pages() - first);
    let mut bytes = vec![0; count as usize * PAGE_SIZE];
    let (mut names, mut at) = (Vec::new(), first);
    while at < first + count {
        let left = (first + count - at) as usize;
        match memory.source.read(at, &mut bytes[..left * PAGE_SIZE])? {
            ReadPages::Zero(pages) => at += pages.min(first + count - at),
            ReadPages::Data(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            ReadPages::Data(length) => {
                for (page, number) in page_chunks(&bytes[..length]).zip(at..) {
                    if !is_zero(page) {
                        names.push((contents.domain.name(page).short(), number));
                    }
                }
                at += u32::try_from(length / PAGE_SIZE).expect("a chunk is small");
            }
        }
    }
    let index = contents.index();
    names.retain(|(id, _)| !index.lasts(*id));
    Ok(names)
}

/// Puts a checkpoint's ids, as its table has them, into the host's index; `noted` takes those to announce.
pub(crate) async fn index(
    contents: &Arc<Contents>,
    workers: &Workers,
    content: &Arc<Content>,
    ids: Vec<ShortId>,
    noted: impl Fn(&[ShortId]),
) {
    let ids = Arc::new(ids);
    for first in (0..content.source.pages()).step_by(TABLE_CHUNK_IDS as usize) {
        let (contents, ids, id) = (Arc::clone(contents), Arc::clone(&ids), content.id);
        let work = move || {
            let from = first as usize;
            let to = ids.len().min(from + TABLE_CHUNK_IDS as usize);
            let names: Vec<_> = ids[from..to].iter().copied().map(Some).collect();
            let mut added = Vec::new();
            contents.index_mut().update(id, first, &names, Look::First, &mut added);
            added
        };
        noted(&workers.run(Urgency::First, work).await);
    }
    content.scanned.store(true, std::sync::atomic::Ordering::Release);
}
