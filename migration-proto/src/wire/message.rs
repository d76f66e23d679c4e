//! The messages.

use page::{DomainId, Gfn, PageHash, REGION_PAGES, RegionId, ShortId};

use super::codec::{Reader, WireError, Writer};
use super::fields::{
    read_counters, read_flag, read_frames, read_migration, read_reason, read_region_id, read_round,
    read_stale, read_stats, write_frames, write_reason,
};
use super::held::{read_held, write_held};
use super::offer::{read_accept, read_offer, write_accept, write_offer};
use super::probe::Probe;
use crate::limits;
use crate::manifest::{Entry, Layout, read_entries, write_entries};
use crate::postcopy::{FullName, Mode, read_absent, write_absent};
use crate::stats::{DestinationStats, PostcopyStats};
use crate::switchover::{Epoch, MigrationId, VmId};
use crate::timer::Span;

/// An ordered stream of messages within a connection, in the order of urgency.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Channel {
    /// Agreement and hand-over, both ways.
    Control,
    /// Pages that a virtual CPU stands still for: the frame to the source, name and bytes to the destination.
    Faults,
    /// What the destination wants, to the source.
    Wants,
    /// Manifest, rounds' ends, device state and the final root, to the destination.
    Names,
    /// Page bytes, to the destination.
    Literals,
}

/// The source's opening.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Offer {
    /// This attempt.
    pub migration: MigrationId,
    /// Which VM.
    pub vm: VmId,
    /// The epoch as whose owner the source runs it.
    pub epoch: Epoch,
    /// The dedup domain of the source's site.
    pub domain: DomainId,
    /// The VM's RAM.
    pub layout: Layout,
    /// What the destination needs to build the machine: opaque to the protocol.
    pub machine: Vec<u8>,
    /// How the caller wants the VM to move.
    pub mode: Mode,
    /// Whether literals may be deltas.
    pub deltas: bool,
    /// How long the source dials again when the connection is lost before Commit, and the destination is to keep what it has: whole
    /// milliseconds.
    pub resume_for: Span,
}

/// The manifest of one region, or of what changed in it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Region {
    /// The region.
    pub region: RegionId,
    /// Whether the source sends the literals of the named pages without being asked.
    pub pushed: bool,
    /// What stands where; pages that are not in here stay as they were.
    pub entries: Vec<(Gfn, Entry)>,
    /// The root over all 512 full names, with `entries` applied.
    pub root: PageHash,
}

/// A message.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Message {
    /// Control, to the destination.
    Offer(Offer),
    /// Control, to the source. `shared`: both sites have one dedup domain; otherwise both use the unkeyed one.
    Accept {
        /// See above.
        shared: bool,
        /// The VM may run here before all of its memory is here. Never said to an offer of [`Mode::Precopy`].
        postcopy: bool,
    },
    /// Control, to the source: this VM cannot come here, and why.
    Refuse(String),
    /// Control, either way: the sender has given up this migration, and why.
    Abort {
        /// Which.
        migration: MigrationId,
        /// Why.
        reason: String,
    },
    /// Names.
    Region(Region),
    /// Names: the answer to `WantNames`.
    FullNames {
        /// The region.
        region: RegionId,
        /// Its 512 names.
        names: Vec<PageHash>,
    },
    /// Names: all of a round has been named.
    RoundEnd {
        /// The round.
        round: u32,
    },
    /// Names: vCPU and device state, opaque to the protocol.
    State(Vec<u8>),
    /// Names, from the end of the last finished round to Final of a switchover to post-copy: frames whose pages come after the VM runs. A region may come
    /// again, with further frames. No Region follows.
    Absent {
        /// The region.
        region: RegionId,
        /// Its absent frames, ascending; at least one.
        frames: Vec<Gfn>,
        /// The root over the region's 512 full names, with [`ABSENT_NAME`](crate::postcopy::ABSENT_NAME) for each frame that is absent by now.
        root: PageHash,
    },
    /// Names, after Final: the full names of absent frames.
    PageNames {
        /// The region.
        region: RegionId,
        /// What belongs where.
        entries: Vec<(Gfn, FullName)>,
    },
    /// Names: the last round has been named, or what is absent has; this is the root over all regions' roots.
    Final {
        /// The last round.
        round: u32,
        /// The root.
        root: PageHash,
    },
    /// Literals; or Names where nobody asked for them, behind the names that they belong to: an encoded batch, see [`crate::literal`].
    Literals(Vec<u8>),
    /// Names: pages to be sent that have changed since they were named, with the ids that they had; a later round names them again.
    Stale(Vec<(Gfn, ShortId)>),
    /// Wants: pages that nobody near the destination has.
    Want(Vec<Gfn>),
    /// Wants: before Ready, the short ids of this region led to wrong pages; over a new connection in post-copy, this region has absent frames
    /// that have not been named.
    WantNames(RegionId),
    /// Faults, to the source: a virtual CPU waits for this absent frame, and the site cannot give it, or not in time.
    Fault(Gfn),
    /// Faults, to the destination: the answer to `Fault`.
    FaultPage {
        /// The frame.
        gfn: Gfn,
        /// Its full name.
        name: PageHash,
        /// An encoded batch of this one page, see [`crate::literal`].
        batch: Vec<u8>,
    },
    /// Control, to the source: all that could be resolved of this round has been.
    RoundDone {
        /// The round.
        round: u32,
        /// Counters so far.
        stats: DestinationStats,
    },
    /// Control, to the source: memory is complete and verified, state is loaded.
    Ready {
        /// The root as the destination computed it.
        root: PageHash,
    },
    /// Control, to the destination: run it. May come again over a new connection.
    Commit {
        /// Which migration.
        migration: MigrationId,
        /// The epoch to run it as.
        epoch: Epoch,
    },
    /// Control, to the destination, the first message of a connection: the sender has the pages that were absent at this migration's switchover to
    /// post-copy, from a spill file, and is there to give them. It never starts a VM.
    Serve {
        /// Which migration.
        migration: MigrationId,
        /// The epoch that the VM runs as.
        epoch: Epoch,
        /// The root that the two ends agreed on.
        root: PageHash,
    },
    /// Control, to the source: it runs.
    Running {
        /// Which migration.
        migration: MigrationId,
        /// The final counters.
        stats: DestinationStats,
    },
    /// Control, to the source: no frame is absent any more; nothing is needed of the source.
    Complete {
        /// Which migration.
        migration: MigrationId,
        /// The final counters of what came before the VM ran.
        stats: DestinationStats,
        /// The counters of post-copy.
        postcopy: Box<PostcopyStats>,
    },
    /// Control, to the destination, over a new connection: the last one was lost before Commit, and the VM runs on at the source. What was said over
    /// the last one counts as not said, but for what [`Message::Held`] answers.
    Resume {
        /// Which migration.
        migration: MigrationId,
        /// The epoch as whose owner the source runs it.
        epoch: Epoch,
    },
    /// Control, to the source: regions whose 512 pages are here as they were told, with the first 8 bytes of their roots.
    Held {
        /// At most [`limits::HELD_REGIONS`].
        regions: Vec<(RegionId, ShortId)>,
        /// Whether these are the last.
        last: bool,
    },
    /// Control, to the source: it does not run here and never will by this migration.
    NotRunning {
        /// Which migration.
        migration: MigrationId,
    },
    /// Control, to the source: this process never heard of the migration, so it cannot say whether an earlier one ran the VM.
    Unknown {
        /// Which migration.
        migration: MigrationId,
    },
    /// Control, to the destination: the source has heard and forgets the VM.
    Released {
        /// Which migration.
        migration: MigrationId,
    },
    /// Of a dry run, on a connection of its own; never one of a migration's.
    Probe(Probe),
}

impl Message {
    /// Its name, for errors.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Offer(_) => "Offer",
            Self::Accept { .. } => "Accept",
            Self::Refuse(_) => "Refuse",
            Self::Abort { .. } => "Abort",
            Self::Region(_) => "Region",
            Self::FullNames { .. } => "FullNames",
            Self::RoundEnd { .. } => "RoundEnd",
            Self::State(_) => "State",
            Self::Absent { .. } => "Absent",
            Self::PageNames { .. } => "PageNames",
            Self::Final { .. } => "Final",
            Self::Literals(_) => "Literals",
            Self::Stale(_) => "Stale",
            Self::Want(_) => "Want",
            Self::WantNames(_) => "WantNames",
            Self::Fault(_) => "Fault",
            Self::FaultPage { .. } => "FaultPage",
            Self::RoundDone { .. } => "RoundDone",
            Self::Ready { .. } => "Ready",
            Self::Commit { .. } => "Commit",
            Self::Serve { .. } => "Serve",
            Self::Running { .. } => "Running",
            Self::Complete { .. } => "Complete",
            Self::Resume { .. } => "Resume",
            Self::Held { .. } => "Held",
            Self::NotRunning { .. } => "NotRunning",
            Self::Unknown { .. } => "Unknown",
            Self::Released { .. } => "Released",
            Self::Probe(probe) => probe.name(),
        }
    }

    /// The channel that it travels on.
    #[must_use]
    pub fn channel(&self) -> Channel {
        match self {
            Self::Offer(_)
            | Self::Accept { .. }
            | Self::Refuse(_)
            | Self::Abort { .. }
            | Self::RoundDone { .. }
            | Self::Ready { .. }
            | Self::Commit { .. }
            | Self::Serve { .. }
            | Self::Running { .. }
            | Self::Complete { .. }
            | Self::Resume { .. }
            | Self::Held { .. }
            | Self::NotRunning { .. }
            | Self::Unknown { .. }
            | Self::Released { .. }
            | Self::Probe(Probe::Ask { .. } | Probe::Answer { .. } | Probe::Carried { .. }) => {
                Channel::Control
            }
            Self::Fault(_) | Self::FaultPage { .. } => Channel::Faults,
            Self::Region(_)
            | Self::FullNames { .. }
            | Self::RoundEnd { .. }
            | Self::State(_)
            | Self::Absent { .. }
            | Self::PageNames { .. }
            | Self::Stale(_)
            | Self::Final { .. } => Channel::Names,
            Self::Literals(_) | Self::Probe(Probe::Burst(_)) => Channel::Literals,
            Self::Want(_) | Self::WantNames(_) => Channel::Wants,
        }
    }
}

const OFFER: u8 = 1;
const ACCEPT: u8 = 2;
const REFUSE: u8 = 3;
const ABORT: u8 = 4;
const REGION: u8 = 5;
const FULL_NAMES: u8 = 6;
const ROUND_END: u8 = 7;
const STATE: u8 = 8;
const FINAL: u8 = 9;
const LITERALS: u8 = 10;
const STALE: u8 = 11;
const WANT: u8 = 12;
const WANT_NAMES: u8 = 13;
const ROUND_DONE: u8 = 14;
const READY: u8 = 15;
const COMMIT: u8 = 16;
const RUNNING: u8 = 17;
const NOT_RUNNING: u8 = 18;
const RELEASED: u8 = 19;
const UNKNOWN: u8 = 20;
const ABSENT: u8 = 21;
const PAGE_NAMES: u8 = 22;
const FAULT: u8 = 23;
const FAULT_PAGE: u8 = 24;
const COMPLETE: u8 = 25;
const SERVE: u8 = 26;
const RESUME: u8 = 27;
const HELD: u8 = 28;
const PROBE: u8 = 64;

/// The bytes of `message`, without the length before it.
#[must_use]
#[expect(clippy::too_many_lines, reason = "one arm a message: the wire's table of contents")]
pub fn encode(message: &Message) -> Vec<u8> {
    let mut out = Writer::default();
    match message {
        Message::Offer(offer) => {
            out.byte(OFFER);
            write_offer(&mut out, offer);
        }
        Message::Accept { shared, postcopy } => {
            out.byte(ACCEPT);
            write_accept(&mut out, *shared, *postcopy);
        }
        Message::Refuse(reason) => {
            out.byte(REFUSE);
            write_reason(&mut out, reason);
        }
        Message::Abort { migration, reason } => {
            out.byte(ABORT);
            out.bytes(&migration.0);
            write_reason(&mut out, reason);
        }
        Message::Region(region) => {
            out.byte(REGION);
            out.varint(region.region.0);
            out.byte(u8::from(region.pushed));
            out.bytes(&region.root.0);
            write_entries(&mut out, region.region, &region.entries);
        }
        Message::FullNames { region, names } => {
            out.byte(FULL_NAMES);
            out.varint(region.0);
            names.iter().for_each(|name| out.bytes(&name.0));
        }
        Message::RoundEnd { round } => {
            out.byte(ROUND_END);
            out.varint(u64::from(*round));
        }
        Message::State(bytes) => {
            out.byte(STATE);
            out.blob(bytes);
        }
        Message::Final { round, root } => {
            out.byte(FINAL);
            out.varint(u64::from(*round));
            out.bytes(&root.0);
        }
        Message::Literals(batch) => {
            out.byte(LITERALS);
            out.bytes(batch);
        }
        Message::Stale(frames) => {
            out.byte(STALE);
            out.varint(frames.len() as u64);
            for (gfn, id) in frames {
                out.varint(gfn.0);
                out.bytes(&id.0.to_be_bytes());
            }
        }
        Message::Want(frames) => {
            out.byte(WANT);
            write_frames(&mut out, frames);
        }
        Message::WantNames(region) => {
            out.byte(WANT_NAMES);
            out.varint(region.0);
        }
        Message::RoundDone { round, stats } => {
            out.byte(ROUND_DONE);
            out.varint(u64::from(*round));
            stats.to_array().into_iter().for_each(|n| out.varint(n));
        }
        Message::Ready { root } => {
            out.byte(READY);
            out.bytes(&root.0);
        }
        Message::Commit { migration, epoch } => {
            out.byte(COMMIT);
            out.bytes(&migration.0);
            out.varint(epoch.0);
        }
        Message::Serve { migration, epoch, root } => {
            out.byte(SERVE);
            out.bytes(&migration.0);
            out.varint(epoch.0);
            out.bytes(&root.0);
        }
        Message::Resume { migration, epoch } => {
            out.byte(RESUME);
            out.bytes(&migration.0);
            out.varint(epoch.0);
        }
        Message::Held { regions, last } => {
            out.byte(HELD);
            write_held(&mut out, regions, *last);
        }
        Message::Running { migration, stats } => {
            out.byte(RUNNING);
            out.bytes(&migration.0);
            stats.to_array().into_iter().for_each(|n| out.varint(n));
        }
        Message::NotRunning { migration } => {
            out.byte(NOT_RUNNING);
            out.bytes(&migration.0);
        }
        Message::Released { migration } => {
            out.byte(RELEASED);
            out.bytes(&migration.0);
        }
        Message::Unknown { migration } => {
            out.byte(UNKNOWN);
            out.bytes(&migration.0);
        }
        Message::Absent { region, frames, root } => {
            out.byte(ABSENT);
            out.varint(region.0);
            out.bytes(&root.0);
            write_absent(&mut out, *region, frames);
        }
        Message::PageNames { region, entries } => {
            out.byte(PAGE_NAMES);
            out.varint(region.0);
            write_entries(&mut out, *region, entries);
        }
        Message::Fault(gfn) => {
            out.byte(FAULT);
            out.varint(gfn.0);
        }
        Message::FaultPage { gfn, name, batch } => {
            out.byte(FAULT_PAGE);
            out.varint(gfn.0);
            out.bytes(&name.0);
            out.bytes(batch);
        }
        Message::Complete { migration, stats, postcopy } => {
            out.byte(COMPLETE);
            out.bytes(&migration.0);
            stats.to_array().into_iter().chain(postcopy.to_array()).for_each(|n| out.varint(n));
        }
        Message::Probe(probe) => {
            out.byte(PROBE);
            probe.write(&mut out);
        }
    }
    out.finish()
}

/// The message that `frame` holds.
///
/// # Errors
/// Names the field that is truncated, out of range or unknown.
pub fn decode(frame: &[u8]) -> Result<Message, WireError> {
    let mut input = Reader::new(frame);
    let kind = input.byte("kind of message")?;
    let message = match kind {
        OFFER => Message::Offer(read_offer(&mut input)?),
        ACCEPT => {
            let (shared, postcopy) = read_accept(&mut input)?;
            Message::Accept { shared, postcopy }
        }
        REFUSE => Message::Refuse(read_reason(&mut input)?),
        ABORT => Message::Abort { migration: read_migration(&mut input)?, reason: read_reason(&mut input)? },
        REGION => Message::Region(read_region(&mut input)?),
        FULL_NAMES => Message::FullNames {
            region: read_region_id(&mut input)?,
            names: (0..REGION_PAGES).map(|_| input.name("full name")).collect::<Result<_, _>>()?,
        },
        ROUND_END => Message::RoundEnd { round: read_round(&mut input)? },
        STATE => Message::State(input.blob("state", limits::STATE_BYTES)?.to_vec()),
        FINAL => Message::Final { round: read_round(&mut input)?, root: input.name("root")? },
        LITERALS => Message::Literals(input.rest().to_vec()),
        STALE => Message::Stale(read_stale(&mut input)?),
        WANT => Message::Want(read_frames(&mut input, "wanted frames")?),
        WANT_NAMES => Message::WantNames(read_region_id(&mut input)?),
        ROUND_DONE => Message::RoundDone { round: read_round(&mut input)?, stats: read_stats(&mut input)? },
        READY => Message::Ready { root: input.name("root")? },
        COMMIT => {
            Message::Commit { migration: read_migration(&mut input)?, epoch: Epoch(input.varint("epoch")?) }
        }
        SERVE => Message::Serve {
            migration: read_migration(&mut input)?,
            epoch: Epoch(input.varint("epoch")?),
            root: input.name("root")?,
        },
        RESUME => {
            Message::Resume { migration: read_migration(&mut input)?, epoch: Epoch(input.varint("epoch")?) }
        }
        HELD => {
            let (regions, last) = read_held(&mut input)?;
            Message::Held { regions, last }
        }
        RUNNING => {
            Message::Running { migration: read_migration(&mut input)?, stats: read_stats(&mut input)? }
        }
        NOT_RUNNING => Message::NotRunning { migration: read_migration(&mut input)? },
        RELEASED => Message::Released { migration: read_migration(&mut input)? },
        UNKNOWN => Message::Unknown { migration: read_migration(&mut input)? },
        ABSENT => {
            let (region, root) = (read_region_id(&mut input)?, input.name("region root")?);
            Message::Absent { region, frames: read_absent(&mut input, region)?, root }
        }
        PAGE_NAMES => {
            let region = read_region_id(&mut input)?;
            Message::PageNames { region, entries: read_entries(&mut input, region)? }
        }
        FAULT => Message::Fault(Gfn(input.varint("frame of a fault")?)),
        FAULT_PAGE => Message::FaultPage {
            gfn: Gfn(input.varint("frame of a fault")?),
            name: input.name("full name")?,
            batch: input.rest().to_vec(),
        },
        COMPLETE => Message::Complete {
            migration: read_migration(&mut input)?,
            stats: read_stats(&mut input)?,
            postcopy: Box::new(PostcopyStats::from_array(read_counters(&mut input)?)),
        },
        PROBE => Message::Probe(Probe::read(&mut input)?),
        unknown => return Err(WireError::UnknownKind(unknown)),
    };
    input.end()?;
    Ok(message)
}

fn read_region(input: &mut Reader<'_>) -> Result<Region, WireError> {
    let region = read_region_id(input)?;
    let pushed = read_flag(input, "pushed")?;
    let root = input.name("region root")?;
    let entries = read_entries(input, region)?;
    Ok(Region { region, pushed, entries, root })
}
