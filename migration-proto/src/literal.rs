//! Literals: pages that cross the WAN as bytes, compressed in batches.
//!
//! ```text
//! batch  := count (varint, 1..=64) , count × frame (zigzag varint difference to the frame before, the first to 0) , body
//! body   := form (1 byte: 0 raw, 1 zstd) , count × 4096 bytes, raw or as one zstd frame
//!         | form (2) , deltas (varint, 1..=count) , length (varint) , zstd frame of that length , body of the pages left, if any are
//! ```
//! zstd: RFC 8878. A batch that does not shrink is sent raw.
//!
//! The first pages of a batch may be deltas: one zstd frame whose prefix (RFC 8878, section 5, a raw content dictionary) is what stands at
//! their frames at the destination, one page after the other. The place of a byte in its old version is then at the same distance
//! throughout, which zstd says in next to nothing. A delta says neither its base nor its page: the hash of what comes out tells.

use page::{Gfn, PAGE_SIZE, Page};

use crate::limits::{LITERAL_BATCH_PAGES, LITERAL_DELTA_LEVEL_MIN, LITERAL_ZSTD_LEVEL};
use crate::wire::{Reader, WireError, Writer};

const RAW: u8 = 0;
const ZSTD: u8 = 1;
const DELTAS: u8 = 2;

/// A page with the version before it.
#[derive(Clone, Copy, Debug)]
pub struct Delta<'a> {
    /// Where it belongs.
    pub gfn: Gfn,
    /// The page.
    pub page: &'a Page,
    /// What stands there at the destination.
    pub base: &'a Page,
}

/// A batch as it goes over the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// All of it.
    pub batch: Vec<u8>,
    /// Of that, bytes of pages sent as deltas.
    pub delta_bytes: u64,
}

/// What a batch holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Decoded {
    /// Pages sent as they are.
    pub plain: Vec<(Gfn, Box<Page>)>,
    /// Pages sent as deltas; `None` if the base gives none. Only the hash says whether it is the page that was meant.
    pub deltas: Vec<(Gfn, Option<Box<Page>>)>,
}

/// Encodes a batch without deltas at [`LITERAL_ZSTD_LEVEL`]. The driver calls this on its worker threads.
///
/// # Panics
/// If there is no page or more than [`LITERAL_BATCH_PAGES`].
#[must_use]
pub fn encode(pages: &[(Gfn, &Page)]) -> Vec<u8> {
    encode_with(LITERAL_ZSTD_LEVEL, &[], pages).batch
}

/// Encodes a batch of deltas and other pages. The driver calls this on its worker threads.
///
/// # Panics
/// If there is no page or more than [`LITERAL_BATCH_PAGES`].
#[must_use]
pub fn encode_with(level: i32, deltas: &[Delta<'_>], plain: &[(Gfn, &Page)]) -> Encoded {
    let count = deltas.len() + plain.len();
    assert!((1..=LITERAL_BATCH_PAGES).contains(&count), "a batch holds 1 to {LITERAL_BATCH_PAGES} pages");
    let mut out = Writer::default();
    let packed = pack_deltas(level, deltas);
    // A failure to compress costs bytes, never the page.
    let (deltas, late) = if packed.is_some() { (deltas, &[][..]) } else { (&[][..], deltas) };
    let plain: Vec<(Gfn, &Page)> =
        late.iter().map(|delta| (delta.gfn, delta.page)).chain(plain.iter().copied()).collect();
    out.varint(count as u64);
    let mut last = Gfn(0);
    for gfn in deltas.iter().map(|delta| delta.gfn).chain(plain.iter().map(|(gfn, _)| *gfn)) {
        out.frame(last, gfn);
        last = gfn;
    }
    let mut delta_bytes = 0;
    if let Some(packed) = packed {
        out.byte(DELTAS);
        out.varint(deltas.len() as u64);
        out.blob(&packed);
        delta_bytes = packed.len() as u64;
    }
    if !plain.is_empty() {
        write_plain(&mut out, level, &plain);
    }
    Encoded { batch: out.finish(), delta_bytes }
}

fn pack_deltas(level: i32, deltas: &[Delta<'_>]) -> Option<Vec<u8>> {
    if deltas.is_empty() {
        return None;
    }
    let bases: Vec<u8> = deltas.iter().flat_map(|delta| delta.base.iter().copied()).collect();
    let pages: Vec<u8> = deltas.iter().flat_map(|delta| delta.page.iter().copied()).collect();
    let mut compressor = zstd::bulk::Compressor::new(level.max(LITERAL_DELTA_LEVEL_MIN)).ok()?;
    compressor.context_mut().ref_prefix(&bases).ok()?;
    compressor.compress(&pages).ok().filter(|packed| packed.len() < pages.len())
}

fn write_plain(out: &mut Writer, level: i32, pages: &[(Gfn, &Page)]) {
    let raw: Vec<u8> = pages.iter().flat_map(|(_, page)| page.iter().copied()).collect();
    match zstd::bulk::compress(&raw, level) {
        Ok(packed) if packed.len() < raw.len() => {
            out.byte(ZSTD);
            out.bytes(&packed);
        }
        Ok(_) | Err(_) => {
            out.byte(RAW);
            out.bytes(&raw);
        }
    }
}

/// Decodes a batch without deltas. The driver calls this on its worker threads.
///
/// # Errors
/// If the batch is truncated, oversized, does not hold exactly its pages, or has deltas.
pub fn decode(batch: &[u8]) -> Result<Vec<(Gfn, Box<Page>)>, WireError> {
    let decoded = decode_with(batch, |_, _| {})?;
    if decoded.deltas.is_empty() {
        Ok(decoded.plain)
    } else {
        Err(WireError::OutOfRange { field: "literal form" })
    }
}

/// Decodes a batch. `base` reads what stands at a frame. The driver calls this on its worker threads.
///
/// # Errors
/// If the batch is truncated, oversized, or does not hold exactly its pages. Deltas that their bases do not fit are none.
pub fn decode_with(batch: &[u8], base: impl FnMut(Gfn, &mut Page)) -> Result<Decoded, WireError> {
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
    let mut form = input.byte("literal form")?;
    let mut deltas = Vec::new();
    if form == DELTAS {
        let number = input.count("literal deltas", count)?;
        if number == 0 {
            return Err(WireError::OutOfRange { field: "literal deltas" });
        }
        let packed = input.blob("literal delta frame", LITERAL_BATCH_PAGES * PAGE_SIZE)?;
        let plain = frames.split_off(number);
        deltas = unpack_deltas(packed, std::mem::replace(&mut frames, plain), base);
        if frames.is_empty() {
            input.end()?;
            return Ok(Decoded { plain: Vec::new(), deltas });
        }
        form = input.byte("literal form")?;
    }
    Ok(Decoded { plain: read_plain(form, input.rest(), frames)?, deltas })
}

fn read_plain(form: u8, body: &[u8], frames: Vec<Gfn>) -> Result<Vec<(Gfn, Box<Page>)>, WireError> {
    let unpacked;
    let raw = match form {
        RAW => body,
        ZSTD => {
            unpacked = zstd::bulk::decompress(body, frames.len() * PAGE_SIZE)
                .map_err(|_| WireError::OutOfRange { field: "literal zstd frame" })?;
            &unpacked
        }
        _ => return Err(WireError::OutOfRange { field: "literal form" }),
    };
    if raw.len() != frames.len() * PAGE_SIZE {
        return Err(WireError::OutOfRange { field: "literal length" });
    }
    Ok(frames.into_iter().zip(page::page_chunks(raw)).map(|(gfn, page)| (gfn, Box::new(*page))).collect())
}

fn unpack_deltas(
    packed: &[u8],
    frames: Vec<Gfn>,
    mut base: impl FnMut(Gfn, &mut Page),
) -> Vec<(Gfn, Option<Box<Page>>)> {
    let mut bases = vec![0; frames.len() * PAGE_SIZE];
    for (gfn, page) in frames.iter().zip(bases.as_chunks_mut::<PAGE_SIZE>().0) {
        base(*gfn, page);
    }
    let unpack = || {
        let mut context = zstd::zstd_safe::DCtx::try_create()?;
        context.ref_prefix(&bases).ok()?;
        let mut raw = Vec::with_capacity(bases.len());
        context.decompress(&mut raw, packed).ok()?;
        (raw.len() == bases.len()).then_some(raw)
    };
    match unpack() {
        Some(raw) => frames
            .into_iter()
            .zip(page::page_chunks(&raw))
            .map(|(gfn, page)| (gfn, Some(Box::new(*page))))
            .collect(),
        None => frames.into_iter().map(|gfn| (gfn, None)).collect(),
    }
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
        fn deltas_come_out_by_their_bases_and_others_by_themselves(deltas in 0usize..40, plain in 0usize..24, seed: u64, wrong: bool, level in 1i32..7) {
            prop_assume!(deltas + plain > 0);
            let noise = |n: u64| -> Page {
                let mut x = seed ^ n.wrapping_mul(0x9E37_79B9);
                std::array::from_fn(|_| { x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1); (x >> 56) as u8 })
            };
            let bases: Vec<Page> = (0..deltas as u64).map(noise).collect();
            let pages: Vec<Page> = bases.iter().map(|base| { let mut page = *base; page[100..120].fill(7); page }).collect();
            let other: Vec<Page> = (1000..1000 + plain as u64).map(noise).collect();
            let frame = |at: usize| Gfn(3 * at as u64);
            let pairs: Vec<Delta<'_>> = (0..deltas).map(|at| Delta { gfn: frame(at), page: &pages[at], base: &bases[at] }).collect();
            let rest: Vec<(Gfn, &Page)> = other.iter().enumerate().map(|(at, page)| (frame(500 + at), page)).collect();
            let Encoded { batch, delta_bytes } = encode_with(level, &pairs, &rest);
            prop_assert!(delta_bytes < 64 + 40 * deltas as u64, "{delta_bytes} for {deltas}");
            let decoded = decode_with(&batch, |gfn, page| {
                *page = bases[usize::try_from(gfn.0 / 3).unwrap()];
                page[200] ^= u8::from(wrong);
            }).unwrap();
            prop_assert_eq!(decoded.plain.iter().map(|(g, p)| (*g, **p)).collect::<Vec<_>>(), rest.iter().map(|(g, p)| (*g, **p)).collect::<Vec<_>>());
            prop_assert_eq!(decoded.deltas.len(), deltas);
            for (at, (gfn, page)) in decoded.deltas.iter().enumerate() {
                prop_assert_eq!(*gfn, frame(at));
                let right = page.as_ref().is_some_and(|page| **page == pages[at]);
                prop_assert_eq!(right, !wrong, "a wrong base gives another page, or none");
            }
            prop_assert_eq!(decode(&batch).is_ok(), deltas == 0);
        }

        #[test]
        fn damage_is_an_error_or_other_pages_and_never_a_panic(mut batch in prop::collection::vec(any::<u8>(), 0..9000), cut: usize) {
            decode_with(&batch, |_, base| base.fill(3)).ok();
            let page = [3; PAGE_SIZE];
            let good = encode(&[(Gfn(5), &page), (Gfn(6), &page)]);
            batch = good[..cut % good.len()].to_vec();
            prop_assert!(decode(&batch).is_err());
            let delta = encode_with(3, &[Delta { gfn: Gfn(5), page: &page, base: &[4; PAGE_SIZE] }], &[(Gfn(6), &page)]).batch;
            prop_assert!(decode_with(&delta[..cut % delta.len()], |_, base| base.fill(4)).is_err());
        }
    }
}
