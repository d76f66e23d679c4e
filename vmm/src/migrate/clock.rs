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

fn micros(duration: Duration) -> u64 {
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
}

impl Meter {
    /// A meter; `limit`: what this end lets pass at most, bytes a second.
    #[must_use]
    pub(super) fn new(bulk: Bulk, limit: Option<u64>) -> Self {
        Self { bulk, limit, last: None, peak: 0 }
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
