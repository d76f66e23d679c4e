//! The requests of other peers: each waits for its turn ([`crate::fair`]) and makes room for the next when its answer is on the wire. So answers that
//! nobody reads are bounded too. One about the index is answered on a task of its own, one for pages by the thread of its connection.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
};

use libp2p::{
    PeerId,
    request_response::{InboundRequestId, ResponseChannel},
};
use page::PAGE_SIZE;
use tokio::sync::oneshot;

use crate::{
    fair::{Bounds, Fair, Load, Refusal, Refused, Turn},
    limits::{
        PULL_CLAIMS, SERVING, SERVING_BYTES, SERVING_BYTES_EACH, SERVING_EACH, WAITING, WAITING_BYTES,
        WAITING_BYTES_EACH, WAITING_EACH,
    },
    node::Peer,
    wire::{IndexRequest, IndexResponse},
};

/// What a request takes beside its ids and pages, about.
const REQUEST_BYTES: usize = 1024;
/// What a shard of an announcement counts: all of its entries may have to be gone through.
const SHARD_BYTES: usize = 2048;
/// What an id of the index takes in a request and in its answer, about.
const INDEX_ID_BYTES: usize = 32;

/// Names a request; libp2p numbers those about the index, this those for pages.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum RequestId {
    Index(InboundRequestId),
    Pages(u64),
}

/// A request, and where its answer goes or who hears that its turn has come.
pub(crate) enum Ask {
    Index { request: IndexRequest, channel: ResponseChannel<IndexResponse> },
    Pages { pages: usize, turn: oneshot::Sender<()> },
}

impl fmt::Debug for Ask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Index { .. } => "Index",
            Self::Pages { .. } => "Pages",
        })
    }
}

impl Ask {
    /// What it takes of memory until it is answered, about.
    fn bytes(&self) -> usize {
        REQUEST_BYTES
            + match self {
                Self::Index { request, .. } => match request {
                    IndexRequest::Announce(announcement) => {
                        let names = announcement.ids.len() + announcement.gone.len();
                        let shards = announcement.begins.len() + announcement.digests.len();
                        names * INDEX_ID_BYTES + shards * SHARD_BYTES
                    }
                    IndexRequest::Lookup { ids } => ids.len() * INDEX_ID_BYTES,
                    IndexRequest::Digests { .. } => 0,
                    IndexRequest::Claims { holders, .. } => (holders.len() + PULL_CLAIMS) * INDEX_ID_BYTES,
                },
                Self::Pages { pages, .. } => pages * PAGE_SIZE,
            }
    }

    /// Whether whoever asked still waits for the answer.
    fn is_open(&self) -> bool {
        match self {
            Self::Index { channel, .. } => channel.is_open(),
            Self::Pages { turn, .. } => !turn.is_closed(),
        }
    }
}

#[derive(Debug)]
struct State {
    fair: Fair<PeerId, (RequestId, Ask)>,
    /// What is worked on, and answers that are not on the wire yet.
    under_way: HashMap<RequestId, (PeerId, usize)>,
}

/// All requests of other peers.
#[derive(Debug)]
pub(crate) struct Requests {
    state: Mutex<State>,
    /// How many of them were for pages.
    for_pages: AtomicU64,
}

/// The turn of a request for pages. Dropped, it makes room for the next.
#[derive(Debug)]
pub(crate) struct PageTurn {
    peer: Arc<Peer>,
    id: RequestId,
}

impl Drop for PageTurn {
    fn drop(&mut self) {
        self.peer.request_ended(self.id);
    }
}

impl Default for Requests {
    fn default() -> Self {
        let fair = Fair::new(Bounds {
            waiting_each: Load { requests: WAITING_EACH, bytes: WAITING_BYTES_EACH },
            waiting: Load { requests: WAITING, bytes: WAITING_BYTES },
            working_each: Load { requests: SERVING_EACH, bytes: SERVING_BYTES_EACH },
            working: Load { requests: SERVING, bytes: SERVING_BYTES },
        });
        Self { state: Mutex::new(State { fair, under_way: HashMap::new() }), for_pages: AtomicU64::new(0) }
    }
}

impl Requests {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics while it holds this lock")
    }

    /// The next request to answer, noted as under way.
    fn next(&self) -> Option<(PeerId, RequestId, Ask)> {
        let mut state = self.state();
        let Turn { from, bytes, item: (id, ask) } = state.fair.take()?;
        state.under_way.insert(id, (from, bytes));
        Some((from, id, ask))
    }

    /// An answer is on the wire, or never will be; whether it was under way.
    fn ended(&self, id: RequestId) -> bool {
        let mut state = self.state();
        let Some((from, bytes)) = state.under_way.remove(&id) else { return false };
        state.fair.done(&from, bytes);
        true
    }
}

impl Peer {
    /// Takes a request of another peer. One beyond the bounds is dropped, which its asker sees at once.
    pub(crate) fn requested(self: &Arc<Self>, from: PeerId, id: RequestId, ask: Ask) {
        let refused = self.requests.state().fair.offer(from, ask.bytes(), (id, ask));
        for Refused { from, item: (_, ask), why } in refused {
            match why {
                Refusal::Share => self.counters.refused_share(),
                Refusal::Full => self.counters.refused_request(),
            }
            tracing::debug!(%from, ?why, ?ask, "too many requests wait; one is refused");
        }
        self.answer_next();
    }

    /// Waits for the turn of a request for so many pages, on a thread of its own; `None` if it is refused.
    pub(crate) fn page_turn(self: &Arc<Self>, from: PeerId, pages: usize) -> Option<PageTurn> {
        let (turn, comes) = oneshot::channel();
        let id = RequestId::Pages(self.requests.for_pages.fetch_add(1, Ordering::Relaxed));
        self.requested(from, id, Ask::Pages { pages, turn });
        // The sender is dropped if it is refused.
        comes.blocking_recv().ok().map(|()| PageTurn { peer: Arc::clone(self), id })
    }

    /// The answer to a request is on the wire, or the request failed.
    pub(crate) fn request_ended(self: &Arc<Self>, id: RequestId) {
        if self.requests.ended(id) {
            self.answer_next();
        }
    }

    /// Starts to answer what may be answered now.
    fn answer_next(self: &Arc<Self>) {
        while let Some((from, id, ask)) = self.requests.next() {
            // Noted first, looked at then: should it fail in between, its end is heard of.
            if !ask.is_open() {
                self.requests.ended(id);
                continue;
            }
            match ask {
                Ask::Index { request, channel } => {
                    tokio::spawn(Arc::clone(self).answer_index(from, request, channel));
                }
                Ask::Pages { turn, .. } => {
                    if turn.send(()).is_err() {
                        self.requests.ended(id);
                    }
                }
            }
        }
    }
}
