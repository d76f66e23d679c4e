//! A peer's status as Prometheus' text format, version 0.0.4 (prometheus.io, "Exposition formats").
//!
//! Everything comes from [`SiteStatus`], so that what is graphed and what `dht status` shows are the same numbers. The structures are
//! taken apart without `..`: who adds a count is told here that it has no metric yet.

use std::fmt::Write;

use crate::status::{ContentStatus, Counters, IndexStatus, Members, SiteStatus, Waiting};

/// The format's media type.
pub(crate) const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// All metrics of a peer.
#[must_use]
pub fn text(status: &SiteStatus) -> String {
    let SiteStatus {
        peer_id,
        listen: _,
        domain,
        ready,
        waiting,
        members,
        peers: _,
        joins_silent,
        gone,
        contents,
        index,
        counters,
    } = status;
    let mut page = Page(String::with_capacity(8192));
    page.family("tern_dht_info", "gauge", "The peer, its dedup domain and its build.");
    let version = env!("CARGO_PKG_VERSION");
    page.sample("tern_dht_info", &[("peer_id", peer_id), ("domain", domain), ("version", version)], 1);
    let what = "1 if all content is indexed and every owner has acknowledged its names.";
    page.gauge("tern_dht_ready", what, u64::from(*ready));
    page.waiting(waiting);
    page.members(members);
    let what = "Peers that were members within the last hour and are gone.";
    page.gauge("tern_dht_peers_gone", what, gone.len() as u64);
    let what = "Addresses to join by that do not answer.";
    page.gauge("tern_dht_joins_silent", what, joins_silent.len() as u64);
    page.contents(contents);
    page.index(index);
    page.names(counters);
    page.traffic(counters);
    page.trouble(counters);
    page.0
}

/// Text that grows by lines.
struct Page(String);

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP {name} {help}\n# TYPE {name} {kind}\n"));
    }

    fn gauge(&mut self, name: &str, help: &str, value: u64) {
        self.family(name, "gauge", help);
        self.sample(name, &[], value);
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.family(name, "counter", help);
        self.sample(name, &[], value);
    }

    /// One counter with a value for each value of a label.
    fn counters(&mut self, name: &str, help: &str, label: &str, values: &[(&str, u64)]) {
        self.family(name, "counter", help);
        for (text, value) in values {
            self.sample(name, &[(label, text)], *value);
        }
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: u64) {
        self.0.push_str(name);
        for (n, (label, text)) in labels.iter().enumerate() {
            self.line(format_args!("{}{label}=\"{}\"", if n == 0 { '{' } else { ',' }, escaped(text)));
        }
        if !labels.is_empty() {
            self.0.push('}');
        }
        self.line(format_args!(" {value}\n"));
    }

    fn line(&mut self, text: std::fmt::Arguments<'_>) {
        self.0.write_fmt(text).expect("writing to a String cannot fail");
    }

    fn waiting(&mut self, waiting: &Waiting) {
        let Waiting { scans, owners, names, shards_rehoming } = *waiting;
        self.gauge("tern_dht_scans_pending", "Contents whose first scan is under way.", scans);
        self.gauge(
            "tern_dht_owners_behind",
            "Owners that have not acknowledged all names of theirs.",
            owners,
        );
        let what = "Names that owners have not acknowledged, counted once an owner.";
        self.gauge("tern_dht_announcements_pending", what, names);
        let what = "Shards whose new owner is still being told this host's names.";
        self.gauge("tern_dht_shards_rehoming", what, shards_rehoming);
    }

    fn members(&mut self, members: &Members) {
        let Members { known, connected, skipped, avoided, doubted, left_out, site_size } = *members;
        self.gauge("tern_dht_peers", "Other peers of the site that this one knows.", known);
        self.gauge("tern_dht_peers_connected", "Of those, connected.", connected);
        self.gauge("tern_dht_peers_skipped", "Of those known, skipped since they did not answer.", skipped);
        self.gauge(
            "tern_dht_peers_avoided",
            "Of those known, avoided since they served wrong pages.",
            avoided,
        );
        let what = "Of those known, asked last for pages: they deliver few of those that they announced.";
        self.gauge("tern_dht_peers_doubted", what, doubted);
        let what =
            "Of those known, not asked for pages: they delivered next to none of those that they announced.";
        self.gauge("tern_dht_peers_left_out", what, left_out);
        let what = "Peers of the site, this one included; an estimate in a large site.";
        self.gauge("tern_dht_site_peers", what, site_size);
    }

    fn contents(&mut self, contents: &[ContentStatus]) {
        let mut family = |name: &str, help: &str, value: fn(&ContentStatus) -> u64| {
            self.family(name, "gauge", help);
            for kind in ["memory", "file", "checkpoint"] {
                let sum = contents.iter().filter(|content| content.kind == kind).map(value).sum();
                self.sample(name, &[("kind", kind)], sum);
            }
        };
        family("tern_dht_contents", "Memories, files and checkpoints that this peer serves.", |_| 1);
        family("tern_dht_content_pages", "Their pages, zero pages included.", |content| content.pages);
        family("tern_dht_content_indexed_pages", "Their pages in the index.", |content| {
            content.indexed_pages
        });
    }

    fn index(&mut self, index: &IndexStatus) {
        let IndexStatus { host_names, shards_owned, owner_entries, owner_bytes } = *index;
        self.gauge("tern_dht_host_names", "Distinct names that this host can serve.", host_names);
        self.gauge("tern_dht_owned_shards", "Shards that this peer owns.", shards_owned);
        self.gauge("tern_dht_owned_entries", "Entries kept for those shards.", owner_entries);
        self.gauge("tern_dht_owned_entries_bytes", "Memory that those entries take.", owner_bytes);
    }

    fn names(&mut self, counters: &Counters) {
        let what = "Questions of this host's processes.";
        self.counter("tern_dht_questions_total", what, counters.resolves);
        let what = "Names in them.";
        self.counter("tern_dht_names_asked_total", what, counters.resolve_ids);
        let found = [("host", counters.host_hits), ("site", counters.site_hits)];
        self.counters("tern_dht_names_found_total", "Of those, found, by rung.", "rung", &found);
        self.counter("tern_dht_names_missing_total", "Of those, found nowhere.", counters.missing);
        let side = |sent, answered| [("asker", sent), ("owner", answered)];
        self.counters(
            "tern_dht_lookups_total",
            "Lookup requests: sent as an asker, answered as an owner.",
            "role",
            &side(counters.lookups_sent, counters.lookups_answered),
        );
        self.counters(
            "tern_dht_lookup_names_total",
            "Names in those requests.",
            "role",
            &side(counters.lookup_ids_sent, counters.lookup_ids_answered),
        );
        self.counters(
            "tern_dht_lookup_names_found_total",
            "Of those, answered with a holder.",
            "role",
            &side(counters.lookup_ids_found, counters.lookup_ids_answered_found),
        );
        self.counters(
            "tern_dht_announced_names_total",
            "Names announced: acknowledged by an owner, taken as an owner.",
            "role",
            &[("holder", counters.announced_ids), ("owner", counters.announced_ids_taken)],
        );
        let what = "Leases of this host's names in a shard that owners renewed, or refused until they are told all of them anew.";
        let answers = [("renewed", counters.leases_renewed), ("told_anew", counters.leases_unlike)];
        self.counters("tern_dht_lease_renewals_total", what, "answer", &answers);
        self.counters(
            "tern_dht_repaired_entries_total",
            "Entries that one owner of a shard had not been told: learnt from the other, passed on to it.",
            "direction",
            &[("learnt", counters.entries_learnt), ("passed_on", counters.entries_passed_on)],
        );
    }

    fn traffic(&mut self, counters: &Counters) {
        let what = "Page requests sent to holders.";
        self.counter("tern_dht_fetches_total", what, counters.fetches_sent);
        let what = "Bytes of announcements sent: new names, lost ones, and renewals of leases.";
        self.counter("tern_dht_announced_bytes_total", what, counters.announced_bytes);
        let what = "Bytes of pages fetched from other hosts and verified.";
        self.counter("tern_dht_fetched_bytes_total", what, counters.bytes_fetched);
        let what = "Bytes of pages served to other hosts.";
        self.counter("tern_dht_served_bytes_total", what, counters.bytes_served);
    }

    fn trouble(&mut self, counters: &Counters) {
        // What the other sections show is named here too, so that nothing new is left out.
        let Counters {
            resolves: _,
            resolve_ids: _,
            host_hits: _,
            site_hits: _,
            missing: _,
            lookups_sent: _,
            lookup_ids_sent: _,
            lookup_ids_found: _,
            lookups_answered: _,
            lookup_ids_answered: _,
            lookup_ids_answered_found: _,
            announced_ids: _,
            announced_bytes: _,
            leases_renewed: _,
            leases_unlike: _,
            announced_ids_taken: _,
            entries_learnt: _,
            entries_passed_on: _,
            fetches_sent: _,
            bytes_fetched: _,
            bytes_served: _,
            stale_misses,
            wrong_pages,
            failed_requests,
            refused_requests,
            refused_over_share,
            malformed_requests,
            refused_connections,
            broken_connections,
            connections_over_limit,
        } = *counters;
        let what = "Pages asked of this host that it no longer held.";
        self.counter("tern_dht_stale_pages_total", what, stale_misses);
        let what = "Pages that did not hash to the name they were asked by.";
        self.counter("tern_dht_wrong_pages_total", what, wrong_pages);
        let what = "Requests to other peers that ended in a timeout or an error.";
        self.counter("tern_dht_failed_requests_total", what, failed_requests);
        self.counters(
            "tern_dht_refused_requests_total",
            "Requests of other peers that were not answered.",
            "reason",
            &[("busy", refused_requests), ("share", refused_over_share), ("malformed", malformed_requests)],
        );
        self.counters(
            "tern_dht_refused_connections_total",
            "Connections that were not made: with a stranger, broken in the handshake, or one too many.",
            "reason",
            &[
                ("unauthenticated", refused_connections),
                ("broken", broken_connections),
                ("limit", connections_over_limit),
            ],
        );
    }
}

/// A label's value: `\`, `"` and line ends are escaped.
fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}
