//! Serving pages on connections of their own, a thread a connection.
//!
//! A request waits for its turn like any other of its peer's ([`crate::requests`]). Then the thread that took it reads the pages, checks, encrypts and
//! sends them. What a connection takes of memory is its one answer's pages, and these are dropped soon after.

use std::{
    collections::BTreeMap,
    io,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use libp2p::PeerId;
use tokio::{runtime::Handle, sync::mpsc};

use crate::{
    batch::PageBatch,
    limits::{
        PAGE_CONNECTION_IDLE, PAGE_CONNECTION_LOOK, PAGE_CONNECTIONS, PAGE_CONNECTIONS_EACH,
        PAGE_STACK_BYTES, REQUEST_TIMEOUT,
    },
    node::{Peer, lock},
    page_connection::{PageConnection, PageError},
    serve::Served,
};

/// The connections that other peers have made for pages.
#[derive(Debug, Default)]
struct Open(Mutex<BTreeMap<PeerId, usize>>);

impl Open {
    /// Room for a connection of a peer.
    fn take(self: &Arc<Self>, peer: PeerId) -> Result<Room, Refused> {
        let mut open = lock(&self.0);
        if open.values().sum::<usize>() >= PAGE_CONNECTIONS {
            return Err(Refused::Full);
        }
        let own = open.entry(peer).or_default();
        if *own >= PAGE_CONNECTIONS_EACH {
            return Err(Refused::Share);
        }
        *own += 1;
        Ok(Room { open: Arc::clone(self), peer })
    }
}

/// Why a connection for pages is refused.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Refused {
    /// There are too many.
    Full,
    /// Its peer has too many.
    Share,
}

/// A connection's place among those that there may be.
#[derive(Debug)]
struct Room {
    open: Arc<Open>,
    peer: PeerId,
}

impl Drop for Room {
    fn drop(&mut self) {
        let mut open = lock(&self.open.0);
        if let Some(own) = open.get_mut(&self.peer) {
            *own -= 1;
            if *own == 0 {
                open.remove(&self.peer);
            }
        }
    }
}

/// Takes connections for as long as there are senders.
pub(crate) async fn run(peer: &Arc<Peer>, mut arrivals: mpsc::Receiver<PageConnection>) {
    let open = Arc::new(Open::default());
    while let Some(connection) = arrivals.recv().await {
        let from = connection.peer();
        match open.take(from) {
            Ok(room) => {
                if let Err(error) = start(peer, connection, room) {
                    tracing::warn!(%error, "no thread can be had for a connection for pages; it is closed");
                }
            }
            Err(why) => {
                match why {
                    Refused::Full => peer.counters.connection_over_limit(),
                    Refused::Share => peer.counters.refused_share(),
                }
                tracing::debug!(peer = %from, ?why, "too many connections for pages; one is refused");
            }
        }
    }
}

fn start(peer: &Arc<Peer>, connection: PageConnection, room: Room) -> io::Result<()> {
    let (peer, runtime) = (Arc::clone(peer), Handle::current());
    let thread = std::thread::Builder::new().name("pages".to_owned()).stack_size(PAGE_STACK_BYTES);
    let work = move || {
        // Other requests, whose turn it is when one of this connection's ends, are answered on tasks.
        let _runtime = runtime.enter();
        let from = connection.peer();
        match serve(&peer, connection) {
            Ok(()) | Err(PageError::Closed) => {}
            Err(error) => {
                if matches!(error, PageError::Malformed(_) | PageError::Tls(_)) {
                    peer.counters.malformed_request();
                }
                let error = &error as &dyn std::error::Error;
                tracing::debug!(peer = %from, error, "a connection for pages ended");
            }
        }
        drop(room);
    };
    thread.spawn(work).map(drop)
}

/// Serves a connection until it is closed, or has been idle for [`PAGE_CONNECTION_IDLE`].
fn serve(peer: &Arc<Peer>, mut connection: PageConnection) -> Result<(), PageError> {
    let by = || Instant::now() + REQUEST_TIMEOUT;
    connection.greeted(peer.domain().id(), by())?;
    let mut pages = PageBatch::default();
    let mut idle = Duration::ZERO;
    while idle < PAGE_CONNECTION_IDLE {
        if !connection.asked()? {
            idle += PAGE_CONNECTION_LOOK;
            pages = PageBatch::default();
            continue;
        }
        idle = Duration::ZERO;
        let ids = connection.request(by())?;
        let Some(turn) = peer.page_turn(connection.peer(), ids.len()) else {
            connection.refuse(by())?;
            continue;
        };
        match peer.serve_pages(&ids, &mut pages) {
            Served::Pages => connection.answer(&pages, by())?,
            Served::Silence => return Ok(()),
        }
        drop(turn);
    }
    Ok(())
}

#[cfg(test)]
#[path = "page_server_tests.rs"]
mod tests;
