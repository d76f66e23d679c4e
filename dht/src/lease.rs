//! What an owner keeps: for each name prefix of its shards, who announced to hold it, and until when.
//!
//! An entry is a 64-bit id, a 16-bit holder number and a 16-bit lease: 12 bytes, and at most an eighth of slack. A shard's entries
//! stand in buckets of some hundred, by the bits of the id that follow the shard's; in a bucket they are sorted, so that adding a batch moves
//! few of them, however many the owner has. Leases count in ticks of two seconds; they run out unless the holder announces again. Pure:
//! time comes in as `now`.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use page::ShortId;

use crate::{
    limits::{HOLDERS_PER_NAME, LEASE, OWNER_ENTRIES},
    shard::{MemberId, SHARD_BITS, SHARDS, ShardId},
};

/// The unit of leases. 16 bits of it are 36 hours, far more than a lease.
const TICK: Duration = Duration::from_secs(2);
/// A lease in ticks.
const LEASE_TICKS: u16 = 300;
/// Entries of a bucket on average, at most: a shard with more has its buckets cut in two. A batch then moves a few KiB a bucket it
/// touches, and what a bucket takes beside its entries stays below a twentieth of them.
const BUCKET_ENTRIES: usize = 512;
const _: () = assert!(LEASE.as_secs() == TICK.as_secs() * LEASE_TICKS as u64);

#[derive(Clone, Copy, Debug)]
struct Claim {
    holder: u16,
    /// The tick, modulo 2^16, at which the lease has run out.
    until: u16,
}

/// The entries of a shard. The number of buckets is a power of two.
#[derive(Debug)]
struct Shard {
    buckets: Vec<Bucket>,
    entries: usize,
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
        let shards = (0..SHARDS).map(|_| Shard::default()).collect();
        Self { start: now, shards, holders: Vec::new(), numbers: HashMap::new(), entries: 0 }
    }

    fn tick(&self, now: Instant) -> u16 {
        let ticks = now.saturating_duration_since(self.start).as_secs() / TICK.as_secs();
        u16::try_from(ticks % (1 << 16)).expect("reduced modulo 2^16")
    }

    /// Notes that `member` holds `ids` from now on, for one lease. Names beyond the table's bounds are left out: they are found
    /// elsewhere or missed.
    pub fn announce(&mut self, member: MemberId, ids: &[ShortId], now: Instant) {
        let Some(number) = self.number(member) else { return };
        let claim = Claim { holder: number, until: self.tick(now).wrapping_add(LEASE_TICKS) };
        let mut sorted: Vec<u64> = ids.iter().map(|id| id.0).collect();
        sorted.sort_unstable();
        sorted.dedup();
        for group in sorted.chunk_by(|a, b| ShardId::of(ShortId(*a)) == ShardId::of(ShortId(*b))) {
            let room = OWNER_ENTRIES - self.entries;
            let shard = &mut self.shards[ShardId::of(ShortId(group[0])).index()];
            let added = shard.announce(group, claim, room);
            self.entries += added;
            if let Some(holder) = &mut self.holders[usize::from(number)] {
                holder.entries += added;
            }
        }
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
        let tick = self.tick(now);
        let usable: Vec<Option<MemberId>> = self
            .holders
            .iter()
            .map(|slot| slot.as_ref().map(|holder| holder.member).filter(|member| usable(*member)))
            .collect();
        let mut found = Vec::new();
        for (id, at) in ids.iter().zip(0u32..) {
            for claim in self.shards[ShardId::of(*id).index()].claims_of(id.0) {
                if let Some(member) = usable[usize::from(claim.holder)].filter(|_| claim.runs(tick)) {
                    found.push((at, member));
                }
            }
        }
        found
    }

    /// Drops the entries of one shard whose lease has run out, and all of them if `keep` is false (the shard is no longer owned).
    pub fn sweep(&mut self, shard: ShardId, keep: bool, now: Instant) {
        let tick = self.tick(now);
        let shard = &mut self.shards[shard.index()];
        let before = shard.entries;
        shard.sweep(|claim| {
            let stays = keep && claim.runs(tick);
            if let Some(holder) = self.holders[usize::from(claim.holder)].as_mut().filter(|_| !stays) {
                holder.entries -= 1;
            }
            stays
        });
        self.entries -= before - shard.entries;
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
    fn runs(self, tick: u16) -> bool {
        // Leases are far shorter than half of the range, so the sign of the wrapped difference tells past from future.
        let left = self.until.wrapping_sub(tick);
        left != 0 && left < 1 << 15
    }
}

impl Default for Shard {
    fn default() -> Self {
        Self { buckets: vec![Bucket::default()], entries: 0 }
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

    /// Renews or adds `claim` for sorted, distinct `ids`, adding at most `room`; returns how many entries are new.
    fn announce(&mut self, ids: &[u64], claim: Claim, room: usize) -> usize {
        let buckets = self.buckets.len();
        let mut added = 0;
        for group in ids.chunk_by(|a, b| bucket_of(*a, buckets) == bucket_of(*b, buckets)) {
            added += self.buckets[bucket_of(group[0], buckets)].announce(group, claim, room - added);
        }
        self.entries += added;
        while self.entries > self.buckets.len() * BUCKET_ENTRIES {
            self.split();
        }
        added
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
    fn sweep(&mut self, mut stays: impl FnMut(Claim) -> bool) {
        self.buckets.iter_mut().for_each(|bucket| bucket.retain(&mut stays));
        self.entries = self.buckets.iter().map(|bucket| bucket.ids.len()).sum();
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
    fn announce(&mut self, ids: &[u64], claim: Claim, room: usize) -> usize {
        let mut fresh = Vec::new();
        for id in ids {
            let range = self.range(*id);
            let count = range.len();
            match self.claims[range].iter_mut().find(|other| other.holder == claim.holder) {
                Some(mine) => *mine = claim,
                None if count < HOLDERS_PER_NAME && fresh.len() < room => fresh.push(*id),
                None => {}
            }
        }
        self.merge(&fresh, claim);
        fresh.len()
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

    fn retain(&mut self, mut stays: impl FnMut(Claim) -> bool) {
        let before = self.ids.len();
        let mut kept = 0;
        for at in 0..before {
            if stays(self.claims[at]) {
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
            let at = old + new - 1;
            if old > 0 && self.ids[old - 1] > fresh[new - 1] {
                old -= 1;
                self.ids[at] = self.ids[old];
                self.claims[at] = self.claims[old];
            } else {
                new -= 1;
                self.ids[at] = fresh[new];
                self.claims[at] = claim;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn member(n: u8) -> MemberId {
        MemberId::of_peer(&[n])
    }

    #[derive(Clone, Debug)]
    enum Step {
        Announce(u8, Vec<u64>),
        Wait(u64),
        Sweep(u8),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        // Few ids in few shards, so that they collide.
        let id = (0u64..3, 0u64..6).prop_map(|(shard, low)| shard << 56 | low);
        let step = prop_oneof![
            (0u8..4, prop::collection::vec(id, 0..8)).prop_map(|(who, ids)| Step::Announce(who, ids)),
            (0..LEASE.as_secs()).prop_map(Step::Wait),
            (0u8..3).prop_map(Step::Sweep),
        ];
        prop::collection::vec(step, 0..40)
    }

    proptest! {
        /// The reference: a map from id and holder to the end of the lease.
        #[test]
        fn finds_what_was_announced_within_a_lease(steps in steps()) {
            let start = Instant::now();
            let mut now = start;
            let mut table = OwnerTable::new(start);
            let mut model: BTreeMap<(u64, u8), Instant> = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Announce(who, ids) => {
                        let short: Vec<_> = ids.iter().map(|id| ShortId(*id)).collect();
                        table.announce(member(who), &short, now);
                        model.extend(ids.iter().map(|id| ((*id, who), now)));
                    }
                    Step::Wait(seconds) => now += Duration::from_secs(seconds),
                    Step::Sweep(shard) => table.sweep(ShardId(shard), true, now),
                }
                for ((id, who), at) in &model {
                    let found = table.lookup(&[ShortId(*id)], now, |_| true);
                    let found = found.contains(&(0, member(*who)));
                    let age = now - *at;
                    // A lease ends within one tick of its time.
                    if age + TICK <= LEASE { prop_assert!(found); }
                    if age >= LEASE + TICK { prop_assert!(!found); }
                }
            }
        }
    }

    #[test]
    fn an_entry_takes_at_most_sixteen_bytes() {
        let mut table = OwnerTable::new(Instant::now());
        let step = u64::MAX / 300_000;
        let ids: Vec<_> = (0..300_000).map(|n| ShortId(n * step)).collect();
        for (n, batch) in ids.chunks(4096).enumerate() {
            table.announce(member(u8::try_from(n % 7).unwrap()), batch, Instant::now());
        }
        assert_eq!(table.len(), ids.len());
        assert!(table.bytes() <= 16 * table.len(), "{} bytes an entry", table.bytes() / table.len());
    }

    #[test]
    fn entries_are_found_while_their_buckets_split_and_join() {
        let start = Instant::now();
        let mut table = OwnerTable::new(start);
        let shard = ShardId(7);
        // All of one shard, spread over the bits behind its own.
        let ids: Vec<_> = (0..40 * BUCKET_ENTRIES as u64)
            .map(|n| ShortId(7 << 56 | n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 8))
            .collect();
        let found = |table: &OwnerTable, ids: &[ShortId], who, now| {
            table.lookup(ids, now, |member| member == who).into_iter().map(|(at, _)| at).collect::<Vec<_>>()
        };
        for batch in ids.chunks(1000) {
            table.announce(member(1), batch, start);
        }
        let all: Vec<u32> = (0..).take(ids.len()).collect();
        assert!(table.shards[shard.index()].buckets.len() >= 40);
        assert_eq!(found(&table, &ids, member(1), start), all);
        let later = start + LEASE / 2;
        let (renewed, _) = ids.split_at(ids.len() / 40);
        table.announce(member(2), renewed, later);
        assert_eq!(found(&table, &ids, member(1), later), all, "another holder takes nothing away");
        let end = start + LEASE + TICK;
        table.sweep(shard, true, end);
        assert_eq!((table.len(), table.shards[shard.index()].buckets.len() < 40), (renewed.len(), true));
        assert_eq!(found(&table, &ids, member(2), end), &all[..renewed.len()]);
        assert!(found(&table, &ids, member(1), end).is_empty());
    }

    #[test]
    fn a_peer_that_is_not_usable_is_not_named() {
        let now = Instant::now();
        let mut table = OwnerTable::new(now);
        table.announce(member(1), &[ShortId(5)], now);
        assert!(table.lookup(&[ShortId(5)], now, |_| false).is_empty());
        table.sweep(ShardId(0), false, now);
        assert!(table.is_empty());
    }
}
