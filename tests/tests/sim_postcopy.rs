//! The VM moves before its memory does, and much has to follow: connections are lost, the source dies, the site lies. Where the source lives, all of
//! memory comes; where it does not, the VM stops at what nobody gives, and never reads a wrong page.

use tern_tests::world::{Options, Story, run_many};

const SEEDS: u64 = 1000;

#[test]
fn no_seed_breaks_a_rule() {
    let total = run_many(Some(Story::Postcopy), 0, SEEDS, Options::default())
        .unwrap_or_else(|violation| panic!("{violation}"));
    assert!(total.moved > SEEDS / 2, "most VMs move: {total:?}");
    assert!(total.postcopies > SEEDS / 2, "most by post-copy: {total:?}");
    assert!(total.faults > SEEDS && total.reconnects > SEEDS / 10, "with trouble in it: {total:?}");
    assert!(total.starved > SEEDS / 100, "some lose their source: {total:?}");
}
