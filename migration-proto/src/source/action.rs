//! What goes in and out of the source's machine.

use std::collections::BTreeMap;

use page::{Domain, Gfn, PageHash, RegionId, ShortId};

use crate::error::AbortReason;
use crate::manifest::Layout;
use crate::postcopy::Mode;
use crate::switchover::{Epoch, MigrationId, RunPermit, VmId};
use crate::timer::{Link, Span};
use crate::wire::{Channel, Message};

/// What a migration is about, from the source's side.
#[derive(Debug, Clone)]
pub struct SourceConfig {
    /// This attempt: random.
    pub migration: MigrationId,
    /// Which VM.
    pub vm: VmId,
    /// The epoch as whose owner the source runs it.
    pub epoch: Epoch,
    /// The domain of the source's site, or the unkeyed one.
    pub domain: Domain,
    /// The VM's RAM.
    pub layout: Layout,
    /// What the destination needs to build the machine.
    pub machine: Vec<u8>,
    /// The downtime asked for.
    pub downtime: Span,
    /// The link, before the driver has measured it.
    pub link: Link,
    /// How the VM is to move. A destination that cannot do post-copy makes it [`Mode::Precopy`].
    pub mode: Mode,
    /// Most pages of which the driver keeps the version that the destination has, for deltas; 0 for none.
    pub kept_versions: usize,
    /// Whether a guest that writes faster than the link carries may be slowed down, where it does not go by post-copy.
    pub auto_converge: bool,
    /// Whether what is absent at a switchover to post-copy is to stand in a spill file before Commit.
    pub spill: bool,
    /// How long the destination is dialled again when the connection is lost before Commit, at most [`limits::RESUME_FOR_MAX`](crate::limits::RESUME_FOR_MAX);
    /// 0: the loss ends the migration.
    pub resume_for: Span,
}

/// A migration's source whose process is no more, as its spill file tells.
#[derive(Debug, Clone)]
pub struct SpillConfig {
    /// The migration.
    pub migration: MigrationId,
    /// Which VM.
    pub vm: VmId,
    /// The epoch as whose owner the source ran it.
    pub epoch: Epoch,
    /// The VM's RAM.
    pub layout: Layout,
    /// The root that the two ends agreed on.
    pub root: PageHash,
    /// The name of a zero page in the migration's domain.
    pub zero: PageHash,
    /// The name of every absent frame.
    pub names: BTreeMap<Gfn, PageHash>,
    /// The link, before the driver has measured it.
    pub link: Link,
}

/// What the driver is to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// Send on the message's channel.
    Send(Message),
    /// Start the dirty log, empty. From here on every write counts.
    StartDirtyLog,
    /// Take the dirty log and give it to [`Source::dirty`](super::Source::dirty).
    CollectDirty,
    /// Read these frames of one region, name them in [`Source::domain`](super::Source::domain), and give the names to [`Source::hashed`](super::Source::hashed).
    Hash {
        /// The region.
        region: RegionId,
        /// Its frames.
        pages: Vec<Gfn>,
    },
    /// Read these frames, and send as [`Message::Literals`] those whose name is still this one; then call [`Source::literals_sent`](super::Source::literals_sent).
    /// A page whose base was kept is sent as a delta, any other plain. Of those sent, the ones to keep are kept, each in the place of its frame's older version.
    SendLiterals {
        /// `Literals`; for pages that nobody asked for `Names`, so that no literal overtakes the name that makes it expected.
        channel: Channel,
        /// At most [`limits::LITERAL_BATCH_PAGES`](crate::limits::LITERAL_BATCH_PAGES).
        pages: Vec<Literal>,
    },
    /// Drop the kept versions of these frames.
    DropVersions(Vec<Gfn>),
    /// A virtual CPU at the destination waits for this frame: before all else read it, name it in [`Source::domain`](super::Source::domain), send it as
    /// [`Message::FaultPage`], and call [`Source::fault_sent`](super::Source::fault_sent).
    SendFault(Gfn),
    /// Read these frames and write them to the spill file, with their names in [`Source::domain`](super::Source::domain); once they are on stable storage
    /// call [`Source::spilled`](super::Source::spilled). A frame that comes again replaces what was written of it.
    Spill {
        /// Most are [`limits::SPILL_BATCH_PAGES`](crate::limits::SPILL_BATCH_PAGES).
        frames: Vec<Gfn>,
        /// Whether the file begins with them: nothing that was written before stays in it.
        anew: bool,
    },
    /// Nothing more comes: make the spill file whole, with this root, and durable under its name; then call
    /// [`Source::spill_sealed`](super::Source::spill_sealed).
    SealSpill {
        /// The root that the destination is to agree on.
        root: PageHash,
    },
    /// From now on the virtual CPUs rest for so many percent of the time; 0 lets them run at full speed. Needs no answer.
    Throttle {
        /// At most [`limits::THROTTLE_MOST_PERCENT`](crate::limits::THROTTLE_MOST_PERCENT).
        percent: u8,
    },
    /// Stop the virtual CPUs; then call [`Source::vm_paused`](super::Source::vm_paused).
    Pause,
    /// Save vCPU and device state; then call [`Source::state_saved`](super::Source::state_saved).
    SaveState,
    /// The connection is no more; open another and call [`Source::connected`](super::Source::connected), or [`Source::disconnected`](super::Source::disconnected) if that fails.
    Reconnect,
    /// Tell the operator: Commit was sent and not answered. The VM stays paused.
    InDoubt,
    /// Tell the operator: the VM runs at the destination, which lacks pages that only this host may have, and the connection is lost. Memory is kept
    /// and the destination is dialled for as long as it takes; the operator can end that with [`Source::resolve`](super::Source::resolve).
    PostcopyCut,
    /// The connection is lost before Commit: let the virtual CPUs run on and the dirty log go on; then call [`Source::vm_runs_on`](super::Source::vm_runs_on).
    RunOn(RunPermit),
    /// The migration is over and the VM runs on here: stop the dirty log, let the virtual CPUs run, and, if `notify`,
    /// try to tell the destination, which may be holding the VM, by an `Abort` over a new connection.
    Resume {
        /// The right to run it.
        permit: RunPermit,
        /// See above.
        notify: bool,
        /// Why.
        reason: AbortReason,
    },
    /// The migration is over and the VM lives at the destination: end it here.
    Release,
}

/// A page to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Literal {
    /// The frame.
    pub gfn: Gfn,
    /// The name that the destination was told.
    pub name: PageHash,
    /// The version of this frame that the destination has, if the driver was told to keep it.
    pub base: Option<PageHash>,
    /// Whether to keep the page once it is sent.
    pub keep: bool,
}

/// What became of one [`Action::SendLiterals`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LiteralsSent {
    /// Pages sent.
    pub pages: u64,
    /// Bytes of the encoded batch.
    pub bytes: u64,
    /// Of the pages, those sent as deltas.
    pub delta_pages: u64,
    /// Of the bytes, theirs.
    pub delta_bytes: u64,
    /// Frames whose content had changed, with the ids that were asked for.
    pub stale: Vec<(Gfn, ShortId)>,
}

/// The call came when the VM may already run at the destination, or when there is nothing to decide.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TooLate {
    /// Commit has been sent.
    #[error("the hand-over has begun: only the destination or `resolve` can settle it now")]
    Committed,
    /// The migration is over.
    #[error("the migration has ended")]
    Ended,
    /// The destination has said that it runs the VM.
    #[error(
        "the VM runs at the destination: it can only be let go here, which frees the memory that the destination may still need"
    )]
    RunsThere,
    /// A connection stands, and the destination fetches memory over it.
    #[error(
        "the destination is fetching the rest of the VM's memory from here: letting go now would lose it"
    )]
    Needed,
    /// Nothing is in doubt.
    #[error("nothing is in doubt: the source owns the VM; cancel the migration instead")]
    NotInDoubt,
}

/// Where a migration is, as the source sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SourceProgress {
    /// The offer has not been answered.
    Offering,
    /// Rounds while the VM runs.
    Precopy,
    /// The connection is lost, the VM runs on here, and the destination is dialled.
    PrecopyCut,
    /// The VM stands still; the last pages and the state travel.
    StopAndCopy,
    /// Waiting for Ready.
    Handover,
    /// Commit sent, Running awaited.
    Committing,
    /// Commit sent, no answer: paused, asking again, and the operator may settle it.
    InDoubt,
    /// The VM runs at the destination and fetches the rest of its memory.
    Postcopy,
    /// As `Postcopy`, without a connection: dialling.
    PostcopyCut,
    /// Over.
    Ended,
}
