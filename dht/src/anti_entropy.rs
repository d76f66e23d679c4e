//! Anti-entropy between the owners of a shard: asks the other owner what [`Repair`] says, and answers it.

use std::{collections::HashMap, sync::Arc, time::Instant};

use page::ShortId;

use crate::{
    claims::ShareDigest,
    limits::{LOOKUP_TIMEOUT, PULL_CLAIMS, PULL_PARTS, REPAIR_LOOK_EVERY},
    membership::Role,
    node::{Peer, blocking},
    repair::{Ask, Repair, What},
    sample::Sampling,
    shard::{MemberId, ShardId},
    wire::{IndexRequest, IndexResponse, PassedOn},
};

/// Runs for ever.
pub(crate) async fn run(peer: &Arc<Peer>) {
    let mut repair = Repair::new(Instant::now());
    let mut known = None;
    let mut interval = tokio::time::interval(REPAIR_LOOK_EVERY);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        while let Some(ask) = next(peer, &mut repair, &mut known) {
            if make(peer, &mut repair, ask).await.is_none() {
                peer.counters.failed_request();
                repair.on_failed(Instant::now());
            }
        }
    }
}

/// The next request; `known` is the version of the membership that the repair knows.
fn next(peer: &Peer, repair: &mut Repair, known: &mut Option<u64>) -> Option<Ask> {
    let now = Instant::now();
    let site = peer.site();
    if *known != Some(site.version()) {
        *known = Some(site.version());
        repair.set_owners(site.shards(), site.me(), now);
    }
    repair.next(now, |member| site.answering(member, Role::Owner, now))
}

/// Makes a request and hands its answer to the repair; `None` if there was none.
async fn make(peer: &Arc<Peer>, repair: &mut Repair, ask: Ask) -> Option<()> {
    let Ask { owner, shard, what } = ask;
    let to = peer.directory().get(&owner)?.peer_id;
    let (request, shares) = match what {
        What::Digests => (IndexRequest::Digests { shard }, Vec::new()),
        What::Claims { shares, from } => {
            if from == shard.first_id() {
                peer.owned().begin_learning(shard, &shares, Instant::now());
            }
            let holders = shares.iter().map(|share| share.holder).collect();
            // What this owner does not keep it need not learn.
            let sampling = peer.owned().sampling(shard);
            (IndexRequest::Claims { shard, sampling, from, holders }, shares)
        }
    };
    // What the answer takes is known when it is here; until it is paid for nothing else is asked.
    peer.lan.take(0).await;
    let answer = tokio::time::timeout(LOOKUP_TIMEOUT, peer.network.index(to, request)).await;
    if answer.is_err() {
        let address = peer.address_of(&to);
        tracing::info!(peer = %to, %address, "an owner did not answer about a shard of both; skipping it for a while");
        peer.site().timed_out(owner, Role::Owner, Instant::now());
    }
    let response = match answer.ok()? {
        Ok(response) => response,
        Err(error) => {
            tracing::debug!(peer = %to, %error, "a request about a shard of both failed");
            return None;
        }
    };
    match response {
        IndexResponse::Digests { shares: mut theirs } if shares.is_empty() => {
            peer.lan.take(bytes(theirs.len(), size_of::<ShareDigest>())).await;
            let all = theirs.len();
            {
                let site = peer.site();
                theirs.retain(|share| share.holder != site.me() && site.contains(share.holder));
            }
            let left_out = theirs.len() < all;
            let now = Instant::now();
            let unlike = peer.owned().unlike(shard, &theirs, now);
            repair.on_digests(unlike, left_out, now);
        }
        IndexResponse::Claims { claims, next } if !shares.is_empty() => {
            let count = claims.len();
            peer.lan.take(bytes(count, size_of::<PassedOn>())).await;
            let (learning, of) = (Arc::clone(peer), shares.clone());
            let learnt = blocking(move || learning.learn(shard, &of, claims)).await;
            peer.counters.learnt(learnt);
            tracing::debug!(peer = %to, shard = shard.0, count, learnt, "claims from the shard's other owner");
            if repair.on_claims(count, next, Instant::now()) {
                peer.owned().learnt(shard, &shares);
            }
        }
        IndexResponse::Announced { .. }
        | IndexResponse::Holders { .. }
        | IndexResponse::Digests { .. }
        | IndexResponse::Claims { .. } => {
            tracing::warn!(peer = %to, "an owner answered another question than it was asked");
            return None;
        }
    }
    Some(())
}

fn bytes(items: usize, size: usize) -> u64 {
    items as u64 * size as u64
}

impl Peer {
    /// Answers another owner of a shard.
    pub(crate) fn pass_on(
        &self,
        (shard, sampling): (ShardId, Sampling),
        from: ShortId,
        holders: &[MemberId],
        now: Instant,
    ) -> IndexResponse {
        let (mut found, mut next) = (Vec::new(), Some(from.max(shard.first_id())));
        for _ in 0..PULL_PARTS {
            let Some(at) = next.filter(|at| ShardId::of(*at) == shard) else { break };
            next = self.owned().claims((shard, sampling), at, holders, now, PULL_CLAIMS, &mut found);
            if next == Some(at) {
                // There is no room for its claims in this answer.
                break;
            }
        }
        self.counters.passed_on(found.len());
        let claims = found.into_iter().map(|(id, holder)| PassedOn { id, holder }).collect();
        IndexResponse::Claims { claims, next }
    }

    /// Takes claims that another owner of the shard passed on; returns how many are new.
    fn learn(&self, shard: ShardId, shares: &[ShareDigest], claims: Vec<PassedOn>) -> usize {
        let mut by_holder: HashMap<u16, Vec<ShortId>> = HashMap::new();
        for PassedOn { id, holder } in claims {
            by_holder.entry(holder).or_default().push(id);
        }
        let named = by_holder.into_iter().filter_map(|(n, ids)| Some((shares.get(usize::from(n))?, ids)));
        named.map(|(share, ids)| self.owned().learn(shard, share.holder, &ids)).sum()
    }
}
