//! The source's host: the model VM, and a driver of [`Source`] that keeps the driver's contract.

mod state;

use std::collections::BTreeMap;

use migration_proto::source::{Action, Literal, LiteralsSent, Source, SourceConfig};
use migration_proto::timer::Time;
use migration_proto::wire::{Channel, Message, Region};
use migration_proto::{Epoch, MigrationId, Mode, Span, VmId, literal};
use page::{Gfn, PageHash, RegionId, ShortId};

use crate::faults::Local;
use crate::guest::{self, Guest, Image};
use crate::mutation::Mutation;
use crate::net::{ConnId, Side};
use crate::palette::{self, Names};
use crate::versions::Versions;
use crate::world::{Event, World};

/// What a connection is wanted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dial {
    /// To offer the VM.
    Offer,
    /// To ask again; only the newest such dial counts.
    Ask(u32),
    /// To tell the destination of an abort; how many tries are left.
    Notify(MigrationId, u32),
}

/// What the driver does beside, with its results.
#[derive(Debug)]
pub(crate) enum SourceJob {
    StartLog,
    Collect,
    HashRead { region: RegionId, pages: Vec<Gfn>, rest: Span },
    Hashed { region: RegionId, names: Vec<(Gfn, PageHash)> },
    LiteralsRead { channel: Channel, pages: Vec<Literal>, rest: Span },
    LiteralsReady { channel: Channel, batch: Option<Vec<u8>>, sent: LiteralsSent },
    LiteralsSent(LiteralsSent),
    FaultRead(Gfn),
    SpillRead { frames: Vec<Gfn>, anew: bool, rest: Span },
    Spilled,
    Sealed(PageHash),
    Pause,
    ReallyPaused,
    RunOn { epoch: Epoch },
    Save,
    Resume { epoch: Epoch, notify: bool },
    Failed(Local),
    Cancel,
}

/// The source's host.
#[derive(Debug)]
pub(crate) struct SourceHost {
    pub(crate) alive: bool,
    pub(crate) guest: Option<Guest>,
    machine: Option<Source>,
    conn: Option<ConnId>,
    seed: u64,
    pub(crate) terms: Terms,
    /// Attempts begun.
    pub(crate) attempt: u32,
    dials: u32,
    /// When what the virtual CPUs were asked for is over.
    lane: Time,
    /// When its virtual CPUs last came to stand still.
    pub(crate) stopped: Time,
    /// There will be no more attempts.
    pub(crate) done: bool,
    operator_said: bool,
    /// States saved so far: each is another.
    saves: u32,
    told: Told,
    /// Names for the mutation that never forgets one.
    cache: Image,
    pub(crate) versions: Versions,
}

/// How its VM is to move.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Terms {
    pub(crate) downtime: Span,
    pub(crate) mode: Mode,
    /// Whether absent pages are to stand in a spill file.
    pub(crate) spills: bool,
    pub(crate) resume_for: Span,
}

/// What the destination was told in this attempt, for mutations.
#[derive(Debug, Default)]
struct Told {
    /// The root that was last told of each region.
    roots: BTreeMap<RegionId, ShortId>,
    /// A connection was lost, and nothing has been named since.
    broken: bool,
}

const VM: VmId = VmId([7; 16]);

impl SourceHost {
    pub(crate) fn new(seed: u64, guest: Guest, terms: Terms) -> Self {
        Self {
            alive: true,
            cache: vec![palette::CONTENTS; guest.image().len()],
            guest: Some(guest),
            machine: None,
            conn: None,
            seed,
            terms,
            attempt: 0,
            dials: 0,
            lane: Time(0),
            stopped: Time(0),
            done: false,
            operator_said: false,
            versions: Versions::draw(seed),
            saves: 0,
            told: Told::default(),
        }
    }

    fn migration(&self) -> MigrationId {
        let id = u128::from(self.seed) << 64 | u128::from(self.attempt);
        MigrationId(id.to_be_bytes())
    }
}

impl World {
    pub(crate) fn names(&self) -> &'static Names {
        let unkeyed = palette::names(false);
        let keyed = self.source.machine.as_ref().is_some_and(|m| m.domain().id() != unkeyed.domain.id());
        palette::names(keyed)
    }

    pub(crate) fn begin(&mut self) {
        if self.source.guest.as_ref().is_some_and(|guest| guest.running) && self.source.active().is_none() {
            self.source.attempt += 1;
            self.trace(|| format!("attempt {}", self.source.attempt));
            self.dial(Dial::Offer);
        }
    }

    fn dial(&mut self, dial: Dial) {
        let (span, conn) = self.net.dial(&mut self.rng, self.now, Side::Source, self.destination.alive());
        self.after(span, Event::Dialled { attempt: self.source.attempt, dial, conn });
    }

    pub(crate) fn dialled(&mut self, attempt: u32, dial: Dial, conn: Option<ConnId>) {
        let conn = conn.filter(|conn| self.net.is_open(*conn, Side::Source));
        if !self.source.alive {
            return;
        }
        match dial {
            Dial::Offer if attempt == self.source.attempt => match conn {
                Some(conn) => self.offer(conn),
                // Nobody has been told anything: wait for better times, if they can come.
                None if self.destination.alive() || self.destination.restarts() => self.try_again(),
                None => self.source.done = true,
            },
            Dial::Ask(number) if number == self.source.dials && self.source.active().is_some() => {
                self.source.conn = conn;
                let Some(machine) = &mut self.source.machine else { return };
                match conn {
                    Some(_) => machine.connected(self.now),
                    None => machine.disconnected(self.now),
                }
                self.drain_source();
            }
            Dial::Notify(migration, tries) => match conn {
                Some(conn) => {
                    let reason = "the source runs the VM on".to_owned();
                    self.send(
                        Side::Source,
                        Some(conn),
                        Channel::Control,
                        &Message::Abort { migration, reason },
                    );
                    self.close(conn, Side::Source);
                }
                None if tries > 0 => self.dial(Dial::Notify(migration, tries - 1)),
                None => {}
            },
            Dial::Offer | Dial::Ask(_) => {
                if let Some(conn) = conn {
                    self.close(conn, Side::Source);
                }
            }
        }
    }

    fn offer(&mut self, conn: ConnId) {
        let config = SourceConfig {
            migration: self.source.migration(),
            vm: VM,
            epoch: Epoch(0),
            domain: palette::names(true).domain.clone(),
            layout: self.layout.clone(),
            machine: b"a model machine".to_vec(),
            downtime: self.source.terms.downtime,
            link: self.net.link(),
            mode: self.source.terms.mode,
            kept_versions: self.source.versions.most,
            auto_converge: self.source.terms.mode == Mode::Precopy && self.source.seed.is_multiple_of(2),
            spill: self.source.terms.spills,
            resume_for: self.source.terms.resume_for,
        };
        self.source.versions.begin();
        self.source.conn = Some(conn);
        self.source.told = Told::default();
        self.check.begins();
        self.source.machine = Some(Source::new(self.now, config));
        self.drain_source();
    }

    pub(crate) fn source_message(&mut self, conn: ConnId, message: Message) {
        let trusts = self.mutated(Mutation::TrustsWhatIsHeld);
        let message = if trusts { self.source.believe(message) } else { message };
        if self.source.conn == Some(conn)
            && let Some(machine) = &mut self.source.machine
        {
            self.source.told.broken |= matches!(message, Message::Held { last: true, .. });
            machine.message(self.now, message);
            self.drain_source();
            if self.mutated(Mutation::LetsGoTooEarly) && self.source.in_postcopy() {
                self.source.guest = None;
                self.source.machine = None;
                self.source.done = true;
                self.hang_up_source();
            }
        }
    }

    pub(crate) fn source_timeout(&mut self) {
        let Some(machine) = &mut self.source.machine else { return };
        machine.timeout(self.now);
        let stuck = machine.next_timeout().is_some_and(|at| at <= self.now);
        self.check.require(!stuck, || "the source's deadline stays in the past".to_owned());
        self.trace(|| "the source's deadline has come".to_owned());
        self.drain_source();
    }

    pub(crate) fn source_disconnected(&mut self, conn: ConnId) {
        if self.source.conn != Some(conn) {
            return;
        }
        self.source.conn = None;
        let runs_on = self.mutated(Mutation::ResumeAfterCommit) && self.source.committed()
            || self.mutated(Mutation::RunsOnInPostcopy) && self.source.in_postcopy();
        if runs_on && let Some(guest) = &mut self.source.guest {
            guest.running = true;
        }
        if let Some(machine) = &mut self.source.machine {
            machine.disconnected(self.now);
            self.drain_source();
        }
    }

    fn drain_source(&mut self) {
        while let Some(action) = self.source.machine.as_mut().and_then(Source::poll) {
            self.source_action(action);
        }
    }

    fn source_action(&mut self, action: Action) {
        match action {
            Action::Send(message) => {
                self.note_told(&message);
                if matches!(message, Message::Commit { .. }) && self.source.terms.spills {
                    self.check_spilled(self.source.migration(), !self.destination.memory.absent.is_empty());
                }
                self.send(Side::Source, self.source.conn, message.channel(), &message);
            }
            Action::StartDirtyLog if self.mutated(Mutation::LateDirtyLog) => {
                let late = Span(self.rng.spread(10_000, 300_000));
                self.source_job_after(late, SourceJob::StartLog);
            }
            Action::StartDirtyLog => self.with_guest(Guest::start_dirty_log),
            Action::CollectDirty => self.lane(Local::Collect, 2_000, SourceJob::Collect),
            Action::Hash { region, pages } => self.hash(region, pages),
            Action::SendLiterals { channel, pages } => match self.local(Local::Literals, 5_000) {
                Some(span) => {
                    let rest = Span(self.rng.below(span.0));
                    self.source.versions.give_out(&pages);
                    self.source_job_after(span, SourceJob::LiteralsRead { channel, pages, rest });
                }
                None => self.source_job_after(Span(1), SourceJob::Failed(Local::Literals)),
            },
            Action::DropVersions(frames) => self.source.versions.drop_those(&frames),
            Action::SendFault(gfn) => match self.local(Local::Literals, 2_000) {
                Some(span) => self.source_job_after(span, SourceJob::FaultRead(gfn)),
                None => self.source_job_after(Span(1), SourceJob::Failed(Local::Literals)),
            },
            Action::Spill { frames, anew } => self.write_spill(frames, anew),
            Action::SealSpill { root } => self.seal(root),
            Action::Throttle { percent: 0 } if self.mutated(Mutation::StaysThrottled) => {}
            Action::Throttle { percent } => self.with_guest(|guest| guest.throttle = percent),
            Action::Pause => self.lane(Local::Pause, 5_000, SourceJob::Pause),
            Action::SaveState => self.lane(Local::Save, 10_000, SourceJob::Save),
            Action::Reconnect => self.reconnect(),
            Action::RunOn(permit) => {
                self.trace(|| "the source has lost the connection, and the VM runs on".to_owned());
                let job = SourceJob::RunOn { epoch: permit.epoch() };
                self.lane(Local::RunOn, 1_000, job);
            }
            Action::InDoubt => {
                self.trace(|| "the source is in doubt".to_owned());
                self.call_operator();
            }
            Action::PostcopyCut => {
                self.trace(|| "the source has lost the destination in post-copy".to_owned());
                self.call_operator();
            }
            Action::Resume { permit, notify, reason } => {
                self.trace(|| format!("the source gives up: {reason}"));
                let at = self.source.lane.max(self.now) + Span(self.rng.spread(1, 1_000));
                let job = SourceJob::Resume { epoch: permit.epoch(), notify };
                self.source.lane = at;
                self.schedule(at, Event::Source { attempt: self.source.attempt, job });
            }
            Action::Release => self.release(),
        }
    }

    fn release(&mut self) {
        self.trace(|| "the source lets go".to_owned());
        self.remove_spill();
        self.source.guest = None;
        self.source.done = true;
        self.hang_up_source();
    }

    fn hash(&mut self, region: RegionId, pages: Vec<Gfn>) {
        if self.mutated(Mutation::ForgetsTheBrokenRound) && std::mem::take(&mut self.source.told.broken) {
            return self.source_job_after(Span(1), SourceJob::Hashed { region, names: Vec::new() });
        }
        match self.local(Local::Hash, 5_000) {
            Some(span) => {
                let rest = Span(self.rng.below(span.0));
                self.source_job_after(span, SourceJob::HashRead { region, pages, rest });
            }
            None => self.source_job_after(Span(1), SourceJob::Failed(Local::Hash)),
        }
    }

    /// Dials in the place of the connection there is.
    fn reconnect(&mut self) {
        if self.source.is_cut() && self.mutated(Mutation::EmptiesTheDirtyLog) {
            self.with_guest(|guest| drop(guest.take_dirty()));
        }
        if let Some(conn) = self.source.conn.take() {
            self.close(conn, Side::Source);
        }
        self.source.dials += 1;
        self.dial(Dial::Ask(self.source.dials));
    }

    /// Writes down what the destination is told.
    fn note_told(&mut self, message: &Message) {
        self.note_absent(message);
        if let Message::Region(Region { region, root, .. }) | Message::Absent { region, root, .. } = message {
            self.source.told.roots.insert(*region, root.short());
        }
        if let Message::Absent { frames, .. } = message {
            self.check.told_absent(frames);
        }
    }

    fn hang_up_source(&mut self) {
        if let Some(conn) = self.source.conn.take() {
            self.close(conn, Side::Source);
        }
    }

    fn with_guest(&mut self, with: impl FnOnce(&mut Guest)) {
        if let Some(guest) = &mut self.source.guest {
            with(guest);
        }
    }

    pub(crate) fn source_job_after(&mut self, span: Span, job: SourceJob) {
        self.after(span, Event::Source { attempt: self.source.attempt, job });
    }

    /// Work on the virtual CPUs is done in order, one after the other.
    fn lane(&mut self, local: Local, usual: u64, job: SourceJob) {
        let (span, job) = match self.local(local, usual) {
            Some(span) => (span, job),
            None => (Span(1), SourceJob::Failed(local)),
        };
        self.source.lane = self.source.lane.max(self.now) + span;
        self.schedule(self.source.lane, Event::Source { attempt: self.source.attempt, job });
    }

    pub(crate) fn source_job(&mut self, attempt: u32, job: SourceJob) {
        if !self.source.alive || attempt != self.source.attempt {
            return;
        }
        let (now, migration) = (self.now, self.source.migration());
        match job {
            SourceJob::StartLog => self.with_guest(Guest::start_dirty_log),
            SourceJob::HashRead { region, pages, rest } => self.read_to_hash(region, &pages, rest),
            SourceJob::LiteralsRead { channel, pages, rest } => self.read_to_send(channel, &pages, rest),
            SourceJob::FaultRead(gfn) => self.send_fault(gfn),
            SourceJob::SpillRead { frames, anew, rest } => {
                self.spill_pages(migration, self.names(), &frames, anew);
                self.source_job_after(rest, SourceJob::Spilled);
            }
            SourceJob::Spilled => self.tell_source(|machine| machine.spilled(now)),
            SourceJob::Sealed(root) => {
                self.seal_spill(migration, root);
                self.tell_source(|machine| machine.spill_sealed(now));
            }
            SourceJob::LiteralsReady { channel, batch, sent } => self.send_literals(channel, batch, sent),
            SourceJob::Resume { epoch, notify } => self.resume(epoch, notify),
            SourceJob::Collect => {
                let Some(guest) = &mut self.source.guest else { return };
                let mut dirty = guest.take_dirty();
                if !guest.running && self.options.mutation == Some(Mutation::SkipLastCollect) {
                    dirty = page::PageSet::empty(dirty.bound());
                }
                self.tell_source(|machine| machine.dirty(now, &dirty));
            }
            SourceJob::Hashed { region, names } => {
                self.tell_source(|machine| machine.hashed(now, region, &names));
            }
            SourceJob::LiteralsSent(sent) => self.tell_source(|machine| machine.literals_sent(now, sent)),
            SourceJob::Pause => {
                if self.mutated(Mutation::WritesAfterPause) {
                    let late = Span(self.rng.spread(1_000, 100_000));
                    self.source_job_after(late, SourceJob::ReallyPaused);
                } else {
                    self.stand_still();
                }
                self.tell_source(|machine| machine.vm_paused(now));
            }
            SourceJob::ReallyPaused => self.stand_still(),
            SourceJob::RunOn { epoch } => {
                let stands = self.mutated(Mutation::StandsStillWhenCut);
                self.with_guest(|guest| guest.running = !stands);
                self.check.runs("the source", epoch, self.source.operator_said);
                self.tell_source(|machine| machine.vm_runs_on(now));
            }
            SourceJob::Save => {
                self.source.saves += 1;
                let state = format!("state {} of attempt {attempt}", self.source.saves).into_bytes();
                self.check.saved(migration, &state);
                self.tell_source(|machine| machine.state_saved(now, state));
            }
            SourceJob::Failed(local) => {
                self.tell_source(|machine| machine.failed(format!("{local:?} failed")));
            }
            SourceJob::Cancel => self.cancel_source(),
        }
    }

    pub(crate) fn tell_source(&mut self, tell: impl FnOnce(&mut Source)) {
        if let Some(machine) = &mut self.source.machine {
            tell(machine);
            self.drain_source();
        }
    }

    fn stand_still(&mut self) {
        let migration = self.source.migration();
        if let Some(guest) = &mut self.source.guest {
            guest.running = false;
            self.source.stopped = self.now;
            self.check.paused(migration, guest.image());
        }
    }

    fn read_to_hash(&mut self, region: RegionId, pages: &[Gfn], rest: Span) {
        let (names, stale) = (self.names(), self.mutated(Mutation::StaleHashes));
        let Some(guest) = &self.source.guest else { return };
        let cache = &mut self.source.cache;
        let mut name = |gfn: &Gfn| {
            let cached = &mut cache[guest::place(*gfn)];
            if !stale || *cached == palette::CONTENTS {
                *cached = guest.read(*gfn);
            }
            (*gfn, names.name(*cached))
        };
        let names = pages.iter().map(&mut name).collect();
        self.source_job_after(rest, SourceJob::Hashed { region, names });
    }

    fn send_literals(&mut self, channel: Channel, batch: Option<Vec<u8>>, sent: LiteralsSent) {
        // Encoded for a connection that is lost.
        let gone = match batch.filter(|_| !self.source.is_cut()) {
            Some(batch) => self.send(Side::Source, self.source.conn, channel, &Message::Literals(batch)),
            None => self.now,
        };
        self.schedule(
            gone,
            Event::Source { attempt: self.source.attempt, job: SourceJob::LiteralsSent(sent) },
        );
    }

    fn send_fault(&mut self, gfn: Gfn) {
        let (names, now) = (self.names(), self.now);
        let Some(guest) = &self.source.guest else { return };
        let page = names.page(guest.read(gfn));
        let batch = literal::encode(&[(gfn, page.bytes())]);
        let message = Message::FaultPage { gfn, name: page.name(), batch };
        self.send(Side::Source, self.source.conn, message.channel(), &message);
        self.tell_source(|machine| machine.fault_sent(now, gfn, page.name()));
    }

    fn write_spill(&mut self, frames: Vec<Gfn>, anew: bool) {
        match self.local(Local::Spill, 20_000) {
            Some(span) => {
                let rest = Span(self.rng.below(span.0));
                self.source_job_after(span, SourceJob::SpillRead { frames, anew, rest });
            }
            None => self.source_job_after(Span(1), SourceJob::Failed(Local::Spill)),
        }
    }

    fn seal(&mut self, root: PageHash) {
        let now = self.now;
        match self.local(Local::Spill, 20_000) {
            Some(_) if self.mutated(Mutation::SealsTooEarly) => {
                let late = Span(self.rng.spread(100_000, 100_000_000));
                self.source_job_after(late, SourceJob::Sealed(root));
                self.tell_source(|machine| machine.spill_sealed(now));
            }
            Some(span) => self.source_job_after(span, SourceJob::Sealed(root)),
            None => self.source_job_after(Span(1), SourceJob::Failed(Local::Spill)),
        }
    }

    fn resume(&mut self, epoch: Epoch, notify: bool) {
        self.hang_up_source();
        self.remove_spill();
        if notify {
            self.dial(Dial::Notify(self.source.migration(), 3));
        }
        if self.mutated(Mutation::NoResume) {
            self.source.done = true;
            return;
        }
        self.with_guest(|guest| {
            guest.running = true;
            guest.stop_dirty_log();
        });
        let throttle = self.source.guest.as_ref().map_or(0, |guest| guest.throttle);
        self.check
            .require(throttle == 0, || format!("the VM runs on at the source, slowed down by {throttle}%"));
        self.check.runs("the source", epoch, self.source.operator_said);
        self.try_again();
    }

    /// An operator settles the doubt at the source.
    pub(crate) fn resolve_source(&mut self, run_here: bool) {
        self.trace(|| format!("OPERATOR at the source: run here {run_here}"));
        self.source.operator_said = run_here;
        self.tell_source(|machine| {
            // Refused if the answer came first.
            machine.resolve(run_here).ok();
        });
    }

    pub(crate) fn kill_source(&mut self) {
        if !self.source.alive {
            return;
        }
        let handed_over = self.source.guest.is_none() || self.source.committed();
        self.source.alive = false;
        self.source.done = true;
        self.source.guest = None;
        self.source.machine = None;
        self.source.conn = None;
        self.check.vm_killed |= !handed_over || !self.destination.has_vm();
        self.cut_all(Side::Source);
        // Somebody notices that the host is gone.
        self.call_operator();
        self.call_spill_server();
    }
}
