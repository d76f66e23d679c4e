//! In a lost source's place: one task that gives a VM's destination what a spill file holds, by the same protocol core.

use std::sync::Arc;

use migration_proto::literal;
use migration_proto::source::{Action, End, Literal, LiteralsSent, Source, SpillConfig};
use migration_proto::wire::{Channel, Message};
use page::{Gfn, Page, PageHash};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::channel;
use super::clock::{Clock, millis};
use super::connection::{Connection, Dialled};
use super::error::chain;
use super::identity::HostIdentity;
use super::report::Served;
use super::ticket::Ticket;
use super::transport::{Close, Endpoint};
use super::wires::{FromLink, LinkEvent};
use super::{MigrateError, limits};
use crate::spill::{SpillError, SpillFile};

/// What helpers have done.
enum Done {
    Literals(Channel, Result<(Vec<u8>, LiteralsSent), SpillError>),
    Fault(Gfn, Result<(PageHash, Vec<u8>), SpillError>),
    Dialled(Dialled),
}

struct Server {
    core: Source,
    file: Arc<SpillFile>,
    clock: Clock,
    connection: Connection,
    results: (mpsc::Sender<Done>, mpsc::Receiver<Done>),
    helpers: JoinSet<()>,
    faults: u64,
    failure: Option<MigrateError>,
}

/// Gives the destination at `to` what `file` holds, until it has all of its memory. It never starts a VM: a destination that does not run this VM by
/// this migration says so, and nothing has happened.
///
/// # Errors
/// If there is no connection at first, the destination does not run the VM, or the file cannot be read. Later connections are tried for ever.
pub async fn serve_spill(
    file: &Arc<SpillFile>,
    to: &Ticket,
    host: &Arc<HostIdentity>,
) -> Result<Served, MigrateError> {
    let mut server = Server::connect(Arc::clone(file), to, host).await?;
    server.drive().await;
    server.finish().await
}

impl Server {
    async fn connect(
        file: Arc<SpillFile>,
        to: &Ticket,
        host: &Arc<HostIdentity>,
    ) -> Result<Self, MigrateError> {
        let clock = Clock::start();
        let (endpoint, link) = Endpoint::open(to, host).await?;
        let channels = channel::open_source(&link).await?;
        tracing::info!(destination = %link.address(), key = %link.peer(), "connected to the destination");
        let (connection, measured) = Connection::new(endpoint, link, channels, None);
        let head = file.head().clone();
        let config = SpillConfig {
            migration: head.migration,
            vm: head.vm,
            epoch: head.epoch,
            layout: head.layout,
            root: file.root(),
            zero: head.zero,
            names: file.names(),
            link: measured,
        };
        Ok(Self {
            core: Source::from_spill(clock.now(), config),
            file,
            clock,
            connection,
            results: mpsc::channel(limits::RESULTS_BOUND),
            helpers: JoinSet::new(),
            faults: 0,
            failure: None,
        })
    }

    async fn drive(&mut self) {
        let mut tick = tokio::time::interval(limits::TICK);
        let drained = self.connection.drained();
        loop {
            while let Some(action) = self.core.poll() {
                self.act(action);
            }
            if self.core.end().is_some() || self.failure.is_some() {
                return;
            }
            let full = self.connection.is_full();
            let deadline: Instant = self.clock.instant(self.core.next_timeout());
            tokio::select! {
                Some(done) = self.results.1.recv() => self.done(done),
                Some(event) = self.connection.event(), if !full => self.link_event(event),
                () = drained.notified() => {}
                () = sleep_until(deadline) => self.core.timeout(self.clock.now()),
                _ = tick.tick() => self.measure(),
            }
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Send(message) => self.connection.send(&message),
            Action::SendLiterals { channel, pages } => {
                self.read(move |file| Done::Literals(channel, encode(file, &pages)));
            }
            Action::SendFault(gfn) => {
                self.faults += 1;
                self.read(move |file| {
                    let found = file.page(gfn);
                    Done::Fault(gfn, found.map(|(name, page)| (name, literal::encode(&[(gfn, &page)]))))
                });
            }
            Action::Reconnect => self.reconnect(),
            Action::PostcopyCut => tracing::warn!(
                destination = %self.connection.address(),
                "the connection is lost, and the VM needs pages that are here; dialling every second"
            ),
            Action::Release => tracing::info!("the destination has all of the VM's memory"),
            Action::StartDirtyLog
            | Action::CollectDirty
            | Action::Hash { .. }
            | Action::Spill { .. }
            | Action::SealSpill { .. }
            | Action::DropVersions(_)
            | Action::Throttle { .. }
            | Action::Pause
            | Action::SaveState
            | Action::RunOn(_)
            | Action::InDoubt
            | Action::Resume { .. } => {
                tracing::error!(
                    ?action,
                    "the protocol asks a spill file for what only a VM's source has: this is a bug"
                );
            }
        }
    }

    /// Has a thread read the file.
    fn read(&mut self, job: impl FnOnce(&SpillFile) -> Done + Send + 'static) {
        let (file, results) = (Arc::clone(&self.file), self.results.0.clone());
        self.helpers.spawn_blocking(move || {
            if results.blocking_send(job(&file)).is_err() {
                tracing::debug!("the server ended before its reader");
            }
        });
    }

    fn reconnect(&mut self) {
        for lost in self.connection.cut() {
            self.core.literals_sent(self.clock.now(), lost);
        }
        let (dial, results) = (self.connection.dial(), self.results.0.clone());
        self.helpers.spawn(async move {
            if results.send(Done::Dialled(dial.await)).await.is_err() {
                tracing::debug!("the server ended before the connection stood");
            }
        });
    }

    fn done(&mut self, done: Done) {
        let now = self.clock.now();
        match done {
            Done::Literals(channel, Ok((batch, sent))) => {
                if let Err(unsent) = self.connection.send_literals(channel, batch, sent) {
                    self.core.literals_sent(now, unsent);
                }
            }
            Done::Fault(gfn, Ok((name, batch))) => {
                self.connection.send(&Message::FaultPage { gfn, name, batch });
                self.core.fault_sent(now, gfn, name);
            }
            Done::Literals(_, Err(error)) | Done::Fault(_, Err(error)) => {
                self.failure = Some(MigrateError::Spill { why: chain(&error).into() });
            }
            Done::Dialled(dialled) => match self.connection.dialled(dialled) {
                None => {}
                Some(Ok(())) => self.core.connected(now),
                Some(Err(error)) => {
                    tracing::warn!(%error, "the destination cannot be reached");
                    self.core.disconnected(now);
                }
            },
        }
    }

    fn link_event(&mut self, event: LinkEvent) {
        let Some(what) = self.connection.take(event) else { return };
        let now = self.clock.now();
        match what {
            FromLink::Message(message) => self.core.message(now, message),
            FromLink::LiteralsSent(sent) => self.core.literals_sent(now, sent),
            FromLink::Undecodable(error) => {
                self.core.failed(format!("the destination sent what cannot be decoded: {error}"));
            }
            FromLink::Lost(error) => {
                tracing::warn!(%error, "the connection to the destination was lost");
                self.core.disconnected(now);
            }
        }
    }

    fn measure(&mut self) {
        while self.helpers.try_join_next().is_some() {}
        if let Some(link) = self.connection.measure() {
            self.core.link(link);
        }
    }

    async fn finish(mut self) -> Result<Served, MigrateError> {
        let total_ms = millis(self.clock.elapsed());
        self.connection.close(Close::Done, "the spill file is not needed any more").await;
        self.connection.endpoint().settle().await;
        if let Some(failure) = self.failure {
            return Err(failure);
        }
        let stats = self.core.stats();
        match self.core.end() {
            Some(End::Completed) => {
                Ok(Served { pages: stats.literal_pages + self.faults, faults: self.faults, total_ms })
            }
            Some(End::NotServed { never }) => Err(MigrateError::NotServed { never: *never }),
            Some(End::Aborted(_) | End::LetGo) | None => Err(MigrateError::Died),
        }
    }
}

/// Reads pages, whose names the destination has, for a batch of literals.
fn encode(file: &SpillFile, wanted: &[Literal]) -> Result<(Vec<u8>, LiteralsSent), SpillError> {
    let pages: Vec<(Gfn, Box<Page>)> = wanted
        .iter()
        .map(|wanted| file.page(wanted.gfn).map(|(_, page)| (wanted.gfn, page)))
        .collect::<Result<_, _>>()?;
    let borrowed: Vec<(Gfn, &Page)> = pages.iter().map(|(gfn, page)| (*gfn, page.as_ref())).collect();
    let batch = literal::encode(&borrowed);
    let sent =
        LiteralsSent { pages: pages.len() as u64, bytes: batch.len() as u64, ..LiteralsSent::default() };
    Ok((batch, sent))
}
