//! When to stop the VM: when what is left fits the downtime, or when going on does not make it less.

use crate::limits::{ROUNDS, STALLED_ROUNDS};
use crate::timer::{Link, Span};

/// Why the VM is stopped now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StopWhy {
    /// The rest fits the downtime asked for.
    Fits,
    /// The guest writes as fast as the link carries: more rounds would not help, and the downtime will be longer than asked for.
    DoesNotConverge,
}

/// Watches the rounds.
#[derive(Debug)]
pub(super) struct Converge {
    downtime: Span,
    best: Option<u64>,
    stalled: u32,
}

/// Literal bytes that a dirty page takes on the wire before one has been sent: the guest may be writing what nothing compresses.
const GUESS_BYTES_A_PAGE: u64 = page::PAGE_SIZE as u64;
/// Bytes of a page's name with its share of the frame.
const NAME_BYTES: u64 = 9;
/// Saving and loading state, with room.
const STATE_TIME: Span = Span::from_millis(20);

impl Converge {
    pub(super) fn new(downtime: Span) -> Self {
        Self { downtime, best: None, stalled: 0 }
    }

    /// What stopping now would take: the pages' names and literals, the state, and one and a half round trips (last literal there,
    /// Ready back, Commit there; Running back does not count, the VM runs).
    pub(super) fn estimate(link: Link, pages: u64, literal_bytes_a_page: Option<u64>) -> Span {
        let bytes = pages.saturating_mul(literal_bytes_a_page.unwrap_or(GUESS_BYTES_A_PAGE) + NAME_BYTES);
        Span(link.time_for(bytes).0 + link.rtt.0 * 3 / 2 + STATE_TIME.0)
    }

    /// Whether to stop before round `next`, with `dirty` pages left.
    pub(super) fn stop(
        &mut self,
        next: u32,
        dirty: u64,
        link: Link,
        bytes_a_page: Option<u64>,
    ) -> Option<StopWhy> {
        if dirty == 0 || Self::estimate(link, dirty, bytes_a_page) <= self.downtime {
            return Some(StopWhy::Fits);
        }
        // Progress is a tenth less than ever before.
        if self.best.is_none_or(|best| dirty < best - best / 10) {
            self.best = Some(dirty);
            self.stalled = 0;
        } else {
            self.stalled += 1;
        }
        (self.stalled >= STALLED_ROUNDS || next >= ROUNDS).then_some(StopWhy::DoesNotConverge)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK: Link = Link { rtt: Span::from_millis(50), bytes_per_s: 12_500_000 };

    #[test]
    fn stops_when_the_rest_fits() {
        let mut converge = Converge::new(Span::from_millis(300));
        assert_eq!(converge.stop(1, 100_000, LINK, Some(4000)), None);
        assert_eq!(converge.stop(2, 100, LINK, Some(4000)), Some(StopWhy::Fits));
    }

    #[test]
    fn gives_up_on_a_guest_that_writes_as_fast_as_the_link() {
        let mut converge = Converge::new(Span::from_millis(300));
        let stopped = (1..).find(|round| converge.stop(*round, 50_000, LINK, Some(4000)).is_some());
        assert_eq!(stopped, Some(1 + STALLED_ROUNDS));
    }

    #[test]
    fn slow_progress_ends_with_the_rounds() {
        let mut converge = Converge::new(Span(0));
        let mut dirty = u64::MAX / 16_384;
        let stopped = (1..).find(|round| {
            dirty -= dirty / 8;
            converge.stop(*round, dirty, LINK, Some(4000)).is_some()
        });
        assert_eq!(stopped, Some(ROUNDS));
    }
}
