//! Literals: pages that cross the WAN as bytes, compressed in batches.
//!
//! ```text
//! batch := count (varint, 1..=64) , count × frame (zigzag varint difference to the frame before, the first to 0)
//!          , form (1 byte: 0 raw, 1 zstd) , count × 4096 bytes, raw or as one zstd frame
//! ```
//! zstd: RFC 8878. A batch that does not shrink is sent raw.

use page::{Gfn, PAGE_SIZE, Page};

use crate::limits::{LITERAL_BATCH_PAGES, LITERAL_ZSTD_LEVEL};
use crate::wire::{Reader, WireError, Writer};

const RAW: u8 = 0;
const ZSTD: u8 = 1;

/// Encodes a batch. The driver calls this on its worker threads.
///
/// # Panics
/// If there is no page or more than [`LITERAL_BATCH_PAGES`].
#[must_use]
pub fn encode(pages: &[(Gfn, &Page)]) -> Vec<u8> {
    assert!(
        (1..=LITERAL_BATCH_PAGES).contains(&pages.len()),
        "a batch holds 1 to {LITERAL_BATCH_PAGES} pages"
    );
    let mut out = Writer::default();
    out.varint(pages.len() as u64);
    let mut last = Gfn(0);
    for (gfn, _) in pages {
        out.frame(last, *gfn);
        last = *gfn;
    }
    let raw: Vec<u8> = pages.iter().flat_map(|(_, page)| page.iter().copied()).collect();
    match zstd::bulk::compress(&raw, LITERAL_ZSTD_LEVEL) {
        Ok(packed) if packed.len() < raw.len() => {
            out.byte(ZSTD);
            out.bytes(&packed);
        }
        // A failure to compress costs bytes, never the page.
        Ok(_) | Err(_) => {
            out.byte(RAW);
            out.bytes(&raw);
        }
    }
    out.finish()
}

/// Decodes a batch. The driver calls this on its worker threads.
///
/// # Errors
/// If the batch is truncated, oversized, or does not hold exactly its pages.
pub fn decode(batch: &[u8]) -> Result<Vec<(Gfn, Box<Page>)>, WireError> {
    let mut input = Reader::new(batch);
    let count = input.count("literal count", LITERAL_BATCH_PAGES)?;
    if count == 0 {
        return Err(WireError::OutOfRange { field: "literal count" });
    }
    let mut frames = Vec::with_capacity(count);
    let mut last = Gfn(0);
    for _ in 0..count {
        last = input.frame("literal frame", last)?;
        frames.push(last);
    }
    let form = input.byte("literal form")?;
    let body = input.rest();
    let unpacked;
    let raw = match form {
        RAW => body,
        ZSTD => {
            unpacked = zstd::bulk::decompress(body, count * PAGE_SIZE)
                .map_err(|_| WireError::OutOfRange { field: "literal zstd frame" })?;
            &unpacked
        }
        _ => return Err(WireError::OutOfRange { field: "literal form" }),
    };
    if raw.len() != count * PAGE_SIZE {
        return Err(WireError::OutOfRange { field: "literal length" });
    }
    Ok(frames.into_iter().zip(page::page_chunks(raw)).map(|(gfn, page)| (gfn, Box::new(*page))).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn what_goes_in_comes_out(frames in prop::collection::vec(0u64..1 << 40, 1..=LITERAL_BATCH_PAGES), seed: u64, random: bool) {
            let pages: Vec<(Gfn, Page)> = frames.iter().map(|f| {
                let mut x = seed ^ f;
                (Gfn(*f), std::array::from_fn(|_| {
                    x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    if random { (x >> 56) as u8 } else { 7 }
                }))
            }).collect();
            let borrowed: Vec<_> = pages.iter().map(|(g, p)| (*g, p)).collect();
            let batch = encode(&borrowed);
            prop_assert!(random || batch.len() < 2048);
            let back = decode(&batch).unwrap();
            prop_assert_eq!(back.iter().map(|(g, p)| (*g, **p)).collect::<Vec<_>>(), pages);
        }

        #[test]
        fn damage_is_an_error_or_other_pages_and_never_a_panic(mut batch in prop::collection::vec(any::<u8>(), 0..9000), cut: usize) {
            decode(&batch).ok();
            let page = [3; PAGE_SIZE];
            let good = encode(&[(Gfn(5), &page), (Gfn(6), &page)]);
            batch = good[..cut % good.len()].to_vec();
            prop_assert!(decode(&batch).is_err());
        }
    }
}
