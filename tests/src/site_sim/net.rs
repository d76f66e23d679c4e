//! The simulated LAN: how long messages take, and how many bytes they are on the wire.
//!
//! Sizes follow `dht::wire` and docs/wire.md; a test holds the formulas against the encoders. On top of a message come the stream's opening
//! and protocol negotiation, and the headers of yamux, TLS, TCP and IP.

/// One way through the LAN: 50 to 150 us.
pub(super) const LATENCY_US: (u64, u64) = (50, 150);
/// Bytes a microsecond of a host's interface: 10 Gbit/s.
const BYTES_PER_US: u64 = 1250;
/// Names that an owner looks up a microsecond on one core: `index-rate` measures some millions a second.
const NAMES_PER_US: u64 = 2;
/// A page read and hashed, us.
const PAGE_US: u64 = 4;
/// What a slow peer's answers take longer.
pub(super) const SLOW_FACTOR: u64 = 10;
/// Round trips of a connection made on demand: TCP, TLS 1.3, the proof of the site key, yamux.
pub(super) const HANDSHAKE_TRIPS: u64 = 4;
/// Bytes of making it, both ways: two certificates, proofs, identify.
pub(super) const HANDSHAKE_BYTES: u64 = 5000;
/// A stream's opening and negotiation and the smallest packets' headers, both ways.
const STREAM_BYTES: u64 = 500;
/// Bytes of one peer in an answer of the index: its id and its length.
const PEER_BYTES: u64 = 38 + 4;

/// Headers of TCP, IP, TLS and yamux on full packets: 5%.
fn framed(body: u64) -> u64 {
    body + body / 20
}

/// An announcement of `names` in all, sent in as many messages as the protocol takes, with its acknowledgements.
pub(super) fn announcement(names: u64, per_message: u64) -> (u64, u64) {
    let messages = names.div_ceil(per_message);
    (messages, messages * (STREAM_BYTES + 9 + 5) + framed(names * 8))
}

/// A lookup request.
pub(super) fn lookup(ids: usize) -> u64 {
    STREAM_BYTES / 2 + framed(9 + 8 * ids as u64)
}

/// The answer to a lookup.
pub(super) fn holders(sampled: usize, peers: usize, claims: usize) -> u64 {
    STREAM_BYTES / 2 + framed(17 + 2 * sampled as u64 + PEER_BYTES * peers as u64 + 6 * claims as u64)
}

/// A request for pages.
pub(super) fn fetch(ids: usize) -> u64 {
    STREAM_BYTES / 2 + framed(8 + 8 * ids as u64)
}

/// Its answer.
pub(super) fn pages(count: usize) -> u64 {
    STREAM_BYTES / 2 + framed(8 + (8 + 4096) * count as u64)
}

/// How long an owner works at a lookup.
pub(super) fn lookup_work_us(ids: usize) -> u64 {
    ids as u64 / NAMES_PER_US
}

/// How long a holder works at pages.
pub(super) fn page_work_us(count: usize) -> u64 {
    count as u64 * PAGE_US
}

/// One direction of a host's interface: messages leave one after the other.
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct Pipe {
    free_us: u64,
}

impl Pipe {
    /// When `bytes` that are ready at `now_us` have passed.
    pub(super) fn pass(&mut self, now_us: u64, bytes: u64) -> u64 {
        self.free_us = self.free_us.max(now_us) + bytes / BYTES_PER_US;
        self.free_us
    }
}

/// Messages and bytes of one iterative Kademlia query (`get_closest_peers`) in a site of `peers`: the K closest answer, and before them three
/// at a time those on the way, a bit of the distance a hop at worst.
pub(super) fn kademlia_query(peers: usize) -> (u64, u64) {
    const K: u64 = 20;
    const PARALLEL: u64 = 3;
    let way = u64::from((peers as u64 / K).max(1).ilog2());
    let messages = K.min(peers as u64) + PARALLEL * way;
    // An answer names K peers by id and address.
    (messages, messages * (STREAM_BYTES + framed(40 + K * 62)))
}

#[cfg(test)]
mod tests {
    use dht::wire::{IndexRequest, Message as _, PagesRequest};
    use page::ShortId;

    use super::*;

    #[test]
    fn sizes_are_those_of_the_encoders() {
        let ids: Vec<_> = (0..100).map(ShortId).collect();
        let size = |encode: &dyn Fn(&mut Vec<u8>)| {
            let mut body = vec![0; 4];
            encode(&mut body);
            body.len() as u64
        };
        let request = IndexRequest::Lookup { ids: ids.clone() };
        assert_eq!(lookup(100), STREAM_BYTES / 2 + framed(size(&|out| request.encode(out))));
        let request = PagesRequest { ids };
        assert_eq!(fetch(100), STREAM_BYTES / 2 + framed(size(&|out| request.encode(out))));
    }

    #[test]
    fn a_query_grows_with_the_logarithm() {
        let messages = |peers| kademlia_query(peers).0;
        assert_eq!(messages(10_000) - messages(5_000), 3);
    }
}
