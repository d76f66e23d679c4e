//! The entries of one shard at an owner: which holder claims which name.
//!
//! An entry is a 64-bit id and a 16-bit claim (15 bits number the holder): 10 bytes, and at most an eighth of slack. They stand in
//! buckets of some hundred, by the bits of the id that follow the shard's; in a bucket they are sorted, so that adding a batch moves few of
//! them, however many there are. Leases are not kept here: they belong to a holder's whole share of the shard ([`crate::lease`]).

use std::ops::Range;

use page::ShortId;

use crate::{
    limits::HOLDERS_PER_NAME,
    sample::{Sampled, Sampling},
    shard::{SHARD_BITS, ShardId},
};

/// Entries of a bucket on average, at most: a shard with more has its buckets cut in two. A batch then moves a few KiB a bucket it
/// touches, and what a bucket takes beside its entries stays below a twentieth of them.
const BUCKET_ENTRIES: usize = 512;
/// Entries shown to whoever goes through a whole shard before others have their turn at the table.
const PART_ENTRIES: usize = 1 << 16;
/// The bit of a claim that makes it hearsay.
const HEARSAY: u16 = 1 << 15;

/// A holder's number, and whether its claim is hearsay: passed on by another owner, or told before the holder began to tell its share
/// anew and not since.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Claim(u16);

impl Claim {
    /// How many holders there are numbers for.
    pub(crate) const HOLDERS: usize = HEARSAY as usize;

    pub(crate) fn new(holder: u16, hearsay: bool) -> Self {
        debug_assert!(usize::from(holder) < Self::HOLDERS);
        Self(holder | if hearsay { HEARSAY } else { 0 })
    }

    pub(crate) fn holder(self) -> u16 {
        self.0 & !HEARSAY
    }

    pub(crate) fn hearsay(self) -> bool {
        self.0 & HEARSAY != 0
    }
}

/// What came of adding a claim to names.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Added {
    /// Entries that are new.
    pub(crate) new: usize,
    /// Of those, entries that one more sampled bit would drop.
    last: usize,
    /// Entries that were hearsay and are no more.
    pub(crate) confirmed: usize,
    /// Names that found no room.
    pub(crate) left_out: usize,
}

/// What came of taking entries out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Removed {
    /// How many.
    pub(crate) entries: usize,
    /// Of those, hearsay.
    pub(crate) hearsay: usize,
    /// Of those, entries that one more sampled bit would have dropped.
    last: usize,
    /// Names that had all the holders they may have, and have room for others again.
    pub(crate) freed: usize,
}

/// The entries of a shard. The number of buckets is a power of two.
#[derive(Debug)]
pub(crate) struct Entries {
    buckets: Vec<Bucket>,
    count: usize,
    /// Of those, entries that one more sampled bit would drop.
    last: usize,
    /// Which names are kept.
    pub(crate) sampled: Sampled,
}

#[derive(Debug, Default)]
struct Bucket {
    ids: Vec<u64>,
    claims: Vec<Claim>,
}

impl Default for Entries {
    fn default() -> Self {
        Self { buckets: vec![Bucket::default()], count: 0, last: 0, sampled: Sampled::default() }
    }
}

/// Which of `buckets` an id belongs to: by the bits behind the shard's own.
fn bucket_of(id: u64, buckets: usize) -> usize {
    let bits = buckets.trailing_zeros();
    let front = (id << SHARD_BITS).checked_shr(u64::BITS - bits).unwrap_or(0);
    usize::try_from(front).expect("it has as many bits as the number of buckets")
}

impl Entries {
    pub(crate) fn claims_of(&self, id: u64) -> &[Claim] {
        self.buckets[bucket_of(id, self.buckets.len())].claims_of(id)
    }

    /// Bytes that they take, slack included.
    pub(crate) fn bytes(&self) -> usize {
        self.buckets.iter().map(Bucket::bytes).sum()
    }

    pub(crate) fn len(&self) -> usize {
        self.count
    }

    /// How many entries one more sampled bit would drop.
    pub(crate) fn last(&self) -> usize {
        self.last
    }

    /// Counts anew what one more sampled bit would drop, since the sampling is another.
    pub(crate) fn resampled(&mut self) {
        let (sampling, ids) = (self.sampled.sampling, self.buckets.iter().flat_map(|bucket| &bucket.ids));
        self.last = ids.filter(|id| sampling.keeps_last(ShortId(**id))).count();
    }

    #[cfg(test)]
    pub(crate) fn buckets(&self) -> usize {
        self.buckets.len()
    }

    /// Shows whole buckets from that of the id `from` on to `entry`, less what lies before `from`, until a few thousand entries have been
    /// shown; returns the first id that was not. `entry` ends it by saying `false`: the entry shown last is then the first of the next part.
    pub(crate) fn visit(
        &self,
        from: u64,
        shard: ShardId,
        mut entry: impl FnMut(u64, Claim) -> bool,
    ) -> Option<u64> {
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

    /// Adds or confirms `claim` for those of sorted, distinct `ids` that are kept, adding at most `room`.
    pub(crate) fn add(&mut self, ids: &[u64], claim: Claim, room: usize) -> Added {
        let (buckets, sampling) = (self.buckets.len(), self.sampled.sampling);
        let kept: Vec<u64> = ids.iter().copied().filter(|id| sampling.keeps(ShortId(*id))).collect();
        let mut sum = Added::default();
        for group in kept.chunk_by(|a, b| bucket_of(*a, buckets) == bucket_of(*b, buckets)) {
            let added =
                self.buckets[bucket_of(group[0], buckets)].add(group, claim, room - sum.new, sampling);
            sum.new += added.new;
            sum.last += added.last;
            sum.confirmed += added.confirmed;
            sum.left_out += added.left_out;
        }
        self.count += sum.new;
        self.last += sum.last;
        while self.count > self.buckets.len() * BUCKET_ENTRIES {
            self.split();
        }
        sum
    }

    /// Takes a holder's entries for sorted, distinct `ids` out.
    pub(crate) fn withdraw(&mut self, ids: &[u64], holder: u16) -> Removed {
        let (buckets, sampling) = (self.buckets.len(), self.sampled.sampling);
        let mut sum = Removed::default();
        for group in ids.chunk_by(|a, b| bucket_of(*a, buckets) == bucket_of(*b, buckets)) {
            let bucket = &mut self.buckets[bucket_of(group[0], buckets)];
            bucket.retain(&mut sum, sampling, |id, claim| {
                claim.holder() != holder || group.binary_search(&id).is_err()
            });
        }
        self.removed(sum);
        sum
    }

    /// Makes all entries of a holder hearsay.
    pub(crate) fn doubt(&mut self, holder: u16) {
        for claim in self.buckets.iter_mut().flat_map(|bucket| &mut bucket.claims) {
            if claim.holder() == holder {
                *claim = Claim::new(holder, true);
            }
        }
    }

    /// Keeps the entries that `stays` says.
    pub(crate) fn retain(&mut self, mut stays: impl FnMut(u64, Claim) -> bool) -> Removed {
        let (mut sum, sampling) = (Removed::default(), self.sampled.sampling);
        self.buckets.iter_mut().for_each(|bucket| bucket.retain(&mut sum, sampling, &mut stays));
        self.removed(sum);
        sum
    }

    /// Joins buckets that have become small in pairs.
    fn removed(&mut self, removed: Removed) {
        self.count -= removed.entries;
        self.last -= removed.last;
        while self.buckets.len() > 1 && self.count * 8 < self.buckets.len() * BUCKET_ENTRIES {
            self.buckets = self.buckets.chunks(2).map(|pair| Bucket::join(&pair[0], &pair[1])).collect();
        }
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
}

impl Bucket {
    fn range(&self, id: u64) -> Range<usize> {
        let start = self.ids.partition_point(|other| *other < id);
        let count = self.ids[start..].iter().take_while(|other| **other == id).count();
        start..start + count
    }

    fn claims_of(&self, id: u64) -> &[Claim] {
        &self.claims[self.range(id)]
    }

    /// As [`Entries::add`].
    fn add(&mut self, ids: &[u64], claim: Claim, room: usize, sampling: Sampling) -> Added {
        let (mut fresh, mut added) = (Vec::new(), Added::default());
        for id in ids {
            let range = self.range(*id);
            let count = range.len();
            match self.claims[range].iter_mut().find(|other| other.holder() == claim.holder()) {
                Some(mine) if mine.hearsay() && !claim.hearsay() => {
                    *mine = claim;
                    added.confirmed += 1;
                }
                Some(_) => {}
                None if count < HOLDERS_PER_NAME && fresh.len() < room => fresh.push(*id),
                None => added.left_out += 1,
            }
        }
        self.merge(&fresh, claim);
        let last = fresh.iter().filter(|id| sampling.keeps_last(ShortId(**id))).count();
        Added { new: fresh.len(), last, ..added }
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

    /// Keeps the entries that `stays` says, and counts the others.
    fn retain(
        &mut self,
        removed: &mut Removed,
        sampling: Sampling,
        mut stays: impl FnMut(u64, Claim) -> bool,
    ) {
        let before = self.ids.len();
        let (mut kept, mut at) = (0, 0);
        while at < before {
            let id = self.ids[at];
            let (first, kept_before) = (at, kept);
            while at < before && self.ids[at] == id {
                let claim = self.claims[at];
                if stays(id, claim) {
                    (self.ids[kept], self.claims[kept]) = (id, claim);
                    kept += 1;
                } else {
                    removed.hearsay += usize::from(claim.hearsay());
                    removed.last += usize::from(sampling.keeps_last(ShortId(id)));
                }
                at += 1;
            }
            let full = at - first >= HOLDERS_PER_NAME;
            removed.freed += usize::from(full && kept - kept_before < at - first);
        }
        removed.entries += before - kept;
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
        // A little slack stays, so that a few withdrawals among many announcements do not move the whole each time.
        let room = self.ids.len() + self.ids.len() / 16;
        self.ids.shrink_to(room);
        self.claims.shrink_to(room);
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
