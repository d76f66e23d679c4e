//! A bound on what bulk data takes of the link: a token bucket over all channels of a migration.
//!
//! What a frame will take on the wire is not known when it is handed to QUIC: packets have headers, and what is lost is sent again. So a frame is charged at its
//! length, and whatever has crossed the wire beyond all charges so far is charged with the next one. Over a migration the wire then carries what the bound allows, to
//! the last frame.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep};

/// How much may be sent at once after a silence.
const BURST: Duration = Duration::from_millis(50);

/// A token bucket; without a rate it lets everything pass.
#[derive(Debug)]
pub struct Throttle {
    bytes_per_s: Option<u64>,
    account: Mutex<Account>,
}

#[derive(Debug)]
struct Account {
    /// When all that was let pass so far has been paid for.
    paid: Instant,
    /// Bytes charged, of the present connection, and what it had sent when that was last looked at.
    charged: u64,
    sent: u64,
}

impl Throttle {
    /// A bucket of `bits` a second.
    #[must_use]
    pub fn new(bits: Option<u64>) -> Self {
        let account = Account { paid: Instant::now(), charged: 0, sent: 0 };
        Self { bytes_per_s: bits.map(|bits| (bits / 8).max(1)), account: Mutex::new(account) }
    }

    /// The rate, bytes a second.
    #[must_use]
    pub fn bytes_per_s(&self) -> Option<u64> {
        self.bytes_per_s
    }

    /// Waits until `bytes` may pass. `sent`: the bytes that the connection has put on the wire so far, headers included.
    pub async fn pass(&self, bytes: usize, sent: u64) {
        let wait = self.charge(Instant::now(), bytes, sent);
        if !wait.is_zero() {
            sleep(wait).await;
        }
    }

    /// Charges `bytes` that do not wait their turn: what comes after waits longer.
    pub fn charge_ahead(&self, bytes: usize, sent: u64) {
        self.charge(Instant::now(), bytes, sent);
    }

    /// Charges `bytes`, and what the wire has carried beyond all charges, and says how long to wait before they may pass.
    fn charge(&self, now: Instant, bytes: usize, sent: u64) -> Duration {
        let Some(rate) = self.bytes_per_s else { return Duration::ZERO };
        let mut account = self.account.lock().unwrap_or_else(PoisonError::into_inner);
        if sent < account.sent / 2 {
            // Another connection counts anew. What turns out lost is taken off, which is little.
            account.charged = 0;
        }
        account.sent = sent;
        let beyond = sent.saturating_sub(account.charged);
        let due = beyond.saturating_add(bytes as u64);
        account.charged = account.charged.saturating_add(due);
        let time = |bytes: u64| {
            Duration::from_nanos(
                u64::try_from(u128::from(bytes) * 1_000_000_000 / u128::from(rate)).unwrap_or(u64::MAX),
            )
        };
        let from = account.paid.max(now.checked_sub(BURST).unwrap_or(now)) + time(beyond);
        account.paid = from + time(bytes as u64);
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
            now += throttle.charge(now, 10_000, 0);
        }
        let took = now - start;
        assert!(took > Duration::from_millis(900) && took < Duration::from_millis(1010), "{took:?}");
    }

    #[test]
    fn a_silence_saves_up_no_more_than_the_burst() {
        let throttle = Throttle::new(Some(8_000_000));
        let later = Instant::now() + Duration::from_secs(100);
        assert_eq!(throttle.charge(later, 1_000_000, 0), Duration::ZERO);
        assert!(throttle.charge(later, 1, 0) >= Duration::from_millis(900));
    }

    #[test]
    fn what_goes_ahead_is_paid_for_by_what_comes_after() {
        let throttle = Throttle::new(Some(8_000_000));
        throttle.charge_ahead(1_000_000, 0);
        assert!(throttle.charge(Instant::now(), 1, 0) >= Duration::from_millis(900));
    }

    #[test]
    fn without_a_rate_nothing_waits() {
        assert_eq!(Throttle::new(None).charge(Instant::now(), usize::MAX, 0), Duration::ZERO);
    }

    /// Headers and what is sent again take part of the rate, too: 5% of frames used to pass beyond it.
    #[test]
    fn the_wire_carries_the_rate_and_not_the_frames() {
        let throttle = Throttle::new(Some(80_000_000));
        let start = Instant::now();
        let (mut now, mut wire) = (start, 0);
        while now < start + Duration::from_secs(10) {
            now += throttle.charge(now, 100_000, wire);
            wire += 105_000;
        }
        let rate = wire as f64 / (now - start).as_secs_f64();
        assert!((rate / 10_000_000.0 - 1.0).abs() < 0.01, "{rate} bytes a second");
    }

    #[test]
    fn another_connection_counts_anew() {
        let throttle = Throttle::new(Some(8_000_000));
        let start = Instant::now();
        throttle.charge(start, 100_000, 0);
        throttle.charge(start, 100_000, 5_000_000);
        let before = throttle.charge(start, 1000, 5_100_000);
        let after = throttle.charge(start, 1000, 0);
        assert!(after - before <= Duration::from_millis(2), "{:?}", after - before);
    }
}
