//! The hot path: reading, naming, compressing and verifying pages, on every core.
//!
//! The functions are pure over [`Memory`]; a [`Pool`] runs them on threads of its own, so that neither the protocol's task nor the
//! control socket waits for a hash.

use std::io;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use migration_proto::literal::{self, Delta};
use migration_proto::source::{Literal, LiteralsSent};
use migration_proto::wire::WireError;
use page::{Domain, Gfn, PAGE_SIZE, Page, PageHash, VerifiedPage, is_zero};

use super::limits;
use super::site::{SitePage, SiteRung};
use super::versions::Version;
use crate::memory::Memory;

type Job = Box<dyn FnOnce() + Send>;

/// Worker threads, one a core. They end when the pool is dropped, after what is queued.
#[derive(Debug)]
pub struct Pool {
    jobs: SyncSender<Job>,
}

/// The pool's queue is full, or its threads are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no worker takes a job: the queue of {} is full or the workers have died", limits::JOBS_BOUND)]
pub struct NoWorker;

impl Pool {
    /// Starts the threads.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn new() -> io::Result<Self> {
        let threads = thread::available_parallelism()?.get();
        let (jobs, queue) = sync_channel(limits::JOBS_BOUND);
        let queue = Arc::new(Mutex::new(queue));
        for number in 0..threads {
            let queue = Arc::clone(&queue);
            thread::Builder::new().name(format!("pages-{number}")).spawn(move || work(&queue))?;
        }
        Ok(Self { jobs })
    }

    /// Queues a job. Never blocks.
    ///
    /// # Errors
    /// If the queue is full: callers keep to the protocol's windows, so that it never is.
    pub fn submit(&self, job: impl FnOnce() + Send + 'static) -> Result<(), NoWorker> {
        match self.jobs.try_send(Box::new(job)) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => Err(NoWorker),
        }
    }
}

fn work(queue: &Mutex<Receiver<Job>>) {
    loop {
        // The lock is held while waiting: the others queue up behind it and take the next job in turn.
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = job else { return };
        job();
    }
}

/// Reads `frames` and names them.
#[must_use]
pub fn name(memory: &Memory, domain: &Domain, frames: &[Gfn]) -> Vec<(Gfn, PageHash)> {
    let mut page: Page = [0; PAGE_SIZE];
    let named = |gfn: &Gfn| {
        memory.read_page(*gfn, &mut page);
        (*gfn, if is_zero(&page) { domain.zero_name() } else { domain.name(&page) })
    };
    frames.iter().map(named).collect()
}

/// What came of a batch of wanted pages.
#[derive(Debug)]
pub struct EncodedBatch {
    /// What goes over the wire; `None` if every page had changed.
    pub batch: Option<Vec<u8>>,
    /// What the protocol is told of it.
    pub sent: LiteralsSent,
    /// Of what is sent, the pages to keep.
    pub keep: Vec<Version>,
}

/// Reads the wanted pages and encodes those that still have the name that the destination was told, against their bases where there are
/// some, at zstd's `level`. The bytes that are sent are the bytes that were hashed.
#[must_use]
pub fn encode(
    memory: &Memory,
    domain: &Domain,
    level: i32,
    wanted: &[(Literal, Option<Arc<Page>>)],
) -> EncodedBatch {
    let (mut sent, mut keep) = (LiteralsSent::default(), Vec::new());
    let mut pages: Vec<(Gfn, Arc<Page>, Option<&Page>)> = Vec::with_capacity(wanted.len());
    for (literal, base) in wanted {
        let (gfn, name) = (literal.gfn, literal.name);
        let mut page: Page = [0; PAGE_SIZE];
        memory.read_page(gfn, &mut page);
        if domain.name(&page) != name {
            sent.stale.push((gfn, name.short()));
            continue;
        }
        let page = Arc::new(page);
        if literal.keep {
            keep.push(Version { gfn, name, page: Arc::clone(&page) });
        }
        pages.push((gfn, page, base.as_deref()));
    }
    if pages.is_empty() {
        return EncodedBatch { batch: None, sent, keep };
    }
    let deltas: Vec<Delta<'_>> = pages
        .iter()
        .filter_map(|(gfn, page, base)| Some(Delta { gfn: *gfn, page, base: (*base)? }))
        .collect();
    let plain: Vec<(Gfn, &Page)> = pages
        .iter()
        .filter(|(_, _, base)| base.is_none())
        .map(|(gfn, page, _)| (*gfn, page.as_ref()))
        .collect();
    let encoded = literal::encode_with(level, &deltas, &plain);
    sent.pages = pages.len() as u64;
    sent.bytes = encoded.batch.len() as u64;
    sent.delta_bytes = encoded.delta_bytes;
    sent.delta_pages = if encoded.delta_bytes > 0 { deltas.len() as u64 } else { 0 };
    EncodedBatch { batch: Some(encoded.batch), sent, keep }
}

/// Reads one page, names it and encodes it as a batch of its own.
#[must_use]
pub fn encode_one(memory: &Memory, domain: &Domain, gfn: Gfn) -> (PageHash, Vec<u8>) {
    let mut page: Page = [0; PAGE_SIZE];
    memory.read_page(gfn, &mut page);
    (domain.name(&page), literal::encode(&[(gfn, &page)]))
}

/// A batch of literals, hashed.
#[derive(Debug, Default)]
pub struct DecodedBatch {
    /// Pages sent as they are.
    pub plain: Vec<(Gfn, VerifiedPage)>,
    /// Pages sent as deltas; `None` where what stands here gives no page.
    pub deltas: Vec<(Gfn, Option<VerifiedPage>)>,
}

/// Decodes a batch of literals, deltas against what stands in `memory` now, and hashes its pages.
///
/// # Errors
/// If the batch is not well-formed.
pub fn decode(memory: Option<&Memory>, domain: &Domain, batch: &[u8]) -> Result<DecodedBatch, WireError> {
    let decoded = literal::decode_with(batch, |gfn, page| {
        if let Some(memory) = memory.filter(|memory| memory.has(gfn)) {
            memory.read_page(gfn, page);
        }
    })?;
    let verified = |bytes| VerifiedPage::new(domain, bytes);
    Ok(DecodedBatch {
        plain: decoded.plain.into_iter().map(|(gfn, bytes)| (gfn, verified(bytes))).collect(),
        deltas: decoded.deltas.into_iter().map(|(gfn, bytes)| (gfn, bytes.map(verified))).collect(),
    })
}

/// Decodes the answer to a fault and hashes its page.
///
/// # Errors
/// If the batch is not well-formed.
pub fn decode_plain(domain: &Domain, batch: &[u8]) -> Result<Vec<(Gfn, VerifiedPage)>, WireError> {
    let pages = literal::decode(batch)?;
    Ok(pages.into_iter().map(|(gfn, bytes)| (gfn, VerifiedPage::new(domain, bytes))).collect())
}

/// A page of the site, hashed.
#[derive(Debug)]
pub struct CheckedPage {
    /// The id that was asked for.
    pub id: page::ShortId,
    /// Where it came from.
    pub rung: SiteRung,
    /// The page, with the name that its bytes have.
    pub page: VerifiedPage,
}

/// Hashes pages of the site.
#[must_use]
pub fn check(domain: &Domain, pages: Vec<SitePage>) -> Vec<CheckedPage> {
    let checked = |found: SitePage| CheckedPage {
        id: found.id,
        rung: found.rung,
        page: VerifiedPage::new(domain, found.bytes),
    };
    pages.into_iter().map(checked).collect()
}
