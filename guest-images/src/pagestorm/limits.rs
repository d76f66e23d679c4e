//! Every bound of pagestorm.

/// Bytes in a page.
pub const PAGE_BYTES: usize = 4096;
/// Guest-physical addresses below this are identity-mapped by the supervisor stub (`pagestorm/start.rs`).
pub const MAPPED_BYTES: u64 = 16 << 30;
/// Longest command line that is read, bytes without the terminating NUL.
pub const CMDLINE_BYTES_MAX: usize = 4096;
/// Most entries of the memory map that are looked at.
pub const MEMORY_MAP_ENTRIES_MAX: usize = 128;
/// Smallest working set: a page of counters and a page to write.
pub const WS_BYTES_MIN: u64 = 2 * PAGE_BYTES as u64;
/// Fastest pace that can be asked for, pages a second.
pub const RATE_MAX: u64 = 10_000_000;
/// Shortest heartbeat period, microseconds: a beat is a port exit of some 20 µs on a slow host.
pub const HEARTBEAT_US_MIN: u64 = 50;
/// Longest heartbeat period, microseconds.
pub const HEARTBEAT_US_MAX: u64 = 1_000_000;
/// Longest status interval, milliseconds.
pub const REPORT_MS_MAX: u64 = 86_400_000;
/// A stall is made up for by at most the writes of this time, nanoseconds; the rest is forgone.
pub const CATCH_UP_NS: u64 = 50_000_000;
/// Writes that are due within this time of each other are made in one go, so that the CPU can rest between, ns.
pub const WRITE_GRAIN_NS: u64 = 1_000_000;
/// A rest shorter than this is spent spinning: halting and waking take as long, nanoseconds.
pub const HALT_NS_MIN: u64 = 100_000;
/// Longest halt, nanoseconds: whatever is due later, the CPU looks up.
pub const HALT_NS_MAX: u64 = 1_000_000_000;
/// Pages written in one turn of the loop, so that a turn stays well under a heartbeat period.
pub const WRITES_PER_TURN: u32 = 32;
/// Pages checked in one turn of the loop.
pub const CHECKS_PER_TURN: u32 = 16;
/// Bytes sent to the serial port in one turn: each is a port exit, and so is asking whether it takes one.
pub const SERIAL_BYTES_PER_TURN: u32 = 4;
/// Bytes waiting for the serial port. Whatever does not fit waits to be formatted.
pub const SERIAL_QUEUE_BYTES: usize = 4096;
/// Longest line on the serial port.
pub const LINE_BYTES: usize = 384;
/// How often the serial port is asked for a command, nanoseconds.
pub const INPUT_POLL_NS: u64 = 50_000_000;
/// Bad pages that one check describes each in a line; the rest are only counted.
pub const BAD_PAGE_LINES_MAX: u32 = 16;

const _: () = assert!(BAD_PAGE_LINES_MAX as usize * 128 + LINE_BYTES <= SERIAL_QUEUE_BYTES);
const _: () = assert!(WS_BYTES_MIN < MAPPED_BYTES);
