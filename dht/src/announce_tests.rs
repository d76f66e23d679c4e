//! What owners are told, in which order, and again.

use proptest::prelude::*;

use super::*;
use crate::limits::LEASE;

fn member(n: u8) -> MemberId {
    MemberId::of_peer(&[n])
}

fn map(members: &[u8]) -> ShardMap {
    ShardMap::new(&members.iter().map(|n| member(*n)).collect())
}

fn ids(count: u64, salt: u64) -> Vec<ShortId> {
    (0..count).map(|n| ShortId((n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ salt)).collect()
}

/// Announces all that is due; returns what each owner got.
fn drain(announcer: &mut Announcer, now: Instant) -> BTreeMap<MemberId, BTreeSet<ShortId>> {
    let mut told: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    while let Some(announcement) = announcer.next(now, |_| true) {
        assert!(announcement.ids.len() <= INDEX_BATCH);
        told.entry(announcement.owner).or_default().extend(announcement.ids.iter().copied());
        announcer.acknowledged(&announcement);
    }
    told
}

proptest! {
    #[test]
    fn in_the_end_every_owner_has_been_told_its_shards_and_nothing_else(
        rounds in prop::collection::vec((1u64..2000, prop::collection::btree_set(1u8..6, 0..5)), 1..5),
    ) {
        let now = Instant::now();
        let mut announcer = Announcer::new(now);
        let (mut all, mut told) = (BTreeSet::new(), BTreeMap::<MemberId, BTreeSet<ShortId>>::new());
        let mut shards = map(&[0]);
        for (salt, (count, members)) in rounds.into_iter().enumerate() {
            let more = ids(count, salt as u64);
            announcer.note(&more);
            all.extend(more);
            let members: Vec<u8> = std::iter::once(0).chain(members).collect();
            shards = map(&members);
            announcer.set_owners(&shards, member(0));
            // An owner that left forgets.
            told.retain(|owner, _| members.iter().any(|n| member(*n) == *owner));
            for (owner, ids) in drain(&mut announcer, now) {
                prop_assert!(ids.iter().all(|id| shards.owners(ShardId::of(*id)).contains(&owner)));
                told.entry(owner).or_default().extend(ids);
            }
            prop_assert!(announcer.complete());
        }
        for id in all {
            for owner in shards.owners(ShardId::of(id)).iter().filter(|o| **o != member(0)) {
                prop_assert!(told[owner].contains(&id));
            }
        }
    }
}

#[test]
fn a_failed_announcement_is_due_again_after_a_pause() {
    let now = Instant::now();
    let mut announcer = Announcer::new(now);
    announcer.set_owners(&map(&[0, 1]), member(0));
    announcer.note(&ids(10, 0));
    let first = announcer.next(now, |_| true).unwrap();
    assert_eq!(announcer.next(now, |_| true), None, "one in flight");
    announcer.failed(&first, now);
    assert_eq!(announcer.next(now, |_| true), None);
    let backlog = announcer.backlog();
    assert_eq!((backlog.owners, backlog.names), (1, 10));
    assert!(backlog.shards_behind > 0 && !announcer.complete());
    assert_eq!(announcer.next(now + ANNOUNCE_RETRY, |_| true).unwrap().ids, first.ids);
}

/// Renews what is due, from what the host `holds`; returns how many shards that were.
fn renew(announcer: &mut Announcer, holds: impl Fn(ShortId) -> bool, now: Instant) -> usize {
    let due = announcer.renewals(now);
    let count = due.len();
    for mut renewal in due {
        renewal.ids.retain(|id| holds(*id));
        announcer.renew(renewal, now);
    }
    count
}

#[test]
fn a_renewal_tells_everything_again_and_a_late_acknowledgement_does_not_hide_it() {
    let now = Instant::now();
    let mut announcer = Announcer::new(now);
    announcer.set_owners(&map(&[0, 1]), member(0));
    let held = ids(50, 0);
    announcer.note(&held);
    drain(&mut announcer, now);
    let later = now + RENEW_AFTER * 3;
    assert!(renew(&mut announcer, |_| true, later) > 0);
    let again = announcer.next(later, |_| true).unwrap();
    assert_eq!(again.ids.len(), held.len());
    assert!(announcer.complete(), "a renewal takes nothing back");
    announcer.note(&ids(1, 77));
    assert_eq!(announcer.backlog().names, 1, "a new name is not announced yet");
    let last = later + RENEW_AFTER * 3;
    renew(&mut announcer, |_| false, last);
    announcer.acknowledged(&again);
    assert!(announcer.next(last, |_| true).is_none(), "the host holds nothing any more");
}

#[test]
fn what_is_noted_while_a_renewal_is_made_is_in_it() {
    let now = Instant::now();
    let mut announcer = Announcer::new(now);
    announcer.set_owners(&map(&[0, 1]), member(0));
    announcer.note(&ids(50, 0));
    let later = now + RENEW_AFTER * 3;
    let due = announcer.renewals(later);
    announcer.note(&ids(50, 1));
    due.into_iter().for_each(|renewal| announcer.renew(renewal, later));
    assert_eq!(drain(&mut announcer, later)[&member(1)].len(), 100);
}

#[test]
fn the_newest_names_go_first_then_renewals_which_go_before_them_when_late() {
    let now = Instant::now();
    let mut announcer = Announcer::new(now);
    announcer.set_owners(&map(&[0, 1]), member(0));
    let old = ids(3 * INDEX_BATCH as u64, 0);
    announcer.note(&old);
    drain(&mut announcer, now);
    let later = now + RENEW_AFTER * 3;
    renew(&mut announcer, |_| true, later);
    let (older, newer) = (ids(1000, 5), ids(1000, 6));
    announcer.note(&older);
    announcer.note(&newer);
    let is_in = |ids: &[ShortId], of: &[ShortId]| ids.iter().filter(|id| of.contains(id)).count();
    let first = announcer.next(later, |_| true).unwrap();
    assert_eq!(is_in(&first.ids, &older) + is_in(&first.ids, &newer), 2000, "fresh names first");
    assert_eq!(first.ids.len(), INDEX_BATCH, "and renewals in what room there is");
    announcer.failed(&first, later);
    let urgent = later + RENEW_URGENT;
    let first = announcer.next(urgent, |_| true).unwrap();
    assert_eq!(is_in(&first.ids, &old), INDEX_BATCH);
    assert_eq!(drain(&mut announcer, urgent).len(), 0, "one message at a time");
    announcer.acknowledged(&first);
    let rest = &drain(&mut announcer, urgent)[&member(1)];
    assert_eq!(rest.len(), 2 * INDEX_BATCH + 2000);
    // Of more fresh names than a message holds, the newest of every shard.
    let (older, newer) = (ids(INDEX_BATCH as u64, 7), ids(INDEX_BATCH as u64, 8));
    announcer.note(&older);
    announcer.note(&newer);
    let first = announcer.next(urgent, |_| true).unwrap();
    assert!(is_in(&first.ids, &newer) > INDEX_BATCH * 8 / 10);
}

/// A minute's budget of one message, and twelve messages' worth of names: the story of a host with too small a budget.
#[test]
fn with_too_small_a_budget_the_newest_names_stay_announced_and_the_oldest_lapse() {
    let start = Instant::now();
    let mut announcer = Announcer::new(start);
    announcer.set_owners(&map(&[0, 1]), member(0));
    let held = ids(12 * INDEX_BATCH as u64, 0);
    let mut until: BTreeMap<ShortId, Instant> = BTreeMap::new();
    held.chunks(INDEX_BATCH).for_each(|ids| announcer.note(ids));
    let minute = std::time::Duration::from_secs(60);
    for n in 0..60 {
        let now = start + minute * n;
        renew(&mut announcer, |_| true, now);
        if let Some(announcement) = announcer.next(now, |_| true) {
            until.extend(announcement.ids.iter().map(|id| (*id, now + LEASE)));
            announcer.acknowledged(&announcement);
        }
    }
    let now = start + minute * 60;
    let announced =
        |ids: &[ShortId]| ids.iter().filter(|id| until.get(id).is_some_and(|at| *at > now)).count();
    let (oldest, newest) = (&held[..2 * INDEX_BATCH], &held[10 * INDEX_BATCH..]);
    assert!(announced(newest) > 2 * INDEX_BATCH * 8 / 10, "{} of the newest", announced(newest));
    assert!(announced(oldest) < 2 * INDEX_BATCH / 10, "{} of the oldest", announced(oldest));
    assert!(announced(&held) > 5 * INDEX_BATCH, "{} in all", announced(&held));
    assert!(announcer.backlog().names > 0, "and it says that announcing lags");
}

/// The story of a full owner: it keeps a quarter of a shard's names, then a half, then all.
#[test]
fn an_owner_is_told_what_it_keeps_and_the_rest_once_it_keeps_more() {
    let now = Instant::now();
    let mut announcer = Announcer::new(now);
    announcer.set_owners(&map(&[0, 1]), member(0));
    let sampled = |bits| {
        let sampling = Sampling::new(bits).unwrap();
        (sampling, ShardId::all().map(|shard| (shard, sampling)).collect::<Vec<_>>())
    };
    let (quarter, said) = sampled(2);
    announcer.sampled(member(1), &said);
    let held = ids(20_000, 0);
    announcer.note(&held);
    let kept =
        |sampling: Sampling| held.iter().filter(|id| sampling.keeps(**id)).copied().collect::<BTreeSet<_>>();
    assert_eq!(announcer.backlog().names, kept(quarter).len());
    assert_eq!(drain(&mut announcer, now)[&member(1)], kept(quarter));
    assert!(announcer.complete());
    // A name that it does not keep is as good as told.
    let left_out: Vec<_> = ids(9, 7).into_iter().filter(|id| !quarter.keeps(*id)).collect();
    announcer.note(&left_out);
    assert!(announcer.next(now, |_| true).is_none() && announcer.complete());
    // What was on its way when the owner went back to more names does not count for these.
    let later = now + RENEW_AFTER * 3;
    renew(&mut announcer, |id| held.contains(&id), later);
    let on_its_way = announcer.next(later, |_| true).unwrap();
    let (half, said) = sampled(1);
    announcer.sampled(member(1), &said);
    announcer.acknowledged(&on_its_way);
    assert_eq!(drain(&mut announcer, later)[&member(1)], kept(half));
    announcer.sampled(member(1), &said);
    assert!(announcer.complete(), "nothing new");
    announcer.sampled(member(1), &sampled(3).1);
    assert!(announcer.complete(), "it has more than it keeps");
    announcer.sampled(member(1), &[]);
    assert_eq!(drain(&mut announcer, later)[&member(1)], held.iter().copied().collect());
}

#[test]
fn owners_take_turns() {
    let now = Instant::now();
    let mut announcer = Announcer::new(now);
    announcer.set_owners(&map(&[0, 1, 2, 3]), member(0));
    announcer.note(&ids(20 * INDEX_BATCH as u64, 0));
    let told: Vec<MemberId> = (0..6)
        .map(|_| {
            let announcement = announcer.next(now, |_| true).unwrap();
            announcer.acknowledged(&announcement);
            announcement.owner
        })
        .collect();
    assert_eq!(told[..3], told[3..]);
    assert_eq!(told[..3].iter().collect::<BTreeSet<_>>().len(), 3);
}
