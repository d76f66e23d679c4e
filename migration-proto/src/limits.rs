//! Every bound of the protocol, and how the bounds hang together.

use page::{PAGE_SIZE, REGION_PAGES};

use crate::timer::Span;

/// Version of the wire format. A build speaks its own and the one before.
pub const WIRE_VERSION: u16 = 2;
/// The version before: pre-copy alone.
pub const WIRE_VERSION_BEFORE: u16 = 1;

/// Most pages in one batch of literals. The measured gain of larger zstd batches is below one percent.
pub const LITERAL_BATCH_PAGES: usize = 64;
/// zstd's level for literals.
pub const LITERAL_ZSTD_LEVEL: i32 = 3;
/// The least of zstd's levels for deltas: those below do not look back as far as a batch of old versions is long.
pub const LITERAL_DELTA_LEVEL_MIN: i32 = 3;
/// How often a delta for one frame may not serve within a round before the destination gives up: the source sends plain what is asked for again, so
/// only one that is not well comes so far. More than one is none of its fault: a literal of an earlier round may come late.
pub const DELTA_MISSES: u32 = 8;
/// Most batches of literals that the source has given to its driver and not heard back of.
pub const LITERAL_WINDOW_BATCHES: usize = 8;
/// Most regions that the source has asked its driver to hash and not heard back of.
pub const HASH_WINDOW_REGIONS: usize = 8;

/// Most ids in one question to the site: the pages of 1 GiB.
pub const QUESTION_IDS: usize = 262_144;
/// Most questions to the site under way at once.
pub const QUESTIONS_OPEN: usize = 4;
/// Most frames in one want.
pub const WANT_BATCH_PAGES: usize = 512;

/// Most pages that the source has asked its driver to send for faults and not heard back of: more than a VM has virtual CPUs.
pub const FAULT_WINDOW_PAGES: usize = 256;
/// Most regions whose names the destination has asked for anew, over a new connection, and not got.
pub const NAMES_WINDOW_REGIONS: usize = 32;

/// Most pages that the source has its driver write to the spill file at once: 64 MiB.
pub const SPILL_BATCH_PAGES: usize = 16_384;
/// Most walks through what was written since, while the VM runs, before the rest is spilled while it stands still.
pub const SPILL_WALKS: u32 = 8;
/// So few pages are left to be spilled while the VM stands still, without a further walk: 4 MiB.
pub const SPILL_REST_PAGES: u64 = 1024;
/// Most pages that a dry run samples: 64 MiB, and 128 KiB of names.
pub const PROBE_IDS: usize = 16_384;
/// Pages beside each other in a dry run's sample: what lies together was often written together, and is found together.
pub const PROBE_RUN_PAGES: u64 = 16;
/// A dry run samples at most one page of so many, that it may cost little beside the migration; where that would be few, [`PROBE_IDS_MIN`].
pub const PROBE_SHARE: u64 = 16;
/// See [`PROBE_SHARE`].
pub const PROBE_IDS_MIN: u64 = 2048;
/// Bytes of one burst of a dry run.
pub const PROBE_BURST_BYTES: usize = 16 * 1024;
/// Most bytes that a dry run fills the link with.
pub const PROBE_BURSTS_BYTES: u64 = 32 << 20;
/// How long a dry run fills the link at most.
pub const PROBE_BURSTS_TIME: Span = Span::from_millis(2500);

/// Most bytes of an opaque machine description.
pub const MACHINE_BYTES: usize = 64 * 1024;
/// Most bytes of device and vCPU state.
pub const STATE_BYTES: usize = 8 * 1024 * 1024;
/// Most extents of RAM.
pub const EXTENTS: usize = 16;
/// Most regions of RAM: 1 TiB.
pub const REGIONS: u64 = 512 * 1024;
/// Most bytes of a reason in an Abort or Refuse.
pub const REASON_BYTES: usize = 1024;
/// Most bytes of one message. The driver reads no longer frame.
pub const FRAME_BYTES: usize = STATE_BYTES + 64;

/// Most rounds before the VM is stopped whatever is left.
pub const ROUNDS: u32 = 30;
/// Rounds in a row without progress before the VM is stopped whatever is left.
pub const STALLED_ROUNDS: u32 = 3;

/// The first step by which auto-converge slows a guest down, percent of the time that its virtual CPUs rest, and each further one (QEMU's defaults).
pub const THROTTLE_FIRST_PERCENT: u8 = 20;
/// See [`THROTTLE_FIRST_PERCENT`].
pub const THROTTLE_STEP_PERCENT: u8 = 10;
/// The most.
pub const THROTTLE_MOST_PERCENT: u8 = 99;

/// How long the destination may take to accept: it allocates the VM's memory.
pub const ACCEPT_TIMEOUT: Span = Span::from_secs(30);
/// How long either side waits without any sign of progress from the other.
pub const PROGRESS_TIMEOUT: Span = Span::from_secs(60);
/// How long the source waits for Running before it says that it is in doubt.
pub const RUNNING_TIMEOUT: Span = Span::from_secs(5);
/// How long a source in doubt waits between two attempts to ask again.
pub const ASK_AGAIN: Span = Span::from_secs(1);
/// The longest that a source may ask the destination to keep what it has while the connection is lost before Commit.
pub const RESUME_FOR_MAX: Span = Span::from_secs(3600);
/// How much longer the destination keeps it: the source may learn of the loss later, and its last dial takes its time.
pub const RESUME_GRACE: Span = Span::from_secs(30);
/// Most regions in one message of what the destination holds.
pub const HELD_REGIONS: usize = 4096;

/// How long the destination, once ready, waits for Commit before it says that it holds the VM.
pub const COMMIT_TIMEOUT: Span = Span::from_secs(10);
/// How long a local action (pause, save, load) may take.
pub const LOCAL_TIMEOUT: Span = Span::from_secs(60);

/// The shortest and longest time for which the site may fall behind the source, or say nothing; in between, what the source would take for
/// the pages that the site has been asked for.
pub const SITE_PATIENCE_MIN: Span = Span::from_millis(500);
/// See [`SITE_PATIENCE_MIN`].
pub const SITE_PATIENCE_MAX: Span = Span::from_secs(10);
/// After so many questions in a row that timed out, the site is not asked any more.
pub const SITE_STRIKES: u32 = 4;

/// The shortest and longest time the site gets for the page of a fault before the source is asked too; in between, the link's round trip.
pub const FAULT_PATIENCE_MIN: Span = Span::from_millis(5);
/// See [`FAULT_PATIENCE_MIN`].
pub const FAULT_PATIENCE_MAX: Span = Span::from_millis(500);
/// While the source is away: how long after it had no answer the site is asked again for a page that a virtual CPU waits for.
pub const FAULT_ASK_AGAIN: Span = Span::from_secs(2);
/// How long a virtual CPU waits for a page before the whole VM is paused, with an error that names the page. A guest takes a CPU that stands
/// still for 20 s for dead (Linux, kernel/watchdog.c).
pub const FAULT_LIMIT: Span = Span::from_secs(10);

const _: () = assert!(FAULT_PATIENCE_MAX.0 < FAULT_ASK_AGAIN.0 && FAULT_ASK_AGAIN.0 < FAULT_LIMIT.0);
const _: () = assert!(REGION_PAGES * (32 + 4) < FRAME_BYTES);
const _: () = assert!(LITERAL_BATCH_PAGES * (PAGE_SIZE + 16) < FRAME_BYTES);
const _: () = assert!(REGION_PAGES * 64 < FRAME_BYTES);
const _: () = assert!(WANT_BATCH_PAGES * 10 < FRAME_BYTES);
const _: () = assert!(MACHINE_BYTES + PROBE_IDS * 8 < FRAME_BYTES);
const _: () = assert!(PROBE_IDS_MIN <= PROBE_IDS as u64 && PROBE_RUN_PAGES <= PROBE_IDS_MIN);
const _: () = assert!(PROBE_BURST_BYTES < LITERAL_BATCH_PAGES * PAGE_SIZE);
// A region's number is below 2^21: three bytes. The driver's control channel carries MACHINE_BYTES.
const _: () = assert!(REGIONS < 1 << 21 && HELD_REGIONS * (3 + 8) + 16 < MACHINE_BYTES);
