//! What to tell which owner, and when.
//!
//! Each shard has a log of this host's names in it: first those of its last renewal, then the fresh ones, which were added since. Of each log
//! an owner knows some ranges; what is outside of them is due. From time to time a shard's log is made anew from those of its names that the host
//! still holds, and every owner is due all of it: that renews the leases, and names that the host lost run out.
//!
//! Fresh names go first, the newest of them before the others, then renewals. A renewal that has waited for long goes before fresh names, so that
//! leases do not run out while names can be told in time at all. Where the budget is too small for the content, a log is made anew before all of it was
//! told, and as the newest names go first in renewals too, those stay announced that are newest, as many as the budget carries within
//! [`RENEW_LATEST`]; the oldest lapse. Pure: time comes in as `now`.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    ops::{Bound, Range},
    time::Instant,
};

use page::ShortId;

use crate::{
    limits::{ANNOUNCE_RETRY, INDEX_BATCH, RENEW_AFTER, RENEW_LATEST, RENEW_URGENT},
    sample::Sampling,
    shard::{MemberId, ShardId, ShardMap},
    told::Told,
};

/// The announcements that are due.
#[derive(Debug)]
pub struct Announcer {
    logs: Vec<Log>,
    owners: BTreeMap<MemberId, Owner>,
    /// Who was told last: the next one has its turn.
    last: Option<MemberId>,
}

#[derive(Debug)]
struct Log {
    generation: u32,
    ids: Vec<ShortId>,
    /// How many of `ids` were announced in the generation before as well; the rest are fresh.
    renewed_ids: usize,
    renewed: Instant,
    /// The coarsest sampling that its names went through.
    sampling: Sampling,
}

impl Log {
    fn all(&self) -> Range<usize> {
        0..self.ids.len()
    }

    fn renewal(&self) -> Range<usize> {
        0..self.renewed_ids
    }

    fn fresh(&self) -> Range<usize> {
        self.renewed_ids..self.ids.len()
    }

    /// Whether its renewal goes before fresh names by now.
    fn urgent(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.renewed) >= RENEW_URGENT
    }
}

#[derive(Debug, Default)]
struct Owner {
    positions: BTreeMap<ShardId, Position>,
    in_flight: bool,
    not_before: Option<Instant>,
}

/// How much of a shard's log an owner has acknowledged.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Position {
    generation: u32,
    told: Told,
    /// It did not know all names of the generation before.
    behind: bool,
}

impl Position {
    fn new(generation: u32, behind: bool) -> Self {
        Self { generation, told: Told::default(), behind }
    }

    /// How many of the log's names the owner does not know; a renewal under way does not take back what was said before.
    fn unknown(&self, log: &Log) -> usize {
        self.told.untold(&if self.behind { log.all() } else { log.fresh() })
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

/// A part of a shard's log.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Reached {
    shard: ShardId,
    generation: u32,
    range: Range<usize>,
}

/// What a shard's next log is made of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Renewal {
    /// The shard.
    pub shard: ShardId,
    /// The names that were announced, from the oldest on. Keep those that the host still holds.
    pub ids: Vec<ShortId>,
    /// The coarsest sampling that they went through: a finer one has names that are not among them.
    pub sampling: Sampling,
    /// How much of the log was looked at.
    seen: usize,
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
            sampling: Sampling::ALL,
        };
        Self { logs: ShardId::all().map(log).collect(), owners: BTreeMap::new(), last: None }
    }

    /// Notes names that this host did not hold before; those that `sampling` leaves out are not announced.
    pub fn note(&mut self, ids: &[ShortId], sampling: Sampling) {
        for id in ids {
            let log = &mut self.logs[ShardId::of(*id).index()];
            log.sampling = log.sampling.max(sampling);
            if sampling.keeps(*id) {
                log.ids.push(*id);
            }
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
                owner.positions.entry(shard).or_insert(Position::new(generation, true));
            }
        }
    }

    /// The next announcement that is due to an owner that is `answering` and has none in flight. Owners take turns.
    pub fn next(&mut self, now: Instant, answering: impl Fn(MemberId) -> bool) -> Option<Announcement> {
        let ready = |(member, owner): (&MemberId, &Owner)| {
            let resting = owner.in_flight || owner.not_before.is_some_and(|at| now < at);
            if resting || !answering(*member) { None } else { self.due(*member, owner, now) }
        };
        let announcement = match self.last {
            None => self.owners.iter().find_map(ready),
            Some(last) => {
                let behind = self.owners.range((Bound::Excluded(last), Bound::Unbounded));
                behind.chain(self.owners.range(..=last)).find_map(ready)
            }
        }?;
        self.last = Some(announcement.owner);
        if let Some(owner) = self.owners.get_mut(&announcement.owner) {
            (owner.in_flight, owner.not_before) = (true, None);
        }
        Some(announcement)
    }

    /// What an owner is due, up to one message.
    fn due(&self, member: MemberId, owner: &Owner, now: Instant) -> Option<Announcement> {
        // Mostly nothing is due, to any of hundreds of owners.
        let knows = |(shard, position): (&ShardId, &Position)| {
            position.told.untold(&self.logs[shard.index()].all()) == 0
        };
        if owner.positions.iter().all(knows) {
            return None;
        }
        let mut batch = Batch::default();
        let logs =
            || owner.positions.iter().map(|(shard, position)| (*shard, position, &self.logs[shard.index()]));
        let renewals = |urgent| {
            let of_kind = logs().filter(move |(_, _, log)| log.urgent(now) == urgent);
            of_kind.map(|(shard, position, log)| (shard, position, log, log.renewal()))
        };
        batch.take(renewals(true));
        batch.take(logs().map(|(shard, position, log)| (shard, position, log, log.fresh())));
        batch.take(renewals(false));
        let Batch { ids, reached } = batch;
        (!ids.is_empty()).then_some(Announcement { owner: member, ids, reached })
    }

    /// The owner has it.
    pub fn acknowledged(&mut self, announcement: &Announcement) {
        let Some(owner) = self.owners.get_mut(&announcement.owner) else { return };
        owner.in_flight = false;
        for Reached { shard, generation, range } in &announcement.reached {
            // The shard may have been taken from the owner meanwhile, or its log made anew.
            if let Some(position) = owner.positions.get_mut(shard).filter(|p| p.generation == *generation) {
                position.told.add(range.clone());
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

    /// The shards whose leases should be renewed now. While owners have not been told all of a log, its renewal waits, but not for ever.
    #[must_use]
    pub fn renewals(&self, now: Instant) -> Vec<Renewal> {
        let due = |shard: &ShardId| {
            let log = &self.logs[shard.index()];
            let age = now.saturating_duration_since(log.renewed);
            !log.ids.is_empty() && (age >= RENEW_LATEST || (age >= RENEW_AFTER && self.told(*shard, log)))
        };
        let renewal = |shard: ShardId| {
            let log = &self.logs[shard.index()];
            let mut seen = HashSet::with_capacity(log.ids.len());
            // A name that was lost and found again counts as new.
            let mut ids: Vec<_> = log.ids.iter().rev().copied().filter(|id| seen.insert(*id)).collect();
            ids.reverse();
            Renewal { shard, ids, sampling: log.sampling, seen: log.ids.len() }
        };
        ShardId::all().filter(due).map(renewal).collect()
    }

    fn told(&self, shard: ShardId, log: &Log) -> bool {
        let mut positions = self.owners.values().filter_map(|owner| owner.positions.get(&shard));
        positions.all(|position| position.told.untold(&log.all()) == 0)
    }

    /// Makes a shard's log anew from what the host still holds of the renewal's names, and what was noted meanwhile.
    pub fn renew(&mut self, renewal: Renewal, sampling: Sampling, now: Instant) {
        let Renewal { shard, mut ids, seen, .. } = renewal;
        let log = &mut self.logs[shard.index()];
        let generation = log.generation.wrapping_add(1);
        for position in self.owners.values_mut().filter_map(|owner| owner.positions.get_mut(&shard)) {
            *position = Position::new(generation, position.unknown(log) > 0);
        }
        let renewed_ids = ids.len();
        ids.extend_from_slice(log.ids.get(seen..).unwrap_or_default());
        *log = Log { generation, ids, renewed_ids, renewed: now, sampling };
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
                let names = position.unknown(&self.logs[shard.index()]);
                waits |= names > 0;
                backlog.names += names;
                backlog.shards_behind += usize::from(position.behind && names > 0);
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

#[derive(Default)]
struct Batch {
    ids: Vec<ShortId>,
    reached: Vec<Reached>,
}

impl Batch {
    /// Takes what is due of the ranges of logs, their ends first. Each has its part of what room there is, so that the newest names of all go before
    /// older ones of any.
    fn take<'a>(&mut self, from: impl Iterator<Item = (ShardId, &'a Position, &'a Log, Range<usize>)>) {
        let due: Vec<_> = from
            .filter(|(_, position, _, within)| position.told.last_gap(within.clone()).is_some())
            .collect();
        let part = (INDEX_BATCH - self.ids.len()).div_ceil(due.len().max(1));
        for (shard, position, log, mut within) in due {
            let mut room = part.min(INDEX_BATCH - self.ids.len());
            while let Some(gap) = (room > 0).then(|| position.told.last_gap(within.clone())).flatten() {
                let range = gap.end - gap.len().min(room)..gap.end;
                within.end = range.start;
                room -= range.len();
                self.ids.extend_from_slice(&log.ids[range.clone()]);
                self.reached.push(Reached { shard, generation: log.generation, range });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::limits::LEASE;

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
                announcer.note(&more, Sampling::ALL);
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
        announcer.note(&ids(10, 0), Sampling::ALL);
        let first = announcer.next(now, |_| true).unwrap();
        assert_eq!(announcer.next(now, |_| true), None, "one in flight");
        announcer.failed(&first, now);
        assert_eq!(announcer.next(now, |_| true), None);
        let backlog = announcer.backlog();
        assert_eq!((backlog.owners, backlog.names), (1, 10));
        assert!(backlog.shards_behind > 0 && !announcer.complete());
        assert_eq!(announcer.next(now + ANNOUNCE_RETRY, |_| true).unwrap().ids, first.ids);
    }

    /// Renews what is due, from what the host `holds`; returns how many shards that were.
    fn renew(announcer: &mut Announcer, holds: impl Fn(ShortId) -> bool, now: Instant) -> usize {
        let due = announcer.renewals(now);
        let count = due.len();
        for mut renewal in due {
            renewal.ids.retain(|id| holds(*id));
            announcer.renew(renewal, Sampling::ALL, now);
        }
        count
    }

    #[test]
    fn a_renewal_tells_everything_again_and_a_late_acknowledgement_does_not_hide_it() {
        let now = Instant::now();
        let mut announcer = Announcer::new(now);
        announcer.set_owners(&map(&[0, 1]), member(0));
        let held = ids(50, 0);
        announcer.note(&held, Sampling::ALL);
        drain(&mut announcer, now);
        let later = now + RENEW_AFTER * 3;
        assert!(renew(&mut announcer, |_| true, later) > 0);
        let again = announcer.next(later, |_| true).unwrap();
        assert_eq!(again.ids.len(), held.len());
        assert!(announcer.complete(), "a renewal takes nothing back");
        announcer.note(&ids(1, 77), Sampling::ALL);
        assert_eq!(announcer.backlog().names, 1, "a new name is not announced yet");
        let last = later + RENEW_AFTER * 3;
        renew(&mut announcer, |_| false, last);
        announcer.acknowledged(&again);
        assert!(announcer.next(last, |_| true).is_none(), "the host holds nothing any more");
    }

    #[test]
    fn what_is_noted_while_a_renewal_is_made_is_in_it() {
        let now = Instant::now();
        let mut announcer = Announcer::new(now);
        announcer.set_owners(&map(&[0, 1]), member(0));
        announcer.note(&ids(50, 0), Sampling::ALL);
        let later = now + RENEW_AFTER * 3;
        let due = announcer.renewals(later);
        announcer.note(&ids(50, 1), Sampling::ALL);
        due.into_iter().for_each(|renewal| announcer.renew(renewal, Sampling::ALL, later));
        assert_eq!(drain(&mut announcer, later)[&member(1)].len(), 100);
    }

    #[test]
    fn the_newest_names_go_first_then_renewals_which_go_before_them_when_late() {
        let now = Instant::now();
        let mut announcer = Announcer::new(now);
        announcer.set_owners(&map(&[0, 1]), member(0));
        let old = ids(3 * INDEX_BATCH as u64, 0);
        announcer.note(&old, Sampling::ALL);
        drain(&mut announcer, now);
        let later = now + RENEW_AFTER * 3;
        renew(&mut announcer, |_| true, later);
        let (older, newer) = (ids(1000, 5), ids(1000, 6));
        announcer.note(&older, Sampling::ALL);
        announcer.note(&newer, Sampling::ALL);
        let is_in = |ids: &[ShortId], of: &[ShortId]| ids.iter().filter(|id| of.contains(id)).count();
        let first = announcer.next(later, |_| true).unwrap();
        assert_eq!(is_in(&first.ids, &older) + is_in(&first.ids, &newer), 2000, "fresh names first");
        assert_eq!(first.ids.len(), INDEX_BATCH, "and renewals in what room there is");
        announcer.failed(&first, later);
        let urgent = later + RENEW_URGENT;
        let first = announcer.next(urgent, |_| true).unwrap();
        assert_eq!(is_in(&first.ids, &old), INDEX_BATCH);
        assert_eq!(drain(&mut announcer, urgent).len(), 0, "one message at a time");
        announcer.acknowledged(&first);
        let rest = &drain(&mut announcer, urgent)[&member(1)];
        assert_eq!(rest.len(), 2 * INDEX_BATCH + 2000);
        // Of more fresh names than a message holds, the newest of every shard.
        let (older, newer) = (ids(INDEX_BATCH as u64, 7), ids(INDEX_BATCH as u64, 8));
        announcer.note(&older, Sampling::ALL);
        announcer.note(&newer, Sampling::ALL);
        let first = announcer.next(urgent, |_| true).unwrap();
        assert!(is_in(&first.ids, &newer) > INDEX_BATCH * 8 / 10);
    }

    /// A minute's budget of one message, and twelve messages' worth of names: the story of a host with too small a budget.
    #[test]
    fn with_too_small_a_budget_the_newest_names_stay_announced_and_the_oldest_lapse() {
        let start = Instant::now();
        let mut announcer = Announcer::new(start);
        announcer.set_owners(&map(&[0, 1]), member(0));
        let held = ids(12 * INDEX_BATCH as u64, 0);
        let mut until: BTreeMap<ShortId, Instant> = BTreeMap::new();
        held.chunks(INDEX_BATCH).for_each(|ids| announcer.note(ids, Sampling::ALL));
        let minute = std::time::Duration::from_secs(60);
        for n in 0..60 {
            let now = start + minute * n;
            renew(&mut announcer, |_| true, now);
            if let Some(announcement) = announcer.next(now, |_| true) {
                until.extend(announcement.ids.iter().map(|id| (*id, now + LEASE)));
                announcer.acknowledged(&announcement);
            }
        }
        let now = start + minute * 60;
        let announced =
            |ids: &[ShortId]| ids.iter().filter(|id| until.get(id).is_some_and(|at| *at > now)).count();
        let (oldest, newest) = (&held[..2 * INDEX_BATCH], &held[10 * INDEX_BATCH..]);
        assert!(announced(newest) > 2 * INDEX_BATCH * 8 / 10, "{} of the newest", announced(newest));
        assert!(announced(oldest) < 2 * INDEX_BATCH / 10, "{} of the oldest", announced(oldest));
        assert!(announced(&held) > 5 * INDEX_BATCH, "{} in all", announced(&held));
        assert!(announcer.backlog().names > 0, "and it says that announcing lags");
    }

    #[test]
    fn owners_take_turns() {
        let now = Instant::now();
        let mut announcer = Announcer::new(now);
        announcer.set_owners(&map(&[0, 1, 2, 3]), member(0));
        announcer.note(&ids(20 * INDEX_BATCH as u64, 0), Sampling::ALL);
        let told: Vec<MemberId> = (0..6)
            .map(|_| {
                let announcement = announcer.next(now, |_| true).unwrap();
                announcer.acknowledged(&announcement);
                announcement.owner
            })
            .collect();
        assert_eq!(told[..3], told[3..]);
        assert_eq!(told[..3].iter().collect::<BTreeSet<_>>().len(), 3);
    }
}
