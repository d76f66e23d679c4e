//! Reads contents through and keeps the index current.
//!
//! A VM's memory is read again from time to time because the VM writes, a file when it is found changed. What the index says is a hint in
//! any case: each page is hashed when it is served. How much of the machine all this takes is the workers' to say.

use std::{
    cell::RefCell,
    io,
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use futures::{StreamExt, stream};
use page::{PAGE_SIZE, ShortId, is_zero, page_chunks};

use super::{
    Content, Contents, Source,
    file::FileNow,
    memory::ReadPages,
    revisit::Revisits,
    workers::{Urgency, Workers},
};
use crate::{
    index::Look,
    limits::{FILE_LOOK_EVERY, RESCAN_EVERY, SCAN_CHUNK_PAGES, SCAN_READ_PAGES},
};

/// Why a content is not scanned any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Ended {
    /// It was removed.
    Removed,
    /// Another file stands at its path.
    Replaced,
    /// Its file was deleted.
    Gone,
}

/// Scans `content` now and again until it is removed, or its file is no longer what it was. The first scan is as urgent as said. `noted` takes each batch of names that the host did not have
/// before; `scanned` hears of each completed scan.
pub(crate) async fn keep_indexed(
    contents: Arc<Contents>,
    content: Arc<Content>,
    workers: Arc<Workers>,
    mut urgency: Urgency,
    noted: impl Fn(&[ShortId]),
    scanned: impl Fn(),
) -> Ended {
    let removed = content.removed.clone();
    let work = async {
        let mut revisits = Revisits::default();
        loop {
            let started = Instant::now();
            match scan(&contents, &content, &workers, urgency, &mut revisits, &noted).await {
                Ok(()) => {
                    let elapsed_ms = started.elapsed().as_millis();
                    if content.scanned.swap(true, Ordering::AcqRel) {
                        tracing::debug!(content = content.name, elapsed_ms, "scanned again");
                    } else {
                        tracing::info!(content = content.name, elapsed_ms, "scanned");
                    }
                    scanned();
                }
                Err(error) => {
                    tracing::warn!(content = content.name, %error, "a scan failed; trying again later");
                }
            }
            match wait_for_change(&content).await {
                FileNow::Same | FileNow::Rewritten => urgency = Urgency::Again,
                FileNow::Replaced => return Ended::Replaced,
                FileNow::Gone => return Ended::Gone,
            }
        }
    };
    removed.run_until_cancelled(work).await.unwrap_or(Ended::Removed)
}

/// Waits until the content should be read again, or not any more.
async fn wait_for_change(content: &Content) -> FileNow {
    match &content.source {
        Source::Memory(_) => {
            tokio::time::sleep(RESCAN_EVERY).await;
            FileNow::Same
        }
        Source::Checkpoint(_) => std::future::pending().await,
        Source::File(file) => loop {
            tokio::select! {
                () = content.stale.notified() => {}
                () = tokio::time::sleep(FILE_LOOK_EVERY) => {}
            }
            // A file that cannot be looked at is scanned, and the scan says why it cannot be read.
            let now = file.look().unwrap_or(FileNow::Rewritten);
            if now != FileNow::Same {
                return now;
            }
        },
    }
}

async fn scan(
    contents: &Arc<Contents>,
    content: &Arc<Content>,
    workers: &Workers,
    urgency: Urgency,
    revisits: &mut Revisits,
    noted: &impl Fn(&[ShortId]),
) -> io::Result<()> {
    let look = if content.scanned.load(Ordering::Acquire) { Look::Again } else { Look::First };
    // A file is read again because it changed, and then all of it is.
    let choosy = look == Look::Again && matches!(content.source, Source::Memory(_));
    let due = (0..content.source.pages().div_ceil(SCAN_CHUNK_PAGES))
        .filter(|chunk| !choosy || revisits.due(*chunk as usize))
        .collect::<Vec<u32>>();
    let scan_chunk = |chunk: u32| {
        let (contents, content) = (Arc::clone(contents), Arc::clone(content));
        let work =
            workers.run(urgency, move || index_chunk(&contents, &content, chunk * SCAN_CHUNK_PAGES, look));
        async move { (chunk, work.await) }
    };
    let at_once = match urgency {
        // As many again wait in the queue: no thread rests while this task is on its way to the next chunk.
        Urgency::First => workers.threads() * 2,
        // Threads are for contents that are of no use yet.
        Urgency::Again => 1,
    };
    let mut results = stream::iter(due).map(scan_chunk).buffer_unordered(at_once);
    while let Some((chunk, indexed)) = results.next().await {
        let Indexed { added, changed } = indexed?;
        if look == Look::Again {
            revisits.looked(chunk as usize, changed, SCAN_CHUNK_PAGES);
        }
        noted(&added);
    }
    Ok(())
}

thread_local! {
    /// A scanning thread's own: new memory for each chunk would cost a fifth of what hashing it does.
    static BUFFER: RefCell<Vec<u8>> = RefCell::new(vec![0; SCAN_READ_PAGES * PAGE_SIZE]);
}

/// What came of a chunk.
#[derive(Default)]
struct Indexed {
    /// Names to announce.
    added: Vec<ShortId>,
    /// Pages that were something else before.
    changed: u32,
}

/// Hashes one chunk's pages into the index.
fn index_chunk(contents: &Contents, content: &Content, first: u32, look: Look) -> io::Result<Indexed> {
    let count = SCAN_CHUNK_PAGES.min(content.source.pages() - first);
    let mut ids: Vec<Option<ShortId>> = Vec::with_capacity(count as usize);
    let read = BUFFER.with_borrow_mut(|bytes| {
        while ids.len() < count as usize {
            if content.removed.is_cancelled() {
                return Ok(false);
            }
            let at = first + u32::try_from(ids.len()).expect("a chunk is small");
            let left = (count as usize - ids.len()).min(SCAN_READ_PAGES);
            match content.source.read(at, &mut bytes[..left * PAGE_SIZE])? {
                ReadPages::Zero(pages) => ids.extend(std::iter::repeat_n(None, left.min(pages as usize))),
                ReadPages::Data(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof)),
                ReadPages::Data(length) => {
                    ids.extend(page_chunks(&bytes[..length]).zip(at..).map(|(page, number)| {
                        let id = (!is_zero(page)).then(|| contents.domain.name(page).short())?;
                        // Before the index says so: whoever is asked for the page's former id meanwhile finds it changed.
                        content.checks.note(number, &contents.check_key, page, id);
                        Some(id)
                    }));
                }
            }
        }
        Ok(true)
    })?;
    if !read {
        return Ok(Indexed::default());
    }
    let mut added = Vec::new();
    let changed = contents.index_mut().update(content.id, first, &ids, look, &mut added);
    Ok(Indexed { added, changed })
}
