//! Answers to other peers: as an owner about the index, as a holder with pages.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Instant,
};

use libp2p::{PeerId, request_response::ResponseChannel};
use page::ShortId;
use tokio::sync::OwnedSemaphorePermit;

use crate::{
    config::Fault,
    limits::{HOLDERS_PER_NAME, LOOKUP_TURN, REQUEST_TIMEOUT},
    network::Command,
    node::{Known, Peer, blocking},
    shard::MemberId,
    wire::{Claim, HolderPeer, IndexRequest, IndexResponse, PagesRequest, PagesResponse},
};

/// A claim that this peer knows of.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Named {
    /// The place of the page among those asked about.
    pub(crate) at: u32,
    pub(crate) member: MemberId,
    /// As of [`OwnerTable::each_holder`](crate::lease::OwnerTable::each_holder).
    pub(crate) hearsay: bool,
}

impl Peer {
    /// Answers about the index, on another task. A request beyond the bounds is dropped, which the asker sees at once.
    pub(crate) fn serve_index(
        self: &Arc<Self>,
        from: PeerId,
        request: IndexRequest,
        channel: ResponseChannel<IndexResponse>,
    ) {
        let ids = match &request {
            IndexRequest::Announce { ids } | IndexRequest::Lookup { ids } => ids.len(),
            IndexRequest::Digests { .. } => 0,
            // A holder's key is as long as four ids.
            IndexRequest::Claims { holders, .. } => holders.len() * 4,
        };
        let (Some(place), Some(room)) = (self.queue(from), self.queue_ids(from, ids)) else { return };
        let peer = Arc::clone(self);
        tokio::spawn(async move {
            let turn = peer.serving.acquire().await.expect("the semaphore is never closed");
            let answerer = Arc::clone(&peer);
            let response = blocking(move || answerer.answer_index(from, &request)).await;
            peer.network.respond(Command::RespondIndex { channel, response }).await;
            drop((turn, place, room));
        });
    }

    /// A place among the requests that wait; none is left when others flood this peer.
    fn queue(&self, from: PeerId) -> Option<OwnedSemaphorePermit> {
        let place = Arc::clone(&self.waiting).try_acquire_owned().ok();
        if place.is_none() {
            self.counters.refused_request();
            tracing::debug!(%from, "too many requests wait; one is refused");
        }
        place
    }

    /// Room for the names of a request that waits.
    fn queue_ids(&self, from: PeerId, ids: usize) -> Option<OwnedSemaphorePermit> {
        let ids = u32::try_from(ids).ok()?;
        let room = Arc::clone(&self.waiting_ids).try_acquire_many_owned(ids).ok();
        if room.is_none() {
            self.counters.refused_request();
            tracing::debug!(%from, ids, "too many names wait in requests; one request is refused");
        }
        room
    }

    fn answer_index(&self, from: PeerId, request: &IndexRequest) -> IndexResponse {
        let (now, asker) = (Instant::now(), MemberId::of_peer(&from.to_bytes()));
        match request {
            IndexRequest::Announce { ids } => {
                self.counters.announcement_taken(ids.len());
                self.owned().announce(asker, ids, now);
                IndexResponse::Announced
            }
            IndexRequest::Lookup { ids } => {
                let (peers, claims) = self.named_peers(self.claims(ids, asker, now));
                self.counters.lookup_answered(ids.len(), distinct(claims.iter().map(|claim| claim.at)));
                IndexResponse::Holders { peers, claims }
            }
            IndexRequest::Digests { shard } => {
                IndexResponse::Digests { digests: self.digests(*shard, now).into_iter().collect() }
            }
            IndexRequest::Claims { shard, from, holders } => self.pass_on(*shard, *from, holders, now),
        }
    }

    /// Claims with their holders as peers of an answer.
    fn named_peers(&self, named: Vec<Named>) -> (Vec<HolderPeer>, Vec<Claim>) {
        let me = MemberId::of_peer(&self.me.to_bytes());
        let directory = self.directory();
        let (mut peers, mut numbers, mut claims) = (Vec::new(), HashMap::new(), Vec::new());
        for Named { at, member, hearsay } in named {
            let known = directory.get(&member).map(Known::as_holder);
            let myself = HolderPeer { peer: self.me, address: None };
            let Some(named) = known.or((member == me).then_some(myself)) else { continue };
            let number = *numbers.entry(member).or_insert_with(|| {
                peers.push(named);
                peers.len() - 1
            });
            let Ok(peer) = u16::try_from(number) else { continue };
            claims.push(Claim { at, peer, hearsay });
        }
        (peers, claims)
    }

    /// Who holds `ids` as far as this peer knows: what was announced to it, and its own contents; at most [`HOLDERS_PER_NAME`] for each.
    pub(crate) fn claims(&self, ids: &[ShortId], asker: MemberId, now: Instant) -> Vec<Named> {
        let me = {
            let site = self.site();
            site.me()
        };
        let mut claims: Vec<Named> = Vec::new();
        // In turns, so that a long lookup does not keep others from the tables.
        for (ids, first) in ids.chunks(LOOKUP_TURN).zip((0u32..).step_by(LOOKUP_TURN)) {
            let mut named: Vec<usize> = {
                let index = self.contents.index();
                ids.iter().map(|id| usize::from(index.place(*id).is_some())).collect()
            };
            let here = (first..).zip(&named).filter(|(_, here)| **here > 0);
            claims.extend(here.map(|(at, _)| Named { at, member: me, hearsay: false }));
            let site = self.site();
            let usable = |member| member != asker && site.usable_holder(member, now);
            self.owned().each_holder(ids, now, usable, |at, member, hearsay| {
                let named = &mut named[at as usize];
                *named += 1;
                if *named <= HOLDERS_PER_NAME {
                    claims.push(Named { at: first + at, member, hearsay });
                }
            });
        }
        claims
    }

    /// Serves pages, on another task.
    pub(crate) fn serve_pages(
        self: &Arc<Self>,
        from: PeerId,
        request: PagesRequest,
        channel: ResponseChannel<PagesResponse>,
    ) {
        let Some(place) = self.queue(from) else { return };
        let peer = Arc::clone(self);
        tokio::spawn(async move {
            let turn = peer.serving.acquire().await.expect("the semaphore is never closed");
            let contents = Arc::clone(&peer.contents);
            let mut pages = blocking(move || contents.read_pages(&request.ids)).await;
            match peer.fault {
                None | Some(Fault::OldOwners) => {}
                Some(Fault::WrongBytes) => pages.for_each_mut(|page| page[0] ^= 0xff),
                Some(Fault::AnnounceFalse) => pages.retain(|_, _| false),
                Some(Fault::Silent) => {
                    // Kept open until the asker has long given up.
                    tokio::time::sleep(REQUEST_TIMEOUT).await;
                    return;
                }
                Some(Fault::Slow(delay)) => tokio::time::sleep(delay).await,
            }
            peer.counters.served(pages.len());
            peer.network.respond(Command::RespondPages { channel, response: PagesResponse { pages } }).await;
            drop((turn, place));
        });
    }
}

/// How many of a lookup's ids an answer names a holder of.
pub(crate) fn distinct(places: impl Iterator<Item = u32>) -> usize {
    places.collect::<HashSet<_>>().len()
}
