//! Reads contents through and keeps the index current.
//!
//! The first scan of a content uses all cores. Later ones use a tenth of one: a VM's memory is read again from time to time
//! because the VM writes, a file when a read finds that it changed. What the index says is a hint in any case: each page is hashed
//! when it is served.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use futures::{StreamExt, stream};
use page::{PAGE_SIZE, ShortId, is_zero, page_chunks};

use super::{Content, Contents, Source, memory::ReadPages};
use crate::limits::{RESCAN_EVERY, RESCAN_REST_FACTOR, SCAN_CHUNK_PAGES, SCAN_THREADS};

/// Scans `content` now and again until it is removed. `noted` takes each batch of names that the host did not have
/// before; `scanned` hears of each completed scan.
pub(crate) async fn keep_indexed(
    contents: Arc<Contents>,
    content: Arc<Content>,
    noted: impl Fn(&[ShortId]),
    scanned: impl Fn(),
) {
    let removed = content.removed.clone();
    let work = async {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(SCAN_THREADS);
        let mut pace = Pace::Full { threads };
        loop {
            let started = Instant::now();
            match scan(&contents, &content, pace, &noted).await {
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
            wait_for_change(&content).await;
            pace = Pace::Background;
        }
    };
    removed.run_until_cancelled(work).await;
}

/// Waits until the content should be read again.
async fn wait_for_change(content: &Content) {
    match &content.source {
        Source::Memory(_) => tokio::time::sleep(RESCAN_EVERY).await,
        Source::File(file) => loop {
            tokio::select! {
                () = content.stale.notified() => {}
                () = tokio::time::sleep(RESCAN_EVERY) => {}
            }
            // A file that cannot be looked at is scanned, and the scan says why it cannot be read.
            if file.changed().unwrap_or(true) {
                return;
            }
        },
    }
}

/// How much of the machine a scan may take.
#[derive(Clone, Copy, Debug)]
enum Pace {
    Full { threads: usize },
    Background,
}

async fn scan(
    contents: &Arc<Contents>,
    content: &Arc<Content>,
    pace: Pace,
    noted: &impl Fn(&[ShortId]),
) -> io::Result<()> {
    let pages = content.source.pages();
    let chunks = (0..pages).step_by(SCAN_CHUNK_PAGES as usize);
    let scan_chunk = |first: u32| {
        let (contents, content) = (Arc::clone(contents), Arc::clone(content));
        let work = tokio::task::spawn_blocking(move || index_chunk(&contents, &content, first));
        async move { work.await.map_err(io::Error::other)? }
    };
    match pace {
        Pace::Full { threads } => {
            let mut results = stream::iter(chunks).map(scan_chunk).buffer_unordered(threads);
            while let Some(added) = results.next().await {
                noted(&added?);
            }
        }
        Pace::Background => {
            for first in chunks {
                let started = Instant::now();
                noted(&scan_chunk(first).await?);
                // The rest between two chunks is what keeps the scan to its share of a core.
                tokio::time::sleep(started.elapsed() * RESCAN_REST_FACTOR).await;
            }
        }
    }
    Ok(())
}

/// Hashes one chunk's pages into the index; returns the ids that the host did not have before.
fn index_chunk(contents: &Contents, content: &Content, first: u32) -> io::Result<Vec<ShortId>> {
    let count = SCAN_CHUNK_PAGES.min(content.source.pages() - first);
    let mut ids: Vec<Option<ShortId>> = Vec::with_capacity(count as usize);
    let mut bytes = vec![0; count as usize * PAGE_SIZE];
    while ids.len() < count as usize {
        if content.removed.is_cancelled() {
            return Ok(Vec::new());
        }
        let at = first + u32::try_from(ids.len()).expect("a chunk is small");
        let left = count as usize - ids.len();
        match content.source.read(at, &mut bytes[..left * PAGE_SIZE])? {
            ReadPages::Zero(pages) => ids.extend(std::iter::repeat_n(None, left.min(pages as usize))),
            ReadPages::Data(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            ReadPages::Data(length) => ids.extend(
                page_chunks(&bytes[..length])
                    .map(|page| (!is_zero(page)).then(|| contents.domain.name(page).short())),
            ),
        }
    }
    let mut added = Vec::new();
    contents.index_mut().update(content.id, first, &ids, &mut added);
    Ok(added)
}
