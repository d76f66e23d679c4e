//! One round: the pages to name, region by region, and how far that has come.

use page::{Gfn, PageSet, RegionId};

/// QEMU's cost of a zero page in a migration stream: 8 bytes of address and flags, 1 of fill (QEMU, migration/ram.c).
pub(super) const PLAIN_ZERO_BYTES: u64 = 9;
/// QEMU's cost of any other page: 8 bytes of address and flags, and the page.
pub(super) const PLAIN_PAGE_BYTES: u64 = 8 + page::PAGE_SIZE as u64;

/// A round's bookkeeping.
#[derive(Debug)]
pub(super) struct Round {
    pub(super) number: u32,
    todo: PageSet,
    pages: u64,
    /// Every region below this has been given out.
    cursor: RegionId,
    region_bound: u64,
    hashing: usize,
    ended: bool,
    /// Whether its pages are sent without being asked for.
    pub(super) pushed: bool,
}

impl Round {
    pub(super) fn new(number: u32, todo: PageSet, region_bound: u64, pushed: bool) -> Self {
        let pages = todo.len();
        Self { number, todo, pages, cursor: RegionId(0), region_bound, hashing: 0, ended: false, pushed }
    }

    /// How many pages the round has.
    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    /// The next region's pages to hash, while the window of `most` has room.
    pub(super) fn next(&mut self, most: usize) -> Option<(RegionId, Vec<Gfn>)> {
        if self.hashing >= most {
            return None;
        }
        while self.cursor.0 < self.region_bound {
            let region = self.cursor;
            self.cursor = RegionId(region.0 + 1);
            let pages: Vec<Gfn> = (region.first().0..self.cursor.first().0)
                .map(Gfn)
                .filter(|gfn| self.todo.contains(*gfn))
                .collect();
            if !pages.is_empty() {
                self.hashing += 1;
                return Some((region, pages));
            }
        }
        None
    }

    /// Takes back a region that has been hashed.
    pub(super) fn hashed(&mut self) {
        self.hashing = self.hashing.saturating_sub(1);
    }

    /// True once, when all has been named.
    pub(super) fn take_end(&mut self) -> bool {
        let over = !self.ended && self.hashing == 0 && self.cursor.0 >= self.region_bound;
        self.ended |= over;
        over
    }

    /// Whether all has been named.
    pub(super) fn is_named(&self) -> bool {
        self.ended
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_page_is_given_out_once_within_the_window() {
        let mut todo = PageSet::empty(512 * 6);
        for gfn in [0, 511, 512, 2000, 3071] {
            todo.insert(Gfn(gfn));
        }
        let mut round = Round::new(3, todo.clone(), 6, false);
        let mut given = PageSet::empty(todo.bound());
        assert!(!round.take_end());
        while let Some((region, pages)) = round.next(2) {
            for gfn in pages {
                assert_eq!(gfn.region(), region);
                assert!(given.insert(gfn));
            }
            if round.next(1).is_none() {
                round.hashed();
            }
        }
        assert_eq!(given, todo);
        assert!(round.take_end(), "nothing is left to hash");
        assert!(!round.take_end(), "said once");
    }

    #[test]
    fn an_empty_round_ends_at_once() {
        let mut round = Round::new(1, PageSet::empty(512), 1, false);
        assert!(round.next(8).is_none());
        assert!(round.take_end());
    }
}
