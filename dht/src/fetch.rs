//! Fetching pages from a holder: once for all searches of this host that want them.

use std::{
    collections::HashSet,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use page::{Page, ShortId};
use tokio::{sync::mpsc, time::timeout};

use crate::{
    batch::PageBatch,
    flight::{Flights, SearchId, Start},
    limits::{FETCH_HEDGE, FETCH_TIMEOUT},
    membership::Role,
    node::{Peer, lock},
    page_client::FetchError,
    page_connection::Came,
    shard::MemberId,
};

/// What whoever waits for a page is told: the page, or that it must be asked for anew.
type Waiter = mpsc::Sender<(ShortId, Option<Box<Page>>)>;
type News = mpsc::Receiver<(ShortId, Option<Box<Page>>)>;

/// The pages on their way to this host.
#[derive(Debug, Default)]
pub(crate) struct OnTheWay {
    flights: std::sync::Mutex<Flights<Waiter>>,
    searches: AtomicU64,
}

impl OnTheWay {
    pub(crate) fn search(&self) -> SearchId {
        SearchId(self.searches.fetch_add(1, Ordering::Relaxed))
    }

    fn tell(waiters: Vec<Waiter>, id: ShortId, page: Option<&Page>) {
        for waiter in waiters {
            // Each waiter has room for all that it waits for; one that has gone is not told.
            let _ = waiter.try_send((id, page.map(|page| Box::new(*page))));
        }
    }

    fn arrived(&self, pages: &PageBatch) {
        let waited: Vec<_> = {
            let mut flights = lock(&self.flights);
            let waiters = pages.iter().map(|(id, page)| (id, page, flights.arrived(id)));
            waiters.filter(|(.., waiters)| !waiters.is_empty()).collect()
        };
        for (id, page, waiters) in waited {
            Self::tell(waiters, id, Some(page));
        }
    }
}

/// The pages that one request fetches and waits for. Dropped, it lets others go on.
struct Share<'a> {
    on_the_way: &'a OnTheWay,
    by: SearchId,
    fetched: Vec<ShortId>,
    awaited: HashSet<ShortId>,
    /// Whether some of them are to come from another holder, which may be slower than this one.
    elsewhere: bool,
}

impl<'a> Share<'a> {
    /// What is to be asked of `from`, hedges included; the rest of `ids` comes through `waiter`.
    fn start(
        on_the_way: &'a OnTheWay,
        by: SearchId,
        from: MemberId,
        ids: &[ShortId],
        waiter: &Waiter,
    ) -> (Self, Vec<ShortId>) {
        let mut share =
            Self { on_the_way, by, fetched: Vec::new(), awaited: HashSet::new(), elsewhere: false };
        let mut ask = Vec::new();
        let mut flights = lock(&on_the_way.flights);
        for id in ids {
            match flights.start(*id, by, from, || waiter.clone()) {
                Start::Fetch => {
                    share.fetched.push(*id);
                    ask.push(*id);
                }
                Start::Hedge => ask.push(*id),
                Start::Wait(holder) => {
                    share.awaited.insert(*id);
                    share.elsewhere |= holder != from;
                }
            }
        }
        (share, ask)
    }

    /// Takes what comes of the pages that others fetch into `all`, and into `open` those that are to be asked for anew.
    async fn wait(&mut self, news: &mut News, all: &mut PageBatch, open: &mut Vec<ShortId>) {
        while !self.awaited.is_empty() {
            let (id, page) = news.recv().await.expect("this end has a sender too");
            // What an earlier round gave up waiting for may still come.
            if !self.awaited.remove(&id) {
                continue;
            }
            match page {
                Some(page) => all.extend([(id, *page)]),
                None => open.push(id),
            }
        }
    }

    /// The fetch is over: whoever waits for what has not come goes on by itself.
    fn end_fetch(&mut self) {
        let waited: Vec<_> = {
            let mut flights = lock(&self.on_the_way.flights);
            self.fetched.drain(..).map(|id| (id, flights.ended(id, self.by))).collect()
        };
        for (id, waiters) in waited {
            OnTheWay::tell(waiters, id, None);
        }
    }
}

impl Drop for Share<'_> {
    fn drop(&mut self) {
        self.end_fetch();
        let mut flights = lock(&self.on_the_way.flights);
        self.awaited.iter().for_each(|id| flights.left(*id, self.by));
    }
}

impl Peer {
    /// Fetches pages from a holder, those of them that no other search has on their way already; `None` if the holder does not answer.
    pub(crate) async fn fetch(
        self: Arc<Self>,
        by: SearchId,
        holder: MemberId,
        ids: Vec<ShortId>,
    ) -> Option<PageBatch> {
        // Room for each page twice: once from a fetch that was given up, once from the next.
        let (waiter, mut news) = mpsc::channel(ids.len() * 2 + 1);
        let (mut all, mut open) = (PageBatch::default(), ids);
        while !open.is_empty() {
            let (mut share, ask) = Share::start(&self.on_the_way, by, holder, &open, &waiter);
            open.clear();
            if !ask.is_empty() {
                let pages = self.ask_holder(holder, ask).await?;
                share.end_fetch();
                all.append(pages);
            }
            let patience = if share.elsewhere { FETCH_HEDGE } else { FETCH_TIMEOUT };
            if timeout(patience, share.wait(&mut news, &mut all, &mut open)).await.is_err() {
                // Whoever was to bring them is slow: this holder is asked as well.
                let late: Vec<ShortId> = share.awaited.iter().copied().collect();
                all.append(self.ask_holder(holder, late).await?);
            }
        }
        Some(all)
    }

    /// Asks a holder for pages, hashes what comes, and gives others what they wait for.
    async fn ask_holder(self: &Arc<Self>, holder: MemberId, ids: Vec<ShortId>) -> Option<PageBatch> {
        let (to, addresses) = {
            let directory = self.directory();
            let known = directory.get(&holder)?;
            (known.peer_id, known.addresses.clone())
        };
        // It may have been found out by an earlier request of this search.
        if !self.site().usable_holder(holder, Instant::now()) {
            return None;
        }
        self.counters.fetch_sent();
        let domain = self.domain().clone();
        let right = move |id: ShortId, page: &Page| domain.name(page).short() == id;
        match self.page_client.fetch(to, &addresses, &ids, right).await {
            Ok(Came { pages, wrong }) => {
                self.answered(holder, &pages, wrong);
                self.on_the_way.arrived(&pages);
                Some(pages)
            }
            Err(error) => {
                tracing::debug!(peer = %to, error = &error as &dyn std::error::Error, "a fetch failed");
                if matches!(error, FetchError::Connect(_)) {
                    self.network.look_after(to).await;
                }
                None
            }
        }
    }

    /// A holder sent pages, those that were right and how many were not.
    fn answered(&self, holder: MemberId, pages: &PageBatch, wrong: usize) {
        self.note_source(pages.ids(), holder);
        self.counters.fetched(pages.len());
        let mut site = self.site();
        site.answered(holder, Role::Holder);
        if wrong > 0 {
            self.counters.wrong_pages(wrong);
            site.lied(holder, wrong as u64, Instant::now());
            tracing::warn!(
                ?holder,
                wrong,
                "a peer served pages that do not hash to their names; avoiding it"
            );
        }
    }
}
