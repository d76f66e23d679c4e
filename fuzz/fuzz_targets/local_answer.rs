//! An answer on the local socket of `dht`: decodes or is refused, and what was decoded survives a round trip.
#![no_main]

use dht::local::protocol::{Answer, take_frame};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Ok(Some((frame, used))) = take_frame(bytes) else { return };
    assert!(used <= bytes.len());
    if let Ok(answer) = Answer::decode(frame) {
        let mut again = Vec::new();
        answer.encode(&mut again);
        assert_eq!(again, bytes[..used]);
    }
});
