//! A bound on what bulk data takes of the link: a token bucket over all channels of a migration.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep};

/// How much may be sent at once after a silence.
const BURST: Duration = Duration::from_millis(50);

/// A token bucket; without a rate it lets everything pass.
#[derive(Debug)]
pub struct Throttle {
    bytes_per_s: Option<u64>,
    /// When all that was let pass so far has been paid for.
    paid: Mutex<Instant>,
}

impl Throttle {
    /// A bucket of `bits` a second.
    #[must_use]
    pub fn new(bits: Option<u64>) -> Self {
        Self { bytes_per_s: bits.map(|bits| (bits / 8).max(1)), paid: Mutex::new(Instant::now()) }
    }

    /// The rate, bytes a second.
    #[must_use]
    pub fn bytes_per_s(&self) -> Option<u64> {
        self.bytes_per_s
    }

    /// Waits until `bytes` may pass.
    pub async fn pass(&self, bytes: usize) {
        let wait = self.charge(Instant::now(), bytes);
        if !wait.is_zero() {
            sleep(wait).await;
        }
    }

    /// Charges `bytes` that do not wait their turn: what comes after waits longer.
    pub fn charge_ahead(&self, bytes: usize) {
        self.charge(Instant::now(), bytes);
    }

    /// Charges `bytes` and says how long to wait before they may pass.
    fn charge(&self, now: Instant, bytes: usize) -> Duration {
        let Some(rate) = self.bytes_per_s else { return Duration::ZERO };
        let cost = Duration::from_micros((bytes as u64).saturating_mul(1_000_000) / rate);
        let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
        let from = (*paid).max(now.checked_sub(BURST).unwrap_or(now));
        *paid = from + cost;
        from.saturating_duration_since(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_megabyte_at_eight_megabits_takes_a_second() {
        let throttle = Throttle::new(Some(8_000_000));
        let start = Instant::now();
        let mut now = start;
        for _ in 0..101 {
            now += throttle.charge(now, 10_000);
        }
        let took = now - start;
        assert!(took > Duration::from_millis(900) && took < Duration::from_millis(1010), "{took:?}");
    }

    #[test]
    fn a_silence_saves_up_no_more_than_the_burst() {
        let throttle = Throttle::new(Some(8_000_000));
        let later = Instant::now() + Duration::from_secs(100);
        assert_eq!(throttle.charge(later, 1_000_000), Duration::ZERO);
        assert!(throttle.charge(later, 1) >= Duration::from_millis(900));
    }

    #[test]
    fn what_goes_ahead_is_paid_for_by_what_comes_after() {
        let throttle = Throttle::new(Some(8_000_000));
        throttle.charge_ahead(1_000_000);
        assert!(throttle.charge(Instant::now(), 1) >= Duration::from_millis(900));
    }

    #[test]
    fn without_a_rate_nothing_waits() {
        assert_eq!(Throttle::new(None).charge(Instant::now(), usize::MAX), Duration::ZERO);
    }
}
