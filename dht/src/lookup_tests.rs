//! A search against a model site whose peers answer, fail, lie, or never answer.

use std::time::Duration;

use proptest::prelude::*;

use super::*;
use crate::limits::{FETCH_HEDGE, FETCH_HEDGE_LEAST, LOCAL_RESOLVE_IDS};

fn member(n: usize) -> MemberId {
    MemberId::of_peer(&n.to_be_bytes())
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Behaviour {
    Good,
    Silent,
    Failing,
    Empty,
}

fn behaviour() -> impl Strategy<Value = Behaviour> {
    prop_oneof![
        3 => Just(Behaviour::Good),
        1 => Just(Behaviour::Silent),
        1 => Just(Behaviour::Failing),
        1 => Just(Behaviour::Empty),
    ]
}

/// How a search went: the ids found, and those missing, in order, how long it took, and what was asked.
#[derive(Default)]
struct Went {
    found: Vec<ShortId>,
    missing: Vec<ShortId>,
    took: Duration,
    lookups: Vec<(usize, Vec<ShortId>)>,
    fetches: usize,
}

/// Runs a search to its end in model time.
fn run(
    search: &mut Search,
    owners: &[Behaviour],
    holders: &[Behaviour],
    held: impl Fn(ShortId, usize) -> bool,
) -> Went {
    run_sampled(search, &vec![Sampling::ALL; owners.len()], owners, holders, held)
}

/// As [`run`], where each owner keeps some names.
fn run_sampled(
    search: &mut Search,
    keeps: &[Sampling],
    owners: &[Behaviour],
    holders: &[Behaviour],
    held: impl Fn(ShortId, usize) -> bool,
) -> Went {
    let start = Instant::now();
    let (mut now, mut went, mut out) = (start, Went::default(), 0);
    went.missing.extend(search.take_missing());
    while !search.done() {
        let mut progress = false;
        while let Some(request) = search.next(now) {
            progress = true;
            match request {
                Request::Lookup { ticket, owner, ids } => {
                    assert!(ids.len() <= LOOKUP_BATCH);
                    let n = (0..owners.len()).find(|n| member(*n) == owner).unwrap();
                    went.lookups.push((n, ids.clone()));
                    let sampled: Vec<_> = ShardId::all().map(|shard| (shard, keeps[n])).collect();
                    let names = ids.iter().filter(|id| keeps[n].keeps(**id)).flat_map(|id| {
                        let held = &held;
                        (0..holders.len()).filter(move |h| held(*id, *h)).map(|h| (*id, member(100 + h)))
                    });
                    match owners[n] {
                        Behaviour::Good => {
                            search.on_holders(ticket, &names.collect::<Vec<_>>(), &sampled);
                        }
                        Behaviour::Silent => out += 1,
                        Behaviour::Failing => search.on_failed(ticket),
                        Behaviour::Empty => search.on_holders(ticket, &[], &sampled),
                    }
                }
                Request::Fetch { ticket, holder, ids } => {
                    assert!(ids.len() <= FETCH_BATCH);
                    went.fetches += 1;
                    let n = (0..holders.len()).find(|n| member(100 + *n) == holder).unwrap();
                    match holders[n] {
                        Behaviour::Good => {
                            let news = search.on_pages(ticket, &ids, now);
                            went.found
                                .extend(ids.iter().zip(news).filter(|(_, new)| *new).map(|(id, _)| *id));
                        }
                        Behaviour::Silent => out += 1,
                        Behaviour::Failing => search.on_failed(ticket),
                        Behaviour::Empty => assert!(search.on_pages(ticket, &[], now).is_empty()),
                    }
                }
                Request::TimedOut { .. } => out -= 1,
            }
        }
        went.missing.extend(search.take_missing());
        if !progress && !search.done() {
            let deadline = search.deadline().expect("whatever is open has a deadline");
            assert!(deadline > now, "time goes on");
            now = deadline;
        }
    }
    assert!(out >= 0);
    went.took = now - start;
    went
}

/// The owners of a shard, two in a row.
fn shard_owners(shard: ShardId, owners: usize) -> [(MemberId, Sampling); 2] {
    [all(shard.index() % owners), all((shard.index() + 1) % owners)]
}

/// An owner that keeps every name, as far as is known.
fn all(n: usize) -> (MemberId, Sampling) {
    (member(n), Sampling::ALL)
}

/// Distinct names, spread over the shards.
fn name(n: u64, seed: u64) -> ShortId {
    ShortId((n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ seed)
}

proptest! {
    /// A page is found exactly if an owner that answers is asked and a holder has it and gives it, and each page once. An owner
    /// that answers with nothing is believed: no id is asked of a second owner unless the first failed.
    #[test]
    fn finds_what_can_be_found_and_ends(
        count in 1u64..400,
        owners in prop::collection::vec(behaviour(), 2),
        holders in prop::collection::vec(behaviour(), 1..4),
        salt in any::<u64>(),
    ) {
        let ids: Vec<_> = (0..count).map(|n| ShortId(n << 40)).collect();
        let held = |id: ShortId, holder: usize| (id.0 >> 40 ^ salt) >> holder & 1 == 1;
        let mut search = Search::new(ids.clone(), |_| [all(0), all(1)]);
        let Went { mut found, missing, took, lookups, .. } = run(&mut search, &owners, &holders, held);
        let mut said: Vec<_> = found.iter().chain(&missing).copied().collect();
        said.sort();
        prop_assert_eq!(&said, &ids, "each page is found or missing, once");
        let good = |id: &ShortId| (0..holders.len()).any(|h| holders[h] == Behaviour::Good && held(*id, h));
        let answered_by = |id: &ShortId| {
            let asked = lookups.iter().filter(|(_, ids)| ids.contains(id)).map(|(n, _)| owners[*n]);
            asked.filter(|owner| matches!(owner, Behaviour::Good | Behaviour::Empty)).collect::<Vec<_>>()
        };
        for id in &ids {
            let answers = answered_by(id);
            prop_assert!(answers.len() <= 1, "one answer is enough");
            let somebody_answers = owners.iter().any(|o| matches!(o, Behaviour::Good | Behaviour::Empty));
            prop_assert_eq!(answers.len() == 1, somebody_answers, "whoever fails is replaced");
        }
        // What no owner answers about may be found beside others.
        found.sort();
        prop_assert!(found.windows(2).all(|pair| pair[0] < pair[1]));
        for id in ids {
            let answers = answered_by(&id);
            let is_found = found.contains(&id);
            prop_assert!(is_found || answers != [Behaviour::Good] || !good(&id), "{id:?} can be found");
            prop_assert!(!is_found || (answers != [Behaviour::Empty] && good(&id)), "{id:?} cannot be found");
        }
        prop_assert!(took <= (LOOKUP_TIMEOUT + FETCH_TIMEOUT * 6) * 2, "{took:?}");
    }

}

proptest! {
    // A quarter of a million names each.
    #![proptest_config(ProptestConfig::with_cases(12))]

    /// The promise of the index: with nothing failing, a search asks each owner once, and a few times more for its size.
    #[test]
    fn the_largest_search_asks_few_more_times_than_there_are_owners(owners in 1usize..300, seed in any::<u64>()) {
        let ids: Vec<_> = (0..LOCAL_RESOLVE_IDS as u64).map(|n| name(n, seed)).collect();
        let mut search = Search::new(ids, |shard| shard_owners(shard, owners));
        let went = run(&mut search, &vec![Behaviour::Good; owners], &[], |_, _| false);
        let mut asked: Vec<usize> = went.lookups.iter().map(|(owner, _)| *owner).collect();
        asked.sort_unstable();
        asked.dedup();
        prop_assert!(went.lookups.len() <= asked.len() + 8, "{} lookups at {}", went.lookups.len(), asked.len());
        let names: usize = went.lookups.iter().map(|(_, ids)| ids.len()).sum();
        prop_assert_eq!(names, LOCAL_RESOLVE_IDS, "each id is asked once");
        let mut names = vec![0; owners];
        went.lookups.iter().for_each(|(owner, ids)| names[*owner] += ids.len());
        // With two owners each, both get half of a shard.
        prop_assert!(owners != 2 || names.iter().all(|names| names.abs_diff(LOCAL_RESOLVE_IDS / 2) < 20_000));
    }

}

proptest! {
    /// Of full owners: what a holder has in runs is found by the kept names among them, and of each name an owner is asked that keeps it, as far as is
    /// known.
    #[test]
    fn pages_beside_kept_ones_are_found(
        bits in prop::collection::vec(0u8..6, 4),
        known in any::<bool>(),
        seed in any::<u64>(),
        holders in 1usize..5,
    ) {
        let ids: Vec<_> = (0..8192).map(|n| name(n, seed)).collect();
        let keeps: Vec<Sampling> = bits.iter().map(|bits| Sampling::new(*bits).unwrap()).collect();
        // Each holder has every so many-th run of 2048 pages; the last run nobody has.
        let places: BTreeMap<ShortId, usize> = ids.iter().copied().zip(0..).collect();
        let held = |id: ShortId, holder: usize| {
            let run = places[&id] / 2048;
            run < 3 && run % holders == holder
        };
        let owners = |shard: ShardId| {
            [0, 1].map(|n| (shard.index() + n) % 4).map(|n| {
                (member(n), if known { keeps[n] } else { Sampling::ALL })
            })
        };
        let mut search = Search::new(ids.clone(), owners);
        let went = run_sampled(&mut search, &keeps, &[Behaviour::Good; 4], &vec![Behaviour::Good; holders], held);
        let kept = |id: &ShortId| (0..2).filter(|n| keeps[(ShardId::of(*id).index() + n) % 4].keeps(*id)).count();
        let asked = |id: &ShortId| went.lookups.iter().filter(|(_, ids)| ids.contains(id)).count();
        for id in ids.iter().take(500) {
            prop_assert!(asked(id) <= if known { kept(id).min(1) } else { 2 }, "{id:?}");
            prop_assert!(asked(id) > 0 || kept(id) == 0);
        }
        // A window without a kept page would be missed; with five bits or fewer there is none.
        prop_assert_eq!(went.found.len(), 3 * 2048);
        prop_assert!(went.fetches <= 8192 / FETCH_BATCH + 3 * went.lookups.len() + 60, "{}", went.fetches);
    }
}

#[test]
fn what_is_known_is_not_looked_up_and_the_order_is_kept() {
    let start = Instant::now();
    let ids: Vec<_> = [9, 3, 9, 7, 1, 3].map(ShortId).to_vec();
    let mut search = Search::new(ids, |_| [all(0)]);
    search.known([(ShortId(7), member(1)), (ShortId(77), member(1))]);
    let Some(Request::Lookup { ids, .. }) = search.next(start) else { panic!("a lookup") };
    assert_eq!(ids, [9, 3, 1].map(ShortId));
    let Some(Request::Fetch { ids, .. }) = search.next(start) else { panic!("a fetch") };
    assert_eq!(ids, [ShortId(7)]);
}

#[test]
fn what_a_holder_delivers_is_counted_by_whose_word_it_was_asked() {
    let start = Instant::now();
    let ids: Vec<_> = (0..4).map(ShortId).collect();
    let mut search = Search::new(ids.clone(), |_| [all(0)]);
    search.known([(ids[0], member(7))]);
    search.hearsay([(ids[1], member(7))]);
    let Some(Request::Lookup { ticket, ids: asked, .. }) = search.next(start) else { panic!("a lookup") };
    assert_eq!(asked, ids[2..]);
    search.on_holders(ticket, &[(ids[2], member(7)), (ids[3], member(7))], &[]);
    let Some(Request::Fetch { ticket, ids: asked, .. }) = search.next(start) else { panic!("a fetch") };
    assert_eq!(asked.len(), 4);
    search.on_pages(ticket, &ids[..3], start);
    let said = |owner, asked, delivered| Evidence { holder: member(7), owner, asked, delivered };
    assert_eq!(search.take_evidence(), [said(None, 1, 1), said(Some(member(0)), 2, 1)]);
    assert!(search.take_evidence().is_empty());

    let mut search = Search::new(ids.clone(), |_| []);
    search.known([(ids[0], member(7))]);
    let Some(Request::Fetch { ticket, .. }) = search.next(start) else { panic!("a fetch") };
    search.on_failed(ticket);
    assert!(search.take_evidence().is_empty(), "who does not answer is no liar");
}

#[test]
fn a_doubted_holder_is_asked_last() {
    let start = Instant::now();
    let mut search = Search::new(vec![ShortId(1)], |_| []);
    search.doubt(member(1));
    search.known([(ShortId(1), member(1)), (ShortId(1), member(2))]);
    let Some(Request::Fetch { ticket, holder, .. }) = search.next(start) else { panic!("a fetch") };
    assert_eq!(holder, member(2));
    search.on_pages(ticket, &[], start);
    let Some(Request::Fetch { ticket, holder, .. }) = search.next(start) else { panic!("another") };
    assert_eq!(holder, member(1));
    assert_eq!(search.on_pages(ticket, &[ShortId(1)], start), [true]);
    assert!(search.done());
}

#[test]
fn owners_that_time_out_are_told_of_once_and_not_asked_again() {
    let start = Instant::now();
    let ids: Vec<_> = (0..3 * LOOKUP_BATCH as u64).map(|n| name(n, 0)).collect();
    let mut search = Search::new(ids, |_| [all(0), all(1)]);
    let asked = std::iter::from_fn(|| search.next(start)).count();
    assert_eq!(asked, 4, "each of the two has more than one batch");
    let late = start + LOOKUP_TIMEOUT * 2;
    let told: Vec<_> = std::iter::from_fn(|| search.next(late)).collect();
    let gone = |n| Request::TimedOut { peer: member(n), role: Role::Owner };
    assert!(told.len() == 2 && told.contains(&gone(0)) && told.contains(&gone(1)), "{told:?}");
    assert!(search.done());
}

#[test]
fn a_slow_holder_costs_a_hedge_and_not_its_timeout() {
    let start = Instant::now();
    let mut search = Search::new(vec![ShortId(1)], |_| []);
    search.known([(ShortId(1), member(1)), (ShortId(1), member(2))]);
    let Some(Request::Fetch { holder: first, .. }) = search.next(start) else { panic!("a fetch") };
    assert_eq!(search.next(start), None);
    assert_eq!(search.deadline(), Some(start + FETCH_HEDGE));
    let Some(Request::Fetch { ticket, holder, .. }) = search.next(start + FETCH_HEDGE) else {
        panic!("a hedge")
    };
    assert_ne!(holder, first);
    assert_eq!(search.on_pages(ticket, &[ShortId(1)], start), [true]);
    assert!(search.done());
}

/// The story of a simulated site: a host crashed that alone held a third of a VM, and the VM's lookup asked it for a quarter of an hour.
#[test]
fn a_holder_that_is_gone_is_not_asked_for_all_that_it_held() {
    let alone: Vec<_> = (0..100 * FETCH_BATCH as u64).map(|n| name(n, 0)).collect();
    let both: Vec<_> = (0..100 * FETCH_BATCH as u64).map(|n| name(n, 1 << 40)).collect();
    let mut search = Search::new([alone.clone(), both.clone()].concat(), |_| []);
    let held_by = |ids: &[ShortId], n: usize| ids.iter().map(|id| (*id, member(100 + n))).collect::<Vec<_>>();
    search.known([held_by(&alone, 0), held_by(&both, 0), held_by(&both, 1)].concat());
    let went = run(&mut search, &[], &[Behaviour::Silent, Behaviour::Good], |_, _| false);
    assert_eq!(went.found.len(), both.len(), "the other holder gives what it has");
    assert!(went.took <= FETCH_TIMEOUT, "{:?}", went.took);
    assert!(went.fetches <= 100 + 2 * FETCHES_PER_HOLDER, "{} requests", went.fetches);
}

#[test]
fn a_late_answer_is_taken_once() {
    let start = Instant::now();
    let mut search = Search::new(vec![ShortId(1)], |_| []);
    search.known([(ShortId(1), member(1)), (ShortId(1), member(2))]);
    let Some(Request::Fetch { ticket: slow, .. }) = search.next(start) else { panic!("a fetch") };
    let Some(Request::Fetch { ticket: quick, .. }) = search.next(start + FETCH_HEDGE) else {
        panic!("a hedge")
    };
    assert_eq!(search.on_pages(slow, &[ShortId(1)], start), [true]);
    assert_eq!(search.on_pages(quick, &[ShortId(1)], start), [false]);
}

#[test]
fn nobody_to_ask_is_the_end() {
    let mut search = Search::new(vec![ShortId(1), ShortId(1)], |_| []);
    assert_eq!(search.next(Instant::now()), None);
    assert!(search.done());
    assert_eq!(search.deadline(), None);
}

#[test]
fn pages_that_several_hold_are_asked_of_all_of_them() {
    let start = Instant::now();
    let ids: Vec<_> = (0..100).map(ShortId).collect();
    let mut search = Search::new(ids.clone(), |_| []);
    search.known(ids.iter().flat_map(|id| [(*id, member(1)), (*id, member(2))]));
    for _ in 0..2 {
        let Some(Request::Fetch { ids, .. }) = search.next(start) else { panic!("a fetch") };
        assert_eq!(ids.len(), 50);
    }
    assert_eq!(search.next(start), None);
}

#[test]
fn a_holder_that_is_quick_is_slow_sooner() {
    let start = Instant::now();
    let ids: Vec<_> = (0..FETCH_BATCH as u64 * 40).map(ShortId).collect();
    let mut search = Search::new(ids.clone(), |_| []);
    search.known(ids.iter().flat_map(|id| [(*id, member(1)), (*id, member(2))]));
    for _ in 0..30 {
        let Some(Request::Fetch { ticket, ids, .. }) = search.next(start) else { panic!("a fetch") };
        search.on_pages(ticket, &ids, start + FETCH_HEDGE_LEAST / 50);
    }
    let Some(Request::Fetch { .. }) = search.next(start) else { panic!("one more") };
    assert_eq!(search.deadline(), Some(start + FETCH_HEDGE_LEAST));
}

/// What an owner was slow to say of a page that another one knew nothing of is of no use any more once the page was called missing.
#[test]
fn a_page_that_was_called_missing_stays_missing() {
    let (start, id) = (Instant::now(), ShortId(5));
    let mut search = Search::new(vec![id], |_| [all(0), all(1)]);
    assert!(matches!(search.next(start), Some(Request::Lookup { .. })), "the first owner, which is slow");
    assert_eq!(search.take_missing(), []);
    let late = search.deadline().unwrap();
    assert!(matches!(search.next(late), Some(Request::TimedOut { .. })));
    let Some(Request::Lookup { ticket, .. }) = search.next(late) else { panic!("the other owner is asked") };
    assert_eq!(search.take_missing(), [], "there is one left to ask");
    search.on_holders(ticket, &[], &[]);
    assert_eq!(search.take_missing(), [id]);
    assert!(search.done());
    search.hearsay([(id, member(7))]);
    assert_eq!(search.next(late), None);
    assert!(search.done() && search.take_missing().is_empty());
}

/// A page whose last holder does not have it is missing while others of the search are still on their way.
#[test]
fn a_page_is_called_missing_before_the_search_ends() {
    let now = Instant::now();
    let mut search = Search::new(vec![ShortId(1), ShortId(2)], |_| [all(0)]);
    search.known([(ShortId(1), member(1)), (ShortId(2), member(2))]);
    assert_eq!(search.take_missing(), []);
    let requests: Vec<_> = std::iter::from_fn(|| search.next(now)).collect();
    for request in requests {
        if let Request::Fetch { ticket, holder, .. } = request
            && holder == member(1)
        {
            search.on_pages(ticket, &[], now);
        }
    }
    assert_eq!(search.take_missing(), [ShortId(1)]);
    assert!(!search.done());
}
