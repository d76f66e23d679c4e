//! What a peer says about itself: `dht status`.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A peer's state at one moment.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct SiteStatus {
    /// The peer's libp2p identity.
    pub peer_id: String,
    /// Where it listens, in the form that `--join` takes.
    pub listen: Vec<String>,
    /// The public fingerprint of the dedup domain, in hex.
    pub domain: String,
    /// Whether all content of this peer is indexed and every owner of its names, as far as this peer knows the
    /// site now, has acknowledged it.
    pub ready: bool,
    /// What is still to be done before it is.
    pub waiting: Waiting,
    /// How many other peers the site has.
    pub members: Members,
    /// Other peers of the site, those in trouble first; of a very large site the first [`STATUS_PEERS`](crate::limits::STATUS_PEERS).
    pub peers: Vec<PeerStatus>,
    /// Addresses of `--join` that do not answer, or not as a peer of this site.
    #[serde(default)]
    pub joins_silent: Vec<JoinStatus>,
    /// Peers that were members within the last hour and are gone, the latest first; at most [`GONE_PEERS`](crate::limits::GONE_PEERS).
    #[serde(default)]
    pub gone: Vec<GonePeer>,
    /// Memories and files that this peer serves.
    pub contents: Vec<ContentStatus>,
    /// The index.
    pub index: IndexStatus,
    /// What has happened since the start.
    pub counters: Counters,
}

/// Why a peer is not ready; all zero if it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Waiting {
    /// Memories and files whose first scan is under way.
    pub scans: u64,
    /// Owners that have not acknowledged all of this host's names in their shards.
    pub owners: u64,
    /// Those names, counted once for each such owner.
    pub names: u64,
    /// Shards that have moved to an owner that is still being told all of this host's names in them.
    pub shards_rehoming: u64,
}

/// The other peers of the site, in numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Members {
    /// Those that this peer knows.
    pub known: u64,
    /// Of those, connected now. In a large site most are not: a request connects.
    pub connected: u64,
    /// Of those known, skipped because they did not answer.
    pub skipped: u64,
    /// Of those known, avoided because they served wrong pages.
    pub avoided: u64,
    /// Of those known, asked for pages after all others: they deliver few of those that they announced.
    pub doubted: u64,
    /// Of those known, not asked for pages for a while: they delivered next to none of those that they announced.
    pub left_out: u64,
    /// The size of the site, this peer included: those known, or in a large site an estimate.
    pub site_size: u64,
}

/// Another peer, as seen from this one.
#[expect(clippy::struct_excessive_bools, reason = "a report, in which each says one thing by itself")]
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct PeerStatus {
    /// Its libp2p identity.
    pub peer_id: String,
    /// Where it listens: what it says itself, or where it was dialled and answered; empty if neither is known.
    pub address: String,
    /// Whether there is a connection to it now.
    pub connected: bool,
    /// Whether it takes part in the index now (known, and not skipped after a timeout).
    pub answering: bool,
    /// For how many more milliseconds it is not asked as an owner, since it did not answer as one.
    pub skipped_as_owner_ms: u64,
    /// For how many more milliseconds it is not asked for pages, since it did not answer such a request.
    pub skipped_as_holder_ms: u64,
    /// Whether it is avoided as a holder because it served wrong bytes.
    pub avoided: bool,
    /// For how many more milliseconds.
    pub avoided_ms: u64,
    /// Whether it is asked for pages after all others because it delivers few of those that it announced.
    pub doubted: bool,
    /// How much longer it is not asked for pages because it delivered next to none of those that it announced, in milliseconds.
    pub left_out_ms: u64,
    /// Wrong pages that came from it.
    pub wrong_pages: u64,
}

/// An address to join by that does not answer.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct JoinStatus {
    /// The address, as `--join` takes it.
    pub address: String,
    /// For how many seconds it has not answered.
    pub silent_s: u64,
    /// What became of the last attempt.
    pub error: String,
}

/// A peer that was a member and is gone.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GonePeer {
    /// Its libp2p identity.
    pub peer_id: String,
    /// Where it listened; empty if that was not known.
    pub address: String,
    /// For how many seconds it has been gone.
    pub gone_s: u64,
    /// How.
    pub how: How,
}

/// How a peer went.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// Its connection was closed at its end: it was stopped, or killed.
    Left,
    /// It did not answer in time: it is frozen, or the network is cut.
    TimedOut,
    /// Its connection was reset.
    Reset,
    /// It did not answer when it was dialled, after this end had let its connection go.
    Unreachable,
}

impl fmt::Display for How {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Left => "it closed the connection",
            Self::TimedOut => "it did not answer in time",
            Self::Reset => "the connection was reset",
            Self::Unreachable => "it could not be reached",
        })
    }
}

/// A registered memory, an added file, or a retained checkpoint.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct ContentStatus {
    /// The memory's name, also of one that was retained, or the file's path.
    pub name: String,
    /// `memory`, `file` or `checkpoint`.
    pub kind: String,
    /// Its pages, zero pages included.
    pub pages: u64,
    /// Pages that are in the index (zero pages and repetitions are not).
    pub indexed_pages: u64,
    /// Whether it has been read through once.
    pub scanned: bool,
    /// Whether every owner of its names has acknowledged them.
    pub announced: bool,
    /// Of a checkpoint, when pages of it were last served, or it was made: seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_use: Option<u64>,
}

/// The index, as this peer holds it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct IndexStatus {
    /// Distinct names that this host can serve.
    pub host_names: u64,
    /// Shards that this peer owns now.
    pub shards_owned: u64,
    /// Entries that it keeps for the shards it owns.
    pub owner_entries: u64,
    /// Bytes that those entries take.
    pub owner_bytes: u64,
}

/// Counts since the start of the peer.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Counters {
    /// Questions of local processes. Each costs a lookup at each owner of what it asks for, whatever its size.
    pub resolves: u64,
    /// Names that local processes asked for.
    pub resolve_ids: u64,
    /// Of those, found on this host.
    pub host_hits: u64,
    /// Of those, fetched from other hosts.
    pub site_hits: u64,
    /// Of those, neither; a search that was cancelled leaves its rest uncounted.
    pub missing: u64,
    /// Lookup requests sent to owners.
    pub lookups_sent: u64,
    /// Names in them.
    pub lookup_ids_sent: u64,
    /// Of those, named with a holder in the answer.
    pub lookup_ids_found: u64,
    /// Lookup requests answered as an owner.
    pub lookups_answered: u64,
    /// Names in them.
    pub lookup_ids_answered: u64,
    /// Of those, answered with a holder.
    pub lookup_ids_answered_found: u64,
    /// Names announced to owners, and acknowledged.
    pub announced_ids: u64,
    /// Bytes of announcements on the LAN, the least that carries them included: new names, lost ones, and renewals of leases.
    #[serde(default)]
    pub announced_bytes: u64,
    /// Leases of this host's names in a shard that an owner has renewed, the first of each included.
    #[serde(default)]
    pub leases_renewed: u64,
    /// Shards that an owner asked to be told anew: it had lost something, or has room now for what found none.
    #[serde(default)]
    pub leases_unlike: u64,
    /// Names that others announced to this peer as an owner.
    pub announced_ids_taken: u64,
    /// Entries that this peer had not been told as an owner, and learnt from another owner of the shard.
    pub entries_learnt: u64,
    /// Entries that it passed on to other owners that had not been told.
    pub entries_passed_on: u64,
    /// Page requests sent to holders.
    pub fetches_sent: u64,
    /// Bytes of pages fetched from other hosts and verified.
    pub bytes_fetched: u64,
    /// Bytes of pages served to other hosts.
    pub bytes_served: u64,
    /// Pages asked of this host that it no longer held.
    pub stale_misses: u64,
    /// Pages that did not hash to the name they were asked by.
    pub wrong_pages: u64,
    /// Requests to other peers that ended in a timeout or an error.
    pub failed_requests: u64,
    /// Requests of other peers that were refused because too many waited.
    pub refused_requests: u64,
    /// Requests of other peers that were refused because their own peer had too many waiting, and connections for pages because it had too many open.
    pub refused_over_share: u64,
    /// Requests of other peers that were cut off because they were malformed.
    pub malformed_requests: u64,
    /// Connections with somebody who has a different site key, or is not a peer of a site.
    pub refused_connections: u64,
    /// Connections that were reset, or took too long, before the other end was authenticated: it may be of the site, and frozen, killed or slow.
    #[serde(default)]
    pub broken_connections: u64,
    /// Connections that were refused because there were too many.
    pub connections_over_limit: u64,
}
