//! Anti-entropy: the owners of a shard make good what one of them was not told.
//!
//! ```text
//!          a shard is due            digests differ
//! resting ───────────────► comparing ─────────────► pulling, a batch at a time
//!    ▲                         │ alike, or failed       │ all taken, or failed
//!    └─────────────────────────┴────────────────────────┘
//! ```
//!
//! An owner asks the shard's other owner for a digest of each holder's claims, and where it is unlike its own it pulls that holder's claims. So an
//! owner that came late has its shard without waiting for every holder's next renewal. Only claims with at least half a lease left are
//! compared: holders renew earlier, so what has less is on its way out. What is learnt keeps the end of its lease. It is marked as hearsay,
//! and never speaks against the holder that it names: an owner that lies must not put others in doubt. Claims of holders that are
//! no members are not taken.
//!
//! Pure: time comes in as `now`. One request is out at a time, and claims are pulled within a budget.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use page::ShortId;

use crate::{
    budget::Bucket,
    limits::{
        PULL_CLAIMS, PULLS_PER_ROUND, REPAIR_AFTER, REPAIR_CLAIMS_PER_SECOND, REPAIR_EVERY, REPAIR_RETRY,
    },
    shard::{MemberId, ShardId, ShardMap},
};

/// A digest of the claims of one holder in a shard: equal for equal sets of ids, whatever their order. It finds what was lost; who
/// means to deceive can make digests equal, and gains no more by it than by keeping silent.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ClaimDigest {
    /// How many.
    pub claims: u32,
    /// The sum of a mix of each id.
    pub sum: u128,
}

/// The finaliser of splitmix64 (Steele et al. 2014).
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl ClaimDigest {
    /// Adds an id.
    pub fn add(&mut self, id: ShortId) {
        let (high, low) = (mix(id.0), mix(id.0 ^ 0x9e37_79b9_7f4a_7c15));
        self.join(Self { claims: 1, sum: u128::from(high) << 64 | u128::from(low) });
    }

    /// Adds the ids of another digest, which has none in common with this one.
    pub fn join(&mut self, other: Self) {
        self.claims = self.claims.saturating_add(other.claims);
        self.sum = self.sum.wrapping_add(other.sum);
    }
}

/// A request to the other owner of a shard.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ask {
    /// The owner.
    pub owner: MemberId,
    /// The shard.
    pub shard: ShardId,
    /// For what.
    pub what: What,
}

/// What the other owner is asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum What {
    /// The digests of all holders.
    Digests,
    /// The claims of some holders.
    Claims {
        /// The holders.
        holders: Vec<MemberId>,
        /// The first id.
        from: ShortId,
    },
}

#[derive(Debug)]
struct Shard {
    others: Vec<MemberId>,
    due: Instant,
}

/// What is left to pull of a shard.
#[derive(Debug)]
struct Pull {
    ask: Ask,
    batches: u32,
    /// Not everything that differs could be taken.
    left_out: bool,
}

/// The repair of all shards that a peer owns.
#[derive(Debug)]
pub struct Repair {
    shards: BTreeMap<ShardId, Shard>,
    /// What is out.
    asked: Option<Ask>,
    pull: Option<Pull>,
    budget: Bucket,
}

impl Repair {
    /// Nothing owned yet.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        let budget = Bucket::new(REPAIR_CLAIMS_PER_SECOND, PULL_CLAIMS as u64, now);
        Self { shards: BTreeMap::new(), asked: None, pull: None, budget }
    }

    /// Takes the owners of all shards. A shard that this peer had not owned with the same others is due soon: not at once, for the
    /// holders that are connected tell a new owner themselves.
    pub fn set_owners(&mut self, map: &ShardMap, me: MemberId, now: Instant) {
        for shard in ShardId::all() {
            let owners = map.owners(shard);
            let others: Vec<MemberId> = owners.iter().copied().filter(|owner| *owner != me).collect();
            if others.len() == owners.len() || others.is_empty() {
                self.shards.remove(&shard);
            } else if self.shards.get(&shard).is_none_or(|known| known.others != others) {
                self.shards.insert(shard, Shard { others, due: now + REPAIR_AFTER });
            }
        }
    }

    /// The next request that is due to an owner that is `answering`; none while one is out.
    pub fn next(&mut self, now: Instant, answering: impl Fn(MemberId) -> bool) -> Option<Ask> {
        if self.asked.is_some() || self.budget.wait(now) > Duration::ZERO {
            return None;
        }
        let ask = match &self.pull {
            Some(pull) => pull.ask.clone(),
            None => self.next_due(now, answering)?,
        };
        self.asked = Some(ask.clone());
        Some(ask)
    }

    fn next_due(&mut self, now: Instant, answering: impl Fn(MemberId) -> bool) -> Option<Ask> {
        let due = self.shards.iter_mut().filter(|(_, shard)| shard.due <= now);
        for (id, shard) in due {
            let owner = shard.others.iter().copied().find(|owner| answering(*owner));
            match owner {
                Some(owner) => return Some(Ask { owner, shard: *id, what: What::Digests }),
                None => shard.due = now + REPAIR_RETRY,
            }
        }
        None
    }

    /// The other owner's digests came; `mine` are this peer's, and `wanted` says whose claims are worth having.
    pub fn on_digests(
        &mut self,
        theirs: &[(MemberId, ClaimDigest)],
        mine: &BTreeMap<MemberId, ClaimDigest>,
        wanted: impl Fn(MemberId) -> bool,
        now: Instant,
    ) {
        let Some(ask) = self.asked.take() else { return };
        let unlike = theirs.iter().filter(|(holder, digest)| mine.get(holder) != Some(digest));
        let (holders, others): (Vec<_>, Vec<_>) =
            unlike.map(|(holder, _)| *holder).partition(|holder| wanted(*holder));
        let left_out = !others.is_empty();
        if holders.is_empty() {
            self.rest(ask.shard, left_out, now);
            return;
        }
        let what = What::Claims { holders, from: ask.shard.first_id() };
        self.pull = Some(Pull { ask: Ask { what, ..ask }, batches: 0, left_out });
    }

    /// Claims came, `count` of them; more of them begin at `next`.
    pub fn on_claims(&mut self, count: usize, next: Option<ShortId>, now: Instant) {
        let (Some(ask), Some(mut pull)) = (self.asked.take(), self.pull.take()) else { return };
        self.budget.take(count as u64, now);
        pull.batches += 1;
        match (&mut pull.ask.what, next) {
            // It must go forward, and come to an end.
            (What::Claims { from, .. }, Some(next))
                if next > *from && ShardId::of(next) == ask.shard && pull.batches < PULLS_PER_ROUND =>
            {
                *from = next;
                self.pull = Some(pull);
            }
            (What::Claims { .. } | What::Digests, _) => self.rest(ask.shard, pull.left_out, now),
        }
    }

    /// The request failed: its shard is left alone for a while.
    pub fn on_failed(&mut self, now: Instant) {
        self.pull = None;
        if let Some(ask) = self.asked.take() {
            self.rest(ask.shard, true, now);
        }
    }

    fn rest(&mut self, shard: ShardId, soon: bool, now: Instant) {
        if let Some(shard) = self.shards.get_mut(&shard) {
            shard.due = now + if soon { REPAIR_RETRY } else { REPAIR_EVERY };
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::{lease::OwnerTable, limits::LEASE, sample::Sampling};

    fn member(n: u8) -> MemberId {
        MemberId::of_peer(&[n])
    }

    fn map(members: &[u8]) -> ShardMap {
        ShardMap::new(&members.iter().map(|n| member(*n)).collect())
    }

    /// Lets `me` repair from `other` until nothing is due; returns how many entries it learnt and how many requests it made.
    fn run(
        repair: &mut Repair,
        me: &mut OwnerTable,
        other: &OwnerTable,
        now: &mut Instant,
    ) -> (usize, usize) {
        let (mut learnt, mut asked) = (0, 0);
        let end = *now + REPAIR_EVERY;
        while *now < end {
            let Some(Ask { shard, what, .. }) = repair.next(*now, |_| true) else {
                *now += Duration::from_secs(1);
                continue;
            };
            asked += 1;
            match what {
                What::Digests => {
                    let (theirs, mine) = (digests(other, shard, *now), digests(me, shard, *now));
                    let theirs: Vec<_> = theirs.into_iter().collect();
                    repair.on_digests(&theirs, &mine, |holder| holder != member(9), *now);
                }
                What::Claims { holders, from } => {
                    let mut claims = Vec::new();
                    let next = other.claims((shard, Sampling::ALL), from, &holders, *now, 20, &mut claims);
                    assert!(claims.len() <= 20);
                    for (id, holder, left) in &claims {
                        learnt += me.learn(holders[usize::from(*holder)], &[(*id, *left)], *now);
                    }
                    repair.on_claims(claims.len(), next, *now);
                }
            }
        }
        (learnt, asked)
    }

    fn digests(table: &OwnerTable, shard: ShardId, now: Instant) -> BTreeMap<MemberId, ClaimDigest> {
        let mut digests = BTreeMap::new();
        let mut from = Some(shard.first_id());
        while let Some(at) = from {
            from = table.digest(shard, at, Sampling::ALL, now, &mut digests);
        }
        digests
    }

    proptest! {
        /// Whatever two owners were told, after one round the one that pulls knows what the other does, but of the holders it does not want;
        /// the round after that finds nothing to do.
        #[test]
        fn an_owner_learns_what_the_other_knows(
            told in prop::collection::vec((0u8..3, 0u8..4, 0u64..1 << 60, any::<bool>(), any::<bool>()), 0..200),
        ) {
            let start = Instant::now();
            let mut now = start;
            let (mut me, mut other) = (OwnerTable::new(start), OwnerTable::new(start));
            let mut known = BTreeSet::new();
            for (shard, holder, low, to_me, to_other) in told {
                let holder = if holder == 3 { member(9) } else { member(holder) };
                let id = ShortId(u64::from(shard) << 56 | low >> 8);
                if to_me { me.announce(holder, &[id], now); }
                if to_other {
                    other.announce(holder, &[id], now);
                    if holder != member(9) { known.insert((id, holder)); }
                }
            }
            let mut repair = Repair::new(now);
            repair.set_owners(&map(&[10, 11]), member(10), now);
            run(&mut repair, &mut me, &other, &mut now);
            for (id, holder) in &known {
                let found = me.lookup(&[*id], start, |_| true);
                prop_assert!(found.len() == 4 || found.iter().any(|(_, who)| who == holder));
            }
            // Renewed at its holders' pace, the rest is alike.
            prop_assert_eq!(run(&mut repair, &mut me, &other, &mut now).0, 0);
        }

        #[test]
        fn a_digest_is_the_same_in_any_order_and_another_for_other_ids(mut ids in prop::collection::btree_set(any::<u64>(), 1..50), more in any::<u64>()) {
            let digest = |ids: &mut dyn Iterator<Item = u64>| {
                let mut digest = ClaimDigest::default();
                ids.for_each(|id| digest.add(ShortId(id)));
                digest
            };
            let forward = digest(&mut ids.iter().copied());
            prop_assert_eq!(forward, digest(&mut ids.iter().rev().copied()));
            if ids.insert(more) {
                let last = *ids.first().unwrap();
                let swapped = digest(&mut ids.iter().copied().filter(|id| *id != last));
                prop_assert!(swapped != forward || last == more);
            }
        }
    }

    fn pass_on(from: &OwnerTable, to: &mut OwnerTable, now: Instant) {
        let mut claims = Vec::new();
        from.claims((ShardId(0), Sampling::ALL), ShortId(0), &[member(1)], now, 10, &mut claims);
        for (id, _, left) in claims {
            to.learn(member(1), &[(id, left)], now);
        }
    }

    #[test]
    fn what_is_learnt_ends_when_it_would_have_ended_and_grows_no_older_by_being_passed_on() {
        let start = Instant::now();
        let (mut a, mut b) = (OwnerTable::new(start), OwnerTable::new(start));
        a.announce(member(1), &[ShortId(5)], start);
        let mut now = start + LEASE / 4;
        for _ in 0..20 {
            pass_on(&a, &mut b, now);
            pass_on(&b, &mut a, now);
            now += Duration::from_secs(3);
        }
        let found = |table: &OwnerTable, at| !table.lookup(&[ShortId(5)], at, |_| true).is_empty();
        assert!(found(&b, now));
        let end = start + LEASE + Duration::from_secs(4);
        assert!(!found(&a, end) && !found(&b, end));
        // Even from an owner that promises more.
        b.learn(member(1), &[(ShortId(6), LEASE * 100)], start);
        assert!(b.lookup(&[ShortId(6)], end, |_| true).is_empty());
    }

    #[test]
    fn an_owner_that_fails_or_leads_astray_is_left_alone_for_a_while() {
        let now = Instant::now();
        let mut repair = Repair::new(now);
        repair.set_owners(&map(&[0, 1]), member(0), now);
        assert_eq!(repair.next(now, |_| true), None, "holders speak first");
        let due = now + REPAIR_AFTER;
        assert_eq!(repair.next(due, |_| false), None);
        let later = due + REPAIR_RETRY;
        let ask = repair.next(later, |_| true).unwrap();
        assert_eq!((ask.owner, ask.shard, ask.what), (member(1), ShardId(0), What::Digests));
        assert_eq!(repair.next(later, |_| true), None, "one at a time");
        repair.on_failed(later);
        assert_ne!(repair.next(later, |_| true).unwrap().shard, ShardId(0));
        repair.on_digests(
            &[(member(3), ClaimDigest { claims: 9, sum: 1 })],
            &BTreeMap::new(),
            |_| true,
            later,
        );
        let pull = repair.next(later, |_| true).unwrap();
        assert_eq!(pull.shard, ShardId(1));
        // Backwards, or out of the shard: that is the end of it.
        repair.on_claims(1, Some(ShortId(0)), later);
        assert_eq!(repair.next(later, |_| true).unwrap().shard, ShardId(2));
    }
}
