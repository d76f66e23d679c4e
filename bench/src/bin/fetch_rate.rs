//! Measures fetching pages from one holder of the site against a plain TCP copy of the same bytes with SHA-256, on loopback, in one run.
//!
//! `cargo build --release -p dht && cargo run --release -p bench --bin fetch-rate [-- --mib N]` prints one JSON object. Two real `dht serve`
//! processes: one holds a file, and a client of the other asks for all of its pages, as a VM does. The copy is one sender and one receiver, which
//! hashes each page that has come. The two are measured in turn, so that a machine whose speed drifts cannot favour one. `ratio` is of all rounds together,
//! `best_ratio` of the best round of each, which a machine with other work disturbs least; the CPU time a GiB says where the work is.

use std::error::Error;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::Instant;

use bench::random_pages;
use bench::site::{Site, ready};
use clap::Parser;
use dht::SiteClient;
use page::{PAGE_SIZE, ShortId, page_chunks};
use sha2::{Digest as _, Sha256};

/// Page fetch against a plain copy.
#[derive(Parser)]
struct Options {
    /// Content of the holder, MiB.
    #[arg(long, default_value_t = 256)]
    mib: usize,
    /// How often each of the two is measured.
    #[arg(long, default_value_t = 3)]
    rounds: u32,
}

/// What the plain copy hands to the kernel at once.
const COPY_BYTES: usize = 256 << 10;

/// CPU time of this process so far.
fn own_cpu_s() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Seconds for all of `ids` to come.
async fn fetch(client: &SiteClient, ids: &[ShortId]) -> Result<f64, Box<dyn Error>> {
    let start = Instant::now();
    let mut found = client.resolve(ids.to_vec());
    let mut pages = 0;
    while found.recv().await.is_some() {
        pages += 1;
    }
    let seconds = start.elapsed().as_secs_f64();
    if pages != ids.len() {
        return Err(format!("{pages} of {} pages came", ids.len()).into());
    }
    Ok(seconds)
}

/// Seconds for the file to be copied over a connection and hashed by pages.
fn copy(path: &Path) -> Result<f64, Box<dyn Error>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let to = listener.local_addr()?;
    let start = Instant::now();
    let path = path.to_owned();
    let sender = std::thread::spawn(move || -> std::io::Result<()> {
        let (mut file, mut stream) = (File::open(path)?, TcpStream::connect(to)?);
        let mut buffer = vec![0; COPY_BYTES];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(()),
                length => stream.write_all(&buffer[..length])?,
            }
        }
    });
    let (mut stream, _) = listener.accept()?;
    let mut buffer = vec![0; COPY_BYTES];
    let mut held = 0;
    loop {
        let length = stream.read(&mut buffer[held..])?;
        held += length;
        let whole = held / PAGE_SIZE * PAGE_SIZE;
        for page in page_chunks(&buffer[..whole]) {
            std::hint::black_box(Sha256::digest(page));
        }
        buffer.copy_within(whole..held, 0);
        held -= whole;
        if length == 0 {
            break;
        }
    }
    sender.join().map_err(|_| "the sender panicked")??;
    Ok(start.elapsed().as_secs_f64())
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let options = Options::parse();
    let place = tempfile::tempdir()?;
    let dir = place.path();
    let site = Site::new(dir)?;
    let content = random_pages((options.mib << 20) / PAGE_SIZE, 1);
    let file = dir.join("content");
    fs::write(&file, content.as_flattened())?;

    let holder = site.serve("holder", None)?;
    let asker = site.serve("asker", Some(&holder))?;
    let (holds, asks) =
        (SiteClient::connect(&holder.socket).await?, SiteClient::connect(&asker.socket).await?);
    let start = Instant::now();
    holds.add_file(&file).await?;
    ready(&holds, 1).await?;
    let ready_s = start.elapsed().as_secs_f64();
    let ids: Vec<ShortId> = content.iter().map(|page| asks.domain().name(page).short()).collect();
    drop(content);

    let (mut fetch_s, mut copy_s, mut copy_cpu_s) = (Vec::new(), Vec::new(), 0.0);
    let cpu = || -> Result<[f64; 3], Box<dyn Error>> { Ok([holder.cpu_s()?, asker.cpu_s()?, own_cpu_s()]) };
    let before = cpu()?;
    for _ in 0..options.rounds {
        fetch_s.push(fetch(&asks, &ids).await?);
        let start = own_cpu_s();
        copy_s.push(tokio::task::block_in_place(|| copy(&file))?);
        copy_cpu_s += own_cpu_s() - start;
    }
    let after = cpu()?;
    let bytes = f64::from(options.rounds) * (options.mib << 20) as f64;
    let (all, least) =
        (|s: &[f64]| s.iter().sum::<f64>(), |s: &[f64]| s.iter().copied().fold(f64::MAX, f64::min));
    let a_gib = |seconds: f64| seconds * f64::from(1 << 30) / bytes;
    let report = serde_json::json!({
        "bytes": options.mib << 20,
        "rounds": options.rounds,
        "ready_s": ready_s,
        "fetched_bytes_per_s": bytes / all(&fetch_s),
        "copied_and_hashed_bytes_per_s": bytes / all(&copy_s),
        "ratio": all(&copy_s) / all(&fetch_s),
        "best_ratio": least(&copy_s) / least(&fetch_s),
        "cpu_s_per_gib": {
            "holder": a_gib(after[0] - before[0]),
            "asker": a_gib(after[1] - before[1]),
            "client": a_gib(after[2] - before[2] - copy_cpu_s),
            "copy": a_gib(copy_cpu_s),
        },
    });
    println!("{report:#}");
    Ok(())
}
