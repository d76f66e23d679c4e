//! What a peer does by itself: it announces what is new and what is gone, renews leases, and drops what others' leases have run out on.

use std::{sync::Arc, time::Instant};

use crate::{
    announce::Due,
    claims::Announcement,
    limits::{LOOKUP_TIMEOUT, MESSAGE_OVERHEAD_BYTES, UPKEEP_EVERY},
    membership::Role,
    node::{Peer, blocking},
    sample::Sampling,
    shard::{SHARDS, ShardId},
    wire::{IndexRequest, IndexResponse},
};
use futures::{StreamExt, stream::FuturesUnordered};

/// Runs for ever.
pub(crate) async fn run(peer: &Arc<Peer>) {
    tokio::join!(announce(peer), tick(peer));
}

async fn announce(peer: &Arc<Peer>) {
    let mut flying = FuturesUnordered::new();
    let mut more = true;
    loop {
        tokio::select! {
            Some((due, answer)) = flying.next() => {
                ended(peer, &due, answer);
                more = true;
            }
            // What to tell is chosen when the budget has something, so that it is the newest.
            () = peer.lan.take(0), if more => match next(peer) {
                Some(due) => {
                    let bytes = announcement_bytes(&due.announcement);
                    peer.lan.settle(0, bytes);
                    peer.counters.announcement_sent(bytes);
                    flying.push(send(peer, due));
                }
                None => more = false,
            },
            () = peer.news.notified() => more = true,
        }
    }
}

fn next(peer: &Peer) -> Option<Due> {
    let now = Instant::now();
    let site = peer.site();
    peer.announcer().next(now, |member| site.answering(member, Role::Owner, now))
}

/// What an owner answers to an announcement that it has taken.
struct Answer {
    /// How it samples its shards.
    sampled: Vec<(ShardId, Sampling)>,
    /// The shards that it asks for anew.
    anew: Vec<ShardId>,
}

/// Takes the answer to an announcement, or that there is none.
fn ended(peer: &Peer, due: &Due, answer: Option<Answer>) {
    let now = Instant::now();
    match answer {
        Some(Answer { sampled, anew }) => {
            let renewed = due.announcement.digests.len().saturating_sub(anew.len());
            peer.counters.announced(due.announcement.ids.len(), renewed, anew.len());
            peer.announcer().acknowledged(due, &anew, now);
            peer.sampled(due.owner, sampled);
        }
        None => peer.announcer().failed(due, now),
    }
}

/// Tells an owner; returns its answer if it has taken it.
async fn send(peer: &Arc<Peer>, due: Due) -> (Due, Option<Answer>) {
    let owner = due.owner;
    let Some(to) = peer.directory().get(&owner).map(|known| known.peer_id) else {
        return (due, None);
    };
    let request = IndexRequest::Announce(due.announcement.clone());
    let answer = tokio::time::timeout(LOOKUP_TIMEOUT, peer.network.index(to, request)).await;
    let answer = match answer {
        Ok(Ok(IndexResponse::Announced { sampled, anew })) => {
            peer.site().answered(owner, Role::Owner);
            Some(Answer { sampled, anew })
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
            let address = peer.address_of(&to);
            tracing::info!(peer = %to, %address, "an owner did not answer an announcement; skipping it for a while");
            peer.counters.failed_request();
            peer.site().timed_out(owner, Role::Owner, Instant::now());
            None
        }
    };
    (due, answer)
}

/// What an announcement takes on the LAN: the message, and about as much as streams, encryption and packets add to it.
fn announcement_bytes(announcement: &Announcement) -> u64 {
    let message = announcement.bytes() as u64 + MESSAGE_OVERHEAD_BYTES;
    message + message / 16
}

/// Once a tick: shards swept, logs reviewed, and a look at what can be tried again.
async fn tick(peer: &Arc<Peer>) {
    let mut interval = tokio::time::interval(UPKEEP_EVERY);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut strange = vec![false; SHARDS];
    for shard in ShardId::all().cycle() {
        interval.tick().await;
        let (worker, now) = (Arc::clone(peer), Instant::now());
        let was_strange = strange[shard.index()];
        let work = move || {
            worker.contents.tidy();
            worker.page_client.tidy(now);
            let owned = sweep(&worker, shard, was_strange, now);
            review(&worker, now);
            !owned
        };
        strange[shard.index()] = blocking(work).await;
        peer.news.notify_one();
    }
}

/// Drops what has run out. A shard in turn is looked at as a whole: one that is owned neither now nor was at its last turn goes then. Not before: when
/// members come and go, holders see this peer as an owner earlier than it does itself, and would not tell again what they have told. Says whether
/// the shard is owned.
fn sweep(peer: &Peer, turn: ShardId, was_strange: bool, now: Instant) -> bool {
    let owned = {
        let site = peer.site();
        site.shards().owners(turn).contains(&site.me())
    };
    peer.owned().sweep(turn, owned || !was_strange, now);
    let run_out = peer.owned().run_out(now);
    // One at a time, so that others have their turn at the table.
    run_out.into_iter().for_each(|shard| peer.owned().sweep(shard, true, now));
    owned
}

/// Looks whether the host still holds the names that are announced.
fn review(peer: &Peer, now: Instant) {
    let due = peer.announcer().reviews(now);
    for mut review in due {
        {
            let index = peer.contents.index();
            review.ids.retain(|id| index.settled(*id));
        }
        peer.announcer().reviewed(review, now);
    }
}
