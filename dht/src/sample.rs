//! Which of a large site's names are in its index.
//!
//! The index has as many owners' tables as a few hundred peers can keep, whatever the site's size, so what they keep must not grow with
//! the site. A name is announced and looked up only if the last bits of its short id are zero: as many bits as keep the
//! sampled names of a large site as many as all names of one with [`UNSAMPLED_MEMBERS`](crate::limits::UNSAMPLED_MEMBERS) members. A
//! page whose name is not sampled is asked of the holders found for sampled pages near it in the request (see [`crate::lookup`]).
//!
//! Each peer samples by its own estimate of the site's size. Where two differ by one bit, the one with more bits looks up, or announces,
//! half of what the other does: that costs hits, never a wrong page.

use page::ShortId;

use crate::limits::MEMBERS;

/// The names of the index: those whose short id ends in so many zero bits. A short id's first bits name its shard, so that each
/// shard is sampled alike.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct Sampling {
    zero_bits: u32,
}

impl Sampling {
    /// Every name is in the index.
    pub const ALL: Self = Self { zero_bits: 0 };

    /// The sampling of a site with so many members, where one of `unsampled` members still keeps every name:
    /// ceil(log2(members / unsampled)) bits.
    #[must_use]
    pub fn of_site(members: usize, unsampled: usize) -> Self {
        let times = members.min(MEMBERS).div_ceil(unsampled.max(1)).max(1);
        Self { zero_bits: times.next_power_of_two().trailing_zeros() }
    }

    /// How many bits must be zero.
    #[must_use]
    pub fn zero_bits(self) -> u32 {
        self.zero_bits
    }

    /// Whether a name is in the index.
    #[must_use]
    pub fn keeps(self, id: ShortId) -> bool {
        id.0.trailing_zeros() >= self.zero_bits
    }
}

// The bits that sample are not those that name the shard, nor those that spread a shard over its buckets.
const _: () = assert!(MEMBERS.ilog2() + 1 < 24);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::limits::UNSAMPLED_MEMBERS;

    #[test]
    fn a_small_site_keeps_every_name() {
        for members in [0, 1, 3, UNSAMPLED_MEMBERS] {
            assert_eq!(Sampling::of_site(members, UNSAMPLED_MEMBERS), Sampling::ALL);
        }
        assert!(Sampling::ALL.keeps(ShortId(u64::MAX)) && Sampling::ALL.keeps(ShortId(0)));
        let bits = |members| Sampling::of_site(members, UNSAMPLED_MEMBERS).zero_bits();
        assert_eq!([bits(257), bits(512), bits(513), bits(1000), bits(10_000)], [1, 1, 2, 2, 6]);
    }

    proptest! {
        /// What the owners keep in all stays between a half and all of what an unsampled site has them keep.
        #[test]
        fn a_large_site_has_its_owners_keep_no_more(members in 1usize..MEMBERS, unsampled in 1usize..1000) {
            let times = 1 << Sampling::of_site(members, unsampled).zero_bits();
            prop_assert!(members <= unsampled * times);
            prop_assert!(times == 1 || members * 2 > unsampled * times);
        }

        #[test]
        fn who_samples_more_keeps_a_part_of_what_others_keep(id in any::<u64>(), shift in 0u32..20, members in 1usize..MEMBERS) {
            let id = ShortId(id << shift);
            let (few, many) = (Sampling::of_site(members, 8), Sampling::of_site(members * 2, 8));
            prop_assert!(few <= many && many.zero_bits() <= few.zero_bits() + 1);
            prop_assert!(few.keeps(id) || !many.keeps(id));
            prop_assert_eq!(few.keeps(id), id.0.is_multiple_of(1 << few.zero_bits()));
        }
    }
}
