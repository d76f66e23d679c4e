//! The life of one vmm process: a VM launched or received here, until it ends or runs elsewhere.
//!
//! ```text
//!  vmm run ─────► created ──► running ◄──► paused
//!                             │  ▲  │
//!                   migrate   │  │  └── guest ends, operator stops ──► stopped ──► process exits
//!                             ▼  │ failed, cancelled
//!                          migrating ── Running seen ─────────────────► stopped (migrated) ──► process exits
//!                             │  ▲                                       ▲
//!                 Commit sent,│  │ answered                   let go     │
//!              connection lost▼  │                                       │
//!                          in_doubt ─────────────────────────────────────┘
//!                             └── run here ──► running
//!
//!  vmm restore ─► running, or paused, and on as above
//!
//!  vmm receive ─► receiving ── Commit ──► running, and on as above
//!                     │  ▲ dropped
//!  Ready said, source ▼  │
//!         lost     in_doubt ── run here ──► running
//! ```
//! The state is never stored: [`Process::state`] derives it from the machine, the migration and the endpoint, which each know their own
//! part. This file has the operations; `snapshots` has those with snapshots, `forecast` the dry run; `run` has the wiring, the watchers and the end.

mod error;
mod forecast;
mod run;
mod snapshots;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

pub use error::ProcessError;
pub use run::{Common, receive, run};
pub use snapshots::{RestoreOptions, restore};

use crate::control::api::{MigrateRequest, MigrationStatus, VmState, VmStatus};
use crate::control::events::Events;
use crate::limits;
use crate::machine::{Machine, RunState, StopReason};
use crate::migrate::report::{Forecast, IncomingPhase, Phase, Report};
use crate::migrate::ticket::Ticket;
use crate::migrate::{HostIdentity, Incoming, MigrateError, MigrateOptions, Outgoing};

/// How a process ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest powered itself off or asked for a reset.
    Guest,
    /// An operator or a signal stopped it.
    Requested,
    /// The guest or KVM failed.
    Failed(String),
    /// The VM runs at the destination of a migration.
    Migrated,
    /// The operator let a VM in doubt go.
    LetGo,
    /// A second signal ended a process whose VM was in doubt.
    DroppedInDoubt,
}

/// Migrations that have ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MigrationCounts {
    /// The VM runs there.
    pub completed: u64,
    /// It runs on here.
    pub failed: u64,
    /// It runs on here because the operator wanted so.
    pub cancelled: u64,
}

/// One vmm process, as its control socket and its signals see it.
#[derive(Debug)]
pub struct Process {
    control: PathBuf,
    host: Arc<HostIdentity>,
    site: Option<dht::SiteClient>,
    events: Events,
    stage: Mutex<Stage>,
    /// Held by every operation that changes something, so that two of them never interleave.
    steps: tokio::sync::Mutex<()>,
    ending: watch::Sender<Option<Ending>>,
    completed: AtomicU64,
    failed: AtomicU64,
    cancelled: AtomicU64,
    /// A signal has been refused because the VM was in doubt: the next one is obeyed.
    doubt_told: AtomicBool,
}

/// What is here.
#[derive(Debug)]
struct Stage {
    /// The endpoint, in a process of `vmm receive`. It stays after the VM's arrival: the source may still ask.
    incoming: Option<Incoming>,
    /// The VM.
    machine: Option<Arc<Machine>>,
    /// The running or last migration away.
    migration: Option<Migration>,
    /// What has the dirty log besides migrations, if anything does: a snapshot, which also pauses the VM itself, or a dry run.
    busy: Option<&'static str>,
    /// What the last dry run said, and of which destination.
    forecast: Option<(String, Forecast)>,
    /// Keeps the VM's memory with the site's peer.
    registration: Option<dht::Registration>,
}

/// Something that other operations wait for; its end is when this is dropped.
#[derive(Debug)]
struct Busy(Arc<Process>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.stage().busy = None;
    }
}

/// A migration away, followed by a task that publishes its end.
#[derive(Clone, Debug)]
struct Migration {
    to: String,
    outgoing: Outgoing,
    end: watch::Receiver<Option<Result<Report, MigrateError>>>,
}

impl Migration {
    fn active(&self) -> bool {
        self.end.borrow().is_none()
    }

    fn in_doubt(&self) -> bool {
        self.active() && self.outgoing.progress().borrow().phase == Phase::InDoubt
    }

    fn status(&self) -> MigrationStatus {
        let end = self.end.borrow().clone();
        let error = end.as_ref().and_then(|end| end.as_ref().err().cloned());
        MigrationStatus {
            to: self.to.clone(),
            active: end.is_none(),
            in_doubt: self.in_doubt(),
            progress: self.outgoing.progress().borrow().clone(),
            report: end.and_then(Result::ok),
            error: error.map(|error| ProcessError::Migration(error).detail()),
        }
    }
}

impl Process {
    /// What this process is doing, and for people why.
    #[must_use]
    pub fn state(&self) -> (VmState, Option<String>) {
        self.stage().state()
    }

    /// `GET /v1/vm`.
    #[must_use]
    pub fn status(&self) -> VmStatus {
        let stage = self.stage();
        let (state, reason) = stage.state();
        let description = stage.machine.as_ref().map(|machine| machine.description());
        let pages: Option<u64> = description.as_ref().map(|d| d.extents.iter().map(|e| e.pages).sum());
        VmStatus {
            name: description.as_ref().map(|d| d.name.clone()),
            state,
            reason,
            pid: std::process::id(),
            memory_bytes: pages.map(|pages| pages * page::PAGE_SIZE as u64),
            cpus: description.as_ref().map(|d| d.cpus),
            heartbeat: stage.machine.as_ref().map(|machine| machine.heartbeat()),
            balloon: stage.machine.as_ref().and_then(|machine| machine.balloon()),
            ticket: stage.incoming.as_ref().filter(|_| stage.machine.is_none()).map(Incoming::ticket),
            migration: stage.migration.as_ref().map(Migration::status),
            incoming: stage.incoming.as_ref().map(|incoming| incoming.status().borrow().clone()),
        }
    }

    /// What happens, for those who follow.
    #[must_use]
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// Migrations away that have ended.
    #[must_use]
    pub fn migration_counts(&self) -> MigrationCounts {
        MigrationCounts {
            completed: self.completed.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
            cancelled: self.cancelled.load(Ordering::Relaxed),
        }
    }

    /// Lets the virtual CPUs stand still. Idempotent.
    /// # Errors
    /// If the VM is neither running nor paused.
    pub async fn pause(&self) -> Result<(), ProcessError> {
        let _step = self.steps.lock().await;
        let machine = self.machine_at_rest("pause")?;
        tokio::task::spawn_blocking(move || machine.pause()).await??;
        self.tell_state();
        Ok(())
    }

    /// Lets the virtual CPUs run. Idempotent.
    /// # Errors
    /// If the VM is neither running nor paused.
    pub async fn resume(&self) -> Result<(), ProcessError> {
        let _step = self.steps.lock().await;
        let machine = self.machine_at_rest("resume")?;
        tokio::task::spawn_blocking(move || machine.resume()).await??;
        self.tell_state();
        Ok(())
    }

    /// Asks the guest for so much of its memory; it gives or takes back what is missing in its own time.
    /// # Errors
    /// If the VM is neither running nor paused, has no balloon, or `bytes` is no size that its balloon can have.
    pub async fn set_balloon(&self, bytes: u64) -> Result<(), ProcessError> {
        let _step = self.steps.lock().await;
        let machine = self.machine_at_rest("change the balloon of")?;
        machine.set_balloon(bytes).map_err(ProcessError::Balloon)
    }

    /// Ends the VM and this process, or the wait for a VM.
    /// # Errors
    /// If the VM is on its way to another host, or in doubt.
    pub async fn stop(&self) -> Result<(), ProcessError> {
        let _step = self.steps.lock().await;
        let (state, _) = self.state();
        if state == VmState::Receiving {
            self.end(Ending::Requested);
            return Ok(());
        }
        let machine = self.machine_at_rest("stop")?;
        self.stop_machine(machine).await
    }

    async fn stop_machine(&self, machine: Arc<Machine>) -> Result<(), ProcessError> {
        let stopping = tokio::task::spawn_blocking(move || machine.stop(StopReason::Requested));
        match tokio::time::timeout(limits::STOP_ANSWER, stopping).await {
            Ok(stopped) => stopped?,
            // Where KVM itself waits for a page that nobody gives, no signal ends that. Such a virtual CPU never gets back to the guest.
            Err(_) => {
                tracing::warn!(
                    "the VM has stopped; a thread of it stands in the kernel, and ends with the process"
                )
            }
        }
        self.tell_state();
        Ok(())
    }

    /// Makes every other operation wait until what this returns is dropped.
    fn busy_with(self: &Arc<Self>, why: &'static str) -> Busy {
        self.stage().busy = Some(why);
        Busy(Arc::clone(self))
    }

    /// Moves the VM; returns when it runs there, or with the reason why it still runs here. The migration goes on if the caller
    /// stops waiting.
    /// # Errors
    /// If the VM is not running, or the migration fails, is cancelled, or stands in doubt for [`limits::IN_DOUBT_ANSWER`].
    pub async fn migrate(self: &Arc<Self>, request: MigrateRequest) -> Result<Report, ProcessError> {
        check_request(&request)?;
        let migration = {
            let _step = self.steps.lock().await;
            self.start_migration(request)?
        };
        self.wait_for_end(migration).await
    }

    fn start_migration(self: &Arc<Self>, request: MigrateRequest) -> Result<Migration, ProcessError> {
        let machine = self.machine_complete("migrate")?;
        let (state, _) = self.state();
        if state != VmState::Running {
            return Err(wrong_state("migrate", state));
        }
        let options = migrate_options(request);
        let to = options.to.clone();
        tracing::info!(?options, "a migration begins");
        let outgoing =
            Outgoing::start(Arc::clone(&machine), self.site_pages(), Arc::clone(&self.host), options);
        let (ended, end) = watch::channel(None);
        let migration = Migration { to, outgoing, end };
        self.stage().migration = Some(migration.clone());
        self.tell_state();
        tokio::spawn(Arc::clone(self).follow_migration(machine, migration.outgoing.clone(), ended));
        Ok(migration)
    }

    async fn wait_for_end(&self, migration: Migration) -> Result<Report, ProcessError> {
        let mut end = migration.end.clone();
        let mut progress = migration.outgoing.progress();
        let long_in_doubt = async {
            loop {
                if progress.wait_for(|p| p.phase == Phase::InDoubt).await.is_err() {
                    return std::future::pending().await;
                }
                let answered = progress.wait_for(|p| p.phase != Phase::InDoubt);
                if tokio::time::timeout(limits::IN_DOUBT_ANSWER, answered).await.is_err() {
                    return;
                }
            }
        };
        let ended = tokio::select! {
            ended = end.wait_for(Option::is_some) => ended.map(|end| end.clone()),
            () = long_in_doubt => return Err(ProcessError::InDoubt),
        };
        match ended {
            Ok(Some(Ok(report))) => Ok(report),
            Ok(Some(Err(error))) => Err(ProcessError::Migration(error)),
            // The task that follows a migration always publishes its end before it drops the sender.
            Ok(None) | Err(_) => Err(ProcessError::NoMigration("wait for")),
        }
    }

    /// The running or the last migration.
    /// # Errors
    /// If there has been none.
    pub fn migration(&self) -> Result<MigrationStatus, ProcessError> {
        self.stage().migration.as_ref().map(Migration::status).ok_or(ProcessError::NoMigration("show"))
    }

    /// Cancels the running migration; returns when the VM runs on here.
    /// # Errors
    /// If none runs, or it has gone too far.
    pub async fn cancel(&self) -> Result<(), ProcessError> {
        let migration = self.stage().migration.clone().filter(Migration::active);
        let migration = migration.ok_or(ProcessError::NoMigration("cancel"))?;
        if migration.in_doubt() {
            return Err(ProcessError::TooLate("it is in doubt; `vmm resolve` ends that"));
        }
        if matches!(migration.outgoing.progress().borrow().phase, Phase::Postcopy | Phase::PostcopyCut) {
            return Err(ProcessError::TooLate(
                "the VM runs at the destination, and the rest of its memory follows",
            ));
        }
        migration.outgoing.cancel();
        let mut end = migration.end.clone();
        match tokio::time::timeout(limits::CANCEL_WAIT, end.wait_for(Option::is_some)).await {
            Ok(Ok(end)) if matches!(end.as_ref(), Some(Ok(_))) => {
                Err(ProcessError::TooLate("the VM runs at the destination"))
            }
            Ok(_) => Ok(()),
            Err(_) => Err(ProcessError::TooLate("Commit has been sent and is not answered yet")),
        }
    }

    /// The operator's word on a VM in doubt.
    /// # Errors
    /// If nothing is in doubt.
    pub async fn resolve(&self, run_here: bool) -> Result<(), ProcessError> {
        let _step = self.steps.lock().await;
        let (incoming, migration) = {
            let stage = self.stage();
            (stage.incoming.clone(), stage.migration.clone())
        };
        tracing::warn!(run_here, "an operator resolves the doubt");
        let resolved = match migration.filter(Migration::in_doubt) {
            Some(migration) => migration.outgoing.resolve(run_here),
            None => incoming.map_or(Err(MigrateError::NotInDoubt), |incoming| incoming.resolve(run_here)),
        };
        resolved.map_err(ProcessError::Migration)
    }

    /// The machine, if it is here and nothing else is busy with it.
    fn machine_at_rest(&self, operation: &'static str) -> Result<Arc<Machine>, ProcessError> {
        let stage = self.stage();
        if let Some(why) = stage.busy {
            return Err(ProcessError::Busy { operation, why });
        }
        let (state, _) = stage.state();
        match state {
            VmState::InDoubt | VmState::Receiving | VmState::Migrating | VmState::Stopped => {
                Err(wrong_state(operation, state))
            }
            VmState::Created | VmState::Running | VmState::Paused => {
                stage.machine.clone().ok_or_else(|| wrong_state(operation, state))
            }
        }
    }

    /// As [`Process::machine_at_rest`], for what reads all of memory.
    fn machine_complete(&self, operation: &'static str) -> Result<Arc<Machine>, ProcessError> {
        let machine = self.machine_at_rest(operation)?;
        let pages = self.stage().incoming.as_ref().map_or(0, |incoming| {
            let status = incoming.status();
            let status = status.borrow();
            match status.phase {
                IncomingPhase::Postcopy | IncomingPhase::Starved => status.absent_pages.max(1),
                IncomingPhase::Listening
                | IncomingPhase::Receiving
                | IncomingPhase::ReceivingCut
                | IncomingPhase::Held
                | IncomingPhase::Running
                | IncomingPhase::Closed => 0,
            }
        });
        if pages == 0 { Ok(machine) } else { Err(ProcessError::Incomplete { operation, pages }) }
    }

    fn stage(&self) -> MutexGuard<'_, Stage> {
        // Every change is one assignment, so a panic elsewhere leaves nothing half done.
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell_state(&self) {
        let (state, reason) = self.state();
        self.events.state(state, reason);
    }

    fn end(&self, ending: Ending) {
        self.ending.send_if_modified(|first| {
            let none_yet = first.is_none();
            if none_yet {
                *first = Some(ending);
            }
            none_yet
        });
    }
}

impl Stage {
    fn state(&self) -> (VmState, Option<String>) {
        let Some(machine) = &self.machine else { return self.state_without_machine() };
        let machine = machine.watch().borrow().clone();
        if let RunState::Stopped(reason) = machine {
            return (VmState::Stopped, Some(stop_reason(&reason)));
        }
        match self.migration.as_ref().filter(|migration| migration.active()) {
            Some(migration) if migration.in_doubt() => {
                (VmState::InDoubt, Some(ProcessError::InDoubt.to_string()))
            }
            Some(migration) => (VmState::Migrating, Some(format!("to {}", migration.to))),
            None => match machine {
                RunState::Created => (VmState::Created, None),
                RunState::Running => (VmState::Running, self.busy_reason()),
                RunState::Paused => (VmState::Paused, self.busy_reason()),
                RunState::Stopped(reason) => (VmState::Stopped, Some(stop_reason(&reason))),
            },
        }
    }

    fn busy_reason(&self) -> Option<String> {
        self.busy.map(str::to_owned)
    }

    fn state_without_machine(&self) -> (VmState, Option<String>) {
        let Some(incoming) = &self.incoming else { return (VmState::Created, None) };
        let status = incoming.status().borrow().clone();
        match status.phase {
            IncomingPhase::Held => {
                let reason = "in doubt: the VM is complete here and its source was lost before it said Commit; it stands still. If you \
                              know that it does not run at its source: `vmm resolve --run-here`; if it does: `vmm resolve --let-go`";
                (VmState::InDoubt, Some(reason.to_owned()))
            }
            IncomingPhase::Closed => {
                (VmState::Stopped, status.last_failure.or_else(|| Some("the endpoint was closed".to_owned())))
            }
            IncomingPhase::Receiving => (
                VmState::Receiving,
                Some(format!("a VM arrives from {}", status.source.as_deref().unwrap_or("its source"))),
            ),
            IncomingPhase::ReceivingCut => {
                let source = status.source.as_deref().unwrap_or("its source");
                let reason = format!(
                    "a VM arrives from {source}; the connection is lost, and what is here is kept for the source to come back"
                );
                (VmState::Receiving, Some(reason))
            }
            // The machine is given to the process in a moment.
            IncomingPhase::Listening
            | IncomingPhase::Running
            | IncomingPhase::Postcopy
            | IncomingPhase::Starved => (
                VmState::Receiving,
                status.last_failure.map(|failure| format!("the last attempt failed: {failure}")),
            ),
        }
    }
}

fn stop_reason(reason: &StopReason) -> String {
    match reason {
        StopReason::Requested => "stopped by an operator".to_owned(),
        StopReason::Guest => "the guest powered off or restarted".to_owned(),
        StopReason::Failed(failure) => format!("failed: {failure}"),
        StopReason::Migrated => "it runs at the destination of its migration".to_owned(),
    }
}

fn wrong_state(operation: &'static str, state: VmState) -> ProcessError {
    let advice = match state {
        VmState::Receiving => "none is here yet",
        VmState::Migrating => "wait for the migration's end or cancel it",
        VmState::Stopped => "it has ended",
        VmState::Created | VmState::Running => "try again when it runs",
        VmState::Paused => "resume it first",
        VmState::InDoubt => "resolve that first (`vmm resolve`)",
    };
    ProcessError::WrongState { operation, state, advice }
}

fn migrate_options(request: MigrateRequest) -> MigrateOptions {
    let MigrateRequest {
        to,
        downtime_ms,
        mode,
        bandwidth_bits,
        delta_cache_bytes,
        auto_converge,
        spill,
        resume_for_ms,
    } = request;
    MigrateOptions {
        to,
        downtime_ms,
        mode,
        bandwidth_bits,
        delta_cache_bytes,
        auto_converge,
        spill: spill.map(Into::into),
        resume_for_ms,
    }
}

fn check_request(request: &MigrateRequest) -> Result<(), ProcessError> {
    let MigrateRequest {
        to,
        downtime_ms,
        mode: _,
        bandwidth_bits,
        delta_cache_bytes: _,
        auto_converge: _,
        spill,
        resume_for_ms,
    } = request;
    let wrong = |message: String| Err(ProcessError::BadRequest(message));
    if to.is_empty() || to.len() > limits::DESTINATION_BYTES {
        return wrong(format!(
            "`to` must have 1 to {} bytes, it has {}",
            limits::DESTINATION_BYTES,
            to.len()
        ));
    }
    if *downtime_ms == 0 || *downtime_ms > limits::DOWNTIME_MS {
        return wrong(format!(
            "`downtime_ms` must be from 1 to {}, it is {downtime_ms}",
            limits::DOWNTIME_MS
        ));
    }
    if *resume_for_ms > limits::RESUME_FOR_MS {
        return wrong(format!(
            "`resume_for_ms` must be at most {}, it is {resume_for_ms}",
            limits::RESUME_FOR_MS
        ));
    }
    if *bandwidth_bits == Some(0) {
        return wrong("`bandwidth_bits` must be at least 1; leave it out for no limit".to_owned());
    }
    if spill.as_ref().is_some_and(|dir| !std::path::Path::new(dir).is_absolute()) {
        return wrong("`spill` must be an absolute path".to_owned());
    }
    // A ticket that cannot be read is the caller's mistake, and no migration begins for it.
    to.parse::<Ticket>().map(|_| ()).map_err(ProcessError::Migration)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ticket_that_cannot_be_read_begins_no_migration() {
        let key = "0".repeat(63);
        for bad in [format!("127.0.0.1:7201#{key}"), "127.0.0.1".to_owned()] {
            let error = check_request(&MigrateRequest::to(bad.as_str())).unwrap_err();
            assert_eq!((error.http_status(), error.detail().code.as_str()), (400, "bad_ticket"), "{bad}");
        }
        assert!(check_request(&MigrateRequest::to("127.0.0.1:7201")).is_ok());
    }
}
