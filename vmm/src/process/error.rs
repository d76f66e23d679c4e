//! Why an operation on a VM's process failed, and how that is told on the control socket.

use std::error::Error as _;
use std::path::PathBuf;

use crate::control::api::{ErrorDetail, VmState};
use crate::control::socket::SocketError;
use crate::devices::DeviceError;
use crate::machine::MachineError;
use crate::migrate::MigrateError;
use crate::snapshot::SnapshotError;

/// Errors of [`super::Process`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessError {
    /// The control socket cannot be had.
    #[error("the control socket cannot be opened")]
    Socket(#[from] SocketError),
    /// The VM cannot be built, or did not do what it was asked.
    #[error("the VM failed")]
    Machine(#[from] MachineError),
    /// The balloon cannot be changed so.
    #[error("the VM's balloon stays as it is")]
    Balloon(#[source] DeviceError),
    /// The host's identity, or the endpoint for an incoming VM, cannot be had.
    #[error("migration cannot be set up")]
    Migrate(#[source] MigrateError),
    /// The site's peer was asked for and cannot be reached.
    #[error(
        "the site's peer at {socket} cannot be used: start `dht serve --local {socket}`, or leave `--site` out"
    )]
    Site {
        /// Its socket.
        socket: PathBuf,
        /// Why.
        source: dht::SiteError,
    },
    /// A system call failed.
    #[error("cannot {action}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// Why.
        source: std::io::Error,
    },
    /// A thread of this process died.
    #[error("a task of this process ended before its time")]
    Task(#[from] tokio::task::JoinError),
    /// The request carries a value out of bounds.
    #[error("{0}")]
    BadRequest(String),
    /// The state does not allow it.
    #[error("cannot {operation}: the VM is {state}; {advice}")]
    WrongState {
        /// What was asked.
        operation: &'static str,
        /// The state.
        state: VmState,
        /// What to do.
        advice: &'static str,
    },
    /// The VM came by post-copy and is not all here.
    #[error(
        "cannot {operation}: {pages} pages of the VM's memory are still on their way here; wait for them"
    )]
    Incomplete {
        /// What was asked.
        operation: &'static str,
        /// How many.
        pages: u64,
    },
    /// A snapshot is being written, or a dry run looks at the VM.
    #[error("cannot {operation}: {why}; wait for its end")]
    Busy {
        /// What was asked.
        operation: &'static str,
        /// What the VM is busy with.
        why: &'static str,
    },
    /// The snapshot could not be taken.
    #[error("there is no new snapshot")]
    Snapshot(#[source] SnapshotError),
    /// No VM could be made of a snapshot.
    #[error("the snapshot cannot be restored")]
    Restore(#[source] SnapshotError),
    /// No migration.
    #[error("there is no migration to {0}")]
    NoMigration(&'static str),
    /// Cancelling came too late: Commit has been sent, or has been answered.
    #[error("the migration can no longer be cancelled: {0}")]
    TooLate(&'static str),
    /// The migration ended and the VM runs on here, or cannot be steered as asked.
    #[error("{0}")]
    Migration(MigrateError),
    /// The migration is in doubt.
    #[error(
        "in doubt: the destination was told to run the VM and has not answered; the VM stands still here and this process goes on \
         asking. If you know that it does not run there: `vmm resolve --run-here`; if it does: `vmm resolve --let-go`"
    )]
    InDoubt,
}

impl ProcessError {
    /// The status of the answer.
    #[must_use]
    pub fn http_status(&self) -> u16 {
        match self {
            Self::BadRequest(_) | Self::Balloon(DeviceError::BalloonSize { .. }) => 400,
            Self::Balloon(DeviceError::NoBalloon) => 409,
            Self::NoMigration(_) => 404,
            Self::WrongState { .. } | Self::TooLate(_) => 409,
            Self::Migration(MigrateError::Ticket { .. } | MigrateError::Address { .. }) => 400,
            Self::Migration(MigrateError::Cancelled | MigrateError::NotInDoubt) => 409,
            // Whatever else ends a migration stands at the other end or on the way to it.
            Self::Migration(_) => 502,
            Self::InDoubt => 504,
            Self::Busy { .. } | Self::Incomplete { .. } => 409,
            Self::Snapshot(error) => error.http_status(),
            Self::Socket(_)
            | Self::Machine(_)
            | Self::Balloon(_)
            | Self::Migrate(_)
            | Self::Site { .. }
            | Self::Io { .. }
            | Self::Restore(_)
            | Self::Task(_) => 500,
        }
    }

    /// The body of the answer.
    #[must_use]
    pub fn detail(&self) -> ErrorDetail {
        let code = match self {
            Self::BadRequest(_) | Self::Balloon(DeviceError::BalloonSize { .. }) => "bad_request",
            Self::Balloon(DeviceError::NoBalloon) => "no_balloon",
            Self::NoMigration(_) => "no_migration",
            Self::WrongState { .. } => "wrong_state",
            Self::TooLate(_) => "too_late",
            Self::Migration(error) => error.code(),
            Self::InDoubt => "in_doubt",
            Self::Busy { .. } | Self::Incomplete { .. } => "busy",
            Self::Snapshot(error) => error.code(),
            Self::Socket(_)
            | Self::Machine(_)
            | Self::Balloon(_)
            | Self::Migrate(_)
            | Self::Site { .. }
            | Self::Io { .. }
            | Self::Restore(_)
            | Self::Task(_) => "internal",
        };
        ErrorDetail { code: code.to_owned(), message: self.chain() }
    }

    /// The message with those of its sources.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut message = self.to_string();
        let mut source = self.source();
        while let Some(error) = source {
            message.push_str(": ");
            message.push_str(&error.to_string());
            source = error.source();
        }
        message
    }
}
