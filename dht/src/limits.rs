//! Every bound of the peer and of its local client, in one place.

use std::time::Duration;

use page::PAGE_SIZE;

/// Ids in one resolve request on the local socket; the client splits longer lists.
pub const LOCAL_RESOLVE_IDS: usize = 65_536;
/// Pages in one answer frame on the local socket (256 KiB and their ids).
pub const LOCAL_PAGES_PER_FRAME: usize = 64;
/// Bytes of one frame on the local socket, its kind included, its length field not.
pub const LOCAL_FRAME_BYTES: usize = 1 << 20;
/// Bytes of a registered memory's name.
pub const MEMORY_NAME_BYTES: usize = 255;
/// Extents of one registered memory.
pub const MEMORY_EXTENTS: usize = 1024;
/// Pages of one registered memory (4 TiB).
pub const MEMORY_PAGES: u64 = 1 << 30;
/// Bytes of a file's path, as in Linux's PATH_MAX.
pub const PATH_BYTES: usize = 4096;
/// Bytes of a peer id or an address in text.
pub const PEER_TEXT_BYTES: usize = 256;
/// Bytes of an error's text on the local socket.
pub const ERROR_TEXT_BYTES: usize = 1024;
/// Holders that one locate answer names.
pub const LOCATE_HOLDERS: usize = 64;
/// Found pages that wait between the client's socket and its user (2 MiB).
pub const CLIENT_FOUND_QUEUE: usize = 512;
/// How long the client waits for the peer's side of the handshake, and for short answers.
pub const LOCAL_ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a registration waits before it offers its memory to a restarted peer again.
pub const REREGISTER_EVERY: Duration = Duration::from_secs(1);

const _: () = {
    assert!(LOCAL_RESOLVE_IDS * 8 + 16 <= LOCAL_FRAME_BYTES);
    assert!(LOCAL_PAGES_PER_FRAME * (PAGE_SIZE + 8) + 16 <= LOCAL_FRAME_BYTES);
    assert!(MEMORY_EXTENTS * 24 + MEMORY_NAME_BYTES + 16 <= LOCAL_FRAME_BYTES);
};
