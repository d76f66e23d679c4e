//! Reads contents through and keeps the index current.
//!
//! A VM's memory is read again from time to time because the VM writes, a file when it is found changed. What the index says is a hint in
//! any case: each page is hashed when it is served. How much of the machine all this takes is the workers' to say.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use futures::{StreamExt, stream};
use page::{PAGE_SIZE, ShortId, is_zero, page_chunks};

use super::{
    Content, Contents, Source,
    memory::ReadPages,
    workers::{Urgency, Workers},
};
use crate::limits::{RESCAN_EVERY, SCAN_CHUNK_PAGES};

/// Scans `content` now and again until it is removed. `noted` takes each batch of names that the host did not have
/// before; `scanned` hears of each completed scan.
pub(crate) async fn keep_indexed(
    contents: Arc<Contents>,
    content: Arc<Content>,
    workers: Arc<Workers>,
    noted: impl Fn(&[ShortId]),
    scanned: impl Fn(),
) {
    let removed = content.removed.clone();
    let work = async {
        let mut urgency = Urgency::First;
        loop {
            let started = Instant::now();
            match scan(&contents, &content, &workers, urgency, &noted).await {
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
            urgency = Urgency::Again;
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

async fn scan(
    contents: &Arc<Contents>,
    content: &Arc<Content>,
    workers: &Workers,
    urgency: Urgency,
    noted: &impl Fn(&[ShortId]),
) -> io::Result<()> {
    let chunks = (0..content.source.pages()).step_by(SCAN_CHUNK_PAGES as usize);
    let scan_chunk = |first: u32| {
        let (contents, content) = (Arc::clone(contents), Arc::clone(content));
        workers.run(urgency, move || index_chunk(&contents, &content, first))
    };
    let at_once = match urgency {
        Urgency::First => workers.threads(),
        // Threads are for contents that are of no use yet.
        Urgency::Again => 1,
    };
    let mut results = stream::iter(chunks).map(scan_chunk).buffer_unordered(at_once);
    while let Some(added) = results.next().await {
        noted(&added?);
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
