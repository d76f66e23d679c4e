//! Answering a VM: the pages of this host, then those of the site.

use std::{
    collections::HashSet,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{FutureExt, StreamExt, future::BoxFuture, stream, stream::FuturesUnordered};
use page::ShortId;
use tokio::{sync::mpsc, task::JoinError};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    batch::PageBatch,
    connections::member,
    flight::SearchId,
    limits::{FETCH_TIMEOUT, LOCAL_PAGES_PER_FRAME, LOCAL_READERS, LOOKUP_TIMEOUT},
    local::protocol::FoundOn,
    lookup::{Request, Search, Ticket},
    membership::Role,
    node::{Peer, blocking},
    sample::Sampling,
    serve::distinct,
    shard::{MemberId, ShardId},
    trust::Evidence,
    wire::{IndexRequest, IndexResponse},
};

/// A part of the answer to a local client.
pub(crate) enum Part {
    /// Pages, and where they were found.
    Pages(FoundOn, PageBatch),
    /// Names of pages that nobody has.
    Missing(Vec<ShortId>),
}

/// Who holds which pages.
#[derive(Default)]
struct Holders {
    /// As the holders said.
    said: Vec<(ShortId, MemberId)>,
    /// As owners passed it on among each other.
    hearsay: Vec<(ShortId, MemberId)>,
    /// The shards of which the owner that answered does not keep every name.
    sampled: Vec<(ShardId, Sampling)>,
}

impl Holders {
    fn of(claims: impl Iterator<Item = (ShortId, MemberId, bool)>) -> Self {
        let mut holders = Self::default();
        for (id, member, hearsay) in claims {
            let list = if hearsay { &mut holders.hearsay } else { &mut holders.said };
            list.push((id, member));
        }
        holders
    }

    fn members(self) -> impl Iterator<Item = MemberId> {
        self.said.into_iter().chain(self.hearsay).map(|(_, member)| member)
    }
}

/// The time of one search. It stands still while the search waits for its client: whoever was asked has long answered then, and is not late.
#[derive(Default)]
struct Clock {
    stood: Duration,
}

impl Clock {
    fn now(&self) -> Instant {
        Instant::now() - self.stood
    }

    /// When it will be `then` on this clock if it goes on.
    fn real(&self, then: Instant) -> Instant {
        then + self.stood
    }

    /// Does what takes none of its time.
    async fn stands<T>(&mut self, work: impl Future<Output = T>) -> T {
        let start = Instant::now();
        let result = work.await;
        self.stood += start.elapsed();
        result
    }
}

/// What came of a request.
enum Outcome {
    Holders { ticket: Ticket, owner: MemberId, holders: Holders },
    Pages { ticket: Ticket, pages: PageBatch },
    Failed { ticket: Ticket },
}

impl Peer {
    /// Answers for each of `ids` once: with its page, or that it is missing, as soon as either is certain. What this host has comes from
    /// here, with the site asked for the rest meanwhile. Ends when all is said, or when the receiver is gone; dropping the future cancels.
    pub(crate) async fn resolve(self: &Arc<Self>, mut ids: Vec<ShortId>, answer: mpsc::Sender<Part>) {
        // The order stays: it says which pages stand beside each other.
        let mut seen = HashSet::with_capacity(ids.len());
        ids.retain(|id| seen.insert(*id));
        drop(seen);
        self.counters.asked(ids.len());
        let (here, elsewhere): (Vec<_>, Vec<_>) = {
            let index = self.contents.index();
            ids.into_iter().partition(|id| index.place(*id).is_some())
        };
        let here = async {
            let stale = self.from_host(here, &answer).await;
            self.from_site(stale, &answer).await;
        };
        tokio::join!(here, self.from_site(elsewhere, &answer));
    }

    /// Sends this host's pages; returns the ids whose pages are gone.
    async fn from_host(self: &Arc<Self>, ids: Vec<ShortId>, answer: &mpsc::Sender<Part>) -> Vec<ShortId> {
        let batches: Vec<Vec<ShortId>> = ids.chunks(LOCAL_PAGES_PER_FRAME).map(<[_]>::to_vec).collect();
        let read = |ids: Vec<ShortId>| {
            let contents = Arc::clone(&self.contents);
            blocking(move || {
                let pages = contents.read_pages(&ids);
                (ids, pages)
            })
        };
        let mut results = stream::iter(batches).map(read).buffered(LOCAL_READERS);
        let mut stale = Vec::new();
        while let Some((ids, pages)) = results.next().await {
            if pages.len() < ids.len() {
                stale.extend(ids.into_iter().filter(|id| !pages.ids().any(|found| found == *id)));
            }
            self.counters.host_hits(pages.len());
            if !pages.is_empty() && answer.send(Part::Pages(FoundOn::Host, pages)).await.is_err() {
                break;
            }
        }
        stale
    }

    fn search(&self, ids: Vec<ShortId>) -> Search {
        let now = Instant::now();
        let (owners, owned): (Vec<Vec<(MemberId, Sampling)>>, Vec<bool>) = {
            let site = self.site();
            let owners = |shard| {
                let asked = site.owners_to_ask(shard, now);
                asked.map(|owner| (owner, site.sampling(owner, shard))).collect()
            };
            // What is left of shards that it owned before is not all that the owners know by now.
            let owned = |shard| site.shards().owners(shard).contains(&site.me());
            (ShardId::all().map(owners).collect(), ShardId::all().map(owned).collect())
        };
        let mine = |id: &ShortId| owned[ShardId::of(*id).index()];
        let mine: Vec<ShortId> = ids.iter().copied().filter(mine).collect();
        let known = self.known_holders(&mine, now);
        let mut search = Search::new(ids, |shard| owners[shard.index()].iter().copied());
        self.site().trust().doubted(now).for_each(|holder| search.doubt(holder));
        search.known(known.said);
        search.hearsay(known.hearsay);
        search
    }

    /// Holders that this peer knows as an owner.
    fn known_holders(&self, ids: &[ShortId], now: Instant) -> Holders {
        let me = self.site().me();
        let claims = self.claims(ids, me, now).into_iter().filter(|claim| claim.member != me);
        Holders::of(claims.map(|claim| (ids[claim.at as usize], claim.member, claim.hearsay)))
    }

    /// Sends pages of other hosts, and which of them nobody has.
    async fn from_site(self: &Arc<Self>, ids: Vec<ShortId>, answer: &mpsc::Sender<Part>) {
        if ids.is_empty() {
            return;
        }
        // Bounds the pages in flight; whoever waits here has asked nobody yet.
        let _turn = self.searching.acquire().await.expect("the semaphore is never closed");
        let peer = Arc::clone(self);
        let mut search = blocking(move || peer.search(ids)).await;
        let by = self.on_the_way.search();
        let mut clock = Clock::default();
        let mut flying: FuturesUnordered<BoxFuture<'static, Outcome>> = FuturesUnordered::new();
        loop {
            while let Some(request) = search.next(clock.now()) {
                flying.extend(Arc::clone(self).make(by, request));
            }
            let missing = search.take_missing();
            self.counters.missed(missing.len());
            if !missing.is_empty() && clock.stands(answer.send(Part::Missing(missing))).await.is_err() {
                return;
            }
            if search.done() {
                return;
            }
            let deadline = search.deadline().unwrap_or_else(|| clock.now() + FETCH_TIMEOUT);
            tokio::select! {
                // What has come goes before deadlines.
                biased;
                Some(outcome) = flying.next() => {
                    if !self.take(&mut search, &mut clock, outcome, answer).await {
                        return;
                    }
                }
                () = tokio::time::sleep_until(clock.real(deadline).into()) => {}
            }
        }
    }

    /// Starts a request.
    fn make(self: Arc<Self>, by: SearchId, request: Request) -> Option<BoxFuture<'static, Outcome>> {
        match request {
            Request::Lookup { ticket, owner, ids } => {
                Some(async move { self.lookup(ticket, owner, ids).await }.boxed())
            }
            Request::Fetch { ticket, holder, ids } => {
                // On a task of its own: others may wait for these pages, and this search for a client that takes its time.
                let task = AbortOnDropHandle::new(tokio::spawn(self.fetch(by, holder, ids)));
                let outcome = move |pages| match pages {
                    Ok(Some(pages)) => Outcome::Pages { ticket, pages },
                    Ok(None) => Outcome::Failed { ticket },
                    Err(error) => match JoinError::try_into_panic(error) {
                        Ok(panic) => std::panic::resume_unwind(panic),
                        Err(_cancelled) => Outcome::Failed { ticket },
                    },
                };
                Some(task.map(outcome).boxed())
            }
            Request::TimedOut { peer, role } => {
                self.counters.failed_request();
                tracing::info!(?peer, ?role, "a peer did not answer in time; skipping it for a while");
                self.site().timed_out(peer, role, Instant::now());
                None
            }
        }
    }

    /// Hands an outcome to the search and its pages to the client; `false` if the client is gone.
    async fn take(
        &self,
        search: &mut Search,
        clock: &mut Clock,
        outcome: Outcome,
        answer: &mpsc::Sender<Part>,
    ) -> bool {
        match outcome {
            Outcome::Holders { ticket, owner, holders } => {
                self.site().answered(owner, Role::Owner);
                search.hearsay(holders.hearsay);
                search.on_holders(ticket, &holders.said, &holders.sampled);
            }
            Outcome::Pages { ticket, mut pages } => {
                let ids: Vec<_> = pages.ids().collect();
                let mut news = search.on_pages(ticket, &ids, clock.now()).into_iter();
                search.take_evidence().into_iter().for_each(|evidence| self.judge(evidence));
                pages.retain(|_, _| news.next().unwrap_or(false));
                self.counters.site_hits(pages.len());
                let none = pages.is_empty();
                let found = Part::Pages(FoundOn::Site, pages);
                return none || clock.stands(answer.send(found)).await.is_ok();
            }
            Outcome::Failed { ticket } => {
                self.counters.failed_request();
                search.on_failed(ticket);
            }
        }
        true
    }

    /// Counts what a holder delivered of what it had announced.
    fn judge(&self, evidence: Evidence) {
        let worse = self.site().delivered(evidence, Instant::now());
        if let Some(verdict) = worse {
            let holder = evidence.holder;
            tracing::warn!(?holder, ?verdict, "a peer delivers few or none of the pages that it announces");
        }
    }

    async fn lookup(&self, ticket: Ticket, owner: MemberId, ids: Vec<ShortId>) -> Outcome {
        match self.ask_owner(owner, &ids).await {
            Some(holders) => Outcome::Holders { ticket, owner, holders },
            None => Outcome::Failed { ticket },
        }
    }

    /// Asks an owner who holds `ids`; `None` if it does not answer as it should.
    async fn ask_owner(&self, owner: MemberId, ids: &[ShortId]) -> Option<Holders> {
        let to = self.directory().get(&owner)?.peer_id;
        self.counters.lookup_sent(ids.len());
        match self.network.index(to, IndexRequest::Lookup { ids: ids.to_vec() }).await {
            Ok(IndexResponse::Holders { sampled, peers, claims }) => {
                self.counters.lookup_found(distinct(claims.iter().map(|claim| claim.at)));
                self.sampled(owner, sampled.clone());
                self.meet(&peers).await;
                let now = Instant::now();
                let site = self.site();
                let members: Vec<_> = peers.iter().map(|named| member(&named.peer)).collect();
                let named = claims.into_iter().filter_map(|claim| {
                    let id = *ids.get(usize::try_from(claim.at).ok()?)?;
                    let holder = *members.get(usize::from(claim.peer))?;
                    site.usable_holder(holder, now).then_some((id, holder, claim.hearsay))
                });
                Some(Holders { sampled, ..Holders::of(named) })
            }
            Ok(
                IndexResponse::Announced { .. }
                | IndexResponse::Digests { .. }
                | IndexResponse::Claims { .. },
            ) => {
                tracing::warn!(peer = %to, "an owner answered another question than a lookup");
                None
            }
            Err(error) => {
                tracing::debug!(peer = %to, %error, "a lookup failed");
                None
            }
        }
    }

    /// The other peers that hold a page, by all owners' word.
    pub(crate) async fn holders_on_site(&self, id: ShortId) -> Vec<MemberId> {
        let now = Instant::now();
        let mut holders: Vec<_> = self.known_holders(&[id], now).members().collect();
        let owners: Vec<_> = self.site().owners_to_ask(ShardId::of(id), now).collect();
        for owner in owners {
            let answer = tokio::time::timeout(LOOKUP_TIMEOUT, self.ask_owner(owner, &[id])).await;
            holders.extend(answer.ok().flatten().unwrap_or_default().members());
        }
        holders.sort_unstable();
        holders.dedup();
        holders
    }
}
