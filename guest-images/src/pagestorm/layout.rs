//! Where the working set's pages and counters stand, and whether they may stand there.
//!
//! ```text
//! base                                                            base + ws
//! | counters: 16 bytes for the header, 16 for each slot | data page 0 | … | data page n-1 |
//! ```
//! Slot s counts the data page that comes s-th in a sweep ([`super::pace::Order`]), so that one page of counters
//! serves 256 writes in a row: writing 1000 pages dirties about 1004, not 2000.

use core::fmt;
use core::ops::Range;

use super::limits;
use super::options::Options;

/// Bytes of one counter.
pub const COUNTER_BYTES: usize = 16;
/// A page's bytes, as an address.
const PAGE: u64 = limits::PAGE_BYTES as u64;
/// Counters in a page.
pub const COUNTERS_PER_PAGE: u64 = PAGE / COUNTER_BYTES as u64;

/// The working set's layout.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// The working set.
    pub range: Range<u64>,
    /// Pages of counters at its start.
    pub counter_pages: u64,
    /// Pages that are written.
    pub data_pages: u64,
}

/// Why a working set cannot be where the command line puts it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum LayoutError {
    /// It reaches into pagestorm's own code, stack or tables.
    OverlapsImage {
        /// The working set.
        range: Range<u64>,
        /// The image.
        image: Range<u64>,
    },
    /// Its page at `missing` is not usable RAM in the memory map.
    NotRam {
        /// The working set.
        range: Range<u64>,
        /// First address that is not RAM.
        missing: u64,
    },
    /// It ends above what the page tables map.
    NotMapped {
        /// The working set.
        range: Range<u64>,
    },
}

impl fmt::Display for LayoutError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OverlapsImage { range, image } => write!(
                f,
                "the working set {:#x}..{:#x} overlaps the guest's image {:#x}..{:#x}: use base={:#x} or higher",
                range.start, range.end, image.start, image.end, image.end
            ),
            Self::NotRam { range, missing } => write!(
                f,
                "the working set {:#x}..{:#x} is not RAM at {missing:#x}: use a smaller ws=, another base=, or a \
                 machine with more memory",
                range.start, range.end
            ),
            Self::NotMapped { range } => write!(
                f,
                "the working set {:#x}..{:#x} ends above {:#x}, all that pagestorm maps: use a smaller ws= or base=",
                range.start,
                range.end,
                limits::MAPPED_BYTES
            ),
        }
    }
}

impl core::error::Error for LayoutError {}

impl Layout {
    /// The layout that `options` ask for; options from [`Options::parse`] always have one.
    /// # Panics
    /// If the options were made by hand with fewer than two pages of working set or with an end above 2^64.
    #[must_use]
    pub fn new(options: &Options) -> Self {
        let pages = options.ws_bytes / PAGE;
        assert!(pages >= 2, "a working set has at least two pages");
        // t pages hold 256 t counters, of which one is the header: 256 t >= (pages - t) + 1.
        let counter_pages = (pages + 1).div_ceil(COUNTERS_PER_PAGE + 1);
        let end = options.base.checked_add(pages * PAGE).expect("the working set ends below 2^64");
        Self { range: options.base..end, counter_pages, data_pages: pages - counter_pages }
    }

    /// Whether the working set is RAM and nobody else's. `ram` are the usable ranges of the memory map, in any order.
    /// # Errors
    /// Which part of it is not.
    pub fn check(
        &self,
        ram: &(impl Iterator<Item = Range<u64>> + Clone),
        image: &Range<u64>,
    ) -> Result<(), LayoutError> {
        let range = self.range.clone();
        if range.end > limits::MAPPED_BYTES {
            return Err(LayoutError::NotMapped { range });
        }
        if range.start < image.end && image.start < range.end {
            return Err(LayoutError::OverlapsImage { range, image: image.clone() });
        }
        // Ranges may abut, so one that covers the next byte is looked for until the end is reached. Each turn
        // moves `covered` past a whole range, so there are no more turns than ranges.
        let mut covered = range.start;
        while covered < range.end {
            let Some(next) = ram.clone().find(|part| part.contains(&covered)) else {
                return Err(LayoutError::NotRam { range, missing: covered });
            };
            covered = next.end;
        }
        Ok(())
    }

    /// Address of data page `index` (below [`Layout::data_pages`]).
    #[must_use]
    pub const fn page_gpa(&self, index: u64) -> u64 {
        self.range.start + (self.counter_pages + index) * PAGE
    }

    /// Address of counter `number`: 0 is the header, s + 1 is slot s.
    #[must_use]
    pub const fn counter_gpa(&self, number: u64) -> u64 {
        self.range.start + number * COUNTER_BYTES as u64
    }
}
