//! The wiring of a process: what is started in which order, who watches what, and how it ends.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use dht::local::protocol::FailureCode;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;

use super::{Ending, Migration, Process, ProcessError, Stage};
use crate::config::{DeviceOptions, Serial, VmConfig};
use crate::control::api::VmState;
use crate::control::events::Events;
use crate::control::server;
use crate::control::socket::ControlSocket;
use crate::devices::virtio::assemble;
use crate::limits;
use crate::machine::{Machine, MachineError, RunState, StopReason};
use crate::migrate::report::{Progress, Report};
use crate::migrate::site::SitePages;
use crate::migrate::{HostIdentity, Incoming, MigrateError, Outgoing};

/// What `vmm run` and `vmm receive` have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Common {
    /// Where the control socket is put.
    pub control: PathBuf,
    /// The socket of the site's peer.
    pub site: Option<PathBuf>,
    /// This host's key; made if absent.
    pub identity: PathBuf,
    /// The keys of the hosts that this one talks to.
    pub authorized_keys: PathBuf,
}

/// Launches a VM and stays until it has ended or runs elsewhere.
/// # Errors
/// What is missing or wrong, before the VM has run. Later failures are in [`Ending`].
pub async fn run(common: &Common, config: VmConfig) -> Result<Ending, ProcessError> {
    let signals = Signals::new()?;
    let (socket, process) = start(common).await?;
    let machine = tokio::task::spawn_blocking(move || Machine::launch(&config)).await??;
    process.take_over(common, machine, true).await?;
    process.serve(socket, signals).await
}

/// Waits for a VM from another host, and stays until it has ended or runs elsewhere. `announce` gets the ticket once the endpoint
/// listens and the control socket answers.
/// # Errors
/// What is missing or wrong, before the endpoint listens. Later failures are in [`Ending`].
pub async fn receive(
    common: &Common,
    listen: SocketAddr,
    serial: Serial,
    devices: DeviceOptions,
    announce: impl FnOnce(&str) -> std::io::Result<()>,
) -> Result<Ending, ProcessError> {
    let signals = Signals::new()?;
    let (socket, process) = start(common).await?;
    // A disk that is not there is told now, not when a VM has come for it.
    assemble::check(&devices).map_err(MachineError::from)?;
    let incoming = Incoming::listen(listen, Arc::clone(&process.host), process.site_pages(), serial, devices)
        .await
        .map_err(ProcessError::Migrate)?;
    process.stage().incoming = Some(incoming.clone());
    process.tell_state();
    tracing::info!(ticket = incoming.ticket(), "listening for a VM");
    announce(&incoming.ticket())
        .map_err(|source| ProcessError::Io { action: "print the ticket on standard output", source })?;
    tokio::spawn(Arc::clone(&process).follow_incoming(incoming));
    process.serve(socket, signals).await
}

/// The socket comes first: whoever starts a second process on it learns so before anything else happens.
pub(super) async fn start(common: &Common) -> Result<(ControlSocket, Arc<Process>), ProcessError> {
    let socket = ControlSocket::bind(&common.control)?;
    let (identity, keys) = (common.identity.clone(), common.authorized_keys.clone());
    let host = tokio::task::spawn_blocking(move || HostIdentity::load_or_create(&identity, &keys))
        .await?
        .map_err(ProcessError::Migrate)?;
    let site = match &common.site {
        None => None,
        Some(path) => Some(dht::SiteClient::connect(path).await.map_err(|error| site_error(path, error))?),
    };
    let process = Process {
        control: common.control.clone(),
        host: Arc::new(host),
        site,
        events: Events::new(),
        stage: Mutex::new(Stage {
            incoming: None,
            machine: None,
            migration: None,
            busy: None,
            forecast: None,
            registration: None,
        }),
        steps: tokio::sync::Mutex::new(()),
        ending: watch::channel(None).0,
        completed: AtomicU64::new(0),
        failed: AtomicU64::new(0),
        cancelled: AtomicU64::new(0),
        doubt_told: AtomicBool::new(false),
    };
    Ok((socket, Arc::new(process)))
}

fn site_error(path: &Path, source: dht::SiteError) -> ProcessError {
    ProcessError::Site { socket: path.to_owned(), source }
}

/// Offers the VM's memory to the site's peer. The client offers it again should the peer restart.
async fn register(client: &dht::SiteClient, machine: &Machine) -> Result<dht::Registration, dht::SiteError> {
    let memory = machine.memory();
    let extents: Vec<dht::MemoryExtent> = memory
        .extents()
        .iter()
        .map(|e| dht::MemoryExtent { first_gfn: e.first_gfn, pages: e.pages, file_offset: e.file_offset })
        .collect();
    let descriptor = memory.read_only_fd()?;
    client.register_memory(&machine.description().name, descriptor, &extents).await
}

impl Process {
    pub(super) fn site_pages(&self) -> Option<Arc<dyn SitePages>> {
        self.site.clone().map(|site| Arc::new(site) as Arc<dyn SitePages>)
    }

    /// Offers a machine that was built here to the site, takes it as this process's own, and lets it run.
    pub(super) async fn take_over(
        self: &Arc<Self>,
        common: &Common,
        machine: Arc<Machine>,
        run: bool,
    ) -> Result<(), ProcessError> {
        if let (Some(client), Some(path)) = (&self.site, &common.site) {
            let registration = register(client, &machine).await.map_err(|error| site_error(path, error))?;
            self.stage().registration = Some(registration);
        }
        self.adopt(&machine);
        if run {
            tokio::task::spawn_blocking(move || machine.resume()).await??;
        }
        Ok(())
    }

    /// Takes a machine as this process's own, and watches it.
    fn adopt(self: &Arc<Self>, machine: &Arc<Machine>) {
        self.stage().machine = Some(Arc::clone(machine));
        self.tell_state();
        tokio::spawn(Arc::clone(self).follow_machine(Arc::clone(machine)));
    }

    /// The VM has left and may come back: the site's peer keeps a copy of its memory, if it keeps any. Only this process's own end waits for
    /// that, whoever asked for the migration has the report; and a signal ends it at once.
    async fn leave_checkpoint(&self) {
        let Some(registration) = self.stage().registration.take() else { return };
        let mut ending = self.ending.subscribe();
        let retained = tokio::select! {
            retained = tokio::time::timeout(limits::RETAIN, registration.retain()) => retained,
            _ended = ending.wait_for(Option::is_some) => return,
        };
        match retained {
            Ok(Ok(dht::Retained { pages, bytes })) => {
                tracing::info!(pages, bytes, "the site's peer keeps what it did not have of the VM's memory");
            }
            Ok(Err(dht::SiteError::Refused { code: FailureCode::RetainsNothing, message })) => {
                tracing::debug!(message, "nothing of the VM's memory is kept here");
            }
            Ok(Err(error)) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the site's peer keeps nothing of the VM's memory: should the VM come back, more of it will cross the WAN"
            ),
            Err(_) => tracing::warn!(
                limit_s = limits::RETAIN.as_secs(),
                "the site's peer took too long to copy the VM's memory: nothing of it is kept"
            ),
        }
    }

    /// Offers the memory of a VM that arrived. The VM runs already, so a peer that is away is tried again, not fatal.
    async fn register_until_done(self: Arc<Self>, machine: Arc<Machine>) {
        let Some(client) = &self.site else { return };
        let mut ending = self.ending.subscribe();
        let mut wait = limits::SITE_RETRY_FIRST;
        loop {
            match register(client, &machine).await {
                Ok(registration) => {
                    self.stage().registration = Some(registration);
                    return;
                }
                Err(error) => {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        retry_ms = wait.as_millis(),
                        "the VM's memory could not be offered to the site's peer"
                    );
                }
            }
            if tokio::time::timeout(wait, ending.wait_for(Option::is_some)).await.is_ok() {
                return;
            }
            wait = (wait * 2).min(limits::SITE_RETRY_LONGEST);
        }
    }

    async fn follow_machine(self: Arc<Self>, machine: Arc<Machine>) {
        let mut states = machine.watch();
        loop {
            let state = states.borrow_and_update().clone();
            self.tell_state();
            if let RunState::Stopped(reason) = state {
                return self.machine_ended(machine, reason).await;
            }
            if states.changed().await.is_err() {
                return self.end(Ending::Failed("the machine was dropped".to_owned()));
            }
        }
    }

    /// The VM has ended by itself or by an operator: its threads and devices are brought to rest, and what the guest wrote last is out,
    /// before the process ends.
    async fn machine_ended(&self, machine: Arc<Machine>, reason: StopReason) {
        let ending = match &reason {
            StopReason::Requested => Ending::Requested,
            StopReason::Guest => Ending::Guest,
            StopReason::Failed(failure) => Ending::Failed(failure.clone()),
            // The report comes first: whoever follows the migration ends the process.
            StopReason::Migrated => return,
        };
        match tokio::task::spawn_blocking(move || machine.stop(reason)).await {
            Ok(()) => self.end(ending),
            Err(error) => self.end(Ending::Failed(error.to_string())),
        }
    }

    async fn follow_incoming(self: Arc<Self>, incoming: Incoming) {
        let mut status = incoming.status();
        let mut ticks = ticks();
        let arrived = incoming.machine();
        tokio::pin!(arrived);
        let mut news = true;
        let arrived = loop {
            tokio::select! {
                arrived = &mut arrived => break arrived,
                changed = status.changed(), if !news => news = changed.is_ok(),
                _ = ticks.tick(), if news => {
                    news = false;
                    self.tell_state();
                    self.events.incoming(status.borrow_and_update().clone());
                }
            }
        };
        self.events.incoming(status.borrow().clone());
        match arrived {
            Ok(machine) => {
                self.adopt(&machine);
                self.register_until_done(machine).await;
            }
            Err(error) => self.end(Ending::Failed(ProcessError::Migrate(error).chain())),
        }
    }

    pub(super) async fn follow_migration(
        self: Arc<Self>,
        machine: Arc<Machine>,
        outgoing: Outgoing,
        ended: watch::Sender<Option<Result<Report, MigrateError>>>,
    ) {
        let mut progress = outgoing.progress();
        let mut ticks = ticks();
        let finished = outgoing.finished();
        tokio::pin!(finished);
        let step = |progress: &Progress| (progress.phase, progress.round);
        let (mut told, mut lives, mut news) = (None, true, true);
        let end = loop {
            tokio::select! {
                end = &mut finished => break end,
                changed = progress.changed(), if lives => {
                    lives = changed.is_ok();
                    news |= lives;
                    // A phase may last less than a tick, and whoever follows is to see it.
                    if told == Some(step(&progress.borrow())) {
                        continue;
                    }
                }
                _ = ticks.tick(), if news => {}
            }
            let now = progress.borrow_and_update().clone();
            (told, news) = (Some(step(&now)), false);
            self.tell_state();
            self.events.progress(now);
        };
        let to = self.stage().migration.as_ref().map(|migration| migration.to.clone()).unwrap_or_default();
        let end = end.map(|report| Report { forecast: self.forecast_of(&to), ..report });
        self.events.progress(progress.borrow().clone());
        let counter = match &end {
            Ok(report) => {
                tracing::info!(?report, "the migration has completed");
                &self.completed
            }
            Err(error) => {
                tracing::warn!(
                    error = error as &dyn std::error::Error,
                    "the migration has ended without completing"
                );
                if matches!(error, MigrateError::Cancelled) { &self.cancelled } else { &self.failed }
            }
        };
        counter.fetch_add(1, Ordering::Relaxed);
        self.events.ended(end.clone().map_err(|error| ProcessError::Migration(error).detail()));
        let completed = end.is_ok();
        ended.send_replace(Some(end));
        self.tell_state();
        let run_state = machine.watch().borrow().clone();
        if completed {
            self.leave_checkpoint().await;
            self.end(Ending::Migrated);
        } else if run_state == RunState::Stopped(StopReason::Migrated) {
            self.end(Ending::LetGo);
        }
    }

    /// Answers the control socket until the process ends.
    pub(super) async fn serve(
        self: Arc<Self>,
        socket: ControlSocket,
        mut signals: Signals,
    ) -> Result<Ending, ProcessError> {
        let mut ending = self.ending.subscribe();
        let mut ended = self.ending.subscribe();
        let shutdown = async move {
            // The sender lives in this process's value, so an error cannot come before the end.
            let _ended = ended.wait_for(Option::is_some).await;
        };
        let listener = socket
            .listener()
            .map_err(|source| ProcessError::Io { action: "listen on the control socket", source })?;
        let mut server = tokio::spawn(server::serve(listener, Arc::clone(&self), shutdown));
        let ending = loop {
            tokio::select! {
                end = ending.wait_for(Option::is_some) => match end.map(|end| end.clone()) {
                    Ok(Some(end)) => break end,
                    Ok(None) | Err(_) => break Ending::Failed("nobody watches the VM any more".to_owned()),
                },
                name = signals.next() => {
                    tracing::info!(signal = name, "a signal asks this process to end");
                    tokio::spawn(Arc::clone(&self).interrupted());
                }
            }
        };
        self.stage().registration = None;
        self.tell_state();
        self.events.close();
        match tokio::time::timeout(limits::DRAIN, &mut server).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(source))) => {
                return Err(ProcessError::Io { action: "serve the control socket", source });
            }
            Ok(Err(error)) => return Err(error.into()),
            Err(_) => {
                tracing::warn!("a client of the control socket did not take its answer; it is left behind");
                server.abort();
            }
        }
        Ok(ending)
    }

    /// SIGTERM, SIGINT or SIGHUP: ends the VM, but never a VM in doubt at the first time of asking.
    async fn interrupted(self: Arc<Self>) {
        let (machine, migration) = {
            let stage = self.stage();
            (stage.machine.clone(), stage.migration.clone().filter(Migration::active))
        };
        let (state, _) = self.state();
        match state {
            VmState::InDoubt if !self.doubt_told.swap(true, Ordering::Relaxed) => {
                tracing::warn!(control = %self.control.display(),
                    "not ended: this process holds a VM in doubt. `vmm resolve --control SOCKET --run-here | --let-go` ends that; a second \
                     signal ends this process and its copy of the VM is lost");
                return;
            }
            VmState::InDoubt => return self.end(Ending::DroppedInDoubt),
            VmState::Receiving | VmState::Stopped => return self.end(Ending::Requested),
            VmState::Created | VmState::Running | VmState::Paused | VmState::Migrating => {}
        }
        if migration.is_some() {
            if let Err(error) = self.cancel().await {
                tracing::warn!(error = error.chain(), "the migration could not be cancelled");
            }
            // Past Commit the VM may run at the destination already: the migration's own end decides, or the next signal in doubt.
            if !matches!(self.state().0, VmState::Running | VmState::Paused) {
                return;
            }
        }
        let Some(machine) = machine else { return self.end(Ending::Requested) };
        if let Err(error) = self.stop_machine(machine).await {
            self.end(Ending::Failed(error.chain()));
        }
    }
}

/// No more often than [`limits::PROGRESS_PERIOD`].
fn ticks() -> tokio::time::Interval {
    let mut ticks = tokio::time::interval(limits::PROGRESS_PERIOD);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks
}

/// SIGTERM, SIGINT, and SIGHUP: a terminal that goes away gives the VM its orderly end.
pub(super) struct Signals {
    terminate: Signal,
    hangup: Signal,
    interrupt: Signal,
}

impl Signals {
    pub(super) fn new() -> Result<Self, ProcessError> {
        let on =
            |kind| signal(kind).map_err(|source| ProcessError::Io { action: "watch for signals", source });
        Ok(Self {
            terminate: on(SignalKind::terminate())?,
            hangup: on(SignalKind::hangup())?,
            interrupt: on(SignalKind::interrupt())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.hangup.recv() => "SIGHUP",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
