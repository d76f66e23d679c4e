//! Maps and sets by short id, hashed by one multiplication instead of SipHash: ids are pieces of hashes already.
//!
//! Whoever sends a VM here chooses the ids that its host asks for, so an id is not its own hash: it is mixed with two secrets of the map, as foldhash
//! does, and ids that fall together in one map are not known to anybody.

#[cfg(feature = "node")]
use std::collections::HashSet;
use std::{
    collections::HashMap,
    hash::{BuildHasher, Hasher, RandomState},
};

use page::ShortId;

/// A map by short id.
pub(crate) type IdMap<V> = HashMap<ShortId, V, IdState>;
/// A set of short ids.
#[cfg(feature = "node")]
pub(crate) type IdSet = HashSet<ShortId, IdState>;

/// The secrets of one map.
#[derive(Clone, Debug)]
pub(crate) struct IdState {
    mask: u64,
    factor: u64,
}

impl Default for IdState {
    fn default() -> Self {
        let random = || RandomState::new().build_hasher().finish();
        Self { mask: random(), factor: random() | 1 }
    }
}

impl BuildHasher for IdState {
    type Hasher = IdHasher;

    fn build_hasher(&self) -> IdHasher {
        IdHasher { state: self.clone(), hash: 0 }
    }
}

/// The hash of one id.
#[derive(Debug)]
pub(crate) struct IdHasher {
    state: IdState,
    hash: u64,
}

impl Hasher for IdHasher {
    fn write_u64(&mut self, id: u64) {
        let wide = u128::from(id ^ self.hash ^ self.state.mask) * u128::from(self.state.factor);
        let halves = wide.to_ne_bytes();
        let (low, high) = halves.split_at(8);
        let half = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_ne_bytes);
        self.hash = half(low) ^ half(high);
    }

    /// Ids are written as one integer; this is for what else may come.
    fn write(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.write_u64((*byte).into()));
    }

    fn finish(&self) -> u64 {
        self.hash
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_holds_what_was_put_in_and_ids_of_one_pattern_do_not_fall_together() {
        for shift in [0, 20, 44] {
            let mut set = IdSet::default();
            assert!((0..5000u64).all(|n| set.insert(ShortId(n << shift))));
            assert!((0..5000u64).all(|n| !set.insert(ShortId(n << shift))) && set.len() == 5000);
            let state = set.hasher();
            for bits in [0, 56] {
                let hash = |n: u64| state.hash_one(ShortId(n << shift)) >> bits & 0xff;
                let distinct: HashSet<u64> = (0..5000).map(hash).collect();
                assert!(distinct.len() > 64, "{} of 256 for a shift of {shift}", distinct.len());
            }
        }
    }
}
