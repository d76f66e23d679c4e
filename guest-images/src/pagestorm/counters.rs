//! The counters that the self-check trusts, and why it may.
//!
//! They live in guest memory, so the very loss that the check looks for can hit them. Hence three accounts of one
//! history: the number of writes in the guest's own image, the same number in the header of the counters, and a
//! generation a page, each with a tag that binds it to its place. Since writes go round in a fixed order, the number
//! of writes tells what every generation must be: slot s of n has ⌊w/n⌋ + (1 if s < w mod n). A lost page of counters
//! breaks a tag or that equation, whichever of the accounts was on it.

use super::layout::COUNTER_BYTES;
use super::mix::mix_all;

/// One counter as it lies in memory.
pub type Raw = [u8; COUNTER_BYTES];

/// The counter of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counter {
    /// Writes of its page so far.
    pub generation: u32,
    /// [`super::rewrite::kept_sum`]; 0 for whole-page content.
    pub kept: u64,
}

impl Counter {
    /// Its bytes in place `number` (the slot + 1).
    #[must_use]
    pub fn to_raw(self, seed: u64, number: u64) -> Raw {
        let mut raw = [0; COUNTER_BYTES];
        raw[..4].copy_from_slice(&self.generation.to_le_bytes());
        raw[4..8].copy_from_slice(&self.tag(seed, number).to_le_bytes());
        raw[8..].copy_from_slice(&self.kept.to_le_bytes());
        raw
    }

    /// The counter in place `number`, if the bytes are one.
    #[must_use]
    pub fn from_raw(seed: u64, number: u64, raw: Raw) -> Option<Self> {
        let [g0, g1, g2, g3, t0, t1, t2, t3, kept @ ..] = raw;
        let counter =
            Self { generation: u32::from_le_bytes([g0, g1, g2, g3]), kept: u64::from_le_bytes(kept) };
        (counter.tag(seed, number) == u32::from_le_bytes([t0, t1, t2, t3])).then_some(counter)
    }

    fn tag(self, seed: u64, number: u64) -> u32 {
        (mix_all(&[seed, number, u64::from(self.generation), self.kept]) >> 32) as u32
    }
}

/// The header's bytes: the number of writes and its tag.
#[must_use]
pub fn header_to_raw(seed: u64, writes: u64) -> Raw {
    (u128::from(writes) | u128::from(mix_all(&[seed, writes])) << 64).to_le_bytes()
}

/// The number of writes in a header, if the bytes are one.
#[must_use]
pub fn header_from_raw(seed: u64, raw: Raw) -> Option<u64> {
    let (writes, tag) = halves(raw);
    (mix_all(&[seed, writes]) == tag).then_some(writes)
}

/// Sixteen bytes as two numbers.
pub(super) const fn halves(raw: Raw) -> (u64, u64) {
    let [a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7] = raw;
    (
        u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]),
        u64::from_le_bytes([b0, b1, b2, b3, b4, b5, b6, b7]),
    )
}

/// The generation that slot `slot` of `slots` has after `writes` writes.
/// # Panics
/// After 2^32 writes of one page: more than a year at the fastest pace that memory allows.
#[must_use]
pub fn expected_generation(writes: u64, slots: u64, slot: u64) -> u32 {
    let generation = writes / slots + u64::from(slot < writes % slots);
    u32::try_from(generation).expect("nobody waits for four billion writes of one page")
}
