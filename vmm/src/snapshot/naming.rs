//! Reading and naming guest memory on all cores.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;
use std::thread;

use page::{Domain, Gfn, PAGE_SIZE, Page, PageHash, is_zero};

use super::SnapshotError;
use crate::limits::{SNAPSHOT_BATCH_PAGES, SNAPSHOT_BATCHES};
use crate::memory::Memory;

/// Some pages as they were when they were read.
pub(super) struct Batch {
    frames: Vec<(Gfn, Option<PageHash>)>,
    bytes: Vec<Page>,
}

impl Batch {
    fn read(memory: &Memory, domain: &Domain, frames: &[Gfn]) -> Self {
        let mut batch = Self { frames: Vec::with_capacity(frames.len()), bytes: Vec::new() };
        let mut page = [0; PAGE_SIZE];
        for gfn in frames {
            memory.read_page(*gfn, &mut page);
            let name = (!is_zero(&page)).then(|| domain.name(&page));
            if name.is_some() {
                batch.bytes.push(page);
            }
            batch.frames.push((*gfn, name));
        }
        batch
    }

    /// Each frame with its page and name; none where it is zero.
    pub(super) fn pages(&self) -> impl Iterator<Item = (Gfn, Option<(PageHash, &Page)>)> {
        let mut bytes = self.bytes.iter();
        self.frames.iter().map(move |(gfn, name)| {
            (*gfn, name.map(|name| (name, bytes.next().expect("each name has its page"))))
        })
    }
}

/// Runs `job` on `0..count`, on all cores, and gives what comes of it to `take` on this thread, nearly in order. Ends at the first
/// error of either.
pub(super) fn on_all_cores<T: Send>(
    count: usize,
    job: impl Fn(usize) -> Result<T, SnapshotError> + Sync,
    mut take: impl FnMut(T) -> Result<(), SnapshotError>,
) -> Result<(), SnapshotError> {
    let threads = thread::available_parallelism().map_or(1, usize::from).min(count);
    let (next, (sender, results)) = (AtomicUsize::new(0), sync_channel(SNAPSHOT_BATCHES));
    thread::scope(|scope| {
        // Within the scope: when this ends early the workers see that nobody takes their results, and end.
        let results = results;
        for number in 0..threads {
            let (sender, next, job) = (sender.clone(), &next, &job);
            let work = move || {
                loop {
                    let at = next.fetch_add(1, Ordering::Relaxed);
                    if at >= count || sender.send(job(at)).is_err() {
                        return;
                    }
                }
            };
            thread::Builder::new()
                .name(format!("snapshot-{number}"))
                .spawn_scoped(scope, work)
                .map_err(SnapshotError::Thread)?;
        }
        drop(sender);
        results.iter().try_for_each(|result| take(result?))
    })
}

/// Reads and names `frames`, and gives the batches to `take`.
pub(super) fn name(
    memory: &Memory,
    domain: &Domain,
    frames: &[Gfn],
    take: impl FnMut(Batch) -> Result<(), SnapshotError>,
) -> Result<(), SnapshotError> {
    let batches: Vec<&[Gfn]> = frames.chunks(SNAPSHOT_BATCH_PAGES).collect();
    on_all_cores(batches.len(), |at| Ok(Batch::read(memory, domain, batches[at])), take)
}
