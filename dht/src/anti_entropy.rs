//! Anti-entropy between the owners of a shard: asks the other owner what [`Repair`] says, and answers it.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::{Duration, Instant},
};

use page::ShortId;

use crate::{
    limits::{LOOKUP_TIMEOUT, PULL_CLAIMS, PULL_PARTS, REPAIR_LOOK_EVERY},
    membership::Role,
    node::{Peer, blocking},
    repair::{Ask, ClaimDigest, Repair, What},
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
    // What this owner does not keep it need not learn.
    let sampling = peer.owned().sampling(shard);
    let (request, holders) = match what {
        What::Digests => (IndexRequest::Digests { shard, sampling }, Vec::new()),
        What::Claims { holders, from } => {
            (IndexRequest::Claims { shard, sampling, from, holders: holders.clone() }, holders)
        }
    };
    // What the answer takes is known when it is here; until it is paid for nothing else is asked.
    peer.lan.take(0).await;
    let answer = tokio::time::timeout(LOOKUP_TIMEOUT, peer.network.index(to, request)).await;
    if answer.is_err() {
        tracing::info!(peer = %to, "an owner did not answer about a shard of both; skipping it for a while");
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
        IndexResponse::Digests { sampling, digests } if holders.is_empty() => {
            peer.lan.take(bytes(digests.len(), size_of::<(MemberId, ClaimDigest)>())).await;
            let comparing = Arc::clone(peer);
            let (mine, now) =
                blocking(move || (comparing.digests(shard, sampling, Instant::now()), Instant::now())).await;
            let site = peer.site();
            let wanted = |holder| holder != site.me() && site.contains(holder);
            repair.on_digests(&digests, &mine, wanted, now);
        }
        IndexResponse::Claims { claims, next } if !holders.is_empty() => {
            let count = claims.len();
            peer.lan.take(bytes(count, size_of::<PassedOn>())).await;
            let learning = Arc::clone(peer);
            let learnt = blocking(move || learning.learn(shard, &holders, claims)).await;
            peer.counters.learnt(learnt);
            tracing::debug!(peer = %to, shard = shard.0, count, learnt, "claims from the shard's other owner");
            repair.on_claims(count, next, Instant::now());
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
    /// What each holder's claims in a shard come to, of the names that `sampling` keeps.
    pub(crate) fn digests(
        &self,
        shard: ShardId,
        sampling: Sampling,
        now: Instant,
    ) -> BTreeMap<MemberId, ClaimDigest> {
        let mut digests = BTreeMap::new();
        let mut from = Some(shard.first_id());
        // Part by part, so that others have their turn at the table.
        while let Some(at) = from {
            from = self.owned().digest(shard, at, sampling, now, &mut digests);
        }
        digests
    }

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
        let claim = |(id, holder, left): (ShortId, u16, Duration)| {
            let left_seconds = u16::try_from(left.as_secs()).expect("a lease is bounded below 2^15 seconds");
            PassedOn { id, holder, left_seconds }
        };
        IndexResponse::Claims { claims: found.into_iter().map(claim).collect(), next }
    }

    /// Takes claims of `holders` that another owner of the shard passed on; returns how many are new.
    fn learn(&self, shard: ShardId, holders: &[MemberId], claims: Vec<PassedOn>) -> usize {
        let mut by_holder: HashMap<u16, Vec<(ShortId, Duration)>> = HashMap::new();
        for PassedOn { id, holder, left_seconds } in claims {
            if ShardId::of(id) == shard {
                let left = Duration::from_secs(left_seconds.into());
                by_holder.entry(holder).or_default().push((id, left));
            }
        }
        let now = Instant::now();
        let named =
            by_holder.into_iter().filter_map(|(n, claims)| Some((holders.get(usize::from(n))?, claims)));
        named.map(|(holder, claims)| self.owned().learn(*holder, &claims, now)).sum()
    }
}
