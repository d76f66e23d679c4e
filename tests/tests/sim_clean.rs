//! Nothing goes wrong: a guest that writes, a link on which channels overtake each other, and a site that answers. Every VM moves at the
//! first attempt, with the bytes that it had at its pause.

use tern_tests::world::{Options, Story, run_many};

const SEEDS: u64 = 1000;

#[test]
fn no_seed_breaks_a_rule() {
    let total = run_many(Some(Story::Clean), 0, SEEDS, Options::default())
        .unwrap_or_else(|violation| panic!("{violation}"));
    assert_eq!((total.moved, total.attempts), (SEEDS, SEEDS), "every VM moves at the first attempt");
}
