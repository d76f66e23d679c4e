//! What a peer does by itself: it announces what is new, renews leases, and drops entries whose lease has run out.

use std::{sync::Arc, time::Instant};

use crate::{
    announce::Announcement,
    limits::{LEASE, LOOKUP_TIMEOUT, MESSAGE_OVERHEAD_BYTES, UPKEEP_EVERY},
    membership::Role,
    node::{Peer, blocking},
    sample::Sampling,
    shard::{SHARDS, ShardId},
    wire::{IndexRequest, IndexResponse},
};
use futures::{StreamExt, stream::FuturesUnordered};

/// How an owner samples its shards.
type Sampled = Vec<(ShardId, Sampling)>;

/// Runs for ever.
pub(crate) async fn run(peer: &Arc<Peer>) {
    tokio::join!(announce(peer), tick(peer));
}

async fn announce(peer: &Arc<Peer>) {
    let mut flying = FuturesUnordered::new();
    let mut more = true;
    loop {
        tokio::select! {
            Some((announcement, taken)) = flying.next() => {
                let announcement: Announcement = announcement;
                let now = Instant::now();
                if let Some(sampled) = taken {
                    peer.counters.announced(announcement.ids.len());
                    peer.announcer().acknowledged(&announcement);
                    peer.sampled(announcement.owner, sampled);
                } else {
                    peer.announcer().failed(&announcement, now);
                }
                more = true;
            }
            // What to tell is chosen when the budget has something, so that it is the newest.
            () = peer.lan.take(0), if more => match next(peer) {
                Some(due) => {
                    peer.lan.settle(0, announcement_bytes(due.ids.len()));
                    flying.push(send(peer, due));
                }
                None => more = false,
            },
            () = peer.news.notified() => more = true,
        }
    }
}

fn next(peer: &Peer) -> Option<Announcement> {
    let now = Instant::now();
    let site = peer.site();
    peer.announcer().next(now, |member| site.answering(member, Role::Owner, now))
}

/// Tells an owner; how it samples its shards if it has taken it.
async fn send(peer: &Arc<Peer>, announcement: Announcement) -> (Announcement, Option<Sampled>) {
    let owner = announcement.owner;
    let Some(to) = peer.directory().get(&owner).map(|known| known.peer_id) else {
        return (announcement, None);
    };
    let request = IndexRequest::Announce { ids: announcement.ids.clone() };
    let answer = tokio::time::timeout(LOOKUP_TIMEOUT, peer.network.index(to, request)).await;
    let taken = match answer {
        Ok(Ok(IndexResponse::Announced { sampled })) => {
            peer.site().answered(owner, Role::Owner);
            Some(sampled)
        }
        Ok(Ok(
            IndexResponse::Holders { .. } | IndexResponse::Digests { .. } | IndexResponse::Claims { .. },
        )) => {
            tracing::warn!(peer = %to, "an owner answered an announcement as if it were a question");
            None
        }
        Ok(Err(error)) => {
            tracing::debug!(peer = %to, %error, "an announcement failed");
            peer.counters.failed_request();
            None
        }
        Err(_) => {
            tracing::info!(peer = %to, "an owner did not answer an announcement; skipping it for a while");
            peer.counters.failed_request();
            peer.site().timed_out(owner, Role::Owner, Instant::now());
            None
        }
    };
    (announcement, taken)
}

/// What an announcement of so many names takes on the LAN: the message, and about as much as streams, encryption and packets add to it.
fn announcement_bytes(ids: usize) -> u64 {
    let message = ids as u64 * 8 + MESSAGE_OVERHEAD_BYTES;
    message + message / 16
}

/// Once a tick: renewals that are due, one shard swept, and a look at what can be tried again.
async fn tick(peer: &Arc<Peer>) {
    let mut interval = tokio::time::interval(UPKEEP_EVERY);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    for shard in ShardId::all().cycle() {
        interval.tick().await;
        let (worker, now) = (Arc::clone(peer), Instant::now());
        let work = move || {
            worker.contents.tidy();
            sweep(&worker, shard, now);
            renew(&worker, now);
        };
        blocking(work).await;
        peer.news.notify_one();
    }
}

fn sweep(peer: &Peer, shard: ShardId, now: Instant) {
    let keep = {
        let site = peer.site();
        site.shards().owners(shard).contains(&site.me())
    };
    peer.owned().sweep(shard, keep, now);
}

fn renew(peer: &Peer, now: Instant) {
    let due = peer.announcer().renewals(now);
    for mut renewal in due {
        {
            let index = peer.contents.index();
            renewal.ids.retain(|id| index.settled(*id));
        }
        peer.announcer().renew(renewal, now);
    }
}

// Each shard is swept at least once within a lease.
const _: () = assert!(SHARDS as u64 * UPKEEP_EVERY.as_secs() < LEASE.as_secs());
