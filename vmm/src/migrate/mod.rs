//! Migration's I/O side: drives the pure core in `migration-proto` over QUIC, KVM and the site's peer.
//!
//! [`Outgoing`] is one migration away from this process, [`Incoming`] an endpoint at which a VM can arrive. Both run in
//! tokio tasks of their own; the handles follow them and steer them.
//!
//! ```text
//!  source.rs ── pages.rs (name, encode) ── wires.rs ── channel.rs ── transport.rs ═══ QUIC ═══ … ── wires.rs ── arrival.rs
//!     │ owns migration_proto::source::Source                                                pages.rs (decode, check) ──┤
//!     └ machine: dirty log, pause, state                       owns migration_proto::destination::Destination, asks site.rs
//! ```
//! While a migration is under way only its driver may resume the VM: the control socket refuses `pause`, `resume` and `stop`.

mod arrival;
mod bundle;
pub mod channel;
mod clock;
mod congestion;
mod connection;
mod copies;
mod dial;
pub mod error;
mod forecast;
pub mod identity;
mod incoming;
mod late;
pub mod level;
pub mod limits;
pub mod pages;
mod probe;
pub mod report;
pub mod site;
mod source;
mod spill_server;
pub mod throttle;
pub mod ticket;
pub mod tls;
pub mod transport;
pub mod versions;
pub mod wires;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use migration_proto::Layout;
use page::{REGION_PAGES, RegionId};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

pub use error::MigrateError;
pub use identity::HostIdentity;
use report::{IncomingPhase, IncomingStatus, Phase, Progress, Report};
use site::SitePages;
use source::{Assignment, Command};
pub use spill_server::serve_spill;
use ticket::Ticket;
use transport::Endpoint;

use crate::config::{DeviceOptions, Serial};
use crate::machine::{Machine, MachineDescription};
use crate::memory::Extent;

/// How a VM is to move.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize, clap::ValueEnum,
)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// All of its memory first: the VM stands still for what is left when more rounds do not help.
    Precopy,
    /// As `precopy`; when what is left does not come to fit the downtime, the VM goes first and the rest follows it.
    #[default]
    Hybrid,
    /// One round, then the VM; what it wrote meanwhile follows it.
    Postcopy,
}

impl From<Mode> for migration_proto::Mode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Precopy => Self::Precopy,
            Mode::Hybrid => Self::Hybrid,
            Mode::Postcopy => Self::Postcopy,
        }
    }
}

/// What an operator asks of a migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrateOptions {
    /// A ticket (`ADDR:PORT#HEX64`), or `ADDR:PORT` alone: then the destination's key must be among the authorised ones.
    pub to: String,
    /// How long the guest may stand still at switchover, milliseconds.
    pub downtime_ms: u64,
    /// Whether the VM may run there before its memory is complete.
    pub mode: Mode,
    /// The most that bulk data may take of the link, bits a second; `None` leaves it to congestion control.
    pub bandwidth_bits: Option<u64>,
    /// The most that versions of pages that the destination has may take at the source, bytes, so that pages written again go as deltas: 0 for no
    /// deltas; `None` for an eighth of the VM's memory, and no more than 1 GiB.
    pub delta_cache_bytes: Option<u64>,
    /// Whether a guest that writes faster than the link carries may be slowed down, where it does not go by post-copy.
    pub auto_converge: bool,
    /// A directory for a spill file: before the VM runs at the destination, every page that it lacks there stands here. An absolute path.
    pub spill: Option<PathBuf>,
    /// How long the destination is dialled again when the connection is lost before the hand-over, milliseconds; 0: the loss ends the migration.
    pub resume_for_ms: u64,
}

/// One migration away from this process. Dropping the handle does not end the migration.
#[derive(Clone, Debug)]
pub struct Outgoing {
    progress: watch::Receiver<Progress>,
    commands: mpsc::Sender<Command>,
    result: watch::Receiver<Option<Result<Report, MigrateError>>>,
}

impl Outgoing {
    /// Starts it; must be called within a tokio runtime.
    #[must_use]
    pub fn start(
        machine: Arc<Machine>,
        site: Option<Arc<dyn SitePages>>,
        host: Arc<HostIdentity>,
        options: MigrateOptions,
    ) -> Self {
        let (progress, following) = watch::channel(Progress::default());
        let (commands, receiver) = mpsc::channel(limits::COMMANDS_BOUND);
        let (end, result) = watch::channel(None);
        let assignment = Assignment { machine, site, host, options, progress, commands: receiver };
        tokio::spawn(async move {
            let ended = source::run(assignment).await;
            end.send_replace(Some(ended));
        });
        Self { progress: following, commands, result }
    }

    /// Follows its progress; [`report::Phase::InDoubt`] and [`report::Phase::Ended`] are among the phases.
    #[must_use]
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.progress.clone()
    }

    /// Asks it to end with the VM running on here. After Commit has been sent it has no effect: nobody can take that back.
    pub fn cancel(&self) {
        if self.commands.try_send(Command::Cancel).is_err() {
            tracing::debug!("cancelled a migration that has ended, or is being cancelled");
        }
    }

    /// The operator's word on a migration in doubt: `true` lets the VM run here, `false` lets it go.
    ///
    /// # Errors
    /// [`MigrateError::NotInDoubt`] if it is not in doubt.
    pub fn resolve(&self, run_here: bool) -> Result<(), MigrateError> {
        if !matches!(self.progress.borrow().phase, Phase::InDoubt | Phase::PostcopyCut) {
            return Err(MigrateError::NotInDoubt);
        }
        self.commands.try_send(Command::Resolve { run_here }).map_err(|_| MigrateError::NotInDoubt)
    }

    /// Waits for the end. `Ok` means that the VM is no more here: it runs at the destination, or the operator let it go while in
    /// doubt ([`report::Outcome::InDoubt`]); this machine has stopped with [`crate::machine::StopReason::Migrated`]. An error says why it
    /// still runs here. While in doubt it waits on. May be called any number of times.
    ///
    /// # Errors
    /// Why the VM still runs here.
    pub async fn finished(&self) -> Result<Report, MigrateError> {
        let mut result = self.result.clone();
        let ended = result.wait_for(Option::is_some).await.map_err(|_| MigrateError::Died)?;
        ended.clone().ok_or(MigrateError::Died)?
    }
}

/// What a migration as `options` say would cost, found out without moving anything: samples memory, watches what the guest writes, asks the destination's
/// site, and fills the link for a moment. Takes some seconds. Nothing else may use the machine's dirty log meanwhile.
///
/// # Errors
/// If the destination cannot be reached or would refuse the VM.
pub async fn dry_run(
    machine: Arc<Machine>,
    site: Option<Arc<dyn SitePages>>,
    host: Arc<HostIdentity>,
    options: MigrateOptions,
) -> Result<report::Forecast, MigrateError> {
    forecast::run(machine, site, host, options).await
}

/// An endpoint at which a VM can arrive. It listens until a VM runs here, and answers its source's questions for as long as the
/// handle (or a clone of it) lives.
#[derive(Clone, Debug)]
pub struct Incoming {
    ticket: String,
    status: watch::Receiver<IncomingStatus>,
    machine: watch::Receiver<Option<Arc<Machine>>>,
    resolve: mpsc::Sender<bool>,
    _stop: Arc<DropGuard>,
}

impl Incoming {
    /// Listens on `addr`. What arrives is given `serial` and `devices`, never a file or an interface that its source names.
    ///
    /// # Errors
    /// If the address cannot be bound.
    pub async fn listen(
        addr: SocketAddr,
        host: Arc<HostIdentity>,
        site: Option<Arc<dyn SitePages>>,
        serial: Serial,
        devices: DeviceOptions,
    ) -> Result<Self, MigrateError> {
        let endpoint = Endpoint::listen(addr, &host)?;
        let bound = endpoint.local_address()?;
        // Looking up the default route is a system call or two, but not this thread's to wait for.
        let reachable =
            tokio::task::spawn_blocking(move || incoming::reachable(bound)).await.unwrap_or(bound);
        let ticket = Ticket { address: reachable.to_string(), key: Some(host.key()) }.to_string();
        let (status, following) = watch::channel(IncomingStatus::default());
        let (arrived, machine) = watch::channel(None);
        let (resolve, commands) = mpsc::channel(limits::COMMANDS_BOUND);
        let devices = Arc::new(devices);
        let shared =
            arrival::Shared { site, serial, devices, ledger: incoming::ledger(), status, machine: arrived };
        let stop = CancellationToken::new();
        tokio::spawn(incoming::Server::new(endpoint, shared, commands).serve(stop.clone()));
        Ok(Self { ticket, status: following, machine, resolve, _stop: Arc::new(stop.drop_guard()) })
    }

    /// What `vmm migrate --to` takes to come here.
    #[must_use]
    pub fn ticket(&self) -> String {
        self.ticket.clone()
    }

    /// Waits until a VM runs here. Failed attempts do not end the wait. May be called any number of times.
    ///
    /// # Errors
    /// [`MigrateError::Closed`] if the endpoint is no more.
    pub async fn machine(&self) -> Result<Arc<Machine>, MigrateError> {
        let mut machine = self.machine.clone();
        let arrived = machine.wait_for(Option::is_some).await.map_err(|_| MigrateError::Closed)?;
        arrived.clone().ok_or(MigrateError::Closed)
    }

    /// Follows what happens here.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<IncomingStatus> {
        self.status.clone()
    }

    /// The operator's word on a VM that is ready here while its source was lost before Commit: `true` runs it here, `false`
    /// drops it.
    ///
    /// # Errors
    /// [`MigrateError::NotInDoubt`] if there is none.
    pub fn resolve(&self, run_here: bool) -> Result<(), MigrateError> {
        if self.status.borrow().phase != IncomingPhase::Held {
            return Err(MigrateError::NotInDoubt);
        }
        self.resolve.try_send(run_here).map_err(|_| MigrateError::NotInDoubt)
    }
}

/// The machine that a source described, empty. What it is given is this host's.
fn build(
    description: &[u8],
    layout: &Layout,
    serial: &Serial,
    devices: &DeviceOptions,
) -> Result<Arc<Machine>, String> {
    let description: MachineDescription = serde_json::from_slice(description)
        .map_err(|e| format!("the machine's description cannot be read: {e}"))?;
    if layout_of(&description.extents).as_ref() != Some(layout) {
        return Err("the machine's description and the offered memory layout differ".to_owned());
    }
    Machine::prepare(&description, serial, devices)
        .map_err(|e| format!("the machine cannot be built here: {}", error::chain(&e)))
}

/// The protocol's view of RAM; `None` if it is not made of whole regions, or is more than the protocol carries.
fn layout_of(extents: &[Extent]) -> Option<Layout> {
    let pages = REGION_PAGES as u64;
    let region = |extent: &Extent| {
        let whole = extent.first_gfn.is_multiple_of(pages) && extent.pages.is_multiple_of(pages);
        whole.then(|| migration_proto::Extent {
            first: RegionId(extent.first_gfn / pages),
            regions: extent.pages / pages,
        })
    };
    Layout::new(extents.iter().map(region).collect::<Option<_>>()?)
}
