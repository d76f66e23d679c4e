//! What an owner keeps: for each name prefix of its shards, who announced to hold it, and until when.
//!
//! An entry is a 64-bit id, a 16-bit holder number and a 16-bit lease (a bit of which says whether the holder itself announced it, or the
//! shard's other owner passed it on): 12 bytes, and at most an eighth of slack. A shard's entries
//! stand in buckets of some hundred, by the bits of the id that follow the shard's; in a bucket they are sorted, so that adding a batch moves
//! few of them, however many the owner has. When the table comes near its bound, shards are sampled ([`crate::sample`]). Leases count in ticks of two seconds; they run out unless the holder announces again. Pure:
//! time comes in as `now`.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use page::ShortId;

use crate::{
    limits::{HOLDERS_PER_NAME, LEASE, OWNER_ENTRIES, SAMPLING_BITS, SAMPLING_BITS_ONE},
    repair::ClaimDigest,
    sample::{Sampled, Sampling},
    shard::{MemberId, SHARD_BITS, SHARDS, ShardId},
};

/// The unit of leases. 15 bits of it are 18 hours, far more than a lease.
const TICK: Duration = Duration::from_secs(2);
/// A lease in ticks.
const LEASE_TICKS: u16 = 300;
/// Entries of a bucket on average, at most: a shard with more has its buckets cut in two. A batch then moves a few KiB a bucket it
/// touches, and what a bucket takes beside its entries stays below a twentieth of them.
const BUCKET_ENTRIES: usize = 512;
/// Entries shown to whoever goes through a whole shard before others have their turn at the table.
const PART_ENTRIES: usize = 1 << 16;
const _: () = assert!(LEASE.as_secs() == TICK.as_secs() * LEASE_TICKS as u64);

/// How often ticks begin anew.
const TICK_TURN: u16 = 1 << 15;

#[derive(Clone, Copy, Debug)]
struct Claim {
    holder: u16,
    /// The tick, modulo [`TICK_TURN`], at which the lease has run out; the bit above says that this is [`Claim::hearsay`].
    until: u16,
}

/// The entries of a shard. The number of buckets is a power of two.
#[derive(Debug)]
struct Shard {
    buckets: Vec<Bucket>,
    entries: usize,
    /// Of those, entries that one more sampled bit would drop.
    last: usize,
    sampled: Sampled,
}

/// How many entries are new, and how many of them one more sampled bit would drop.
#[derive(Clone, Copy, Default)]
struct Added {
    entries: usize,
    last: usize,
}

#[derive(Debug, Default)]
struct Bucket {
    ids: Vec<u64>,
    claims: Vec<Claim>,
}

/// The entries of one owner.
#[derive(Debug)]
pub struct OwnerTable {
    start: Instant,
    shards: Vec<Shard>,
    holders: Vec<Option<Holder>>,
    numbers: HashMap<MemberId, u16>,
    entries: usize,
    /// Entries that there are at most.
    most: usize,
}

#[derive(Debug)]
struct Holder {
    member: MemberId,
    entries: usize,
}

impl OwnerTable {
    /// An empty table.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self::with_room(OWNER_ENTRIES, now)
    }

    /// An empty table of so many entries at most.
    #[must_use]
    pub fn with_room(most: usize, now: Instant) -> Self {
        let shards = (0..SHARDS).map(|_| Shard::default()).collect();
        Self { start: now, shards, holders: Vec::new(), numbers: HashMap::new(), entries: 0, most }
    }

    /// Which names of a shard are kept.
    #[must_use]
    pub fn sampling(&self, shard: ShardId) -> Sampling {
        self.shards[shard.index()].sampled.sampling
    }

    /// The shards of which not every name is kept.
    #[must_use]
    pub fn samplings(&self) -> Vec<(ShardId, Sampling)> {
        let all = ShardId::all().map(|shard| (shard, self.sampling(shard)));
        all.filter(|(_, sampling)| *sampling != Sampling::ALL).collect()
    }

    /// Keeps of a shard what `sampling` keeps from now on, and drops the rest.
    pub fn sample(&mut self, shard: ShardId, sampling: Sampling) {
        let shard = &mut self.shards[shard.index()];
        shard.sampled.set(sampling);
        let before = shard.entries;
        shard.sweep(|id, claim| {
            let stays = sampling.keeps(ShortId(id));
            if let Some(holder) = self.holders[usize::from(claim.holder)].as_mut().filter(|_| !stays) {
                holder.entries -= 1;
            }
            stays
        });
        self.entries -= before - shard.entries;
    }

    /// Makes room for more entries of a holder if the table is nearly full, or the holder's half of it: of the shards the one that loses most by it is
    /// sampled by one more bit. For one holder's sake that goes to a few bits only.
    fn make_room(&mut self, holder: usize) {
        loop {
            let of_holder = self.holders[holder].as_ref().map_or(0, |holder| holder.entries);
            let bits = if self.entries > self.most / 16 * 15 {
                SAMPLING_BITS
            } else if of_holder > self.most / 32 * 15 {
                SAMPLING_BITS_ONE
            } else {
                return;
            };
            let shards = ShardId::all().zip(&self.shards);
            let may = |of: &Shard| of.last > 0 && of.sampled.sampling.zero_bits() < bits;
            let best = shards.filter(|(_, shard)| may(shard)).max_by_key(|(_, shard)| shard.last);
            let coarser = |(shard, of): (ShardId, &Shard)| Some((shard, of.sampled.sampling.coarser()?));
            let Some((shard, sampling)) = best.and_then(coarser) else { return };
            let bits = sampling.zero_bits();
            tracing::info!(
                shard = shard.0,
                bits,
                "the owner's table is full; a shard keeps half of its names"
            );
            self.sample(shard, sampling);
        }
    }

    fn tick(&self, now: Instant) -> u16 {
        let ticks = now.saturating_duration_since(self.start).as_secs() / TICK.as_secs();
        u16::try_from(ticks % u64::from(TICK_TURN)).expect("reduced modulo 2^15")
    }

    /// Notes that `member` holds `ids` from now on, for one lease. Names beyond the table's bounds are left out: they are found
    /// elsewhere or missed.
    pub fn announce(&mut self, member: MemberId, ids: &[ShortId], now: Instant) {
        let Some(number) = self.number(member) else { return };
        let claim = Claim::new(number, self.tick(now), LEASE_TICKS, false);
        let mut sorted: Vec<u64> = ids.iter().map(|id| id.0).collect();
        sorted.sort_unstable();
        sorted.dedup();
        self.add(&sorted, claim);
    }

    /// Adds or renews a claim for sorted, distinct ids; returns how many are new.
    fn add(&mut self, sorted: &[u64], claim: Claim) -> usize {
        let mut new = 0;
        for group in sorted.chunk_by(|a, b| ShardId::of(ShortId(*a)) == ShardId::of(ShortId(*b))) {
            self.make_room(claim.holder.into());
            let Some(holder) = &mut self.holders[usize::from(claim.holder)] else { continue };
            // One that announces without end leaves room for others.
            let room = (self.most - self.entries).min((self.most / 2).saturating_sub(holder.entries));
            let shard = &mut self.shards[ShardId::of(ShortId(group[0])).index()];
            let sampling = shard.sampled.sampling;
            let kept: Vec<u64> = group.iter().copied().filter(|id| sampling.keeps(ShortId(*id))).collect();
            let added = shard.announce(&kept, claim, room);
            self.entries += added;
            holder.entries += added;
            new += added;
        }
        new
    }

    /// Takes claims that another owner of the shard passed on: ids in any order, each with what is left of its lease. What the
    /// holder itself announced stands if it lasts as long. Returns how many entries are new.
    pub fn learn(&mut self, member: MemberId, claims: &[(ShortId, Duration)], now: Instant) -> usize {
        let Some(number) = self.number(member) else { return 0 };
        let tick = self.tick(now);
        let ticks = |left: Duration| {
            // Never more than if the holder had announced it just now, and rounded down, so that it cannot grow by being passed on.
            u16::try_from(left.as_secs() / TICK.as_secs()).unwrap_or(u16::MAX).min(LEASE_TICKS)
        };
        let mut sorted: Vec<(u16, u64)> = claims.iter().map(|(id, left)| (ticks(*left), id.0)).collect();
        sorted.retain(|(left, _)| *left > 0);
        sorted.sort_unstable();
        sorted.dedup();
        let mut added = 0;
        for group in sorted.chunk_by(|a, b| a.0 == b.0) {
            let ids: Vec<u64> = group.iter().map(|(_, id)| *id).collect();
            added += self.add(&ids, Claim::new(number, tick, group[0].0, true));
        }
        added
    }

    /// Adds to `digests` those of a part of a shard from the id `from` on: for each holder its claims with at least half a lease left whose names
    /// `sampling` keeps.
    /// Returns where the next part begins; a part is small enough to let others at the table between two.
    pub fn digest(
        &self,
        shard: ShardId,
        from: ShortId,
        sampling: Sampling,
        now: Instant,
        digests: &mut BTreeMap<MemberId, ClaimDigest>,
    ) -> Option<ShortId> {
        let tick = self.tick(now);
        let mut by_number: Vec<ClaimDigest> = vec![ClaimDigest::default(); self.holders.len()];
        let next = self.shards[shard.index()].visit(from.0, shard, |id, claim| {
            if claim.left(tick) >= LEASE_TICKS / 2 && sampling.keeps(ShortId(id)) {
                by_number[usize::from(claim.holder)].add(ShortId(id));
            }
            true
        });
        for (holder, digest) in self.holders.iter().zip(by_number) {
            if let Some(holder) = holder.as_ref().filter(|_| digest.claims > 0) {
                digests.entry(holder.member).or_default().join(digest);
            }
        }
        next.map(ShortId)
    }

    /// Appends to `claims` those of some holders in a part of a shard's sampled names from the id `from` on, as [`Self::digest`] counts them: the id, the
    /// holder's place in `of`, and what is left of the lease. Ends a part early at `bound` claims.
    pub fn claims(
        &self,
        (shard, sampling): (ShardId, Sampling),
        from: ShortId,
        of: &[MemberId],
        now: Instant,
        bound: usize,
        claims: &mut Vec<(ShortId, u16, Duration)>,
    ) -> Option<ShortId> {
        let tick = self.tick(now);
        let mut places: Vec<Option<u16>> = vec![None; self.holders.len()];
        for (member, place) in of.iter().zip(0u16..) {
            if let Some(number) = self.numbers.get(member) {
                places[usize::from(*number)] = Some(place);
            }
        }
        let next = self.shards[shard.index()].visit(from.0, shard, |id, claim| {
            let left = claim.left(tick);
            let of_interest = left >= LEASE_TICKS / 2 && sampling.keeps(ShortId(id));
            let Some(place) = places[usize::from(claim.holder)].filter(|_| of_interest) else {
                return true;
            };
            // All claims of one id go together: the next part begins with another id.
            let whole = claims.last().is_some_and(|(last, ..)| last.0 == id);
            if claims.len() + HOLDERS_PER_NAME > bound && !whole {
                return false;
            }
            claims.push((ShortId(id), place, TICK * u32::from(left)));
            true
        });
        next.map(ShortId)
    }

    fn number(&mut self, member: MemberId) -> Option<u16> {
        if let Some(number) = self.numbers.get(&member) {
            return Some(*number);
        }
        let free = self.holders.iter().position(|slot| slot.as_ref().is_none_or(|h| h.entries == 0));
        let at = free.unwrap_or(self.holders.len());
        let number = u16::try_from(at).ok()?;
        let holder = Some(Holder { member, entries: 0 });
        match self.holders.get_mut(at) {
            Some(slot) => {
                if let Some(before) = std::mem::replace(slot, holder) {
                    self.numbers.remove(&before.member);
                }
            }
            None => self.holders.push(holder),
        }
        self.numbers.insert(member, number);
        Some(number)
    }

    /// Who holds `ids`: pairs of a place in `ids` and a holder that passes `usable`, as far as leases run.
    pub fn lookup(
        &self,
        ids: &[ShortId],
        now: Instant,
        usable: impl Fn(MemberId) -> bool,
    ) -> Vec<(u32, MemberId)> {
        let mut found = Vec::new();
        self.each_holder(ids, now, usable, |at, member, _| found.push((at, member)));
        found
    }

    /// As [`Self::lookup`]; `found` is told besides whether the claim is hearsay: passed on by another owner, not announced by the holder.
    pub fn each_holder(
        &self,
        ids: &[ShortId],
        now: Instant,
        usable: impl Fn(MemberId) -> bool,
        mut found: impl FnMut(u32, MemberId, bool),
    ) {
        let tick = self.tick(now);
        let usable: Vec<Option<MemberId>> = self
            .holders
            .iter()
            .map(|slot| slot.as_ref().map(|holder| holder.member).filter(|member| usable(*member)))
            .collect();
        for (id, at) in ids.iter().zip(0u32..) {
            for claim in self.shards[ShardId::of(*id).index()].claims_of(id.0) {
                if let Some(member) = usable[usize::from(claim.holder)].filter(|_| claim.left(tick) > 0) {
                    found(at, member, claim.hearsay());
                }
            }
        }
    }

    /// Drops the entries of one shard whose lease has run out, and all of them if `keep` is false (the shard is no longer owned). Where there has been
    /// room for long, more of its names are kept from now on.
    pub fn sweep(&mut self, shard: ShardId, keep: bool, now: Instant) {
        let (tick, number) = (self.tick(now), shard.index());
        let shard = &mut self.shards[number];
        let before = shard.entries;
        shard.sweep(|_, claim| {
            let stays = keep && claim.left(tick) > 0;
            if let Some(holder) = self.holders[usize::from(claim.holder)].as_mut().filter(|_| !stays) {
                holder.entries -= 1;
            }
            stays
        });
        self.entries -= before - shard.entries;
        if !keep {
            shard.sampled = Sampled::default();
        }
        let entries = shard.entries;
        let expected =
            self.shards.iter().map(|shard| shard.sampled.expected(shard.entries, now)).sum::<usize>();
        let largest = self.holders.iter().flatten().map(|holder| holder.entries).max().unwrap_or(0);
        // Less than where sampling begins, by far: what was dropped for want of room does not come back at once.
        let room = expected + entries <= self.most / 4 * 3 && largest + entries <= self.most / 8 * 3;
        let shard = &mut self.shards[number];
        let before = shard.sampled.sampling;
        shard.sampled.look(room, entries, now);
        if shard.sampled.sampling != before {
            // None of its entries has been kept by the last bit yet.
            shard.last = 0;
        }
    }

    /// Entries, those included whose lease has run out since the last sweep.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries
    }

    /// Whether there is no entry.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Bytes that the entries take, slack included.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.shards.iter().flat_map(|shard| &shard.buckets).map(Bucket::bytes).sum()
    }
}

impl Claim {
    /// A claim whose lease ends `left` ticks from `tick`.
    fn new(holder: u16, tick: u16, left: u16, hearsay: bool) -> Self {
        let mark = if hearsay { TICK_TURN } else { 0 };
        Self { holder, until: ((tick + left) % TICK_TURN) | mark }
    }

    /// Whether another owner passed it on, rather than the holder having announced it.
    fn hearsay(self) -> bool {
        self.until & TICK_TURN != 0
    }

    /// What is left of the lease, in ticks; 0 once it has run out.
    fn left(self, tick: u16) -> u16 {
        // Leases are far shorter than a turn of the ticks, so that whatever seems longer is in the past.
        let left = (self.until % TICK_TURN + TICK_TURN - tick) % TICK_TURN;
        if left <= LEASE_TICKS { left } else { 0 }
    }

    /// Takes another claim of the same holder, unless that is hearsay that lasts no longer.
    fn renew(&mut self, other: Self) {
        // The later of two ends that are less than a lease apart, or any if the old one is long past.
        let later = (other.until % TICK_TURN + TICK_TURN - self.until % TICK_TURN) % TICK_TURN;
        if !other.hearsay() || (later > 0 && later < TICK_TURN / 2) {
            *self = other;
        }
    }
}

const _: () = assert!(LEASE_TICKS < TICK_TURN / 2);

impl Default for Shard {
    fn default() -> Self {
        Self { buckets: vec![Bucket::default()], entries: 0, last: 0, sampled: Sampled::default() }
    }
}

/// Which of `buckets` an id belongs to: by the bits behind the shard's own.
fn bucket_of(id: u64, buckets: usize) -> usize {
    let bits = buckets.trailing_zeros();
    let front = (id << SHARD_BITS).checked_shr(u64::BITS - bits).unwrap_or(0);
    usize::try_from(front).expect("it has as many bits as the number of buckets")
}

impl Shard {
    fn claims_of(&self, id: u64) -> &[Claim] {
        self.buckets[bucket_of(id, self.buckets.len())].claims_of(id)
    }

    /// Shows whole buckets from that of the id `from` on to `entry`, less what lies before `from`, until a few thousand entries have been
    /// shown; returns the first id that was not. `entry` ends it by saying `false`: the entry shown last is then the first of the next part.
    fn visit(&self, from: u64, shard: ShardId, mut entry: impl FnMut(u64, Claim) -> bool) -> Option<u64> {
        let count = self.buckets.len();
        let first = bucket_of(from, count);
        let mut shown = 0;
        for (bucket, at) in self.buckets.iter().zip(0u64..).skip(first) {
            if shown >= PART_ENTRIES {
                let bits = count.trailing_zeros();
                let front = u64::from(shard.0) << (u64::BITS - SHARD_BITS);
                return Some(front | at << (u64::BITS - SHARD_BITS - bits));
            }
            let start = bucket.ids.partition_point(|id| *id < from);
            for (id, claim) in bucket.ids[start..].iter().zip(&bucket.claims[start..]) {
                if !entry(*id, *claim) {
                    return Some(*id);
                }
            }
            shown += bucket.ids.len() - start;
        }
        None
    }

    /// Renews or adds `claim` for sorted, distinct `ids`, adding at most `room`; returns how many entries are new.
    fn announce(&mut self, ids: &[u64], claim: Claim, room: usize) -> usize {
        let (buckets, sampling) = (self.buckets.len(), self.sampled.sampling);
        let mut added = Added::default();
        for group in ids.chunk_by(|a, b| bucket_of(*a, buckets) == bucket_of(*b, buckets)) {
            let bucket = &mut self.buckets[bucket_of(group[0], buckets)];
            let of_group = bucket.announce(group, claim, room - added.entries, sampling);
            added.entries += of_group.entries;
            added.last += of_group.last;
        }
        self.entries += added.entries;
        self.last += added.last;
        while self.entries > self.buckets.len() * BUCKET_ENTRIES {
            self.split();
        }
        added.entries
    }

    /// Cuts every bucket in two.
    fn split(&mut self) {
        let buckets = self.buckets.len() * 2;
        let whole = std::mem::take(&mut self.buckets);
        let halves = whole.into_iter().zip(0..).flat_map(|(mut low, at)| {
            let high = low.cut(|id| bucket_of(id, buckets) == at * 2);
            [low, high]
        });
        self.buckets = halves.collect();
    }

    /// Keeps the entries that `stays` says, and joins buckets that have become small in pairs.
    fn sweep(&mut self, mut stays: impl FnMut(u64, Claim) -> bool) {
        self.buckets.iter_mut().for_each(|bucket| bucket.retain(&mut stays));
        self.entries = self.buckets.iter().map(|bucket| bucket.ids.len()).sum();
        let (sampling, ids) = (self.sampled.sampling, self.buckets.iter().flat_map(|bucket| &bucket.ids));
        self.last = ids.filter(|id| sampling.keeps_last(ShortId(**id))).count();
        while self.buckets.len() > 1 && self.entries * 8 < self.buckets.len() * BUCKET_ENTRIES {
            self.buckets = self.buckets.chunks(2).map(|pair| Bucket::join(&pair[0], &pair[1])).collect();
        }
    }
}

impl Bucket {
    fn range(&self, id: u64) -> std::ops::Range<usize> {
        let start = self.ids.partition_point(|other| *other < id);
        let count = self.ids[start..].iter().take_while(|other| **other == id).count();
        start..start + count
    }

    fn claims_of(&self, id: u64) -> &[Claim] {
        &self.claims[self.range(id)]
    }

    /// As [`Shard::announce`].
    fn announce(&mut self, ids: &[u64], claim: Claim, room: usize, sampling: Sampling) -> Added {
        let mut fresh = Vec::new();
        for id in ids {
            let range = self.range(*id);
            let count = range.len();
            match self.claims[range].iter_mut().find(|other| other.holder == claim.holder) {
                Some(mine) => mine.renew(claim),
                None if count < HOLDERS_PER_NAME && fresh.len() < room => fresh.push(*id),
                None => {}
            }
        }
        self.merge(&fresh, claim);
        let last = fresh.iter().filter(|id| sampling.keeps_last(ShortId(**id))).count();
        Added { entries: fresh.len(), last }
    }

    /// Cuts off the entries behind the last one whose id is in the lower half.
    fn cut(&mut self, low: impl Fn(u64) -> bool) -> Self {
        let at = self.ids.partition_point(|id| low(*id));
        let high = Self { ids: self.ids.split_off(at), claims: self.claims.split_off(at) };
        self.shrink();
        high
    }

    fn join(low: &Self, high: &Self) -> Self {
        Self { ids: [&low.ids[..], &high.ids].concat(), claims: [&low.claims[..], &high.claims].concat() }
    }

    fn retain(&mut self, mut stays: impl FnMut(u64, Claim) -> bool) {
        let before = self.ids.len();
        let mut kept = 0;
        for at in 0..before {
            if stays(self.ids[at], self.claims[at]) {
                (self.ids[kept], self.claims[kept]) = (self.ids[at], self.claims[at]);
                kept += 1;
            }
        }
        self.ids.truncate(kept);
        self.claims.truncate(kept);
        if kept < before {
            self.shrink();
        }
    }

    fn bytes(&self) -> usize {
        size_of::<Self>()
            + self.ids.capacity() * size_of::<u64>()
            + self.claims.capacity() * size_of::<Claim>()
    }

    fn shrink(&mut self) {
        self.ids.shrink_to_fit();
        self.claims.shrink_to_fit();
    }

    /// Merges sorted `fresh` in, from the back, in place.
    fn merge(&mut self, fresh: &[u64], claim: Claim) {
        let (mut old, mut new) = (self.ids.len(), fresh.len());
        let length = old + new;
        if self.ids.capacity() < length {
            let more = new + length / 16;
            self.ids.reserve_exact(more);
            self.claims.reserve_exact(more);
        }
        self.ids.resize(length, 0);
        self.claims.resize(length, claim);
        while new > 0 {
            let at = self.ids[..old].partition_point(|id| *id <= fresh[new - 1]);
            self.ids.copy_within(at..old, at + new);
            self.claims.copy_within(at..old, at + new);
            self.ids[at + new - 1] = fresh[new - 1];
            self.claims[at + new - 1] = claim;
            (old, new) = (at, new - 1);
        }
    }
}

#[cfg(test)]
#[path = "lease_tests.rs"]
mod tests;
