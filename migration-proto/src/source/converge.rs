//! When to stop the VM: when what is left fits the downtime, or when going on does not make it less. With auto-converge the guest is first slowed down, step by step,
//! for as long as that helps.

use crate::limits::{
    ROUNDS, STALLED_ROUNDS, THROTTLE_FIRST_PERCENT, THROTTLE_MOST_PERCENT, THROTTLE_STEP_PERCENT,
};
use crate::postcopy::Mode;
use crate::timer::{Link, Span};

/// Why the VM is stopped now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StopWhy {
    /// The rest fits the downtime asked for.
    Fits,
    /// The guest writes as fast as the link carries: more rounds would not help, and the downtime will be longer than asked for.
    DoesNotConverge,
    /// The VM goes first and the rest of its memory follows.
    Postcopy(WhyPostcopy),
}

/// Why the VM goes before its memory is complete.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WhyPostcopy {
    /// The caller asked for it.
    Asked,
    /// Rounds in a row did not leave less.
    Stalled,
    /// There were as many rounds as there may be.
    Rounds,
    /// Rounds leave less, but so little less that none of those to come would fit the downtime.
    Predicted,
    /// What was left fitted, but by the time that the VM stood still the guest had written more.
    Grew,
}

/// Watches the rounds.
#[derive(Debug)]
pub(crate) struct Converge {
    downtime: Span,
    best: Option<u64>,
    before: Option<u64>,
    stalled: u32,
    /// Auto-converge: how much the guest is slowed down, percent; none if it may not be.
    throttle: Option<u8>,
}

/// Literal bytes that a dirty page takes on the wire before one has been sent: the guest may be writing what nothing compresses.
const GUESS_BYTES_A_PAGE: u64 = page::PAGE_SIZE as u64;
/// Bytes of a page's name with its share of the frame.
const NAME_BYTES: u64 = 9;
/// Bytes of a region's absent frames: its root, and a bitmap at most.
const ABSENT_BYTES: u64 = 110;
/// Saving and loading state, with room.
const STATE_TIME: Span = Span::from_millis(20);

impl Converge {
    /// `slows`: whether a guest that writes too fast for pre-copy may be slowed down.
    pub(crate) fn new(downtime: Span, slows: bool) -> Self {
        Self { downtime, best: None, before: None, stalled: 0, throttle: slows.then_some(0) }
    }

    /// How much the guest is to be slowed down, percent of the time that it rests.
    pub(crate) fn throttle(&self) -> u8 {
        self.throttle.unwrap_or(0)
    }

    /// What stopping now would take: the pages' names and literals, the state, and one and a half round trips (last literal there,
    /// Ready back, Commit there; Running back does not count, the VM runs).
    pub(crate) fn estimate(link: Link, pages: u64, literal_bytes_a_page: Option<u64>) -> Span {
        let bytes = pages.saturating_mul(literal_bytes_a_page.unwrap_or(GUESS_BYTES_A_PAGE) + NAME_BYTES);
        Span(link.time_for(bytes).0 + link.rtt.0 * 3 / 2 + STATE_TIME.0)
    }

    /// What a switchover to post-copy takes: as [`Converge::estimate`], with the absent frames of `regions` in the pages' place.
    pub(crate) fn estimate_postcopy(link: Link, regions: u64) -> Span {
        let bytes = regions.saturating_mul(ABSENT_BYTES);
        Span(link.time_for(bytes).0 + link.rtt.0 * 3 / 2 + STATE_TIME.0)
    }

    /// Whether `dirty` pages fit the downtime.
    pub(super) fn fits(&self, dirty: u64, link: Link, bytes_a_page: Option<u64>) -> bool {
        dirty == 0 || Self::estimate(link, dirty, bytes_a_page) <= self.downtime
    }

    /// Whether to stop before round `next`, with `dirty` pages left. `mode`: what both ends can and the caller wants.
    pub(crate) fn stop(
        &mut self,
        next: u32,
        dirty: u64,
        link: Link,
        bytes_a_page: Option<u64>,
        mode: Mode,
    ) -> Option<StopWhy> {
        if mode == Mode::Postcopy {
            return Some(StopWhy::Postcopy(WhyPostcopy::Asked));
        }
        if self.fits(dirty, link, bytes_a_page) {
            return Some(StopWhy::Fits);
        }
        let before = self.before.replace(dirty);
        // Progress is a tenth less than ever before.
        if self.best.is_none_or(|best| dirty < best - best / 10) {
            self.best = Some(dirty);
            self.stalled = 0;
        } else {
            self.stalled += 1;
        }
        let too_slow = before
            .is_some_and(|before| dirty < before && self.never_fits(next, before, dirty, link, bytes_a_page));
        let too_far = self.too_far(dirty, link, bytes_a_page);
        if mode == Mode::Precopy
            && !too_far
            && (self.stalled > 0 || too_slow)
            && next < ROUNDS
            && self.slow_down()
        {
            return None;
        }
        let why = if self.stalled >= STALLED_ROUNDS {
            Some(WhyPostcopy::Stalled)
        } else if next >= ROUNDS {
            Some(WhyPostcopy::Rounds)
        } else if too_far || (too_slow && mode == Mode::Hybrid) {
            Some(WhyPostcopy::Predicted)
        } else {
            None
        };
        why.map(|why| if mode == Mode::Hybrid { StopWhy::Postcopy(why) } else { StopWhy::DoesNotConverge })
    }

    /// Slows the guest down by one step; false if it may not be, or is as slow as it gets. What a step does, the rounds to come show.
    fn slow_down(&mut self) -> bool {
        let Some(percent) = self.throttle.filter(|percent| *percent < THROTTLE_MOST_PERCENT) else {
            return false;
        };
        let more = percent + if percent == 0 { THROTTLE_FIRST_PERCENT } else { THROTTLE_STEP_PERCENT };
        self.throttle = Some(more.min(THROTTLE_MOST_PERCENT));
        self.stalled = 0;
        true
    }

    /// Whether the round trips alone take longer than the downtime asked for, and what is left next to nothing beside them: no round makes it fit.
    fn too_far(&self, dirty: u64, link: Link, bytes_a_page: Option<u64>) -> bool {
        let (nothing, rest) =
            (Self::estimate(link, 0, bytes_a_page), Self::estimate(link, dirty, bytes_a_page));
        nothing > self.downtime && rest.0 - nothing.0 <= link.rtt.0 / 4
    }

    /// Whether no round still allowed would leave what fits, if each leaves the share that the last one did.
    fn never_fits(&self, next: u32, before: u64, dirty: u64, link: Link, bytes_a_page: Option<u64>) -> bool {
        let share = |left: u64| u128::from(left) * u128::from(dirty) / u128::from(before.max(1));
        let mut left = dirty;
        !(next..ROUNDS).any(|_| {
            left = u64::try_from(share(left)).unwrap_or(u64::MAX);
            self.fits(left, link, bytes_a_page)
        })
    }
}

/// What a literal of a page that the guest has written takes. What it writes now compresses otherwise than what stood there, and the second
/// time goes as a delta, so only the last round tells, and never the first.
#[derive(Debug, Default)]
pub(super) struct WrittenPage {
    /// Literal pages and bytes up to the end of the round before.
    sent: Option<(u64, u64)>,
    bytes: Option<u64>,
}

impl WrittenPage {
    /// A round is over; `sent`: literal pages and bytes of all so far. Returns bytes a page.
    pub(super) fn round_over(&mut self, sent: (u64, u64)) -> Option<u64> {
        if let Some((pages, bytes)) = self.sent.replace(sent) {
            self.bytes = (sent.1 - bytes).checked_div(sent.0 - pages).or(self.bytes);
        }
        self.bytes
    }

    /// Bytes a page, as far as is known.
    pub(super) fn bytes(&self) -> Option<u64> {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_round_with_literals_tells_what_a_page_takes() {
        let mut page = WrittenPage::default();
        assert_eq!(page.round_over((1000, 4_000_000)), None, "the guest may not have written one of these");
        assert_eq!(page.round_over((1100, 4_130_000)), Some(1300));
        assert_eq!(page.round_over((1150, 4_135_000)), Some(100), "deltas");
        assert_eq!(page.round_over((1150, 4_135_000)), Some(100), "nothing new");
    }

    const LINK: Link = Link { rtt: Span::from_millis(50), bytes_per_s: 12_500_000 };

    #[test]
    fn stops_when_the_rest_fits() {
        let mut converge = Converge::new(Span::from_millis(300), false);
        assert_eq!(converge.stop(1, 100_000, LINK, Some(4000), Mode::Precopy), None);
        assert_eq!(converge.stop(2, 100, LINK, Some(4000), Mode::Precopy), Some(StopWhy::Fits));
    }

    #[test]
    fn gives_up_on_a_guest_that_writes_as_fast_as_the_link() {
        let mut converge = Converge::new(Span::from_millis(300), false);
        let stopped =
            (1..).find(|round| converge.stop(*round, 50_000, LINK, Some(4000), Mode::Precopy).is_some());
        assert_eq!(stopped, Some(1 + STALLED_ROUNDS));
    }

    #[test]
    fn slow_progress_ends_with_the_rounds() {
        let mut converge = Converge::new(Span(0), false);
        let mut dirty = u64::MAX / 16_384;
        let stopped = (1..).find(|round| {
            dirty -= dirty / 8;
            converge.stop(*round, dirty, LINK, Some(4000), Mode::Precopy).is_some()
        });
        assert_eq!(stopped, Some(ROUNDS));
    }

    fn hybrid(converge: &mut Converge, round: u32, dirty: u64) -> Option<StopWhy> {
        converge.stop(round, dirty, LINK, Some(4000), Mode::Hybrid)
    }

    #[test]
    fn hybrid_goes_on_while_rounds_promise_to_fit_and_says_why_it_does_not() {
        let mut converge = Converge::new(Span::from_millis(300), false);
        assert_eq!(hybrid(&mut converge, 1, 100_000), None);
        assert_eq!(hybrid(&mut converge, 2, 50_000), None, "a few more halvings and it fits");
        assert_eq!(hybrid(&mut converge, 3, 100), Some(StopWhy::Fits));

        let mut slow = Converge::new(Span::from_millis(300), false);
        let rounds = |round: u32| 1_000_000 - u64::from(round) * 10_000;
        let stopped = (1..).find_map(|round| hybrid(&mut slow, round, rounds(round)));
        assert_eq!(stopped, Some(StopWhy::Postcopy(WhyPostcopy::Predicted)));

        let mut stalled = Converge::new(Span::from_millis(300), false);
        let stopped = (1..).find_map(|round| hybrid(&mut stalled, round, 50_000));
        assert_eq!(stopped, Some(StopWhy::Postcopy(WhyPostcopy::Stalled)));

        let mut asked = Converge::new(Span::from_secs(300), false);
        let stopped = asked.stop(1, 0, LINK, None, Mode::Postcopy);
        assert_eq!(stopped, Some(StopWhy::Postcopy(WhyPostcopy::Asked)));
    }

    #[test]
    fn where_the_round_trips_alone_take_too_long_rounds_end_as_soon_as_the_rest_is_small_beside_them() {
        let far = Link { rtt: Span::from_millis(300), ..LINK };
        for (mode, why) in [
            (Mode::Hybrid, StopWhy::Postcopy(WhyPostcopy::Predicted)),
            (Mode::Precopy, StopWhy::DoesNotConverge),
        ] {
            let mut converge = Converge::new(Span::from_millis(300), false);
            assert_eq!(converge.stop(1, 10_000, far, Some(1000), mode), None, "0.8 s of it");
            assert_eq!(converge.stop(2, 500, far, Some(1000), mode), Some(why));
            let near = Converge::new(Span::from_millis(300), false).stop(1, 25_000, LINK, Some(100), mode);
            assert_eq!(near, None, "what could fit");
        }
    }

    #[test]
    fn a_guest_that_does_not_converge_is_slowed_down_step_by_step_and_then_given_up_on() {
        let mut converge = Converge::new(Span::from_millis(300), true);
        let mut steps = Vec::new();
        let stopped = (1..).find_map(|round| {
            let why = converge.stop(round, 50_000, LINK, Some(4000), Mode::Precopy);
            steps.push(converge.throttle());
            why
        });
        assert_eq!(stopped, Some(StopWhy::DoesNotConverge));
        steps.dedup();
        assert_eq!(steps, [0, 20, 30, 40, 50, 60, 70, 80, 90, 99]);
    }

    #[test]
    fn one_that_converges_is_not_slowed_down_nor_is_one_that_goes_by_post_copy() {
        let mut converge = Converge::new(Span::from_millis(300), true);
        let left = |round: u32| 800_000 >> round;
        let stopped =
            (1..).find_map(|round| converge.stop(round, left(round), LINK, Some(4000), Mode::Precopy));
        assert_eq!((stopped, converge.throttle()), (Some(StopWhy::Fits), 0));
        let mut converge = Converge::new(Span::from_millis(300), true);
        let stopped = (1..).find_map(|round| converge.stop(round, 50_000, LINK, Some(4000), Mode::Hybrid));
        assert_eq!((stopped, converge.throttle()), (Some(StopWhy::Postcopy(WhyPostcopy::Stalled)), 0));
    }

    #[test]
    fn a_slower_guest_converges() {
        // It writes three times what the link carries in the time of a round.
        let mut converge = Converge::new(Span::from_millis(300), true);
        let mut left = 100_000u64;
        let stopped = (1..).find_map(|round| {
            left = (left * 3 * u64::from(100 - converge.throttle()) / 100).min(200_000);
            converge.stop(round, left, LINK, Some(4000), Mode::Precopy)
        });
        assert_eq!(stopped, Some(StopWhy::Fits));
        assert!((70..99).contains(&converge.throttle()), "{}", converge.throttle());
    }
}
