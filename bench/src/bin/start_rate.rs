//! Measures how long a peer takes from its start until it serves its content, against reading and hashing the same bytes once on as many cores, in
//! one run.
//!
//! `cargo build --release -p dht && cargo run --release -p bench --bin start-rate [-- --gib N --dir DIR]` prints one JSON object. The content is one
//! file of distinct pages, made by the bench; DIR should be in memory (the default is /dev/shm), for else a disk is measured. Both sides run at the
//! lowest priority, as the peer's scans do, and in turn, so that a machine whose speed drifts cannot favour one. On a machine that does other
//! work too, the ratio of CPU time is what counts.

use std::error::Error;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bench::random_pages;
use bench::site::{Site, ready};
use clap::Parser;
use dht::SiteClient;
use page::{Domain, DomainKey, PAGE_SIZE, page_chunks};
use rustix::time::{ClockId, clock_gettime};

/// Start of a peer against reading and hashing its content.
#[derive(Parser)]
struct Options {
    /// Content of the peer, GiB.
    #[arg(long, default_value_t = 8)]
    gib: usize,
    /// How often each of the two is measured.
    #[arg(long, default_value_t = 2)]
    rounds: u32,
    /// Where the content is put.
    #[arg(long, default_value = "/dev/shm")]
    dir: PathBuf,
}

/// What is read at once, by both.
const CHUNK_BYTES: usize = 2 << 20;

/// What one side took.
#[derive(Clone, Copy, Default)]
struct Took {
    elapsed: Duration,
    cpu: Duration,
}

impl Took {
    fn add(&mut self, other: Self) {
        self.elapsed += other.elapsed;
        self.cpu += other.cpu;
    }
}

/// A file of pages that are all different: random ones, with their numbers in front.
fn make(path: &Path, bytes: usize) -> Result<(), Box<dyn Error>> {
    let mut file = File::create(path)?;
    let mut pages = random_pages(CHUNK_BYTES / PAGE_SIZE, 1);
    let mut number = 0u64;
    for _ in 0..bytes / CHUNK_BYTES {
        for page in &mut pages {
            page[..8].copy_from_slice(&number.to_le_bytes());
            number += 1;
        }
        file.write_all(pages.as_flattened())?;
    }
    Ok(())
}

/// Reads and names every page once, on all cores.
fn hash(path: &Path) -> Result<Took, Box<dyn Error>> {
    let start = Instant::now();
    let threads = std::thread::available_parallelism()?.get();
    let (file, next) = (File::open(path)?, AtomicU64::new(0));
    let domain = Domain::from_key(&DomainKey([7; 32]));
    let work = || -> Result<Duration, std::io::Error> {
        rustix::process::setpriority_process(None, 19)?;
        let mut buffer = vec![0; CHUNK_BYTES];
        loop {
            let read = file.read_at(&mut buffer, next.fetch_add(CHUNK_BYTES as u64, Ordering::Relaxed))?;
            if read == 0 {
                return Ok(Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default());
            }
            for page in page_chunks(&buffer[..read]) {
                std::hint::black_box(domain.name(page));
            }
        }
    };
    let cpu: Result<Vec<Duration>, _> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().map(|worker| worker.join().expect("hashing does not panic")).collect()
    });
    Ok(Took { cpu: cpu?.into_iter().sum(), elapsed: start.elapsed() })
}

/// Starts a peer, has it serve the file, and waits until it does.
async fn start(site: &Site, file: &Path) -> Result<Took, Box<dyn Error>> {
    let start = Instant::now();
    let peer = site.serve("peer", None)?;
    let client = SiteClient::connect(&peer.socket).await?;
    client.add_file(file).await?;
    ready(&client, 0).await?;
    Ok(Took { elapsed: start.elapsed(), cpu: Duration::from_secs_f64(peer.cpu_s()?) })
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let options = Options::parse();
    let place = tempfile::tempdir_in(&options.dir)?;
    let dir = place.path();
    let site = Site::new(dir)?;
    let (file, bytes) = (dir.join("content"), options.gib << 30);
    make(&file, bytes)?;

    let (mut peer, mut plain) = (Took::default(), Took::default());
    for _ in 0..options.rounds {
        plain.add(tokio::task::block_in_place(|| hash(&file))?);
        peer.add(start(&site, &file).await?);
    }
    let seconds = |time: Duration| time.as_secs_f64() / f64::from(options.rounds);
    let report = serde_json::json!({
        "bytes": bytes,
        "ready_s": seconds(peer.elapsed),
        "hashed_s": seconds(plain.elapsed),
        "ratio": peer.elapsed.as_secs_f64() / plain.elapsed.as_secs_f64(),
        "ready_cpu_s": seconds(peer.cpu),
        "hashed_cpu_s": seconds(plain.cpu),
        "cpu_ratio": peer.cpu.as_secs_f64() / plain.cpu.as_secs_f64(),
    });
    println!("{report:#}");
    Ok(())
}
