//! What to tell which owner, and when.
//!
//! Each shard has a log of this host's names in it, the newest last. An owner is told the whole of it once, the newest names first, and what
//! is added from then on; of each log it is known which parts an owner has. From time to time a log is reviewed: names that the host has
//! lost leave it, and owners that know them are told. What an owner has been told comes to a digest; from time to time it is told that, which renews
//! its lease of all the names, and if it has another one it is told the whole log anew, though not more often than leases are renewed.
//!
//! ```text
//!          begin, names                 all told, digest alike
//! untold ──────────────► being listed ────────────────────────► listed ──┐ names, lost names,
//!    ▲                        │ digest unlike                     │   ▲──┘ digest alike
//!    └────────────────────────┴───────────────────────────────────┘
//! ```
//!
//! Digests agree only if each message takes effect once: one message at a time is out to an owner, and one that failed is sent again as it
//! was. An owner that is full says which names of a shard it keeps ([`crate::sample`]), and is told no others. Pure: time comes in as `now`.

use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    hash::BuildHasherDefault,
    ops::{Bound, Range},
    time::{Duration, Instant},
};

use page::ShortId;

use crate::{
    claims::{Announcement, ClaimDigest},
    index::IdHasher,
    limits::{ANNOUNCE_RETRY, INDEX_BATCH, renew_after},
    sample::Sampling,
    shard::{MemberId, SHARDS, ShardId, ShardMap},
    told::Told,
};

type Ids = HashSet<ShortId, BuildHasherDefault<IdHasher>>;

/// The announcements that are due.
#[derive(Debug)]
pub struct Announcer {
    /// How long after its last renewal a lease is renewed, and a log is reviewed.
    renew_after: Duration,
    logs: Vec<Log>,
    owners: BTreeMap<MemberId, Owner>,
    /// Who was told last: the next one has its turn.
    last: Option<MemberId>,
    serial: u64,
}

#[derive(Debug)]
struct Log {
    ids: Vec<ShortId>,
    reviewed: Instant,
}

#[derive(Debug, Default)]
struct Owner {
    positions: BTreeMap<ShardId, Position>,
    /// What was sent to it last and is not acknowledged.
    pending: Option<Due>,
    in_flight: bool,
    not_before: Option<Instant>,
}

/// What an owner knows of a shard's log.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Position {
    stage: Stage,
    told: Told,
    /// The names that the owner keeps: it is told no others, and parts of the log that have none of them count as told.
    sampling: Sampling,
    /// Of all that it was told, less what it was told to be gone.
    digest: ClaimDigest,
    /// Names that are no longer in the log, and that it does not know to be gone.
    gone: Vec<ShortId>,
    /// When it was last begun to tell it the whole.
    begun: Option<Instant>,
    /// A message that is not acknowledged has a part of it.
    moving: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
enum Stage {
    #[default]
    Untold,
    Listing,
    Listed {
        renewed: Instant,
    },
}

impl Position {
    /// How much of the log the owner was not told.
    fn untold(&self, log: &Log) -> usize {
        self.told.untold(&(0..log.ids.len()))
    }

    /// How many of the log's names the owner keeps and does not know.
    fn unknown(&self, log: &Log) -> usize {
        let mut rest = 0..log.ids.len();
        if self.sampling == Sampling::ALL {
            return self.told.untold(&rest);
        }
        let mut unknown = 0;
        while let Some(gap) = self.told.last_gap(rest.clone()) {
            rest.end = gap.start;
            unknown += log.ids[gap].iter().filter(|id| self.sampling.keeps(**id)).count();
        }
        unknown
    }

    /// The owner keeps other names from now on. If they are more than before, it is told the whole anew.
    fn sample(&mut self, sampling: Sampling) {
        if sampling < self.sampling {
            self.forget();
        }
        self.sampling = sampling;
    }

    /// Whether names may be told now: an owner that asks for everything over and over again is not told more often than leases are renewed.
    fn open(&self, renew_after: Duration, now: Instant) -> bool {
        match self.stage {
            Stage::Untold => self.begun.is_none_or(|at| now.saturating_duration_since(at) >= renew_after),
            Stage::Listing | Stage::Listed { .. } => true,
        }
    }

    /// Whether the lease was renewed `after` ago, or longer.
    fn stale(&self, after: Duration, now: Instant) -> bool {
        matches!(self.stage, Stage::Listed { renewed } if now.saturating_duration_since(renewed) >= after)
    }

    /// Whether there is nothing to tell it.
    fn idle(&self, log: &Log, renew_after: Duration, now: Instant) -> bool {
        let names = self.untold(log) > 0;
        match self.stage {
            Stage::Untold => !names || !self.open(renew_after, now),
            Stage::Listing => false,
            Stage::Listed { .. } => !names && self.gone.is_empty() && !self.stale(renew_after, now),
        }
    }

    /// What it knows is not known any more, or does not count: it is told the whole anew.
    fn forget(&mut self) {
        *self = Self { begun: self.begun, sampling: self.sampling, ..Self::default() };
    }
}

/// One announcement. Hand it back to [`Announcer::acknowledged`] or [`Announcer::failed`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Due {
    /// Whom to tell.
    pub owner: MemberId,
    /// What.
    pub announcement: Announcement,
    parts: BTreeMap<ShardId, Part>,
}

/// What an announcement has of one shard.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Part {
    begins: bool,
    gone: usize,
    ranges: Vec<Range<usize>>,
    /// Of all that the owner was told, once it has this.
    digest: ClaimDigest,
    renews: bool,
}

/// The names of a shard that are to be looked at.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Review {
    /// The shard.
    pub shard: ShardId,
    /// The names that are announced. Keep those that the host still holds.
    pub ids: Vec<ShortId>,
    /// How much of the log was looked at.
    seen: usize,
}

impl Announcer {
    /// Nothing to announce, and nobody to tell. Leases last for `lease`. `serial` is any number that an earlier life of this peer is unlikely to have
    /// come near.
    #[must_use]
    pub fn new(lease: Duration, serial: u64, now: Instant) -> Self {
        let renew_after = renew_after(lease);
        // Staggered, so that reviews do not come all at once.
        let log =
            |shard: ShardId| Log { ids: Vec::new(), reviewed: now + renew_after * u32::from(shard.0) / 256 };
        let logs = ShardId::all().map(log).collect();
        Self { renew_after, logs, owners: BTreeMap::new(), last: None, serial }
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
                owner.positions.entry(shard).or_default();
            }
        }
    }

    /// The next announcement that is due to an owner that is `answering` and has none in flight. Owners take turns.
    pub fn next(&mut self, now: Instant, answering: impl Fn(MemberId) -> bool) -> Option<Due> {
        loop {
            let due = self.first_due(now, &answering)?;
            self.send(&due);
            if !due.announcement.is_empty() {
                return Some(due);
            }
            // The owner keeps none of these names: that is as good as told.
            self.acknowledged(&due, &[], now);
        }
    }

    fn first_due(&self, now: Instant, answering: impl Fn(MemberId) -> bool) -> Option<Due> {
        let ready = |(member, owner): (&MemberId, &Owner)| {
            let resting = owner.in_flight || owner.not_before.is_some_and(|at| now < at);
            if resting || !answering(*member) {
                return None;
            }
            owner.pending.clone().or_else(|| self.compose(*member, owner, now))
        };
        match self.last {
            None => self.owners.iter().find_map(ready),
            Some(last) => {
                let behind = self.owners.range((Bound::Excluded(last), Bound::Unbounded));
                behind.chain(self.owners.range(..=last)).find_map(ready)
            }
        }
    }

    fn send(&mut self, due: &Due) {
        self.last = Some(due.owner);
        if due.announcement.serial == self.serial {
            self.serial = self.serial.wrapping_add(1);
        }
        if let Some(owner) = self.owners.get_mut(&due.owner) {
            for shard in due.parts.keys().filter(|_| owner.pending.is_none()) {
                owner.positions.entry(*shard).and_modify(|position| position.moving = true);
            }
            (owner.in_flight, owner.not_before) = (true, None);
            owner.pending = Some(due.clone());
        }
    }

    /// What an owner is due, up to one message.
    fn compose(&self, member: MemberId, owner: &Owner, now: Instant) -> Option<Due> {
        let log = |shard: &ShardId| &self.logs[shard.index()];
        let renew_after = self.renew_after;
        // Mostly nothing is due, to any of hundreds of owners.
        if owner.positions.iter().all(|(shard, position)| position.idle(log(shard), renew_after, now)) {
            return None;
        }
        let open = owner.positions.iter().filter(|(_, position)| position.open(renew_after, now));
        let open: Vec<_> = open.map(|(shard, position)| (*shard, position, log(shard))).collect();
        let mut batch = Batch::default();
        batch.take_gone(&open);
        batch.take_names(&open);
        // Where one lease has to be renewed, others go with it that would have to be soon.
        let any = owner.positions.values().any(|position| position.stale(renew_after, now));
        let soon = renew_after / if any { 2 } else { 1 };
        batch.take_digests(&open, |position| position.stale(soon, now));
        batch.due(member, self.serial)
    }

    /// The owner has it; `anew` are the shards that it asks for as a whole.
    pub fn acknowledged(&mut self, due: &Due, anew: &[ShardId], now: Instant) {
        let Some(owner) = self.owners.get_mut(&due.owner) else { return };
        owner.in_flight = false;
        owner.pending = None;
        for (shard, part) in &due.parts {
            // The shard may have been taken from the owner meanwhile, and given to it again.
            let position = owner.positions.get_mut(shard).filter(|position| position.moving);
            let Some(position) = position else { continue };
            position.moving = false;
            if part.begins {
                (position.stage, position.begun) = (Stage::Listing, Some(now));
            }
            position.gone.drain(..part.gone);
            part.ranges.iter().for_each(|range| position.told.add(range.clone()));
            position.digest = part.digest;
            if anew.contains(shard) {
                position.forget();
            } else if part.renews {
                position.stage = Stage::Listed { renewed: now };
            }
        }
    }

    /// The owner did not take it: it is due again after a pause.
    pub fn failed(&mut self, due: &Due, now: Instant) {
        if let Some(owner) = self.owners.get_mut(&due.owner) {
            owner.in_flight = false;
            owner.not_before = Some(now + ANNOUNCE_RETRY);
        }
    }

    /// The shards of which it should be looked now what of them the host still holds.
    #[must_use]
    pub fn reviews(&self, now: Instant) -> Vec<Review> {
        let due = |shard: &ShardId| {
            let log = &self.logs[shard.index()];
            let age = now.saturating_duration_since(log.reviewed);
            age >= self.renew_after && !log.ids.is_empty()
        };
        let review = |shard: ShardId| {
            let log = &self.logs[shard.index()];
            Review { shard, ids: log.ids.clone(), seen: log.ids.len() }
        };
        ShardId::all().filter(due).map(review).collect()
    }

    /// Takes what a review came to: names that the host lost leave the log, and owners that know them are due to hear of it. While a
    /// message is out that has names of the shard nothing is done: the review is due again.
    pub fn reviewed(&mut self, review: Review, now: Instant) {
        let Review { shard, ids, seen } = review;
        let of_shard = |owner: &Owner| owner.positions.get(&shard).is_some_and(|position| position.moving);
        if self.owners.values().any(|owner| owner.in_flight && of_shard(owner)) {
            return;
        }
        let log = &mut self.logs[shard.index()];
        let (removed, fresh) = compare(&log.ids, seen, &ids);
        let lost = |at: &usize| log.ids[*at];
        for position in self.owners.values_mut().filter_map(|owner| owner.positions.get_mut(&shard)) {
            if position.moving {
                // It failed, and what will come of it is not known.
                position.forget();
            }
            let known = removed.iter().filter(|at| position.told.contains(**at));
            position.gone.extend(known.map(lost).filter(|id| position.sampling.keeps(*id)));
            position.told.shift(&removed);
        }
        let mut gone = removed.iter().copied().peekable();
        let mut at = 0..;
        log.ids.retain(|_| gone.next_if_eq(&at.next().unwrap_or_default()).is_none());
        log.ids.extend(fresh);
        log.reviewed = now;
        let length = log.ids.len();
        for position in self.owners.values_mut().filter_map(|owner| owner.positions.get_mut(&shard)) {
            // So much is gone that it costs less to tell what is left.
            if position.gone.len() > length.max(INDEX_BATCH) {
                position.forget();
            }
        }
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
                let whole = matches!(position.stage, Stage::Listed { .. });
                waits |= names > 0;
                backlog.names += names;
                backlog.shards_behind += usize::from(!whole && names > 0);
            }
            backlog.owners += usize::from(waits);
        }
        backlog
    }
}

/// What of a log is to go, in ascending order, and what is to be added, when of its first `seen` names those among `held` are held, and of `held` all are to
/// be announced. A name that the log has more than once (it was lost and found again) goes as often, and is added once.
fn compare(log: &[ShortId], seen: usize, held: &[ShortId]) -> (Vec<usize>, Vec<ShortId>) {
    let (mut known, mut twice) = (Ids::default(), Ids::default());
    known.reserve(log.len());
    twice.extend(log.iter().copied().filter(|id| !known.insert(*id)));
    let mut held: Ids = held.iter().copied().collect();
    held.extend(&log[seen.min(log.len())..]);
    let goes = |(at, id): (usize, &ShortId)| (twice.contains(id) || !held.contains(id)).then_some(at);
    let removed = log.iter().enumerate().filter_map(goes).collect();
    let fresh = held.iter().copied().filter(|id| twice.contains(id) || !known.contains(id)).collect();
    (removed, fresh)
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
    announcement: Announcement,
    parts: BTreeMap<ShardId, Part>,
}

type Open<'a> = [(ShardId, &'a Position, &'a Log)];

impl Batch {
    fn room(&self) -> usize {
        INDEX_BATCH - self.announcement.gone.len() - self.announcement.ids.len()
    }

    fn part(&mut self, shard: ShardId, position: &Position) -> &mut Part {
        let new = || Part { digest: position.digest, ..Part::default() };
        self.parts.entry(shard).or_insert_with(new)
    }

    fn take_gone(&mut self, open: &Open<'_>) {
        for (shard, position, _) in open.iter().filter(|(_, position, _)| !position.gone.is_empty()) {
            let gone = &position.gone[..position.gone.len().min(self.room())];
            let part = self.part(*shard, position);
            part.gone = gone.len();
            gone.iter().for_each(|id| part.digest.remove(*id));
            self.announcement.gone.extend_from_slice(gone);
        }
    }

    /// Takes names that are due, of each log the newest. Each has its part of what room there is, so that the newest names of all go before
    /// older ones of any. A shard whose lost names are not all told is left out: one of them may be among the new names.
    fn take_names(&mut self, open: &Open<'_>) {
        let due = |(shard, position, log): &&(ShardId, &Position, &Log)| {
            let gone = self.parts.get(shard).map_or(0, |part| part.gone);
            position.gone.len() == gone && position.untold(log) > 0
        };
        let due: Vec<_> = open.iter().filter(due).collect();
        let share = self.room().div_ceil(due.len().max(1));
        for (shard, position, log) in due {
            let mut room = share.min(self.room());
            let begins = room > 0 && position.stage == Stage::Untold;
            let mut within = 0..log.ids.len();
            while let Some(gap) = (room > 0).then(|| position.told.last_gap(within.clone())).flatten() {
                let (mut start, from) = (gap.end, self.announcement.ids.len());
                while start > gap.start && room > 0 {
                    start -= 1;
                    if position.sampling.keeps(log.ids[start]) {
                        self.announcement.ids.push(log.ids[start]);
                        room -= 1;
                    }
                }
                within.end = start;
                let names = self.announcement.ids[from..].to_vec();
                let part = self.part(*shard, position);
                names.iter().for_each(|id| part.digest.add(*id));
                part.ranges.push(start..gap.end);
            }
            if begins {
                self.announcement.begins.push(*shard);
                self.part(*shard, position).begins = true;
            }
        }
    }

    /// Takes the digests of shards whose leases are `stale`, and of those that have been told as a whole with this message.
    fn take_digests(&mut self, open: &Open<'_>, stale: impl Fn(&Position) -> bool) {
        for (shard, position, log) in open {
            let part = self.parts.get(shard);
            let told = part.map_or(0, |part| part.ranges.iter().map(Range::len).sum());
            let begun = part.is_some_and(|part| part.begins) || position.stage == Stage::Listing;
            let whole = begun && told == position.untold(log);
            if whole || stale(position) {
                let part = self.part(*shard, position);
                part.renews = true;
                let digest = part.digest;
                self.announcement.digests.push((*shard, digest));
            }
        }
    }

    fn due(self, owner: MemberId, serial: u64) -> Option<Due> {
        let Self { announcement, parts } = self;
        let announcement = Announcement { serial, ..announcement };
        (!parts.is_empty()).then_some(Due { owner, announcement, parts })
    }
}

const _: () = assert!(SHARDS <= INDEX_BATCH, "each shard that is due has its part of a message");

#[cfg(test)]
#[path = "announce_tests.rs"]
mod tests;
