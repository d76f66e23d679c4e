//! One seed is one run, step by step.

use tern_tests::world::{Options, Story, run};

#[test]
fn a_seed_replays() {
    for seed in 0..20 {
        let go = || run(seed, Story::of_seed(seed), Options::default()).map(|summary| format!("{summary:?}"));
        assert_eq!(go(), go(), "seed {seed}");
    }
}
