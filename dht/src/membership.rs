//! Who is in the site, and who of them answers, as one peer sees it. Pure: time comes in as `now`.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use crate::{
    limits::{AVOID_LIAR, MEMBERS, SKIP_FIRST, SKIP_LONGEST, SUSPECTS},
    sample::Sampling,
    shard::{MemberId, ShardId, ShardMap},
    trust::{Evidence, Trust, Verdict},
};

/// The members and their records.
#[derive(Debug)]
pub struct Membership {
    me: MemberId,
    members: BTreeSet<MemberId>,
    records: BTreeMap<MemberId, Record>,
    trust: Trust,
    shards: ShardMap,
    version: u64,
    /// The site's size where it is too large for all members to be known.
    estimate: Option<usize>,
    /// The shards of which members do not keep every name, as they said last.
    sampled: BTreeMap<MemberId, Vec<(ShardId, Sampling)>>,
}

/// What is remembered of a peer that misbehaved; it outlasts the peer's connection.
#[derive(Clone, Copy, Default, Debug)]
struct Record {
    as_owner: Patience,
    as_holder: Patience,
    avoid_until: Option<Instant>,
    wrong_pages: u64,
}

/// What a peer was asked as; one may be slow at pages and quick at the index.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// As an owner of the index.
    Owner,
    /// As a holder of pages.
    Holder,
}

#[derive(Clone, Copy, Default, Debug)]
struct Patience {
    skip_until: Option<Instant>,
    timeouts: u32,
}

impl Patience {
    fn skipped(self, now: Instant) -> bool {
        self.skip_until.is_some_and(|until| now < until)
    }

    fn timed_out(&mut self, now: Instant) {
        let skip = SKIP_FIRST.saturating_mul(1 << self.timeouts.min(16)).min(SKIP_LONGEST);
        self.timeouts = self.timeouts.saturating_add(1);
        self.skip_until = Some(now + skip);
    }
}

impl Record {
    fn patience(&mut self, role: Role) -> &mut Patience {
        match role {
            Role::Owner => &mut self.as_owner,
            Role::Holder => &mut self.as_holder,
        }
    }
}

impl Membership {
    /// A site of this peer alone.
    #[must_use]
    pub fn new(me: MemberId) -> Self {
        let members = BTreeSet::from([me]);
        let shards = ShardMap::new(&members);
        Self {
            me,
            members,
            records: BTreeMap::new(),
            trust: Trust::default(),
            shards,
            version: 0,
            estimate: None,
            sampled: BTreeMap::new(),
        }
    }

    /// This peer.
    #[must_use]
    pub fn me(&self) -> MemberId {
        self.me
    }

    /// A peer proved the site's key and speaks the site's protocols. Returns whether it is new.
    pub fn joined(&mut self, member: MemberId) -> bool {
        if self.members.len() >= MEMBERS || !self.members.insert(member) {
            return false;
        }
        if let Some(record) = self.records.get_mut(&member) {
            record.as_owner = Patience::default();
            record.as_holder = Patience::default();
        }
        self.shards.joined(member);
        self.version += 1;
        true
    }

    /// The connection to a peer is gone. Returns whether it was a member.
    pub fn left(&mut self, member: MemberId) -> bool {
        let was = member != self.me && self.members.remove(&member);
        if was {
            self.shards.left(member, &self.members);
            self.sampled.remove(&member);
            self.version += 1;
        }
        was
    }

    /// The members known, this peer included. In a large site there are more.
    #[must_use]
    pub fn members(&self) -> &BTreeSet<MemberId> {
        &self.members
    }

    /// Takes an estimate of how many other members the site has, or none if all are known.
    pub fn estimated(&mut self, others: Option<usize>) {
        self.estimate = others.map(|others| others.saturating_add(1));
    }

    /// How many members the site has: those known, this peer included, or, in a large site, an estimate.
    #[must_use]
    pub fn size(&self) -> usize {
        self.estimate.unwrap_or(self.members.len())
    }

    /// An owner says of which of its shards it does not keep every name.
    pub fn sampled(&mut self, owner: MemberId, sampled: Vec<(ShardId, Sampling)>) {
        if sampled.is_empty() || !self.contains(owner) {
            self.sampled.remove(&owner);
        } else {
            self.sampled.insert(owner, sampled);
        }
    }

    /// Which names of a shard an owner keeps, as it said last.
    #[must_use]
    pub fn sampling(&self, owner: MemberId, shard: ShardId) -> Sampling {
        let said = self.sampled.get(&owner).and_then(|sampled| sampled.iter().find(|(of, _)| *of == shard));
        said.map_or(Sampling::ALL, |(_, sampling)| *sampling)
    }

    /// Counts the changes of membership.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.version
    }

    /// The owners of all shards.
    #[must_use]
    pub fn shards(&self) -> &ShardMap {
        &self.shards
    }

    /// Whether a peer is a member now.
    #[must_use]
    pub fn contains(&self, member: MemberId) -> bool {
        self.members.contains(&member)
    }

    /// Whether a peer is a member and has not just left a request in this role unanswered.
    #[must_use]
    pub fn answering(&self, member: MemberId, role: Role, now: Instant) -> bool {
        let mut record = self.records.get(&member).copied().unwrap_or_default();
        self.members.contains(&member) && !record.patience(role).skipped(now)
    }

    /// Whether a peer served wrong bytes not long ago.
    #[must_use]
    pub fn avoided(&self, member: MemberId, now: Instant) -> bool {
        self.records.get(&member).and_then(|record| record.avoid_until).is_some_and(|until| now < until)
    }

    /// Until when a peer is skipped in this role, if it is.
    #[must_use]
    pub fn skipped_until(&self, member: MemberId, role: Role) -> Option<Instant> {
        let mut record = self.records.get(&member).copied()?;
        record.patience(role).skip_until
    }

    /// Until when a peer is avoided because it served wrong bytes, if it is.
    #[must_use]
    pub fn avoided_until(&self, member: MemberId) -> Option<Instant> {
        self.records.get(&member)?.avoid_until
    }

    /// Whether pages may be asked of a peer.
    #[must_use]
    pub fn usable_holder(&self, member: MemberId, now: Instant) -> bool {
        member != self.me
            && self.answering(member, Role::Holder, now)
            && !self.avoided(member, now)
            && self.trust.verdict(member, now) != Verdict::LeftOut
    }

    /// The other owners of a shard that answer, the closest first.
    pub fn owners_to_ask(&self, shard: ShardId, now: Instant) -> impl Iterator<Item = MemberId> + '_ {
        let owners = self.shards.owners(shard).iter().copied();
        owners.filter(move |owner| *owner != self.me && self.answering(*owner, Role::Owner, now))
    }

    /// A request was not answered in time: the peer is skipped for a while, longer each time.
    pub fn timed_out(&mut self, member: MemberId, role: Role, now: Instant) {
        if let Some(record) = self.record(member) {
            record.patience(role).timed_out(now);
        }
    }

    /// A request was answered.
    pub fn answered(&mut self, member: MemberId, role: Role) {
        if let Some(record) = self.records.get_mut(&member) {
            *record.patience(role) = Patience::default();
        }
    }

    /// A peer served bytes that do not hash to the name they were asked by.
    pub fn lied(&mut self, member: MemberId, pages: u64, now: Instant) {
        if let Some(record) = self.record(member) {
            record.avoid_until = Some(now + AVOID_LIAR);
            record.wrong_pages = record.wrong_pages.saturating_add(pages);
        }
    }

    /// Counts what a holder delivered of what it had announced. Returns what is thought of it if that has become worse.
    pub fn delivered(&mut self, evidence: Evidence, now: Instant) -> Option<Verdict> {
        self.trust.note(evidence, now)
    }

    /// What is thought of a peer as a holder, by what it delivers.
    #[must_use]
    pub fn trust(&self) -> &Trust {
        &self.trust
    }

    /// Wrong pages that came from a peer.
    #[must_use]
    pub fn wrong_pages(&self, member: MemberId) -> u64 {
        self.records.get(&member).map_or(0, |record| record.wrong_pages)
    }

    /// The record of a peer, while there is room for one more.
    fn record(&mut self, member: MemberId) -> Option<&mut Record> {
        if self.records.len() >= SUSPECTS && !self.records.contains_key(&member) {
            let members = &self.members;
            self.records.retain(|member, _| members.contains(member));
        }
        let room = self.records.len() < SUSPECTS || self.records.contains_key(&member);
        room.then(|| self.records.entry(member).or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(n: u8) -> MemberId {
        MemberId::of_peer(&[n])
    }

    #[test]
    fn a_peer_that_does_not_answer_is_skipped_for_longer_each_time_until_it_answers() {
        let now = Instant::now();
        let mut site = Membership::new(member(0));
        assert!(site.joined(member(1)) && !site.joined(member(1)));
        site.timed_out(member(1), Role::Owner, now);
        assert!(!site.answering(member(1), Role::Owner, now));
        assert!(site.usable_holder(member(1), now), "one role says nothing of the other");
        assert!(site.answering(member(1), Role::Owner, now + SKIP_FIRST));
        site.timed_out(member(1), Role::Owner, now);
        assert!(!site.answering(member(1), Role::Owner, now + SKIP_FIRST));
        site.answered(member(1), Role::Owner);
        assert!(site.answering(member(1), Role::Owner, now));
    }

    #[test]
    fn a_liar_stays_avoided_when_it_reconnects() {
        let now = Instant::now();
        let mut site = Membership::new(member(0));
        site.joined(member(1));
        site.lied(member(1), 3, now);
        assert!(!site.usable_holder(member(1), now) && site.answering(member(1), Role::Owner, now));
        assert!(site.left(member(1)) && site.joined(member(1)));
        assert!(!site.usable_holder(member(1), now));
        assert!(site.usable_holder(member(1), now + AVOID_LIAR));
        assert_eq!(site.wrong_pages(member(1)), 3);
    }

    #[test]
    fn what_an_owner_keeps_is_as_it_said_last() {
        let mut site = Membership::new(member(0));
        let (few, shard) = (Sampling::new(3).unwrap(), ShardId(7));
        site.sampled(member(1), vec![(shard, few)]);
        assert_eq!(site.sampling(member(1), shard), Sampling::ALL, "it is no member");
        site.joined(member(1));
        site.sampled(member(1), vec![(shard, few)]);
        assert_eq!(site.sampling(member(1), shard), few);
        assert_eq!(site.sampling(member(1), ShardId(8)), Sampling::ALL);
        site.sampled(member(1), Vec::new());
        assert_eq!(site.sampling(member(1), shard), Sampling::ALL);
    }

    #[test]
    fn this_peer_never_leaves() {
        let mut site = Membership::new(member(0));
        assert!(!site.left(member(0)));
        assert_eq!(site.shards().owned_by(member(0)), crate::shard::SHARDS);
    }
}
