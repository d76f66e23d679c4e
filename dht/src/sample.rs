//! Which names an owner keeps.
//!
//! An owner keeps every name of a shard until its table comes near its bound. Then it samples: the shard in which that makes the most room keeps only
//! names whose short ids end in one more zero bit, and drops the others. It goes back by a bit when there has been room for twice as many for
//! long. Its answers say how many bits each of its shards samples by: whoever announces to it tells it only what it keeps, and whoever looks names up
//! asks it only about those. A page whose name no owner keeps is asked of the holders found for kept pages near it in the request (see
//! [`crate::lookup`]).
//!
//! Two owners of a shard may differ by a bit: an id is asked of the one that keeps it. Short ids are hashes, so that each bit keeps half of the names; one who
//! announces ids made up to have zero bits gains no more than its share of the table. Pure: time comes in as `now`.

use std::time::Instant;

use page::ShortId;

use crate::{
    limits::{LEASE, SAMPLING_BITS},
    shard::SHARD_BITS,
};

/// The names kept of a shard: those whose short id ends in so many zero bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Sampling {
    zero_bits: u8,
}

impl Sampling {
    /// Every name is kept.
    pub const ALL: Self = Self { zero_bits: 0 };

    /// The sampling by so many bits; `None` beyond [`SAMPLING_BITS`].
    #[must_use]
    pub fn new(zero_bits: u8) -> Option<Self> {
        (zero_bits <= SAMPLING_BITS).then_some(Self { zero_bits })
    }

    /// How many bits must be zero.
    #[must_use]
    pub fn zero_bits(self) -> u8 {
        self.zero_bits
    }

    /// Whether a name is kept.
    #[must_use]
    pub fn keeps(self, id: ShortId) -> bool {
        id.0.trailing_zeros() >= u32::from(self.zero_bits)
    }

    /// Whether a name is kept now and would not be by one more bit.
    #[must_use]
    pub(crate) fn keeps_last(self, id: ShortId) -> bool {
        id.0.trailing_zeros() == u32::from(self.zero_bits)
    }

    /// By one more bit.
    #[must_use]
    pub fn coarser(self) -> Option<Self> {
        Self::new(self.zero_bits + 1)
    }

    /// By one bit less.
    #[must_use]
    pub fn finer(self) -> Option<Self> {
        Some(Self { zero_bits: self.zero_bits.checked_sub(1)? })
    }
}

/// The sampling of one of an owner's shards, and since when it could be finer.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Sampled {
    pub(crate) sampling: Sampling,
    room_since: Option<Instant>,
    /// Since it went back by a bit, until its holders have told what they had left out: what it will have then, and until when.
    promised: Option<(usize, Instant)>,
}

impl Sampled {
    /// Samples so from now on.
    pub(crate) fn set(&mut self, sampling: Sampling) {
        *self = Self { sampling, room_since: None, promised: None };
    }

    /// How many entries the shard is to be reckoned with that has `entries` now.
    pub(crate) fn expected(&self, entries: usize, now: Instant) -> usize {
        let promised = self.promised.filter(|(_, until)| now < *until);
        promised.map_or(entries, |(promised, _)| promised.max(entries))
    }

    /// Looks from time to time whether there is `room` for the names of one bit less. Goes back by a bit if there was for a whole lease.
    pub(crate) fn look(&mut self, room: bool, entries: usize, now: Instant) {
        let Some(finer) = self.sampling.finer().filter(|_| room) else {
            self.room_since = None;
            return;
        };
        let since = *self.room_since.get_or_insert(now);
        if now.saturating_duration_since(since) >= LEASE {
            *self = Self { sampling: finer, room_since: None, promised: Some((entries * 2, now + LEASE)) };
        }
    }
}

// The bits that sample are neither those that name the shard, nor those that spread it over its buckets or choose which owner is asked first.
const _: () = assert!((SAMPLING_BITS as u32) + SHARD_BITS <= 40);

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn who_samples_more_keeps_a_part_of_what_others_keep(id in any::<u64>(), shift in 0u32..20, bits in 0..SAMPLING_BITS) {
            let id = ShortId(id << shift);
            let many = Sampling::new(bits).unwrap();
            let few = many.coarser().unwrap();
            prop_assert_eq!(few.finer(), Some(many));
            prop_assert!(many < few && (many.keeps(id) || !few.keeps(id)));
            prop_assert_eq!(many.keeps(id), id.0.is_multiple_of(1 << bits));
            prop_assert_eq!(many.keeps_last(id), many.keeps(id) && !few.keeps(id));
        }
    }

    #[test]
    fn sampling_is_bounded() {
        assert_eq!(Sampling::new(SAMPLING_BITS + 1), None);
        assert_eq!(Sampling::new(SAMPLING_BITS).unwrap().coarser(), None);
        assert_eq!(Sampling::ALL.finer(), None);
        assert!(Sampling::ALL.keeps(ShortId(u64::MAX)) && Sampling::ALL.keeps(ShortId(0)));
    }

    #[test]
    fn a_shard_goes_back_by_a_bit_when_there_was_room_for_a_whole_lease() {
        let start = Instant::now();
        let mut shard = Sampled::default();
        shard.set(Sampling::new(2).unwrap());
        let bits = |shard: &Sampled| shard.sampling.zero_bits();
        let second = Duration::from_secs(1);
        shard.look(true, 100, start);
        shard.look(true, 100, start + LEASE - second);
        assert_eq!(bits(&shard), 2);
        // Once there was none in between: it begins anew.
        shard.look(false, 100, start + LEASE);
        shard.look(true, 100, start + LEASE + second);
        shard.look(true, 100, start + LEASE * 2);
        assert_eq!((bits(&shard), shard.expected(100, start)), (2, 100));
        let now = start + LEASE * 2 + second;
        shard.look(true, 100, now);
        assert_eq!(bits(&shard), 1);
        // What it will have is counted before it comes.
        assert_eq!(
            (shard.expected(100, now), shard.expected(300, now), shard.expected(100, now + LEASE)),
            (200, 300, 100)
        );
        shard.look(true, 150, now + second);
        assert_eq!(bits(&shard), 1, "a bit at a time");
    }
}
