//! What a migration can fail of.

use std::path::PathBuf;
use std::sync::Arc;

/// Why a migration failed, or cannot be steered as asked. Cheap to clone: every waiter gets the same one.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MigrateError {
    /// A ticket or address that cannot be read.
    #[error("`{given}` is neither a ticket (ADDR:PORT#64 hex digits) nor ADDR:PORT: {why}")]
    Ticket {
        /// What was given.
        given: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A key or authorised-keys file that cannot be read or made.
    #[error("cannot {what} {path}: {why}")]
    Identity {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not, and what to do.
        why: Arc<str>,
    },
    /// The operator cancelled it.
    #[error("cancelled by the operator; the VM runs on here")]
    Cancelled,
    /// There is nothing in doubt to resolve.
    #[error("no migration is in doubt here: there is nothing to resolve")]
    NotInDoubt,
}

impl MigrateError {
    /// A stable word for programs: the `code` of the control socket's error body.
    #[must_use]
    pub fn code(&self) -> &'static str {
        match self {
            Self::Ticket { .. } => "bad_ticket",
            Self::Identity { .. } => "bad_identity",
            Self::Cancelled => "cancelled",
            Self::NotInDoubt => "not_in_doubt",
        }
    }
}
