//! What a holder tells an owner: changes to the set of names that it claims in each shard, and what the whole set comes to.
//!
//! A holder's names in a shard are one *share*. The owner keeps a digest of each share by what it was told, and one lease for all of it. A
//! share is told once as a whole; from then on its changes are, and from time to time its digest, which renews the lease. Where the owner's digest
//! is another one, it says so, and the share is told anew.

use std::time::Duration;

use page::ShortId;

use crate::{
    codec::{CodecError, Reader, put_count},
    limits::INDEX_BATCH,
    shard::{MemberId, SHARDS, ShardId},
};

/// A digest of the claims of one holder in a shard, equal for equal sets of ids, whatever their order: a count, and the sum of a mix of each id.
///
/// It finds what was lost on the way. It is not one that withstands whoever looks for two sets with one digest, and need not: only the holder
/// itself, an authenticated member of the site, has a say in its digests, and a false one says no more than a false announcement
/// does. Guests cannot choose their pages' names, for they do not know the domain's key. The worst that two sets with one digest do is that an
/// owner keeps names that the holder has lost, or lacks names that it has: a miss.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ClaimDigest {
    /// How many, modulo 2^32.
    pub claims: u32,
    /// The sum of a mix of each id, modulo 2^128.
    pub sum: u128,
}

/// The finaliser of splitmix64 (Steele et al. 2014).
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn mixed(id: ShortId) -> u128 {
    let (high, low) = (mix(id.0), mix(id.0 ^ 0x9e37_79b9_7f4a_7c15));
    u128::from(high) << 64 | u128::from(low)
}

impl ClaimDigest {
    /// Adds an id.
    pub fn add(&mut self, id: ShortId) {
        self.claims = self.claims.wrapping_add(1);
        self.sum = self.sum.wrapping_add(mixed(id));
    }

    /// Takes away an id that was added.
    pub fn remove(&mut self, id: ShortId) {
        self.claims = self.claims.wrapping_sub(1);
        self.sum = self.sum.wrapping_sub(mixed(id));
    }

    /// The digest of the ids of both.
    #[must_use]
    pub fn joined(self, other: Self) -> Self {
        Self { claims: self.claims.wrapping_add(other.claims), sum: self.sum.wrapping_add(other.sum) }
    }

    /// Bytes on the wire.
    pub(crate) const BYTES: usize = 4 + 16;

    pub(crate) fn encode(self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.claims.to_be_bytes());
        out.extend_from_slice(&self.sum.to_be_bytes());
    }

    pub(crate) fn decode(body: &mut Reader<'_>) -> Result<Self, CodecError> {
        let claims = body.u32("digest's claims")?;
        Ok(Self { claims, sum: u128::from_be_bytes(*body.array("digest's sum")?) })
    }
}

/// A holder's share of some shard, as one owner knows it and another hears of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ShareDigest {
    /// The holder.
    pub holder: MemberId,
    /// The digest of the share.
    pub digest: ClaimDigest,
    /// What is left of its lease.
    pub left: Duration,
}

/// One message of a holder to an owner. Its parts take effect in the order of the fields.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Announcement {
    /// Another one for each message of the holder. One whose answer was lost is sent again as it was, and an owner that has it
    /// already takes no second notice of its changes.
    pub serial: u64,
    /// Names that the holder has lost, of any shards.
    pub gone: Vec<ShortId>,
    /// Shards of which the holder now tells all its names anew: what was told of them before stands until a digest says that all is told,
    /// and then gives way.
    pub begins: Vec<ShardId>,
    /// Names that the holder has, of any shards.
    pub ids: Vec<ShortId>,
    /// Shards, each with the digest of all that the holder has told of it and has: the lease is renewed where the owner finds the same.
    pub digests: Vec<(ShardId, ClaimDigest)>,
}

/// Bytes of a shard and its digest on the wire.
const SHARD_DIGEST_BYTES: usize = 1 + ClaimDigest::BYTES;

impl Announcement {
    /// The longest on the wire, bytes.
    pub(crate) const BOUND: usize = 8 + 4 * 4 + 2 * INDEX_BATCH * 8 + SHARDS * (1 + SHARD_DIGEST_BYTES);

    /// Bytes on the wire.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let names = (self.gone.len() + self.ids.len()) * size_of::<u64>();
        8 + 4 * 4 + names + self.begins.len() + self.digests.len() * SHARD_DIGEST_BYTES
    }

    /// Whether it says nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.gone.is_empty() && self.begins.is_empty() && self.ids.is_empty() && self.digests.is_empty()
    }

    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let Self { serial, gone, begins, ids, digests } = self;
        out.extend_from_slice(&serial.to_be_bytes());
        put_ids(out, gone.iter().copied());
        put_shards(out, begins);
        put_ids(out, ids.iter().copied());
        put_count(out, digests.len());
        for (shard, digest) in digests {
            out.push(shard.0);
            digest.encode(out);
        }
    }

    pub(crate) fn decode(body: &mut Reader<'_>) -> Result<Self, CodecError> {
        let serial = body.u64("serial")?;
        let gone = take_ids(body, INDEX_BATCH)?;
        let begins = take_shards(body)?;
        let ids = take_ids(body, INDEX_BATCH)?;
        let count = body.count(SHARDS, SHARD_DIGEST_BYTES, "digests")?;
        let digest = |_| Ok((ShardId(body.u8("digest's shard")?), ClaimDigest::decode(body)?));
        let digests = (0..count).map(digest).collect::<Result<_, CodecError>>()?;
        Ok(Self { serial, gone, begins, ids, digests })
    }
}

/// Appends a count and ids.
pub(crate) fn put_ids(out: &mut Vec<u8>, ids: impl ExactSizeIterator<Item = ShortId>) {
    put_count(out, ids.len());
    ids.for_each(|id| out.extend_from_slice(&id.0.to_be_bytes()));
}

/// What [`put_ids`] wrote.
pub(crate) fn take_ids(body: &mut Reader<'_>, bound: usize) -> Result<Vec<ShortId>, CodecError> {
    let count = body.count(bound, 8, "ids")?;
    let bytes = body.bytes(count * 8, "ids")?;
    Ok(bytes.as_chunks::<8>().0.iter().map(|id| ShortId(u64::from_be_bytes(*id))).collect())
}

/// Appends a count and shards.
pub(crate) fn put_shards(out: &mut Vec<u8>, shards: &[ShardId]) {
    put_count(out, shards.len());
    out.extend(shards.iter().map(|shard| shard.0));
}

/// What [`put_shards`] wrote.
pub(crate) fn take_shards(body: &mut Reader<'_>) -> Result<Vec<ShardId>, CodecError> {
    let count = body.count(SHARDS, 1, "shards")?;
    Ok(body.bytes(count, "shards")?.iter().copied().map(ShardId).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn digest(ids: impl Iterator<Item = u64>) -> ClaimDigest {
        let mut digest = ClaimDigest::default();
        ids.for_each(|id| digest.add(ShortId(id)));
        digest
    }

    proptest! {
        #[test]
        fn a_digest_is_the_same_in_any_order_and_another_for_other_ids(
            mut ids in prop::collection::btree_set(any::<u64>(), 1..50),
            more in any::<u64>(),
        ) {
            let forward = digest(ids.iter().copied());
            prop_assert_eq!(forward, digest(ids.iter().rev().copied()));
            if ids.insert(more) {
                let last = *ids.first().unwrap();
                let swapped = digest(ids.iter().copied().filter(|id| *id != last));
                prop_assert!(swapped != forward || last == more);
            }
        }

        #[test]
        fn what_is_taken_away_leaves_the_rest(ids in prop::collection::vec(any::<u64>(), 0..50), cut in 0usize..50) {
            let (gone, rest) = ids.split_at(cut.min(ids.len()));
            let mut all = digest(ids.iter().copied());
            prop_assert_eq!(all, digest(gone.iter().copied()).joined(digest(rest.iter().copied())));
            gone.iter().for_each(|id| all.remove(ShortId(*id)));
            prop_assert_eq!(all, digest(rest.iter().copied()));
        }

        #[test]
        fn an_announcement_takes_the_bytes_that_it_says(
            gone in prop::collection::vec(any::<u64>(), 0..40), ids in prop::collection::vec(any::<u64>(), 0..40),
            shards in prop::collection::vec(any::<u8>(), 0..40), serial in any::<u64>(),
        ) {
            let short = |ids: Vec<u64>| ids.into_iter().map(ShortId).collect::<Vec<_>>();
            let begins: Vec<_> = shards.into_iter().map(ShardId).collect();
            let digests = begins.iter().map(|shard| (*shard, digest(ids.iter().copied()))).collect();
            let announcement = Announcement { serial, gone: short(gone), begins, ids: short(ids), digests };
            let mut bytes = Vec::new();
            announcement.encode(&mut bytes);
            prop_assert_eq!(bytes.len(), announcement.bytes());
            prop_assert!(bytes.len() <= Announcement::BOUND);
            prop_assert_eq!(Announcement::decode(&mut Reader::new(&bytes)), Ok(announcement));
        }
    }
}
