//! A search against a model site whose peers answer, fail, lie, or never answer.

use std::time::Duration;

use proptest::prelude::*;

use super::*;

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

/// Runs a search to its end in model time. Returns the ids found, in order, and how long it took.
fn run(
    search: &mut Search,
    owners: &[Behaviour],
    holders: &[Behaviour],
    held: impl Fn(ShortId, usize) -> bool,
) -> (Vec<ShortId>, Duration) {
    let start = Instant::now();
    let (mut now, mut found, mut out) = (start, Vec::new(), 0);
    while !search.done() {
        let mut progress = false;
        while let Some(request) = search.next(now) {
            progress = true;
            match request {
                Request::Lookup { ticket, owner, ids } => {
                    let n = (0..owners.len()).find(|n| member(*n) == owner).unwrap();
                    let names = ids.iter().flat_map(|id| {
                        let held = &held;
                        (0..holders.len()).filter(move |h| held(*id, *h)).map(|h| (*id, member(100 + h)))
                    });
                    match owners[n] {
                        Behaviour::Good => search.on_holders(ticket, &names.collect::<Vec<_>>()),
                        Behaviour::Silent => out += 1,
                        Behaviour::Failing => search.on_failed(ticket),
                        Behaviour::Empty => search.on_holders(ticket, &[]),
                    }
                }
                Request::Fetch { ticket, holder, ids } => {
                    assert!(ids.len() <= FETCH_BATCH);
                    let n = (0..holders.len()).find(|n| member(100 + *n) == holder).unwrap();
                    match holders[n] {
                        Behaviour::Good => {
                            let news = search.on_pages(ticket, &ids);
                            found.extend(ids.iter().zip(news).filter(|(_, new)| *new).map(|(id, _)| *id));
                        }
                        Behaviour::Silent => out += 1,
                        Behaviour::Failing => search.on_failed(ticket),
                        Behaviour::Empty => assert!(search.on_pages(ticket, &[]).is_empty()),
                    }
                }
                Request::TimedOut { .. } => out -= 1,
            }
        }
        if !progress && !search.done() {
            let deadline = search.deadline().expect("whatever is open has a deadline");
            assert!(deadline > now, "time goes on");
            now = deadline;
        }
    }
    assert!(out >= 0);
    (found, now - start)
}

proptest! {
    /// A page is found exactly if an owner that answers is asked and a holder has it and gives it, and each page once.
    #[test]
    fn finds_what_can_be_found_and_ends(
        count in 1u64..400,
        owners in prop::collection::vec(behaviour(), 2),
        holders in prop::collection::vec(behaviour(), 1..4),
        salt in any::<u64>(),
    ) {
        let ids: Vec<_> = (0..count).map(|n| ShortId(n << 40)).collect();
        let held = |id: ShortId, holder: usize| (id.0 >> 40 ^ salt) >> holder & 1 == 1;
        let mut search = Search::new(ids.clone(), |_| [member(0), member(1)]);
        let (mut found, took) = run(&mut search, &owners, &holders, held);
        let good = |id: &ShortId| (0..holders.len()).any(|h| holders[h] == Behaviour::Good && held(*id, h));
        let answered = owners.contains(&Behaviour::Good);
        let expected: Vec<_> = ids.into_iter().filter(|id| answered && good(id)).collect();
        found.sort();
        prop_assert_eq!(found, expected);
        prop_assert!(took <= LOOKUP_TIMEOUT + FETCH_TIMEOUT * 12, "{took:?}");
    }
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
    assert_eq!(search.on_pages(ticket, &[ShortId(1)]), [true]);
    assert!(search.done());
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
    assert_eq!(search.on_pages(slow, &[ShortId(1)]), [true]);
    assert_eq!(search.on_pages(quick, &[ShortId(1)]), [false]);
}

#[test]
fn nobody_to_ask_is_the_end() {
    let search = Search::new(vec![ShortId(1), ShortId(1)], |_| []);
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
