//! The source's driver: one task owns the protocol core and carries out what it says.

mod end;
mod spilling;

use std::collections::VecDeque;
use std::sync::Arc;

use migration_proto::source::{Action, LiteralsSent, Source, SourceConfig, SourceProgress};
use migration_proto::timer::Span;
use migration_proto::wire::{Channel, Message};
use migration_proto::{MigrationId, RunPermit};
use page::{Domain, Gfn, PageHash, PageSet, RegionId};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use self::spilling::Spilling;
use super::clock::{Clock, millis};
use super::connection::{Connection, Dialled};
use super::dial;
use super::error::chain;
use super::identity::HostIdentity;
use super::level::Levels;
use super::pages::{self, Pool};
use super::report::{Phase, Progress, Report};
use super::site::SitePages;
use super::ticket::Ticket;
use super::versions::Versions;
use super::wires::{FromLink, LinkEvent};
use super::{MigrateError, MigrateOptions, bundle, layout_of, limits};
use crate::machine::{Machine, RunState};

/// What an operator can say to a running migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// End it; the VM runs on here.
    Cancel,
    /// Settle a migration in doubt.
    Resolve {
        /// Here, or not.
        run_here: bool,
    },
}

/// What workers and helpers have done.
enum Done {
    Hashed(RegionId, Vec<(Gfn, PageHash)>),
    Encoded(Channel, pages::EncodedBatch),
    Dirty(Result<PageSet, String>),
    Paused(Result<(), String>),
    Saved(Result<Vec<u8>, String>),
    Spilled(spilling::Job),
    RunsOn(Result<(), String>),
    Dialled(Dialled),
}

/// What came of an action while it was carried out: the protocol hears of it when it has no more to say.
enum Outcome {
    Failed(String),
    FaultSent(Gfn, PageHash),
    /// The connection that was to carry them is no more.
    LiteralsLost(LiteralsSent),
}

/// Everything that a migration is given.
pub(super) struct Assignment {
    pub(super) machine: Arc<Machine>,
    pub(super) site: Option<Arc<dyn SitePages>>,
    pub(super) host: Arc<HostIdentity>,
    pub(super) options: MigrateOptions,
    pub(super) progress: watch::Sender<Progress>,
    pub(super) commands: mpsc::Receiver<Command>,
}

struct Driver {
    core: Source,
    migration: MigrationId,
    clock: Clock,
    machine: Arc<Machine>,
    was_running: bool,
    connection: Connection,
    results: (mpsc::Sender<Done>, mpsc::Receiver<Done>),
    pool: Pool,
    helpers: JoinSet<()>,
    /// What KVM has been asked for and has not done: the VM is not resumed before it has.
    vm_jobs: JoinSet<()>,
    /// Names that wait for room on the names channel.
    hashed: VecDeque<(RegionId, Vec<(Gfn, PageHash)>)>,
    /// What came of actions while they were carried out.
    outcomes: VecDeque<Outcome>,
    versions: Versions,
    levels: Levels,
    progress: watch::Sender<Progress>,
    commands: mpsc::Receiver<Command>,
    link_error: Option<MigrateError>,
    notify_destination: bool,
    paused_at: Option<Instant>,
    downtime_ms: f64,
    downtime_asked_ms: u64,
    spilling: Spilling,
}

/// Carries out one migration to its end.
pub(super) async fn run(assignment: Assignment) -> Result<Report, MigrateError> {
    let clock = Clock::start();
    let progress = assignment.progress.clone();
    let result = match Driver::connect(assignment, clock).await {
        Ok(mut driver) => {
            driver.drive().await;
            driver.finish().await
        }
        Err(error) => Err(error),
    };
    progress.send_modify(|progress| {
        progress.phase = Phase::Ended;
        progress.elapsed_ms = millis(clock.elapsed());
    });
    result
}

fn unfit(why: String) -> MigrateError {
    MigrateError::NotMovable { why: why.into() }
}

/// Whether the VM runs, or stands still and can be moved so.
fn runs(machine: &Machine) -> Result<bool, MigrateError> {
    match &*machine.watch().borrow() {
        RunState::Running => Ok(true),
        RunState::Created | RunState::Paused => Ok(false),
        RunState::Stopped(reason) => Err(unfit(format!("it has stopped: {reason:?}"))),
    }
}

impl Driver {
    /// Everything up to the offer. The VM is not touched.
    async fn connect(assignment: Assignment, clock: Clock) -> Result<Self, MigrateError> {
        let Assignment { machine, site, host, options, progress, mut commands } = assignment;
        let ticket: Ticket = options.to.parse()?;
        let was_running = runs(&machine)?;
        let (endpoint, link, channels) = dial::open(&ticket, &host, &mut commands).await?;
        tracing::info!(destination = %link.address(), key = %link.peer(), "connected to the destination");
        let (connection, measured) = Connection::new(endpoint, link, channels, options.bandwidth_bits);
        let (description, ownership) = (machine.description(), machine.ownership());
        let domain = site.as_ref().map_or_else(Domain::unkeyed, |site| site.domain().clone());
        let migration = MigrationId(random().map_err(|e| unfit(e.to_string()))?);
        let versions = Versions::new(options.delta_cache_bytes, machine.memory().bytes());
        let config = SourceConfig {
            migration,
            vm: ownership.vm,
            epoch: ownership.epoch,
            domain,
            layout: layout_of(machine.memory().extents())
                .ok_or_else(|| unfit("its memory is not laid out in regions".to_owned()))?,
            machine: serde_json::to_vec(&description).map_err(|e| unfit(e.to_string()))?,
            downtime: Span::from_millis(options.downtime_ms),
            mode: options.mode.into(),
            auto_converge: options.auto_converge,
            spill: options.spill.is_some(),
            resume_for: Span::from_millis(options.resume_for_ms),
            link: measured,
            kept_versions: versions.most(),
        };
        let spilling = Spilling::begin(options.spill, &config).await?;
        Ok(Self {
            core: Source::new(clock.now(), config),
            migration,
            pool: Pool::new().map_err(|e| unfit(format!("no worker threads: {e}")))?,
            clock,
            machine,
            was_running,
            connection,
            results: mpsc::channel(limits::RESULTS_BOUND),
            helpers: JoinSet::new(),
            vm_jobs: JoinSet::new(),
            hashed: VecDeque::new(),
            outcomes: VecDeque::new(),
            versions,
            levels: Levels::default(),
            progress,
            commands,
            link_error: None,
            notify_destination: false,
            paused_at: None,
            downtime_ms: 0.0,
            downtime_asked_ms: options.downtime_ms,
            spilling,
        })
    }

    /// One input, then every action that it led to, until the end.
    async fn drive(&mut self) {
        let mut tick = tokio::time::interval(limits::TICK);
        let mut state = self.machine.watch();
        let drained = self.connection.drained();
        loop {
            self.carry_out();
            self.tell_progress();
            if self.core.end().is_some() {
                return;
            }
            let full = self.connection.is_full();
            let deadline = self.clock.instant(self.core.next_timeout());
            tokio::select! {
                Some(command) = self.commands.recv() => self.command(command),
                Some(done) = self.results.1.recv() => self.done(done),
                Some(event) = self.connection.event(), if !full => self.link_event(event),
                () = drained.notified() => {}
                () = sleep_until(deadline) => self.core.timeout(self.clock.now()),
                _ = tick.tick() => self.measure(),
                Ok(()) = state.changed() => {
                    if let RunState::Stopped(reason) = &*state.borrow_and_update() {
                        self.core.failed(format!("the VM stopped at the source: {reason:?}"));
                    }
                }
            }
            self.feed_names();
        }
    }

    /// Gives the core the names that there is room for on the names channel.
    fn feed_names(&mut self) {
        while self.connection.takes_names() {
            let Some((region, names)) = self.hashed.pop_front() else { return };
            self.core.hashed(self.clock.now(), region, &names);
            self.carry_out();
        }
    }

    fn carry_out(&mut self) {
        loop {
            while let Some(action) = self.core.poll() {
                self.act(action);
            }
            match self.outcomes.pop_front() {
                None => return,
                Some(Outcome::Failed(why)) => self.core.failed(why),
                Some(Outcome::FaultSent(gfn, name)) => self.core.fault_sent(self.clock.now(), gfn, name),
                Some(Outcome::LiteralsLost(sent)) => self.core.literals_sent(self.clock.now(), sent),
            }
        }
    }

    fn act(&mut self, action: Action) {
        match action {
            Action::Send(message) => self.connection.send(&message),
            Action::StartDirtyLog => {
                if let Err(error) = self.machine.start_dirty_log() {
                    self.outcomes
                        .push_back(Outcome::Failed(format!("the dirty log could not be started: {error}")));
                }
            }
            Action::CollectDirty => {
                self.blocking(|machine| Done::Dirty(machine.take_dirty().map_err(|e| chain(&e))))
            }
            Action::Hash { region, pages } => {
                let domain = self.core.domain().clone();
                self.work(move |memory| Done::Hashed(region, pages::name(memory, &domain, &pages)));
            }
            Action::SendLiterals { channel, pages } => {
                let domain = self.core.domain().clone();
                let pages: Vec<_> =
                    pages.into_iter().map(|literal| (literal, self.versions.give_out(&literal))).collect();
                let level = self.levels.begin();
                self.work(move |memory| {
                    Done::Encoded(channel, pages::encode(memory, &domain, level, &pages))
                });
            }
            Action::DropVersions(frames) => self.versions.drop_frames(&frames),
            Action::Pause => {
                self.paused_at = Some(Instant::now());
                self.blocking(|machine| Done::Paused(machine.pause_for_hand_over().map_err(|e| chain(&e))));
            }
            Action::SaveState => self.blocking(|machine| {
                let state = machine.save_state().map_err(|e| chain(&e));
                Done::Saved(state.map(|state| bundle::pack(machine.heartbeat().last_unix_ns, &state)))
            }),
            Action::SendFault(gfn) => self.send_fault(gfn),
            Action::Spill { frames, anew } => self.spill(frames, anew),
            Action::SealSpill { root } => self.seal_spill(root),
            Action::Throttle { percent } => self.throttle_guest(percent),
            Action::RunOn(permit) => self.run_on_cut(&permit),
            Action::Reconnect => self.reconnect(),
            Action::PostcopyCut => tracing::warn!(
                destination = %self.connection.address(),
                "the VM runs at the destination and needs memory that is here, and the connection is lost. Dialling every second; if the \
                 destination is gone for good, `vmm resolve --let-go` ends the VM's memory here"
            ),
            Action::InDoubt => tracing::warn!(
                destination = %self.connection.address(),
                "IN DOUBT: the hand-over was sent and not answered. The VM is paused here and may run there. Asking again every second; \
                 if the destination is gone for good, look at its host, then `vmm resolve --run-here` or `--let-go`"
            ),
            Action::Resume { permit, notify, reason } => {
                tracing::warn!(%reason, epoch = permit.epoch().0, "the migration has ended; the VM runs on here");
                self.notify_destination = notify;
            }
            Action::Release => tracing::info!("the migration has ended; the VM lives at the destination"),
        }
    }

    /// The connection is lost, and the VM, which stands still for the hand-over, goes on as it was before.
    fn run_on_cut(&mut self, permit: &RunPermit) {
        tracing::info!(epoch = permit.epoch().0, "the VM runs on here while the connection is lost");
        self.paused_at = None;
        let was_running = self.was_running;
        self.blocking(move |machine| {
            let back = if was_running { machine.resume() } else { machine.stay() };
            Done::RunsOn(back.map_err(|e| chain(&e)))
        });
    }

    /// A virtual CPU at the destination stands still for this page: it goes before whatever the workers do.
    fn send_fault(&mut self, gfn: Gfn) {
        let (name, batch) = pages::encode_one(self.machine.memory(), self.core.domain(), gfn);
        self.connection.send(&Message::FaultPage { gfn, name, batch });
        self.outcomes.push_back(Outcome::FaultSent(gfn, name));
    }

    /// Runs a job on the workers.
    fn work(&mut self, job: impl FnOnce(&crate::memory::Memory) -> Done + Send + 'static) {
        let (memory, results) = (Arc::clone(self.machine.memory()), self.results.0.clone());
        let submitted = self.pool.submit(move || {
            if results.blocking_send(job(&memory)).is_err() {
                tracing::debug!("the migration ended before its worker");
            }
        });
        if let Err(error) = submitted {
            self.outcomes.push_back(Outcome::Failed(error.to_string()));
        }
    }

    /// Runs something that KVM may take its time for.
    fn blocking(&mut self, job: impl FnOnce(&Machine) -> Done + Send + 'static) {
        let (machine, results) = (Arc::clone(&self.machine), self.results.0.clone());
        self.vm_jobs.spawn_blocking(move || {
            if results.blocking_send(job(&machine)).is_err() {
                tracing::debug!("the migration ended before KVM answered");
            }
        });
    }

    fn reconnect(&mut self) {
        self.outcomes.extend(self.connection.cut().into_iter().map(Outcome::LiteralsLost));
        let (dial, results) = (self.connection.dial(), self.results.0.clone());
        self.helpers.spawn(async move {
            if results.send(Done::Dialled(dial.await)).await.is_err() {
                tracing::debug!("the migration ended before the connection stood");
            }
        });
    }

    fn command(&mut self, command: Command) {
        let result = match command {
            Command::Cancel => self.core.cancel(),
            Command::Resolve { run_here } => self.core.resolve(run_here),
        };
        if let Err(error) = result {
            tracing::warn!(?command, %error, "an operator's command came too late");
        }
    }

    fn done(&mut self, done: Done) {
        let now = self.clock.now();
        match done {
            Done::Hashed(region, names) => self.hashed.push_back((region, names)),
            Done::Encoded(channel, encoded) => self.encoded(channel, encoded),
            Done::Dirty(Ok(dirty)) => self.core.dirty(now, &dirty),
            Done::Paused(Ok(())) => self.core.vm_paused(now),
            Done::Spilled(job) => self.spilled(job),
            Done::Saved(Ok(state)) => self.core.state_saved(now, state),
            Done::RunsOn(Ok(())) => self.core.vm_runs_on(now),
            Done::RunsOn(Err(error)) => self.core.failed(format!("the VM could not be let run on: {error}")),
            Done::Dirty(Err(error)) => self.core.failed(format!("the dirty log could not be read: {error}")),
            Done::Paused(Err(error)) => self.core.failed(format!("the VM could not be paused: {error}")),
            Done::Saved(Err(error)) => {
                self.core.failed(format!("the VM's state could not be saved: {error}"))
            }
            Done::Dialled(dialled) => match self.connection.dialled(dialled) {
                None => {}
                Some(Ok(())) => self.core.connected(now),
                Some(Err(error)) => {
                    tracing::warn!(%error, "the destination cannot be asked");
                    self.core.disconnected(now);
                }
            },
        }
    }

    fn encoded(&mut self, channel: Channel, encoded: pages::EncodedBatch) {
        let pages::EncodedBatch { batch, sent, keep } = encoded;
        self.versions.keep(keep);
        self.levels.encoded(self.connection.batches_flying());
        // What was encoded for a connection that is lost does not go over the next one.
        let cut = self.core.progress() == SourceProgress::PrecopyCut;
        let unsent = match batch {
            Some(batch) if !cut => self.connection.send_literals(channel, batch, sent).err(),
            Some(_) | None => Some(sent),
        };
        if let Some(sent) = unsent {
            self.core.literals_sent(self.clock.now(), sent);
        }
    }

    fn link_event(&mut self, event: LinkEvent) {
        let Some(what) = self.connection.take(event) else { return };
        let now = self.clock.now();
        match what {
            FromLink::Message(message) => {
                // Only the first: after a break in post-copy it is said again.
                if matches!(message, Message::Running { .. })
                    && let Some(paused) = self.paused_at.take()
                {
                    self.downtime_ms = paused.elapsed().as_secs_f64() * 1000.0;
                }
                self.core.message(now, message);
            }
            FromLink::LiteralsSent(sent) => self.core.literals_sent(now, sent),
            FromLink::Undecodable(error) => {
                self.core.failed(format!("the destination sent what cannot be decoded: {error}"))
            }
            FromLink::Lost(error) => {
                tracing::warn!(%error, "the connection to the destination was lost");
                self.link_error = Some(error);
                self.core.disconnected(now);
            }
        }
    }

    fn measure(&mut self) {
        while self.helpers.try_join_next().is_some() || self.vm_jobs.try_join_next().is_some() {}
        if let Some(measured) = self.connection.measure()
            && let Some(link) = self.connection.link()
        {
            let (path, wan) = (link.path(), link.wan_bytes());
            tracing::debug!(
                phase = self.core.phase_name(),
                wan_tx_bytes = wan.tx,
                window_bytes = path.window_bytes,
                rtt = ?path.rtt,
                lost_packets = path.lost_packets,
                queued = ?self.core.queued(),
                "the link"
            );
            self.levels.measure(measured.bytes_per_s);
            self.core.link(measured);
        }
    }
}

fn random() -> Result<[u8; 16], getrandom::Error> {
    let mut bytes = [0; 16];
    getrandom::fill(&mut bytes)?;
    Ok(bytes)
}
