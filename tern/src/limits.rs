//! Every bound of this crate.

use std::time::Duration;

/// The largest UDP payload that the demo's WAN link relays, bytes: the largest that UDP can carry.
pub(crate) const DATAGRAM_BYTES: usize = 65_536;

/// Datagrams that the WAN link's thread takes from one socket before it looks at the others.
pub(crate) const DATAGRAMS_PER_TURN: usize = 64;

/// Sockets of the source that the WAN link relays for.
pub(crate) const FLOWS: usize = 64;

/// Buffers asked for each socket of the WAN link, bytes; the kernel may give less.
pub(crate) const SOCKET_BUFFER_BYTES: usize = 8 << 20;

/// Pages in a zstd batch of the bound.
pub(crate) const BOUND_BATCH_PAGES: usize = 64;

/// The smallest memory of the demo's VM, bytes.
pub(crate) const MEMORY_MIN: u64 = 32 << 20;

/// The largest memory of the demo's VM, bytes: up to here RAM has no hole in it.
pub(crate) const MEMORY_MAX: u64 = 3 << 30;

/// Pages a second that the demo's guest can be told to write.
pub(crate) const DIRTY_RATE: u64 = 1_000_000;

/// Pages of the guest's working set, however fast it writes.
pub(crate) const WORKING_SET_PAGES: u64 = 4096;

/// The slowest WAN link, bits a second.
pub(crate) const RATE_MIN: u64 = 100_000;

/// The fastest WAN link, bits a second.
pub(crate) const RATE_MAX: u64 = 10_000_000_000;

/// The longest round trip of the WAN link.
pub(crate) const RTT_MAX: Duration = Duration::from_secs(2);

/// The most that the WAN link loses by chance, parts of a million.
pub(crate) const LOSS_MAX_PPM: u32 = 500_000;

/// Images that site B can be given to hold.
pub(crate) const SITE_IMAGES: usize = 32;

/// How often a process is asked about a condition that it cannot announce.
pub(crate) const ASK_AGAIN: Duration = Duration::from_millis(25);

/// For a process to start and answer.
pub(crate) const START: Duration = Duration::from_secs(30);

/// For all content of a site to be indexed and announced.
pub(crate) const INDEXED: Duration = Duration::from_secs(120);

/// For the guest to answer its self-check.
pub(crate) const SELF_CHECK: Duration = Duration::from_secs(60);

/// For a process to end after it was told to.
pub(crate) const SHUTDOWN: Duration = Duration::from_secs(5);

/// Bytes of a log's end that an error shows.
pub(crate) const LOG_TAIL_BYTES: u64 = 4096;

/// Between two plain lines of progress, where standard error is not a terminal.
pub(crate) const PROGRESS_LINES: Duration = Duration::from_secs(1);

/// The most that the bytes counted by the vmm and by the WAN link may differ, percent of the latter.
pub(crate) const COUNTS_DIFFER_PERCENT: u64 = 3;
