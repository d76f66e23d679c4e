//! Budgets: how much of something may be used a second, as token buckets.
//!
//! What a piece of work costs is often known only afterwards (the CPU time of a scan), so a bucket may fall below empty: work begins while
//! something is in it, and after that whoever comes next waits until the debt is paid. Over any time `t` what is used is therefore at most
//! `rate * t + burst`, and the cost of the last piece that began. Pure: time comes in as `now`, and units are the caller's.

use std::time::{Duration, Instant};

/// Levels are counted in billionths, so that no fraction is lost between two looks however short.
const FRACTIONS: i128 = 1_000_000_000;

/// A token bucket.
#[derive(Clone, Debug)]
pub struct Bucket {
    per_second: u64,
    burst: u64,
    level: i128,
    at: Instant,
}

impl Bucket {
    /// A full bucket: `burst` may be used at once, and `per_second` from then on.
    #[must_use]
    pub fn new(per_second: u64, burst: u64, now: Instant) -> Self {
        Self { per_second, burst, level: i128::from(burst) * FRACTIONS, at: now }
    }

    fn fill(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.at);
        let nanos = i128::try_from(passed.as_nanos()).unwrap_or(i128::MAX);
        let more = nanos.saturating_mul(i128::from(self.per_second));
        self.level = self.level.saturating_add(more).min(i128::from(self.burst) * FRACTIONS);
        self.at = self.at.max(now);
    }

    /// How long until the next piece of work may begin; zero if it may now.
    pub fn wait(&mut self, now: Instant) -> Duration {
        self.fill(now);
        if self.level >= 0 {
            return Duration::ZERO;
        }
        let nanos = (-self.level).div_euclid(i128::from(self.per_second.max(1))) + 1;
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    /// Uses `amount`, whether the bucket has so much or not.
    pub fn take(&mut self, amount: u64, now: Instant) {
        self.fill(now);
        self.level -= i128::from(amount) * FRACTIONS;
    }

    /// Puts back what was taken and not used.
    pub fn give_back(&mut self, amount: u64, now: Instant) {
        self.level += i128::from(amount) * FRACTIONS;
        self.fill(now);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn work_begins_while_something_is_left_and_debt_is_waited_for() {
        let start = Instant::now();
        let mut bucket = Bucket::new(100, 50, start);
        assert_eq!(bucket.wait(start), Duration::ZERO);
        bucket.take(150, start);
        let wait = bucket.wait(start);
        assert!(wait >= Duration::from_secs(1) && wait < Duration::from_millis(1001), "{wait:?}");
        assert_eq!(bucket.wait(start + wait), Duration::ZERO);
        bucket.take(10, start + wait);
        bucket.give_back(10, start + wait);
        assert_eq!(bucket.wait(start + wait), Duration::ZERO);
        // What is not used is not saved up beyond the burst.
        let later = start + Duration::from_secs(3600);
        bucket.take(51, later);
        assert!(bucket.wait(later) > Duration::ZERO);
    }

    proptest! {
        /// Whoever waits as told never uses more than the rate and the burst allow, but for the last piece that began, and
        /// whoever always has work uses nearly all of it.
        #[test]
        fn what_is_used_keeps_to_the_rate_and_none_of_it_is_lost(
            per_second in 1u64..1_000_000_000,
            burst in 0u64..1_000_000_000,
            pieces in prop::collection::vec((0u64..3_000_000_000, 0u64..2000), 1..60),
            busy: bool,
        ) {
            let start = Instant::now();
            let mut bucket = Bucket::new(per_second, burst, start);
            let (mut now, mut used) = (start, 0u128);
            for (amount, idle_ms) in pieces {
                let wait = bucket.wait(now);
                now += wait;
                let earned = (now - start).as_nanos() * u128::from(per_second) + u128::from(burst) * 1_000_000_000;
                // All earlier pieces are paid for when the next begins, and it begins within two nanoseconds of that.
                prop_assert!(used * 1_000_000_000 <= earned);
                if busy && wait > Duration::ZERO {
                    prop_assert!(used * 1_000_000_000 + 2 * u128::from(per_second) >= earned);
                }
                bucket.take(amount, now);
                used += u128::from(amount);
                if !busy {
                    now += Duration::from_millis(idle_ms);
                }
            }
        }
    }
}
