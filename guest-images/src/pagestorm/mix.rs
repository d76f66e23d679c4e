//! The mixing function behind every byte that pagestorm writes.

/// The odd constant of SplitMix64 (2^64 divided by the golden ratio).
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// SplitMix64's output function (Steele, Lea, Flood, 2014): a bijection in which each input bit moves half of
/// the output's.
#[must_use]
pub const fn mix(value: u64) -> u64 {
    let mut z = value;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A hash of several numbers, in their order.
#[must_use]
pub fn mix_all(values: &[u64]) -> u64 {
    values.iter().fold(STEP, |hash, value| mix(hash.wrapping_add(STEP) ^ mix(value.wrapping_add(STEP))))
}

/// A stream of numbers from a key: SplitMix64 itself.
#[derive(Clone, Debug)]
pub struct Stream(u64);

impl Stream {
    /// The stream of `key`.
    #[must_use]
    pub const fn new(key: u64) -> Self {
        Self(key)
    }

    /// The next number.
    pub const fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(STEP);
        mix(self.0)
    }
}
