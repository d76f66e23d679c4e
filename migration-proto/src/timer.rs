//! Time as the core is told it.

use std::ops::{Add, Sub};

/// A point in time: microseconds since an origin that the driver chose. Monotonic.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Time(pub u64);

/// A length of time in microseconds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Span(pub u64);

impl Span {
    /// `n` milliseconds.
    #[must_use]
    pub const fn from_millis(n: u64) -> Self {
        Self(n * 1000)
    }

    /// `n` seconds.
    #[must_use]
    pub const fn from_secs(n: u64) -> Self {
        Self(n * 1_000_000)
    }

    /// Whole milliseconds.
    #[must_use]
    pub const fn millis(self) -> u64 {
        self.0 / 1000
    }
}

impl Add for Span {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }
}

impl Add<Span> for Time {
    type Output = Self;
    fn add(self, span: Span) -> Self {
        Self(self.0.saturating_add(span.0))
    }
}

impl Sub for Time {
    type Output = Span;
    fn sub(self, earlier: Self) -> Span {
        Span(self.0.saturating_sub(earlier.0))
    }
}

/// The WAN link as the driver measures it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Link {
    /// Round trip.
    pub rtt: Span,
    /// What the link carries, bytes a second; at least 1.
    pub bytes_per_s: u64,
}

impl Link {
    /// How long `bytes` take on the link, without the round trip.
    #[must_use]
    pub fn time_for(&self, bytes: u64) -> Span {
        Span(bytes.saturating_mul(1_000_000) / self.bytes_per_s.max(1))
    }
}
