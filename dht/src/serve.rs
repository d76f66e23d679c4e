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
    limits::REQUEST_TIMEOUT,
    network::Command,
    node::{Peer, blocking},
    shard::MemberId,
    wire::{IndexRequest, IndexResponse, PagesRequest, PagesResponse},
};

impl Peer {
    /// Answers about the index, on another task. A request beyond the bounds is dropped, which the asker sees at once.
    pub(crate) fn serve_index(
        self: &Arc<Self>,
        from: PeerId,
        request: IndexRequest,
        channel: ResponseChannel<IndexResponse>,
    ) {
        let Some(place) = self.queue(from) else { return };
        let peer = Arc::clone(self);
        tokio::spawn(async move {
            let turn = peer.serving.acquire().await.expect("the semaphore is never closed");
            let answerer = Arc::clone(&peer);
            let response = blocking(move || answerer.answer_index(from, &request)).await;
            peer.network.respond(Command::RespondIndex { channel, response }).await;
            drop((turn, place));
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

    fn answer_index(&self, from: PeerId, request: &IndexRequest) -> IndexResponse {
        let (now, asker) = (Instant::now(), MemberId::of_peer(&from.to_bytes()));
        match request {
            IndexRequest::Announce { ids } => {
                self.counters.announcement_taken(ids.len());
                self.owned().announce(asker, ids, now);
                IndexResponse::Announced
            }
            IndexRequest::Lookup { ids } => {
                let claims = self.claims(ids, asker, now);
                let directory = self.directory();
                let (mut peers, mut numbers, mut answer) = (Vec::new(), HashMap::new(), Vec::new());
                for (at, member) in claims {
                    let Some(peer) = directory.get(&member).map(|known| known.peer_id) else { continue };
                    let number = *numbers.entry(member).or_insert_with(|| {
                        peers.push(peer);
                        peers.len() - 1
                    });
                    let Ok(number) = u16::try_from(number) else { continue };
                    answer.push((at, number));
                }
                self.counters.lookup_answered(ids.len(), distinct(answer.iter().map(|(at, _)| *at)));
                IndexResponse::Holders { peers, claims: answer }
            }
        }
    }

    /// Who holds `ids` as far as this peer knows: what was announced to it, and its own contents.
    pub(crate) fn claims(&self, ids: &[ShortId], asker: MemberId, now: Instant) -> Vec<(u32, MemberId)> {
        let me = {
            let site = self.site();
            site.me()
        };
        let mut claims: Vec<(u32, MemberId)> = Vec::new();
        {
            let index = self.contents.index();
            claims.extend(
                (0u32..).zip(ids).filter(|(_, id)| index.place(**id).is_some()).map(|(at, _)| (at, me)),
            );
        }
        let site = self.site();
        let owned = self.owned();
        claims.extend(owned.lookup(ids, now, |member| member != asker && site.usable_holder(member, now)));
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
                None => {}
                Some(Fault::WrongBytes) => pages.iter_mut().for_each(|(_, page)| page[0] ^= 0xff),
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
