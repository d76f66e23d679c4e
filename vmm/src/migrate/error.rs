//! What a migration can fail of.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use migration_proto::AbortReason;

use super::identity::HostKey;

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
    /// A name that does not resolve.
    #[error("the address `{address}` does not resolve: {why}")]
    Address {
        /// What was given.
        address: String,
        /// Why not.
        why: Arc<str>,
    },
    /// A key or authorised-keys file that cannot be read or made.
    #[error("cannot {what} in {path}: {why}")]
    Identity {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not, and what to do.
        why: Arc<str>,
    },
    /// The TLS library refused this host's own key or settings.
    #[error("TLS cannot use this host's identity: {why}")]
    Tls {
        /// Why.
        why: Arc<str>,
    },
    /// The local address cannot be used.
    #[error("cannot listen on UDP {address}: {why}")]
    Bind {
        /// The address.
        address: SocketAddr,
        /// Why not.
        why: Arc<str>,
    },
    /// No connection came about.
    #[error("no connection to {address}: {why}; is `vmm receive` running there, and does UDP get through?")]
    Connect {
        /// The other end.
        address: SocketAddr,
        /// Why not.
        why: Arc<str>,
    },
    /// The other end's key is not among those that this host lets in.
    #[error(
        "{address} has the key {key}, which this host does not know: if it is to be trusted, add the line `tern-ed25519 {key}` to {file}"
    )]
    UnknownPeer {
        /// The other end.
        address: SocketAddr,
        /// Its key.
        key: HostKey,
        /// This host's authorised keys.
        file: PathBuf,
    },
    /// The other end does not have the key that the ticket names.
    #[error(
        "{address} has the key {presented}, and the ticket says {expected}: it is another host, or its key was changed; ask `vmm receive` there for its ticket"
    )]
    WrongPeer {
        /// The other end.
        address: SocketAddr,
        /// Its key.
        presented: HostKey,
        /// The ticket's key.
        expected: HostKey,
    },
    /// The other end's certificate holds no Ed25519 key.
    #[error("{address} proved no Ed25519 key: it is not a Tern host")]
    NoPeerKey {
        /// The other end.
        address: SocketAddr,
    },
    /// The other end does not let this host in.
    #[error(
        "{address} does not know this host's key {key}: add the line `tern-ed25519 {key}` to the authorised keys there"
    )]
    RefusedByPeer {
        /// The other end.
        address: SocketAddr,
        /// This host's key.
        key: HostKey,
    },
    /// The connection was there, and broke or was closed.
    #[error("the connection to {address} was lost: {why}")]
    ConnectionLost {
        /// The other end.
        address: SocketAddr,
        /// How.
        why: Arc<str>,
    },
    /// A frame that is too long, cut short, or on a channel that does not exist.
    #[error("the other end broke the protocol on channel {channel}: {why}")]
    Frame {
        /// The channel.
        channel: &'static str,
        /// What is wrong.
        why: Arc<str>,
    },
    /// The VM cannot be moved at all.
    #[error("this VM cannot be moved: {why}")]
    NotMovable {
        /// Why.
        why: Arc<str>,
    },
    /// The protocol ended the migration.
    #[error("the VM runs on at the source: {reason}")]
    Aborted {
        /// Why.
        reason: AbortReason,
    },
    /// The spill file cannot be made or read.
    #[error("the spill file: {why}")]
    Spill {
        /// Why not.
        why: Arc<str>,
    },
    /// A spill file was brought to a destination that does not run its VM.
    #[error(
        "the destination {}", if *never {
            "gave this VM back to its source: it never ran there, and needs nothing; the file can be removed"
        } else {
            "does not run this VM by this migration, and nothing was started. Look whether it waits for its source's word (`vmm status` there; then              `vmm resolve` settles it, and this can be tried again), or is another process than the one that the VM went to"
        }
    )]
    NotServed {
        /// It said that it never will.
        never: bool,
    },
    /// The endpoint at which a VM could arrive is no more.
    #[error("the endpoint has been closed: no VM can arrive here any more")]
    Closed,
    /// The migration's task is no more.
    #[error("the migration's task ended without a result: this is a bug, and the log says more")]
    Died,
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
            Self::Address { .. } => "bad_address",
            Self::Identity { .. } | Self::Tls { .. } => "bad_identity",
            Self::Bind { .. } => "cannot_listen",
            Self::Connect { .. } => "no_connection",
            Self::UnknownPeer { .. } | Self::NoPeerKey { .. } => "unknown_peer",
            Self::WrongPeer { .. } => "wrong_peer",
            Self::RefusedByPeer { .. } => "refused_by_peer",
            Self::ConnectionLost { .. } => "connection_lost",
            Self::Frame { .. } => "protocol_error",
            Self::NotMovable { .. } => "not_movable",
            Self::Spill { .. } => "spill_failed",
            Self::NotServed { .. } => "not_served",
            Self::Closed => "closed",
            Self::Died => "bug",
            Self::Aborted { reason } => abort_code(reason),
            Self::Cancelled => "cancelled",
            Self::NotInDoubt => "not_in_doubt",
        }
    }
}

fn abort_code(reason: &AbortReason) -> &'static str {
    match reason {
        AbortReason::Cancelled => "cancelled",
        AbortReason::Refused(_) => "refused",
        AbortReason::Peer(_) => "peer_gave_up",
        AbortReason::Protocol(_) => "protocol_error",
        AbortReason::Disconnected => "connection_lost",
        AbortReason::Timeout(_) => "timeout",
        AbortReason::Spill(_) => "spill_failed",
        AbortReason::Local(_) => "local_failure",
        AbortReason::RootMismatch => "root_mismatch",
        AbortReason::Unresolved(_) => "unresolved_pages",
    }
}

/// An error's message with those of its sources, for the other end of a migration.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        message.push_str(": ");
        message.push_str(&cause.to_string());
        source = cause.source();
    }
    message
}
