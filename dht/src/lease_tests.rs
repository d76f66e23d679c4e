//! The table against a map from shares to ids, and the entries of a shard.

use proptest::prelude::*;

use super::*;
use crate::limits::LEASE;

fn member(n: u8) -> MemberId {
    MemberId::of_peer(&[n])
}

fn digest<'a>(ids: impl IntoIterator<Item = &'a ShortId>) -> ClaimDigest {
    let mut digest = ClaimDigest::default();
    ids.into_iter().for_each(|id| digest.add(*id));
    digest
}

#[derive(Clone, Debug)]
enum Step {
    Announce(u8, BTreeSet<u64>),
    Withdraw(u8, BTreeSet<u64>),
    Begin(u8, u8),
    /// With the right digest, or with another.
    Renew(u8, u8, bool),
    Wait(u64),
    Sweep(u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Few ids in few shards, so that they collide.
    let id = (0u64..3, 0u64..6).prop_map(|(shard, low)| shard << 56 | low);
    let ids = || prop::collection::btree_set(id.clone(), 0..8);
    let step = prop_oneof![
        3 => (0u8..4, ids()).prop_map(|(who, ids)| Step::Announce(who, ids)),
        2 => (0u8..4, ids()).prop_map(|(who, ids)| Step::Withdraw(who, ids)),
        1 => (0u8..4, 0u8..3).prop_map(|(who, shard)| Step::Begin(who, shard)),
        2 => (0u8..4, 0u8..3, prop::bool::weighted(0.8)).prop_map(|(who, shard, right)| Step::Renew(who, shard, right)),
        2 => (0..LEASE.as_secs()).prop_map(Step::Wait),
        1 => (0u8..3).prop_map(Step::Sweep),
    ];
    prop::collection::vec(step, 0..60)
}

/// A share as it should be.
#[derive(Clone, Debug)]
struct Model {
    until: Instant,
    told: Vec<u64>,
    /// What was told before the last begin and not since.
    before: BTreeSet<u64>,
}

#[derive(Debug, Default)]
struct Models(BTreeMap<(u8, u8), Model>);

impl Models {
    fn share(&mut self, who: u8, shard: u8, until: Instant) -> &mut Model {
        let new = Model { until, told: Vec::new(), before: BTreeSet::new() };
        self.0.entry((who, shard)).or_insert(new)
    }

    fn step(&mut self, step: &Step, table: &mut OwnerTable, now: Instant) {
        let until = now + LEASE;
        let short = |ids: &BTreeSet<u64>| ids.iter().map(|id| ShortId(*id)).collect::<Vec<_>>();
        match step {
            Step::Announce(who, ids) => {
                // The model, as a holder, tells a name once.
                let ids = ids.iter().copied().filter(|id| {
                    let share = self.share(*who, ShardId::of(ShortId(*id)).0, until);
                    let fresh = !share.told.contains(id);
                    share.until = if fresh { until } else { share.until };
                    share.before.remove(id);
                    share.told.extend(fresh.then_some(*id));
                    fresh
                });
                table.announce(member(*who), &short(&ids.collect()), now);
            }
            Step::Withdraw(who, ids) => {
                let ids = ids.iter().copied().filter(|id| {
                    let shares = self.0.get_mut(&(*who, ShardId::of(ShortId(*id)).0));
                    shares.is_some_and(|share| {
                        let known = share.told.len();
                        share.told.retain(|told| told != id);
                        share.until = if share.told.len() < known { until } else { share.until };
                        share.told.len() < known
                    })
                });
                table.withdraw(member(*who), &short(&ids.collect()), now);
            }
            Step::Begin(who, shard) => {
                let share = self.share(*who, *shard, until);
                share.before.extend(std::mem::take(&mut share.told));
                share.until = until;
                table.begin(member(*who), ShardId(*shard), now);
            }
            Step::Renew(who, shard, right) => {
                let share = self.0.get_mut(&(*who, *shard));
                let told: Vec<ShortId> =
                    share.iter().flat_map(|share| &share.told).map(|id| ShortId(*id)).collect();
                let more = (!right).then_some(ShortId(1 << 40));
                let renewed =
                    table.renew(member(*who), ShardId(*shard), digest(told.iter().chain(&more)), now);
                assert_eq!(renewed, *right && share.is_some());
                if let Some(share) = share.filter(|_| *right) {
                    share.until = until;
                    share.before.clear();
                }
            }
            Step::Wait(_) => {}
            Step::Sweep(shard) => {
                table.sweep(ShardId(*shard), true, now);
                self.0.retain(|(_, of), share| of != shard || share.until > now);
            }
        }
    }
}

proptest! {
    /// The reference: for each share a list of ids, and until when its lease runs.
    #[test]
    fn finds_what_was_told_within_a_lease(steps in steps()) {
        let mut now = Instant::now();
        let (mut table, mut models) = (OwnerTable::new(LEASE), Models::default());
        for step in steps {
            if let Step::Wait(seconds) = step {
                now += Duration::from_secs(seconds);
            }
            models.step(&step, &mut table, now);
            let mut entries = 0;
            for ((who, shard), share) in &models.0 {
                let told = share.told.iter().chain(&share.before).copied();
                let told: BTreeSet<u64> = told.collect();
                entries += told.len();
                for id in (0u64..6).map(|low| u64::from(*shard) << 56 | low) {
                    let mut hearsay = None;
                    let usable = |holder| holder == member(*who);
                    table.each_holder(&[ShortId(id)], now, usable, |_, _, said| hearsay = Some(said));
                    let expected = (share.until > now && told.contains(&id)).then(|| !share.told.contains(&id));
                    prop_assert_eq!(hearsay, expected);
                }
                let out = table.run_out(now).contains(&ShardId(*shard));
                prop_assert!(out || share.until > now);
            }
            prop_assert_eq!(table.len(), entries);
        }
    }
}

#[test]
fn an_entry_takes_at_most_twelve_bytes() {
    let (mut table, now) = (OwnerTable::new(LEASE), Instant::now());
    let step = u64::MAX / 300_000;
    let ids: Vec<_> = (0..300_000).map(|n| ShortId(n * step)).collect();
    for (n, batch) in ids.chunks(4096).enumerate() {
        table.announce(member(u8::try_from(n % 7).unwrap()), batch, now);
    }
    assert_eq!(table.len(), ids.len());
    assert!(table.bytes() <= 12 * table.len(), "{} bytes of {} entries", table.bytes(), table.len());
}

#[test]
fn entries_are_found_while_their_buckets_split_and_join() {
    let (mut table, start, shard) = (OwnerTable::new(LEASE), Instant::now(), ShardId(7));
    // All of one shard, spread over the bits behind its own.
    let ids: Vec<_> =
        (0..20_000u64).map(|n| ShortId(7 << 56 | n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 8)).collect();
    let found = |table: &OwnerTable, ids: &[ShortId], who, now| {
        table.lookup(ids, now, |member| member == who).into_iter().map(|(at, _)| at).collect::<Vec<_>>()
    };
    for batch in ids.chunks(1000) {
        table.announce(member(1), batch, start);
    }
    let all: Vec<u32> = (0..).take(ids.len()).collect();
    assert!(table.shards[shard.index()].entries.buckets() >= 40);
    assert_eq!(found(&table, &ids, member(1), start), all);
    let later = start + LEASE / 2;
    let (both, _) = ids.split_at(ids.len() / 40);
    table.announce(member(2), both, later);
    assert_eq!(found(&table, &ids, member(1), later), all, "another holder takes nothing away");
    let end = start + LEASE;
    assert_eq!(table.run_out(end), BTreeSet::from([shard]));
    table.sweep(shard, true, end);
    assert_eq!((table.len(), table.shards[shard.index()].entries.buckets() < 40), (both.len(), true));
    assert_eq!(found(&table, &ids, member(2), end), &all[..both.len()]);
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
        let mut table = OwnerTable::with_room(MOST, LEASE);
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
    let mut table = OwnerTable::with_room(MOST, LEASE);
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
    let mut table = OwnerTable::with_room(MOST, LEASE);
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
    // One host is left, with half of its names: all of them fit, and in the end all are kept.
    table.withdraw(member(0), &names(0, 10_000)[5_000..], now);
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
    let (mut table, now) = (OwnerTable::new(LEASE), Instant::now());
    table.announce(member(1), &[ShortId(5)], now);
    assert!(table.lookup(&[ShortId(5)], now, |_| false).is_empty());
    table.sweep(ShardId(0), false, now);
    assert!(table.is_empty());
}

#[test]
fn a_share_is_renewed_though_its_names_are_known_of_as_many_others_as_may_be_until_there_is_room() {
    let (mut table, now) = (OwnerTable::new(LEASE), Instant::now());
    let (names, shard) = ([ShortId(1), ShortId(2)], ShardId(0));
    let tell = |table: &mut OwnerTable, who: u8| {
        let announcement = Announcement {
            serial: who.into(),
            begins: vec![shard],
            ids: names.to_vec(),
            digests: vec![(shard, digest(&names))],
            ..Announcement::default()
        };
        table.hear(member(who), &announcement, now)
    };
    for who in 0..8 {
        assert!(tell(&mut table, who).is_empty(), "what found no room was told all the same");
    }
    let named = |table: &OwnerTable| {
        let found = table.lookup(&names, now, |_| true);
        found.into_iter().map(|(_, who)| who).collect::<BTreeSet<_>>()
    };
    assert_eq!(named(&table), (0..4).map(member).collect());
    assert!((0..8).all(|who| table.renew(member(who), shard, digest(&names), now)));
    table.withdraw(member(0), &names, now);
    let renewed: Vec<bool> = (4..8).map(|who| table.renew(member(who), shard, digest(&names), now)).collect();
    assert_eq!(renewed, [false, true, true, true], "one of them is asked, as it may have both names");
    // Its message has another serial than the last one.
    table.begin(member(4), shard, now);
    table.announce(member(4), &names, now);
    assert!(table.renew(member(4), shard, digest(&names), now));
    assert_eq!(named(&table), (1..5).map(member).collect());
}

#[test]
fn one_that_announces_without_end_leaves_room_for_others() {
    let (mut table, now) = (OwnerTable::new(LEASE), Instant::now());
    let numbers = Claim::HOLDERS as u64;
    // More holders than there are numbers: the table is full, and says that they have to tell it anew.
    for n in 0..numbers {
        table.begin(MemberId::of_peer(&n.to_be_bytes()), ShardId(0), now);
    }
    let late =
        Announcement { digests: vec![(ShardId(0), ClaimDigest::default())], ..Announcement::default() };
    assert_eq!(table.hear(member(1), &late, now), [ShardId(0)]);
    table.sweep(ShardId(0), true, now + LEASE);
    table.announce(member(1), &[ShortId(1)], now + LEASE);
    assert_eq!(table.len(), 1, "their numbers are free again");
}
