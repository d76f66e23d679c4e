//! Migration's I/O side: drives the pure core in `migration-proto` over QUIC, KVM and the site's peer.
//!
//! [`Outgoing`] is one migration away from this process, [`Incoming`] an endpoint at which a VM can arrive. Both run in
//! tokio tasks of their own; the handles follow them and steer them.

pub mod channel;
pub mod error;
pub mod identity;
pub mod limits;
pub mod report;
pub mod site;
pub mod ticket;
pub mod tls;
pub mod transport;

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::watch;

pub use error::MigrateError;
pub use identity::HostIdentity;
use report::{IncomingStatus, Progress, Report};
use site::SitePages;

use crate::config::Serial;
use crate::machine::Machine;

/// What an operator asks of a migration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MigrateOptions {
    /// A ticket (`ADDR:PORT#HEX64`), or `ADDR:PORT` alone: then the destination's key must be among the authorised ones.
    pub to: String,
    /// How long the guest may stand still at switchover, milliseconds.
    pub downtime_ms: u64,
    /// The most that bulk data may take of the link, bits a second; `None` leaves it to congestion control.
    pub bandwidth_bits: Option<u64>,
}

/// One migration away from this process. Dropping the handle does not end the migration.
#[derive(Clone, Debug)]
pub struct Outgoing {}

impl Outgoing {
    /// Starts it; must be called within a tokio runtime.
    #[must_use]
    pub fn start(
        _machine: Arc<Machine>,
        _site: Option<Arc<dyn SitePages>>,
        _host: Arc<HostIdentity>,
        _options: MigrateOptions,
    ) -> Self {
        todo!()
    }

    /// Follows its progress; [`report::Phase::InDoubt`] and [`report::Phase::Ended`] are among the phases.
    #[must_use]
    pub fn progress(&self) -> watch::Receiver<Progress> {
        todo!()
    }

    /// Asks it to end with the VM running on here. After Commit has been sent it has no effect: nobody can take that back.
    pub fn cancel(&self) {
        todo!()
    }

    /// The operator's word on a migration in doubt: `true` lets the VM run here, `false` lets it go.
    ///
    /// # Errors
    /// [`MigrateError::NotInDoubt`] if it is not in doubt.
    pub fn resolve(&self, _run_here: bool) -> Result<(), MigrateError> {
        todo!()
    }

    /// Waits for the end. `Ok` means that the VM runs at the destination (and this machine has stopped with
    /// [`crate::machine::StopReason::Migrated`]); an error says why it still runs here. While in doubt it waits on.
    /// May be called any number of times.
    ///
    /// # Errors
    /// Why the VM still runs here.
    pub async fn finished(&self) -> Result<Report, MigrateError> {
        todo!()
    }
}

/// An endpoint at which a VM can arrive. It listens until a VM runs here, and answers its source's questions for as long as the
/// handle (or a clone of it) lives.
#[derive(Clone, Debug)]
pub struct Incoming {}

impl Incoming {
    /// Listens on `addr`.
    ///
    /// # Errors
    /// If the address cannot be bound.
    #[expect(clippy::unused_async, reason = "the seam's first version")]
    pub async fn listen(
        _addr: SocketAddr,
        _host: Arc<HostIdentity>,
        _site: Option<Arc<dyn SitePages>>,
        _serial: Serial,
    ) -> Result<Self, MigrateError> {
        todo!()
    }

    /// What `vmm migrate --to` takes to come here.
    #[must_use]
    pub fn ticket(&self) -> String {
        todo!()
    }

    /// Waits until a VM runs here. Failed attempts do not end the wait. May be called any number of times.
    ///
    /// # Errors
    /// If the endpoint has failed.
    pub async fn machine(&self) -> Result<Arc<Machine>, MigrateError> {
        todo!()
    }

    /// Follows what happens here.
    #[must_use]
    pub fn status(&self) -> watch::Receiver<IncomingStatus> {
        todo!()
    }

    /// The operator's word on a VM that is ready here while its source was lost before Commit: `true` runs it here, `false`
    /// drops it.
    ///
    /// # Errors
    /// [`MigrateError::NotInDoubt`] if there is none.
    pub fn resolve(&self, _run_here: bool) -> Result<(), MigrateError> {
        todo!()
    }
}
