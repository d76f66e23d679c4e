//! What this host can serve: memories of its VMs, files, and retained checkpoints.

pub(crate) mod check;
pub(crate) mod file;
pub(crate) mod memory;
pub(crate) mod retained;
mod revisit;
pub(crate) mod scan;
pub(crate) mod store;
pub(crate) mod workers;

use std::{
    collections::BTreeMap,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use page::{Domain, Page, ShortId};
use tokio_util::sync::CancellationToken;

use self::{
    check::{CheckKey, Checks},
    file::ServedFile,
    memory::{Memory, ReadPages},
    retained::RetainedFile,
};
use crate::{
    batch::PageBatch,
    checkpoint::Retained,
    error::ContentError,
    index::{ContentId, HostIndex, Leaving, Place},
    limits::{CONTENTS, LEAVING_STEP},
    local::protocol::MemoryExtent,
    status::ContentStatus,
};

/// Where a content's bytes come from.
#[derive(Debug)]
pub(crate) enum Source {
    Memory(Memory),
    File(ServedFile),
    Checkpoint(RetainedFile),
}

impl Source {
    pub(crate) fn pages(&self) -> u32 {
        match self {
            Self::Memory(memory) => memory.pages(),
            Self::File(file) => file.pages(),
            Self::Checkpoint(file) => file.pages(),
        }
    }

    fn read(&self, first: u32, into: &mut [u8]) -> io::Result<ReadPages> {
        match self {
            Self::Memory(memory) => memory.read(first, into),
            Self::File(file) => file.read(first, into),
            // What it has is in its table: it is never scanned.
            Self::Checkpoint(_) => Ok(ReadPages::Data(0)),
        }
    }

    /// Reads whole pages from page `first` on; `false` if there are not so many.
    fn read_run(&self, first: u32, into: &mut [u8]) -> io::Result<bool> {
        match self {
            Self::Memory(memory) => memory.read_run(first, into),
            Self::File(file) => file.read_run(first, into),
            Self::Checkpoint(file) => file.read_run(first, into),
        }
    }

    /// Whether its pages are expected to stay what they are.
    fn lasts(&self) -> bool {
        match self {
            Self::Memory(_) => false,
            Self::File(_) | Self::Checkpoint(_) => true,
        }
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Memory(_) => "memory",
            Self::File(_) => "file",
            Self::Checkpoint(_) => "checkpoint",
        }
    }
}

/// One memory or file.
#[derive(Debug)]
pub(crate) struct Content {
    pub(crate) id: ContentId,
    name: String,
    pub(crate) source: Source,
    /// What tells that its pages are as they were when hashed.
    pub(crate) checks: Checks,
    /// Whether it was read through once.
    pub(crate) scanned: AtomicBool,
    /// Ends its scans.
    pub(crate) removed: CancellationToken,
    /// A page read from a file was not what the index says: the file changed, scan it again.
    pub(crate) stale: tokio::sync::Notify,
}

/// All contents of the host, and the index over them.
#[derive(Debug)]
pub(crate) struct Contents {
    pub(crate) domain: Domain,
    pub(crate) check_key: CheckKey,
    index: RwLock<HostIndex>,
    contents: Mutex<BTreeMap<ContentId, Arc<Content>>>,
    /// Removed contents whose names are still in the index.
    leaving: Mutex<Vec<Leaving>>,
    next: AtomicU32,
    /// Pages that were asked for and are no longer here.
    pub(crate) stale_misses: AtomicU64,
}

impl Contents {
    pub(crate) fn new(domain: Domain, check_key: CheckKey) -> Self {
        Self {
            domain,
            check_key,
            index: RwLock::default(),
            contents: Mutex::default(),
            leaving: Mutex::default(),
            next: AtomicU32::new(0),
            stale_misses: AtomicU64::new(0),
        }
    }

    pub(crate) fn index(&self) -> RwLockReadGuard<'_, HostIndex> {
        self.index.read().expect("nothing panics while it holds this lock")
    }

    pub(crate) fn index_mut(&self) -> RwLockWriteGuard<'_, HostIndex> {
        self.index.write().expect("nothing panics while it holds this lock")
    }

    fn contents(&self) -> MutexGuard<'_, BTreeMap<ContentId, Arc<Content>>> {
        self.contents.lock().expect("nothing panics while it holds this lock")
    }

    /// Takes a VM's memory.
    pub(crate) fn add_memory(
        &self,
        name: String,
        fd: OwnedFd,
        extents: Vec<MemoryExtent>,
    ) -> Result<Arc<Content>, ContentError> {
        let memory = Memory::new(&name, fd, extents)?;
        self.add(name, Source::Memory(memory))
    }

    /// Takes a file; one that is served already under the same path gives way if it is another file by now.
    pub(crate) fn add_file(&self, path: &Path) -> Result<Arc<Content>, ContentError> {
        let file = ServedFile::open(path)?;
        let before = self.contents().values().find(|content| is_file_at(content, path)).map(|c| c.id);
        if let Some(before) = before {
            self.remove(before);
        }
        self.add(path.display().to_string(), Source::File(file))
    }

    /// Takes a retained checkpoint. Its index comes from its table: see [`store::index`].
    pub(crate) fn add_checkpoint(&self, file: RetainedFile) -> Result<Arc<Content>, ContentError> {
        self.add(file.name().to_owned(), Source::Checkpoint(file))
    }

    /// The retained checkpoints, as eviction sees them.
    pub(crate) fn checkpoints(&self) -> Vec<Retained<ContentId>> {
        let retained = |content: &Arc<Content>| match &content.source {
            Source::Checkpoint(file) => {
                let last_use = SystemTime::UNIX_EPOCH + Duration::from_secs(file.last_use());
                Some(Retained { id: content.id, bytes: file.file_bytes(), last_use })
            }
            Source::Memory(_) | Source::File(_) => None,
        };
        self.contents().values().filter_map(retained).collect()
    }

    /// The path of a file's content.
    pub(crate) fn file_path(&self, id: ContentId) -> Option<PathBuf> {
        match &self.get(id)?.source {
            Source::File(file) => Some(file.path().to_owned()),
            Source::Memory(_) | Source::Checkpoint(_) => None,
        }
    }

    pub(crate) fn get(&self, id: ContentId) -> Option<Arc<Content>> {
        self.contents().get(&id).cloned()
    }

    fn add(&self, name: String, source: Source) -> Result<Arc<Content>, ContentError> {
        let content = Content {
            id: ContentId(self.next.fetch_add(1, Ordering::Relaxed)),
            name,
            checks: Checks::new(source.pages()),
            source,
            scanned: AtomicBool::new(false),
            removed: CancellationToken::new(),
            stale: tokio::sync::Notify::new(),
        };
        let content = Arc::new(content);
        {
            let mut contents = self.contents();
            if contents.len() >= CONTENTS {
                return Err(ContentError::Full { bound: CONTENTS });
            }
            contents.insert(content.id, Arc::clone(&content));
        }
        self.index_mut().add_content(content.id, content.source.pages(), content.source.lasts());
        Ok(content)
    }

    /// Lets a content go: its scans end, and its descriptor closes, at once or with the chunk of it that is just being read. Its names leave the index
    /// with the next [`Contents::tidy`]; until then they are misses.
    pub(crate) fn remove(&self, id: ContentId) {
        let removed = self.contents().remove(&id);
        if let Some(content) = removed {
            content.removed.cancel();
            drop(content);
            let leaving = self.index_mut().leave(id);
            self.leaving().extend(leaving);
        }
    }

    fn leaving(&self) -> MutexGuard<'_, Vec<Leaving>> {
        self.leaving.lock().expect("nothing panics while it holds this lock")
    }

    /// Takes the names of removed contents out of the index, in steps that hold others up for a few milliseconds each. Blocks.
    pub(crate) fn tidy(&self) {
        let leaving = std::mem::take(&mut *self.leaving());
        for mut content in leaving {
            while !self.index_mut().step(&mut content, LEAVING_STEP) {}
        }
    }

    /// Reads, checks and returns those of `ids` that this host has; blocks on I/O.
    pub(crate) fn read_pages(&self, ids: &[ShortId]) -> PageBatch {
        let mut found = PageBatch::with_capacity(ids.len());
        self.read_pages_into(ids, &mut found);
        found
    }

    /// As [`Contents::read_pages`], into a batch that is there already.
    pub(crate) fn read_pages_into(&self, ids: &[ShortId], found: &mut PageBatch) {
        let mut placed: Vec<(ShortId, Place)> = {
            let index = self.index();
            ids.iter().filter_map(|id| Some((*id, index.place(*id)?))).collect()
        };
        placed.sort_unstable_by_key(|(_, place)| *place);
        let mut gone = Vec::new();
        let beside = |a: &(_, Place), b: &(_, Place)| {
            a.1.content == b.1.content && a.1.page.checked_add(1) == Some(b.1.page)
        };
        for run in placed.chunk_by(beside) {
            let content = self.contents().get(&run[0].1.content).cloned();
            let Some(content) = content else { continue };
            let before = found.len();
            self.read_run(&content, run, found, &mut gone);
            if let Source::Checkpoint(file) = &content.source
                && found.len() > before
            {
                file.used(SystemTime::now());
            }
        }
        if !gone.is_empty() {
            self.stale_misses.fetch_add(gone.len() as u64, Ordering::Relaxed);
            let mut index = self.index_mut();
            gone.iter().for_each(|(id, place)| index.forget(*id, *place));
        }
    }

    /// Reads pages that stand beside each other; those that are not what they were when they were hashed go to `gone`.
    fn read_run(
        &self,
        content: &Content,
        run: &[(ShortId, Place)],
        found: &mut PageBatch,
        gone: &mut Vec<(ShortId, Place)>,
    ) {
        let fill = |bytes: &mut [u8]| match content.source.read_run(run[0].1.page, bytes) {
            Ok(read) => read,
            Err(error) => {
                // The error costs a miss; who asked goes elsewhere.
                let pages = run.len();
                tracing::debug!(content = content.name, first = run[0].1.page, pages, %error, "pages cannot be read");
                false
            }
        };
        let mut places = run.iter();
        let before = gone.len();
        let keep = |id: ShortId, page: &Page| {
            let Some(&(_, place)) = places.next() else { return false };
            let checked = content.checks.same(place.page, &self.check_key, page, id);
            let same = checked.unwrap_or_else(|| {
                let same = self.domain.name(page).short() == id;
                if same {
                    content.checks.note(place.page, &self.check_key, page, id);
                }
                same
            });
            if !same {
                gone.push((id, place));
            }
            same
        };
        let read = found.add_run(run.iter().map(|(id, _)| *id), fill, keep);
        match run {
            _ if read => {}
            [only] => gone.push(*only),
            // What cannot be read as a whole may be read in part.
            several => several.chunks(1).for_each(|page| self.read_run(content, page, found, gone)),
        }
        if gone.len() > before && matches!(content.source, Source::File(_)) {
            content.stale.notify_one();
        }
    }

    /// What has the page, for people.
    pub(crate) fn describe(&self, id: ShortId) -> Option<String> {
        let place = self.index().place(id)?;
        let content = self.contents().get(&place.content).cloned()?;
        Some(match &content.source {
            Source::Memory(memory) => {
                let gfn = memory.gfn(place.page).unwrap_or_default();
                format!("memory {}, gfn {gfn:#x}", content.name)
            }
            Source::File(file) => format!("file {}, block {}", file.path().display(), place.page),
            Source::Checkpoint(_) => format!("checkpoint {}, page {}", content.name, place.page),
        })
    }

    /// The state of each content; `announced` says whether all owners have all names.
    pub(crate) fn status(&self, announced: bool) -> Vec<ContentStatus> {
        let contents: Vec<_> = self.contents().values().cloned().collect();
        let index = self.index();
        let status = |content: &Arc<Content>| {
            let scanned = content.scanned.load(Ordering::Acquire);
            ContentStatus {
                name: content.name.clone(),
                kind: content.source.kind().to_owned(),
                pages: content.source.pages().into(),
                indexed_pages: index.indexed_pages(content.id),
                scanned,
                announced: scanned && announced,
                last_use: match &content.source {
                    Source::Checkpoint(file) => Some(file.last_use()),
                    Source::Memory(_) | Source::File(_) => None,
                },
            }
        };
        contents.iter().map(status).collect()
    }
}

fn is_file_at(content: &Content, path: &Path) -> bool {
    match &content.source {
        Source::File(file) => file.path() == path,
        Source::Memory(_) | Source::Checkpoint(_) => false,
    }
}
