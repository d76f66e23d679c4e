//! The announcer on its own, and against owners' tables.

use proptest::prelude::*;

use super::*;
use crate::{lease::OwnerTable, limits::LEASE};

fn member(n: u8) -> MemberId {
    MemberId::of_peer(&[n])
}

fn map(members: &[u8]) -> ShardMap {
    ShardMap::new(&members.iter().map(|n| member(*n)).collect())
}

fn ids(count: u64, salt: u64) -> Vec<ShortId> {
    (0..count).map(|n| ShortId((n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ salt)).collect()
}

fn announcer(members: &[u8], now: Instant) -> Announcer {
    let mut announcer = Announcer::new(LEASE, 7, now);
    announcer.set_owners(&map(members), member(0));
    announcer
}

/// Announces all that is due; returns what each owner got.
fn drain(announcer: &mut Announcer, now: Instant) -> BTreeMap<MemberId, BTreeSet<ShortId>> {
    let mut told: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    while let Some(due) = announcer.next(now, |_| true) {
        assert!(due.announcement.ids.len() + due.announcement.gone.len() <= INDEX_BATCH);
        told.entry(due.owner).or_default().extend(due.announcement.ids.iter().copied());
        announcer.acknowledged(&due, &[], now);
    }
    told
}

/// Looks what of it the host `holds`, in all shards.
fn review(announcer: &mut Announcer, holds: impl Fn(ShortId) -> bool, now: Instant) {
    for mut review in announcer.reviews(now) {
        review.ids.retain(|id| holds(*id));
        announcer.reviewed(review, now);
    }
}

proptest! {
    #[test]
    fn in_the_end_every_owner_has_been_told_its_shards_and_nothing_else(
        rounds in prop::collection::vec((1u64..2000, prop::collection::btree_set(1u8..6, 0..5)), 1..5),
    ) {
        let now = Instant::now();
        let mut announcer = announcer(&[0], now);
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

#[derive(Clone, Copy, Debug)]
enum Step {
    /// The host gets names, from which to which.
    Find(u8, u8),
    /// It loses some.
    Lose(u8, u8),
    /// So many messages are exchanged, each with this fate.
    Exchange(u8, Fate),
    /// An owner starts anew, with nothing.
    Restart(u8),
    /// Time passes, in hundredths of a lease.
    Wait(u8),
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Fate {
    Arrives,
    Lost,
    /// It arrives, and its answer does not.
    AnswerLost,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let fate = prop_oneof![3 => Just(Fate::Arrives), 1 => Just(Fate::Lost), 1 => Just(Fate::AnswerLost)];
    let step = prop_oneof![
        (any::<u8>(), 0u8..40).prop_map(|(from, count)| Step::Find(from, count)),
        (any::<u8>(), 0u8..40).prop_map(|(from, count)| Step::Lose(from, count)),
        (1u8..8, fate).prop_map(|(count, fate)| Step::Exchange(count, fate)),
        (1u8..4).prop_map(Step::Restart),
        (0u8..60).prop_map(Step::Wait),
    ];
    prop::collection::vec(step, 0..40)
}

/// A host, and the owners that it tells.
struct Site {
    announcer: Announcer,
    owners: BTreeMap<MemberId, OwnerTable>,
    /// What the host holds.
    held: BTreeSet<ShortId>,
    now: Instant,
}

impl Site {
    fn new() -> Self {
        let now = Instant::now();
        let owners = (1..4).map(|n| (member(n), OwnerTable::new(LEASE))).collect();
        Self { announcer: announcer(&[0, 1, 2, 3], now), owners, held: BTreeSet::new(), now }
    }

    fn exchange(&mut self, fate: Fate) -> bool {
        let Some(due) = self.announcer.next(self.now, |_| true) else { return false };
        let owner = self.owners.get_mut(&due.owner).unwrap();
        let anew = (fate != Fate::Lost).then(|| owner.hear(member(0), &due.announcement, self.now));
        match anew.filter(|_| fate == Fate::Arrives) {
            Some(anew) => self.announcer.acknowledged(&due, &anew, self.now),
            None => self.announcer.failed(&due, self.now),
        }
        true
    }

    fn wait(&mut self, time: Duration) {
        self.now += time;
        let (held, now) = (&self.held, self.now);
        review(&mut self.announcer, |id| held.contains(&id), now);
        for owner in self.owners.values_mut() {
            owner.run_out(now).into_iter().for_each(|shard| owner.sweep(shard, true, now));
        }
    }

    fn step(&mut self, step: Step) {
        // Few names in few shards, so that they come and go.
        let names = |from: u8, count: u8| {
            let name = move |n: u8| ShortId(u64::from(n % 5) << 56 | u64::from(n));
            (from..=from.saturating_add(count)).map(name)
        };
        match step {
            Step::Find(from, count) => {
                let fresh: Vec<_> = names(from, count).filter(|id| self.held.insert(*id)).collect();
                self.announcer.note(&fresh);
            }
            Step::Lose(from, count) => self.held.retain(|id| !names(from, count).any(|gone| gone == *id)),
            Step::Exchange(count, fate) => {
                // As many as there are.
                let _exchanged = (0..count).take_while(|_| self.exchange(fate)).count();
            }
            Step::Restart(owner) => drop(self.owners.insert(member(owner), OwnerTable::new(LEASE))),
            Step::Wait(time) => self.wait(LEASE * time.into() / 100),
        }
    }
}

proptest! {
    /// Whatever was lost on the way, on either side: once messages arrive again, every owner has what the host holds and nothing else within two
    /// renewals; and from then on nothing is said but renewals.
    #[test]
    fn in_the_end_owners_have_what_the_host_holds(steps in steps()) {
        let mut site = Site::new();
        steps.into_iter().for_each(|step| site.step(step));
        for _ in 0..60 {
            site.wait(LEASE / 50);
            while site.exchange(Fate::Arrives) {}
        }
        prop_assert!(site.announcer.complete());
        let shards = map(&[0, 1, 2, 3]);
        for (owner, table) in &site.owners {
            let known: BTreeSet<ShortId> = (0..=u8::MAX)
                .map(|n| ShortId(u64::from(n % 5) << 56 | u64::from(n)))
                .filter(|id| !table.lookup(&[*id], site.now, |_| true).is_empty())
                .collect();
            let owned = |id: &&ShortId| shards.owners(ShardId::of(**id)).contains(owner);
            let held: BTreeSet<ShortId> = site.held.iter().filter(owned).copied().collect();
            prop_assert_eq!(known, held);
        }
        for _ in 0..60 {
            site.wait(LEASE / 50);
            while let Some(due) = site.announcer.next(site.now, |_| true) {
                let Announcement { gone, begins, ids, digests, .. } = &due.announcement;
                prop_assert!(gone.is_empty() && begins.is_empty() && ids.is_empty() && !digests.is_empty());
                let owner = site.owners.get_mut(&due.owner).unwrap();
                prop_assert_eq!(owner.hear(member(0), &due.announcement, site.now), []);
                site.announcer.acknowledged(&due, &[], site.now);
            }
        }
    }
}

#[test]
fn a_failed_announcement_is_sent_again_as_it_was_after_a_pause() {
    let now = Instant::now();
    let mut announcer = announcer(&[0, 1], now);
    announcer.note(&ids(10, 0));
    let first = announcer.next(now, |_| true).unwrap();
    assert_eq!(announcer.next(now, |_| true), None, "one in flight");
    announcer.note(&ids(10, 1));
    announcer.failed(&first, now);
    assert_eq!(announcer.next(now, |_| true), None);
    let backlog = announcer.backlog();
    assert_eq!((backlog.owners, backlog.names), (1, 20));
    assert!(backlog.shards_behind > 0 && !announcer.complete());
    assert_eq!(announcer.next(now + ANNOUNCE_RETRY, |_| true).unwrap(), first);
}

#[test]
fn leases_are_renewed_without_names_all_of_an_owner_at_once() {
    let now = Instant::now();
    let mut announcer = announcer(&[0, 1, 2], now);
    announcer.note(&ids(20_000, 0));
    drain(&mut announcer, now);
    let later = now + renew_after(LEASE);
    for _ in 0..2 {
        let due = announcer.next(later, |_| true).unwrap();
        assert_eq!(due.announcement.digests.len(), map(&[0, 1, 2]).owned_by(due.owner));
        assert!(due.announcement.bytes() < 256 * 24);
        assert!(due.announcement.ids.is_empty() && due.announcement.begins.is_empty());
        announcer.acknowledged(&due, &[], later);
    }
    assert_eq!(announcer.next(later, |_| true), None);
    assert!(announcer.complete(), "a renewal takes nothing back");
}

#[test]
fn what_an_owner_lacks_is_told_as_a_whole_but_not_over_and_over_again() {
    let mut now = Instant::now();
    let mut announcer = announcer(&[0, 1], now);
    let held = ids(3000, 0);
    announcer.note(&held);
    let mut told = 0;
    for _ in 0..renew_after(LEASE).as_secs() * 4 {
        while let Some(due) = announcer.next(now, |_| true) {
            told += due.announcement.ids.len();
            let all: Vec<ShardId> = ShardId::all().collect();
            announcer.acknowledged(&due, &all, now);
        }
        now += Duration::from_secs(1);
    }
    assert_eq!(told, 4 * held.len(), "once in the time of a renewal");
}

#[test]
fn the_newest_names_go_first() {
    let now = Instant::now();
    let mut announcer = announcer(&[0, 1], now);
    let (older, newer) = (ids(3 * INDEX_BATCH as u64, 0), ids(INDEX_BATCH as u64 / 2, 5));
    announcer.note(&older);
    announcer.note(&newer);
    let is_in = |ids: &[ShortId], of: &[ShortId]| ids.iter().filter(|id| of.contains(id)).count();
    let first = announcer.next(now, |_| true).unwrap();
    assert_eq!(first.announcement.ids.len(), INDEX_BATCH);
    assert!(is_in(&first.announcement.ids, &newer) > newer.len() * 9 / 10);
    announcer.acknowledged(&first, &[], now);
    let newest = ids(100, 6);
    announcer.note(&newest);
    let second = announcer.next(now, |_| true).unwrap();
    assert_eq!(is_in(&second.announcement.ids, &newest), 100);
    announcer.acknowledged(&second, &[], now);
    assert_eq!(drain(&mut announcer, now).len(), 1);
    assert!(announcer.complete());
}

/// A minute's budget of one message, and twelve messages' worth of names: with too small a budget it takes long, and then it is done; leases
/// do not run out meanwhile.
#[test]
fn with_a_small_budget_all_names_are_announced_in_the_end() {
    let start = Instant::now();
    let mut announcer = announcer(&[0, 1], start);
    let mut owner = OwnerTable::new(LEASE);
    let held = ids(12 * INDEX_BATCH as u64, 0);
    announcer.note(&held);
    let mut names = 0;
    for minute in 0..60 {
        let now = start + Duration::from_secs(60) * minute;
        review(&mut announcer, |_| true, now);
        owner.run_out(now).into_iter().for_each(|shard| owner.sweep(shard, true, now));
        if let Some(due) = announcer.next(now, |_| true) {
            let anew = owner.hear(member(0), &due.announcement, now);
            announcer.acknowledged(&due, &anew, now);
            names += due.announcement.ids.len();
        }
    }
    assert_eq!(names, held.len(), "each once");
    let now = start + Duration::from_secs(60) * 60;
    assert_eq!(owner.lookup(&held, now, |_| true).len(), held.len());
    assert!(announcer.complete());
}

/// The story of a full owner: it keeps a quarter of a shard's names, then a half, then all.
#[test]
fn an_owner_is_told_what_it_keeps_and_all_of_it_once_it_keeps_more() {
    let mut now = Instant::now();
    let mut announcer = announcer(&[0, 1], now);
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
    // And as good as gone.
    now += renew_after(LEASE) * 2;
    review(&mut announcer, |id| held.contains(&id), now);
    let on_its_way = announcer.next(now, |_| true).unwrap();
    assert!(on_its_way.announcement.gone.is_empty());
    // What was on its way when the owner went back to more names does not count for these.
    let (half, said) = sampled(1);
    announcer.sampled(member(1), &said);
    announcer.acknowledged(&on_its_way, &[], now);
    assert_eq!(drain(&mut announcer, now)[&member(1)], kept(half));
    announcer.sampled(member(1), &said);
    assert!(announcer.complete(), "nothing new");
    announcer.sampled(member(1), &sampled(3).1);
    assert!(announcer.complete(), "it has more than it keeps");
    announcer.sampled(member(1), &[]);
    assert_eq!(announcer.next(now, |_| true), None, "not more often than leases are renewed");
    assert_eq!(drain(&mut announcer, now + renew_after(LEASE))[&member(1)], held.iter().copied().collect());
}

#[test]
fn owners_take_turns() {
    let now = Instant::now();
    let mut announcer = announcer(&[0, 1, 2, 3], now);
    announcer.note(&ids(20 * INDEX_BATCH as u64, 0));
    let told: Vec<MemberId> = (0..6)
        .map(|_| {
            let due = announcer.next(now, |_| true).unwrap();
            announcer.acknowledged(&due, &[], now);
            due.owner
        })
        .collect();
    assert_eq!(told[..3], told[3..]);
    assert_eq!(told[..3].iter().collect::<BTreeSet<_>>().len(), 3);
}
