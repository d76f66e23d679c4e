//! An owner's table against a plain map, its memory, and what it tells the other owner of a shard.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

fn member(n: u8) -> MemberId {
    MemberId::of_peer(&[n])
}

#[derive(Clone, Debug)]
enum Step {
    Announce(u8, Vec<u64>),
    Wait(u64),
    Sweep(u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Few ids in few shards, so that they collide.
    let id = (0u64..3, 0u64..6).prop_map(|(shard, low)| shard << 56 | low);
    let step = prop_oneof![
        (0u8..4, prop::collection::vec(id, 0..8)).prop_map(|(who, ids)| Step::Announce(who, ids)),
        (0..LEASE.as_secs()).prop_map(Step::Wait),
        (0u8..3).prop_map(Step::Sweep),
    ];
    prop::collection::vec(step, 0..40)
}

proptest! {
    /// The reference: a map from id and holder to the end of the lease.
    #[test]
    fn finds_what_was_announced_within_a_lease(steps in steps()) {
        let start = Instant::now();
        let mut now = start;
        let mut table = OwnerTable::new(start);
        let mut model: BTreeMap<(u64, u8), Instant> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Announce(who, ids) => {
                    let short: Vec<_> = ids.iter().map(|id| ShortId(*id)).collect();
                    table.announce(member(who), &short, now);
                    model.extend(ids.iter().map(|id| ((*id, who), now)));
                }
                Step::Wait(seconds) => now += Duration::from_secs(seconds),
                Step::Sweep(shard) => table.sweep(ShardId(shard), true, now),
            }
            for ((id, who), at) in &model {
                let found = table.lookup(&[ShortId(*id)], now, |_| true);
                let found = found.contains(&(0, member(*who)));
                let age = now - *at;
                // A lease ends within one tick of its time.
                if age + TICK <= LEASE { prop_assert!(found); }
                if age >= LEASE + TICK { prop_assert!(!found); }
            }
        }
    }
}

#[test]
fn an_entry_takes_at_most_sixteen_bytes() {
    let mut table = OwnerTable::new(Instant::now());
    let step = u64::MAX / 300_000;
    let ids: Vec<_> = (0..300_000).map(|n| ShortId(n * step)).collect();
    for (n, batch) in ids.chunks(4096).enumerate() {
        table.announce(member(u8::try_from(n % 7).unwrap()), batch, Instant::now());
    }
    assert_eq!(table.len(), ids.len());
    assert!(table.bytes() <= 16 * table.len(), "{} bytes an entry", table.bytes() / table.len());
}

#[test]
fn entries_are_found_while_their_buckets_split_and_join() {
    let start = Instant::now();
    let mut table = OwnerTable::new(start);
    let shard = ShardId(7);
    // All of one shard, spread over the bits behind its own.
    let ids: Vec<_> = (0..40 * BUCKET_ENTRIES as u64)
        .map(|n| ShortId(7 << 56 | n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 8))
        .collect();
    let found = |table: &OwnerTable, ids: &[ShortId], who, now| {
        table.lookup(ids, now, |member| member == who).into_iter().map(|(at, _)| at).collect::<Vec<_>>()
    };
    for batch in ids.chunks(1000) {
        table.announce(member(1), batch, start);
    }
    let all: Vec<u32> = (0..).take(ids.len()).collect();
    assert!(table.shards[shard.index()].buckets.len() >= 40);
    assert_eq!(found(&table, &ids, member(1), start), all);
    let later = start + LEASE / 2;
    let (renewed, _) = ids.split_at(ids.len() / 40);
    table.announce(member(2), renewed, later);
    assert_eq!(found(&table, &ids, member(1), later), all, "another holder takes nothing away");
    let end = start + LEASE + TICK;
    table.sweep(shard, true, end);
    assert_eq!((table.len(), table.shards[shard.index()].buckets.len() < 40), (renewed.len(), true));
    assert_eq!(found(&table, &ids, member(2), end), &all[..renewed.len()]);
    assert!(found(&table, &ids, member(1), end).is_empty());
}

#[test]
fn a_peer_that_is_not_usable_is_not_named() {
    let now = Instant::now();
    let mut table = OwnerTable::new(now);
    table.announce(member(1), &[ShortId(5)], now);
    assert!(table.lookup(&[ShortId(5)], now, |_| false).is_empty());
    table.sweep(ShardId(0), false, now);
    assert!(table.is_empty());
}
