//! The front of a retained checkpoint's file, behind a digest that is made to fit: is read or is refused.
#![no_main]

use dht::checkpoint::{DIGEST_AT, read_table};
use libfuzzer_sys::fuzz_target;
use page::PAGE_SIZE;
use sha2::{Digest, Sha256};

fuzz_target!(|front: &[u8]| {
    let (start, table) = front.split_at(front.len().min(DIGEST_AT));
    let mut first = [0; PAGE_SIZE];
    first[..start.len()].copy_from_slice(start);
    let digest = Sha256::new().chain_update(&first[..DIGEST_AT]).chain_update(table).finalize();
    first[DIGEST_AT..].copy_from_slice(&digest);
    // Either is right; what is looked for is a panic or memory without bound.
    let _ = read_table(&first, table);
});
