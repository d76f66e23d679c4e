//! A short simulation of sites: what must hold at every size, whatever happens to the site.

use tern_tests::site_sim::{Figures, Options, Scenario, run_all};

#[test]
fn sites_find_what_they_hold_and_nothing_is_wrong_or_endless() {
    let seed = 3;
    let all = run_all(&[3, 40], &Scenario::ALL, Options::quick(seed));
    for figures in &all {
        let Figures { peers, scenario, .. } = figures;
        let what = format!("{peers} peers, {scenario:?}, seed {seed}: {figures:#?}");
        assert_eq!((figures.wrong_accepted, figures.unended), (0, 0), "{what}");
        assert!(figures.owners_asked <= 512.0 && figures.lookups == 4, "{what}");
        let least = match scenario {
            Scenario::Steady => 98.0,
            Scenario::Slow | Scenario::Lying | Scenario::Churn => 80.0,
            // Cut off alone, one of three may look before it has noticed that the site is whole again.
            Scenario::Partition if *peers < 20 => 0.0,
            Scenario::Partition => 40.0,
        };
        assert!(figures.hit_percent >= least, "{what}");
    }
}

#[test]
fn one_seed_is_one_run() {
    let run = || {
        let all = run_all(&[20], &[Scenario::Churn, Scenario::Lying], Options::quick(11));
        serde_json::to_string(&all).unwrap()
    };
    assert_eq!(run(), run());
}
