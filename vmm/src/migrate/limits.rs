//! Every bound of migration's I/O side. The protocol's own bounds (message sizes, windows) stand in `migration_proto::limits`.

use std::time::Duration;

use migration_proto::limits as proto;

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

/// What one stream, and a connection over all streams, may ever have in flight: 10 Gbit/s for 200 ms is 250 MB. What the receiver really has to make room for
/// is its receive window, which grows with what arrives.
pub const WINDOW_MAX_BYTES: u64 = 384 << 20;

/// The first receive window of a connection. It is doubled whenever a quarter of it arrives within a round trip, so that it stays ahead of a sender who
/// doubles his own every round trip.
pub const RECEIVE_WINDOW_FIRST_BYTES: u64 = 16 << 20;

/// The first bound on what is handed to QUIC and not yet acknowledged; [`SEND_WINDOW_MIN_BYTES`] and the path decide later.
pub const SEND_WINDOW_FIRST_BYTES: u64 = 1 << 20;

/// The least that may be handed to QUIC and not yet acknowledged.
pub const SEND_WINDOW_MIN_BYTES: u64 = 256 << 10;

/// What the UDP socket may hold in each direction, where the kernel allows so much.
pub const SOCKET_BUFFER_BYTES: usize = 4 << 20;

/// Datagrams of data that the receiver may leave unacknowledged. QUIC's default of 2 costs a slow link 2% in the other direction.
pub const ACK_EVERY_DATAGRAMS: u32 = 16;

/// Datagrams that a connection sends, paced over a round trip, before it has heard of any. Many for a request that may be short, little for a
/// transfer of megabytes: a link for which it is too much drops less than 200 kB once, and each halving costs every other link a round trip more.
pub const FIRST_WINDOW_DATAGRAMS: u64 = 8 * ACK_EVERY_DATAGRAMS as u64;

/// The longest that the receiver holds back an acknowledgement.
pub const MAX_ACK_DELAY: Duration = Duration::from_millis(20);

/// How long an end waits for its own closing words to be sent.
pub const CLOSE_TIMEOUT: Duration = Duration::from_secs(2);

/// The longest frame on the control channel: an offer, and in a dry run the names of the sample.
pub const MAX_CONTROL_FRAME_BYTES: usize = proto::MACHINE_BYTES + proto::PROBE_IDS * 8 + 4096;

/// The longest frame of faults: a page with its full name.
pub const MAX_FAULTS_FRAME_BYTES: usize = page::PAGE_SIZE + 256;

/// The longest frame of wants.
pub const MAX_WANTS_FRAME_BYTES: usize = proto::WANT_BATCH_PAGES * 10 + 64;

/// The longest frame of names: the device state travels there too.
pub const MAX_NAMES_FRAME_BYTES: usize = proto::FRAME_BYTES;

/// The longest frame of literals.
pub const MAX_LITERALS_FRAME_BYTES: usize = proto::LITERAL_BATCH_PAGES * (page::PAGE_SIZE + 16) + 64;

/// Messages queued for one channel beyond which nothing is read that could add to them.
pub const OUTBOX_BOUND: usize = 64;

/// Messages queued for the names channel beyond which no more names are given to the protocol core.
pub const NAMES_QUEUED: usize = 16;

/// Messages that have been read and not been looked at.
pub const INBOX_BOUND: usize = 64;

/// Results of workers that have not been looked at.
pub const RESULTS_BOUND: usize = 64;

/// Jobs that wait for a worker: more than the windows of the protocol let be under way.
pub const JOBS_BOUND: usize = 128;

/// Batches of literals being decoded beyond which no more is read.
pub const DECODE_WINDOW_BATCHES: usize = 16;

/// Pages of the site hashed in one go.
pub const SITE_BATCH_PAGES: usize = 64;

/// Commands of an operator that have not been carried out.
pub const COMMANDS_BOUND: usize = 8;

/// Connections that have said what they are about and wait to be looked at.
pub const GREETINGS_BOUND: usize = 8;

/// How long a dry run may take.
pub const PROBE_TIMEOUT: Duration = Duration::from_secs(60);

/// How long a dry run waits for what the site holds.
pub const PROBE_SITE_TIMEOUT: Duration = Duration::from_secs(10);

/// Pages of memory that a dry run looks at to see what stands there more than once: 8 GiB take about two seconds.
pub const PROBE_SCAN_PAGES: usize = 2 << 20;

/// Dry runs that an endpoint answers at once.
pub const PROBES: usize = 1;

/// How long a dry run watches what the guest writes.
pub const PROBE_WATCH: Duration = Duration::from_secs(1);

/// How often it looks meanwhile.
pub const PROBE_LOOKS: u32 = 4;

/// Written pages that it compresses to see what they take.
pub const PROBE_WRITTEN_PAGES: usize = 512;

/// How often the link is measured and progress is told.
pub const TICK: Duration = Duration::from_millis(100);

/// How long the end of a migration waits for what KVM was asked for.
pub const VM_JOB_TIMEOUT: Duration = Duration::from_secs(60);

/// How long an offer waits for the end of an earlier attempt of the same source to move the same VM.
pub const SUPERSEDE_TIMEOUT: Duration = Duration::from_secs(5);

/// How long a source that went on by itself tries to tell a destination that may be holding the VM.
pub const NOTIFY_TIMEOUT: Duration = Duration::from_secs(60);

/// Between two attempts of that.
pub const NOTIFY_PAUSE: Duration = Duration::from_secs(1);

/// How long the first heartbeat after a hand-over is waited for; guests without one are many.
pub const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(10);

/// How often it is looked for.
pub const HEARTBEAT_LOOK: Duration = Duration::from_millis(5);

/// A link on which less flows has not been used yet, rather than being so slow, bytes a second.
pub const FLOOR_BYTES_PER_S: u64 = 50_000;

/// What a link is taken to carry before it has been measured, bytes a second.
pub const GUESS_BYTES_PER_S: u64 = 12_500_000;

const _: () = assert!(RECEIVE_WINDOW_FIRST_BYTES <= WINDOW_MAX_BYTES && WINDOW_MAX_BYTES < 1 << 62);
const _: () = assert!(SEND_WINDOW_MIN_BYTES <= SEND_WINDOW_FIRST_BYTES);
const _: () = assert!(SEND_WINDOW_FIRST_BYTES <= WINDOW_MAX_BYTES);
const _: () = assert!(FREE_HANDSHAKES < MAX_HANDSHAKES);
const _: () = assert!(proto::PROBE_BURST_BYTES + 64 < MAX_LITERALS_FRAME_BYTES);
// A question goes to the site's peer as one request.
const _: () = assert!(proto::QUESTION_IDS <= dht::limits::LOCAL_RESOLVE_IDS);
const _: () = assert!(proto::HASH_WINDOW_REGIONS + proto::LITERAL_WINDOW_BATCHES <= JOBS_BOUND);
const _: () = assert!(DECODE_WINDOW_BATCHES + INBOX_BOUND + proto::QUESTIONS_OPEN <= JOBS_BOUND);
