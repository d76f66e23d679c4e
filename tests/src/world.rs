//! The simulator: one source host, one destination host with its site, a link, faults, and an operator, in virtual time.
//! One seed gives one run, step by step the same every time.

mod draw;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use migration_proto::timer::Time;
use migration_proto::wire::{Channel, Message, decode, encode};
use migration_proto::{Layout, Span, limits};

use crate::check::Checker;
use crate::destination_host::{DestinationHost, DestinationJob};
use crate::faults::{Fault, Faults, Local, Moment};
use crate::mutation::Mutation;
use crate::net::{ConnId, Net, Side};
use crate::rng::Rng;
use crate::site::Site;
use crate::source_host::{Dial, SourceHost, SourceJob};
use crate::spill_host::{SpillEvent, SpillHost};

/// What kind of trouble a run sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
#[value(rename_all = "PascalCase")]
pub enum Story {
    /// None: the link is slow or fast, messages overtake each other, the guest writes.
    Clean,
    /// Connections are lost.
    Lossy,
    /// Processes are killed, local actions fail or take long, operators interfere, connections are lost.
    Crashes,
    /// The site is stale, slow, silent or lies.
    BadSite,
    /// A bad site on top of crashes.
    All,
    /// The VM moves before its memory does, with much to follow, while connections are lost and the source dies.
    Postcopy,
}

impl Story {
    /// Every story.
    pub const ALL: [Self; 6] =
        [Self::Clean, Self::Lossy, Self::Crashes, Self::BadSite, Self::All, Self::Postcopy];

    /// The story that a seed tells when none is asked for.
    #[must_use]
    pub fn of_seed(seed: u64) -> Self {
        match seed % 6 {
            0 => Self::Clean,
            1 => Self::Lossy,
            2 => Self::Crashes,
            3 => Self::BadSite,
            4 => Self::All,
            _ => Self::Postcopy,
        }
    }
}

/// How to run.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// A deliberate breakage.
    pub mutation: Option<Mutation>,
    /// Print every step to standard output.
    pub trace: bool,
}

/// What a run came to.
#[derive(Debug, Clone, Copy)]
pub struct Summary {
    /// Steps of the simulation.
    pub steps: u64,
    /// Virtual time, microseconds.
    pub virtual_us: u64,
    /// Attempts to migrate.
    pub attempts: u32,
    /// Whether the VM runs at the destination at the end.
    pub moved: bool,
    /// Switchovers to post-copy.
    pub postcopies: u32,
    /// Touches of absent pages.
    pub faults: u64,
    /// Times that the VM was paused because nobody gave a page.
    pub starved: u32,
    /// New connections before Commit over which the migration went on.
    pub resumes: u32,
    /// Connections in post-copy after the first.
    pub reconnects: u64,
}

/// A checker's complaint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "seed {seed} ({story:?}), at {at_us} us of virtual time: {what}\n\
     replay: cargo run --release -p tern-tests --bin sim -- --seed {seed} --story {story:?} --trace"
)]
pub struct Violation {
    /// The seed that replays it.
    pub seed: u64,
    /// The story that goes with it.
    pub story: Story,
    /// When.
    pub at_us: u64,
    /// What did not hold.
    pub what: String,
}

/// Runs one seed.
///
/// # Errors
/// What did not hold.
pub fn run(seed: u64, story: Story, options: Options) -> Result<Summary, Box<Violation>> {
    let mut world = World::new(seed, story, options);
    world.run();
    match world.check.violation() {
        None => Ok(Summary {
            steps: world.steps,
            virtual_us: world.now.0,
            attempts: world.source.attempt,
            moved: world.destination.running,
            postcopies: world.postcopies,
            faults: world.fault_count,
            starved: world.starved,
            resumes: world.resumes,
            reconnects: world.destination.postcopy_stats().map_or(0, |stats| stats.reconnects),
        }),
        Some(what) => Err(Box::new(Violation { seed, story, at_us: world.now.0, what: what.to_owned() })),
    }
}

/// Runs `seeds` seeds of one story on all cores. The seeds of a story start at `from`.
///
/// # Errors
/// The violation of the lowest seed among those that were run when the first was found.
pub fn run_many(
    story: Option<Story>,
    from: u64,
    seeds: u64,
    options: Options,
) -> Result<Total, Box<Violation>> {
    let next = AtomicU64::new(0);
    let results: Mutex<(Total, Option<Box<Violation>>)> = Mutex::default();
    let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let work = || loop {
        let at = next.fetch_add(1, Ordering::Relaxed);
        if at >= seeds {
            break;
        }
        let seed = from + at;
        let result = run(seed, story.unwrap_or(Story::of_seed(seed)), options);
        let mut results = results.lock().unwrap_or_else(PoisonError::into_inner);
        match result {
            Ok(summary) => results.0.add(summary),
            Err(violation) => {
                // Others finish what they have begun; nobody begins anew.
                next.store(seeds, Ordering::Relaxed);
                if results.1.as_ref().is_none_or(|old| violation.seed < old.seed) {
                    results.1 = Some(violation);
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(work);
        }
    });
    let (total, violation) = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    violation.map_or(Ok(total), Err)
}

/// What many runs came to.
#[derive(Debug, Clone, Copy, Default)]
pub struct Total {
    /// Runs.
    pub runs: u64,
    /// VMs that run at the destination at the end.
    pub moved: u64,
    /// Attempts to migrate.
    pub attempts: u64,
    /// Steps of all simulations.
    pub steps: u64,
    /// Switchovers to post-copy.
    pub postcopies: u64,
    /// Touches of absent pages.
    pub faults: u64,
    /// Times that a VM was paused because nobody gave a page.
    pub starved: u64,
    /// New connections before Commit over which migrations went on.
    pub resumes: u64,
    /// Connections in post-copy after the first.
    pub reconnects: u64,
}

impl Total {
    fn add(&mut self, run: Summary) {
        self.runs += 1;
        self.moved += u64::from(run.moved);
        self.attempts += u64::from(run.attempts);
        self.steps += run.steps;
        self.postcopies += u64::from(run.postcopies);
        self.faults += run.faults;
        self.starved += u64::from(run.starved);
        self.resumes += u64::from(run.resumes);
        self.reconnects += run.reconnects;
    }
}

/// More steps than any run needs.
const STEPS: u64 = 400_000;
/// More virtual time than any run needs: two hours.
const LONGEST: Time = Time(7_200_000_000);
/// After so many attempts nothing goes wrong any more, and the next one must succeed.
const TROUBLED_ATTEMPTS: u32 = 2;

pub(crate) enum Event {
    /// The guest writes.
    Burst,
    /// The guest at the destination reads and writes.
    BurstThere,
    /// A message arrives.
    Deliver { conn: ConnId, to: Side, channel: Channel, frame: Vec<u8> },
    /// An end notices that a connection is gone.
    Lost { conn: ConnId, side: Side },
    /// A connection that the source asked for stands, or will not come about.
    Dialled { attempt: u32, dial: Dial, conn: Option<ConnId> },
    /// The source's driver has finished something.
    Source { attempt: u32, job: SourceJob },
    /// The destination's driver has finished something.
    Destination { life: u32, job: DestinationJob },
    /// Something goes wrong.
    Fault(Fault),
    /// The source begins an attempt.
    Begin,
    /// A new process listens at the destination.
    Listen,
    /// An operator looks at both hosts.
    Operator,
    /// Something happens to the server of this number of a spill file.
    Spill { number: u32, event: SpillEvent },
}

pub(crate) struct World {
    pub(crate) rng: Rng,
    pub(crate) now: Time,
    events: BTreeMap<(Time, u64), Event>,
    next_event: u64,
    steps: u64,
    pub(crate) net: Net,
    pub(crate) faults: Faults,
    /// Failures and stalls that wait for their local action.
    waiting: Vec<Fault>,
    pub(crate) site: Site,
    pub(crate) layout: Layout,
    pub(crate) source: SourceHost,
    pub(crate) destination: DestinationHost,
    pub(crate) spill: SpillHost,
    pub(crate) check: Checker,
    /// Nothing that happens may keep the first attempt from success.
    pub(crate) must_succeed: bool,
    pub(crate) operator_waits: bool,
    /// Whether the destination's host can do post-copy.
    pub(crate) destination_postcopy: bool,
    pub(crate) postcopies: u32,
    pub(crate) fault_count: u64,
    pub(crate) starved: u32,
    /// Times that the destination told a source that came back before Commit what it holds.
    pub(crate) resumes: u32,
    pub(crate) options: Options,
}

impl World {
    pub(crate) fn mutated(&self, mutation: Mutation) -> bool {
        self.options.mutation == Some(mutation)
    }

    pub(crate) fn trace(&self, what: impl FnOnce() -> String) {
        if self.options.trace {
            println!("{:>12} {}", self.now.0, what());
        }
    }

    pub(crate) fn schedule(&mut self, at: Time, event: Event) {
        self.events.insert((at.max(self.now), self.next_event), event);
        self.next_event += 1;
    }

    pub(crate) fn after(&mut self, span: Span, event: Event) {
        self.schedule(self.now + span, event);
    }

    fn run(&mut self) {
        while self.check.violation().is_none() && self.step() {
            self.steps += 1;
            self.look();
        }
        if self.check.violation().is_none() {
            self.look_at_the_end();
        }
    }

    /// The next event or deadline; false if there is none.
    fn step(&mut self) -> bool {
        if self.stays_starved() {
            return false;
        }
        let event = self.events.first_key_value().map(|((at, _), _)| *at);
        let no_deadlines = self.mutated(Mutation::NoDeadlines);
        let source = self.source.next_timeout().filter(|_| !no_deadlines);
        let destination = self.destination.next_timeout();
        let spill = self.spill.next_timeout();
        let waits = [event, source, destination, spill];
        let Some(next) = waits.into_iter().flatten().min() else { return false };
        self.now = next.max(self.now);
        if source.is_some_and(|at| at <= self.now) {
            self.source_timeout();
        } else if destination.is_some_and(|at| at <= self.now) {
            self.destination_timeout();
        } else if spill.is_some_and(|at| at <= self.now) {
            self.spill_timeout();
        } else if let Some((_, event)) = self.events.pop_first() {
            self.happen(event);
        }
        true
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Burst => self.burst(),
            Event::BurstThere => self.burst_there(),
            Event::Deliver { conn, to, channel, frame } => self.deliver(conn, to, channel, &frame),
            Event::Lost { conn, side } => self.lost(conn, side),
            Event::Dialled { attempt, dial, conn } => self.dialled(attempt, dial, conn),
            Event::Source { attempt, job } => self.source_job(attempt, job),
            Event::Destination { life, job } => self.destination_job(life, job),
            Event::Fault(fault) => self.strike(fault),
            Event::Begin => self.begin(),
            Event::Listen => self.destination_listens(),
            Event::Operator => self.operate(),
            Event::Spill { number, event } => self.spill_event(number, event),
        }
    }

    /// The guest writes for as long as a migration may come or is under way.
    fn burst(&mut self) {
        let Some(guest) = &mut self.source.guest else { return };
        guest.burst(&mut self.rng);
        let every = Span(guest.interval());
        if !self.source.done {
            self.after(every, Event::Burst);
        }
    }

    /// Sends a message, and says when its last byte has left.
    pub(crate) fn send(
        &mut self,
        from: Side,
        conn: Option<ConnId>,
        channel: Channel,
        message: &Message,
    ) -> Time {
        let Some(conn) = conn else { return self.now };
        let name = message.name();
        self.strike_at(name, Moment::Sending);
        if !self.lives(from) {
            return self.now;
        }
        let (frame, to) = (encode(message), self.net.other(conn, from));
        let (gone, arrives) = self.net.send(&mut self.rng, self.now, conn, to, channel, frame.len());
        let lost = if arrives.is_none() { " into the void" } else { "" };
        self.trace(|| format!("{from:?} sends {name} ({} bytes) on {conn:?}{lost}", frame.len()));
        if let Some(at) = arrives {
            self.schedule(at, Event::Deliver { conn, to, channel, frame });
        }
        self.strike_at(name, Moment::Sent);
        gone
    }

    fn lives(&self, side: Side) -> bool {
        match side {
            Side::Source => self.source.alive,
            Side::Destination => self.destination.alive(),
            Side::Spill => true,
        }
    }

    fn deliver(&mut self, conn: ConnId, to: Side, channel: Channel, frame: &[u8]) {
        if !self.lives(to) || !self.net.arrives(conn, to, channel) {
            return;
        }
        let message = match decode(frame) {
            Ok(message) => message,
            Err(error) => return self.check.fail(format!("a message cannot be decoded: {error}")),
        };
        let name = message.name();
        self.strike_at(name, Moment::Arriving);
        if !self.lives(to) || !self.net.arrives(conn, to, channel) {
            return;
        }
        self.trace(|| format!("{to:?} gets {name} on {conn:?}"));
        match to {
            Side::Source => self.source_message(conn, message),
            Side::Destination => self.destination_message(conn, message),
            Side::Spill => self.spill_message(conn, message),
        }
        self.strike_at(name, Moment::Handled);
    }

    fn lost(&mut self, conn: ConnId, side: Side) {
        if self.lives(side) && self.net.noticed(conn, side) {
            self.trace(|| format!("{side:?} notices that {conn:?} is lost"));
            match side {
                Side::Source => self.source_disconnected(conn),
                Side::Destination => self.destination_disconnected(conn),
                Side::Spill => self.spill_disconnected(conn),
            }
        }
    }

    /// An end closes a connection.
    pub(crate) fn close(&mut self, conn: ConnId, side: Side) {
        if let Some(at) = self.net.close(&mut self.rng, self.now, conn, side) {
            self.schedule(at, Event::Lost { conn, side: self.net.other(conn, side) });
        }
    }

    fn strike_at(&mut self, name: &'static str, moment: Moment) {
        for fault in self.faults.at_message(name, moment) {
            self.trace(|| format!("at {name}, {moment:?}:"));
            self.strike(fault);
        }
    }

    fn strike(&mut self, fault: Fault) {
        if self.faults.is_empty() {
            return;
        }
        self.trace(|| format!("FAULT {fault:?}"));
        match fault {
            Fault::Outage(outage) => {
                for (conn, side, at) in self.net.outage(&mut self.rng, self.now, outage) {
                    self.schedule(at, Event::Lost { conn, side });
                }
                if self.rng.chance(5) {
                    self.lose_patience(outage);
                }
            }
            Fault::KillSource => self.kill_source(),
            Fault::ServeSpill { stray } => self.serve_spill(stray),
            Fault::KillDestination { restart } => self.kill_destination(restart),
            Fault::Cancel => self
                .schedule(self.now, Event::Source { attempt: self.source.attempt, job: SourceJob::Cancel }),
            Fault::Fail(_) | Fault::Stall(..) => self.waiting.push(fault),
        }
    }

    /// How long a local action takes; `None` if it fails.
    pub(crate) fn local(&mut self, local: Local, usual: u64) -> Option<Span> {
        let usual = Span(self.rng.spread(1, usual));
        let at = self.waiting.iter().position(|fault| match fault {
            Fault::Fail(kind) | Fault::Stall(kind, _) => *kind == local,
            Fault::Outage(_)
            | Fault::KillSource
            | Fault::KillDestination { .. }
            | Fault::ServeSpill { .. }
            | Fault::Cancel => false,
        });
        match at.map(|at| self.waiting.remove(at)) {
            Some(Fault::Fail(_)) => None,
            Some(Fault::Stall(_, span)) => Some(span),
            Some(
                Fault::Outage(_)
                | Fault::KillSource
                | Fault::KillDestination { .. }
                | Fault::ServeSpill { .. }
                | Fault::Cancel,
            )
            | None => Some(usual),
        }
    }

    /// Every connection of a killed process is lost, and the other end notices some time later.
    pub(crate) fn cut_all(&mut self, killed: Side) {
        self.net.dies(killed);
        for (conn, side, at) in self.net.outage(&mut self.rng, self.now, Span(0)) {
            self.schedule(at, Event::Lost { conn, side });
        }
    }

    /// The source may try again: without trouble, once there was enough of it.
    pub(crate) fn try_again(&mut self) {
        if self.source.attempt >= TROUBLED_ATTEMPTS {
            self.faults = Faults::none();
            self.waiting.clear();
        }
        let pause = Span(self.rng.spread(1_000, 10_000_000));
        self.after(pause, Event::Begin);
    }

    /// Runs after every step.
    fn look(&mut self) {
        let source = self.source.guest.as_ref().is_some_and(|guest| guest.running);
        self.check.at_most_one(source, self.destination.running);
        self.look_there();
        self.check
            .require(self.steps < STEPS, || "the run does not come to an end: too many steps".to_owned());
        self.check.require(self.now < LONGEST, || "the run does not come to an end: two hours".to_owned());
        let now = self.now;
        for (who, wait) in [("source", self.source.wait()), ("destination", self.destination.wait())] {
            let Some((phase, deadline)) = wait else { continue };
            self.check.require(deadline.is_none_or(|at| at >= now), || {
                format!("the {who}'s deadline has passed: {phase}")
            });
            self.check.require(deadline.is_some(), || format!("the {who} waits without a deadline: {phase}"));
            // What a destination keeps for a source to come back, it keeps that long.
            let kept = limits::RESUME_GRACE + self.source.resume_for();
            let far = now + kept.max(Span::from_secs(120));
            self.check.require(deadline.is_none_or(|at| at <= far), || {
                format!("the {who}'s deadline is far: {phase}")
            });
        }
        let still = self.source.stands_still_cut(now);
        self.check.require(!still, || "the VM stands still while the source dials".to_owned());
        let unlike =
            self.source.aborted().filter(|reason| reason.contains("does not have the source's root"));
        self.check.require(unlike.is_none(), || unlike.unwrap_or_default());
        if self.must_succeed
            && let Some(reason) = self.source.aborted()
        {
            self.check.fail(format!("nothing went wrong, but the source gave up: {reason}"));
        }
    }

    fn look_at_the_end(&mut self) {
        self.look_there_at_the_end();
        let source = self.source.guest.as_ref().is_some_and(|guest| guest.running);
        let destination = self.destination.running;
        let undecided = self.source.in_doubt() || self.destination.held();
        let (killed, alive) = (self.check.vm_killed, self.source.alive && self.destination.alive());
        self.check.require(source || destination || undecided || killed, || {
            "at the end the VM runs nowhere, and no side says that it is in doubt or holds it".to_owned()
        });
        self.check.require(destination || killed || !alive || undecided, || {
            "both hosts are well at the end, but the VM has not come to the destination".to_owned()
        });
    }
}
