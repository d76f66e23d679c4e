//! The destination's phases.
//!
//! ```text
//!  Preparing ──machine built──► Filling ──all verified──► Loading ──state loaded──► Prepared ──Commit──► Starting ──► Running
//!      │                           │                         │                        │  connection lost      │
//!      └───────────────────────────┴─────── any failure ─────┴──► Ended(Discarded)    └► Prepared, held: waits for the
//!                                                                                        source's Commit or Abort over a
//!                                                                                        new connection, or the operator
//! ```
//! A connection lost in Filling ends it only if the source, as it said in its offer, does not come back: [`super::resume`].
//!
//! In post-copy Loading begins while frames are absent ([`super::absent`]): their pages come in every phase from there on, and Running goes on as
//! any other until none is absent. What is lost then, connection or source, never ends Running.
//!
//! Prepared is the one phase in which the destination may not decide by itself: it has said Ready, and the source may have sent Commit.

use page::PageHash;

use crate::error::AbortReason;
use crate::switchover::Epoch;

/// A phase, with what only that phase knows.
#[derive(Debug)]
pub(super) enum Phase {
    /// The machine is being built.
    Preparing {
        /// Whether both ends have one domain: said when the machine stands.
        shared: bool,
    },
    /// Memory arrives.
    Filling,
    /// State is being loaded into complete memory.
    Loading {
        /// The root that both ends agree on.
        root: PageHash,
    },
    /// Ready has been said.
    Prepared {
        /// Whether the operator has been told that the source is silent.
        held: bool,
    },
    /// The virtual CPUs are being let go.
    Starting {
        /// As whose owner.
        epoch: Epoch,
        /// By the operator's word, not by the source's: there may be no source to give the VM back to.
        held: bool,
    },
    /// It runs here.
    Running {
        /// As whose owner.
        epoch: Epoch,
    },
    /// It does not run here and never will by this migration.
    Ended(AbortReason),
}

impl Phase {
    /// For errors and progress.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Preparing { .. } => "building the machine",
            Self::Filling => "receiving memory",
            Self::Loading { .. } => "loading the state",
            Self::Prepared { .. } => "ready and waiting for the source's commit",
            Self::Starting { .. } => "starting the VM",
            Self::Running { .. } => "running the VM",
            Self::Ended(_) => "at the end of the migration",
        }
    }
}
