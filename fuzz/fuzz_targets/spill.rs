//! A spill file, behind a digest that is made to fit: is read or is refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sha2::{Digest, Sha256};
use vmm::spill::parse;

fuzz_target!(|file: &[u8]| {
    let whole = [file, &Sha256::digest(file)].concat();
    if let Ok(contents) = parse(whole.as_slice()) {
        let ram = contents.head.layout.pages();
        assert!(contents.pages.len() as u64 <= ram && contents.pages.keys().all(|gfn| contents.head.layout.has(gfn.region())));
    }
});
