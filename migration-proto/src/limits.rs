//! Every bound of the protocol, and how the bounds hang together.

use page::{PAGE_SIZE, REGION_PAGES};

use crate::timer::Span;

/// Version of the wire format. A build speaks its own and the one before; this is the first.
pub const WIRE_VERSION: u16 = 1;

/// Most pages in one batch of literals. The measured gain of larger zstd batches is below one percent.
pub const LITERAL_BATCH_PAGES: usize = 64;
/// zstd's level for literals.
pub const LITERAL_ZSTD_LEVEL: i32 = 3;
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

/// How long the destination may take to accept: it allocates the VM's memory.
pub const ACCEPT_TIMEOUT: Span = Span::from_secs(30);
/// How long either side waits without any sign of progress from the other.
pub const PROGRESS_TIMEOUT: Span = Span::from_secs(60);
/// How long the source waits for Running before it says that it is in doubt.
pub const RUNNING_TIMEOUT: Span = Span::from_secs(5);
/// How long a source in doubt waits between two attempts to ask again.
pub const ASK_AGAIN: Span = Span::from_secs(1);
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

const _: () = assert!(LITERAL_BATCH_PAGES * (PAGE_SIZE + 16) < FRAME_BYTES);
const _: () = assert!(REGION_PAGES * 64 < FRAME_BYTES);
const _: () = assert!(WANT_BATCH_PAGES * 10 < FRAME_BYTES);
const _: () = assert!(MACHINE_BYTES < FRAME_BYTES);
