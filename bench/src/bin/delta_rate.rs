//! Measures, on images of guest memory, what the pages that a site lacks take of bytes and of CPU time: zstd at several levels and batch
//! sizes, the delta against each page's old version in several forms and QEMU's XBZRLE, and what a similar page of the site would save.
//!
//! `cargo run --release -p bench --bin delta-rate -- --old A.ram --new B.ram [--site C.ram …]` prints one JSON object. An image is
//! guest-physical memory, page by page. A page of `--new` counts if it is not zero, not in `--site`, and not seen before; for the delta, if the
//! page at the same place of `--old` is not zero and is another.

use std::collections::HashSet;
use std::io;
use std::path::PathBuf;

use bench::delta::{self, Cost, Exchange, Sketches};
use clap::Parser;
use page::{Domain, PAGE_SIZE, Page, is_zero};
use serde_json::{Map, Value, json};

/// What the pages that a site lacks take of bytes and of CPU time.
#[derive(Parser)]
struct Options {
    /// The memory to move.
    #[arg(long)]
    new: PathBuf,
    /// An earlier state of the same memory.
    #[arg(long)]
    old: Option<PathBuf>,
    /// Memory or files of the destination's site.
    #[arg(long, num_args = 0..)]
    site: Vec<PathBuf>,
    /// zstd's levels.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 3, 6, 9, 15])]
    levels: Vec<i32>,
    /// Pages in a batch.
    #[arg(long, value_delimiter = ',', default_values_t = [16, 64, 256])]
    batches: Vec<usize>,
}

/// The batch and level that stand for all where only one is measured.
const BATCH: usize = 64;
const LEVEL: i32 = 3;

fn image(path: &PathBuf) -> io::Result<Vec<u8>> {
    let mut bytes = std::fs::read(path)?;
    bytes.resize(bytes.len().next_multiple_of(PAGE_SIZE), 0);
    Ok(bytes)
}

fn shown(cost: Cost, pages: usize) -> Value {
    let raw = (pages * PAGE_SIZE) as f64;
    json!({ "bytes": cost.bytes, "share": cost.bytes as f64 / raw, "cpu_s": cost.cpu_s, "bytes_per_cpu_s": raw / cost.cpu_s })
}

fn plain(pages: &[&Page], options: &Options) -> io::Result<Value> {
    let mut table = Map::new();
    for level in &options.levels {
        for batch in &options.batches {
            let cost = delta::cost(|| delta::zstd_batches(pages, *batch, *level))?;
            table.insert(format!("level {level}, {batch} pages"), shown(cost, pages.len()));
        }
    }
    Ok(table.into())
}

type Encode = fn(&[(&Page, &Page)], usize, i32) -> io::Result<u64>;

fn deltas(pairs: &[(&Page, &Page)], options: &Options) -> io::Result<Value> {
    let mut table = Map::new();
    let forms: [(&str, Encode); 2] = [("prefix", delta::delta_batches), ("xor", delta::xor_batches)];
    for level in &options.levels {
        for (name, form) in forms {
            for batch in std::iter::once(&1).chain(&options.batches) {
                let cost = delta::cost(|| form(pairs, *batch, *level))?;
                table.insert(format!("{name}, level {level}, {batch} pages"), shown(cost, pairs.len()));
            }
        }
    }
    let qemu = delta::cost(|| Ok(pairs.iter().map(|(new, old)| delta::xbzrle(old, new) as u64).sum()))?;
    table.insert("XBZRLE".to_owned(), shown(qemu, pairs.len()));
    let new: Vec<&Page> = pairs.iter().map(|(new, _)| *new).collect();
    let alone = delta::cost(|| delta::zstd_batches(&new, BATCH, LEVEL))?;
    table.insert(format!("no delta, level {LEVEL}, {BATCH} pages"), shown(alone, pairs.len()));
    Ok(table.into())
}

fn similar(pages: &[&Page], site: &[Vec<u8>]) -> io::Result<Value> {
    let (mut sketches, mut seen) = (Sketches::default(), HashSet::new());
    let domain = Domain::unkeyed();
    for page in site.iter().flat_map(|image| delta::pages_of(image)) {
        if !is_zero(page) && seen.insert(domain.name(page)) {
            sketches.add(page);
        }
    }
    let pairs: Vec<(&Page, &Page)> =
        pages.iter().filter_map(|page| Some((*page, sketches.similar(page)?))).collect();
    let mut exchange = Exchange::default();
    for batch in pairs.chunks(BATCH) {
        exchange.add(batch, LEVEL)?;
    }
    let Exchange { pages, known_to_both, sums_travel, plain } = exchange;
    Ok(json!({ "pages": pages, "plain": plain, "known_to_both": known_to_both, "sums_travel": sums_travel }))
}

fn main() -> io::Result<()> {
    let options = Options::parse();
    let new = image(&options.new)?;
    let site: Vec<Vec<u8>> = options.site.iter().map(image).collect::<io::Result<_>>()?;
    let domain = Domain::unkeyed();
    let mut known: HashSet<_> =
        site.iter().flat_map(|image| delta::pages_of(image)).map(|page| domain.name(page)).collect();
    let missing: Vec<(usize, &Page)> = delta::pages_of(&new)
        .iter()
        .enumerate()
        .filter(|(_, page)| !is_zero(page) && known.insert(domain.name(page)))
        .collect();
    let pages: Vec<&Page> = missing.iter().map(|(_, page)| *page).collect();
    let mut report = json!({ "missing_pages": pages.len(), "zstd": plain(&pages, &options)? });
    if let Some(old) = &options.old {
        let old = image(old)?;
        let old = delta::pages_of(&old);
        let pairs: Vec<(&Page, &Page)> = missing
            .iter()
            .filter_map(|(at, page)| Some((*page, old.get(*at).filter(|old| !is_zero(old) && old != page)?)))
            .collect();
        report["pages_with_an_old_version"] = pairs.len().into();
        report["delta"] = deltas(&pairs, &options)?;
    }
    if !site.is_empty() {
        report["similar_page_in_the_site"] = similar(&pages, &site)?;
    }
    println!("{report:#}");
    Ok(())
}
