//! QEMU's encoding of a page against its old version, from its description (QEMU, docs/devel/migration, XBZRLE): runs of
//! equal bytes, by length alone, in turn with runs of other bytes, by length and bytes. Lengths are unsigned LEB128.

use page::{PAGE_SIZE, Page};

/// What QEMU puts before an encoded page: 8 bytes of address and flags, 1 of the encoding, 2 of the length.
const HEADER_BYTES: usize = 8 + 1 + 2;
/// What it puts before a page as it is.
const PLAIN_HEADER_BYTES: usize = 8;

/// The bytes of `new` in QEMU's stream where `old` is in the caches of both ends.
#[must_use]
pub fn xbzrle(old: &Page, new: &Page) -> usize {
    let (mut at, mut bytes) = (0, 0);
    let run = |from: usize, equal: bool| {
        (from..PAGE_SIZE).find(|&at| (old[at] == new[at]) != equal).unwrap_or(PAGE_SIZE) - from
    };
    while at < PAGE_SIZE {
        let same = run(at, true);
        if at + same == PAGE_SIZE {
            break;
        }
        let other = run(at + same, false);
        bytes += leb128_bytes(same) + leb128_bytes(other) + other;
        at += same + other;
    }
    if bytes < PAGE_SIZE { HEADER_BYTES + bytes } else { PLAIN_HEADER_BYTES + PAGE_SIZE }
}

/// A run is shorter than 2^14.
fn leb128_bytes(length: usize) -> usize {
    if length < 128 { 1 } else { 2 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_costs_its_runs() {
        let old = [7; PAGE_SIZE];
        assert_eq!(xbzrle(&old, &old), HEADER_BYTES);
        let mut new = old;
        new[200] = 1;
        assert_eq!(xbzrle(&old, &new), HEADER_BYTES + 2 + 1 + 1);
        assert_eq!(xbzrle(&old, &[8; PAGE_SIZE]), PLAIN_HEADER_BYTES + PAGE_SIZE);
        let mut half = old;
        half[..2048].fill(9);
        assert_eq!(xbzrle(&old, &half), HEADER_BYTES + 1 + 2 + 2048);
    }
}
