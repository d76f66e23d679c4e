//! Time and the link, as the protocol core is told them.

use std::time::Duration;

use migration_proto::timer::{self, Span, Time};
use tokio::time::Instant;

use super::limits;
use super::transport::{Link, WanBytes};

/// The origin of a migration's time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    origin: Instant,
}

impl Clock {
    /// Time begins now.
    #[must_use]
    pub(super) fn start() -> Self {
        Self { origin: Instant::now() }
    }

    /// Now.
    #[must_use]
    pub(super) fn now(&self) -> Time {
        Time(micros(self.origin.elapsed()))
    }

    /// The instant of a time, for a timer; far away for none.
    #[must_use]
    pub(super) fn instant(&self, time: Option<Time>) -> Instant {
        let far = Duration::from_secs(3600);
        self.origin + time.map_or_else(|| self.origin.elapsed() + far, |time| Duration::from_micros(time.0))
    }

    /// Since the origin.
    #[must_use]
    pub(super) fn elapsed(&self) -> Duration {
        self.origin.elapsed()
    }
}

/// A duration in whole microseconds.
#[must_use]
pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// A duration in whole milliseconds.
#[must_use]
pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Which way the bulk of a migration flows, seen from here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bulk {
    /// From this end.
    Out,
    /// To this end.
    In,
}

/// Measures what a link carries: the most that flowed within one measurement, slowly forgotten, and at the sending end what congestion
/// control would let flow, whichever is more. A link that is not kept busy shows less than it could carry.
#[derive(Debug)]
pub(super) struct Meter {
    bulk: Bulk,
    limit: Option<u64>,
    last: Option<(Instant, u64)>,
    peak: u64,
    receive_window: ReceiveWindow,
}

/// What the sender may have in flight: it grows with what arrives, so that memory is taken up for it only on a link that needs it.
#[derive(Debug)]
struct ReceiveWindow {
    bytes: u64,
}

impl ReceiveWindow {
    /// The new window, if at `bytes_per_s` a quarter of it arrives within a round trip. A sender who starts doubles what he sends every
    /// round trip and is to find the window open.
    fn grow(&mut self, bytes_per_s: u64, rtt: Duration) -> Option<u64> {
        let a_round_trip = u128::from(bytes_per_s) * rtt.as_micros() / 1_000_000;
        if a_round_trip < u128::from(self.bytes / 4) || self.bytes >= limits::WINDOW_MAX_BYTES {
            return None;
        }
        self.bytes = (self.bytes * 2).min(limits::WINDOW_MAX_BYTES);
        Some(self.bytes)
    }
}

impl Meter {
    /// A meter; `limit`: what this end lets pass at most, bytes a second.
    #[must_use]
    pub(super) fn new(bulk: Bulk, limit: Option<u64>) -> Self {
        let receive_window = ReceiveWindow { bytes: limits::RECEIVE_WINDOW_FIRST_BYTES };
        Self { bulk, limit, last: None, peak: 0, receive_window }
    }

    /// Takes a measurement. To be called every [`limits::TICK`] or so.
    pub(super) fn measure(&mut self, link: &Link) -> timer::Link {
        let (now, path, WanBytes { tx, rx }) = (Instant::now(), link.path(), link.wan_bytes());
        let bytes = match self.bulk {
            Bulk::Out => tx,
            Bulk::In => rx,
        };
        if let Some((then, before)) = self.last {
            let passed = micros(now.duration_since(then)).max(1);
            let rate = bytes.saturating_sub(before).saturating_mul(1_000_000) / passed;
            // Forgets half in about three seconds.
            self.peak = rate.max(self.peak - self.peak / 40);
            if let (Bulk::In, Some(window)) = (self.bulk, self.receive_window.grow(rate, path.rtt)) {
                link.set_receive_window(window);
            }
        }
        self.last = Some((now, bytes));
        let allowed = match self.bulk {
            Bulk::Out => path.window_bytes.saturating_mul(1_000_000) / micros(path.rtt).max(1),
            Bulk::In => 0,
        };
        let carries = self.peak.max(allowed);
        let carries = if carries < limits::FLOOR_BYTES_PER_S { limits::GUESS_BYTES_PER_S } else { carries };
        let bytes_per_s = carries.min(self.limit.unwrap_or(u64::MAX)).max(1);
        timer::Link { rtt: Span(micros(path.rtt)), bytes_per_s }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_receive_window_grows_with_what_arrives_and_no_further() {
        let mut window = ReceiveWindow { bytes: limits::RECEIVE_WINDOW_FIRST_BYTES };
        let (rtt, ten_gigabits) = (Duration::from_millis(200), 1_250_000_000);
        assert_eq!(window.grow(12_500_000, rtt), None, "2.5 MB are in flight at 100 Mbit/s");
        let sizes: Vec<u64> = std::iter::from_fn(|| window.grow(ten_gigabits, rtt)).collect();
        assert_eq!(sizes.last(), Some(&limits::WINDOW_MAX_BYTES));
        assert!(window.bytes >= 250_000_000, "{sizes:?}");
        assert_eq!(sizes.first(), Some(&(2 * limits::RECEIVE_WINDOW_FIRST_BYTES)));
    }
}
