//! Where to ask for a page whose name no owner keeps: at the holders of the kept pages nearest to it in the request's order.
//!
//! The order is that of the memory or file which the pages belong to, and whoever holds one page of a run is likely to hold
//! those beside it. The request is cut into windows of [`NEAR_WINDOW`] ids; once all names of a window that an owner keeps are looked up it is
//! settled, and each other page in it is asked of a holder of the nearest page found before it and behind it, then of those who between them hold
//! all that was found in the window. A VM's memory mixes pages that many hold with pages that one holds: who has the rare ones shows only in
//! what the others lack.

use std::ops::Range;

use crate::{asked::PeerNo, limits::NEAR_WINDOW};

/// The windows of one search.
#[derive(Debug)]
pub(crate) struct Windows {
    ids: u32,
    /// How many ids of each window are still to be looked up.
    waiting: Vec<u32>,
    settled: Vec<u32>,
}

impl Windows {
    /// Cuts a request of so many ids into windows, the last one up to twice as long as the others.
    pub(crate) fn new(ids: usize) -> Self {
        let ids = u32::try_from(ids).expect("a search's ids are bounded far below 2^32");
        let mut windows = Self { ids, waiting: Vec::new(), settled: Vec::new() };
        windows.waiting = (0..windows.count())
            .map(|window| windows.range(window))
            .map(|range| range.end - range.start)
            .collect();
        windows
    }

    fn count(&self) -> u32 {
        (self.ids / NEAR_WINDOW).max(1)
    }

    fn of(&self, at: u32) -> u32 {
        (at / NEAR_WINDOW).min(self.count() - 1)
    }

    fn range(&self, window: u32) -> Range<u32> {
        let last = window + 1 == self.count();
        let end = if last { self.ids } else { (window + 1) * NEAR_WINDOW };
        window * NEAR_WINDOW..end
    }

    /// An id has been looked up, or is not going to be.
    pub(crate) fn looked_up(&mut self, at: u32) {
        let window = self.of(at);
        let waiting = &mut self.waiting[window as usize];
        *waiting -= 1;
        if *waiting == 0 {
            self.settled.push(window);
        }
    }

    /// A window that has been settled since this was last asked: its places in the request.
    pub(crate) fn next_settled(&mut self) -> Option<Range<u32>> {
        let window = self.settled.pop()?;
        Some(self.range(window))
    }
}

/// The places among sorted `hits` next to `at` on either side, the nearer one first.
pub(crate) fn nearest(hits: &[u32], at: u32) -> impl Iterator<Item = u32> + use<> {
    let behind = hits.partition_point(|hit| *hit < at);
    let before = behind.checked_sub(1).map(|before| hits[before]);
    let behind = hits.get(behind).copied();
    let behind_is_nearer = match (before, behind) {
        (Some(before), Some(behind)) => behind - at < at - before,
        (None, _) | (_, None) => false,
    };
    let order = if behind_is_nearer { [behind, before] } else { [before, behind] };
    order.into_iter().flatten()
}

/// Holders who between them hold all of `hits`, at most `most` of them: first who holds most of them, then who holds most of what is left,
/// and so on.
pub(crate) fn cover<'a>(hits: impl Iterator<Item = &'a [PeerNo]>, most: usize) -> Vec<PeerNo> {
    let mut left: Vec<&[PeerNo]> = hits.collect();
    let mut chosen = Vec::new();
    while chosen.len() < most {
        let mut all: Vec<PeerNo> = left.iter().flat_map(|holders| holders.iter().copied()).collect();
        all.sort_unstable();
        let Some(run) = all.chunk_by(PartialEq::eq).max_by_key(|run| run.len()) else { break };
        let best = run[0];
        left.retain(|holders| !holders.contains(&best));
        chosen.push(best);
    }
    chosen
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn each_window_settles_once_its_ids_are_looked_up(ids in 0usize..5000, step in 1usize..5000) {
            let mut windows = Windows::new(ids);
            let mut settled: Vec<_> = std::iter::from_fn(|| windows.next_settled()).collect();
            // In some order: each place once, as the step shares no factor with the prime.
            let order = (0..5003).map(|n| n * step % 5003).filter(|at| *at < ids);
            for at in order.map(|at| u32::try_from(at).unwrap()) {
                prop_assert!(settled.iter().all(|window: &Range<u32>| !window.contains(&at)), "{at} is not looked up yet");
                windows.looked_up(at);
                settled.extend(std::iter::from_fn(|| windows.next_settled()));
            }
            settled.sort_by_key(|window| window.start);
            let places: Vec<u32> = settled.into_iter().flatten().collect();
            prop_assert_eq!(places, (0..).take(ids).collect::<Vec<u32>>());
        }

        #[test]
        fn a_cover_holds_all_and_nobody_in_it_is_idle(hits in prop::collection::vec(prop::collection::btree_set(0u16..9, 1..4), 0..20), most in 0usize..9) {
            let hits: Vec<Vec<PeerNo>> = hits.into_iter().map(|hit| hit.into_iter().collect()).collect();
            let chosen = cover(hits.iter().map(Vec::as_slice), most);
            let covered = |by: &[PeerNo]| hits.iter().filter(|hit| hit.iter().any(|holder| by.contains(holder))).count();
            prop_assert!(chosen.len() <= most);
            prop_assert!(covered(&chosen) == hits.len() || chosen.len() == most);
            for many in 0..chosen.len() {
                let (before, more) = (covered(&chosen[..many]), covered(&chosen[..=many]));
                let best = (0..9).map(|other| covered(&[&chosen[..many], &[other]].concat())).max();
                prop_assert!(more > before && Some(more) == best);
            }
        }

        #[test]
        fn the_nearest_hits_are_those_on_either_side(hits in prop::collection::btree_set(0u32..100, 0..9), at in 0u32..100) {
            let hits: Vec<u32> = hits.into_iter().filter(|hit| *hit != at).collect();
            let found: Vec<u32> = nearest(&hits, at).collect();
            let mut expected: Vec<u32> = hits.iter().copied().filter(|hit| *hit < at).max().into_iter().collect();
            expected.extend(hits.iter().copied().filter(|hit| *hit > at).min());
            expected.sort_by_key(|hit| hit.abs_diff(at));
            prop_assert_eq!(found, expected);
        }
    }
}
