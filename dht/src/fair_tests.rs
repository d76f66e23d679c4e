//! Fairness against floods, and bounds against anything.

use proptest::prelude::*;

use super::*;

const BOUNDS: Bounds = Bounds {
    waiting_each: Load { requests: 8, bytes: 800 },
    waiting: Load { requests: 16, bytes: 1600 },
    working_each: Load { requests: 2, bytes: 200 },
    working: Load { requests: 3, bytes: 300 },
};

#[derive(Clone, Debug)]
enum Step {
    Offer(u8, usize),
    Next,
    /// Ends one of those that are worked on.
    Done(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0u8..5, 1usize..150).prop_map(|(from, bytes)| Step::Offer(from, bytes)),
        2 => Just(Step::Next),
        1 => any::<usize>().prop_map(Step::Done),
    ]
}

/// One request may exceed a bound of bytes alone; two may not.
fn within(load: Load, bound: Load) -> bool {
    load.requests <= bound.requests && (load.requests <= 1 || load.bytes <= bound.bytes)
}

proptest! {
    /// Whatever comes in whatever order, no bound is exceeded, and every request ends exactly once: refused or served.
    #[test]
    fn bounds_hold_and_nothing_is_lost(steps in prop::collection::vec(step(), 1..200)) {
        let mut fair = Fair::new(BOUNDS);
        let (mut offered, mut ended, mut working) = (0usize, Vec::new(), Vec::new());
        for step in steps {
            match step {
                Step::Offer(from, bytes) => {
                    ended.extend(fair.offer(from, bytes, offered).into_iter().map(|refused| refused.item));
                    offered += 1;
                }
                Step::Next => working.extend(fair.take().map(|turn| {
                    ended.push(turn.item);
                    (turn.from, turn.bytes)
                })),
                Step::Done(which) if !working.is_empty() => {
                    let (from, bytes) = working.swap_remove(which % working.len());
                    fair.done(&from, bytes);
                }
                Step::Done(_) => {}
            }
            prop_assert!(within(fair.waiting(), BOUNDS.waiting) && within(fair.working(), BOUNDS.working));
            for requester in fair.requesters.values() {
                prop_assert!(within(requester.waits, BOUNDS.waiting_each));
                prop_assert!(within(requester.works, BOUNDS.working_each));
            }
        }
        for (from, bytes) in working {
            fair.done(&from, bytes);
        }
        while let Some(turn) = fair.take() {
            ended.push(turn.item);
            fair.done(&turn.from, turn.bytes);
        }
        ended.sort_unstable();
        prop_assert_eq!(ended, (0..offered).collect::<Vec<_>>());
        prop_assert!(fair.requesters.is_empty() && fair.waiting() == Load::default());
    }

    /// However much some ask, one that asks little is neither refused nor made to wait for more than one turn of each other.
    #[test]
    fn a_flood_starves_nobody(
        floods in prop::collection::vec((1u8..4, 1usize..150), 1..100),
        bytes in 1usize..100,
    ) {
        let mut fair = Fair::new(BOUNDS);
        let serve_one = |fair: &mut Fair<u8, ()>| {
            let turn = fair.take();
            turn.inspect(|turn| fair.done(&turn.from, turn.bytes)).map(|turn| turn.from)
        };
        for (from, bytes) in floods {
            fair.offer(from, bytes, ());
            // Some of it has been served by then.
            if bytes % 3 == 0 {
                serve_one(&mut fair);
            }
        }
        let refused = fair.offer(0, bytes, ());
        prop_assert!(refused.iter().all(|refused| refused.from != 0), "the one that asks little was refused");
        let waited = (0..).take_while(|_| serve_one(&mut fair) != Some(0)).count();
        prop_assert!(waited <= 3, "{waited} turns of three others came first");
    }

    /// Two that always have something waiting are served the same bytes, up to one request, whatever the sizes of theirs.
    #[test]
    fn bytes_are_shared_evenly(small in 1usize..50, large in 50usize..200) {
        let mut fair = Fair::new(BOUNDS);
        let mut served = [0usize; 2];
        for _ in 0..200 {
            fair.offer(0u8, small, ());
            fair.offer(1u8, large, ());
            let Some(turn) = fair.take() else { continue };
            served[usize::from(turn.from)] += turn.bytes;
            fair.done(&turn.from, turn.bytes);
        }
        prop_assert!(served[0].abs_diff(served[1]) <= 2 * large, "{served:?}");
    }
}

/// A requester that asked again as soon as it was answered was forgotten in between, and so was first for ever.
#[test]
fn whoever_asks_anew_at_once_is_not_always_first() {
    let mut fair = Fair::new(BOUNDS);
    assert!(fair.offer(1, 100, ()).is_empty());
    let turns = (0..3).map(|_| {
        assert!(fair.offer(0, 10, ()).is_empty());
        let turn = fair.take().unwrap();
        fair.done(&turn.from, turn.bytes);
        turn.from
    });
    assert_eq!(turns.collect::<Vec<_>>(), [0, 1, 0]);
}

#[test]
fn whoever_reads_no_answers_is_not_served_more_and_others_are() {
    let mut fair = Fair::new(BOUNDS);
    for n in 0..8 {
        assert!(fair.offer("deaf", 100, n).is_empty());
    }
    assert_eq!(fair.offer("deaf", 100, 8)[0].why, Refusal::Share);
    assert_eq!([fair.take(), fair.take()].map(|turn| turn.unwrap().from), ["deaf"; 2]);
    assert!(fair.take().is_none(), "two of its answers are under way");
    assert!(fair.offer("other", 100, 0).is_empty());
    assert_eq!(fair.take().unwrap().from, "other");
}

#[test]
fn when_all_room_is_taken_the_newest_of_whoever_has_most_goes() {
    let mut fair = Fair::new(BOUNDS);
    for from in ["a", "b"] {
        (0..8).for_each(|n| assert!(fair.offer(from, 10, n).is_empty()));
    }
    let refused = fair.offer("c", 10, 0).pop().unwrap();
    assert!(["a", "b"].contains(&refused.from) && refused.item == 7 && refused.why == Refusal::Full);
    assert_eq!(fair.waiting().requests, 16);
}
