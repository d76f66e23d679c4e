//! pagestorm's command line: what parses prints as a line that parses to the same.
#![no_main]

use guest_images::pagestorm::options::Options;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|line: &str| {
    if let Ok(options) = Options::parse(line) {
        assert_eq!(Options::parse(&options.to_string()).expect("our own line"), options);
    }
});
