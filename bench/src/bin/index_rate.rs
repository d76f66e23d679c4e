//! Measures an owner's table of the site's index: names announced and looked up a second on one core, and bytes of memory an entry.
//!
//! `cargo run --release -p bench --bin index-rate [-- --entries N]` prints one JSON object. Memory is what the process grew by, all overhead
//! included, next to what the table says of itself.

use std::time::{Duration, Instant};

use clap::Parser;
use dht::{
    lease::OwnerTable,
    limits::{INDEX_BATCH, LEASE},
    shard::MemberId,
};
use page::ShortId;

/// The rates of an owner's table.
#[derive(Parser)]
struct Options {
    /// Entries in the table.
    #[arg(long, default_value_t = 10_000_000)]
    entries: u64,
    /// Peers that announce them.
    #[arg(long, default_value_t = 40)]
    holders: u64,
    /// Seed of the names.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// The `n`th name: distinct for each n, and spread like a hash (the finaliser of splitmix64, Steele et al. 2014).
fn name(seed: u64, n: u64) -> ShortId {
    let mut x = n.wrapping_add(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ShortId(x ^ (x >> 31))
}

/// This process's resident memory, bytes.
fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("Linux has it");
    let pages = statm.split_whitespace().nth(1).and_then(|field| field.parse::<u64>().ok());
    pages.expect("the second field is a number") * rustix::param::page_size() as u64
}

/// This thread's time on a core, which other processes do not lengthen.
fn busy() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).expect("it counts from 0 up")
}

/// Runs `work` on batches of `names` for a second of a core's time; names a second.
fn rate(names: impl Fn(u64) -> ShortId, mut work: impl FnMut(&[ShortId])) -> f64 {
    let (mut done, mut worked) = (0u64, Duration::ZERO);
    while worked < Duration::from_secs(1) {
        let batch: Vec<ShortId> = (done..done + INDEX_BATCH as u64).map(&names).collect();
        let start = busy();
        work(&batch);
        worked += busy().saturating_sub(start);
        done += batch.len() as u64;
    }
    done as f64 / worked.as_secs_f64()
}

fn main() {
    let Options { entries, holders, seed } = Options::parse();
    let before = resident();
    let now = Instant::now();
    let mut table = OwnerTable::new(LEASE);
    let member = |n: u64| MemberId::of_peer(&n.to_be_bytes());
    let (mut filled, mut filling) = (0, Duration::ZERO);
    while filled < entries {
        let count = (entries - filled).min(INDEX_BATCH as u64);
        let batch: Vec<ShortId> = (0..count).map(|n| name(seed, filled + n)).collect();
        let start = busy();
        table.announce(member(filled / INDEX_BATCH as u64 % holders), &batch, now);
        filling += busy().saturating_sub(start);
        filled += count;
    }
    let resident = resident() - before;
    let (held, not_held) = (|n| name(seed, n % entries), |n| name(seed, entries + n));
    let hits = rate(held, |batch| {
        std::hint::black_box(table.lookup(batch, now, |_| true));
    });
    let misses = rate(not_held, |batch| {
        std::hint::black_box(table.lookup(batch, now, |_| true));
    });
    let renewals = rate(held, |batch| table.announce(member(0), batch, now));
    let report = serde_json::json!({
        "entries": table.len(),
        "resident_bytes_per_entry": resident as f64 / entries as f64,
        "own_bytes_per_entry": table.bytes() as f64 / table.len() as f64,
        "announced_per_s_while_filling": entries as f64 / filling.as_secs_f64(),
        "announced_per_s_when_full": renewals,
        "found_per_s": hits,
        "missed_per_s": misses,
    });
    println!("{report:#}");
}
