//! A retained checkpoint that this host serves: a file of [`crate::checkpoint`]'s format.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use page::{DomainId, PAGE_SIZE, ShortId};
use rustix::fs::{Timespec, Timestamps, UTIME_OMIT, futimens};
use thiserror::Error;

use crate::{
    checkpoint::{CheckpointError, Header, read_table},
    limits::LAST_USE_EVERY,
};

/// Why a checkpoint's file is not taken.
#[derive(Debug, Error)]
pub(crate) enum OpenError {
    #[error("it cannot be read")]
    Unreadable(#[from] io::Error),
    #[error(transparent)]
    Format(#[from] CheckpointError),
    #[error("it is of another dedup domain")]
    Domain,
}

/// A checkpoint's file. Its modification time is when it was last of use, so that this outlives the peer.
#[derive(Debug)]
pub(crate) struct RetainedFile {
    file: File,
    path: PathBuf,
    header: Header,
    /// Seconds since 1970.
    last_use: AtomicU64,
}

impl RetainedFile {
    /// Opens a complete file; returns the ids of its pages too.
    pub(crate) fn open(path: &Path, domain: DomainId) -> Result<(Self, Vec<ShortId>), OpenError> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        let mut first = [0; PAGE_SIZE];
        file.read_exact_at(&mut first, 0)?;
        let header = Header::decode(&first)?;
        // Before the table is read: what it takes is bounded by what the file really has.
        let (bytes, expected) = (metadata.len(), header.file_bytes());
        if bytes != expected {
            return Err(CheckpointError::Length { bytes, expected }.into());
        }
        if header.domain != domain {
            return Err(OpenError::Domain);
        }
        let length = usize::try_from(header.table_bytes()).map_err(io::Error::other)?;
        let mut table = vec![0; length];
        file.read_exact_at(&mut table, PAGE_SIZE as u64)?;
        let ids = read_table(&first, &table)?;
        let last_use = AtomicU64::new(unix_seconds(metadata.modified()?));
        Ok((Self { file, path: path.to_owned(), header, last_use }, ids))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn name(&self) -> &str {
        &self.header.name
    }

    pub(crate) fn pages(&self) -> u32 {
        self.header.pages
    }

    pub(crate) fn file_bytes(&self) -> u64 {
        self.header.file_bytes()
    }

    /// When pages of it were last served, or it was made, in seconds since 1970.
    pub(crate) fn last_use(&self) -> u64 {
        self.last_use.load(Ordering::Relaxed)
    }

    /// Pages of it were served. Written down at most once in [`LAST_USE_EVERY`].
    pub(crate) fn used(&self, now: SystemTime) {
        let (before, now) = (self.last_use(), unix_seconds(now));
        if now < before.saturating_add(LAST_USE_EVERY.as_secs()) {
            return;
        }
        self.last_use.store(now, Ordering::Relaxed);
        let modified = Timespec { tv_sec: i64::try_from(now).unwrap_or(i64::MAX), tv_nsec: 0 };
        let untouched = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
        let times = Timestamps { last_access: untouched, last_modification: modified };
        if let Err(error) = futimens(&self.file, &times) {
            tracing::warn!(path = %self.path.display(), %error, "a checkpoint's last use could not be written down");
        }
    }

    /// Reads whole pages from page `first` on; `false` if there are not so many.
    pub(crate) fn read_run(&self, first: u32, into: &mut [u8]) -> io::Result<bool> {
        if u64::from(first) + (into.len() / PAGE_SIZE) as u64 > u64::from(self.header.pages) {
            return Ok(false);
        }
        let at = self.header.pages_at() + u64::from(first) * PAGE_SIZE as u64;
        self.file.read_exact_at(into, at)?;
        Ok(true)
    }
}

/// Seconds since 1970; a clock before that is at its beginning.
fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()
}
