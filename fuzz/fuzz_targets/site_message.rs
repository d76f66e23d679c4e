//! The messages between the peers of a site, and the key that each shows: each decodes or is refused, and what was decoded survives a round trip.
#![no_main]

use dht::proof::EndKey;
use dht::wire::{IndexRequest, IndexResponse, Message, PageIds};
use libfuzzer_sys::fuzz_target;

fn check<M: Message + PartialEq>(body: &[u8]) {
    if let Ok(message) = M::decode(body) {
        let mut again = Vec::new();
        message.encode(&mut again);
        assert_eq!(M::decode(&again).as_ref(), Ok(&message));
    }
}

fuzz_target!(|body: &[u8]| {
    check::<IndexRequest>(body);
    check::<IndexResponse>(body);
    check::<PageIds>(body);
    if let Ok(key) = EndKey::from_spki(body) {
        assert_eq!(key.to_spki(), body);
    }
});
