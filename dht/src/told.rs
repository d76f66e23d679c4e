//! How much of a log its reader has been told, when the end of the log goes first.

use std::ops::Range;

use crate::limits::TOLD_RANGES;

/// The told parts of a log: disjoint ranges, none touching the next, in ascending order. Their number is bounded: where the bound is met the
/// smallest is forgotten, and what stands there is told again.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct Told {
    ranges: Vec<Range<usize>>,
}

impl Told {
    /// Notes that `range` was told.
    pub(crate) fn add(&mut self, range: Range<usize>) {
        if range.is_empty() {
            return;
        }
        // Those that overlap or touch it become one with it.
        let from = self.ranges.partition_point(|told| told.end < range.start);
        let to = self.ranges.partition_point(|told| told.start <= range.end);
        let joined = match self.ranges.get(from..to) {
            Some([first, .., last]) => range.start.min(first.start)..range.end.max(last.end),
            Some([only]) => range.start.min(only.start)..range.end.max(only.end),
            Some([]) | None => range,
        };
        self.ranges.splice(from..to, [joined]);
        if self.ranges.len() > TOLD_RANGES {
            let smallest = (0..self.ranges.len()).min_by_key(|at| self.ranges[*at].len());
            smallest.map(|at| self.ranges.remove(at));
        }
    }

    /// Whether the log's entry at `at` was told.
    pub(crate) fn contains(&self, at: usize) -> bool {
        let behind = self.ranges.partition_point(|told| told.start <= at);
        behind > 0 && at < self.ranges[behind - 1].end
    }

    /// Follows a log that loses the entries at `removed`, which ascend.
    pub(crate) fn shift(&mut self, removed: &[usize]) {
        let moved = |at: usize| at - removed.partition_point(|gone| *gone < at);
        let ranges = std::mem::take(&mut self.ranges);
        ranges.into_iter().for_each(|told| self.add(moved(told.start)..moved(told.end)));
    }

    /// The last part of `within` that was not told; `None` if all of it was.
    pub(crate) fn last_gap(&self, within: Range<usize>) -> Option<Range<usize>> {
        let mut end = within.end;
        for told in self.ranges.iter().rev() {
            if told.end < end {
                let start = told.end.max(within.start);
                return (start < end).then_some(start..end);
            }
            end = end.min(told.start);
        }
        (within.start < end).then_some(within.start..end)
    }

    /// How much of `within` was not told.
    pub(crate) fn untold(&self, within: &Range<usize>) -> usize {
        let told =
            |told: &Range<usize>| told.end.min(within.end).saturating_sub(told.start.max(within.start));
        within.len() - self.ranges.iter().map(told).sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn gaps_from_the_end(told: &Told, within: &Range<usize>) -> Vec<usize> {
        let (mut gaps, mut end) = (Vec::new(), within.end);
        while let Some(gap) = told.last_gap(within.start..end) {
            assert!(gap.end <= end && !gap.is_empty());
            end = gap.start;
            gaps.extend(gap.rev());
        }
        gaps
    }

    proptest! {
        /// The reference: a set of positions.
        #[test]
        fn says_what_a_set_of_positions_says(
            adds in prop::collection::vec((0usize..60, 0usize..12), 0..TOLD_RANGES),
            from in 0usize..40, length in 0usize..50,
        ) {
            let (mut told, mut model) = (Told::default(), BTreeSet::new());
            for (start, length) in adds {
                told.add(start..start + length);
                model.extend(start..start + length);
                prop_assert!(told.ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
            }
            prop_assert!((0..80).all(|at| told.contains(at) == model.contains(&at)));
            let within = from..from + length;
            let missing: Vec<usize> = within.clone().rev().filter(|at| !model.contains(at)).collect();
            prop_assert_eq!(told.untold(&within), missing.len());
            prop_assert_eq!(gaps_from_the_end(&told, &within), missing);
        }

        #[test]
        fn follows_its_log(
            adds in prop::collection::vec((0usize..60, 0usize..12), 0..TOLD_RANGES),
            removed in prop::collection::btree_set(0usize..80, 0..80),
        ) {
            let mut told = Told::default();
            adds.into_iter().for_each(|(start, length)| told.add(start..start + length));
            let removed: Vec<usize> = removed.into_iter().collect();
            let before: Vec<bool> = (0..80).map(|at| told.contains(at)).collect();
            told.shift(&removed);
            let left = (0..80).filter(|at| !removed.contains(at));
            prop_assert!(left.enumerate().all(|(to, from)| told.contains(to) == before[from]));
            prop_assert!(told.ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
        }

        #[test]
        fn however_it_is_told_the_ranges_are_few_and_nothing_untold_is_passed_over(
            adds in prop::collection::vec((0usize..10_000, 1usize..5), 0..200),
        ) {
            let (mut told, mut model) = (Told::default(), BTreeSet::new());
            for (start, length) in adds {
                told.add(start..start + length);
                model.extend(start..start + length);
                prop_assert!(told.ranges.len() <= TOLD_RANGES);
            }
            let gaps: BTreeSet<usize> = gaps_from_the_end(&told, &(0..10_010)).into_iter().collect();
            prop_assert!((0..10_010).all(|at| model.contains(&at) || gaps.contains(&at)));
            // Telling what is left, from the end on, comes to its end.
            while let Some(gap) = told.last_gap(0..10_010) {
                told.add(gap);
            }
        }
    }
}
