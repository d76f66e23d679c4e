//! How often a page of a sample stands in all of memory: a migration names it once, and a sample alone cannot tell.

use std::collections::HashMap;
use std::io;

use migration_proto::Layout;
use page::{Gfn, PAGE_SIZE, Page, REGION_PAGES};

use super::limits;
use crate::memory::Memory;

/// A page's fingerprint: 64 bits are enough to count with, and take a tenth of the time of a name.
#[must_use]
pub(super) fn fingerprint(page: &[u8]) -> u64 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    // Four lanes, so that one multiplication does not wait for the one before.
    let mut lanes = [1, 2, 3, 4];
    for words in page.as_chunks::<32>().0 {
        for (lane, word) in lanes.iter_mut().zip(words.as_chunks::<8>().0) {
            *lane = (*lane ^ u64::from_le_bytes(*word)).wrapping_mul(ODD).rotate_left(29);
        }
    }
    lanes.into_iter().fold(0, |all: u64, lane| (all ^ lane).wrapping_mul(ODD).rotate_left(31))
}

/// For each of these frames, how many frames of `layout` hold what it holds, itself included; thousandths, for of a large memory only as many regions are
/// looked at as have [`limits::PROBE_SCAN_PAGES`].
///
/// # Errors
/// If memory cannot be read.
pub(super) fn count(memory: &Memory, layout: &Layout, frames: &[Gfn]) -> io::Result<Vec<u64>> {
    let mut page: Page = [0; PAGE_SIZE];
    let prints: Vec<u64> = frames
        .iter()
        .map(|gfn| {
            memory.read_page(*gfn, &mut page);
            fingerprint(&page)
        })
        .collect();
    let sampled: HashMap<u64, usize> = prints.iter().enumerate().map(|(at, print)| (*print, at)).collect();
    let regions: Vec<_> = layout.regions().collect();
    let step = regions.len().div_ceil(limits::PROBE_SCAN_PAGES / REGION_PAGES);
    let mut found = vec![0u64; frames.len()];
    let mut bytes = vec![0; REGION_PAGES * PAGE_SIZE];
    for region in regions.iter().step_by(step.max(1)) {
        memory.peek_pages(region.first(), &mut bytes)?;
        for page in bytes.as_chunks::<PAGE_SIZE>().0 {
            if let Some(at) = sampled.get(&fingerprint(page)) {
                found[*at] += 1;
            }
        }
    }
    let looked_at = regions.iter().step_by(step.max(1)).len() as u64;
    let count = |print: &u64| found[sampled[print]] * 1000 * regions.len() as u64 / looked_at.max(1);
    Ok(prints.iter().map(|print| count(print).max(1000)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::layout as extents;

    #[test]
    fn equal_pages_are_counted_and_the_rest_stands_alone() {
        let memory = Memory::new(&extents(8 << 20).unwrap()).unwrap();
        let layout = crate::migrate::layout_of(memory.extents()).unwrap();
        for gfn in [3, 700, 701, 2047] {
            memory.write_page(Gfn(gfn), &[7; PAGE_SIZE]);
        }
        let mut other = [7; PAGE_SIZE];
        other[4095] = 8;
        memory.write_page(Gfn(9), &other);
        let counts = count(&memory, &layout, &[Gfn(3), Gfn(9), Gfn(701)]).unwrap();
        assert_eq!(counts, [4000, 1000, 4000]);
    }
}
