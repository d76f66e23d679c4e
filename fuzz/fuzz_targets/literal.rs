//! A batch of literals: decodes to at most a batch's pages or is refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use migration_proto::limits::LITERAL_BATCH_PAGES;
use migration_proto::literal::{decode, encode};

fuzz_target!(|batch: &[u8]| {
    if let Ok(pages) = decode(batch) {
        assert!((1..=LITERAL_BATCH_PAGES).contains(&pages.len()));
        let borrowed: Vec<_> = pages.iter().map(|(gfn, page)| (*gfn, &**page)).collect();
        assert_eq!(decode(&encode(&borrowed)).expect("our own encoding"), pages);
    }
});
