//! How long virtual CPUs waited for their pages: a histogram of bounded size, for medians and percentiles.

use crate::stats::Waited;
use crate::timer::Span;

/// Waits are told apart to one part in so many.
const STEPS: u64 = 16;
const STEPS_BITS: u32 = STEPS.trailing_zeros();
/// One step each below `STEPS` microseconds, then `STEPS` for each doubling.
const BUCKETS: usize = 16 * 61;
const _: () = assert!(BUCKETS as u64 == STEPS * (65 - STEPS_BITS as u64));

/// Waits in microseconds, in buckets whose width is a sixteenth of what they hold.
#[derive(Clone, Debug, Default)]
pub(crate) struct Waits {
    counts: Vec<u32>,
    total: u64,
}

impl Waits {
    /// One more wait.
    pub(crate) fn add(&mut self, wait: Span) {
        if self.counts.is_empty() {
            self.counts = vec![0; BUCKETS];
        }
        if let Some(count) = self.counts.get_mut(bucket(wait.0)) {
            *count = count.saturating_add(1);
            self.total += 1;
        }
    }

    /// The median and the 99th percentile; zeroes if nobody waited.
    pub(crate) fn summary(&self) -> Waited {
        Waited { median_us: self.quantile(50), p99_us: self.quantile(99) }
    }

    /// The lower end of the bucket of the wait that so many percent are not longer than.
    fn quantile(&self, percent: u64) -> u64 {
        let rank = (self.total * percent).div_ceil(100).max(1);
        let mut seen = 0;
        let at = self.counts.iter().position(|count| {
            seen += u64::from(*count);
            seen >= rank
        });
        at.map_or(0, lower_end)
    }
}

fn bucket(us: u64) -> usize {
    if us < STEPS {
        return usize::try_from(us).unwrap_or(0);
    }
    let doublings = us.ilog2() - STEPS_BITS;
    let step = (us >> doublings) - STEPS;
    usize::try_from((u64::from(doublings) + 1) * STEPS + step).unwrap_or(usize::MAX)
}

fn lower_end(bucket: usize) -> u64 {
    let bucket = bucket as u64;
    match (bucket / STEPS, bucket % STEPS) {
        (0, us) => us,
        (doublings, step) => (STEPS + step) << (doublings - 1),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn quantiles_are_those_of_the_sorted_waits_to_a_sixteenth(
            mut waits in prop::collection::vec(0..u64::MAX >> 8, 1..200),
        ) {
            let mut histogram = Waits::default();
            waits.iter().for_each(|us| histogram.add(Span(*us)));
            waits.sort_unstable();
            let Waited { median_us, p99_us } = histogram.summary();
            for (percent, found) in [(50, median_us), (99, p99_us)] {
                let exact = waits[(waits.len() * percent).div_ceil(100) - 1];
                prop_assert!(found <= exact && exact - found <= exact / STEPS, "{percent}: {found}, not {exact}");
            }
        }

        #[test]
        fn every_wait_has_a_bucket(us: u64) {
            let at = bucket(us);
            prop_assert!(at < BUCKETS && lower_end(at) <= us);
        }
    }

    #[test]
    fn nobody_waited() {
        assert_eq!(Waits::default().summary(), Waited::default());
    }
}
