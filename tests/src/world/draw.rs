//! A world, drawn from its seed.

use std::collections::BTreeMap;

use migration_proto::timer::Time;
use migration_proto::{Mode, Span};

use super::{Event, Options, Story, World};
use crate::check::Checker;
use crate::destination_host::DestinationHost;
use crate::faults::Faults;
use crate::guest::{self, Guest};
use crate::net::{self, Net};
use crate::rng::Rng;
use crate::site::Site;
use crate::source_host::{SourceHost, Terms};
use crate::spill_host::SpillHost;

impl World {
    pub(super) fn new(seed: u64, story: Story, options: Options) -> Self {
        let mut rng = Rng::new(seed);
        let layout = guest::draw_layout(&mut rng);
        let habits = match story {
            Story::Clean | Story::Lossy | Story::Crashes | Story::BadSite | Story::All => {
                guest::Habits::draw(&mut rng)
            }
            Story::Postcopy => guest::Habits::draw_busy(&mut rng),
        };
        let guest = Guest::new(&mut rng, layout.clone(), habits);
        let net = Net::new(net::Habits::draw(&mut rng));
        let site = match story {
            Story::Clean | Story::Lossy | Story::Crashes => Site::good(&mut rng),
            Story::BadSite | Story::All => Site::bad(&mut rng),
            Story::Postcopy if rng.chance(50) => Site::good(&mut rng),
            Story::Postcopy => Site::bad(&mut rng),
        };
        let faults = match story {
            Story::Clean | Story::BadSite => Faults::none(),
            Story::Lossy => Faults::lossy(&mut rng),
            Story::Crashes | Story::All => Faults::crashes(&mut rng),
            Story::Postcopy => Faults::postcopy(&mut rng),
        };
        let downtime = Span(rng.spread(1_000, 1_000_000));
        let mode = match story {
            Story::Clean | Story::Lossy | Story::Crashes | Story::BadSite | Story::All => {
                rng.pick(&[Mode::Precopy, Mode::Hybrid, Mode::Hybrid, Mode::Postcopy])
            }
            Story::Postcopy => rng.pick(&[Mode::Hybrid, Mode::Postcopy]),
        };
        let spills = rng.chance(if story == Story::Postcopy { 50 } else { 20 });
        let resume_for = match story {
            Story::Clean | Story::BadSite => Span(0),
            Story::Lossy | Story::Crashes | Story::All | Story::Postcopy => {
                Span(rng.pick(&[0, 1_000_000, 60_000_000, 300_000_000, 300_000_000]))
            }
        };
        let mut world = Self {
            source: SourceHost::new(seed, guest, Terms { downtime, mode, spills, resume_for }),
            destination: DestinationHost::new(&layout),
            spill: SpillHost::default(),
            destination_postcopy: story == Story::Postcopy || rng.chance(90),
            rng,
            now: Time(0),
            events: BTreeMap::new(),
            next_event: 0,
            steps: 0,
            net,
            must_succeed: faults.is_empty(),
            faults,
            waiting: Vec::new(),
            site,
            layout,
            check: Checker::default(),
            operator_waits: false,
            postcopies: 0,
            fault_count: 0,
            starved: 0,
            resumes: 0,
            options,
        };
        for (at, fault) in world.faults.timed() {
            world.schedule(at, Event::Fault(fault));
        }
        world.schedule(Time(0), Event::Burst);
        world.schedule(Time(0), Event::Begin);
        world
    }
}
