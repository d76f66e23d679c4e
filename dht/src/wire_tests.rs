//! Messages survive the wire, and nothing else gets through.

use proptest::prelude::*;

use super::*;
use crate::limits::INDEX_BATCH;

fn round_trip<M: Message + PartialEq>(message: &M) {
    let mut bytes = Vec::new();
    message.encode(&mut bytes);
    assert!(bytes.len() <= M::BOUND);
    assert_eq!(M::decode(&bytes).as_ref(), Ok(message));
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
        shards in prop::collection::vec(any::<u8>(), 0..9),
        next in any::<Option<u64>>(),
        bits in prop::collection::vec(0..=SAMPLING_BITS, 1..9),
    ) {
        let samplings = bits.iter().map(|bits| Sampling::new(*bits).unwrap());
        let sampled: Vec<_> = ShardId::all().skip(7).zip(samplings).collect();
        let sampling = sampled[0].1;
        let ids: Vec<_> = raw.into_iter().map(ShortId).collect();
        let begins: Vec<_> = shards.into_iter().map(ShardId).collect();
        let digest = ClaimDigest { claims: 3, sum: u128::MAX - 9 };
        let digests = begins.iter().map(|shard| (*shard, digest)).collect();
        round_trip(&IndexResponse::Announced { sampled: sampled.clone(), anew: begins.clone() });
        let (gone, serial) = (ids.iter().rev().copied().collect(), next.unwrap_or(1));
        round_trip(&IndexRequest::Announce(Announcement { serial, gone, begins, ids: ids.clone(), digests }));
        round_trip(&IndexRequest::Lookup { ids: ids.clone() });
        let shard = ShardId(u8::try_from(ids.len()).unwrap());
        let holders: Vec<_> = holders.into_iter().map(MemberId).collect();
        round_trip(&IndexRequest::Digests { shard });
        let from = ShortId(next.unwrap_or(7));
        round_trip(&IndexRequest::Claims { shard, sampling, from, holders: holders.clone() });
        let share = |holder| ShareDigest { holder, digest, left: Duration::from_millis(600_000) };
        round_trip(&IndexResponse::Digests { shares: holders.into_iter().map(share).collect() });
        let passed_on = |(left, holder, _): &(u32, u16, bool)| PassedOn {
            id: ShortId(u64::from(*left) << 7),
            holder: *holder,
        };
        let passed_on = raw_claims.iter().map(passed_on).collect();
        round_trip(&IndexResponse::Claims { claims: passed_on, next: next.map(ShortId) });
        let claims = raw_claims.into_iter().map(|(at, peer, hearsay)| Claim { at, peer, hearsay }).collect();
        let peers = vec![holder("/ip4/10.1.2.3/tcp/4160"), HolderPeer { peer: PeerId::random(), address: None }];
        round_trip(&IndexResponse::Holders { sampled, peers, claims });
        round_trip(&PageIds::These(ids));
        round_trip(&PageIds::Busy);
    }

    #[test]
    fn any_bytes_are_decoded_or_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let _ = (IndexRequest::decode(&bytes).is_ok(), IndexResponse::decode(&bytes).is_ok());
        if let Ok(ids) = PageIds::decode(&bytes) {
            // What a connection reads is as long as what decodes.
            let count = *bytes.first_chunk().unwrap();
            prop_assert_eq!(PageIds::bytes_after(count), Ok(bytes.len() - PageIds::COUNT_BYTES), "{:?}", ids);
        }
    }
}

#[test]
fn an_owner_that_would_keep_next_to_nothing_is_refused() {
    let mut body = Vec::new();
    let sampled = vec![(ShardId(3), Sampling::new(SAMPLING_BITS).unwrap())];
    IndexResponse::Announced { sampled, anew: Vec::new() }.encode(&mut body);
    let bits = body.iter().position(|byte| *byte == SAMPLING_BITS).unwrap();
    body[bits] = 60;
    let error = IndexResponse::decode(&body).unwrap_err();
    assert!(error.to_string().contains("sampled bits"), "{error}");
}

#[test]
fn the_bounds_hold_the_largest_messages() {
    let ids: Vec<_> = (0..LOOKUP_BATCH as u64).map(ShortId).collect();
    let names = || ids[..INDEX_BATCH].to_vec();
    let digests = ShardId::all().map(|shard| (shard, ClaimDigest::default())).collect();
    let announcement =
        Announcement { serial: 1, gone: names(), begins: ShardId::all().collect(), ids: names(), digests };
    round_trip(&IndexRequest::Announce(announcement));
    round_trip(&IndexRequest::Lookup { ids });
    let holders = vec![MemberId([7; HOLDER_BYTES]); MEMBERS];
    let sampling = Sampling::new(SAMPLING_BITS).unwrap();
    round_trip(&IndexRequest::Claims { shard: ShardId(9), sampling, from: ShortId(1), holders });
    let claim = Claim { at: u32::MAX, peer: HEARSAY - 1, hearsay: true };
    let longest = format!("/ip6/fe80::1/tcp/65535/p2p/{}", PeerId::random());
    let (peers, claims) = (vec![holder(&longest); MEMBERS], vec![claim; CLAIMS]);
    let sampled = ShardId::all().map(|shard| (shard, sampling)).collect();
    round_trip(&IndexResponse::Holders { sampled, peers, claims });
    round_trip(&PageIds::These((0..FETCH_BATCH as u64).map(ShortId).collect()));
    let count = u32::try_from(FETCH_BATCH).unwrap() + 1;
    assert!(matches!(PageIds::bytes_after(count.to_be_bytes()), Err(CodecError::TooLarge { .. })));
}
