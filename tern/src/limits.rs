//! Every bound of this crate.

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
