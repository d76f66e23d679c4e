//! Every bound of migration's I/O side. The protocol's own bounds (message sizes, windows) stand in `migration_proto::limits`.

use std::time::Duration;

/// The most of an authorised-keys file that is read, bytes: some 10,000 keys.
pub const MAX_AUTHORIZED_KEYS_BYTES: u64 = 1 << 20;

/// The most of a host key file that is read, bytes.
pub const MAX_KEY_FILE_BYTES: u64 = 16 << 10;

/// From the first packet to the end of the handshake, and the same again for opening the channels.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection on which nothing has arrived for so long is lost.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(10);

/// How often something is sent when there is nothing to send.
pub const KEEP_ALIVE: Duration = Duration::from_secs(2);

/// Handshakes under way at once; further ones are refused.
pub const MAX_HANDSHAKES: usize = 16;

/// Handshakes under way at once beyond which a caller must first prove its address (one more round trip).
pub const FREE_HANDSHAKES: usize = 4;

/// What one stream may have in flight: 1 Gbit/s for 200 ms is 25 MB.
pub const STREAM_WINDOW_BYTES: u32 = 32 << 20;

/// What a connection may have in flight over all streams.
pub const CONNECTION_WINDOW_BYTES: u32 = 48 << 20;

/// The first bound on what is handed to QUIC and not yet acknowledged; [`SEND_WINDOW_MIN_BYTES`] and the path decide later.
pub const SEND_WINDOW_FIRST_BYTES: u64 = 1 << 20;

/// The least that may be handed to QUIC and not yet acknowledged.
pub const SEND_WINDOW_MIN_BYTES: u64 = 256 << 10;

/// What the UDP socket may hold in each direction, where the kernel allows so much.
pub const SOCKET_BUFFER_BYTES: usize = 4 << 20;

/// Datagrams of data that the receiver may leave unacknowledged. QUIC's default of 2 costs a slow link 2% in the other direction.
pub const ACK_EVERY_DATAGRAMS: u32 = 16;

/// The longest that the receiver holds back an acknowledgement.
pub const MAX_ACK_DELAY: Duration = Duration::from_millis(20);

/// How long an end waits for its own closing words to be sent.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// The longest frame on the control channel: the device state travels there.
pub const MAX_CONTROL_FRAME_BYTES: usize = 4 << 20;

/// The longest frame of wants.
pub const MAX_WANTS_FRAME_BYTES: usize = 1 << 20;

/// The longest frame of names.
pub const MAX_NAMES_FRAME_BYTES: usize = 1 << 20;

/// The longest frame of literals.
pub const MAX_LITERALS_FRAME_BYTES: usize = 4 << 20;

const _: () = assert!(STREAM_WINDOW_BYTES <= CONNECTION_WINDOW_BYTES);
const _: () = assert!(SEND_WINDOW_MIN_BYTES <= SEND_WINDOW_FIRST_BYTES);
const _: () = assert!(SEND_WINDOW_FIRST_BYTES <= CONNECTION_WINDOW_BYTES as u64);
const _: () = assert!(FREE_HANDSHAKES < MAX_HANDSHAKES);
