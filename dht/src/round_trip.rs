//! How long a holder takes to answer, smoothed as TCP does (RFC 6298, section 2), and when it counts as slow. Pure.

use std::time::Duration;

use crate::limits::{FETCH_HEDGE, FETCH_HEDGE_LEAST, FETCH_HEDGE_MOST};

/// One holder's answers so far.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct RoundTrip {
    /// The smoothed time and its mean deviation.
    smoothed: Option<(Duration, Duration)>,
}

impl RoundTrip {
    /// An answer came after so long.
    pub(crate) fn measured(&mut self, took: Duration) {
        self.smoothed = Some(match self.smoothed {
            None => (took, took / 2),
            Some((mean, deviation)) => ((mean * 7 + took) / 8, (deviation * 3 + mean.abs_diff(took)) / 4),
        });
    }

    /// When an answer is later than this holder's usually are.
    pub(crate) fn slow_after(self) -> Duration {
        let Some((mean, deviation)) = self.smoothed else { return FETCH_HEDGE };
        (mean + deviation * 4).clamp(FETCH_HEDGE_LEAST, FETCH_HEDGE_MOST)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_holder_is_slow_by_its_own_measure() {
        let (mut quick, mut far) = (RoundTrip::default(), RoundTrip::default());
        assert_eq!(quick.slow_after(), FETCH_HEDGE, "nothing is known of it yet");
        for _ in 0..50 {
            quick.measured(ms(2));
            far.measured(ms(400));
        }
        assert_eq!(quick.slow_after(), FETCH_HEDGE_LEAST);
        assert!(far.slow_after() > ms(400) && far.slow_after() < ms(450), "{far:?}");
    }

    proptest! {
        #[test]
        fn an_answer_no_later_than_the_ones_before_is_not_slow(least in 1u64..900, spread in 0u64..100, answers in prop::collection::vec(0u64..=100, 1..60)) {
            let mut holder = RoundTrip::default();
            for answer in answers {
                holder.measured(ms(least + answer * spread / 100));
            }
            prop_assert!(holder.slow_after() >= ms(least));
            prop_assert!((FETCH_HEDGE_LEAST..=FETCH_HEDGE_MOST).contains(&holder.slow_after()));
        }
    }
}
