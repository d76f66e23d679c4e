//! When the next write and the next heartbeat are due, and which page comes next.

use super::limits;
use super::mix::mix_all;

/// Nanoseconds in a second.
const SECOND_NS: u64 = 1_000_000_000;

/// Spreads writes evenly over time. It forgoes what a stall of more than [`limits::CATCH_UP_NS`] cost.
#[derive(Clone, Debug)]
pub struct Pacer {
    rate_pps: u64,
    last_ns: u64,
    /// Time times rate that has not been written for yet; a page costs [`SECOND_NS`].
    credit: u64,
}

impl Pacer {
    /// Paces from `now_ns` on.
    #[must_use]
    pub const fn new(rate_pps: u64, now_ns: u64) -> Self {
        Self { rate_pps, last_ns: now_ns, credit: 0 }
    }

    /// Pages due at `now_ns`, at most `most`; they count as written.
    pub fn take(&mut self, now_ns: u64, most: u32) -> u32 {
        let elapsed_ns = now_ns.saturating_sub(self.last_ns).min(limits::CATCH_UP_NS);
        self.last_ns = self.last_ns.max(now_ns);
        let credit_max = (self.rate_pps * limits::CATCH_UP_NS).max(SECOND_NS);
        self.credit = (self.credit + elapsed_ns * self.rate_pps).min(credit_max);
        let due = u32::try_from(self.credit / SECOND_NS).unwrap_or(u32::MAX).min(most);
        self.credit -= u64::from(due) * SECOND_NS;
        due
    }

    /// When to write next: at once if pages are overdue, else when the next is due, though not sooner than
    /// [`limits::WRITE_GRAIN_NS`] after the last look; `None` at rate 0.
    #[must_use]
    pub fn next_ns(&self) -> Option<u64> {
        if self.rate_pps == 0 {
            return None;
        }
        let missing = SECOND_NS.saturating_sub(self.credit);
        let wait_ns = missing.div_ceil(self.rate_pps);
        Some(self.last_ns + if wait_ns == 0 { 0 } else { wait_ns.max(limits::WRITE_GRAIN_NS) })
    }
}

/// A periodic event that is never made up for: after a stall the next one comes a period later.
#[derive(Clone, Debug)]
pub struct Periodic {
    period_ns: u64,
    next_ns: u64,
}

impl Periodic {
    /// First due a period after `now_ns`. The period is not 0.
    #[must_use]
    pub const fn new(period_ns: u64, now_ns: u64) -> Self {
        Self { period_ns, next_ns: now_ns + period_ns }
    }

    /// Whether it is due; if so, it counts as done.
    pub const fn take(&mut self, now_ns: u64) -> bool {
        if now_ns < self.next_ns {
            return false;
        }
        // On time, the grid stays where it was, or every beat would come a turn of the loop later than the last.
        self.next_ns += self.period_ns;
        if self.next_ns <= now_ns {
            self.next_ns = now_ns + self.period_ns;
        }
        true
    }

    /// When it is due next.
    #[must_use]
    pub const fn next_ns(&self) -> u64 {
        self.next_ns
    }
}

/// The order of a sweep: a permutation of the data pages by the seed, the same in every sweep.
#[derive(Clone, Debug)]
pub struct Order {
    pages: u64,
    bits: u32,
    multiplier: u64,
    offset: u64,
}

impl Order {
    /// The order of `pages` (at least 1) data pages.
    #[must_use]
    pub fn new(seed: u64, pages: u64) -> Self {
        let bits = pages.next_power_of_two().trailing_zeros();
        Self { pages, bits, multiplier: mix_all(&[seed, 6]) | 1, offset: mix_all(&[seed, 7]) }
    }

    /// The data page that comes `slot`-th (below the number of pages).
    #[must_use]
    pub fn page_of(&self, slot: u64) -> u64 {
        // Each step is a bijection of `bits` bits; walking its cycle until the result is a page again makes a
        // bijection of the pages. Less than half of the values are none, so the walk is short.
        let mut value = slot;
        loop {
            value = self.step(value);
            if value < self.pages {
                return value;
            }
        }
    }

    fn step(&self, value: u64) -> u64 {
        let mask = (1u64 << self.bits) - 1;
        let shift = self.bits / 2 + 1;
        let mut mixed = value.wrapping_add(self.offset) & mask;
        for _ in 0..3 {
            mixed = mixed.wrapping_mul(self.multiplier) & mask;
            mixed ^= mixed >> shift;
        }
        mixed
    }
}
