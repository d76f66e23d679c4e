//! Messages survive the wire, and nothing else gets through.

use proptest::prelude::*;

use super::*;

fn round_trip<M: Message + PartialEq>(message: &M) {
    let mut bytes = Vec::new();
    message.encode(&mut bytes);
    assert!(bytes.len() <= M::BOUND);
    assert_eq!(M::decode(&bytes).as_ref(), Ok(message));
    let mut front = Vec::new();
    let rest = message.parts(&mut front);
    assert_eq!([&front[..], rest].concat(), bytes);
    for cut in [0, 1, bytes.len() / 2, bytes.len() - 1] {
        assert!(cut == bytes.len() || M::decode(&bytes[..cut]).is_err(), "cut at {cut}");
    }
}

fn holder(address: &str) -> HolderPeer {
    HolderPeer { peer: PeerId::random(), address: Some(address.parse().unwrap()) }
}

proptest! {
    #[test]
    fn messages_survive_the_wire(
        raw in prop::collection::vec(any::<u64>(), 0..FETCH_BATCH),
        raw_claims in prop::collection::vec((any::<u32>(), 0..HEARSAY, any::<bool>()), 0..50),
        holders in prop::collection::vec(any::<[u8; HOLDER_BYTES]>(), 0..9),
        next in any::<Option<u64>>(),
        bits in prop::collection::vec(0..=SAMPLING_BITS, 1..9),
    ) {
        let samplings = bits.iter().map(|bits| Sampling::new(*bits).unwrap());
        let sampled: Vec<_> = ShardId::all().skip(7).zip(samplings).collect();
        let sampling = sampled[0].1;
        let ids: Vec<_> = raw.into_iter().map(ShortId).collect();
        round_trip(&IndexRequest::Announce { ids: ids.clone() });
        round_trip(&IndexRequest::Lookup { ids: ids.clone() });
        round_trip(&IndexResponse::Announced { sampled: sampled.clone() });
        let shard = ShardId(u8::try_from(ids.len()).unwrap());
        let holders: Vec<_> = holders.into_iter().map(MemberId).collect();
        round_trip(&IndexRequest::Digests { shard, sampling });
        let from = ShortId(next.unwrap_or(7));
        round_trip(&IndexRequest::Claims { shard, sampling, from, holders: holders.clone() });
        let digest = ClaimDigest { claims: 3, sum: u128::MAX - 9 };
        let digests = holders.into_iter().map(|holder| (holder, digest)).collect();
        round_trip(&IndexResponse::Digests { sampling, digests });
        let passed_on = |(left, holder, _): &(u32, u16, bool)| PassedOn {
            id: ShortId(u64::from(*left) << 7),
            holder: *holder,
            left_seconds: u16::try_from(left % 1000).unwrap(),
        };
        let passed_on = raw_claims.iter().map(passed_on).collect();
        round_trip(&IndexResponse::Claims { claims: passed_on, next: next.map(ShortId) });
        let claims = raw_claims.into_iter().map(|(at, peer, hearsay)| Claim { at, peer, hearsay }).collect();
        let peers = vec![holder("/ip4/10.1.2.3/tcp/4160"), HolderPeer { peer: PeerId::random(), address: None }];
        round_trip(&IndexResponse::Holders { sampled, peers, claims });
        round_trip(&PagesResponse { pages: ids.iter().take(3).map(|id| (*id, [7; PAGE_SIZE])).collect() });
        round_trip(&PagesRequest { ids });
    }

    #[test]
    fn any_bytes_are_decoded_or_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = (IndexRequest::decode(&bytes).is_ok(), IndexResponse::decode(&bytes).is_ok());
        let _ = (PagesRequest::decode(&bytes).is_ok(), PagesResponse::decode(&bytes).is_ok());
    }
}

#[test]
fn an_owner_that_would_keep_next_to_nothing_is_refused() {
    let mut body = Vec::new();
    let sampled = vec![(ShardId(3), Sampling::new(SAMPLING_BITS).unwrap())];
    IndexResponse::Announced { sampled }.encode(&mut body);
    *body.last_mut().unwrap() = 60;
    let error = IndexResponse::decode(&body).unwrap_err();
    assert!(error.to_string().contains("sampled bits"), "{error}");
}

#[test]
fn the_bounds_hold_the_largest_messages() {
    let ids: Vec<_> = (0..LOOKUP_BATCH as u64).map(ShortId).collect();
    round_trip(&IndexRequest::Lookup { ids });
    let holders = vec![MemberId([7; HOLDER_BYTES]); MEMBERS];
    let sampling = Sampling::new(SAMPLING_BITS).unwrap();
    round_trip(&IndexRequest::Claims { shard: ShardId(9), sampling, from: ShortId(1), holders });
    let claim = Claim { at: u32::MAX, peer: HEARSAY - 1, hearsay: true };
    let longest = format!("/ip6/fe80::1/tcp/65535/p2p/{}", PeerId::random());
    let (peers, claims) = (vec![holder(&longest); MEMBERS], vec![claim; CLAIMS]);
    let sampled = ShardId::all().map(|shard| (shard, sampling)).collect();
    round_trip(&IndexResponse::Holders { sampled, peers, claims });
    let pages = (0..FETCH_BATCH as u64).map(|id| (ShortId(id), [1; PAGE_SIZE])).collect();
    round_trip(&PagesResponse { pages });
}
