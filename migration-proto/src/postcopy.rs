//! What post-copy adds to the manifest: frames whose bytes come after the VM runs, and their full names.
//!
//! ```text
//! absent  := form (1 byte) , body: the absent frames of one region, at least one
//!   0 bitmap     64 bytes; bit i of byte b is the region's frame 8 b + i
//!   1 runs       count (varint, 1..=256), each: frames to skip (varint), frames that are absent (varint, at least 1)
//! names   := run* , run kind 0: as in a manifest, but for
//!   3 name       length × 32 bytes: full names
//!   4 duplicate  of a frame of an earlier record of this connection, or of this one
//! ```
//! In post-copy pages are installed one by one under a VM that runs, so no root vouches for them: each has to have its full name. A
//! duplicate stands for the other frame's name, never for its bytes, which the VM may have overwritten.

use page::{Gfn, PageHash, REGION_PAGES, RegionId};

use crate::manifest::{Entry, EntryName};
use crate::wire::{Reader, WireError, Writer};

/// How the VM is to move.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Mode {
    /// Memory moves before the VM does: the VM is stopped for whatever is left when more rounds do not help.
    Precopy,
    /// As `Precopy`; when what is left does not come to fit the downtime, the VM moves first and the rest follows it.
    #[default]
    Hybrid,
    /// The VM moves after the first round, and what it wrote since follows it.
    Postcopy,
}

/// Stands for the name of each absent frame in a region's root at the switchover. No page is known whose name this is, and none can be found: that
/// would be a preimage of SHA-256.
pub const ABSENT_NAME: PageHash = PageHash([0xab; 32]);

/// What belongs at an absent frame: the zero page, the page with this full name, or the page that was named for this other absent frame.
pub type FullName = Entry<PageHash>;

impl EntryName for PageHash {
    fn write(self, out: &mut Writer) {
        out.bytes(&self.0);
    }

    fn read(input: &mut Reader<'_>) -> Result<Self, WireError> {
        input.name("full name")
    }
}

const BITMAP: u8 = 0;
const RUNS: u8 = 1;
const BITMAP_BYTES: usize = REGION_PAGES / 8;
/// Every other frame.
const MOST_RUNS: usize = REGION_PAGES / 2;

/// Writes the absent frames of `region`, which lie in it, ascending: as runs or as a bitmap, whichever is shorter.
pub(crate) fn write_absent(out: &mut Writer, region: RegionId, frames: &[Gfn]) {
    let mut runs = Writer::default();
    let mut count = 0;
    let mut next = region.first().0;
    for run in frames.chunk_by(|a, b| a.0 + 1 == b.0) {
        let Some(first) = run.first() else { continue };
        runs.varint(first.0 - next);
        runs.varint(run.len() as u64);
        next = first.0 + run.len() as u64;
        count += 1;
    }
    let runs = runs.finish();
    if runs.len() < BITMAP_BYTES {
        out.byte(RUNS);
        out.varint(count);
        out.bytes(&runs);
        return;
    }
    let mut bitmap = [0u8; BITMAP_BYTES];
    for gfn in frames {
        let at = gfn.index_in_region();
        if let Some(byte) = bitmap.get_mut(at / 8) {
            *byte |= 1 << (at % 8);
        }
    }
    out.byte(BITMAP);
    out.bytes(&bitmap);
}

/// Reads the absent frames of `region`.
pub(crate) fn read_absent(input: &mut Reader<'_>, region: RegionId) -> Result<Vec<Gfn>, WireError> {
    let first = region.first().0;
    let mut frames = Vec::new();
    match input.byte("form of absent frames")? {
        BITMAP => {
            let bitmap: [u8; BITMAP_BYTES] = input.array("absent frames")?;
            for (byte, at) in bitmap.into_iter().zip((first..).step_by(8)) {
                frames.extend((0..8).filter(|bit| byte >> bit & 1 == 1).map(|bit| Gfn(at + bit)));
            }
        }
        RUNS => {
            let end = first + REGION_PAGES as u64;
            let mut next = first;
            for _ in 0..input.count("runs of absent frames", MOST_RUNS)? {
                let (skip, length) = (input.varint("absent frames")?, input.varint("absent frames")?);
                let fits = length > 0 && skip <= end - next && length <= end - next - skip;
                if !fits {
                    return Err(WireError::OutOfRange { field: "absent frames" });
                }
                frames.extend((next + skip..next + skip + length).map(Gfn));
                next += skip + length;
            }
        }
        _ => return Err(WireError::OutOfRange { field: "form of absent frames" }),
    }
    if frames.is_empty() {
        return Err(WireError::OutOfRange { field: "absent frames" });
    }
    Ok(frames)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::manifest::{read_entries, write_entries};

    fn entry() -> impl Strategy<Value = Option<FullName>> {
        prop_oneof![
            Just(None),
            Just(Some(FullName::Zero)),
            any::<[u8; 32]>().prop_map(|name| Some(FullName::Name(PageHash(name)))),
            (0u64..1 << 30).prop_map(|gfn| Some(FullName::Duplicate(Gfn(gfn)))),
        ]
    }

    fn frames(region: RegionId, absent: &[bool]) -> Vec<Gfn> {
        let all = absent.iter().zip(region.first().0..);
        all.filter(|(absent, _)| **absent).map(|(_, gfn)| Gfn(gfn)).collect()
    }

    proptest! {
        #[test]
        fn names_come_back(region in 0u64..1000, column in prop::collection::vec(entry(), REGION_PAGES)) {
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
        fn absent_frames_come_back(region in 0u64..1000, share in 0.001f64..1.0, random in prop::collection::vec(0.0f64..1.0, REGION_PAGES)) {
            let region = RegionId(region);
            let mut absent: Vec<bool> = random.iter().map(|x| *x < share).collect();
            absent[17] = true;
            let frames = frames(region, &absent);
            let mut out = Writer::default();
            write_absent(&mut out, region, &frames);
            let bytes = out.finish();
            prop_assert!(bytes.len() <= BITMAP_BYTES + 3);
            let mut input = Reader::new(&bytes);
            prop_assert_eq!(read_absent(&mut input, region).unwrap(), frames);
            prop_assert_eq!(input.end(), Ok(()));
        }

        #[test]
        fn damage_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            read_entries::<PageHash>(&mut Reader::new(&bytes), RegionId(3)).ok();
            read_absent(&mut Reader::new(&bytes), RegionId(3)).ok();
        }
    }

    #[test]
    fn a_few_absent_frames_take_a_few_bytes_and_none_is_an_error() {
        let mut out = Writer::default();
        write_absent(&mut out, RegionId(1), &[Gfn(512), Gfn(513), Gfn(1023)]);
        assert_eq!(out.finish(), [RUNS, 2, 0, 2, 0xfd, 3, 1]);
        let nobody = WireError::OutOfRange { field: "absent frames" };
        assert_eq!(read_absent(&mut Reader::new(&[RUNS, 0]), RegionId(1)), Err(nobody));
        assert_eq!(read_absent(&mut Reader::new(&[0; 65]), RegionId(1)), Err(nobody));
        assert_eq!(read_absent(&mut Reader::new(&[RUNS, 1, 0, 0]), RegionId(1)), Err(nobody));
    }
}
