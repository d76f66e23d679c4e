//! The site is stale, slow, silent, late or lies. That costs time, and changes nothing else.

use tern_tests::world::{Options, Story, run_many};

const SEEDS: u64 = 1000;

#[test]
fn no_seed_breaks_a_rule() {
    let total = run_many(Some(Story::BadSite), 0, SEEDS, Options::default())
        .unwrap_or_else(|violation| panic!("{violation}"));
    assert_eq!((total.moved, total.attempts), (SEEDS, SEEDS), "every VM moves at the first attempt");
}
