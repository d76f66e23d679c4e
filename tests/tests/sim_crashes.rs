//! Processes are killed at any message, local actions fail or hang, operators cancel and resolve, connections are lost.

use tern_tests::world::{Options, Story, run_many};

const SEEDS: u64 = 1000;

#[test]
fn no_seed_breaks_a_rule() {
    let total = run_many(Some(Story::Crashes), 0, SEEDS, Options::default())
        .unwrap_or_else(|violation| panic!("{violation}"));
    assert!(total.moved > SEEDS / 2 && total.moved < SEEDS, "some VMs die with their host: {total:?}");
}
