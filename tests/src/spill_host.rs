//! A spill file on storage that outlives the source's host, and whoever serves it: in time or not, beside the source or in its place, or with the file of
//! another migration.

use std::collections::{BTreeMap, BTreeSet};

use migration_proto::source::{Action, End, Literal, LiteralsSent, Source, SpillConfig};
use migration_proto::timer::Time;
use migration_proto::wire::{Channel, Message};
use migration_proto::{Epoch, MigrationId, Span, VmId, literal};
use page::{Gfn, PageHash};

use crate::mutation::Mutation;
use crate::net::{ConnId, Side};
use crate::palette::{Content, Names};
use crate::world::{Event, World};

/// What happens to a server.
#[derive(Debug)]
pub(crate) enum SpillEvent {
    /// An operator starts one; `stray`: with a file that was given up.
    Begin { stray: bool },
    /// A connection that it asked for stands, or will not come about.
    Dialled(Option<ConnId>),
    /// Its driver has sent a batch.
    LiteralsSent(LiteralsSent),
}

/// A spill file.
#[derive(Debug, Clone)]
struct File {
    migration: MigrationId,
    names: &'static Names,
    pages: BTreeMap<Gfn, Content>,
    /// There once it is whole.
    root: Option<PageHash>,
}

/// Whoever serves one.
#[derive(Debug)]
struct Server {
    machine: Source,
    file: File,
    conn: Option<ConnId>,
}

/// The storage, and the host that serves from it.
#[derive(Debug, Default)]
pub(crate) struct SpillHost {
    file: Option<File>,
    /// A copy of one that was given up.
    stray: Option<File>,
    server: Option<Server>,
    /// Counts servers and their dials: what an earlier one began is void.
    number: u32,
    /// How often an operator has come back because the destination did not take it.
    tries: u32,
    /// An operator comes back.
    expected: bool,
    /// What the destination has been told is absent, and the source has not taken back since.
    absent: BTreeSet<Gfn>,
    /// The migration whose Commit said that a file stands.
    promised: Option<MigrationId>,
}

/// As often an operator starts the server anew while the destination says that it does not run the VM.
const TRIES: u32 = 60;

impl SpillHost {
    /// Somebody serves, or will.
    pub(crate) fn is_coming(&self) -> bool {
        self.server.is_some() || self.expected
    }

    pub(crate) fn next_timeout(&self) -> Option<Time> {
        self.server.as_ref()?.machine.next_timeout()
    }

    /// Whether a source that is lost may have left pages of this migration in a file: an operator who runs a VM that the source never gave up finds none.
    pub(crate) fn is_promised(&self, migration: Option<MigrationId>) -> bool {
        self.promised.is_some() && self.promised == migration
    }

    /// Whether the file of this migration is whole.
    fn is_whole(&self, migration: MigrationId) -> bool {
        self.file.as_ref().is_some_and(|file| file.migration == migration && file.root.is_some())
    }
}

impl World {
    /// The source's driver writes pages as they are now.
    pub(crate) fn spill_pages(
        &mut self,
        migration: MigrationId,
        names: &'static Names,
        frames: &[Gfn],
        anew: bool,
    ) {
        let Some(guest) = &self.source.guest else { return };
        if !guest.running && self.options.mutation == Some(Mutation::SpillsOnlyAhead) {
            return;
        }
        let other = self.spill.file.as_ref().is_none_or(|file| file.migration != migration);
        if other || (anew && !self.mutated(Mutation::KeepsOldSpill)) {
            self.spill.file = Some(File { migration, names, pages: BTreeMap::new(), root: None });
        }
        let Some(file) = &mut self.spill.file else { return };
        file.pages.extend(frames.iter().map(|gfn| (*gfn, guest.read(*gfn))));
    }

    pub(crate) fn seal_spill(&mut self, migration: MigrationId, root: PageHash) {
        if let Some(file) = self.spill.file.as_mut().filter(|file| file.migration == migration) {
            file.root = Some(root);
        }
    }

    /// The source's driver removes the file; a copy may be about.
    pub(crate) fn remove_spill(&mut self) {
        let file = self.spill.file.take().filter(|file| file.root.is_some());
        if self.rng.chance(50) {
            self.spill.stray = file.or(self.spill.stray.take());
            // Whoever had taken the source for dead may only now begin.
            let later = Span(self.rng.spread(1_000, 20_000_000));
            self.spill_after(later, SpillEvent::Begin { stray: true });
        }
    }

    /// Commit leaves: from now on the source may die.
    pub(crate) fn check_spilled(&mut self, migration: MigrationId, absent: bool) {
        let safe = !absent || self.spill.is_whole(migration) || self.options.mutation.is_some();
        self.spill.promised = Some(migration);
        self.check.require(safe, || "Commit was sent before the spill file stood".to_owned());
        let judged = matches!(self.options.mutation, None | Some(Mutation::KeepsOldSpill));
        let whole =
            self.spill.file.as_ref().filter(|file| file.migration == migration && file.root.is_some());
        let exact = whole.is_none_or(|file| file.pages.keys().eq(&self.spill.absent));
        self.check
            .require(exact || !judged, || "the spill file has other pages than those absent".to_owned());
    }

    /// What is said of absent frames.
    pub(crate) fn note_absent(&mut self, message: &Message) {
        match message {
            Message::Absent { frames, .. } => self.spill.absent.extend(frames),
            Message::Offer(_) | Message::Resume { .. } => self.spill.absent.clear(),
            _ => {}
        }
    }

    /// The source's host is gone, and an operator finds its file, if there is one.
    pub(crate) fn call_spill_server(&mut self) {
        self.spill.expected = true;
        let later = Span(self.rng.spread(1_000, 100_000_000));
        self.spill_after(later, SpillEvent::Begin { stray: false });
    }

    fn spill_after(&mut self, span: Span, event: SpillEvent) {
        self.after(span, Event::Spill { number: self.spill.number, event });
    }

    pub(crate) fn spill_event(&mut self, number: u32, event: SpillEvent) {
        let ours = number == self.spill.number;
        match event {
            SpillEvent::Begin { stray } => self.serve_spill(stray),
            SpillEvent::Dialled(conn) if ours => self.spill_dialled(conn),
            SpillEvent::Dialled(conn) => {
                if let Some(conn) = conn {
                    self.close(conn, Side::Spill);
                }
            }
            SpillEvent::LiteralsSent(sent) if ours => {
                let now = self.now;
                self.tell_spill(|machine| machine.literals_sent(now, sent));
            }
            SpillEvent::LiteralsSent(_) => {}
        }
    }

    /// Starts a server, in the place of one that may be there.
    pub(crate) fn serve_spill(&mut self, stray: bool) {
        self.spill.expected = false;
        let file = if stray { &self.spill.stray } else { &self.spill.file };
        let Some(file) = file.clone().filter(|file| file.root.is_some()) else { return };
        self.trace(|| format!("SPILL SERVER for {:?}", file.migration));
        self.end_spill_server();
        let (span, conn) = self.net.dial(&mut self.rng, self.now, Side::Spill, self.destination.alive());
        let names = file.pages.iter().map(|(gfn, content)| (*gfn, file.names.name(*content))).collect();
        let config = SpillConfig {
            migration: file.migration,
            vm: VmId([7; 16]),
            epoch: Epoch(0),
            layout: self.layout.clone(),
            root: file.root.unwrap_or(PageHash([0; 32])),
            zero: file.names.domain.zero_name(),
            names,
            link: self.net.link(),
        };
        // What it says first is said over the first connection that stands.
        let mut machine = Source::from_spill(self.now, config);
        while machine.poll().is_some() {}
        self.spill.server = Some(Server { machine, file, conn: None });
        self.spill_after(span, SpillEvent::Dialled(conn));
    }

    fn end_spill_server(&mut self) {
        self.spill.number += 1;
        if let Some(conn) = self.spill.server.take().and_then(|server| server.conn) {
            self.close(conn, Side::Spill);
        }
    }

    fn spill_dialled(&mut self, conn: Option<ConnId>) {
        if !self.destination.alive() && !self.destination.restarts() {
            // It would dial for ever: its operator ends it.
            return self.end_spill_server();
        }
        let conn = conn.filter(|conn| self.net.is_open(*conn, Side::Spill));
        let now = self.now;
        if let Some(server) = &mut self.spill.server {
            server.conn = conn;
        }
        self.tell_spill(|machine| match conn {
            Some(_) => machine.connected(now),
            None => machine.disconnected(now),
        });
    }

    pub(crate) fn spill_message(&mut self, conn: ConnId, message: Message) {
        if self.spill.server.as_ref().is_some_and(|server| server.conn == Some(conn)) {
            let now = self.now;
            self.tell_spill(|machine| machine.message(now, message));
        }
    }

    pub(crate) fn spill_disconnected(&mut self, conn: ConnId) {
        let now = self.now;
        if let Some(server) = self.spill.server.as_mut().filter(|server| server.conn == Some(conn)) {
            server.conn = None;
            self.tell_spill(|machine| machine.disconnected(now));
        }
    }

    pub(crate) fn spill_timeout(&mut self) {
        let now = self.now;
        self.tell_spill(|machine| machine.timeout(now));
        let stuck = self.spill.next_timeout().is_some_and(|at| at <= now);
        self.check.require(!stuck, || "the spill server's deadline stays in the past".to_owned());
    }

    fn tell_spill(&mut self, tell: impl FnOnce(&mut Source)) {
        if let Some(server) = &mut self.spill.server {
            tell(&mut server.machine);
        }
        while let Some(action) = self.spill.server.as_mut().and_then(|server| server.machine.poll()) {
            self.spill_action(action);
        }
        self.spill_server_ended();
    }

    fn spill_server_ended(&mut self) {
        let end = self.spill.server.as_ref().and_then(|server| server.machine.end().cloned());
        match end {
            None => {}
            Some(End::Completed) => {
                self.trace(|| "the spill server has given all of it".to_owned());
                self.end_spill_server();
                self.spill.file = None;
            }
            Some(End::NotServed { never }) => {
                self.trace(|| format!("the spill server is not needed: never {never}"));
                self.end_spill_server();
                self.spill.tries += 1;
                if !self.source.alive && self.spill.tries < TRIES {
                    self.spill.expected = true;
                    let later = Span(self.rng.spread(5_000_000, 60_000_000));
                    self.spill_after(later, SpillEvent::Begin { stray: false });
                }
            }
            Some(End::Aborted(reason)) => {
                self.check.fail(format!("the spill server has given up: {reason}"));
            }
            Some(End::LetGo) => self.check.fail("the spill server was let go by nobody".to_owned()),
        }
    }

    fn spill_action(&mut self, action: Action) {
        let Some(server) = &self.spill.server else { return };
        let (conn, names) = (server.conn, server.file.names);
        match action {
            Action::Send(Message::Serve { migration, epoch, .. })
                if self.mutated(Mutation::SpillServerCommits) =>
            {
                let commit = Message::Commit { migration, epoch };
                self.send(Side::Spill, conn, commit.channel(), &commit);
            }
            Action::Send(message) => {
                self.send(Side::Spill, conn, message.channel(), &message);
            }
            Action::SendLiterals { channel, pages } => self.spill_literals(conn, channel, &pages),
            Action::SendFault(gfn) => {
                let Some(content) = server.file.pages.get(&gfn).copied() else {
                    return self
                        .check
                        .fail(format!("the spill server is asked for {gfn}, which it does not have"));
                };
                let page = names.page(content);
                let batch = literal::encode(&[(gfn, page.bytes())]);
                let message = Message::FaultPage { gfn, name: page.name(), batch };
                self.send(Side::Spill, conn, message.channel(), &message);
                let now = self.now;
                if let Some(server) = &mut self.spill.server {
                    server.machine.fault_sent(now, gfn, page.name());
                }
            }
            Action::Reconnect => {
                self.spill.number += 1;
                if let Some(server) = &mut self.spill.server
                    && let Some(conn) = server.conn.take()
                {
                    self.close(conn, Side::Spill);
                }
                let (span, conn) =
                    self.net.dial(&mut self.rng, self.now, Side::Spill, self.destination.alive());
                self.spill_after(span, SpillEvent::Dialled(conn));
            }
            Action::PostcopyCut => {
                self.trace(|| "the spill server has lost the destination".to_owned());
            }
            Action::Release => {}
            Action::StartDirtyLog
            | Action::CollectDirty
            | Action::Hash { .. }
            | Action::Spill { .. }
            | Action::RunOn(_)
            | Action::SealSpill { .. }
            | Action::DropVersions(_)
            | Action::Throttle { .. }
            | Action::Pause
            | Action::SaveState
            | Action::InDoubt
            | Action::Resume { .. } => {
                self.check.fail(format!("a spill server is asked for what it cannot do: {action:?}"));
            }
        }
    }

    fn spill_literals(&mut self, conn: Option<ConnId>, channel: Channel, wanted: &[Literal]) {
        let Some(server) = &self.spill.server else { return };
        let names = server.file.names;
        let content = |gfn: &Gfn| server.file.pages.get(gfn).copied();
        let pages: Vec<_> = wanted
            .iter()
            .filter_map(|page| Some((page.gfn, names.page(content(&page.gfn)?).bytes())))
            .collect();
        let batch = literal::encode(&pages);
        let sent =
            LiteralsSent { pages: pages.len() as u64, bytes: batch.len() as u64, ..LiteralsSent::default() };
        let gone = self.send(Side::Spill, conn, channel, &Message::Literals(batch));
        let number = self.spill.number;
        self.schedule(gone, Event::Spill { number, event: SpillEvent::LiteralsSent(sent) });
    }
}
