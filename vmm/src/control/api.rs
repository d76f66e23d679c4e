//! What travels on the control socket. `docs/openapi.yaml` has the same as schemas.

use serde::{Deserialize, Serialize};

use crate::machine::{BalloonStatus, Heartbeat};
use crate::migrate::Mode;
use crate::migrate::report::{IncomingStatus, Progress, Report};

/// What a VM's process is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VmState {
    /// Built; its virtual CPUs have not run yet.
    Created,
    /// Its virtual CPUs run.
    Running,
    /// Its virtual CPUs stand still.
    Paused,
    /// This process waits for a VM from another host; none runs here.
    Receiving,
    /// It runs here and is on its way to another host.
    Migrating,
    /// The two ends of a migration lost each other at the hand-over: the VM stands still here and may run there.
    InDoubt,
    /// It has ended.
    Stopped,
}

impl VmState {
    /// Every state, for metrics and tests.
    pub const ALL: [Self; 7] = [
        Self::Created,
        Self::Running,
        Self::Paused,
        Self::Receiving,
        Self::Migrating,
        Self::InDoubt,
        Self::Stopped,
    ];

    /// As on the wire.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Receiving => "receiving",
            Self::Migrating => "migrating",
            Self::InDoubt => "in_doubt",
            Self::Stopped => "stopped",
        }
    }
}

impl std::fmt::Display for VmState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// `GET /v1/vm`, and the answer to pause, resume and stop.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct VmStatus {
    /// The VM's name; none while no VM is here.
    pub name: Option<String>,
    /// What it is doing.
    pub state: VmState,
    /// For people: why it stands where it stands, and what an operator can do; none where the state says all.
    pub reason: Option<String>,
    /// The process.
    pub pid: u32,
    /// RAM; none while no VM is here.
    pub memory_bytes: Option<u64>,
    /// Virtual CPUs; none while no VM is here.
    pub cpus: Option<u8>,
    /// The guest's heartbeat; none while no VM is here.
    pub heartbeat: Option<Heartbeat>,
    /// Its memory balloon; none while no VM is here, or if it has none.
    pub balloon: Option<BalloonStatus>,
    /// What `vmm migrate --to` of another host takes; present while this process waits for a VM.
    pub ticket: Option<String>,
    /// The running or the last migration away from here.
    pub migration: Option<MigrationStatus>,
    /// The endpoint where a VM can arrive or has arrived; none in a process that launched its VM.
    pub incoming: Option<IncomingStatus>,
}

/// A running migration away from here, or the last one: `GET /v1/migration`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MigrationStatus {
    /// Where to, as the operator gave it, the key's fingerprint included.
    pub to: String,
    /// Whether it still runs.
    pub active: bool,
    /// Whether Commit was sent and not answered yet.
    pub in_doubt: bool,
    /// How far it is, or was when it ended.
    pub progress: Progress,
    /// How it ended; none while it runs or where it ended with an error.
    pub report: Option<Report>,
    /// Why it ended without a report.
    pub error: Option<ErrorDetail>,
}

/// `POST /v1/migration`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrateRequest {
    /// A ticket (`ADDR:PORT#HEX64`), or `ADDR:PORT` of a host whose key is in the authorised keys.
    pub to: String,
    /// How long the VM may stand still, milliseconds.
    #[serde(default = "default_downtime_ms")]
    pub downtime_ms: u64,
    /// Whether the VM may run there before its memory is complete.
    #[serde(default)]
    pub mode: Mode,
    /// The most to send, bits a second; none for as much as the link carries.
    #[serde(default)]
    pub bandwidth_bits: Option<u64>,
    /// The most that old versions of pages may take at the source, bytes, so that pages written again go as deltas; 0 for no deltas, none for an eighth of
    /// the VM's memory, and no more than 1 GiB.
    #[serde(default)]
    pub delta_cache_bytes: Option<u64>,
    /// Whether a guest that writes faster than the link carries may be slowed down, where it does not go by post-copy.
    #[serde(default)]
    pub auto_converge: bool,
    /// A directory for a spill file, as an absolute path.
    #[serde(default)]
    pub spill: Option<String>,
    /// How long the destination is dialled again when the connection is lost before the hand-over, milliseconds; 0: the loss ends the migration.
    #[serde(default = "default_resume_for_ms")]
    pub resume_for_ms: u64,
}

impl MigrateRequest {
    /// To this destination, as a request that says no more than that.
    #[must_use]
    pub fn to(to: impl Into<String>) -> Self {
        Self {
            to: to.into(),
            downtime_ms: default_downtime_ms(),
            mode: Mode::default(),
            bandwidth_bits: None,
            delta_cache_bytes: None,
            auto_converge: false,
            spill: None,
            resume_for_ms: DEFAULT_RESUME_FOR_MS,
        }
    }
}

/// `PUT /v1/vm/balloon`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonRequest {
    /// How much of its memory the guest is asked for, bytes: a multiple of 4096.
    pub size_bytes: u64,
}

/// `POST /v1/vm/snapshot`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotRequest {
    /// The directory, as an absolute path; it is made if it is not there.
    pub to: String,
    /// The snapshot's name there; none takes the next number.
    #[serde(default)]
    pub name: Option<String>,
}

/// Milliseconds of downtime that a migration may take where the operator says nothing.
pub const DEFAULT_DOWNTIME_MS: u64 = 300;

fn default_downtime_ms() -> u64 {
    DEFAULT_DOWNTIME_MS
}

/// Milliseconds for which a destination is dialled again where the operator says nothing.
pub const DEFAULT_RESUME_FOR_MS: u64 = 5 * 60 * 1000;

fn default_resume_for_ms() -> u64 {
    DEFAULT_RESUME_FOR_MS
}

/// `POST /v1/migration/resolve`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResolveRequest {
    /// True: the VM runs on here, and the operator knows that it does not run at the other end. False: it is let go here.
    pub run_here: bool,
}

/// The body of every answer that is not a success.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ErrorDetail,
}

/// What went wrong.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorDetail {
    /// For programs: lower-case words joined by `_`.
    pub code: String,
    /// For people: what happened, to what, and what to do.
    pub message: String,
}

/// One line of `GET /v1/events`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Event {
    /// When, milliseconds of CLOCK_REALTIME.
    pub unix_ms: u64,
    /// What.
    #[serde(flatten)]
    pub kind: EventKind,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum EventKind {
    /// The state is now this; also the first line of every stream.
    State {
        /// The state.
        state: VmState,
        /// As in [`VmStatus::reason`].
        reason: Option<String>,
    },
    /// How far the migration is: at each change of phase or round, and in between at most ten times a second.
    Progress {
        /// How far.
        progress: Progress,
    },
    /// What happens at the endpoint where a VM can arrive; at most ten a second.
    Incoming {
        /// What.
        incoming: IncomingStatus,
    },
    /// A migration ended with a report: it completed, or the VM runs on here.
    Report {
        /// The report.
        report: Box<Report>,
    },
    /// A migration ended without a report.
    MigrationFailed {
        /// Why.
        error: ErrorDetail,
    },
    /// The reader was too slow: this many events are missing here.
    Lagged {
        /// How many.
        missed: u64,
    },
}
