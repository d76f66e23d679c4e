//! Measures naming pages against crate sha2's own throughput on 4 KiB inputs, in one run, on one core and on all.
//!
//! `cargo run --release -p bench --bin hash-rate [-- --seconds S]` prints one JSON object: bytes a second of each, and the ratio
//! per core. The two are measured in turn, slice by slice, so that a machine whose speed drifts cannot favour one.

use std::time::{Duration, Instant};

use bench::random_pages;
use clap::Parser;
use page::{Domain, PAGE_SIZE, Page};
use sha2::{Digest, Sha256};

/// Names of pages against plain SHA-256 of pages.
#[derive(Parser)]
struct Options {
    /// How long each of the two is measured on each core.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
}

/// Enough pages to leave the second-level cache, as guest memory does.
const PAGES: usize = 4096;
const SLICES: u32 = 20;

/// Bytes a second of hashing `pages` with each of the two.
fn measure(pages: &[Page], seconds: f64) -> (f64, f64) {
    let domain = Domain::unkeyed();
    let slice = Duration::from_secs_f64(seconds / f64::from(SLICES));
    let rate = |hash: &dyn Fn(&Page)| {
        let (start, mut bytes) = (Instant::now(), 0.0);
        while start.elapsed() < slice {
            for page in pages.iter().take(256) {
                hash(page);
            }
            bytes += 256.0 * PAGE_SIZE as f64;
        }
        bytes / start.elapsed().as_secs_f64()
    };
    let (mut names, mut plain) = (0.0, 0.0);
    for _ in 0..SLICES {
        names += rate(&|page| {
            std::hint::black_box(domain.name(page));
        });
        plain += rate(&|page| {
            std::hint::black_box(Sha256::digest(page));
        });
    }
    (names / f64::from(SLICES), plain / f64::from(SLICES))
}

fn main() {
    let options = Options::parse();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let pages = random_pages(PAGES, 1);
    let (name_one, sha2_one) = measure(&pages, options.seconds);
    let all: Vec<(f64, f64)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(|| measure(&pages, options.seconds))).collect();
        threads.into_iter().filter_map(|thread| thread.join().ok()).collect()
    });
    let (name_all, sha2_all) = all.iter().fold((0.0, 0.0), |sum, rates| (sum.0 + rates.0, sum.1 + rates.1));
    let report = serde_json::json!({
        "cores": cores,
        "one_core": { "name_bytes_per_s": name_one, "sha2_bytes_per_s": sha2_one, "ratio": name_one / sha2_one },
        "all_cores": { "name_bytes_per_s": name_all, "sha2_bytes_per_s": sha2_all, "ratio": name_all / sha2_all },
    });
    println!("{report:#}");
}
