//! The destination's host: model memory, a ledger, and a driver of [`Destination`] that keeps the driver's contract.

use std::collections::BTreeSet;

use migration_proto::destination::{Action, Destination, RequestId, SiteRung};
use migration_proto::stats::PostcopyStats;
use migration_proto::switchover::{Fate, Ledger};
use migration_proto::timer::Time;
use migration_proto::wire::{Channel, Message, Offer};
use migration_proto::{Epoch, Layout, MigrationId, Span};
use page::{Gfn, PageHash, ShortId};

use crate::arrived::{Arrived, Memory};
use crate::faults::Local;
use crate::mutation::Mutation;
use crate::net::{ConnId, Side};
use crate::palette::{self, Content, Names};
use crate::site::Part;
use crate::world::{Event, World};

/// What the driver does beside, with its results.
#[derive(Debug)]
pub(crate) enum DestinationJob {
    Prepared,
    Decoded {
        plain: Vec<(Gfn, Content)>,
        deltas: Vec<(Gfn, Option<Content>)>,
    },
    FaultDecoded {
        gfn: Gfn,
        name: PageHash,
        content: Content,
    },
    /// Loading the state touches an absent frame.
    Touched(Gfn),
    SitePage {
        id: ShortId,
        content: Content,
    },
    SiteMissing {
        request: RequestId,
        id: ShortId,
    },
    SiteDone(RequestId),
    Loaded,
    Started {
        epoch: Epoch,
        operator: bool,
    },
    Failed(Local),
}

/// The process that receives VMs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Process {
    Alive,
    /// Killed; a new one will take its place.
    Restarting,
    /// Killed for good.
    Gone,
}

/// The destination's host.
#[derive(Debug)]
pub(crate) struct DestinationHost {
    process: Process,
    /// Counts machines and processes: what an earlier one began is void.
    life: u32,
    pub(crate) machine: Option<Destination>,
    conn: Option<ConnId>,
    /// Connections that have brought their first message and mean nothing any more.
    spent: BTreeSet<ConnId>,
    pub(crate) memory: Memory,
    /// The VM, once it has begun to run here.
    pub(crate) arrived: Option<Arrived>,
    state: Vec<u8>,
    ledger: Ledger,
    /// Whether the virtual CPUs run.
    pub(crate) running: bool,
    operator_said: bool,
}

impl DestinationHost {
    pub(crate) fn new(layout: &Layout) -> Self {
        Self {
            process: Process::Alive,
            life: 0,
            machine: None,
            conn: None,
            spent: BTreeSet::new(),
            memory: Memory::zeroed(layout),
            arrived: None,
            state: Vec::new(),
            ledger: Ledger::default(),
            running: false,
            operator_said: false,
        }
    }

    pub(crate) fn alive(&self) -> bool {
        self.process == Process::Alive
    }

    pub(crate) fn restarts(&self) -> bool {
        self.process == Process::Restarting
    }

    pub(crate) fn next_timeout(&self) -> Option<Time> {
        self.machine.as_ref()?.next_timeout()
    }

    /// The phase and the deadline of a machine that waits for somebody.
    pub(crate) fn wait(&self) -> Option<(&'static str, Option<Time>)> {
        let machine = self.machine.as_ref()?;
        let rests = machine.fate().is_some() || machine.is_held();
        (!rests).then(|| (machine.phase_name(), machine.next_timeout()))
    }

    pub(crate) fn held(&self) -> bool {
        self.machine.as_ref().is_some_and(Destination::is_held)
    }

    /// The migration that is under way here, or came to its end here last.
    pub(crate) fn migration(&self) -> Option<MigrationId> {
        self.machine.as_ref().map(Destination::migration)
    }

    /// Whether the VM is here, complete.
    pub(crate) fn has_vm(&self) -> bool {
        self.machine.as_ref().is_some_and(|machine| {
            let ready = ["ready and waiting for the source's commit", "starting the VM"];
            matches!(machine.fate(), Some(Fate::Ran(_))) || ready.contains(&machine.phase_name())
        })
    }

    pub(crate) fn postcopy_stats(&self) -> Option<PostcopyStats> {
        self.machine.as_ref().and_then(Destination::postcopy_stats)
    }

    /// A page that was given out is not there. What follows from that is drained with the rest.
    pub(crate) fn not_installed(&mut self, now: Time, gfn: Gfn) {
        if let Some(machine) = &mut self.machine {
            machine.not_installed(now, gfn);
        }
    }

    pub(crate) fn discarded(&self) -> bool {
        self.machine.as_ref().is_none_or(|machine| machine.discarded().is_some())
    }

    fn is_starting(&self) -> bool {
        self.machine.as_ref().is_some_and(|machine| machine.phase_name() == "starting the VM")
    }
}

impl World {
    pub(crate) fn destination_names(&self) -> &'static Names {
        let unkeyed = palette::names(false);
        let machine = self.destination.machine.as_ref();
        palette::names(machine.is_some_and(|m| m.domain().id() != unkeyed.domain.id()))
    }

    pub(crate) fn destination_message(&mut self, conn: ConnId, message: Message) {
        if self.destination.conn == Some(conn) {
            return self.feed(message);
        }
        if !self.destination.spent.insert(conn) {
            return;
        }
        self.first_message(conn, message);
    }

    fn feed(&mut self, message: Message) {
        let span = Span(self.rng.spread(1, 5_000));
        if let Message::Literals(batch) = message {
            let (plain, deltas) = self.decode(&batch);
            self.destination_job_after(span, DestinationJob::Decoded { plain, deltas });
        } else if let Message::FaultPage { gfn, name, batch } = message {
            if let Some((_, content)) = self.decode(&batch).0.first().copied() {
                self.destination_job_after(span, DestinationJob::FaultDecoded { gfn, name, content });
            }
        } else {
            let now = self.now;
            self.tell_destination(|machine| machine.message(now, message));
        }
    }

    /// The first message of a new connection says what it is for.
    fn first_message(&mut self, conn: ConnId, message: Message) {
        let forgets = self.mutated(Mutation::ForgetsWhatRan);
        match message {
            Message::Offer(offer) => self.take_offer(conn, offer),
            Message::Commit { migration, .. }
            | Message::Abort { migration, .. }
            | Message::Resume { migration, .. }
                if self.destination.migration() == Some(migration) && !forgets =>
            {
                if let Some(old) = self.destination.conn.replace(conn) {
                    self.close(old, Side::Destination);
                }
                self.tell_destination(Destination::connected);
                self.feed(message);
            }
            Message::Serve { migration, epoch, root } => self.take_server(conn, migration, epoch, root),
            Message::Commit { migration, .. } | Message::Resume { migration, .. } => {
                let answer = match self.destination.ledger.answer(migration) {
                    Fate::Ran(_) if !forgets => Message::Running { migration, stats: Default::default() },
                    Fate::Unknown if !forgets => Message::Unknown { migration },
                    Fate::Ran(_) | Fate::Refused | Fate::Unknown => Message::NotRunning { migration },
                };
                self.send(Side::Destination, Some(conn), Channel::Control, &answer);
            }
            // Whatever it was about is over here.
            Message::Abort { .. } | Message::Released { .. } => self.close(conn, Side::Destination),
            Message::Accept { .. }
            | Message::Refuse(_)
            | Message::Region(_)
            | Message::FullNames { .. }
            | Message::RoundEnd { .. }
            | Message::State(_)
            | Message::Absent { .. }
            | Message::PageNames { .. }
            | Message::Final { .. }
            | Message::Literals(_)
            | Message::Stale(_)
            | Message::Want(_)
            | Message::WantNames(_)
            | Message::Fault(_)
            | Message::FaultPage { .. }
            | Message::Complete { .. }
            | Message::RoundDone { .. }
            | Message::Ready { .. }
            | Message::Running { .. }
            | Message::Held { .. }
            | Message::NotRunning { .. }
            | Message::Unknown { .. }
            | Message::Probe(_) => {
                self.check.fail(format!("a connection began with {}", message.name()));
            }
        }
    }

    /// Somebody has a spill file.
    fn take_server(&mut self, conn: ConnId, migration: MigrationId, epoch: Epoch, root: PageHash) {
        let machine = self.destination.machine.as_ref().filter(|machine| machine.migration() == migration);
        let answer = match machine {
            Some(machine) => machine.serve_answer(epoch, root),
            None => Some(match self.destination.ledger.look_up(migration) {
                Fate::Refused => Message::NotRunning { migration },
                Fate::Ran(_) | Fate::Unknown => Message::Unknown { migration },
            }),
        };
        if let Some(answer) = answer {
            self.send(Side::Destination, Some(conn), Channel::Control, &answer);
            return;
        }
        if let Some(old) = self.destination.conn.replace(conn) {
            self.close(old, Side::Destination);
        }
        self.tell_destination(Destination::connected);
        self.feed(Message::Serve { migration, epoch, root });
    }

    fn take_offer(&mut self, conn: ConnId, offer: Offer) {
        if self.destination.running
            || self.destination.is_starting()
            || self.destination.ledger.is_fenced(offer.vm, offer.epoch)
        {
            let no = Message::Refuse("a VM runs here".to_owned());
            self.send(Side::Destination, Some(conn), Channel::Control, &no);
            return;
        }
        // The source owns and runs what it offers: whatever an earlier attempt left here is void.
        self.tell_destination(Destination::superseded);
        let now = self.now;
        self.tell_destination(|machine| machine.disconnected(now));
        if let Some(old) = self.destination.conn.replace(conn) {
            self.close(old, Side::Destination);
        }
        let keyed = palette::names(true);
        let site = self.site.shared.then_some(&keyed.domain);
        self.destination.life += 1;
        self.destination.operator_said = false;
        self.destination.arrived = None;
        let link = self.net.link();
        self.destination.machine =
            Some(Destination::new(self.now, offer, site, link, self.destination_postcopy));
        self.drain_destination();
    }

    pub(crate) fn destination_timeout(&mut self) {
        let Some(machine) = &mut self.destination.machine else { return };
        machine.timeout(self.now);
        let stuck = machine.next_timeout().is_some_and(|at| at <= self.now);
        self.check.require(!stuck, || "the destination's deadline stays in the past".to_owned());
        self.trace(|| "the destination's deadline has come".to_owned());
        self.drain_destination();
    }

    pub(crate) fn destination_disconnected(&mut self, conn: ConnId) {
        if self.destination.conn == Some(conn) {
            self.destination.conn = None;
            let now = self.now;
            self.tell_destination(|machine| machine.disconnected(now));
        }
    }

    pub(crate) fn tell_destination(&mut self, tell: impl FnOnce(&mut Destination)) {
        if let Some(machine) = &mut self.destination.machine {
            tell(machine);
            self.drain_destination();
        }
    }

    pub(crate) fn drain_destination(&mut self) {
        while let Some(action) = self.destination.machine.as_mut().and_then(Destination::poll) {
            self.destination_action(action);
        }
    }

    fn destination_action(&mut self, action: Action) {
        match action {
            Action::Send(message) => {
                if matches!(message, Message::Ready { .. }) && self.mutated(Mutation::RunWithoutCommit) {
                    self.destination.running = true;
                }
                self.check_asks(&message);
                let message = self.note_held(message);
                self.send(Side::Destination, self.destination.conn, message.channel(), &message);
            }
            Action::Prepare { machine: _, layout } => {
                self.destination.memory = Memory::zeroed(&layout);
                self.destination_local(Local::Prepare, 200_000, DestinationJob::Prepared);
            }
            Action::Resolve { request, ids } => self.resolve_pages(request, &ids),
            // The model site goes on answering, as a peer may whose answer is under way.
            Action::Forget(_) => {}
            Action::Zero(gfn)
                if self.mutated(Mutation::SkipZeroes) && !self.destination.memory.absent.contains(&gfn) => {}
            Action::Zero(gfn) => self.put(gfn, 0),
            Action::Copy { .. } if self.mutated(Mutation::SkipCopies) => {}
            Action::Copy { from, to } => {
                let content = self.destination.memory.read(from);
                self.put(to, content);
            }
            Action::Absent(frames) => self.mark_absent(&frames),
            Action::PauseVm { gfn, name } => self.starve(gfn, name),
            Action::ResumeVm => self.feed_on(),
            Action::LoadState(state) => {
                self.destination.state = state;
                self.check_memory("when the state is loaded");
                self.destination_local(Local::Load, 20_000, DestinationJob::Loaded);
            }
            Action::Run(permit) => {
                let operator = self.destination.operator_said;
                let job = DestinationJob::Started { epoch: permit.epoch(), operator };
                self.destination_local(Local::Run, 5_000, job);
            }
            Action::Hold => {
                self.trace(|| "the destination holds the VM".to_owned());
                self.call_operator();
            }
            Action::Discard(reason) => {
                self.trace(|| format!("the destination gives up: {reason}"));
                self.record(Fate::Refused);
                self.destination.memory = Memory::zeroed(&self.layout);
                if let Some(conn) = self.destination.conn.take() {
                    self.close(conn, Side::Destination);
                }
            }
            Action::Released => {
                if let Some(conn) = self.destination.conn.take() {
                    self.close(conn, Side::Destination);
                }
            }
        }
    }

    fn check_memory(&mut self, when: &str) {
        if let Some(migration) = self.destination.migration() {
            self.check.memory(migration, &self.destination.memory, &self.destination.state, when);
        }
    }

    /// What the running VM's host asks of the source is not there yet: nothing that has arrived is sent again.
    fn check_asks(&mut self, message: &Message) {
        let absent = &self.destination.memory.absent;
        let needless = self.destination.arrived.is_some()
            && match message {
                Message::Want(frames) => frames.iter().any(|gfn| !absent.contains(gfn)),
                Message::Fault(gfn) => !absent.contains(gfn),
                Message::WantNames(region) => !absent.iter().any(|gfn| gfn.region() == *region),
                _ => false,
            };
        let mutated = self.options.mutation.is_some();
        self.check.require(!needless || mutated, || format!("{message:?} asks for what is there"));
    }

    /// What the destination says of what it holds is true, and nothing of it is sent again.
    fn note_held(&mut self, message: Message) -> Message {
        if !matches!(message, Message::Held { last: true, .. }) {
            return message;
        }
        self.resumes += 1;
        self.check.stands(&self.destination.memory.image);
        if self.mutated(Mutation::ClaimsWhatItLacks) {
            return Message::Held { regions: self.source.told_roots(), last: true };
        }
        message
    }

    fn record(&mut self, fate: Fate) {
        if let Some(machine) = &self.destination.machine {
            self.destination.ledger.record(machine.migration(), machine.vm(), fate);
        }
    }

    fn resolve_pages(&mut self, request: RequestId, ids: &[ShortId]) {
        let names = self.destination_names();
        let parts = self.site.answer(&mut self.rng, names, ids);
        for (at, part) in parts {
            let job = match part {
                Part::Page { id, content } => DestinationJob::SitePage { id, content },
                Part::Missing { id } => DestinationJob::SiteMissing { request, id },
                Part::Done => DestinationJob::SiteDone(request),
            };
            self.destination_job_after(Span(at), job);
        }
    }

    pub(crate) fn destination_job_after(&mut self, span: Span, job: DestinationJob) {
        self.after(span, Event::Destination { life: self.destination.life, job });
    }

    fn destination_local(&mut self, local: Local, usual: u64, job: DestinationJob) {
        match self.local(local, usual) {
            Some(span) => self.destination_job_after(span, job),
            None => self.destination_job_after(Span(1), DestinationJob::Failed(local)),
        }
    }

    pub(crate) fn destination_job(&mut self, life: u32, job: DestinationJob) {
        if !self.destination.alive() || life != self.destination.life {
            return;
        }
        let now = self.now;
        match job {
            DestinationJob::Prepared => self.tell_destination(|machine| machine.prepared(now)),
            DestinationJob::Touched(gfn) => self.state_touches(gfn),
            DestinationJob::FaultDecoded { gfn, name, content } => {
                let names = self.destination_names();
                let Some(machine) = &mut self.destination.machine else { return };
                let frames = machine.fault_page(now, gfn, name, names.page(content));
                self.install(&frames, content);
                self.drain_destination();
            }
            DestinationJob::Decoded { plain, deltas } => {
                let names = self.destination_names();
                deltas.into_iter().for_each(|(gfn, content)| self.delta_came(gfn, content));
                for (gfn, content) in plain {
                    let Some(machine) = &mut self.destination.machine else { return };
                    let frames = machine.literal(now, gfn, names.page(content));
                    self.install(&frames, content);
                    self.drain_destination();
                }
            }
            DestinationJob::SitePage { id, content } => self.site_page(id, content),
            DestinationJob::SiteMissing { request, id } => self.site_missing(request, id),
            DestinationJob::SiteDone(request) => {
                self.tell_destination(|machine| machine.site_done(now, request));
            }
            DestinationJob::Loaded => self.tell_destination(|machine| machine.loaded(now)),
            DestinationJob::Started { epoch, operator } => {
                self.check_memory("at the hand-over");
                self.check.runs("the destination", epoch, operator);
                self.destination.running = true;
                self.arrive();
                self.tell_destination(|machine| machine.running(now));
                self.record(Fate::Ran(epoch));
            }
            DestinationJob::Failed(local) => {
                // Given back to a source that is no more: two failures at once.
                self.check.vm_killed |=
                    local == Local::Run && !self.source.alive && !self.destination.operator_said;
                self.tell_destination(|machine| machine.failed(format!("{local:?} failed")));
            }
        }
    }

    fn site_page(&mut self, id: ShortId, content: Content) {
        let names = self.destination_names();
        let unchecked = self.mutated(Mutation::InstallUnchecked);
        let claimed = if unchecked { names.find(id).unwrap_or(content) } else { content };
        let rung = if content.is_multiple_of(2) { SiteRung::Host } else { SiteRung::Site };
        let Some(machine) = &mut self.destination.machine else { return };
        let frames = machine.site_page(self.now, rung, id, names.page(claimed));
        if frames.is_empty() && self.mutated(Mutation::InstallsOverTheGuest) {
            self.put_again(content);
        }
        self.install(&frames, content);
        self.drain_destination();
    }

    fn site_missing(&mut self, request: RequestId, id: ShortId) {
        let drops_wants = self.mutated(Mutation::DropMissing);
        let Some(machine) = &mut self.destination.machine else { return };
        machine.site_missing(self.now, request, &[id]);
        while let Some(action) = self.destination.machine.as_mut().and_then(Destination::poll) {
            if !(drops_wants && matches!(action, Action::Send(Message::Want(_)))) {
                self.destination_action(action);
            }
        }
    }

    /// An operator settles what is held at the destination.
    pub(crate) fn resolve_destination(&mut self, run_here: bool) {
        self.trace(|| format!("OPERATOR at the destination: run here {run_here}"));
        let now = self.now;
        self.destination.operator_said = run_here;
        self.tell_destination(|machine| {
            // Refused if the source's word came first.
            machine.resolve(now, run_here).ok();
        });
    }

    pub(crate) fn kill_destination(&mut self, restart: Option<Span>) {
        if !self.destination.alive() {
            return;
        }
        // Where it has run there, the source may already be told to let go.
        self.check.vm_killed |= self.source.guest.is_none() || self.destination.running;
        let life = self.destination.life + 1;
        self.destination =
            DestinationHost { process: Process::Gone, life, ..DestinationHost::new(&self.layout) };
        self.cut_all(Side::Destination);
        if let Some(restart) = restart {
            self.destination.process = Process::Restarting;
            self.after(restart, Event::Listen);
        }
        // Somebody notices that the host is gone.
        self.call_operator();
    }

    pub(crate) fn destination_listens(&mut self) {
        self.trace(|| "a new process listens at the destination".to_owned());
        self.destination.process = Process::Alive;
    }
}
