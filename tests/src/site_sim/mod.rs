//! Sites of 3 to 10,000 hosts in virtual time, with the real shards, owners' tables, announcer, membership and search of `dht`, no
//! sockets, and one seed that replays a run.
//!
//! `site-sim` runs all sizes and scenarios and writes docs/site-simulation.md and .svg; `tests/tests/site_sim.rs` runs a short one.
//!
//! What is real: which peers own which shard, what is announced to whom and when, leases and renewals, sampling, which owners and
//! holders a lookup asks, in which batches, with which time-outs, whom it skips and avoids. What is modelled: the LAN (`net`), Kademlia's
//! queries (`views`), what hosts hold (`content`), and the drivers, which do what `dht`'s tasks do (`world`, `asker`).
//!
//! How it is scaled, so that a site of 10,000 hosts with 64 GiB each fits in memory and the figures stay true:
//! - A looked-up VM and all that the site holds of it are there in full: messages, bytes, round trips, hits and times of a lookup are
//!   counted as they are.
//! - All other content is thinned: a background name stands for many, and counts as that many.
//! - In a large site one host in `stride` is simulated with content and stands for as many; all hosts are members, own shards, crash and
//!   join. Hosts without content own shards when it is their turn.

mod asker;
mod content;
pub mod filters;
mod measure;
mod net;
mod peer;
pub mod plot;
mod scenario;
pub mod table;
mod views;
mod world;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

pub use measure::Figures;
pub use scenario::Scenario;

use self::{
    asker::Lookup,
    content::{Holding, IMAGE_HOSTS, SIBLING_HOSTS, VMS},
    measure::{ENTRY_BYTES, Looked, mean},
    peer::{Conduct, Mind},
    scenario::{CUT_US, END_US, HEALED_US, MEASURE_US, SECOND},
    world::{Event, World},
};
use crate::rng::Rng;
use dht::shard::ShardId;

/// How much is simulated.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Replays a run.
    pub seed: u64,
    /// Hosts with content at most.
    pub announcers: usize,
    /// Background names of a host.
    pub background_names: u64,
    /// Lookups of a VM.
    pub lookups: usize,
}

impl Options {
    /// What the figures in docs/ were made with.
    #[must_use]
    pub fn full(seed: u64) -> Self {
        Self { seed, announcers: 128, background_names: 2048, lookups: 12 }
    }

    /// What takes seconds.
    #[must_use]
    pub fn quick(seed: u64) -> Self {
        Self { seed, announcers: 40, background_names: 1024, lookups: 4 }
    }
}

/// Hosts that VMs arrive at.
const ASKERS: usize = 6;

/// Runs one scenario in a site of `peers`.
///
/// # Panics
/// If `peers` is below 3: there is nobody to ask then.
#[must_use]
pub fn run(peers: usize, scenario: Scenario, options: Options) -> Figures {
    assert!(peers >= 3, "a site of {peers} has no two others");
    let stride = peers.div_ceil(options.announcers).max(1);
    let mut rng = Rng::new(options.seed);
    // Each size and scenario its own chances, from the one seed.
    for _ in 0..peers % 101 + scenario as usize * 7 {
        rng.next();
    }
    let mut world = World::new(peers, scenario, stride, options.background_names, rng);
    build(&mut world, options);
    world.run();
    figures(&world)
}

/// Runs all `sizes` and `scenarios` on all cores.
///
/// # Panics
/// As [`run`] does.
#[must_use]
pub fn run_all(sizes: &[usize], scenarios: &[Scenario], options: Options) -> Vec<Figures> {
    let runs: Vec<_> =
        sizes.iter().flat_map(|size| scenarios.iter().map(move |what| (*size, *what))).collect();
    let (next, done) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let work = || {
        // The largest first, so that no core waits for one at the end.
        while let Some((size, scenario)) =
            runs.len().checked_sub(1 + next.fetch_add(1, Ordering::Relaxed)).map(|at| runs[at])
        {
            let figures = run(size, scenario, options);
            done.lock().expect("nothing panics while it holds this lock").push(figures);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(work);
        }
    });
    let mut all = done.into_inner().expect("nothing panics while it holds this lock");
    all.sort_by_key(|figures| (figures.peers, figures.scenario));
    all
}

/// Peers, what they hold and how they behave; and when VMs arrive where.
fn build(world: &mut World, options: Options) {
    let hosts: Vec<usize> = (0..world.size).step_by(world.stride).collect();
    let askers = ASKERS.min(hosts.len().div_ceil(3));
    let (asking, holding) = hosts.split_at(askers);
    let mut held = vec![Holding::default(); world.size];
    for (n, host) in holding.iter().enumerate() {
        held[*host].image = (n as u64).is_multiple_of(IMAGE_HOSTS);
    }
    for vm in 0..VMS {
        for _ in 0..SIBLING_HOSTS.min(holding.len()) {
            let host = world.rng.pick(holding);
            held[host].sibling.push(vm);
        }
        if content::returns(vm) {
            let host = world.rng.pick(holding);
            held[host].retained.push(vm);
        }
    }
    let mut conducts = conducts(world, holding);
    for (number, holding) in held.into_iter().enumerate() {
        let conduct = conducts.remove(&number).unwrap_or(Conduct::Honest);
        world.join(conduct, holding);
    }
    world.distances.fill(&world.peers);
    for number in &hosts {
        world.settle(*number);
    }
    if world.is_mesh() {
        world.connect_all();
    }
    world.askers = asking.to_vec();
    let (from, to) = match world.scenario {
        // From the cut to a minute after the healing.
        Scenario::Partition => (CUT_US + SECOND, HEALED_US + 60 * SECOND),
        Scenario::Steady | Scenario::Churn | Scenario::Slow | Scenario::Lying => (MEASURE_US, END_US),
    };
    for n in 0..options.lookups {
        let at = from + (to - from) * n as u64 / options.lookups as u64;
        let asker = asking[n % asking.len()];
        let lookup = Lookup { asker, vm: n as u64 / 2 % VMS, search: None, wake_us: None };
        world.lookups.push(lookup);
        world.looked.push(Looked::default());
        world.at(at, Event::Look { lookup: n });
    }
}

/// Who misbehaves: the shares that the scenario has, at least one of each where the site is large enough to bear it.
fn conducts(world: &mut World, holding: &[usize]) -> std::collections::BTreeMap<usize, Conduct> {
    let (kinds, percent): (&[Conduct], usize) = match world.scenario {
        Scenario::Steady | Scenario::Churn | Scenario::Partition => (&[], 0),
        Scenario::Slow => (&[Conduct::Slow, Conduct::Silent], 5),
        Scenario::Lying => (&[Conduct::WrongBytes, Conduct::FalseNames], 2),
    };
    let mut conducts = std::collections::BTreeMap::new();
    if kinds.is_empty() {
        return conducts;
    }
    // Among hosts with content the share is exact, and one of each is there; the first of these holds the image.
    let least = kinds.len().min(holding.len() - 1);
    let count = (holding.len() * percent / 100).max(least);
    let step = holding.len() / count;
    for n in 0..count {
        conducts.insert(holding[n * step], kinds[n % kinds.len()]);
    }
    for number in (0..world.size).filter(|number| !number.is_multiple_of(world.stride)) {
        if world.rng.chance(percent as u64) {
            conducts.insert(number, kinds[number % kinds.len()]);
        }
    }
    conducts
}

fn figures(world: &World) -> Figures {
    let looked = &world.looked;
    let count = looked.len() as f64;
    let per_vm = |value: &dyn Fn(&Looked) -> u64| mean(looked.iter().map(|l| value(l) as f64).sum(), count);
    let hit = |l: &Looked| 100.0 * mean(l.found as f64, l.held as f64);
    let with_held = || looked.iter().filter(|l| l.held > 0);
    let scale = (world.content.background_weight * world.stride as u64) as f64;
    let minds = || world.peers.iter().filter(|peer| peer.alive).filter_map(|peer| peer.mind.as_deref());
    let entries: Vec<f64> = minds().map(|mind| mind.background.len() as f64 * scale).collect();
    let owners = entries.iter().filter(|entries| **entries > 0.0).count();
    let (all, most) = (entries.iter().sum::<f64>(), entries.iter().copied().fold(0.0, f64::max));
    let owning = || minds().filter(|mind| !mind.background.is_empty());
    let bits = |mind: &Mind, shard| f64::from(mind.background.sampling(shard).zero_bits());
    // Of the shards that each owns.
    let owned = |mind: &Mind| {
        let owned = ShardId::all()
            .filter(|shard| mind.membership.shards().owners(*shard).contains(&mind.membership.me()));
        owned.map(|shard| bits(mind, shard)).collect::<Vec<_>>()
    };
    let bits: Vec<f64> = owning().flat_map(owned).collect();
    let (sums, hosts) = (&world.sums, world.size as f64);
    let seconds = ((END_US - MEASURE_US) / SECOND) as f64;
    let announced = mean(sums.announce_messages as f64, sums.announcer_seconds as f64);
    Figures {
        peers: world.size,
        scenario: world.scenario,
        sampled_bits: mean(bits.iter().sum(), bits.len() as f64),
        most_sampled_bits: bits.iter().copied().fold(0.0, f64::max),
        lookups: looked.len(),
        hit_percent: mean(with_held().map(hit).sum(), with_held().count() as f64),
        worst_hit_percent: with_held().map(hit).fold(100.0, f64::min),
        requests: per_vm(&|l| l.requests),
        owners_asked: per_vm(&|l| l.owners.len() as u64),
        index_bytes: per_vm(&|l| l.index_bytes),
        index_ms: per_vm(&|l| l.index_us) / 1000.0,
        answer_ms: per_vm(&|l| l.answer_us) / 1000.0,
        fetches: per_vm(&|l| l.fetches),
        connections: per_vm(&|l| l.connections),
        timeouts: per_vm(&|l| l.timeouts),
        wrong_pages: per_vm(&|l| l.wrong_pages),
        wrong_accepted: world.wrong_accepted,
        unended: looked.iter().filter(|l| !l.ended).count(),
        owners,
        index_bytes_per_host: all * ENTRY_BYTES / hosts,
        index_bytes_worst_host: most * ENTRY_BYTES,
        entries_worst_host: most,
        announce_bytes_per_s: mean(sums.announce_bytes as f64, sums.announcer_seconds as f64),
        announce_messages_per_s: announced,
        heard_per_s: mean(announced * hosts, owners as f64),
        rehomed_bytes_per_min: sums.rehomed_bytes as f64 * world.stride as f64 / hosts / seconds * 60.0,
        kademlia_messages_per_s: mean(sums.kademlia_messages as f64, sums.mind_seconds as f64),
        kademlia_bytes_per_s: mean(sums.kademlia_bytes as f64, sums.mind_seconds as f64),
    }
}
