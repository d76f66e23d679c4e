//! What a migration tells its operator: progress while it runs, a report at its end.

use migration_proto::source::{SourceProgress, StopWhy, WhyPostcopy};
use migration_proto::stats::{PostcopyStats, SourceStats};
use serde::{Deserialize, Serialize};

/// Pages and bytes that one rung of the ladder gave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rung {
    /// Pages installed from it.
    pub pages: u64,
    /// Bytes of guest memory that it gave (pages × 4096).
    pub bytes: u64,
}

/// Pages and bytes by rung, cheapest first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rungs {
    /// All-zero pages: never sent.
    pub zero: Rung,
    /// Another frame of this VM held the same.
    pub duplicate: Rung,
    /// Already there from an earlier round.
    pub in_place: Rung,
    /// Memory and files on the destination's host.
    pub host: Rung,
    /// Other hosts of the destination's site.
    pub site: Rung,
    /// Literals from the source.
    pub source: Rung,
}

impl From<migration_proto::stats::DestinationStats> for Rungs {
    fn from(stats: migration_proto::stats::DestinationStats) -> Self {
        let rung = |pages: u64| Rung { pages, bytes: pages * page::PAGE_SIZE as u64 };
        Self {
            zero: rung(stats.zero),
            duplicate: rung(stats.duplicate),
            in_place: rung(stats.in_place),
            host: rung(stats.host),
            site: rung(stats.site),
            source: rung(stats.source),
        }
    }
}

/// Pages that crossed the WAN as bytes while the VM ran at the source or stood still, by their form, with the bytes of the encoded batches.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Literals {
    /// Compressed by themselves.
    pub plain_pages: u64,
    /// See `plain_pages`.
    pub plain_bytes: u64,
    /// As deltas against the version that the destination had.
    pub delta_pages: u64,
    /// See `delta_pages`.
    pub delta_bytes: u64,
}

impl From<SourceStats> for Literals {
    fn from(stats: SourceStats) -> Self {
        Self {
            plain_pages: stats.literal_pages - stats.delta_pages,
            plain_bytes: stats.literal_bytes - stats.delta_bytes,
            delta_pages: stats.delta_pages,
            delta_bytes: stats.delta_bytes,
        }
    }
}

/// How a migration ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The VM runs at the destination.
    Completed,
    /// The VM runs on at the source.
    Aborted,
    /// Commit was sent and not answered: the VM is paused at the source and may run at the destination.
    InDoubt,
}

/// A migration's phase, as the source sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Connecting and agreeing on the machine.
    #[default]
    Offering,
    /// Rounds of names while the VM runs.
    Precopy,
    /// The connection is lost and the VM runs on here: dialling until it stands again, for as long as was asked for.
    PrecopyCut,
    /// The VM is paused; the last dirty pages and the device state travel.
    StopAndCopy,
    /// Everything has been sent; waiting for the destination to say that it is ready.
    Handover,
    /// Commit has been sent; waiting for the destination to say that it runs.
    Committing,
    /// Commit was sent and the connection was lost: paused here, asking again until answered or resolved by the operator.
    InDoubt,
    /// The VM runs at the destination and fetches the rest of its memory from here.
    Postcopy,
    /// As `Postcopy`, without a connection: dialling until it stands again, or the operator lets go.
    PostcopyCut,
    /// Ended.
    Ended,
}

impl From<SourceProgress> for Phase {
    fn from(progress: SourceProgress) -> Self {
        match progress {
            SourceProgress::Offering => Self::Offering,
            SourceProgress::Precopy => Self::Precopy,
            SourceProgress::PrecopyCut => Self::PrecopyCut,
            SourceProgress::StopAndCopy => Self::StopAndCopy,
            SourceProgress::Handover => Self::Handover,
            SourceProgress::Committing => Self::Committing,
            SourceProgress::InDoubt => Self::InDoubt,
            SourceProgress::Postcopy => Self::Postcopy,
            SourceProgress::PostcopyCut => Self::PostcopyCut,
            SourceProgress::Ended => Self::Ended,
        }
    }
}

/// Progress of a running migration.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// Where it is.
    pub phase: Phase,
    /// The current round; 0 walks all of RAM.
    pub round: u32,
    /// Pages of this round.
    pub round_pages: u64,
    /// Pages whose names have been sent in this round.
    pub named_pages: u64,
    /// What the destination has said about its pages so far.
    pub rungs: Rungs,
    /// Bytes sent and received on the WAN, all overhead from IP up included.
    pub wan_tx_bytes: u64,
    /// See `wan_tx_bytes`.
    pub wan_rx_bytes: u64,
    /// Connections lost before the hand-over after which the migration went on, or may.
    pub breaks: u32,
    /// How long there was no connection in those that are over, milliseconds.
    pub cut_off_ms: u64,
    /// Since the start, milliseconds.
    pub elapsed_ms: u64,
}

/// Why the virtual CPUs were stopped when they were.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WhyStopped {
    /// What was left fitted the downtime asked for.
    Fits,
    /// The guest writes as fast as the link carries, and the mode is pre-copy alone: the downtime may be longer than asked for.
    DoesNotConverge,
    /// Post-copy was asked for.
    PostcopyAsked,
    /// Post-copy, since rounds in a row did not leave less.
    PostcopyStalled,
    /// Post-copy, since there were as many rounds as there may be.
    PostcopyRounds,
    /// Post-copy, since rounds left less, but so little less that none to come would have fitted the downtime.
    PostcopyPredicted,
    /// Post-copy, since the guest wrote more than fitted the downtime before it stood still.
    PostcopyGrew,
}

impl From<StopWhy> for WhyStopped {
    fn from(why: StopWhy) -> Self {
        match why {
            StopWhy::Fits => Self::Fits,
            StopWhy::DoesNotConverge => Self::DoesNotConverge,
            StopWhy::Postcopy(WhyPostcopy::Asked) => Self::PostcopyAsked,
            StopWhy::Postcopy(WhyPostcopy::Stalled) => Self::PostcopyStalled,
            StopWhy::Postcopy(WhyPostcopy::Rounds) => Self::PostcopyRounds,
            StopWhy::Postcopy(WhyPostcopy::Predicted) => Self::PostcopyPredicted,
            StopWhy::Postcopy(WhyPostcopy::Grew) => Self::PostcopyGrew,
        }
    }
}

/// What happened to memory after the VM ran at the destination.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Postcopy {
    /// Pages that were not there when it began to run.
    pub absent: u64,
    /// Of those, all-zero pages.
    pub zero: u64,
    /// Of those, from the destination's host.
    pub host: u64,
    /// Of those, from other hosts of the destination's site.
    pub site: u64,
    /// Of those, from the source.
    pub source: u64,
    /// Pages that a virtual CPU or a device waited for.
    pub faults: u64,
    /// Of those, given by the destination's host.
    pub faults_host: u64,
    /// Of those, given by other hosts of the site.
    pub faults_site: u64,
    /// Of those, given by the source.
    pub faults_source: u64,
    /// The longest that one waited, microseconds.
    pub longest_wait_us: u64,
    /// How often the VM stood still because nobody gave a page.
    pub pauses: u64,
    /// Connections after the one that the VM went over.
    pub reconnects: u64,
    /// How long those waited that the destination's host gave the page to.
    pub waited_host: Waited,
    /// How long those waited that other hosts of the site gave the page to.
    pub waited_site: Waited,
    /// How long those waited that the source gave the page to.
    pub waited_source: Waited,
}

/// How long virtual CPUs waited for pages, to one part in sixteen; zeroes if none did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Waited {
    /// The median, microseconds.
    pub median_us: u64,
    /// The 99th percentile, microseconds.
    pub p99_us: u64,
}

impl From<migration_proto::stats::Waited> for Waited {
    fn from(waited: migration_proto::stats::Waited) -> Self {
        Self { median_us: waited.median_us, p99_us: waited.p99_us }
    }
}

impl From<PostcopyStats> for Postcopy {
    fn from(stats: PostcopyStats) -> Self {
        Self {
            absent: stats.absent,
            zero: stats.zero,
            host: stats.host,
            site: stats.site,
            source: stats.source,
            faults: stats.faults,
            faults_host: stats.faults_host,
            faults_site: stats.faults_site,
            faults_source: stats.faults_source,
            longest_wait_us: stats.longest_wait_us,
            pauses: stats.pauses,
            reconnects: stats.reconnects,
            waited_host: stats.waited_host.into(),
            waited_site: stats.waited_site.into(),
            waited_source: stats.waited_source.into(),
        }
    }
}

/// What auto-converge did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AutoConverge {
    /// The most that the guest was slowed down, percent of the time that its virtual CPUs rested.
    pub highest_percent: u8,
    /// How long it was slowed down, by whatever percentage, milliseconds.
    pub throttled_ms: u64,
}

/// What a spill file took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Spilled {
    /// Pages written; one that the guest wrote meanwhile counts again.
    pub pages: u64,
    /// Bytes of the file.
    pub bytes: u64,
    /// How long it was written, milliseconds.
    pub spill_ms: u64,
    /// Of those, while the VM stood still.
    pub paused_ms: u64,
}

/// What `vmm spill send` gave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Served {
    /// Pages sent.
    pub pages: u64,
    /// Of those, pages that a virtual CPU waited for.
    pub faults: u64,
    /// From the call to the destination's word that it has all, milliseconds.
    pub total_ms: u64,
}

/// What a dry run says that a migration would cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forecast {
    /// Bytes on the WAN, both ways, IP and UDP headers included.
    pub wan_bytes: u64,
    /// Two standard errors of that, for the sample alone.
    pub wan_bytes_error: u64,
    /// From the call to the end, milliseconds.
    pub total_ms: u64,
    /// How long the VM would stand still, milliseconds.
    pub downtime_ms: u64,
    /// The downtime asked for, milliseconds.
    pub downtime_asked_ms: u64,
    /// Rounds, the last one included.
    pub rounds: u32,
    /// Why the virtual CPUs would be stopped when they would.
    pub why_stopped: WhyStopped,
    /// Pages of RAM.
    pub pages: u64,
    /// Pages looked at.
    pub sampled_pages: u64,
    /// Of those, the ones that are named: neither zero nor equal to another page of the VM that is.
    pub sampled_named: u64,
    /// Of those, the ones that the destination's site does not hold.
    pub sampled_missing: u64,
    /// Different pages that the guest wrote in a second.
    pub written_pages_per_s: u64,
    /// What the link carries, bits a second.
    pub link_bits_per_s: u64,
    /// The link's round trip, microseconds.
    pub round_trip_us: u64,
}

/// The report at the end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// How it ended.
    pub outcome: Outcome,
    /// Why, where it did not complete.
    pub reason: Option<String>,
    /// Both ends agreed on one root over all of RAM.
    pub verified: bool,
    /// Rounds, the last one included.
    pub rounds: u32,
    /// From the call to the destination's word that it runs and has all of its memory, milliseconds.
    pub total_ms: u64,
    /// From the virtual CPUs' stop at the source to the destination's word that they run, as the source timed it, milliseconds.
    pub downtime_ms: f64,
    /// The downtime asked for, milliseconds.
    pub downtime_asked_ms: u64,
    /// Why the virtual CPUs were stopped when they were: the reason where the downtime is longer than asked for.
    pub why_stopped: Option<WhyStopped>,
    /// Where the VM ran at the destination before its memory was complete: what came after.
    pub postcopy: Option<Postcopy>,
    /// Where the guest was slowed down: by how much, and how long.
    pub auto_converge: Option<AutoConverge>,
    /// Where a spill file was written: what it took.
    pub spill: Option<Spilled>,
    /// Connections lost before the hand-over after which the migration went on where it was.
    pub breaks: u32,
    /// How long there was no connection in them, milliseconds.
    pub cut_off_ms: u64,
    /// Pages and bytes by rung.
    pub rungs: Rungs,
    /// The pages of the last rung as they crossed the WAN.
    pub literals: Literals,
    /// Bytes sent on the WAN by the source, IP and UDP headers included.
    pub wan_tx_bytes: u64,
    /// Bytes received on the WAN by the source, IP and UDP headers included.
    pub wan_rx_bytes: u64,
    /// What a plain migration with zero-page detection would have sent over the same rounds: 9 bytes a zero page, 4104 any other.
    pub plain_bytes: u64,
    /// Pages from the site whose bytes did not match the name asked for: dropped, never installed.
    pub wrong_pages: u64,
    /// Times that the site did not answer before its deadline and the source was asked instead.
    pub site_timeouts: u64,
    /// What the last dry run to the same destination had said.
    pub forecast: Option<Forecast>,
}

/// What happens at an endpoint where a VM can arrive.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum IncomingPhase {
    /// Nobody is sending.
    #[default]
    Listening,
    /// A VM is arriving.
    Receiving,
    /// A VM is arriving, and the connection to its source is lost: what is here is kept for it to come back, for as long as it said.
    ReceivingCut,
    /// The VM is complete here and its source was lost before Commit: it stands still until the source comes back or the
    /// operator resolves it.
    Held,
    /// The VM runs here; some of its memory is still on its way.
    Postcopy,
    /// The VM lives here and stands still: nobody gives a page that it waits for. `last_failure` names the page.
    Starved,
    /// The VM runs here, and all of its memory is here.
    Running,
    /// The endpoint has been closed or has failed.
    Closed,
}

/// The state of an endpoint where a VM can arrive.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct IncomingStatus {
    /// Where it is.
    pub phase: IncomingPhase,
    /// The arriving VM's name.
    pub name: Option<String>,
    /// The source's address and key.
    pub source: Option<String>,
    /// The round that it is in.
    pub round: u32,
    /// Pages installed so far, by rung; without those that came after the VM ran.
    pub rungs: Rungs,
    /// Pages that the VM, which runs here, still lacks.
    pub absent_pages: u64,
    /// Bytes sent on the WAN by this end, IP and UDP headers included.
    pub wan_tx_bytes: u64,
    /// Bytes received on the WAN by this end.
    pub wan_rx_bytes: u64,
    /// Why the last attempt failed, if one did.
    pub last_failure: Option<String>,
    /// From the guest's last heartbeat at the source to its first here, milliseconds, by the two hosts' wall clocks.
    pub guest_downtime_ms: Option<f64>,
}
