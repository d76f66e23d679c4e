//! The fault `flood`: a peer that sends page and index requests as fast as it can, to test that others do not suffer.

use std::sync::Arc;

use futures::{FutureExt, StreamExt, future::BoxFuture, stream::FuturesUnordered};
use libp2p::{Multiaddr, PeerId};
use page::ShortId;

use crate::{
    limits::{FETCH_BATCH, FLOOD_IN_FLIGHT, UPKEEP_EVERY},
    node::Peer,
    wire::IndexRequest,
};

/// Runs for ever.
pub(crate) async fn run(peer: &Arc<Peer>) {
    loop {
        let others: Vec<(PeerId, Vec<Multiaddr>)> =
            peer.directory().values().map(|known| (known.peer_id, known.addresses.clone())).collect();
        let ids: Vec<ShortId> = peer.contents.index().ids().take(FETCH_BATCH).collect();
        if others.is_empty() || ids.is_empty() {
            // There is nobody to flood, or nothing to flood with: its operator brings it.
            tokio::time::sleep(UPKEEP_EVERY).await;
            continue;
        }
        let mut flying: FuturesUnordered<BoxFuture<'_, ()>> = FuturesUnordered::new();
        // A quarter of what each of them gets is about the index.
        let rounds = (0..FLOOD_IN_FLIGHT).flat_map(|n| others.iter().map(move |to| (to, n % 4 == 0)));
        flying.extend(rounds.map(|(to, index)| request(peer, to, &ids, index)));
        while flying.next().await.is_some() {}
    }
}

fn request<'a>(
    peer: &'a Peer,
    (to, addresses): &'a (PeerId, Vec<Multiaddr>),
    ids: &'a [ShortId],
    index: bool,
) -> BoxFuture<'a, ()> {
    // What comes of it is of no interest.
    if index {
        async move { drop(peer.network.index(*to, IndexRequest::Lookup { ids: ids.to_vec() }).await) }.boxed()
    } else {
        async move { drop(peer.page_client.fetch(*to, addresses, ids, |_, _| true).await) }.boxed()
    }
}
