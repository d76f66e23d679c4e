//! Which peers own which part of the index.
//!
//! The index is cut by the first byte of a page's short id into [`SHARDS`] shards. A shard's key and a peer's key are points in
//! Kademlia's key space (SHA-256 of a label, and of the peer id, as libp2p has it), and the owners of a shard are the
//! [`OWNERS`] peers whose keys are closest to the shard's key by the XOR metric (Maymounkov and Mazières 2002, section 2.1).
//! Every peer computes that from the members it knows; while two peers know different members, one of them may ask a
//! peer that has not been told, which is a miss and nothing worse.

use std::{collections::BTreeSet, sync::LazyLock};

use page::ShortId;
use sha2::{Digest, Sha256};

use crate::limits::OWNERS;

/// Bits of a short id that name its shard.
pub const SHARD_BITS: u32 = 8;
/// The number of shards: a constant of the protocol.
pub const SHARDS: usize = 1 << SHARD_BITS;

/// A shard: the first byte of the short ids in it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ShardId(pub u8);

impl ShardId {
    /// The shard of a page.
    #[must_use]
    pub fn of(id: ShortId) -> Self {
        let [first, ..] = id.0.to_be_bytes();
        Self(first)
    }

    /// All shards.
    pub fn all() -> impl Iterator<Item = Self> + Clone {
        (0..=u8::MAX).map(Self)
    }

    /// The lowest id in it.
    #[must_use]
    pub fn first_id(self) -> ShortId {
        ShortId(u64::from(self.0) << (u64::BITS - SHARD_BITS))
    }

    /// The shard as a place in an array.
    #[must_use]
    pub fn index(self) -> usize {
        self.0.into()
    }

    /// What the shard's key is the SHA-256 of: Kademlia hashes it itself.
    pub(crate) fn preimage(self) -> Vec<u8> {
        [&b"tern shard 1"[..], &[self.0]].concat()
    }

    /// The shard's point in Kademlia's key space.
    #[must_use]
    pub fn key(self) -> &'static [u8; 32] {
        static KEYS: LazyLock<[[u8; 32]; SHARDS]> = LazyLock::new(|| {
            std::array::from_fn(|shard| {
                let shard = u8::try_from(shard).expect("as many shards as a byte has values");
                Sha256::digest(ShardId(shard).preimage()).into()
            })
        });
        &KEYS[self.index()]
    }
}

/// A member of the site, by its key in Kademlia's key space.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberId(pub [u8; 32]);

impl MemberId {
    /// The member with this libp2p peer id.
    #[must_use]
    pub fn of_peer(peer_id: &[u8]) -> Self {
        Self(Sha256::digest(peer_id).into())
    }

    /// Kademlia's distance to a point of the key space.
    #[must_use]
    pub fn distance(&self, key: &[u8; 32]) -> [u8; 32] {
        std::array::from_fn(|at| self.0[at] ^ key[at])
    }
}

impl std::fmt::Debug for MemberId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "member {:02x}{:02x}{:02x}…", self.0[0], self.0[1], self.0[2])
    }
}

/// The owners of every shard among some members.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShardMap {
    owners: Vec<Vec<MemberId>>,
}

impl ShardMap {
    /// Assigns the shards.
    #[must_use]
    pub fn new(members: &BTreeSet<MemberId>) -> Self {
        let owners = ShardId::all().map(|shard| closest(members, shard.key())).collect();
        Self { owners }
    }

    /// Takes in one more member. It costs one comparison a shard, whatever the size of the site.
    pub fn joined(&mut self, member: MemberId) {
        for (shard, owners) in ShardId::all().zip(&mut self.owners) {
            let key = shard.key();
            let distance = member.distance(key);
            let at = owners.partition_point(|owner| owner.distance(key) < distance);
            if at < OWNERS && owners.get(at) != Some(&member) {
                owners.insert(at, member);
                owners.truncate(OWNERS);
            }
        }
    }

    /// Takes out a member; `rest` are those that stay. Only the shards that it owned are assigned anew.
    pub fn left(&mut self, member: MemberId, rest: &BTreeSet<MemberId>) {
        for (shard, owners) in ShardId::all().zip(&mut self.owners) {
            if owners.contains(&member) {
                *owners = closest(rest, shard.key());
            }
        }
    }

    /// The owners of a shard, the closest first; fewer than [`OWNERS`] if there are fewer members.
    #[must_use]
    pub fn owners(&self, shard: ShardId) -> &[MemberId] {
        &self.owners[shard.index()]
    }

    /// The shards that a member owns.
    #[must_use]
    pub fn owned_by(&self, member: MemberId) -> usize {
        self.owners.iter().filter(|owners| owners.contains(&member)).count()
    }
}

fn closest(members: &BTreeSet<MemberId>, key: &[u8; 32]) -> Vec<MemberId> {
    let mut best: Vec<([u8; 32], MemberId)> = Vec::with_capacity(OWNERS + 1);
    for member in members {
        let candidate = (member.distance(key), *member);
        let at = best.partition_point(|other| *other < candidate);
        if at < OWNERS {
            best.insert(at, candidate);
            best.truncate(OWNERS);
        }
    }
    best.into_iter().map(|(_, member)| member).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn members(count: u32) -> BTreeSet<MemberId> {
        (0..count).map(|n| MemberId::of_peer(&n.to_be_bytes())).collect()
    }

    proptest! {
        #[test]
        fn owners_are_the_closest_members(count in 0u32..40) {
            let members = members(count);
            let map = ShardMap::new(&members);
            for shard in ShardId::all() {
                let mut sorted: Vec<_> = members.iter().copied().collect();
                sorted.sort_by_key(|member| member.distance(shard.key()));
                sorted.truncate(OWNERS);
                prop_assert_eq!(map.owners(shard), &sorted[..]);
            }
        }

        #[test]
        fn a_map_that_follows_the_members_is_the_one_made_of_them(
            steps in prop::collection::vec((any::<bool>(), 0u32..12), 0..60),
        ) {
            let (mut present, mut map) = (BTreeSet::new(), ShardMap::new(&BTreeSet::new()));
            for (joins, n) in steps {
                let member = MemberId::of_peer(&n.to_be_bytes());
                if joins {
                    present.insert(member);
                    map.joined(member);
                } else {
                    present.remove(&member);
                    map.left(member, &present);
                }
                prop_assert_eq!(&map, &ShardMap::new(&present));
            }
        }

        #[test]
        fn a_member_that_leaves_moves_only_its_own_shards(count in 4u32..40, gone in 0u32..4) {
            let all = members(count);
            let mut rest = all.clone();
            let gone = MemberId::of_peer(&gone.to_be_bytes());
            rest.remove(&gone);
            let (before, after) = (ShardMap::new(&all), ShardMap::new(&rest));
            for shard in ShardId::all() {
                if !before.owners(shard).contains(&gone) {
                    prop_assert_eq!(before.owners(shard), after.owners(shard));
                }
            }
        }
    }
}
