//! Which regions of a memory the next rescan looks at. A region that is rewritten all the time is not worth a look each time: what
//! it has is gone before anybody asks for it. Pure.

use crate::limits::REVISIT_LATEST;

/// One entry a region, in the order of the scan.
#[derive(Debug, Default)]
pub(crate) struct Revisits {
    regions: Vec<Region>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Region {
    /// Scans that still pass it over.
    passes: u8,
    /// Looks in a row that found it rewritten.
    rewritten: u8,
}

impl Revisits {
    /// Whether a scan looks at a region, or passes it over this time.
    pub(crate) fn due(&mut self, region: usize) -> bool {
        let Some(region) = self.regions.get_mut(region).filter(|region| region.passes > 0) else {
            return true;
        };
        region.passes -= 1;
        false
    }

    /// A look found that so many of the region's pages had changed. After the second in a row that found a quarter or more, the region is
    /// passed over once, then twice, four times and so on, up to [`REVISIT_LATEST`] times.
    pub(crate) fn looked(&mut self, region: usize, changed: u32, pages: u32) {
        if self.regions.len() <= region {
            self.regions.resize_with(region + 1, Region::default);
        }
        let region = &mut self.regions[region];
        if changed == 0 || changed < pages / 4 {
            *region = Region::default();
            return;
        }
        region.passes = match region.rewritten {
            0 => 0,
            times => (1u8 << (times - 1).min(7)).min(REVISIT_LATEST),
        };
        region.rewritten = region.rewritten.saturating_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which of `scans` looked at a region in which `changed` of 512 pages are new each time.
    fn looks(revisits: &mut Revisits, changed: u32, scans: usize) -> Vec<usize> {
        let look = |scan: usize| {
            let due = revisits.due(3);
            if due {
                revisits.looked(3, changed, 512);
            }
            due.then_some(scan)
        };
        (0..scans).filter_map(look).collect()
    }

    #[test]
    fn what_is_always_rewritten_is_looked_at_less_often_until_it_rests() {
        let mut revisits = Revisits::default();
        assert_eq!(looks(&mut revisits, 200, 40), [0, 1, 3, 6, 11, 20, 29, 38]);
        // It passes what is left of its passes, and from the first quiet look on is looked at each time.
        assert_eq!(looks(&mut revisits, 10, 12), [7, 8, 9, 10, 11]);
        assert!(revisits.due(0) && revisits.due(1000), "a region that was never looked at");
    }

    #[test]
    fn a_little_change_each_time_is_worth_each_look() {
        assert_eq!(looks(&mut Revisits::default(), 127, 10).len(), 10);
        assert_eq!(looks(&mut Revisits::default(), 0, 10).len(), 10);
    }
}
