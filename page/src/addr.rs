//! Pages and where they stand.

use std::fmt;

/// Bytes in a page, and in a guest frame. x86-64's smallest page; larger host pages are not visible here.
pub const PAGE_SIZE: usize = 4096;

/// Pages in a region (2 MiB): the unit of the manifest.
pub const REGION_PAGES: usize = 512;

/// The bytes of one page.
pub type Page = [u8; PAGE_SIZE];

/// A guest frame number: guest-physical address divided by [`PAGE_SIZE`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Gfn(pub u64);

impl Gfn {
    /// The region that holds this frame.
    #[must_use]
    pub fn region(self) -> RegionId {
        RegionId(self.0 / REGION_PAGES as u64)
    }

    /// The place of this frame within its region, below [`REGION_PAGES`].
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "below 512")]
    pub fn index_in_region(self) -> usize {
        (self.0 % REGION_PAGES as u64) as usize
    }
}

impl fmt::Debug for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gfn {:#x}", self.0)
    }
}

impl fmt::Display for Gfn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// The number of a region: its first frame divided by [`REGION_PAGES`].
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct RegionId(pub u64);

impl RegionId {
    /// The first frame of the region.
    #[must_use]
    pub fn first(self) -> Gfn {
        Gfn(self.0 * REGION_PAGES as u64)
    }
}

/// Whether every byte of the page is zero.
#[must_use]
pub fn is_zero(page: &Page) -> bool {
    // A dirty page usually differs early: look at a cache line before the whole page.
    let (head, rest) = page.split_at(64);
    head.iter().fold(0, |acc, b| acc | b) == 0
        && rest.chunks_exact(256).all(|c| c.iter().fold(0, |acc, b| acc | b) == 0)
        && rest.chunks_exact(256).remainder().iter().all(|b| *b == 0)
}

/// The whole pages of `bytes`, in order; a shorter tail is left out.
pub fn page_chunks(bytes: &[u8]) -> impl Iterator<Item = &Page> {
    bytes.as_chunks::<PAGE_SIZE>().0.iter()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_set_bit_anywhere_is_not_zero() {
        let mut page = [0u8; PAGE_SIZE];
        assert!(is_zero(&page));
        for at in 0..PAGE_SIZE {
            page[at] = 1;
            assert!(!is_zero(&page), "byte {at}");
            page[at] = 0;
        }
    }

    #[test]
    fn frames_fall_into_regions_of_two_mebibytes() {
        assert_eq!(Gfn(511).region(), RegionId(0));
        assert_eq!(Gfn(512).region(), RegionId(1));
        assert_eq!(Gfn(513).index_in_region(), 1);
        assert_eq!(RegionId(1).first(), Gfn(512));
    }
}
