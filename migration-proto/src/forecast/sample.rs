//! Which pages a dry run looks at: short runs, one from each of as many equal parts of RAM.

use page::{Gfn, REGION_PAGES};

use super::sample_size;
use crate::limits::PROBE_RUN_PAGES;
use crate::manifest::Layout;

/// Runs of frames of `layout`, ascending; `seed` decides where in its part of RAM each lies.
#[must_use]
pub fn frames(layout: &Layout, seed: u64) -> Vec<Vec<Gfn>> {
    let pages = layout.pages();
    let runs = sample_size(pages) / PROBE_RUN_PAGES;
    let part = pages / runs;
    let mut random = seed;
    (0..runs)
        .map(|run| {
            // SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
            random = random.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = random;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            let first = run * part + (z ^ (z >> 31)) % (part - PROBE_RUN_PAGES + 1);
            (first..first + PROBE_RUN_PAGES).filter_map(|page| frame(layout, page)).collect()
        })
        .collect()
}

/// The frame of the page with this number, counted over all extents.
fn frame(layout: &Layout, mut page: u64) -> Option<Gfn> {
    layout.extents().iter().find_map(|extent| {
        let pages = extent.regions * REGION_PAGES as u64;
        if page < pages {
            return Some(Gfn(extent.first.first().0 + page));
        }
        page -= pages;
        None
    })
}

#[cfg(test)]
mod tests {
    use page::RegionId;
    use proptest::prelude::*;

    use super::*;
    use crate::limits::{PROBE_IDS, PROBE_IDS_MIN};
    use crate::manifest::Extent;

    proptest! {
        #[test]
        fn runs_ascend_within_ram_and_are_as_many_as_may_be(
            first in 0u64..10, regions in 1u64..40_000, gap in 0u64..1000, more in 1u64..1000, seed: u64,
        ) {
            let extents = vec![
                Extent { first: RegionId(first), regions },
                Extent { first: RegionId(first + regions + gap), regions: more },
            ];
            let layout = Layout::new(extents).unwrap();
            let runs = frames(&layout, seed);
            let all: Vec<Gfn> = runs.iter().flatten().copied().collect();
            prop_assert!(all.is_sorted_by(|a, b| a < b));
            prop_assert!(all.iter().all(|gfn| layout.has(gfn.region())));
            prop_assert!(runs.iter().all(|run| run.len() as u64 == PROBE_RUN_PAGES));
            prop_assert!(all.len() <= PROBE_IDS);
            prop_assert!(all.len() as u64 >= PROBE_IDS_MIN.min(layout.pages()) - PROBE_RUN_PAGES);
        }
    }
}
