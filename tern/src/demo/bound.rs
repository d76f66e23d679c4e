//! The fewest bytes that names and literals can do with: the yardstick for what a migration really sent.
//!
//! bound = zstd at level 3, in batches of 64 pages, of the distinct non-zero pages that the site lacks, in the order of
//! their first frames, plus 8 bytes a named page. A page is named once however often it occurs, and a zero page never.

use std::collections::HashSet;
use std::io::{self, Read};

use page::{Domain, PAGE_SIZE, Page, PageHash, is_zero, page_chunks};
use serde::Serialize;

use crate::limits;

/// Bytes that name a page.
const NAME_BYTES: u64 = 8;

/// zstd's level in the bound.
const LEVEL: i32 = 3;

/// The bound of one memory against one site, and what it is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct Bound {
    /// All-zero pages.
    pub(crate) zero_pages: u64,
    /// All others.
    pub(crate) nonzero_pages: u64,
    /// Different ones among those: the named pages.
    pub(crate) distinct_pages: u64,
    /// Of these, the ones that the site lacks.
    pub(crate) missing_pages: u64,
    /// What zstd makes of the missing ones, bytes.
    pub(crate) literal_bytes: u64,
    /// The bound, bytes.
    pub(crate) bytes: u64,
}

/// The names of all pages that a site holds: its files by blocks, its VMs by frames.
#[derive(Debug, Default)]
pub(crate) struct SiteNames {
    names: HashSet<PageHash>,
}

impl SiteNames {
    /// Adds every page of a file or memory; a last, shorter block counts as filled up with zeros.
    ///
    /// # Errors
    /// If `content` cannot be read.
    pub(crate) fn add(&mut self, content: impl Read) -> io::Result<()> {
        let domain = Domain::unkeyed();
        for_each_page(content, |page| {
            if !is_zero(page) {
                self.names.insert(domain.name(page));
            }
            Ok(())
        })
    }

    /// The bound of `memory` against this site.
    ///
    /// # Errors
    /// If `memory` cannot be read, or zstd fails.
    pub(crate) fn bound_of(&self, memory: impl Read) -> io::Result<Bound> {
        let domain = Domain::unkeyed();
        let mut compressor = zstd::bulk::Compressor::new(LEVEL)?;
        let mut bound = Bound::default();
        let mut seen = HashSet::new();
        let mut batch = Vec::with_capacity(limits::BOUND_BATCH_PAGES * PAGE_SIZE);
        for_each_page(memory, |page| {
            if is_zero(page) {
                bound.zero_pages += 1;
                return Ok(());
            }
            bound.nonzero_pages += 1;
            let name = domain.name(page);
            if !seen.insert(name) {
                return Ok(());
            }
            bound.distinct_pages += 1;
            if self.names.contains(&name) {
                return Ok(());
            }
            bound.missing_pages += 1;
            batch.extend_from_slice(page);
            if batch.len() == batch.capacity() {
                bound.literal_bytes += compressor.compress(&batch)?.len() as u64;
                batch.clear();
            }
            Ok(())
        })?;
        if !batch.is_empty() {
            bound.literal_bytes += compressor.compress(&batch)?.len() as u64;
        }
        bound.bytes = bound.literal_bytes + NAME_BYTES * bound.distinct_pages;
        Ok(bound)
    }
}

/// Hands the pages of `content` to `each`, in order.
fn for_each_page(mut content: impl Read, mut each: impl FnMut(&Page) -> io::Result<()>) -> io::Result<()> {
    let chunk_bytes = limits::BOUND_BATCH_PAGES * PAGE_SIZE;
    let mut chunk = Vec::with_capacity(chunk_bytes);
    loop {
        chunk.clear();
        let read = content.by_ref().take(chunk_bytes as u64).read_to_end(&mut chunk)?;
        if read == 0 {
            return Ok(());
        }
        chunk.resize(read.next_multiple_of(PAGE_SIZE), 0);
        page_chunks(&chunk).try_for_each(&mut each)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::content::Random;

    fn noise(seed: u64) -> Vec<u8> {
        let mut page = [0; PAGE_SIZE];
        Random::new(seed).fill(&mut page);
        page.to_vec()
    }

    #[test]
    fn zero_pages_cost_nothing_and_duplicates_are_named_once() {
        let memory = [vec![0; PAGE_SIZE], noise(1), noise(1), noise(2)].concat();
        let mut site = SiteNames::default();
        site.add(&noise(1)[..]).unwrap();
        let bound = site.bound_of(&memory[..]).unwrap();
        let pages = (bound.zero_pages, bound.nonzero_pages, bound.distinct_pages, bound.missing_pages);
        assert_eq!(pages, (1, 3, 2, 1));
        assert_eq!(bound.bytes, bound.literal_bytes + 16);
        assert!((4096..4200).contains(&bound.literal_bytes), "noise does not compress: {bound:?}");
    }

    #[test]
    fn a_site_that_holds_all_leaves_only_names() {
        let memory: Vec<u8> = (0..200).flat_map(noise).collect();
        let mut site = SiteNames::default();
        site.add(&memory[..]).unwrap();
        let bound = site.bound_of(&memory[..]).unwrap();
        assert_eq!((bound.literal_bytes, bound.bytes), (0, 1600));
    }

    #[test]
    fn batches_are_of_64_distinct_missing_pages() {
        let pages: Vec<Vec<u8>> = (0..65).map(noise).collect();
        let alone: Vec<u8> = pages[..64].concat();
        let memory = [pages[0].clone(), vec![0; PAGE_SIZE], pages.concat(), pages.concat()].concat();
        let bound = SiteNames::default().bound_of(&memory[..]).unwrap();
        let batch = |bytes: &[u8]| zstd::bulk::compress(bytes, 3).unwrap().len() as u64;
        assert_eq!(bound.literal_bytes, batch(&alone) + batch(&pages[64]));
    }

    #[test]
    fn a_short_last_block_is_filled_up_with_zeros() {
        let mut site = SiteNames::default();
        site.add(&noise(3)[..100]).unwrap();
        let mut memory = noise(3);
        memory[100..].fill(0);
        assert_eq!(site.bound_of(&memory[..]).unwrap().missing_pages, 0);
    }

    /// The table of measured guests. `TERN_CORPUS=DIR cargo test -p tern -- --ignored`, with DIR as the corpus unpacks.
    #[test]
    #[ignore = "needs the unpacked corpus in TERN_CORPUS"]
    fn measured_guests_have_the_bounds_of_their_table() {
        let corpus = std::path::PathBuf::from(std::env::var_os("TERN_CORPUS").expect("TERN_CORPUS is set"));
        let open = |name: &str| std::fs::File::open(corpus.join(name).with_extension("ram")).unwrap();
        let all: &[_] = &["bw-idle1", "bw-idle2", "bw-redis-t0", "bw-redis-t1"];
        for (vm, held, mebibytes) in [
            ("bw-idle2", &all[..1], 13.4),
            ("bw-redis-t0", &all[..2], 20.7),
            ("bw-redis-t1", &all[2..3], 2.2),
            ("tx-idle", all, 32.5),
        ] {
            let mut site = SiteNames::default();
            held.iter().for_each(|name| site.add(open(name)).unwrap());
            let bound = site.bound_of(open(vm)).unwrap();
            let got = bound.bytes as f64 / f64::from(1 << 20);
            // The table is of whole 0.1 MiB, and of a zstd that was not told the batch's size: up to 1% more.
            assert!((got - 0.05..=1.01 * got + 0.05).contains(&mebibytes), "{vm}: {got} against {mebibytes}");
        }
    }
}
