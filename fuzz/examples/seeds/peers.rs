//! The messages between peers.

use dht::checkpoint::{DIGEST_AT, Header, front};
use dht::repair::ClaimDigest;
use dht::sample::Sampling;
use dht::shard::{MemberId, ShardId};
use dht::wire::{Claim, IndexRequest, IndexResponse, Message, PagesRequest, PagesResponse, PassedOn};
use page::{DomainId, PAGE_SIZE, ShortId};

use super::Target;

pub(super) fn all() -> Vec<Target> {
    let body = |message: &dyn Fn(&mut Vec<u8>)| {
        let mut out = Vec::new();
        message(&mut out);
        out
    };
    let ids = vec![ShortId(1), ShortId(2)];
    let (shard, member) = (ShardId(3), MemberId([4; 32]));
    let claim = Claim { at: 1, peer: 0, hearsay: true };
    let sampling = Sampling::new(2).expect("two bits are within the bound");
    let sampled = vec![(shard, sampling)];
    let digest = ClaimDigest { claims: 5, sum: 6 };
    let passed_on = PassedOn { id: ShortId(8), holder: 0, left_seconds: 300 };
    let seeds = vec![
        body(&|out| IndexRequest::Announce { ids: ids.clone() }.encode(out)),
        body(&|out| IndexRequest::Lookup { ids: ids.clone() }.encode(out)),
        body(&|out| IndexResponse::Announced { sampled: sampled.clone() }.encode(out)),
        body(&|out| IndexRequest::Digests { shard, sampling }.encode(out)),
        body(&|out| {
            IndexRequest::Claims { shard, sampling, from: ShortId(7), holders: vec![member] }.encode(out)
        }),
        body(&|out| {
            let (sampled, claims) = (sampled.clone(), vec![claim]);
            IndexResponse::Holders { sampled, peers: Vec::new(), claims }.encode(out)
        }),
        body(&|out| IndexResponse::Digests { sampling, digests: vec![(member, digest)] }.encode(out)),
        body(&|out| IndexResponse::Claims { claims: vec![passed_on], next: Some(ShortId(9)) }.encode(out)),
        body(&|out| PagesRequest { ids: ids.clone() }.encode(out)),
        body(&|out| {
            PagesResponse { pages: [(ShortId(1), [1; PAGE_SIZE])].into_iter().collect() }.encode(out)
        }),
    ];
    let takes = |body: &[u8]| {
        IndexRequest::decode(body).is_ok()
            || IndexResponse::decode(body).is_ok()
            || PagesRequest::decode(body).is_ok()
            || PagesResponse::decode(body).is_ok()
    };
    vec![Target { name: "site_message", seeds, takes }, checkpoints()]
}

/// The target puts the digest in, so a seed is without it.
fn checkpoints() -> Target {
    let seed = |count: u64| {
        let ids: Vec<ShortId> = (1..=count).map(|n| ShortId(n << 50)).collect();
        let pages = u32::try_from(count).expect("a few");
        let whole = front(&Header { domain: DomainId([2; 16]), pages, name: "vm".to_owned() }, &ids);
        [&whole[..DIGEST_AT], &whole[PAGE_SIZE..]].concat()
    };
    let takes = |body: &[u8]| body.first_chunk().is_some_and(|first| Header::decode(first).is_ok());
    Target { name: "checkpoint", seeds: vec![seed(1), seed(600)], takes }
}
