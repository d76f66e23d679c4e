//! What a link carries, as its far end sees it while the near end fills it.

use crate::limits::{PROBE_BURSTS_BYTES, PROBE_BURSTS_TIME};
use crate::timer::{Span, Time};

/// Measures what arrives, window by window. A sender that begins slowly sends more in each round trip; when that has ended, the link is full.
#[derive(Debug)]
pub struct LinkRate {
    window: Span,
    began: Option<Time>,
    window_began: Time,
    window_bytes: u64,
    bytes: u64,
    best: u64,
    /// Windows in a row that were not much better than the best before.
    level: u32,
    enough: bool,
}

/// The shortest window: shorter ones see single bursts rather than the link.
const WINDOW_MIN: Span = Span::from_millis(50);
/// Windows without much gain after which the link is full. The slow start of docs/adr/0001 grows by an eighth in a round trip at its slowest.
const LEVEL_WINDOWS: u32 = 2;

impl LinkRate {
    /// A measurement over a link of this round trip.
    #[must_use]
    pub fn new(rtt: Span) -> Self {
        Self {
            window: rtt.max(WINDOW_MIN),
            began: None,
            window_began: Time(0),
            window_bytes: 0,
            bytes: 0,
            best: 0,
            level: 0,
            enough: false,
        }
    }

    /// So many bytes have arrived. True if that says something new: another best rate, or that it is enough.
    pub fn arrived(&mut self, now: Time, bytes: u64) -> bool {
        self.bytes += bytes;
        let Some(began) = self.began else {
            // What came first has waited somewhere, and says nothing of the link.
            self.began = Some(now);
            self.window_began = now;
            return false;
        };
        self.window_bytes += bytes;
        let long = now - self.window_began;
        let over = self.bytes >= PROBE_BURSTS_BYTES || now - began >= PROBE_BURSTS_TIME;
        if long < self.window && !over {
            return false;
        }
        if long.0 > 0 {
            let rate = u128::from(self.window_bytes) * 1_000_000 / u128::from(long.0);
            let rate = u64::try_from(rate).unwrap_or(u64::MAX);
            self.level = if rate > self.best + self.best / 10 { 0 } else { self.level + 1 };
            self.best = self.best.max(rate);
        }
        (self.window_began, self.window_bytes) = (now, 0);
        self.enough |= over || self.level >= LEVEL_WINDOWS;
        true
    }

    /// The most that a window brought, bytes a second; 0 before the first has ended.
    #[must_use]
    pub fn bytes_per_s(&self) -> u64 {
        self.best
    }

    /// Whether more bursts would tell no more, or no more may be sent.
    #[must_use]
    pub fn is_enough(&self) -> bool {
        self.enough
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A sender that doubles its window each round trip until the link is full: what is measured, and how many bytes that took.
    fn measured(rate: u64, rtt: Span) -> (u64, u64) {
        let mut meter = LinkRate::new(rtt);
        let (mut now, mut window, mut sent) = (Time(1_000_000), 14_000, 0);
        while !meter.is_enough() {
            let full = rate * rtt.0 / 1_000_000;
            let bytes = full.min(window);
            let bursts = bytes.div_ceil(1400);
            for _ in 0..bursts {
                now = now + Span(rtt.0 / bursts);
                sent += 1400;
                meter.arrived(now, 1400);
            }
            window *= 2;
        }
        (meter.bytes_per_s(), sent)
    }

    #[test]
    fn a_link_is_measured_with_little() {
        for (rate, rtt) in [(1_250_000, 10), (1_250_000, 200), (12_500_000, 50), (125_000_000, 10)] {
            let (seen, sent) = measured(rate, Span::from_millis(rtt));
            assert!(seen.abs_diff(rate) < rate / 5, "{seen} of {rate} at {rtt} ms");
            assert!(sent <= PROBE_BURSTS_BYTES + 1400, "{sent} bytes for {rate} at {rtt} ms");
        }
    }

    proptest! {
        #[test]
        fn it_ends(steps in prop::collection::vec((0u64..100_000, 1u64..1 << 20), 0..3000), rtt in 0u64..1 << 30) {
            let mut meter = LinkRate::new(Span(rtt));
            let (mut now, mut bytes, mut began) = (Time(0), 0, None);
            for (took, more) in steps {
                now = now + Span(took);
                bytes += more;
                began.get_or_insert(now);
                meter.arrived(now, more);
                let over = bytes >= PROBE_BURSTS_BYTES || now - began.unwrap() >= PROBE_BURSTS_TIME;
                prop_assert!(!over || meter.is_enough() || began == Some(now));
            }
        }
    }
}
