//! Literals that came as deltas: what does not serve is asked for again, and comes plain.

use page::{Gfn, VerifiedPage};

use super::Destination;
use super::phase::Phase;
use crate::error::{AbortReason, ProtocolError};
use crate::limits;
use crate::timer::Time;

impl Destination {
    /// A literal came for `gfn` as a delta against what stood there, was decoded and hashed; `None` if it could not be decoded. The frames to install it at, at once:
    /// empty if it is needed no more, or if something else stood there than the source thought.
    #[must_use = "the page is installed at these frames before the next input"]
    pub fn delta(&mut self, now: Time, gfn: Gfn, page: Option<&VerifiedPage>) -> Vec<Gfn> {
        if self.late().is_some() {
            // What is absent has no base: the delta is of an earlier round.
            return Vec::new();
        }
        self.progressed(now);
        let frames = page.map_or_else(Vec::new, |page| self.install_literal(now, gfn, page));
        if !frames.is_empty() {
            self.stats.source += 1;
        }
        // Against another base than it was made for, a delta may give a page that other frames await.
        if frames.contains(&gfn) {
            self.delta_misses.remove(&gfn);
        } else {
            self.delta_missed(gfn, frames.is_empty());
        }
        frames
    }

    /// Asks again for what the frame still awaits from the source. `useless`: the delta served no other frame.
    fn delta_missed(&mut self, gfn: Gfn, useless: bool) {
        let awaited = self.memory.awaited(gfn).filter(|id| !self.pending.is_with_site(*id));
        if awaited.is_none() || !matches!(self.phase, Phase::Filling) {
            self.stats.unneeded += u64::from(useless);
            return;
        }
        let misses = self.delta_misses.entry(gfn).or_default();
        *misses += 1;
        if *misses > limits::DELTA_MISSES {
            return self.give_up(AbortReason::Protocol(ProtocolError::DeltasMiss(gfn)));
        }
        self.want(&[gfn]);
    }
}
