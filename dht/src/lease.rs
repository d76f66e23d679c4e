//! What an owner keeps: for each name of its shards, who announced to hold it, and for each holder's share of a shard, until when.
//!
//! A share is all that one holder claims in one shard. It has one lease and one digest, so that a holder renews it with one small message
//! however many names it has ([`crate::claims`]). The digest is of what was *told*, also of names that found no room here: whether a share is told in
//! full does not hang on how many others hold the same. Shares are in one of these states:
//!
//! ```text
//!        begin                  digest alike                     lease ran out
//! (none) ─────► being told ────────────────────► whole ──────────────────────► (none)
//!    │              ▲  ▲        hearsay is gone   │
//!    │              │  └──────────────────────────┘ begin: its entries become hearsay
//!    └► passed on ──┘ begin
//!       by another owner: hearsay
//! ```
//!
//! A share whose lease has run out is not shown; its entries go when its shard is swept. If its holder asks before that, and has the same digest,
//! it is renewed as if nothing had been. When the table comes near its bound, shards are sampled ([`crate::sample`]); what is dropped by that was told
//! all the same. Pure: time comes in as `now`.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    time::{Duration, Instant},
};

use page::ShortId;

use crate::{
    claims::{Announcement, ClaimDigest, ShareDigest},
    entries::{Claim, Entries, Removed},
    limits::{HOLDERS_PER_NAME, MEMBERS, OWNER_ENTRIES, SAMPLING_BITS, SAMPLING_BITS_ONE},
    sample::Sampling,
    shard::{MemberId, SHARDS, ShardId},
};

const _: () = assert!(MEMBERS < Claim::HOLDERS);

/// The entries of one owner.
#[derive(Debug)]
pub struct OwnerTable {
    lease: Duration,
    shards: Vec<Shard>,
    holders: Vec<Option<Holder>>,
    numbers: HashMap<MemberId, u16>,
    entries: usize,
    /// Entries that there are at most.
    most: usize,
}

#[derive(Debug, Default)]
struct Shard {
    entries: Entries,
    /// Names that have room for another holder since one of as many as there may be is gone. Whoever had names left out is asked for its
    /// share anew, until those that were asked had as many.
    freed: usize,
}

#[derive(Debug)]
struct Holder {
    member: MemberId,
    entries: usize,
    /// The serial of its latest announcement.
    latest: Option<u64>,
    shares: BTreeMap<ShardId, Share>,
}

/// What a holder claims in a shard.
#[derive(Debug)]
struct Share {
    until: Instant,
    /// Of what was told.
    digest: ClaimDigest,
    source: Source,
    /// All of it was told.
    whole: bool,
    entries: usize,
    /// Of the entries, those that are hearsay.
    hearsay: usize,
    /// Names that were told and found no room.
    left_out: usize,
}

/// Who tells of a share.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Source {
    Holder,
    OtherOwner,
}

impl Share {
    fn new(source: Source, until: Instant) -> Self {
        let digest = ClaimDigest::default();
        Self { until, digest, source, whole: false, entries: 0, hearsay: 0, left_out: 0 }
    }

    /// Its holder tells of it: what another owner said counts as told before.
    fn told(&mut self, until: Instant) {
        if self.source == Source::OtherOwner {
            *self = Self { entries: self.entries, hearsay: self.hearsay, ..Self::new(Source::Holder, until) };
        }
        self.until = until;
    }
}

impl OwnerTable {
    /// An empty table, whose leases last for `lease`.
    #[must_use]
    pub fn new(lease: Duration) -> Self {
        Self::with_room(OWNER_ENTRIES, lease)
    }

    /// An empty table of so many entries at most.
    #[must_use]
    pub fn with_room(most: usize, lease: Duration) -> Self {
        let shards = (0..SHARDS).map(|_| Shard::default()).collect();
        Self { lease, shards, holders: Vec::new(), numbers: HashMap::new(), entries: 0, most }
    }

    /// Which names of a shard are kept.
    #[must_use]
    pub fn sampling(&self, shard: ShardId) -> Sampling {
        self.shards[shard.index()].entries.sampled.sampling
    }

    /// The shards of which not every name is kept.
    #[must_use]
    pub fn samplings(&self) -> Vec<(ShardId, Sampling)> {
        let all = ShardId::all().map(|shard| (shard, self.sampling(shard)));
        all.filter(|(_, sampling)| *sampling != Sampling::ALL).collect()
    }

    /// Keeps of a shard what `sampling` keeps from now on, and drops the rest. Digests are of what was told, and stay.
    pub fn sample(&mut self, shard: ShardId, sampling: Sampling) {
        let (kept, holders) = (&mut self.shards[shard.index()].entries, &mut self.holders);
        kept.sampled.set(sampling);
        let removed = kept.retain(|id, claim| {
            let stays = sampling.keeps(ShortId(id));
            if let Some(holder) = holders[usize::from(claim.holder())].as_mut().filter(|_| !stays) {
                holder.entries -= 1;
                if let Some(share) = holder.shares.get_mut(&shard) {
                    share.entries -= 1;
                    share.hearsay -= usize::from(claim.hearsay());
                }
            }
            stays
        });
        kept.resampled();
        self.entries -= removed.entries;
    }

    /// Makes room for more entries of a holder if the table is nearly full, or the holder's half of it: of the shards the one that loses most by it is
    /// sampled by one more bit. For one holder's sake that goes to a few bits only.
    fn make_room(&mut self, holder: u16) {
        loop {
            let of_holder = self.holder(holder).map_or(0, |holder| holder.entries);
            let bits = if self.entries > self.most / 16 * 15 {
                SAMPLING_BITS
            } else if of_holder > self.most / 32 * 15 {
                SAMPLING_BITS_ONE
            } else {
                return;
            };
            let shards = ShardId::all().zip(self.shards.iter().map(|shard| &shard.entries));
            let may = |of: &Entries| of.last() > 0 && of.sampled.sampling.zero_bits() < bits;
            let best = shards.filter(|(_, shard)| may(shard)).max_by_key(|(_, shard)| shard.last());
            let coarser = |(shard, of): (ShardId, &Entries)| Some((shard, of.sampled.sampling.coarser()?));
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

    /// Takes a holder's announcement. Returns the shards that it has to tell anew.
    pub fn hear(&mut self, member: MemberId, announcement: &Announcement, now: Instant) -> Vec<ShardId> {
        let Announcement { serial, gone, begins, ids, digests } = announcement;
        let Some(number) = self.number(member) else {
            return digests.iter().map(|(shard, _)| *shard).collect();
        };
        let known = self.holder(number).is_some_and(|holder| holder.latest == Some(*serial));
        if !known {
            self.withdraw(member, gone, now);
            begins.iter().for_each(|shard| self.begin(member, *shard, now));
            self.announce(member, ids, now);
            if let Some(holder) = self.holder(number) {
                holder.latest = Some(*serial);
            }
        }
        let unlike = digests.iter().filter(|(shard, digest)| !self.renew(member, *shard, *digest, now));
        unlike.map(|(shard, _)| *shard).collect()
    }

    /// `member` begins to tell anew what it holds of a shard.
    pub fn begin(&mut self, member: MemberId, shard: ShardId, now: Instant) {
        let Some(number) = self.number(member) else { return };
        let until = now + self.lease;
        let Some(share) = self.share(number, shard, until) else { return };
        if share.hearsay < share.entries {
            share.hearsay = share.entries;
            self.shards[shard.index()].entries.doubt(number);
        }
        if let Some(share) = self.share(number, shard, until) {
            *share =
                Share { entries: share.entries, hearsay: share.hearsay, ..Share::new(Source::Holder, until) };
        }
    }

    /// Notes that `member` holds `ids` as well. Names beyond the table's bounds are left out: they are found elsewhere or missed.
    pub fn announce(&mut self, member: MemberId, ids: &[ShortId], now: Instant) {
        let Some(number) = self.number(member) else { return };
        let (mut sorted, until) = (sorted(ids), now + self.lease);
        for group in by_shard(&sorted) {
            if let Some(share) = self.share(number, ShardId::of(ShortId(group[0])), until) {
                share.told(until);
                group.iter().for_each(|id| share.digest.add(ShortId(*id)));
            }
        }
        sorted.dedup();
        for group in by_shard(&sorted) {
            self.add(number, group, false);
        }
    }

    /// Notes that `member` has lost `ids`.
    pub fn withdraw(&mut self, member: MemberId, ids: &[ShortId], now: Instant) {
        let Some(number) = self.numbers.get(&member).copied() else { return };
        let (mut sorted, until) = (sorted(ids), now + self.lease);
        for group in by_shard(&sorted) {
            if let Some(share) = self.share(number, ShardId::of(ShortId(group[0])), until) {
                share.told(until);
                group.iter().for_each(|id| share.digest.remove(ShortId(*id)));
            }
        }
        sorted.dedup();
        for group in by_shard(&sorted) {
            let shard = ShardId::of(ShortId(group[0]));
            let removed = self.shards[shard.index()].entries.withdraw(group, number);
            self.removed(number, shard, removed);
        }
    }

    /// Renews a share if `digest` is that of all that `member` told of it, which is then all there is. `false` if it has to tell the share anew:
    /// something was lost on the way, or there is room now for names that found none.
    pub fn renew(&mut self, member: MemberId, shard: ShardId, digest: ClaimDigest, now: Instant) -> bool {
        let Some(number) = self.numbers.get(&member).copied() else { return false };
        let (until, freed) = (now + self.lease, &mut self.shards[shard.index()].freed);
        let holder = self.holders[usize::from(number)].as_mut();
        let Some(share) = holder.and_then(|holder| holder.shares.get_mut(&shard)) else { return false };
        if share.source == Source::OtherOwner || share.digest != digest {
            return false;
        }
        if share.whole && share.left_out > 0 && *freed > 0 {
            *freed -= share.left_out.min(*freed);
            return false;
        }
        (share.whole, share.until) = (true, until);
        if share.hearsay > 0 {
            let gone = Claim::new(number, true);
            let removed = self.shards[shard.index()].entries.retain(|_, claim| claim != gone);
            self.removed(number, shard, removed);
        }
        true
    }

    /// The digest of what `member` has told of a shard.
    #[must_use]
    pub fn digest(&self, member: MemberId, shard: ShardId) -> Option<ClaimDigest> {
        let number = self.numbers.get(&member)?;
        let holder = self.holders[usize::from(*number)].as_ref()?;
        holder.shares.get(&shard).filter(|share| share.source == Source::Holder).map(|share| share.digest)
    }

    /// Adds or confirms entries of one shard, sorted and distinct; returns how many are new.
    fn add(&mut self, number: u16, group: &[u64], hearsay: bool) -> usize {
        self.make_room(number);
        let shard = ShardId::of(ShortId(group[0]));
        let room = self.most - self.entries;
        let Some(holder) = self.holders[usize::from(number)].as_mut() else { return 0 };
        let Some(share) = holder.shares.get_mut(&shard) else { return 0 };
        // One that announces without end leaves room for others.
        let room = room.min((self.most / 2).saturating_sub(holder.entries));
        let added = self.shards[shard.index()].entries.add(group, Claim::new(number, hearsay), room);
        self.entries += added.new;
        holder.entries += added.new;
        share.entries += added.new;
        share.hearsay -= added.confirmed;
        if hearsay {
            share.hearsay += added.new;
        } else {
            share.left_out += added.left_out;
        }
        added.new
    }

    /// Counts entries of a share that are no more.
    fn removed(&mut self, number: u16, shard: ShardId, removed: Removed) {
        let kept = &mut self.shards[shard.index()];
        kept.freed = kept.freed.saturating_add(removed.freed);
        self.entries -= removed.entries;
        let Some(holder) = self.holders[usize::from(number)].as_mut() else { return };
        holder.entries -= removed.entries;
        if let Some(share) = holder.shares.get_mut(&shard) {
            share.entries -= removed.entries;
            share.hearsay -= removed.hearsay;
        }
    }

    /// What holders have told of a shard as a whole, for another owner of it.
    #[must_use]
    pub fn shares(&self, shard: ShardId, now: Instant) -> Vec<ShareDigest> {
        let passed = |holder: &Holder| {
            let share = holder.shares.get(&shard).filter(|share| share.speaks_for_holder(now))?;
            Some(ShareDigest { holder: holder.member, digest: share.digest, left: share.until - now })
        };
        self.holders.iter().flatten().filter_map(passed).collect()
    }

    /// Those of another owner's shares that are worth pulling: their holders have told this owner nothing, nor has it what that owner has.
    /// The leases of those that it has end when they end there.
    pub fn unlike(&mut self, shard: ShardId, theirs: &[ShareDigest], now: Instant) -> Vec<ShareDigest> {
        let lease = self.lease;
        let mut unlike = |passed: &&ShareDigest| {
            let number = self.numbers.get(&passed.holder);
            let holder = number.and_then(|number| self.holders[usize::from(*number)].as_mut());
            let Some(share) = holder.and_then(|holder| holder.shares.get_mut(&shard)) else { return true };
            match share.source {
                Source::Holder => false,
                Source::OtherOwner if share.whole && share.digest == passed.digest => {
                    // Never more than if the holder had renewed it just now.
                    share.until = share.until.max(now + passed.left.min(lease));
                    false
                }
                Source::OtherOwner => true,
            }
        };
        theirs.iter().filter(|passed| !passed.left.is_zero() && unlike(passed)).copied().collect()
    }

    /// Begins to learn shares that another owner has: what it said of them before is gone.
    pub fn begin_learning(&mut self, shard: ShardId, shares: &[ShareDigest], now: Instant) {
        for ShareDigest { holder, left, .. } in shares {
            let Some(number) = self.number(*holder) else { continue };
            let until = now + (*left).min(self.lease);
            let Some(share) = self.holder(number).map(|holder| {
                holder.shares.entry(shard).or_insert_with(|| Share::new(Source::OtherOwner, until))
            }) else {
                continue;
            };
            if share.source == Source::Holder {
                continue;
            }
            (share.until, share.whole) = (until, false);
            if share.entries > 0 {
                let removed = self.shards[shard.index()].entries.retain(|_, claim| claim.holder() != number);
                self.removed(number, shard, removed);
            }
        }
    }

    /// Takes claims of one holder in one shard that another owner passed on; returns how many entries are new. What the holder itself told stands.
    pub fn learn(&mut self, shard: ShardId, member: MemberId, ids: &[ShortId]) -> usize {
        let Some(number) = self.passed_on(shard, member).map(|(number, _)| number) else { return 0 };
        let mut sorted = sorted(ids);
        sorted.retain(|id| ShardId::of(ShortId(*id)) == shard);
        sorted.dedup();
        if sorted.is_empty() { 0 } else { self.add(number, &sorted, true) }
    }

    /// All claims of another owner's shares were learnt.
    pub fn learnt(&mut self, shard: ShardId, shares: &[ShareDigest]) {
        for passed in shares {
            if let Some((_, share)) = self.passed_on(shard, passed.holder) {
                (share.whole, share.digest) = (true, passed.digest);
            }
        }
    }

    fn passed_on(&mut self, shard: ShardId, member: MemberId) -> Option<(u16, &mut Share)> {
        let number = *self.numbers.get(&member)?;
        let share = self.holder(number)?.shares.get_mut(&shard)?;
        (share.source == Source::OtherOwner).then_some((number, share))
    }

    /// Appends to `claims` what some holders told themselves, in a part of a shard's sampled names from the id `from` on: the id, and the holder's
    /// place in `of`. Ends a part early at `bound` claims.
    pub fn claims(
        &self,
        (shard, sampling): (ShardId, Sampling),
        from: ShortId,
        of: &[MemberId],
        now: Instant,
        bound: usize,
        claims: &mut Vec<(ShortId, u16)>,
    ) -> Option<ShortId> {
        let mut places: Vec<Option<u16>> = vec![None; self.holders.len()];
        for (member, place) in of.iter().zip(0u16..) {
            let Some(number) = self.numbers.get(member).copied().map(usize::from) else { continue };
            let holder = self.holders[number].as_ref();
            let share = holder.and_then(|holder| holder.shares.get(&shard));
            places[number] = share.filter(|share| share.speaks_for_holder(now)).map(|_| place);
        }
        let next = self.shards[shard.index()].entries.visit(from.0, shard, |id, claim| {
            let of_interest = !claim.hearsay() && sampling.keeps(ShortId(id));
            let Some(place) = places[usize::from(claim.holder())].filter(|_| of_interest) else {
                return true;
            };
            // All claims of one id go together: the next part begins with another id.
            let whole = claims.last().is_some_and(|(last, _)| last.0 == id);
            if claims.len() + HOLDERS_PER_NAME > bound && !whole {
                return false;
            }
            claims.push((ShortId(id), place));
            true
        });
        next.map(ShortId)
    }

    fn holder(&mut self, number: u16) -> Option<&mut Holder> {
        self.holders.get_mut(usize::from(number))?.as_mut()
    }

    /// A holder's share of a shard; a new one is the holder's own.
    fn share(&mut self, number: u16, shard: ShardId, until: Instant) -> Option<&mut Share> {
        let shares = &mut self.holder(number)?.shares;
        Some(shares.entry(shard).or_insert_with(|| Share::new(Source::Holder, until)))
    }

    fn number(&mut self, member: MemberId) -> Option<u16> {
        if let Some(number) = self.numbers.get(&member) {
            return Some(*number);
        }
        let free = self.holders.iter().position(|slot| slot.as_ref().is_none_or(|h| h.shares.is_empty()));
        let at = free.unwrap_or(self.holders.len());
        let number = u16::try_from(at).ok().filter(|_| at < Claim::HOLDERS)?;
        let holder = Some(Holder { member, entries: 0, latest: None, shares: BTreeMap::new() });
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

    /// As [`Self::lookup`]; `found` is told besides whether the claim is hearsay: passed on by another owner, or of a share that the holder
    /// tells anew and not told again yet.
    pub fn each_holder(
        &self,
        ids: &[ShortId],
        now: Instant,
        usable: impl Fn(MemberId) -> bool,
        mut found: impl FnMut(u32, MemberId, bool),
    ) {
        let usable: Vec<Option<&Holder>> =
            self.holders.iter().map(|slot| slot.as_ref().filter(|holder| usable(holder.member))).collect();
        // Of each shard that is asked about: whose lease runs there.
        let mut running: Vec<Option<Vec<Option<&Holder>>>> = vec![None; SHARDS];
        for (id, at) in ids.iter().zip(0u32..) {
            let shard = ShardId::of(*id);
            let claims = self.shards[shard.index()].entries.claims_of(id.0);
            if claims.is_empty() {
                continue;
            }
            let runs = |holder: &&Holder| holder.shares.get(&shard).is_some_and(|share| share.until > now);
            let running = running[shard.index()]
                .get_or_insert_with(|| usable.iter().map(|holder| holder.filter(runs)).collect());
            for claim in claims {
                if let Some(holder) = running[usize::from(claim.holder())] {
                    found(at, holder.member, claim.hearsay());
                }
            }
        }
    }

    /// The shards with shares whose lease has run out.
    #[must_use]
    pub fn run_out(&self, now: Instant) -> BTreeSet<ShardId> {
        let shares = self.holders.iter().flatten().flat_map(|holder| &holder.shares);
        shares.filter(|(_, share)| share.until <= now).map(|(shard, _)| *shard).collect()
    }

    /// Drops the shares of a shard whose lease has run out, and all of them if `keep` is false (the shard is no longer owned). Where there has been
    /// room for long, more of its names are kept from now on.
    pub fn sweep(&mut self, shard: ShardId, keep: bool, now: Instant) {
        let mut ended = vec![false; self.holders.len()];
        for (holder, ended) in self.holders.iter_mut().zip(&mut ended) {
            let Some(holder) = holder else { continue };
            let share = holder.shares.get(&shard).filter(|share| !keep || share.until <= now);
            if let Some(entries) = share.map(|share| share.entries) {
                holder.shares.remove(&shard);
                holder.entries -= entries;
                *ended = entries > 0;
            }
        }
        if ended.contains(&true) {
            let kept = &mut self.shards[shard.index()];
            let removed = kept.entries.retain(|_, claim| !ended[usize::from(claim.holder())]);
            kept.freed = kept.freed.saturating_add(removed.freed);
            self.entries -= removed.entries;
        }
        if !keep {
            self.shards[shard.index()] = Shard::default();
        }
        self.look_for_room(shard, now);
    }

    /// Looks whether there is room for more of a shard's names.
    fn look_for_room(&mut self, shard: ShardId, now: Instant) {
        let expected = |shard: &Shard| shard.entries.sampled.expected(shard.entries.len(), now);
        let expected = self.shards.iter().map(expected).sum::<usize>();
        let largest = self.holders.iter().flatten().map(|holder| holder.entries).max().unwrap_or(0);
        let kept = &mut self.shards[shard.index()].entries;
        let (entries, before) = (kept.len(), kept.sampled.sampling);
        // Less than where sampling begins, by far: what was dropped for want of room does not come back at once.
        let room = expected + entries <= self.most / 4 * 3 && largest + entries <= self.most / 8 * 3;
        kept.sampled.look(room, entries, now);
        if kept.sampled.sampling != before {
            kept.resampled();
            // Of what another owner passed on there is more to learn.
            let shares = self.holders.iter_mut().flatten().filter_map(|holder| holder.shares.get_mut(&shard));
            let learnt = shares.filter(|share| share.source == Source::OtherOwner);
            learnt.for_each(|share| share.whole = false);
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

    /// Bytes that entries and shares take, slack included.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let shares = self.holders.iter().flatten().map(|holder| holder.shares.len()).sum::<usize>();
        let entries = self.shards.iter().map(|shard| shard.entries.bytes()).sum::<usize>();
        entries + shares * size_of::<(ShardId, Share)>()
    }
}

impl Share {
    /// Whether it is what its holder told as a whole, and its lease runs.
    fn speaks_for_holder(&self, now: Instant) -> bool {
        self.source == Source::Holder && self.whole && self.until > now
    }
}

fn sorted(ids: &[ShortId]) -> Vec<u64> {
    let mut sorted: Vec<u64> = ids.iter().map(|id| id.0).collect();
    sorted.sort_unstable();
    sorted
}

fn by_shard(sorted: &[u64]) -> impl Iterator<Item = &[u64]> {
    sorted.chunk_by(|a, b| ShardId::of(ShortId(*a)) == ShardId::of(ShortId(*b)))
}

#[cfg(test)]
#[path = "lease_tests.rs"]
mod tests;
