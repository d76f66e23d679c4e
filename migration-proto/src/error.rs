//! What can go wrong, as either side says it.

use page::{Gfn, RegionId};

use crate::wire::WireError;

/// A message that the protocol does not allow. The side that received it aborts.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// Undecodable bytes.
    #[error("the other side sent a message that cannot be decoded")]
    Wire(#[from] WireError),
    /// A message that has no place in this phase.
    #[error("the other side sent {message} while this side was {phase}")]
    Unexpected {
        /// The message's name.
        message: &'static str,
        /// This side's phase.
        phase: &'static str,
    },
    /// A frame outside the agreed layout.
    #[error("the other side named frame {0}, which is not RAM of this VM")]
    NotRam(Gfn),
    /// A region outside the agreed layout.
    #[error("the other side named region {}, which is not RAM of this VM", .0.0)]
    NoSuchRegion(RegionId),
    /// A duplicate of a frame that has not been named.
    #[error("the other side called a page a duplicate of frame {0}, which it has not named")]
    DanglingDuplicate(Gfn),
    /// Full names that do not give the region's root.
    #[error("the full names of region {} do not give the root that came with them", .0.0)]
    NamesAgainstRoot(RegionId),
    /// Deltas against what does not stand here, again and again.
    #[error("the other side sent frame {0} as a delta again and again, against a version that is not here")]
    DeltasMiss(Gfn),
    /// A message about another migration.
    #[error("the other side sent a message about another migration or epoch")]
    OtherMigration,
}

/// Why a migration was given up; the VM goes on where it was.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AbortReason {
    /// An operator's wish.
    #[error("the migration was cancelled")]
    Cancelled,
    /// The destination said no.
    #[error("the destination refused the VM: {0}")]
    Refused(String),
    /// The other side gave up.
    #[error("the other side gave up: {0}")]
    Peer(String),
    /// The other side broke the protocol.
    #[error("the protocol was broken: {0}")]
    Protocol(ProtocolError),
    /// The connection went away.
    #[error("the connection to the other side was lost")]
    Disconnected,
    /// A wait reached its deadline.
    #[error("timed out while waiting for {0}")]
    Timeout(&'static str),
    /// The spill file could not be written, and nothing is handed over without it.
    #[error("the spill file: {0}; migrate again when it can be written, or without --spill")]
    Spill(String),
    /// A local action failed.
    #[error("{0}")]
    Local(String),
    /// The two ends disagree on the contents of RAM.
    #[error("the memory at the destination does not have the source's root: nothing was handed over")]
    RootMismatch,
    /// Pages stayed unresolved after the last round.
    #[error("{0} pages were still missing after the last round")]
    Unresolved(u64),
}
