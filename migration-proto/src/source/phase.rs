//! The source's phases.
//!
//! ```text
//!  Offering ──Accept──► Collecting ──dirty──► Round ──RoundDone──► Collecting …
//!                            │ what is left fits the downtime
//!                            ▼
//!                         Pausing ──paused, saved──► CollectingLast ──dirty──► LastRound ──named──► Handover
//!                                                                                                  │ Ready
//!   before Commit every failure ends in Ended(Aborted), and the VM runs on                         ▼
//!                                                          Ended(Completed) ◄──Running── Committed ──NotRunning──► Ended(Aborted)
//!
//!   a connection lost between Accept and Commit, if there is time to dial again:
//!            any of those ──lost──► Cut: the VM runs on, dials ──Held, all given out is back──► Round
//!
//!   in post-copy the last round is left out (CollectingLast ──dirty──► Handover), and the destination runs the VM before it has all of its memory:
//!                                                          Committed ──Running──► Postcopy ──Complete──► Ended(Completed)
//!                                                                                 │  ▲ lost: dials and asks again, for ever
//!                                                                                 └──┘ the operator's word: Ended(LetGo)
//! ```

use page::{PageHash, PageSet};

use super::resume::Cut;
use super::round::Round;
use crate::error::AbortReason;

/// A phase, with what only that phase knows.
#[derive(Debug)]
pub(super) enum Phase {
    /// The offer is on its way.
    Offering,
    /// The dirty log has been asked for; it begins the next round or, if little is left, the last one.
    Collecting,
    /// A round of names while the VM runs.
    Round(Round),
    /// The VM has been asked to stand still, then for its state; `dirty` has not been named yet.
    Pausing {
        /// The pages that the last look at the log gave.
        dirty: PageSet,
    },
    /// The VM stands still and its state is saved; what was written since is being collected.
    CollectingLast {
        /// The pages that the look before gave.
        dirty: PageSet,
        /// vCPU and device state.
        state: Vec<u8>,
    },
    /// The last round; the VM stands still.
    LastRound(Round),
    /// All has been sent.
    Handover {
        /// The root over RAM.
        root: PageHash,
    },
    /// The connection is lost before Commit, and the VM runs on here.
    Cut(Cut),
    /// Commit has been sent: this side may not run the VM.
    Committed {
        /// Whether a connection to ask over is there.
        connected: bool,
        /// Whether the first deadline has passed.
        in_doubt: bool,
    },
    /// The VM lives at the destination, which lacks some of its memory: this side serves it, and never runs the VM. A wait without an end: nobody
    /// else may have these pages, so only the destination's Complete or the operator ends it.
    Postcopy {
        /// Whether the destination has been heard over the present connection.
        connected: bool,
        /// Whether the operator has been told that it has not.
        told: bool,
        /// Whether the destination has ever said Running; if not, it is an operator's word that the VM lives there.
        ran: bool,
    },
    /// Over.
    Ended(End),
}

/// How a migration ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// The VM runs at the destination.
    Completed,
    /// The VM runs on here.
    Aborted(AbortReason),
    /// An operator, who looked at the destination, said that the VM lives there. In post-copy: and that it shall do without what it lacks.
    LetGo,
    /// Of a source made of a spill file: the destination does not run the VM by this migration, so there is nothing to give.
    NotServed {
        /// It said that it never will; otherwise, that it does not know of it, or not yet.
        never: bool,
    },
}

impl Phase {
    /// For errors and progress.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Offering => "offering the VM",
            Self::Collecting | Self::Round(_) => "copying memory while the VM runs",
            Self::Pausing { .. } | Self::CollectingLast { .. } => "pausing the VM",
            Self::LastRound(_) => "copying the last pages",
            Self::Handover { .. } => "waiting for the destination to be ready",
            Self::Cut(_) => "dialling the destination, with the VM running on",
            Self::Committed { .. } => "waiting for the destination to run the VM",
            Self::Postcopy { .. } => "serving memory to the destination, where the VM runs",
            Self::Ended(_) => "at the end of the migration",
        }
    }
}
