//! The VM at the destination: memory with absent frames as userfaultfd makes them, and virtual CPUs that read, write and wait. Every page that it
//! reads is compared with what it must find there.

use std::collections::BTreeSet;

use migration_proto::limits::FAULT_LIMIT;
use migration_proto::timer::Time;
use migration_proto::{Layout, Span};
use page::{Gfn, PageHash, PageSet};

use crate::guest::{self, Image};
use crate::mutation::Mutation;
use crate::palette::{CONTENTS, Content};
use crate::world::{Event, World};

/// Virtual CPUs of the model VM.
const CPUS: usize = 3;
/// Pages that one of them touches in a burst, at most.
const TOUCHES: u64 = 6;
/// Percent of touches that go to an absent frame: a real guest has more memory, and finds them by itself.
const TO_ABSENT: u64 = 20;
/// Percent of touches that write.
const WRITES: u64 = 40;

/// What stands at an absent frame: no content that there is.
const NOTHING: Content = CONTENTS;

/// Memory of a VM that comes or has come.
#[derive(Debug)]
pub(crate) struct Memory {
    pub(crate) image: Image,
    pub(crate) absent: BTreeSet<Gfn>,
    marked: bool,
}

impl Memory {
    pub(crate) fn zeroed(layout: &Layout) -> Self {
        Self { image: guest::zeroed(layout), absent: BTreeSet::new(), marked: false }
    }

    pub(crate) fn read(&self, gfn: Gfn) -> Content {
        self.image[guest::place(gfn)]
    }

    fn mark(&mut self, absent: &PageSet) {
        self.marked = true;
        for gfn in absent.iter() {
            self.absent.insert(gfn);
            self.image[guest::place(gfn)] = NOTHING;
        }
    }

    /// Writes a page from outside the VM; false if there is one that the VM may have written.
    fn write(&mut self, gfn: Gfn, content: Content) -> bool {
        let may = !self.marked || self.absent.remove(&gfn);
        if may {
            self.image[guest::place(gfn)] = content;
        }
        may
    }
}

/// The virtual CPUs, once they have begun to run.
#[derive(Debug)]
pub(crate) struct Arrived {
    /// What the VM must find.
    truth: Image,
    frames: Vec<Gfn>,
    /// What each virtual CPU waits for, and since when.
    waits: [Option<(Gfn, Time)>; CPUS],
    /// Paused because nobody gives a page, since when.
    starved: Option<Time>,
}

impl Arrived {
    pub(crate) fn new(layout: &Layout, truth: Image) -> Self {
        let frames = (0..layout.page_bound()).map(Gfn).filter(|gfn| layout.has(gfn.region())).collect();
        Self { truth, frames, waits: [None; CPUS], starved: None }
    }
}

impl World {
    /// Frames become absent, before the state is loaded.
    pub(crate) fn mark_absent(&mut self, absent: &PageSet) {
        self.postcopies += 1;
        if self.mutated(Mutation::RunsBeforeAbsent) {
            // They keep what stood there before.
            self.destination.memory.marked = true;
            return;
        }
        self.destination.memory.mark(absent);
        // Loading some of the state touches memory.
        if self.rng.chance(20) {
            let touched = absent.iter().nth(self.rng.index(absent.len().try_into().unwrap_or(1)));
            let after = Span(self.rng.spread(1, 10_000));
            if let Some(gfn) = touched {
                let job = crate::destination_host::DestinationJob::Touched(gfn);
                self.destination_job_after(after, job);
            }
        }
    }

    pub(crate) fn state_touches(&mut self, gfn: Gfn) {
        let absent = self.destination.memory.absent.contains(&gfn);
        self.tell_fault(gfn, absent);
    }

    fn tell_fault(&mut self, gfn: Gfn, absent: bool) {
        let now = self.now;
        let mut waits = None;
        self.tell_destination(|machine| waits = Some(machine.fault(now, gfn)));
        let over = self.destination.discarded();
        self.check.require(over || waits == Some(absent), || {
            format!("a touch of {gfn}: the core says that its page is awaited: {waits:?}, but it is absent: {absent}")
        });
    }

    /// Installs a page that the core gave out.
    pub(crate) fn install(&mut self, frames: &[Gfn], content: Content) {
        for gfn in frames {
            self.put(*gfn, content);
        }
    }

    /// Writes one page from outside the VM, and wakes who waits for it.
    pub(crate) fn put(&mut self, gfn: Gfn, content: Content) {
        if self.destination.memory.marked && !self.faults.is_empty() && self.rng.chance(1) {
            return self.cannot_put(gfn);
        }
        self.check.written(gfn, content);
        let over_absent = self.mutated(Mutation::RunsBeforeAbsent) && self.destination.memory.marked;
        let written = over_absent || self.destination.memory.write(gfn, content);
        self.check.require(written, || format!("a page was installed at {gfn}, where one stood already"));
        self.wake(gfn);
    }

    /// For once the host has no memory for a page.
    fn cannot_put(&mut self, gfn: Gfn) {
        let now = self.now;
        self.trace(|| format!("the page at {gfn} cannot be installed"));
        self.destination.not_installed(now, gfn);
        let waits = self.destination.arrived.iter_mut().flat_map(|arrived| &mut arrived.waits).flatten();
        waits.filter(|(waited, _)| *waited == gfn).for_each(|(_, since)| *since = now);
    }

    /// A page that came again is written again, whatever the VM did since.
    pub(crate) fn put_again(&mut self, content: Content) {
        let Some(arrived) = &self.destination.arrived else { return };
        let at = arrived.frames.iter().copied().find(|gfn| {
            self.check.at_pause(self.destination.migration(), *gfn) == Some(content)
                && !self.destination.memory.absent.contains(gfn)
        });
        if let Some(gfn) = at {
            self.destination.memory.image[guest::place(gfn)] = content;
        }
    }

    fn wake(&mut self, gfn: Gfn) {
        let Some(arrived) = &mut self.destination.arrived else { return };
        for wait in &mut arrived.waits {
            wait.take_if(|(waited, _)| *waited == gfn);
        }
    }

    /// The virtual CPUs begin to run.
    pub(crate) fn arrive(&mut self) {
        let Some(image) = self.check.image(self.destination.migration()) else {
            return self.check.fail("a VM runs that never stood still".to_owned());
        };
        self.destination.arrived = Some(Arrived::new(&self.layout, image));
        self.check_downtime();
        self.schedule(self.now, Event::BurstThere);
    }

    /// Where nothing goes wrong, post-copy keeps its promise whatever the guest does: two round trips and 50 ms.
    fn check_downtime(&mut self) {
        let downtime = self.now - self.source.stopped;
        let promise = Span(self.net.longest_trip().0 * 4 + 50_000);
        let postcopy = self.destination.postcopy_stats().is_some();
        // A spill file is written while it stands still.
        let late = self.must_succeed && postcopy && !self.source.terms.spills && downtime > promise;
        self.check.require(!late, || format!("the VM stood still for {downtime:?}, longer than {promise:?}"));
    }

    /// The virtual CPUs at the destination read and write, until all of memory is there or they are paused.
    pub(crate) fn burst_there(&mut self) {
        for cpu in 0..CPUS {
            for _ in 0..self.rng.between(1, TOUCHES) {
                if !self.touch(cpu) {
                    break;
                }
            }
        }
        if self.destination.memory.absent.is_empty() {
            return self.compare_all();
        }
        if self.destination.arrived.as_ref().is_some_and(|arrived| arrived.starved.is_none()) {
            let every = Span(self.rng.spread(100, 100_000));
            self.after(every, Event::BurstThere);
        }
    }

    /// One virtual CPU touches one page; false if it waits.
    fn touch(&mut self, cpu: usize) -> bool {
        let absent = &self.destination.memory.absent;
        let Some(arrived) = self.destination.arrived.as_mut().filter(|arrived| arrived.starved.is_none())
        else {
            return false;
        };
        if arrived.waits[cpu].is_some() {
            return false;
        }
        let among_absent = self.rng.chance(TO_ABSENT) && !absent.is_empty();
        let gfn = if among_absent {
            absent.iter().nth(self.rng.index(absent.len())).copied().unwrap_or_default()
        } else {
            arrived.frames[self.rng.index(arrived.frames.len())]
        };
        if absent.contains(&gfn) {
            arrived.waits[cpu] = Some((gfn, self.now));
            self.fault_count += 1;
            self.tell_fault(gfn, true);
            return false;
        }
        let (found, truth) = (self.destination.memory.read(gfn), arrived.truth[guest::place(gfn)]);
        self.check.require(found == truth, || {
            format!("the VM at the destination read a wrong page at {gfn}: {found}, not {truth}")
        });
        if self.rng.chance(WRITES) {
            let content = Content::try_from(self.rng.below(u64::from(CONTENTS))).unwrap_or(0);
            arrived.truth[guest::place(gfn)] = content;
            self.destination.memory.image[guest::place(gfn)] = content;
        }
        true
    }

    /// What is there is what the VM must find.
    pub(crate) fn compare_all(&mut self) {
        let Some(arrived) = &self.destination.arrived else { return };
        let memory = &self.destination.memory;
        let mut frames = arrived.frames.iter().filter(|gfn| !memory.absent.contains(gfn));
        if let Some(gfn) = frames.find(|gfn| memory.read(**gfn) != arrived.truth[guest::place(**gfn)]) {
            self.check.fail(format!("the VM at the destination has a wrong page at {gfn}"));
        }
    }

    /// The VM is paused because nobody gives a page.
    pub(crate) fn starve(&mut self, gfn: Gfn, name: Option<PageHash>) {
        self.trace(|| format!("PAUSED: nobody gives the page at {gfn}, {name:?}"));
        self.starved += 1;
        let absent = self.destination.memory.absent.contains(&gfn);
        self.check.require(absent, || format!("the VM is paused for {gfn}, which is there"));
        let names = self.destination_names();
        let truth = self.check.at_pause(self.destination.migration(), gfn).map(|content| names.name(content));
        let wrong = name.is_some() && name != truth;
        self.check.require(!wrong, || format!("the VM is paused for {gfn}, but its name is wrong"));
        if self.mutated(Mutation::ZeroForLost) {
            for gfn in std::mem::take(&mut self.destination.memory.absent) {
                self.destination.memory.image[guest::place(gfn)] = 0;
                self.wake(gfn);
            }
            return;
        }
        if let Some(arrived) = &mut self.destination.arrived {
            arrived.starved = Some(self.now);
        }
    }

    /// The pages that it was paused for are there.
    pub(crate) fn feed_on(&mut self) {
        if let Some(arrived) = &mut self.destination.arrived
            && arrived.starved.take().is_some()
        {
            self.schedule(self.now, Event::BurstThere);
        }
    }

    /// Nobody waits for a page longer than allowed, unless all are paused. Runs after every step.
    pub(crate) fn look_there(&mut self) {
        let Some(arrived) = self.destination.arrived.as_ref().filter(|arrived| arrived.starved.is_none())
        else {
            return;
        };
        let now = self.now;
        let overdue = arrived.waits.iter().flatten().find(|(_, since)| now - *since > FAULT_LIMIT);
        if let Some((gfn, _)) = overdue {
            let what = format!("a virtual CPU waits too long for {gfn}, and the VM is not paused");
            self.check.fail(what);
        }
    }

    /// The source is lost, the VM is paused for what only it had, and the site has been asked for that long enough. It is asked for ever.
    pub(crate) fn stays_starved(&self) -> bool {
        let since = self.destination.arrived.as_ref().and_then(|arrived| arrived.starved);
        let nobody = self.source.active().is_none() && !self.spill.is_coming();
        nobody && since.is_some_and(|since| self.now - since > Span::from_secs(300))
    }

    /// All of memory has come, or the source is lost and the VM has stopped where it needs more.
    pub(crate) fn look_there_at_the_end(&mut self) {
        self.compare_all();
        let Some(arrived) = &self.destination.arrived else { return };
        let (absent, starved) = (self.destination.memory.absent.len(), arrived.starved.is_some());
        if absent > 0 {
            let alive = self.source.alive;
            self.check.require(!alive, || {
                format!("the source lives, but {absent} pages of its VM never came to the destination")
            });
            let promised = self.spill.is_promised(self.destination.migration());
            self.check.require(!promised, || {
                format!("{absent} pages of the VM never came, although they were to stand in a spill file")
            });
            return self.check.require(starved, || {
                format!("the source is lost, {absent} pages are missing, and the VM runs on")
            });
        }
        let Some(stats) = self.destination.postcopy_stats() else { return };
        let pages = stats.zero + stats.host + stats.site + stats.source;
        let faults = stats.faults_zero + stats.faults_host + stats.faults_site + stats.faults_source;
        self.check.require(!starved, || "all of memory is there, and the VM is paused".to_owned());
        self.check.require((pages, faults) == (stats.absent, stats.faults), || {
            format!("the counters of post-copy do not add up: {stats:?}")
        });
    }
}
