//! What is counted in a run, and what comes of it.

use serde::Serialize;

use super::scenario::Scenario;

/// Bytes of an entry at an owner, all overhead included, as `index-rate` measures at ten million entries.
pub(super) const ENTRY_BYTES: f64 = 13.8;

/// One lookup of a VM.
#[derive(Clone, Default, Debug)]
pub(super) struct Looked {
    pub(super) started_us: u64,
    /// Pages that some reachable honest peer holds.
    pub(super) held: u64,
    pub(super) found: u64,
    pub(super) requests: u64,
    pub(super) owners: std::collections::BTreeSet<dht::shard::MemberId>,
    pub(super) index_bytes: u64,
    pub(super) index_us: u64,
    pub(super) answer_us: u64,
    pub(super) fetches: u64,
    pub(super) fetch_bytes: u64,
    pub(super) connections: u64,
    pub(super) timeouts: u64,
    pub(super) wrong_pages: u64,
    pub(super) ended: bool,
}

/// Sums over the measured time.
#[derive(Clone, Default, Debug)]
pub(super) struct Sums {
    /// Announcements of simulated hosts: messages, bytes.
    pub(super) announce_messages: u64,
    pub(super) announce_bytes: u64,
    /// Bytes of entries that an owner did not have.
    pub(super) rehomed_bytes: u64,
    /// Kademlia queries for owners.
    pub(super) kademlia_messages: u64,
    pub(super) kademlia_bytes: u64,
    /// Minds that asked them, times the seconds.
    pub(super) mind_seconds: u64,
    /// Announcing hosts times seconds.
    pub(super) announcer_seconds: u64,
}

/// What a scenario came to in a site of one size. Means over lookups, hosts or seconds, unless it says otherwise.
#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// Peers of the site.
    pub peers: usize,
    /// What happened to it.
    pub scenario: Scenario,
    /// Bits of a name that must be zero for an owner to keep it, over all owners' shards.
    pub sampled_bits: f64,
    /// The same of the shard that is sampled most.
    pub most_sampled_bits: f64,
    /// Lookups made.
    pub lookups: usize,
    /// Pages found of those that a reachable honest peer held, percent.
    pub hit_percent: f64,
    /// The same in the worst lookup.
    pub worst_hit_percent: f64,
    /// Lookup requests a VM.
    pub requests: f64,
    /// Owners asked a VM.
    pub owners_asked: f64,
    /// Bytes of lookups and their answers a VM.
    pub index_bytes: f64,
    /// Until the last owner had answered or was given up, milliseconds.
    pub index_ms: f64,
    /// Until the last page had come, milliseconds.
    pub answer_ms: f64,
    /// Requests for pages a VM.
    pub fetches: f64,
    /// Connections made for a lookup and its fetches.
    pub connections: f64,
    /// Requests that were not answered in time, a VM.
    pub timeouts: f64,
    /// Pages with wrong bytes that came and were dropped, a VM.
    pub wrong_pages: f64,
    /// Wrong pages that were accepted, in all.
    pub wrong_accepted: u64,
    /// Lookups that did not end.
    pub unended: usize,
    /// Peers that own shards.
    pub owners: usize,
    /// Index bytes a host, over all hosts.
    pub index_bytes_per_host: f64,
    /// Index bytes of the host that has most.
    pub index_bytes_worst_host: f64,
    /// Entries of the host that has most.
    pub entries_worst_host: f64,
    /// Announcement bytes a host and second.
    pub announce_bytes_per_s: f64,
    /// Announcement messages a host and second.
    pub announce_messages_per_s: f64,
    /// Announcement messages that an owner hears a second.
    pub heard_per_s: f64,
    /// Bytes of entries new to their owner, a host and minute.
    pub rehomed_bytes_per_min: f64,
    /// Messages of Kademlia queries for owners, a host and second.
    pub kademlia_messages_per_s: f64,
    /// Their bytes.
    pub kademlia_bytes_per_s: f64,
}

/// A mean that is 0 of nothing.
pub(super) fn mean(sum: f64, count: f64) -> f64 {
    if count > 0.0 { sum / count } else { 0.0 }
}
