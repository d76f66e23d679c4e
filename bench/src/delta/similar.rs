//! Similar pages: which page of the site is most like one that it lacks, and what it would take to use it.

use std::collections::HashMap;
use std::io;

use page::{PAGE_SIZE, Page};

use super::failed;

/// Bytes of a block, the unit of likeness.
const BLOCK_BYTES: usize = 64;
/// Blocks of a page.
const BLOCKS: usize = PAGE_SIZE / BLOCK_BYTES;
/// Features of a sketch: two pages that share a share `s` of their blocks have each in common with probability `s`.
const FEATURES: usize = 6;
/// Pages of the site that are remembered for one value of one feature.
const BUCKET_PAGES: usize = 4;

/// On the wire: a page's sketch, 3 bytes a feature; the name of a base.
const SKETCH_BYTES: u64 = 3 * FEATURES as u64;
const NAME_BYTES: u64 = 8;
/// On the wire: the sum of a block, and one bit that says whether it is the base's.
const BLOCK_SUM_BYTES: u64 = 4;

/// The least of each hash function over the page's blocks that are not zero (Broder's min-wise hashing).
fn sketch(page: &Page) -> [u64; FEATURES] {
    let mut least = [u64::MAX; FEATURES];
    for block in blocks(page).filter(|block| block.iter().any(|byte| *byte != 0)) {
        let mut hash = hash_of(block);
        for least in &mut least {
            hash = mixed(hash);
            *least = (*least).min(hash);
        }
    }
    least
}

fn blocks(page: &Page) -> impl Iterator<Item = &[u8; BLOCK_BYTES]> {
    page.as_chunks::<BLOCK_BYTES>().0.iter()
}

fn hash_of(block: &[u8; BLOCK_BYTES]) -> u64 {
    block.as_chunks::<8>().0.iter().fold(0, |hash, word| mixed(hash ^ u64::from_le_bytes(*word)))
}

/// SplitMix64's mixer.
fn mixed(hash: u64) -> u64 {
    let hash = hash.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let hash = (hash ^ (hash >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let hash = (hash ^ (hash >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    hash ^ (hash >> 31)
}

/// The sketches of a site's pages.
#[derive(Debug, Default)]
pub struct Sketches<'a> {
    buckets: HashMap<(usize, u64), Vec<&'a Page>>,
}

impl<'a> Sketches<'a> {
    /// Adds a page.
    pub fn add(&mut self, page: &'a Page) {
        for (feature, value) in sketch(page).into_iter().enumerate() {
            let bucket = self.buckets.entry((feature, value)).or_default();
            if bucket.len() < BUCKET_PAGES {
                bucket.push(page);
            }
        }
    }

    /// The page with the most features, and then the most blocks in place, in common.
    #[must_use]
    pub fn similar(&self, page: &Page) -> Option<&'a Page> {
        let found = sketch(page).into_iter().enumerate().filter_map(|feature| self.buckets.get(&feature));
        found.flatten().copied().max_by_key(|other| same_blocks(page, other))
    }
}

fn same_blocks(page: &Page, other: &Page) -> usize {
    blocks(page).zip(blocks(other)).filter(|(a, b)| a == b).count()
}

/// What is sent both ways for pages that have a similar one in the site, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exchange {
    /// Pages.
    pub pages: u64,
    /// If both ends held the similar page: its name and the delta.
    pub known_to_both: u64,
    /// If the destination alone does: the sketch there, sums of the similar page's blocks back, and the blocks that it has not.
    pub sums_travel: u64,
    /// The same pages by zstd alone.
    pub plain: u64,
}

impl Exchange {
    /// Adds a batch of pages with their similar ones.
    ///
    /// # Errors
    /// If zstd fails.
    pub fn add(&mut self, batch: &[(&Page, &Page)], level: i32) -> io::Result<()> {
        let count = batch.len() as u64;
        let join = |pages: &mut dyn Iterator<Item = &Page>| pages.flatten().copied().collect::<Vec<u8>>();
        let new = join(&mut batch.iter().map(|(new, _)| *new));
        let old = join(&mut batch.iter().map(|(_, old)| *old));
        let mut compressor = zstd::bulk::Compressor::new(level)?;
        self.plain += compressor.compress(&new)?.len() as u64;
        // A block may stand elsewhere in the similar page: the sums find it there too.
        let mut other = Vec::new();
        for (new, old) in batch {
            let held: Vec<&[u8; BLOCK_BYTES]> = blocks(old).collect();
            blocks(new)
                .filter(|block| !held.contains(block))
                .for_each(|block| other.extend_from_slice(block));
        }
        let marks = count * (BLOCKS as u64).div_ceil(8);
        self.sums_travel += count * (SKETCH_BYTES + BLOCKS as u64 * BLOCK_SUM_BYTES) + marks;
        self.sums_travel += compressor.compress(&other)?.len() as u64;
        let mut compressor = zstd::bulk::Compressor::new(level)?;
        compressor.context_mut().ref_prefix(&old).map_err(failed)?;
        self.known_to_both += count * NAME_BYTES + compressor.compress(&new)?.len() as u64;
        self.pages += count;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random_pages;

    #[test]
    fn a_page_with_one_block_changed_is_found() {
        let site = random_pages(50, 3);
        let mut sketches = Sketches::default();
        site.iter().for_each(|page| sketches.add(page));
        let mut page = site[7];
        page[100] ^= 1;
        assert_eq!(sketches.similar(&page), Some(&site[7]));
        assert_eq!(sketches.similar(&random_pages(1, 99)[0]), None);
    }

    #[test]
    fn sums_cost_more_than_a_name() {
        let pages = random_pages(1, 5);
        let mut changed = pages[0];
        changed[0] ^= 1;
        let mut exchange = Exchange::default();
        exchange.add(&[(&changed, &pages[0])], 3).unwrap();
        assert!(exchange.known_to_both < 100 && exchange.plain > 4000, "{exchange:?}");
        assert!((280..500).contains(&exchange.sums_travel), "{exchange:?}");
    }
}
