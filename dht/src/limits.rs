//! Every bound of the peer and of its local client, in one place.

use std::{num::NonZeroUsize, time::Duration};

use page::PAGE_SIZE;

/// Ids in one resolve request on the local socket, the pages of 1 GiB; the client splits longer lists.
pub const LOCAL_RESOLVE_IDS: usize = 262_144;
/// Pages in one answer frame on the local socket (512 KiB and their ids).
pub const LOCAL_PAGES_PER_FRAME: usize = 128;
/// Bytes of one frame on the local socket, its kind included, its length field not.
pub const LOCAL_FRAME_BYTES: usize = LOCAL_RESOLVE_IDS * 8 + 4096;
/// Bytes of a registered memory's name.
pub const MEMORY_NAME_BYTES: usize = 255;
/// Extents of one registered memory.
pub const MEMORY_EXTENTS: usize = 1024;
/// Pages of one registered memory (4 TiB).
pub const MEMORY_PAGES: u64 = 1 << 30;
/// Bytes of a file's path, as in Linux's PATH_MAX.
pub const PATH_BYTES: usize = 4096;
/// Bytes of a Unix socket's path, without its final NUL (`sun_path` of unix(7)).
pub const SOCKET_PATH_BYTES: usize = 107;
/// Local connections that the kernel queues before they are accepted.
pub const SOCKET_BACKLOG: i32 = 128;
/// Bytes of a peer id or an address in text.
pub const PEER_TEXT_BYTES: usize = 256;
/// Bytes of an error's text on the local socket.
pub const ERROR_TEXT_BYTES: usize = 1024;
/// Holders that one locate answer names.
pub const LOCATE_HOLDERS: usize = 64;
/// Found pages, and lists of missing ones, that wait between the client's socket and its user (2 MiB, and 8 bytes a missing page).
pub const CLIENT_TOLD_QUEUE: usize = 512;
/// How long the client waits for the peer's side of the handshake, and for short answers.
pub const LOCAL_ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a registration waits before it offers its memory to a restarted peer again.
pub const REREGISTER_EVERY: Duration = Duration::from_secs(1);

const _: () = {
    assert!(LOCAL_RESOLVE_IDS * 8 + 16 <= LOCAL_FRAME_BYTES);
    assert!(LOCAL_PAGES_PER_FRAME * (PAGE_SIZE + 8) + 16 <= LOCAL_FRAME_BYTES);
    assert!(MEMORY_EXTENTS * 24 + MEMORY_NAME_BYTES + 16 <= LOCAL_FRAME_BYTES);
};

/// Memories and files that one peer serves; each keeps a descriptor open.
pub const CONTENTS: usize = 512;
/// Retained checkpoints that one peer keeps.
pub const CHECKPOINTS: NonZeroUsize = NonZeroUsize::new(128).expect("not zero");
/// How often a checkpoint's last use is written down at most.
pub const LAST_USE_EVERY: Duration = Duration::from_secs(60);
/// Names of a checkpoint's table that are put into the index at once.
pub const TABLE_CHUNK_IDS: u32 = 16_384;
/// Pages of one memory or file (4 TiB).
pub const CONTENT_PAGES: u32 = 1 << 30;
/// Pages that a scan reads, hashes and notes at once (2 MiB).
pub const SCAN_CHUNK_PAGES: u32 = 512;
/// Pages that a scan reads at once (256 KiB): what is read stays in a core's cache until it is hashed.
pub const SCAN_READ_PAGES: usize = 64;
/// Names of a new file or checkpoint for which the index makes room at once (64 MiB); for more it grows.
pub const RESERVED_NAMES: usize = 4 << 20;
/// Threads that the first scan of a content uses at most.
pub const SCAN_THREADS: usize = 16;
/// How often it is looked whether a file was changed, replaced or deleted.
pub const FILE_LOOK_EVERY: Duration = Duration::from_secs(5);
/// Names that one step of a content's leaving takes out of the index, or looks at.
pub const LEAVING_STEP: usize = 65_536;
/// How long after a scan of a VM's memory the next one starts.
pub const RESCAN_EVERY: Duration = Duration::from_secs(30);
/// Rescans that pass over a region which was rewritten each time it was looked at.
pub const REVISIT_LATEST: u8 = 8;
/// Percent of one core that all rescans of a host share, unless the operator says otherwise.
pub const RESCAN_PERCENT: u32 = 10;
/// The largest CPU budget, in percent of one core: a thousand cores.
pub const CPU_PERCENT: u32 = 100_000;
/// Of a second's worth of CPU time, the part that scans may use at once: a twentieth.
pub const CPU_BURST_DIVISOR: u64 = 20;
/// What a chunk's scan is expected to cost before one was measured.
pub const SCAN_COST_FIRST: Duration = Duration::from_millis(5);
/// The priority of scanning threads: Linux's lowest.
pub const NICEST: i32 = 19;
/// What a request to another peer and its short answer take on the LAN beside their ids: stream negotiation, framing, packets.
pub const MESSAGE_OVERHEAD_BYTES: u64 = 512;
/// Of a second's worth of announcements, the part that may be sent at once: a quarter.
pub const LAN_BURST_DIVISOR: u64 = 4;

/// Connections that the local socket serves at once.
pub const LOCAL_CONNECTIONS: usize = 256;
/// Frames that wait to be written to one local connection.
pub const LOCAL_FRAME_QUEUE: usize = 8;
/// What the kernel may hold of one local connection's answers: a frame of pages, if it allows as much.
pub const LOCAL_SEND_BYTES: usize = 1 << 20;
/// Batches of pages read and hashed at once for one resolve.
pub const LOCAL_READERS: usize = 4;
/// How long a local connection may take over its handshake.
pub const LOCAL_HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the local socket rests after it could not accept a connection.
pub const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Owners of a shard (k in the design).
pub const OWNERS: usize = 2;
/// Members of a site that one peer knows.
pub const MEMBERS: usize = 16_384;
/// Peers whose misbehaviour is remembered.
pub const SUSPECTS: usize = 4096;
/// How long a peer that did not answer is skipped at first; doubled with each further time.
pub const SKIP_FIRST: Duration = Duration::from_secs(5);
/// The longest skip.
pub const SKIP_LONGEST: Duration = Duration::from_secs(60);
/// How long a peer that served wrong bytes is avoided as a holder.
pub const AVOID_LIAR: Duration = Duration::from_secs(600);
/// How long a holder is left out that delivered next to nothing of what it had announced.
pub const AVOID_FALSE: Duration = Duration::from_secs(120);
/// Pages that must have been asked of a holder before what it delivers is judged.
pub const TRUST_ASKED: u32 = 256;
/// Of those, pages that must have been asked on the word of one owner for its word to count.
pub const TRUST_WITNESSED: u32 = 64;
/// After how long what a holder delivered counts half.
pub const TRUST_HALF_LIFE: Duration = Duration::from_secs(60);
/// Holders of which it is remembered what they delivered.
pub const TRUST_HOLDERS: usize = 4096;
/// How long what a holder told of a shard lasts at an owner, unless it is renewed.
pub const LEASE: Duration = Duration::from_secs(600);

/// How long after it began a lease is renewed: two renewals may fail, or one and all that it takes to find out.
#[must_use]
pub fn renew_after(lease: Duration) -> Duration {
    lease * 2 / 5
}

/// Told parts of one shard's log that are remembered of an owner.
pub const TOLD_RANGES: usize = 16;
/// How long after a change of a shard's owners its entries are compared: holders that are connected tell a new owner themselves.
pub const REPAIR_AFTER: Duration = Duration::from_secs(5);
/// How often a peer looks whether a shard of its own is to be compared with its other owner's.
pub const REPAIR_LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often the owners of a shard compare its entries.
pub const REPAIR_EVERY: Duration = Duration::from_secs(300);
/// How long a shard is left alone that could not be compared, or not be made alike.
pub const REPAIR_RETRY: Duration = Duration::from_secs(30);
/// Claims that one owner pulls from others a second, over time: 4 million a minute, 0.7 MB/s.
pub const REPAIR_CLAIMS_PER_SECOND: u64 = 70_000;
/// Claims in one answer to a pull (640 KiB).
pub const PULL_CLAIMS: usize = 65_536;
/// Answers that one repair of a shard takes at most.
pub const PULLS_PER_ROUND: u32 = 1024;
/// Parts of a shard that are gone through for one pull: some four million entries.
pub const PULL_PARTS: usize = 64;
/// Holders that an owner keeps for one name.
pub const HOLDERS_PER_NAME: usize = 4;
/// Entries that an owner keeps (at most 400 MiB); half of them of one holder.
pub const OWNER_ENTRIES: usize = 32 << 20;
/// Bits that a full owner samples a shard by at most: one name in 65,536 is kept then.
pub const SAMPLING_BITS: u8 = 16;
/// Of those, bits that one holder with more than half of the table can bring about: announcing without end, it leaves others' names one in 16.
pub const SAMPLING_BITS_ONE: u8 = 4;
/// Names in one announcement, those included that are gone.
pub const INDEX_BATCH: usize = 4096;
/// Names in one lookup (512 KiB; an answer with all the holders it may name takes 2.5 MiB). A search has a few times as many names, and each
/// is out at one owner at a time, so that what it has in flight stays below 10 MiB.
pub const LOOKUP_BATCH: usize = 65_536;
/// Names of a lookup that are looked up without letting others at the table.
pub const LOOKUP_TURN: usize = 4096;
/// Ids of a request within which a page whose name is not sampled is asked of the holders of sampled ones.
pub const NEAR_WINDOW: u32 = 2048;
/// Holders that such a page is asked of, one after the other.
pub const NEAR_HOLDERS: usize = 4;
/// Pages of a search that have no page beside them with a holder, and are asked of those who served this host lately.
pub const SUGGESTED_PAGES: usize = FETCH_BATCH;
/// Holders of which it is remembered that they served this host lately.
pub const RECENT_HOLDERS: usize = 16;
/// After how long the pages that they served count half.
pub const RECENT_HALF_LIFE: Duration = Duration::from_secs(60);
/// How long an owner that refused or lost an announcement is left alone.
pub const ANNOUNCE_RETRY: Duration = Duration::from_secs(2);
/// Lookups in flight for one resolve, besides those to owners that are late.
pub const LOOKUPS_IN_FLIGHT: usize = 8;
/// The same while owners are late: as many more as are late.
pub const LOOKUPS_IN_FLIGHT_MOST: usize = 64;
/// How long an owner may take at least, besides its names, before another one is asked as well.
pub const LOOKUP_HEDGE_LEAST: Duration = Duration::from_millis(100);
/// How long a lookup may take, besides its names.
pub const LOOKUP_TIMEOUT: Duration = Duration::from_secs(2);
/// How much longer a lookup may take for each of its names: a fifth of the rate that one core of an owner reaches.
pub const LOOKUP_TIMEOUT_PER_ID: Duration = Duration::from_micros(10);
/// Pages in one request to a holder (512 KiB).
pub const FETCH_BATCH: usize = 128;
/// Page requests in flight for one resolve (4 MiB of pages).
pub const FETCHES_IN_FLIGHT: usize = 8;
/// Page requests in flight to one holder for one resolve.
pub const FETCHES_PER_HOLDER: usize = 4;
/// How long a holder of which nothing is known may take before another one is asked as well.
pub const FETCH_HEDGE: Duration = Duration::from_millis(250);
/// The least such time, however quickly it has answered before: less would be the scheduler's doing.
pub const FETCH_HEDGE_LEAST: Duration = Duration::from_millis(25);
/// The longest, however slowly.
pub const FETCH_HEDGE_MOST: Duration = Duration::from_millis(1500);
/// How long a holder may take at all.
pub const FETCH_TIMEOUT: Duration = Duration::from_secs(3);

const _: () = {
    assert!(FETCH_BATCH <= LOCAL_PAGES_PER_FRAME);
    assert!(FETCH_HEDGE_LEAST.as_millis() < FETCH_HEDGE.as_millis());
    assert!(FETCH_HEDGE.as_millis() < FETCH_HEDGE_MOST.as_millis());
    assert!(FETCH_HEDGE_MOST.as_millis() < FETCH_TIMEOUT.as_millis());
    assert!(NEAR_HOLDERS <= HOLDERS_PER_NAME);
    assert!(PULL_CLAIMS >= HOLDERS_PER_NAME && PULLS_PER_ROUND as usize * PULL_CLAIMS >= OWNER_ENTRIES);
    // A search of the largest request asks each owner once, and four times more.
    assert!(LOCAL_RESOLVE_IDS / LOOKUP_BATCH <= 8);
    assert!(
        FETCH_HEDGE_MOST.as_millis() < LOOKUP_TIMEOUT.as_millis()
            && LOOKUP_HEDGE_LEAST.as_millis() < FETCH_HEDGE_MOST.as_millis()
    );
    let longest = LOOKUP_TIMEOUT.as_micros() + LOOKUP_TIMEOUT_PER_ID.as_micros() * LOOKUP_BATCH as u128;
    assert!(longest < REQUEST_TIMEOUT.as_micros());
};

/// How long a connection may take to prove the site's key and both identities.
pub const UPGRADE_TIMEOUT: Duration = Duration::from_secs(5);
/// Streams that one connection may have open: the index's requests both ways, Kademlia's and ping's.
pub const STREAMS: usize = 4 * INBOUND_STREAMS;
/// Requests for pages that one host has out at one holder, each on a connection of its own.
pub const FETCHES_EACH: usize = 8;
/// Connections for pages that a holder takes of one other peer: those of its own closing have a moment.
pub const PAGE_CONNECTIONS_EACH: usize = 2 * FETCHES_EACH;
/// Connections for pages that a holder takes of all; each has a thread.
pub const PAGE_CONNECTIONS: usize = 512;
/// Such connections that wait for their thread.
pub const PAGE_ARRIVALS: usize = PENDING_CONNECTIONS as usize;
/// What such a thread may use of its stack.
pub const PAGE_STACK_BYTES: usize = 512 << 10;
/// What is encrypted before it is handed to the kernel.
pub const PAGE_WRITE_BYTES: usize = 256 << 10;
/// How long a call on a connection for pages waits before it looks at its deadline, and how long an idle one keeps memory.
pub const PAGE_CONNECTION_LOOK: Duration = Duration::from_secs(1);
/// How long a connection for pages stays open without a request, at the end that asks.
pub const PAGE_CONNECTION_KEPT: Duration = Duration::from_secs(20);
/// And at the end that is asked.
pub const PAGE_CONNECTION_IDLE: Duration = Duration::from_secs(30);
/// Connections to one holder that are kept without a request: one search's.
pub const PAGE_CONNECTIONS_KEPT: usize = FETCHES_PER_HOLDER;
/// What is read from a connection's socket at once.
pub const SOCKET_READ_BYTES: usize = 128 << 10;
/// What is gathered before it is made into TLS records (16 KiB each) and written.
pub const TLS_WRITE_BYTES: usize = 64 << 10;
/// Members of a site up to which everyone is connected to everyone.
pub const MESH: usize = 256;
/// Connections of one peer beyond which unused ones are let go.
pub const CONNECTIONS: usize = 384;
/// Connections that there may be beyond those at least, while unused ones are let go.
pub const CONNECTIONS_SPARE: usize = 16;
/// How long a connection of a large site that this peer made stays open without a request.
pub const IDLE_CLOSE: Duration = Duration::from_secs(60);
/// How long any connection is left alone after its last use: a question of Kademlia's may be under way on it.
pub const CONNECTION_GRACE: Duration = Duration::from_secs(2);
/// Connections that are dialled in one tick because they should be there.
pub const DIALS_PER_TICK: usize = 16;
/// Addresses that are remembered of a peer.
pub const KNOWN_ADDRESSES: usize = 4;
/// Members beyond which Kademlia is asked for the owners of all shards, since its tables need not hold all peers any more (its k is 20).
pub const REFRESH_ABOVE: usize = 20;
/// How often Kademlia is asked for the peers closest to one shard.
pub const REFRESH_EVERY: Duration = Duration::from_secs(600);
/// Shards that it is asked for at once.
pub const REFRESHES_IN_FLIGHT: usize = 4;
/// How long it is left alone between two questions while there are as many connections as there should be.
pub const REFRESH_PAUSE: Duration = Duration::from_secs(5);
/// Peers that it is asked for: the owners, and some more from whose distances the site's size is estimated.
pub const REFRESH_CLOSEST: usize = 4;
/// How often Kademlia looks for peers that it does not know in a large site; asking for the shards' owners does the same.
pub const BOOTSTRAP_LARGE_EVERY: Duration = Duration::from_secs(600);
/// Holders unknown to this peer that it meets because of one answer.
pub const MEETINGS: usize = 32;
/// How long an answer waits for them.
pub const MEETING_TIMEOUT: Duration = Duration::from_millis(500);
/// Connections to one other peer: two ends may dial each other at once.
pub const CONNECTIONS_PER_PEER: u32 = 2;
/// Connections being set up.
pub const PENDING_CONNECTIONS: u32 = 64;
/// How long libp2p keeps a connection without traffic: longer than this crate lets it be; ping finds the dead ones.
pub const IDLE_CONNECTION: Duration = Duration::from_secs(24 * 3600);
/// How often a connection is probed.
pub const PING_EVERY: Duration = Duration::from_secs(5);
/// How long a probe may take before the connection is closed.
pub const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// How often Kademlia looks for peers that it does not know.
pub const BOOTSTRAP_EVERY: Duration = Duration::from_secs(30);
/// How often a peer that is not connected is dialled again.
pub const REJOIN_EVERY: Duration = Duration::from_secs(1);
/// How long the outermost bound on any request to a peer is; the search's own deadlines are shorter.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Requests of one protocol that one connection may have open.
pub const INBOUND_STREAMS: usize = 128;
/// Records of Kademlia's store: coarse content alone, never one a page.
pub const KAD_RECORDS: usize = 1024;
/// Requests from other peers that are worked on at once, until their answers are on the wire.
pub const SERVING: usize = 64;
/// Bytes of their answers.
pub const SERVING_BYTES: usize = 36 << 20;
/// Of those requests, one peer's.
pub const SERVING_EACH: usize = 16;
/// Of those bytes, one peer's.
pub const SERVING_BYTES_EACH: usize = 9 << 20;
/// Requests from other peers that wait.
pub const WAITING: usize = 1024;
/// Bytes that their answers will have (they themselves have a four-hundredth, or a quarter in lookups and announcements).
pub const WAITING_BYTES: usize = 256 << 20;
/// Of those requests, one peer's.
pub const WAITING_EACH: usize = 128;
/// Of those bytes, one peer's.
pub const WAITING_BYTES_EACH: usize = 64 << 20;
/// Requests that a peer with the fault `flood` has in flight to each other one.
pub const FLOOD_IN_FLIGHT: usize = 256;
const _: () = {
    // What one host's searches may ask of one holder at once is served or waits: a peer that behaves is not refused.
    assert!(FETCHES_PER_HOLDER <= FETCHES_EACH && PAGE_CONNECTIONS_EACH <= SERVING_EACH);
    assert!(WAITING_EACH <= INBOUND_STREAMS && PAGE_CONNECTIONS_EACH * 8 <= PAGE_CONNECTIONS);
    assert!(PAGE_CONNECTIONS_EACH * (FETCH_BATCH + 1) * PAGE_SIZE <= WAITING_BYTES_EACH);
    // Whoever keeps a connection finds it open.
    assert!(PAGE_CONNECTION_KEPT.as_secs() < PAGE_CONNECTION_IDLE.as_secs());
    assert!(PAGE_CONNECTION_LOOK.as_millis() < FETCH_TIMEOUT.as_millis());
    // No single peer takes all there is.
    assert!(SERVING_EACH * 4 <= SERVING && SERVING_BYTES_EACH * 4 <= SERVING_BYTES);
    assert!(WAITING_EACH * 4 <= WAITING && WAITING_BYTES_EACH * 4 <= WAITING_BYTES);
};

/// Searches of the site for this host's processes at once (128 MiB of pages in flight).
pub const SEARCHES: usize = 32;
/// Commands that wait for the network task.
pub const COMMANDS: usize = 256;
/// How often failed handshakes are logged at most; whoever may connect can cause them.
pub const HANDSHAKE_LOG_EVERY: Duration = Duration::from_secs(10);
/// How often it is logged that a peer to join by still does not answer.
pub const JOIN_LOG_EVERY: Duration = Duration::from_secs(300);
/// How often the same is logged again of a peer that is no member and comes back all the time.
pub const SAY_AGAIN: Duration = Duration::from_secs(600);
/// Of how many it is remembered that it was logged.
pub const SAID: usize = 256;
/// Characters of a dedup domain's fingerprint in the log.
pub const DOMAIN_SHORT: usize = 8;
/// For how long a peer that is gone is listed in a status.
pub const GONE_KEPT: Duration = Duration::from_secs(3600);
/// How many of them at most.
pub const GONE_PEERS: usize = 256;
/// How often leases and failed announcements are looked at; one shard is swept each time.
pub const UPKEEP_EVERY: Duration = Duration::from_secs(1);
/// Peers that a status lists one by one; with the rest of it that stays below a frame of the local socket.
pub const STATUS_PEERS: usize = 1024;
/// Addresses of its own that a peer tells.
pub const LISTEN_ADDRESSES: usize = 16;
/// Pages whose source is remembered, in case one is reported as wrong.
pub const RECENT_SOURCES: usize = 65_536;

/// Connections to the metrics address at once; further ones wait.
pub const METRICS_CONNECTIONS: usize = 16;
/// How long such a connection may last, its one request and answer included.
pub const METRICS_TIMEOUT: Duration = Duration::from_secs(10);

const _: () = {
    assert!(REFRESH_CLOSEST >= OWNERS && REFRESH_CLOSEST <= REFRESH_ABOVE);
    assert!(CONNECTIONS >= MESH, "a site that is not large yet has room for everyone");
    assert!(MEETING_TIMEOUT.as_millis() < LOOKUP_TIMEOUT.as_millis());
};
