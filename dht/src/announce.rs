//! What to tell which owner, and when.
//!
//! Each shard has a log of this host's names in it: first those of its last full announcement, then what was added since.
//! An owner's position in the log says what it has acknowledged; whatever stands behind the position is due. A new
//! owner starts at the front. From time to time a shard's log is made anew from what the host holds now, and every
//! owner starts again at the front: that renews the leases, and names that the host lost run out. Pure: time comes in as `now`.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Instant,
};

use page::ShortId;

use crate::{
    limits::{ANNOUNCE_RETRY, INDEX_BATCH, RENEW_AFTER},
    shard::{MemberId, ShardId, ShardMap},
};

/// The announcements that are due.
#[derive(Debug)]
pub struct Announcer {
    logs: Vec<Log>,
    owners: BTreeMap<MemberId, Owner>,
}

#[derive(Debug)]
struct Log {
    generation: u32,
    ids: Vec<ShortId>,
    /// How many of `ids` were announced in the generation before as well.
    renewed_ids: usize,
    renewed: Instant,
}

#[derive(Debug, Default)]
struct Owner {
    positions: BTreeMap<ShardId, Position>,
    in_flight: bool,
    not_before: Option<Instant>,
}

/// How much of a shard's log an owner has acknowledged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Position {
    generation: u32,
    offset: usize,
    /// It has not yet been told everything once.
    behind: bool,
}

impl Position {
    /// How many of the log's names the owner has acknowledged.
    fn told(self, log: &Log) -> usize {
        if self.generation == log.generation { self.offset.min(log.ids.len()) } else { 0 }
    }

    /// Whether the owner knows all names of the log; a renewal under way does not take back what was said before.
    fn knows_all(self, log: &Log) -> bool {
        self.told(log) >= log.ids.len() || (!self.behind && log.ids.len() == log.renewed_ids)
    }
}

/// One announcement. Hand it back to [`Announcer::acknowledged`] or [`Announcer::failed`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Announcement {
    /// Whom to tell.
    pub owner: MemberId,
    /// What this host holds.
    pub ids: Vec<ShortId>,
    reached: Vec<Reached>,
}

/// How far an announcement goes in a shard's log.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Reached {
    shard: ShardId,
    generation: u32,
    offset: usize,
}

impl Announcer {
    /// Nothing to announce, and nobody to tell.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        // Staggered, so that renewals do not come all at once.
        let log = |shard: ShardId| Log {
            generation: 0,
            ids: Vec::new(),
            renewed_ids: 0,
            renewed: now + RENEW_AFTER * u32::from(shard.0) / 256,
        };
        Self { logs: ShardId::all().map(log).collect(), owners: BTreeMap::new() }
    }

    /// Notes names that this host did not hold before.
    pub fn note(&mut self, ids: &[ShortId]) {
        for id in ids {
            self.logs[ShardId::of(*id).index()].ids.push(*id);
        }
    }

    /// Takes the owners of all shards; this peer does not announce to itself.
    pub fn set_owners(&mut self, shards: &ShardMap, me: MemberId) {
        let mut owned: BTreeMap<MemberId, BTreeSet<ShardId>> = BTreeMap::new();
        for shard in ShardId::all() {
            for owner in shards.owners(shard).iter().filter(|owner| **owner != me) {
                owned.entry(*owner).or_default().insert(shard);
            }
        }
        self.owners.retain(|owner, _| owned.contains_key(owner));
        for (owner, shards) in owned {
            let owner = self.owners.entry(owner).or_default();
            owner.positions.retain(|shard, _| shards.contains(shard));
            for shard in shards {
                let generation = self.logs[shard.index()].generation;
                let start = Position { generation, offset: 0, behind: true };
                owner.positions.entry(shard).or_insert(start);
            }
        }
    }

    /// The next announcement that is due to an owner that is `answering` and has none in flight.
    pub fn next(&mut self, now: Instant, answering: impl Fn(MemberId) -> bool) -> Option<Announcement> {
        for (member, owner) in &mut self.owners {
            if owner.in_flight || owner.not_before.is_some_and(|at| now < at) || !answering(*member) {
                continue;
            }
            let (mut ids, mut reached) = (Vec::new(), Vec::new());
            for (shard, position) in &owner.positions {
                let log = &self.logs[shard.index()];
                let from = position.told(log);
                let due = &log.ids[from..];
                let taken = due.len().min(INDEX_BATCH - ids.len());
                if taken == 0 {
                    continue;
                }
                ids.extend_from_slice(&due[..taken]);
                reached.push(Reached { shard: *shard, generation: log.generation, offset: from + taken });
            }
            if !ids.is_empty() {
                owner.in_flight = true;
                owner.not_before = None;
                return Some(Announcement { owner: *member, ids, reached });
            }
        }
        None
    }

    /// The owner has it.
    pub fn acknowledged(&mut self, announcement: &Announcement) {
        let Some(owner) = self.owners.get_mut(&announcement.owner) else { return };
        owner.in_flight = false;
        for Reached { shard, generation, offset } in announcement.reached.iter().copied() {
            let log = &self.logs[shard.index()];
            // The shard may have been taken from the owner meanwhile, or its log made anew.
            if let Some(position) = owner.positions.get_mut(&shard).filter(|_| log.generation == generation) {
                let behind = position.behind && offset < log.ids.len();
                *position = Position { generation, offset, behind };
            }
        }
    }

    /// The owner did not take it: it is due again after a pause.
    pub fn failed(&mut self, announcement: &Announcement, now: Instant) {
        if let Some(owner) = self.owners.get_mut(&announcement.owner) {
            owner.in_flight = false;
            owner.not_before = Some(now + ANNOUNCE_RETRY);
        }
    }

    /// The shards whose leases should be renewed now.
    #[must_use]
    pub fn renewals(&self, now: Instant) -> Vec<ShardId> {
        let due = |shard: &ShardId| {
            let log = &self.logs[shard.index()];
            now.saturating_duration_since(log.renewed) >= RENEW_AFTER && !log.ids.is_empty()
        };
        ShardId::all().filter(due).collect()
    }

    /// Makes a shard's log anew from what the host holds in it now.
    pub fn renew(&mut self, shard: ShardId, ids: Vec<ShortId>, now: Instant) {
        let log = &mut self.logs[shard.index()];
        for position in self.owners.values_mut().filter_map(|owner| owner.positions.get_mut(&shard)) {
            position.behind = !position.knows_all(log);
        }
        let (generation, renewed_ids) = (log.generation.wrapping_add(1), ids.len());
        *log = Log { generation, ids, renewed_ids, renewed: now };
    }

    /// Whether every owner has acknowledged everything.
    #[must_use]
    pub fn complete(&self) -> bool {
        self.backlog() == Backlog::default()
    }

    /// What is still to be acknowledged.
    #[must_use]
    pub fn backlog(&self) -> Backlog {
        let mut backlog = Backlog::default();
        for owner in self.owners.values() {
            let mut waits = false;
            for (shard, position) in &owner.positions {
                let log = &self.logs[shard.index()];
                if position.knows_all(log) {
                    continue;
                }
                waits = true;
                backlog.names += log.ids.len() - position.told(log);
                backlog.shards_behind += usize::from(position.behind);
            }
            backlog.owners += usize::from(waits);
        }
        backlog
    }
}

/// What owners have not acknowledged yet.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Backlog {
    /// Owners that wait to be told something.
    pub owners: usize,
    /// Names that they wait for, counted once an owner.
    pub names: usize,
    /// Shards of theirs of which they have not been told everything once.
    pub shards_behind: usize,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn member(n: u8) -> MemberId {
        MemberId::of_peer(&[n])
    }

    fn map(members: &[u8]) -> ShardMap {
        ShardMap::new(&members.iter().map(|n| member(*n)).collect())
    }

    fn ids(count: u64, salt: u64) -> Vec<ShortId> {
        (0..count).map(|n| ShortId((n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ salt)).collect()
    }

    /// Announces all that is due; returns what each owner got.
    fn drain(announcer: &mut Announcer, now: Instant) -> BTreeMap<MemberId, BTreeSet<ShortId>> {
        let mut told: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
        while let Some(announcement) = announcer.next(now, |_| true) {
            assert!(announcement.ids.len() <= INDEX_BATCH);
            told.entry(announcement.owner).or_default().extend(announcement.ids.iter().copied());
            announcer.acknowledged(&announcement);
        }
        told
    }

    proptest! {
        #[test]
        fn in_the_end_every_owner_has_been_told_its_shards_and_nothing_else(
            rounds in prop::collection::vec((1u64..2000, prop::collection::btree_set(1u8..6, 0..5)), 1..5),
        ) {
            let now = Instant::now();
            let mut announcer = Announcer::new(now);
            let (mut all, mut told) = (BTreeSet::new(), BTreeMap::<MemberId, BTreeSet<ShortId>>::new());
            let mut shards = map(&[0]);
            for (salt, (count, members)) in rounds.into_iter().enumerate() {
                let more = ids(count, salt as u64);
                announcer.note(&more);
                all.extend(more);
                let members: Vec<u8> = std::iter::once(0).chain(members).collect();
                shards = map(&members);
                announcer.set_owners(&shards, member(0));
                // An owner that left forgets.
                told.retain(|owner, _| members.iter().any(|n| member(*n) == *owner));
                for (owner, ids) in drain(&mut announcer, now) {
                    prop_assert!(ids.iter().all(|id| shards.owners(ShardId::of(*id)).contains(&owner)));
                    told.entry(owner).or_default().extend(ids);
                }
                prop_assert!(announcer.complete());
            }
            for id in all {
                for owner in shards.owners(ShardId::of(id)).iter().filter(|o| **o != member(0)) {
                    prop_assert!(told[owner].contains(&id));
                }
            }
        }
    }

    #[test]
    fn a_failed_announcement_is_due_again_after_a_pause() {
        let now = Instant::now();
        let mut announcer = Announcer::new(now);
        announcer.set_owners(&map(&[0, 1]), member(0));
        announcer.note(&ids(10, 0));
        let first = announcer.next(now, |_| true).unwrap();
        assert_eq!(announcer.next(now, |_| true), None, "one in flight");
        announcer.failed(&first, now);
        assert_eq!(announcer.next(now, |_| true), None);
        let backlog = announcer.backlog();
        assert_eq!((backlog.owners, backlog.names), (1, 10));
        assert!(backlog.shards_behind > 0 && !announcer.complete());
        assert_eq!(announcer.next(now + ANNOUNCE_RETRY, |_| true).unwrap().ids, first.ids);
    }

    #[test]
    fn a_renewal_tells_everything_again_and_a_late_acknowledgement_does_not_hide_it() {
        let now = Instant::now();
        let mut announcer = Announcer::new(now);
        announcer.set_owners(&map(&[0, 1]), member(0));
        let held = ids(50, 0);
        announcer.note(&held);
        drain(&mut announcer, now);
        let later = now + RENEW_AFTER * 3;
        let due = announcer.renewals(later);
        assert!(!due.is_empty());
        for shard in due {
            let ids = held.iter().copied().filter(|id| ShardId::of(*id) == shard).collect();
            announcer.renew(shard, ids, later);
        }
        let again = announcer.next(later, |_| true).unwrap();
        assert_eq!(again.ids.len(), held.len());
        assert!(announcer.complete(), "a renewal takes nothing back");
        announcer.note(&ids(1, 77));
        assert!(!announcer.complete(), "a new name is not announced yet");
        for shard in ShardId::all() {
            announcer.renew(shard, Vec::new(), later);
        }
        announcer.acknowledged(&again);
        assert!(announcer.next(later, |_| true).is_none(), "the host holds nothing any more");
    }
}
