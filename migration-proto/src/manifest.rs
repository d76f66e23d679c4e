//! The manifest: what stands at which frame, region by region.
//!
//! ```text
//! entries := run* , run kind 0
//! run     := kind (1 byte) , length in pages (varint, 1..=512) , body
//!   1 skip       not in this record: the page stays as it was
//!   2 zero       all-zero pages
//!   3 name       length × 8 bytes: short ids, big-endian
//!   4 duplicate  length × frame of an already named page with the same content, zigzag varint difference
//!                to the duplicate's own frame
//! ```
//! The usual page costs 8 bytes, a zero page or one that did not change next to nothing.

use page::{Gfn, REGION_PAGES, RegionId, ShortId};

use crate::limits;
use crate::wire::{Reader, WireError, Writer};

/// A run of RAM in whole regions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// The first region.
    pub first: RegionId,
    /// How many.
    pub regions: u64,
}

/// Where a VM has RAM: ascending extents that do not touch or overlap wrongly.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Layout {
    extents: Vec<Extent>,
}

impl Layout {
    /// A layout, or `None` if the extents are none, too many, empty, not ascending, or beyond the bound of [`limits::REGIONS`].
    #[must_use]
    pub fn new(extents: Vec<Extent>) -> Option<Self> {
        let mut end = 0;
        for extent in &extents {
            if extent.first.0 < end || extent.regions == 0 {
                return None;
            }
            end = extent.first.0.checked_add(extent.regions).filter(|end| *end <= limits::REGIONS)?;
        }
        (1..=limits::EXTENTS).contains(&extents.len()).then_some(Self { extents })
    }

    /// The extents.
    #[must_use]
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// The regions, ascending.
    pub fn regions(&self) -> impl Iterator<Item = RegionId> + '_ {
        self.extents.iter().flat_map(|e| (e.first.0..e.first.0 + e.regions).map(RegionId))
    }

    /// Whether `region` is RAM.
    #[must_use]
    pub fn has(&self, region: RegionId) -> bool {
        self.extents.iter().any(|e| (e.first.0..e.first.0 + e.regions).contains(&region.0))
    }

    /// One more than the highest region.
    #[must_use]
    pub fn region_bound(&self) -> u64 {
        self.extents.last().map_or(0, |e| e.first.0 + e.regions)
    }

    /// One more than the highest frame.
    #[must_use]
    pub fn page_bound(&self) -> u64 {
        self.region_bound() * REGION_PAGES as u64
    }

    /// Pages of RAM.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.extents.iter().map(|e| e.regions * REGION_PAGES as u64).sum()
    }
}

/// What stands at a frame, by a name of the kind `N`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Entry<N = ShortId> {
    /// The zero page.
    Zero,
    /// The page with this name.
    Name(N),
    /// What stands at this other frame.
    Duplicate(Gfn),
}

/// A name as an entry has it on the wire.
pub(crate) trait EntryName: Copy {
    fn write(self, out: &mut Writer);
    fn read(input: &mut Reader<'_>) -> Result<Self, WireError>;
}

impl EntryName for ShortId {
    fn write(self, out: &mut Writer) {
        out.bytes(&self.0.to_be_bytes());
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, WireError> {
        Ok(Self(u64::from_be_bytes(input.array("short id")?)))
    }
}

const END: u8 = 0;
const SKIP: u8 = 1;
const ZERO: u8 = 2;
const NAME: u8 = 3;
const DUPLICATE: u8 = 4;

impl<N> Entry<N> {
    fn kind(&self) -> u8 {
        match self {
            Self::Zero => ZERO,
            Self::Name(_) => NAME,
            Self::Duplicate(_) => DUPLICATE,
        }
    }
}

/// Writes the entries of `region`, which must lie in it, ascending.
pub(crate) fn write_entries<N: EntryName>(out: &mut Writer, region: RegionId, entries: &[(Gfn, Entry<N>)]) {
    let mut next = region.first();
    let consecutive =
        |(a, x): &(Gfn, Entry<N>), (b, y): &(Gfn, Entry<N>)| a.0 + 1 == b.0 && x.kind() == y.kind();
    for run in entries.chunk_by(consecutive) {
        let Some((first, entry)) = run.first() else { continue };
        if first.0 > next.0 {
            out.byte(SKIP);
            out.varint(first.0 - next.0);
        }
        out.byte(entry.kind());
        out.varint(run.len() as u64);
        for (gfn, entry) in run {
            match entry {
                Entry::Zero => {}
                Entry::Name(name) => name.write(out),
                Entry::Duplicate(of) => out.frame(*gfn, *of),
            }
        }
        next = Gfn(first.0 + run.len() as u64);
    }
    out.byte(END);
}

/// Reads the entries of `region`.
pub(crate) fn read_entries<N: EntryName>(
    input: &mut Reader<'_>,
    region: RegionId,
) -> Result<Vec<(Gfn, Entry<N>)>, WireError> {
    let (mut next, end) = (region.first().0, region.first().0 + REGION_PAGES as u64);
    let mut entries = Vec::new();
    loop {
        let kind = input.byte("run kind")?;
        if kind == END {
            return Ok(entries);
        }
        let length = input.varint("run length")?;
        if length == 0 || length > end - next {
            return Err(WireError::OutOfRange { field: "run length" });
        }
        for gfn in (next..next + length).map(Gfn) {
            let entry = match kind {
                SKIP => break,
                ZERO => Entry::Zero,
                NAME => Entry::Name(N::read(input)?),
                DUPLICATE => Entry::Duplicate(input.frame("duplicate's frame", gfn)?),
                _ => return Err(WireError::OutOfRange { field: "run kind" }),
            };
            entries.push((gfn, entry));
        }
        next += length;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry() -> impl Strategy<Value = Option<Entry>> {
        prop_oneof![
            Just(None),
            Just(Some(Entry::Zero)),
            any::<u64>().prop_map(|id| Some(Entry::Name(ShortId(id)))),
            (0u64..1 << 30).prop_map(|gfn| Some(Entry::Duplicate(Gfn(gfn)))),
        ]
    }

    proptest! {
        #[test]
        fn entries_come_back(region in 0u64..1000, column in prop::collection::vec(entry(), REGION_PAGES)) {
            let region = RegionId(region);
            let entries: Vec<_> = column.into_iter().zip(region.first().0..).filter_map(|(e, gfn)| Some((Gfn(gfn), e?))).collect();
            let mut out = Writer::default();
            write_entries(&mut out, region, &entries);
            let bytes = out.finish();
            let mut input = Reader::new(&bytes);
            prop_assert_eq!(read_entries(&mut input, region).unwrap(), entries);
            prop_assert_eq!(input.end(), Ok(()));
        }

        #[test]
        fn damage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            read_entries::<ShortId>(&mut Reader::new(&bytes), RegionId(3)).ok();
        }
    }

    #[test]
    fn a_region_of_zero_pages_takes_a_handful_of_bytes() {
        let entries: Vec<_> =
            (0..REGION_PAGES as u64).map(|gfn| (Gfn(gfn), Entry::<ShortId>::Zero)).collect();
        let mut out = Writer::default();
        write_entries(&mut out, RegionId(0), &entries);
        assert_eq!(out.finish().len(), 4);
    }

    #[test]
    fn layouts_that_overlap_or_exceed_are_none() {
        let extent = |first, regions| Extent { first: RegionId(first), regions };
        assert!(Layout::new(vec![]).is_none());
        assert!(Layout::new(vec![extent(0, 0)]).is_none());
        assert!(Layout::new(vec![extent(0, 4), extent(3, 1)]).is_none());
        assert!(Layout::new(vec![extent(1, u64::MAX)]).is_none());
        let two = Layout::new(vec![extent(0, 2), extent(4, 1)]).unwrap();
        assert_eq!(two.regions().map(|r| r.0).collect::<Vec<_>>(), [0, 1, 4]);
        assert_eq!((two.pages(), two.region_bound()), (3 * 512, 5));
        assert!(two.has(RegionId(4)) && !two.has(RegionId(2)));
    }
}
