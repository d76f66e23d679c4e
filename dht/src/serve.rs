//! Answers to other peers: as an owner about the index, as a holder with pages.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Instant,
};

use libp2p::{PeerId, request_response::ResponseChannel};
use page::ShortId;

use crate::{
    batch::PageBatch,
    config::Fault,
    known::Known,
    limits::{HOLDERS_PER_NAME, LOOKUP_TURN, REQUEST_TIMEOUT},
    node::{Peer, blocking},
    shard::MemberId,
    wire::{Claim, HolderPeer, IndexRequest, IndexResponse},
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

/// What comes of a request for pages.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Served {
    /// Its pages are to be sent.
    Pages,
    /// Nothing, ever.
    Silence,
}

impl Peer {
    /// Answers a question about the index.
    pub(crate) async fn answer_index(
        self: Arc<Self>,
        from: PeerId,
        request: IndexRequest,
        channel: ResponseChannel<IndexResponse>,
    ) {
        let answerer = Arc::clone(&self);
        let response = blocking(move || answerer.index_answer(from, &request)).await;
        self.network.respond(channel, response).await;
    }

    fn index_answer(&self, from: PeerId, request: &IndexRequest) -> IndexResponse {
        let (now, asker) = (Instant::now(), MemberId::of_peer(&from.to_bytes()));
        match request {
            IndexRequest::Announce(announcement) => {
                self.counters.announcement_taken(announcement.ids.len());
                let mut owned = self.owned();
                let anew = owned.hear(asker, announcement, now);
                IndexResponse::Announced { sampled: owned.samplings(), anew }
            }
            IndexRequest::Lookup { ids } => {
                let (peers, claims) = self.named_peers(self.claims(ids, asker, now));
                self.counters.lookup_answered(ids.len(), distinct(claims.iter().map(|claim| claim.at)));
                IndexResponse::Holders { sampled: self.owned().samplings(), peers, claims }
            }
            IndexRequest::Digests { shard } => {
                IndexResponse::Digests { shares: self.owned().shares(*shard, now) }
            }
            IndexRequest::Claims { shard, sampling, from, holders } => {
                self.pass_on((*shard, *sampling), *from, holders, now)
            }
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

    /// Puts those of the pages that this host has into `pages`, unless it is to be silent by its fault. Blocks.
    pub(crate) fn serve_pages(&self, ids: &[ShortId], pages: &mut PageBatch) -> Served {
        pages.clear();
        self.contents.read_pages_into(ids, pages);
        match self.fault {
            None | Some(Fault::Flood | Fault::OldOwners) => {}
            Some(Fault::WrongBytes) => pages.for_each_mut(|page| page[0] ^= 0xff),
            Some(Fault::AnnounceFalse) => pages.retain(|_, _| false),
            Some(Fault::Silent) => {
                // Kept open until the asker has long given up.
                std::thread::sleep(REQUEST_TIMEOUT);
                return Served::Silence;
            }
            Some(Fault::Slow(delay)) => std::thread::sleep(delay),
        }
        self.counters.served(pages.len());
        Served::Pages
    }
}

/// How many of a lookup's ids an answer names a holder of.
pub(crate) fn distinct(places: impl Iterator<Item = u32>) -> usize {
    places.collect::<HashSet<_>>().len()
}
