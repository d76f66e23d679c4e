//! Connections are lost at any message, for a moment or for minutes. Both hosts live, so in the end every VM has moved.

use tern_tests::world::{Options, Story, run_many};

const SEEDS: u64 = 1000;

#[test]
fn no_seed_breaks_a_rule() {
    let total = run_many(Some(Story::Lossy), 0, SEEDS, Options::default())
        .unwrap_or_else(|violation| panic!("{violation}"));
    assert_eq!(total.moved, SEEDS, "every VM moves in the end");
    assert!(total.attempts > SEEDS, "some attempts are given up");
    assert!(total.resumes > SEEDS / 4, "many go on where they stopped: {total:?}");
}
