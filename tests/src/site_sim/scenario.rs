//! What happens to a simulated site, and when.

use serde::Serialize;

/// Seconds of virtual time, in microseconds.
pub(super) const SECOND: u64 = 1_000_000;
/// Until then the site settles: everything is announced, and every lease has begun.
pub(super) const SETTLED_US: u64 = 60 * SECOND;
/// Churn begins here, so that it is in its stride when measuring begins.
pub(super) const CHURN_US: u64 = SETTLED_US;
/// Measuring begins.
pub(super) const MEASURE_US: u64 = 240 * SECOND;
/// It ends.
pub(super) const END_US: u64 = 540 * SECOND;
/// The site is cut in two from here on.
pub(super) const CUT_US: u64 = 260 * SECOND;
/// For two minutes.
pub(super) const HEALED_US: u64 = CUT_US + 120 * SECOND;
/// How long a lookup may take before it counts as one that does not end.
pub(super) const PATIENCE_US: u64 = 600 * SECOND;

/// What happens to a site.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Scenario {
    /// Nothing.
    Steady,
    /// One percent of the peers crash each minute, and as many join. In a site of fewer than 100 one does, once.
    Churn,
    /// Two halves do not reach each other for two minutes, and then they do.
    Partition,
    /// 5% of the peers answer ten times later, or not at all.
    Slow,
    /// 1% of the peers serve wrong bytes, and 1% announce names that they do not hold.
    Lying,
}

impl Scenario {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Steady, Self::Churn, Self::Partition, Self::Slow, Self::Lying];

    /// Its name in tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Steady => "steady",
            Self::Churn => "churn",
            Self::Partition => "partition",
            Self::Slow => "slow peers",
            Self::Lying => "lying peers",
        }
    }
}
