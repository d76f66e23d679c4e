//! Anti-entropy: the owners of a shard make good what one of them was not told.
//!
//! ```text
//!          a shard is due            digests differ
//! resting ───────────────► comparing ─────────────► pulling, a batch at a time
//!    ▲                         │ alike, or failed       │ all taken, or failed
//!    └─────────────────────────┴────────────────────────┘
//! ```
//!
//! An owner asks the shard's other owner for the digests of the holders' shares, and pulls the whole of those whose holders have told it
//! nothing themselves, unless it has pulled the same before. So an owner that came late, or that a holder cannot reach, has its shard all the same. Shares
//! that their holders told this owner are left alone: their digests are compared with the holders' own at each renewal. Only what holders
//! told the other owner is passed on, so nothing goes round. What is learnt has what is left of its lease, is marked as hearsay,
//! and never speaks against the holder that it names: an owner that lies must not put others in doubt. Shares of holders that
//! are no members are not taken.
//!
//! Pure: time comes in as `now`. One request is out at a time, and claims are pulled within a budget.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use page::ShortId;

use crate::{
    budget::Bucket,
    claims::ShareDigest,
    limits::{
        PULL_CLAIMS, PULLS_PER_ROUND, REPAIR_AFTER, REPAIR_CLAIMS_PER_SECOND, REPAIR_EVERY, REPAIR_RETRY,
    },
    shard::{MemberId, ShardId, ShardMap},
};

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
    /// The digests of all holders' shares.
    Digests,
    /// The claims of some holders.
    Claims {
        /// Their shares.
        shares: Vec<ShareDigest>,
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

    /// The other owner's digests came: `shares` of them are to be pulled, and others may have been left out.
    pub fn on_digests(&mut self, shares: Vec<ShareDigest>, left_out: bool, now: Instant) {
        let Some(ask) = self.asked.take() else { return };
        if shares.is_empty() {
            self.rest(ask.shard, left_out, now);
            return;
        }
        let what = What::Claims { shares, from: ask.shard.first_id() };
        self.pull = Some(Pull { ask: Ask { what, ..ask }, batches: 0, left_out });
    }

    /// Claims came, `count` of them; more of them begin at `next`. Returns whether those were the last of all that was asked for.
    pub fn on_claims(&mut self, count: usize, next: Option<ShortId>, now: Instant) -> bool {
        let (Some(ask), Some(mut pull)) = (self.asked.take(), self.pull.take()) else { return false };
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
        next.is_none()
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
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;
    use crate::{
        claims::{Announcement, ClaimDigest},
        lease::OwnerTable,
        limits::LEASE,
        sample::Sampling,
    };

    fn member(n: u8) -> MemberId {
        MemberId::of_peer(&[n])
    }

    fn map(members: &[u8]) -> ShardMap {
        ShardMap::new(&members.iter().map(|n| member(*n)).collect())
    }

    /// What a round of repair does to `me`, from `other`; holder 9 is not wanted. Returns how many entries it learnt, and how many pulls it made.
    fn run(
        repair: &mut Repair,
        me: &mut OwnerTable,
        other: &OwnerTable,
        now: &mut Instant,
    ) -> (usize, usize) {
        let (mut learnt, mut pulls) = (0, 0);
        let end = *now + REPAIR_EVERY;
        while *now < end {
            let Some(Ask { shard, what, .. }) = repair.next(*now, |_| true) else {
                *now += Duration::from_secs(1);
                continue;
            };
            match what {
                What::Digests => {
                    let mut theirs = other.shares(shard, *now);
                    theirs.retain(|share| share.holder != member(9));
                    let unlike = me.unlike(shard, &theirs, *now);
                    repair.on_digests(unlike, false, *now);
                }
                What::Claims { shares, from } => {
                    if from == shard.first_id() {
                        me.begin_learning(shard, &shares, *now);
                    }
                    let holders: Vec<_> = shares.iter().map(|share| share.holder).collect();
                    let mut claims = Vec::new();
                    let next = other.claims((shard, Sampling::ALL), from, &holders, *now, 20, &mut claims);
                    assert!(claims.len() <= 20);
                    for (id, holder) in &claims {
                        learnt += me.learn(shard, holders[usize::from(*holder)], &[*id]);
                    }
                    if repair.on_claims(claims.len(), next, *now) {
                        me.learnt(shard, &shares);
                    }
                    pulls += 1;
                }
            }
        }
        (learnt, pulls)
    }

    /// A holder tells an owner all that it has, as a whole.
    fn tell(owner: &mut OwnerTable, holder: MemberId, ids: &BTreeSet<ShortId>, now: Instant) {
        let mut digests = BTreeMap::<ShardId, ClaimDigest>::new();
        ids.iter().for_each(|id| digests.entry(ShardId::of(*id)).or_default().add(*id));
        let announcement = Announcement {
            serial: u64::from(holder.0[0]),
            gone: Vec::new(),
            begins: digests.keys().copied().collect(),
            ids: ids.iter().copied().collect(),
            digests: digests.into_iter().collect(),
        };
        assert!(owner.hear(holder, &announcement, now).is_empty());
    }

    proptest! {
        /// Whatever two owners were told, after one round the one that pulls knows what the other does of the holders that have told it nothing, but
        /// of those that it does not want; the round after that finds nothing to do.
        #[test]
        fn an_owner_learns_what_the_other_knows(
            told in prop::collection::vec((0u8..3, 0u8..4, 0u64..1 << 60), 0..200),
            told_me in prop::collection::btree_set((0u8..3, 0u8..4), 0..4),
        ) {
            let start = Instant::now();
            let mut now = start;
            let (mut me, mut other) = (OwnerTable::new(LEASE), OwnerTable::new(LEASE));
            let mut known: BTreeMap<u8, BTreeSet<ShortId>> = BTreeMap::new();
            for (shard, holder, low) in told {
                let holder = if holder == 3 { 9 } else { holder };
                known.entry(holder).or_default().insert(ShortId(u64::from(shard) << 56 | low >> 8));
            }
            known.iter().for_each(|(holder, ids)| tell(&mut other, member(*holder), ids, now));
            for (shard, holder) in &told_me {
                me.begin(member(*holder), ShardId(*shard), now);
            }
            let mut repair = Repair::new(now);
            repair.set_owners(&map(&[10, 11]), member(10), now);
            run(&mut repair, &mut me, &other, &mut now);
            for (holder, ids) in &known {
                for id in ids {
                    let found = me.lookup(&[*id], start, |_| true);
                    let knows = found.iter().any(|(_, who)| *who == member(*holder));
                    let told = told_me.contains(&(ShardId::of(*id).0, *holder)) || *holder == 9;
                    prop_assert!(knows != told || found.len() == 4);
                }
            }
            prop_assert_eq!(run(&mut repair, &mut me, &other, &mut now), (0, 0));
        }
    }

    #[test]
    fn what_is_learnt_ends_when_it_would_have_ended_and_does_not_go_round() {
        let start = Instant::now();
        let (mut a, mut b) = (OwnerTable::new(LEASE), OwnerTable::new(LEASE));
        tell(&mut a, member(1), &BTreeSet::from([ShortId(5)]), start);
        let pass_on = |to: &mut OwnerTable, now| {
            let unlike = to.unlike(ShardId(0), &a.shares(ShardId(0), now), now);
            to.begin_learning(ShardId(0), &unlike, now);
            let mut claims = Vec::new();
            a.claims((ShardId(0), Sampling::ALL), ShortId(0), &[member(1)], now, 10, &mut claims);
            let ids: Vec<ShortId> = claims.iter().map(|(id, _)| *id).collect();
            to.learn(ShardId(0), member(1), &ids);
            to.learnt(ShardId(0), &unlike);
        };
        for quarter in 0..4 {
            pass_on(&mut b, start + LEASE / 4 * quarter);
        }
        let found = |table: &OwnerTable, at| table.lookup(&[ShortId(5)], at, |_| true).len();
        let last = start + LEASE - Duration::from_secs(1);
        assert_eq!((found(&b, last), found(&b, start + LEASE)), (1, 0));
        assert!(b.shares(ShardId(0), last).is_empty(), "only what holders said is passed on");
        // Even from an owner that promises more.
        let share = ShareDigest { holder: member(2), digest: ClaimDigest::default(), left: LEASE * 100 };
        b.begin_learning(ShardId(0), &[share], start);
        b.learn(ShardId(0), member(2), &[ShortId(6)]);
        assert!(b.unlike(ShardId(0), &[share], start).len() == 1, "not all of it is here");
        assert_eq!(b.lookup(&[ShortId(6)], last, |_| true), [(0, member(2))]);
        assert!(b.lookup(&[ShortId(6)], start + LEASE, |_| true).is_empty());
        // The holder's own word stands, and what it does not say goes.
        tell(&mut b, member(2), &BTreeSet::from([ShortId(7)]), start);
        assert!(b.lookup(&[ShortId(6)], last, |_| true).is_empty());
        assert_eq!(b.learn(ShardId(0), member(2), &[ShortId(8)]), 0);
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
        let left = Duration::from_secs(9);
        let share = ShareDigest { holder: member(3), digest: ClaimDigest { claims: 9, sum: 1 }, left };
        repair.on_digests(vec![share], false, later);
        let pull = repair.next(later, |_| true).unwrap();
        assert_eq!(pull.shard, ShardId(1));
        // Backwards, or out of the shard: that is the end of it.
        assert!(!repair.on_claims(1, Some(ShortId(0)), later));
        assert_eq!(repair.next(later, |_| true).unwrap().shard, ShardId(2));
    }
}
