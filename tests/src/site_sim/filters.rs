//! What holder filters would cost in the same sites: the other way to keep names that nobody holds from costing a message.
//!
//! A filter of a host's names tells for each name whether the host may hold it. An xor filter with 8-bit fingerprints takes 9.84 bits a name and errs once
//! in 256 times (Graf and Lemire 2020); a Bloom filter that errs as rarely takes 11.5. Two ways to use them:
//! - *instead of the index*: every host keeps a filter of every other host, and asks those whose filters say yes;
//! - *besides the index*: every host keeps filters of all shards, and asks owners only for names that they say are there.
//!
//! Filters do not change in place: they go out anew as often as leases are renewed, which keeps them as fresh as the index.

use std::fmt::Write as _;

use dht::limits::RENEW_AFTER;

use super::{
    Figures, Scenario,
    content::{HOST_NAMES, VM_PAGES, makeup},
};

/// Bytes a name of an xor filter with 8-bit fingerprints.
const FILTER_BYTES: f64 = 9.84 / 8.0;
/// How rarely it says yes for a name that it was not made of.
const FALSE_POSITIVES: f64 = 1.0 / 256.0;

/// The costs of the ways in a site of one size.
struct Costs {
    /// Filters of all other hosts: bytes a host keeps.
    filters_bytes: f64,
    /// Bytes a host takes in a second to keep them fresh.
    filters_bytes_per_s: f64,
    /// Hosts that a name which nobody holds is asked of all the same.
    false_holders: f64,
    /// Filters of all shards: bytes a host keeps and takes in.
    shard_filters_bytes: f64,
    shard_filters_bytes_per_s: f64,
    /// What they save of a VM's lookup.
    saved_bytes: f64,
}

impl Costs {
    fn of(figures: &Figures) -> Self {
        let others = figures.peers as f64 - 1.0;
        let sampled = figures.sampled_bits.exp2();
        let renew_s = RENEW_AFTER.as_secs_f64();
        let filters_bytes = others * HOST_NAMES as f64 * FILTER_BYTES;
        let shard_filters_bytes = filters_bytes / sampled;
        let missed = VM_PAGES as f64 - makeup(0)[..2].iter().map(|(_, count)| *count as f64).sum::<f64>();
        Self {
            filters_bytes,
            filters_bytes_per_s: filters_bytes / renew_s,
            false_holders: others * FALSE_POSITIVES,
            shard_filters_bytes,
            shard_filters_bytes_per_s: shard_filters_bytes / renew_s,
            saved_bytes: missed / sampled * 8.0 * (1.0 - FALSE_POSITIVES),
        }
    }
}

/// The ways side by side, a row a size.
#[must_use]
pub fn table(all: &[Figures]) -> String {
    let mut text = "| peers | index: bytes a host | index: B/s a host | filters of hosts: bytes a host | B/s a host | false holders of a name | \
                    filters of shards: bytes a host | B/s a host | saved a lookup | lookups/s a host to break even |\n\
                    | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |\n"
        .to_owned();
    for figures in all.iter().filter(|figures| figures.scenario == Scenario::Steady) {
        let costs = Costs::of(figures);
        let bytes = super::table::bytes;
        writeln!(
            text,
            "| {} | {} | {} | {} | {} | {:.2} | {} | {} | {} | {:.1} |",
            figures.peers,
            bytes(figures.index_bytes_per_host),
            bytes(figures.announce_bytes_per_s),
            bytes(costs.filters_bytes),
            bytes(costs.filters_bytes_per_s),
            costs.false_holders,
            bytes(costs.shard_filters_bytes),
            bytes(costs.shard_filters_bytes_per_s),
            bytes(costs.saved_bytes),
            costs.shard_filters_bytes_per_s / costs.saved_bytes,
        )
        .expect("a String takes all");
    }
    text
}
