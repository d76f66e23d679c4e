//! A batch of literals: decodes to at most a batch's pages or is refused. Deltas are against pages of one byte.
#![no_main]

use libfuzzer_sys::fuzz_target;
use migration_proto::limits::LITERAL_BATCH_PAGES;
use migration_proto::literal::{decode, decode_with, encode};

fuzz_target!(|batch: &[u8]| {
    if let Ok(decoded) = decode_with(batch, |_, base| base.fill(3)) {
        let count = decoded.plain.len() + decoded.deltas.len();
        assert!((1..=LITERAL_BATCH_PAGES).contains(&count));
        assert_eq!(decode(batch).is_ok(), decoded.deltas.is_empty());
        let deltas = decoded.deltas.iter().filter_map(|(gfn, page)| Some((*gfn, page.as_deref()?)));
        let borrowed: Vec<_> =
            decoded.plain.iter().map(|(gfn, page)| (*gfn, &**page)).chain(deltas).collect();
        if !borrowed.is_empty() {
            let pages: Vec<_> = borrowed.iter().map(|(gfn, page)| (*gfn, Box::new(**page))).collect();
            assert_eq!(decode(&encode(&borrowed)).expect("our own encoding"), pages);
        }
    }
});
