//! What the peer counts.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use page::PAGE_SIZE;

use crate::status::Counters as Shown;

/// Counts since the start; see [`Shown`] for what each means.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    resolves: AtomicU64,
    resolve_ids: AtomicU64,
    host_hits: AtomicU64,
    site_hits: AtomicU64,
    missing: AtomicU64,
    lookups_sent: AtomicU64,
    lookup_ids_sent: AtomicU64,
    lookup_ids_found: AtomicU64,
    lookups_answered: AtomicU64,
    lookup_ids_answered: AtomicU64,
    lookup_ids_answered_found: AtomicU64,
    announced_ids: AtomicU64,
    announced_bytes: AtomicU64,
    announced_ids_taken: AtomicU64,
    leases_renewed: AtomicU64,
    leases_unlike: AtomicU64,
    entries_learnt: AtomicU64,
    entries_passed_on: AtomicU64,
    fetches_sent: AtomicU64,
    bytes_fetched: AtomicU64,
    bytes_served: AtomicU64,
    wrong_pages: AtomicU64,
    failed_requests: AtomicU64,
    refused_requests: AtomicU64,
    refused_over_share: AtomicU64,
    malformed_requests: AtomicU64,
    refused_connections: AtomicU64,
    broken_connections: AtomicU64,
    connections_over_limit: AtomicU64,
}

fn add(counter: &AtomicU64, count: usize) {
    counter.fetch_add(count as u64, Relaxed);
}

impl Counters {
    pub(crate) fn asked(&self, ids: usize) {
        add(&self.resolves, 1);
        add(&self.resolve_ids, ids);
    }

    pub(crate) fn host_hits(&self, pages: usize) {
        add(&self.host_hits, pages);
    }

    pub(crate) fn site_hits(&self, pages: usize) {
        add(&self.site_hits, pages);
    }

    pub(crate) fn fetched(&self, pages: usize) {
        add(&self.bytes_fetched, pages * PAGE_SIZE);
    }

    pub(crate) fn missed(&self, ids: usize) {
        add(&self.missing, ids);
    }

    pub(crate) fn lookup_sent(&self, ids: usize) {
        add(&self.lookups_sent, 1);
        add(&self.lookup_ids_sent, ids);
    }

    pub(crate) fn lookup_found(&self, ids: usize) {
        add(&self.lookup_ids_found, ids);
    }

    pub(crate) fn lookup_answered(&self, ids: usize, found: usize) {
        add(&self.lookups_answered, 1);
        add(&self.lookup_ids_answered, ids);
        add(&self.lookup_ids_answered_found, found);
    }

    pub(crate) fn announcement_sent(&self, bytes: u64) {
        self.announced_bytes.fetch_add(bytes, Relaxed);
    }

    pub(crate) fn announced(&self, ids: usize, leases_renewed: usize, leases_unlike: usize) {
        add(&self.announced_ids, ids);
        add(&self.leases_renewed, leases_renewed);
        add(&self.leases_unlike, leases_unlike);
    }

    pub(crate) fn announcement_taken(&self, ids: usize) {
        add(&self.announced_ids_taken, ids);
    }

    pub(crate) fn learnt(&self, entries: usize) {
        add(&self.entries_learnt, entries);
    }

    pub(crate) fn passed_on(&self, entries: usize) {
        add(&self.entries_passed_on, entries);
    }

    pub(crate) fn fetch_sent(&self) {
        add(&self.fetches_sent, 1);
    }

    pub(crate) fn served(&self, pages: usize) {
        add(&self.bytes_served, pages * PAGE_SIZE);
    }

    pub(crate) fn wrong_pages(&self, pages: usize) {
        add(&self.wrong_pages, pages);
    }

    pub(crate) fn failed_request(&self) {
        add(&self.failed_requests, 1);
    }

    pub(crate) fn refused_request(&self) {
        add(&self.refused_requests, 1);
    }

    pub(crate) fn refused_share(&self) {
        add(&self.refused_over_share, 1);
    }

    pub(crate) fn malformed_request(&self) {
        add(&self.malformed_requests, 1);
    }

    pub(crate) fn refused_connection(&self) {
        add(&self.refused_connections, 1);
    }

    pub(crate) fn broken_connection(&self) {
        add(&self.broken_connections, 1);
    }

    pub(crate) fn connection_over_limit(&self) {
        add(&self.connections_over_limit, 1);
    }

    /// All counts; `stale_misses` is counted with the contents.
    pub(crate) fn show(&self, stale_misses: u64) -> Shown {
        Shown {
            resolves: self.resolves.load(Relaxed),
            resolve_ids: self.resolve_ids.load(Relaxed),
            host_hits: self.host_hits.load(Relaxed),
            site_hits: self.site_hits.load(Relaxed),
            missing: self.missing.load(Relaxed),
            lookups_sent: self.lookups_sent.load(Relaxed),
            lookup_ids_sent: self.lookup_ids_sent.load(Relaxed),
            lookup_ids_found: self.lookup_ids_found.load(Relaxed),
            lookups_answered: self.lookups_answered.load(Relaxed),
            lookup_ids_answered: self.lookup_ids_answered.load(Relaxed),
            lookup_ids_answered_found: self.lookup_ids_answered_found.load(Relaxed),
            announced_ids: self.announced_ids.load(Relaxed),
            announced_bytes: self.announced_bytes.load(Relaxed),
            leases_renewed: self.leases_renewed.load(Relaxed),
            leases_unlike: self.leases_unlike.load(Relaxed),
            announced_ids_taken: self.announced_ids_taken.load(Relaxed),
            entries_learnt: self.entries_learnt.load(Relaxed),
            entries_passed_on: self.entries_passed_on.load(Relaxed),
            fetches_sent: self.fetches_sent.load(Relaxed),
            bytes_fetched: self.bytes_fetched.load(Relaxed),
            bytes_served: self.bytes_served.load(Relaxed),
            stale_misses,
            wrong_pages: self.wrong_pages.load(Relaxed),
            failed_requests: self.failed_requests.load(Relaxed),
            refused_requests: self.refused_requests.load(Relaxed),
            refused_over_share: self.refused_over_share.load(Relaxed),
            malformed_requests: self.malformed_requests.load(Relaxed),
            refused_connections: self.refused_connections.load(Relaxed),
            broken_connections: self.broken_connections.load(Relaxed),
            connections_over_limit: self.connections_over_limit.load(Relaxed),
        }
    }
}
