//! What to tell which owner, and when.
//!
//! Each shard has a log of this host's names in it: first those of its last renewal, then the fresh ones, which were added since. Of each log
//! an owner knows some ranges; what is outside of them is due. From time to time a shard's log is made anew from those of its names that the host
//! still holds, and every owner is due all of it: that renews the leases, and names that the host lost run out.
//!
//! Fresh names go first, the newest of them before the others, then renewals. A renewal that has waited for long goes before fresh names, so that
//! leases do not run out while names can be told in time at all. Where the budget is too small for the content, a log is made anew before all of it was
//! told, and as the newest names go first in renewals too, those stay announced that are newest, as many as the budget carries within
//! [`RENEW_LATEST`]; the oldest lapse. An owner that is full says which names of a shard it keeps ([`crate::sample`]), and is told no others. Pure: time comes in as `now`.

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
    /// The names that the owner keeps; it was told no others.
    sampling: Sampling,
    /// It did not know all names of the generation before.
    behind: bool,
}

impl Position {
    fn new(generation: u32, sampling: Sampling, behind: bool) -> Self {
        Self { generation, told: Told::default(), sampling, behind }
    }

    /// How many of the log's names the owner keeps and does not know; a renewal under way does not take back what was said before.
    fn unknown(&self, log: &Log) -> usize {
        let within = if self.behind { log.all() } else { log.fresh() };
        if self.sampling == Sampling::ALL {
            return self.told.untold(&within);
        }
        let (mut unknown, mut rest) = (0, within);
        while let Some(gap) = self.told.last_gap(rest.clone()) {
            rest.end = gap.start;
            unknown += log.ids[gap].iter().filter(|id| self.sampling.keeps(**id)).count();
        }
        unknown
    }

    /// The owner keeps other names from now on. More of them than before are due, all of the log.
    fn sample(&mut self, sampling: Sampling) {
        if sampling < self.sampling {
            (self.told, self.behind) = (Told::default(), true);
        }
        self.sampling = sampling;
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
    sampling: Sampling,
    range: Range<usize>,
}

/// What a shard's next log is made of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Renewal {
    /// The shard.
    pub shard: ShardId,
    /// The names that were announced, from the oldest on. Keep those that the host still holds.
    pub ids: Vec<ShortId>,
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
        };
        Self { logs: ShardId::all().map(log).collect(), owners: BTreeMap::new(), last: None }
    }

    /// Notes names that this host did not hold before.
    pub fn note(&mut self, ids: &[ShortId]) {
        ids.iter().for_each(|id| self.logs[ShardId::of(*id).index()].ids.push(*id));
    }

    /// An owner says of which shards it does not keep every name.
    pub fn sampled(&mut self, owner: MemberId, sampled: &[(ShardId, Sampling)]) {
        let Some(owner) = self.owners.get_mut(&owner) else { return };
        for (shard, position) in &mut owner.positions {
            let said = sampled.iter().find(|(of, _)| of == shard);
            position.sample(said.map_or(Sampling::ALL, |(_, sampling)| *sampling));
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
                owner.positions.entry(shard).or_insert(Position::new(generation, Sampling::ALL, true));
            }
        }
    }

    /// The next announcement that is due to an owner that is `answering` and has none in flight. Owners take turns.
    pub fn next(&mut self, now: Instant, answering: impl Fn(MemberId) -> bool) -> Option<Announcement> {
        loop {
            let announcement = self.first_due(now, &answering)?;
            if announcement.ids.is_empty() {
                // The owner keeps none of these names: that is as good as told.
                self.acknowledged(&announcement);
                continue;
            }
            self.last = Some(announcement.owner);
            if let Some(owner) = self.owners.get_mut(&announcement.owner) {
                (owner.in_flight, owner.not_before) = (true, None);
            }
            return Some(announcement);
        }
    }

    fn first_due(&self, now: Instant, answering: impl Fn(MemberId) -> bool) -> Option<Announcement> {
        let ready = |(member, owner): (&MemberId, &Owner)| {
            let resting = owner.in_flight || owner.not_before.is_some_and(|at| now < at);
            if resting || !answering(*member) { None } else { self.due(*member, owner, now) }
        };
        match self.last {
            None => self.owners.iter().find_map(ready),
            Some(last) => {
                let behind = self.owners.range((Bound::Excluded(last), Bound::Unbounded));
                behind.chain(self.owners.range(..=last)).find_map(ready)
            }
        }
    }

    /// What an owner is due, up to one message; without a name if it keeps none of those that are due.
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
        (!reached.is_empty()).then_some(Announcement { owner: member, ids, reached })
    }

    /// The owner has it.
    pub fn acknowledged(&mut self, announcement: &Announcement) {
        let Some(owner) = self.owners.get_mut(&announcement.owner) else { return };
        owner.in_flight = false;
        for Reached { shard, generation, sampling, range } in &announcement.reached {
            // The shard may have been taken from the owner meanwhile, or its log made anew, or the owner keeps more names now.
            let told = |position: &&mut Position| {
                position.generation == *generation && *sampling <= position.sampling
            };
            if let Some(position) = owner.positions.get_mut(shard).filter(told) {
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
            Renewal { shard, ids, seen: log.ids.len() }
        };
        ShardId::all().filter(due).map(renewal).collect()
    }

    fn told(&self, shard: ShardId, log: &Log) -> bool {
        let mut positions = self.owners.values().filter_map(|owner| owner.positions.get(&shard));
        positions.all(|position| position.told.untold(&log.all()) == 0)
    }

    /// Makes a shard's log anew from what the host still holds of the renewal's names, and what was noted meanwhile.
    pub fn renew(&mut self, renewal: Renewal, now: Instant) {
        let Renewal { shard, mut ids, seen, .. } = renewal;
        let log = &mut self.logs[shard.index()];
        let generation = log.generation.wrapping_add(1);
        for position in self.owners.values_mut().filter_map(|owner| owner.positions.get_mut(&shard)) {
            *position = Position::new(generation, position.sampling, position.unknown(log) > 0);
        }
        let renewed_ids = ids.len();
        ids.extend_from_slice(log.ids.get(seen..).unwrap_or_default());
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
            let sampling = position.sampling;
            while let Some(gap) = (room > 0).then(|| position.told.last_gap(within.clone())).flatten() {
                let mut start = gap.end;
                while start > gap.start && room > 0 {
                    start -= 1;
                    let id = log.ids[start];
                    if sampling.keeps(id) {
                        self.ids.push(id);
                        room -= 1;
                    }
                }
                let range = start..gap.end;
                within.end = start;
                self.reached.push(Reached { shard, generation: log.generation, sampling, range });
            }
        }
    }
}

#[cfg(test)]
#[path = "announce_tests.rs"]
mod tests;
