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

/// Names of a host, spread over all shards.
fn names(host: u8, count: u64) -> Vec<ShortId> {
    (0..count).map(|n| ShortId((u64::from(host) << 40 | n).wrapping_mul(0x9e37_79b9_7f4a_7c15))).collect()
}

/// Announces in batches; returns how many of the names the table says it keeps.
fn announce(table: &mut OwnerTable, host: u8, ids: &[ShortId], now: Instant) -> usize {
    ids.chunks(500).for_each(|batch| table.announce(member(host), batch, now));
    ids.iter().filter(|id| table.sampling(ShardId::of(**id)).keeps(**id)).count()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// However much is announced, the table stays within its bound, says what it keeps, and has all of that, of all holders alike.
    #[test]
    fn a_full_table_samples_and_keeps_what_it_says(hosts in 1u8..5, each in 100u64..40_000) {
        const MOST: usize = 20_000;
        let now = Instant::now();
        let mut table = OwnerTable::with_room(MOST, now);
        // Interleaved, and again as a renewal would, so that what fitted before is not all there is.
        for part in 0..8 {
            for host in 0..hosts {
                let ids = names(host, each);
                announce(&mut table, host, &ids[ids.len() * part / 8..ids.len() * (part + 1) / 8], now);
                prop_assert!(table.len() <= MOST);
            }
        }
        for host in 0..hosts {
            let ids = names(host, each);
            let (mut said, mut kept) = (0, 0);
            for id in &ids {
                let found = table.lookup(&[*id], now, |who| who == member(host)).len();
                let keeps = table.sampling(ShardId::of(*id)).keeps(*id);
                prop_assert!(found == 0 || keeps, "what is not kept is dropped");
                (said, kept) = (said + usize::from(keeps), kept + found);
            }
            prop_assert!(kept == said, "{kept} of {said}");
        }
        let all = usize::from(hosts) * usize::try_from(each).unwrap();
        prop_assert!(table.len() > MOST / 4 || table.len() == all, "{} of {all}", table.len());
        let bits: Vec<u8> = ShardId::all().map(|shard| table.sampling(shard).zero_bits()).collect();
        let (low, high) = (bits.iter().min().unwrap(), bits.iter().max().unwrap());
        prop_assert!(high - low <= 1 + u8::from(each < 10_000), "{low} to {high}: shards are sampled alike");
    }
}

/// A member that announces names made up to be kept by any sampling takes its part of the table; the others are sampled by a few bits more, and no more.
#[test]
fn names_made_up_to_be_kept_leave_room_for_others() {
    const MOST: usize = 20_000;
    let now = Instant::now();
    let mut table = OwnerTable::with_room(MOST, now);
    let made_up: Vec<_> = names(9, 30_000).iter().map(|id| ShortId(id.0 << 16)).collect();
    announce(&mut table, 9, &made_up, now);
    let honest = names(1, 18_000);
    let kept = announce(&mut table, 1, &honest, now);
    assert!(kept > 18_000 / 20, "{kept} of 18,000");
    let found = table.lookup(&honest, now, |who| who == member(1)).len();
    assert_eq!(found, kept);
}

#[test]
fn a_table_with_room_again_keeps_more_after_a_lease_and_not_too_soon() {
    const MOST: usize = 20_000;
    let start = Instant::now();
    let mut table = OwnerTable::with_room(MOST, start);
    for host in 0..4 {
        announce(&mut table, host, &names(host, 10_000), start);
    }
    let bits = |table: &OwnerTable| {
        ShardId::all().map(|shard| table.sampling(shard).zero_bits()).collect::<Vec<_>>()
    };
    let full = bits(&table);
    assert!(full.iter().all(|bits| *bits >= 1) && full.iter().any(|bits| *bits <= 2));
    // As many names as before: sampling stays.
    let mut now = start;
    for _ in 0..6 {
        now += LEASE / 2;
        for host in 0..4 {
            announce(&mut table, host, &names(host, 10_000), now);
        }
        ShardId::all().for_each(|shard| table.sweep(shard, true, now));
    }
    let (low, high) = (bits(&table), full);
    assert!(low.iter().zip(&high).all(|(now, then)| now.abs_diff(*then) <= 1));
    let before = bits(&table);
    // One host is left: all of its names fit, and in the end all are kept.
    for n in 0..12 {
        now += LEASE / 2;
        announce(&mut table, 0, &names(0, 5_000), now);
        ShardId::all().for_each(|shard| table.sweep(shard, true, now));
        assert!(table.len() <= MOST);
        assert!(n > 0 || bits(&table) == before);
    }
    assert_eq!(table.samplings(), []);
    announce(&mut table, 0, &names(0, 5_000), now);
    assert_eq!(table.len(), 5_000);
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
