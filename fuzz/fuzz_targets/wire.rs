//! A message of the migration protocol: decodes or is refused, and what was decoded survives a round trip.
#![no_main]

use libfuzzer_sys::fuzz_target;
use migration_proto::wire::{decode, encode};

fuzz_target!(|frame: &[u8]| {
    if let Ok(message) = decode(frame) {
        assert_eq!(decode(&encode(&message)).as_ref(), Ok(&message));
    }
});
