//! The built-in memory of the demo: a stated mix like that of measured Linux guests, the same for the same seed.
//!
//! Kinds of pages come in runs, as files in a page cache and heaps do. Every page is a function of (seed, kind, number), so the
//! files and the sibling's memory at site B are written from the same functions as the VM's memory, in their own order.

use std::fs::File;
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::path::Path;

use page::{PAGE_SIZE, Page};

/// A kind of page in the VM's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// All zero.
    Zero,
    /// The same as a page of kind `Text` elsewhere in this memory.
    Duplicate,
    /// A block of a file that a host of site B holds.
    File,
    /// Also in the memory of the sibling VM at site B.
    Sibling,
    /// Nowhere else; records and words, which zstd makes about 3.5 times smaller.
    Text,
    /// Nowhere else; noise, which nothing makes smaller.
    Noise,
}

/// The mix, in percent of the memory's pages. Rounding goes to the zero pages.
pub(crate) const MIX: [(Kind, u64); 6] = [
    (Kind::Zero, 12),
    (Kind::Duplicate, 7),
    (Kind::File, 40),
    (Kind::Sibling, 15),
    (Kind::Text, 21),
    (Kind::Noise, 5),
];

/// The mix in words, for `--help` and the report.
pub(crate) const MIX_IN_WORDS: &str = "12% zero, 7% duplicates within the VM, 40% blocks of files at site B (a quarter of them on the destination's own host), 15% shared with the \
     sibling VM at site B, 21% unique and compressible (about 3.5 times), 5% unique and incompressible";

/// The longest run of pages of one kind.
const LONGEST_RUN: u64 = 48;

/// The demo's contents for one seed and size.
#[derive(Debug)]
pub(crate) struct Content {
    seed: u64,
    /// Pages of each kind, in the order of [`MIX`].
    counts: [u64; MIX.len()],
    runs: Vec<Run>,
}

/// Pages of one kind that follow each other, numbered within their kind.
#[derive(Clone, Copy, Debug)]
struct Run {
    kind: Kind,
    first: u64,
    pages: u64,
}

impl Content {
    /// Lays out a memory of `pages`.
    pub(crate) fn new(seed: u64, pages: u64) -> Self {
        let mut counts = MIX.map(|(_, percent)| pages * percent / 100);
        counts[0] += pages - counts.iter().sum::<u64>();
        let mut random = Random::new(seed);
        let (mut given, mut left, mut runs) = ([0; MIX.len()], pages, Vec::new());
        while left > 0 {
            // Each kind comes up as often as it has pages left, so that no kind is left over for the end.
            let mut ticket = random.below(left);
            let at = (0..MIX.len())
                .find(|&at| match ticket.checked_sub(counts[at] - given[at]) {
                    Some(rest) => {
                        ticket = rest;
                        false
                    }
                    None => true,
                })
                .expect("the ticket is below what all kinds have left");
            let pages = (1 + random.below(LONGEST_RUN)).min(counts[at] - given[at]);
            runs.push(Run { kind: MIX[at].0, first: given[at], pages });
            given[at] += pages;
            left -= pages;
        }
        Self { seed, counts, runs }
    }

    /// Pages of `kind` in the VM's memory.
    pub(crate) fn count(&self, kind: Kind) -> u64 {
        MIX.iter().zip(self.counts).find(|((k, _), _)| *k == kind).map_or(0, |(_, count)| count)
    }

    /// Writes the VM's memory to a new file at `path`; zero pages become holes.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(crate) fn write_memory(&self, path: &Path) -> io::Result<()> {
        let pages =
            self.runs.iter().flat_map(|run| (run.first..run.first + run.pages).map(|n| (run.kind, n)));
        self.write(path, pages)
    }

    /// Writes the file that the destination's own host holds: a quarter of the file blocks.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(crate) fn write_near_file(&self, path: &Path) -> io::Result<()> {
        self.write(path, (0..self.count(Kind::File) / 4).map(|n| (Kind::File, n)))
    }

    /// Writes the file that another host of site B holds: the other file blocks.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(crate) fn write_far_file(&self, path: &Path) -> io::Result<()> {
        let count = self.count(Kind::File);
        self.write(path, (count / 4..count).map(|n| (Kind::File, n)))
    }

    /// Writes the memory of the sibling VM: what it shares with the VM, amid zero pages of its own.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub(crate) fn write_sibling(&self, path: &Path) -> io::Result<()> {
        let shared = (0..self.count(Kind::Sibling)).map(|n| (Kind::Sibling, n));
        self.write(
            path,
            shared.flat_map(|page| [Some(page), (page.1 % 8 == 7).then_some((Kind::Zero, 0))]).flatten(),
        )
    }

    fn write(&self, path: &Path, pages: impl Iterator<Item = (Kind, u64)>) -> io::Result<()> {
        let mut out = BufWriter::with_capacity(1 << 20, File::create_new(path)?);
        let (mut page, mut written, mut hole) = ([0; PAGE_SIZE], 0, 0);
        for (kind, number) in pages {
            written += PAGE_SIZE as u64;
            if kind == Kind::Zero {
                hole += i64::try_from(PAGE_SIZE).expect("a page is small");
                continue;
            }
            if hole > 0 {
                out.seek(SeekFrom::Current(hole))?;
                hole = 0;
            }
            self.make(kind, number, &mut page);
            out.write_all(&page)?;
        }
        out.into_inner()?.set_len(written)
    }

    /// Makes page `number` of `kind`.
    fn make(&self, kind: Kind, number: u64, page: &mut Page) {
        let random =
            |label: u64| Random::new(self.seed ^ label.rotate_left(56) ^ number.wrapping_mul(0x9E6D));
        match kind {
            Kind::Zero => page.fill(0),
            Kind::Duplicate => {
                let original = random(1).below(self.count(Kind::Text).max(1));
                self.make(Kind::Text, original, page);
            }
            // Files are programs and documents alike.
            Kind::File if (number / 16).is_multiple_of(2) => random(2).fill(page),
            Kind::File => write_records(&mut random(3), page),
            Kind::Sibling => write_records(&mut random(4), page),
            Kind::Text => write_records(&mut random(5), page),
            Kind::Noise => random(6).fill(page),
        }
    }
}

/// Words of the records.
const WORDS: [&str; 64] = [
    "address",
    "available",
    "balance",
    "between",
    "cache",
    "channel",
    "client",
    "commit",
    "config",
    "context",
    "count",
    "create",
    "current",
    "default",
    "delete",
    "device",
    "domain",
    "driver",
    "enabled",
    "entry",
    "error",
    "event",
    "failed",
    "filter",
    "finished",
    "format",
    "handler",
    "header",
    "index",
    "input",
    "kernel",
    "length",
    "library",
    "limit",
    "listen",
    "local",
    "manager",
    "memory",
    "message",
    "module",
    "network",
    "object",
    "offset",
    "option",
    "output",
    "package",
    "parent",
    "pending",
    "process",
    "profile",
    "queue",
    "record",
    "region",
    "release",
    "remote",
    "request",
    "result",
    "return",
    "schedule",
    "section",
    "server",
    "service",
    "session",
    "socket",
];

/// Fills a page with records: repeated keys, words, and a share of numbers that repeat nowhere.
fn write_records(random: &mut Random, page: &mut Page) {
    let mut left: &mut [u8] = page;
    let mut put = |bytes: &[u8]| {
        let length = bytes.len().min(left.len());
        let (now, later) = std::mem::take(&mut left).split_at_mut(length);
        now.copy_from_slice(&bytes[..length]);
        left = later;
        left.is_empty()
    };
    loop {
        let mut bits = random.next();
        let mut full = put(b"{\"id\":\"");
        full |= put(&hex(random.next()));
        full |= put(b"\",\"state\":");
        for _ in 0..8 {
            let word = WORDS[usize::try_from(bits % 64).expect("below 64")];
            bits >>= 6;
            full |= put(b"\"") | put(word.as_bytes());
        }
        full |= put(b"\",\"at\":") | put(&hex(bits)[..8]) | put(b"}\n");
        if full {
            return;
        }
    }
}

fn hex(bits: u64) -> [u8; 16] {
    std::array::from_fn(|at| {
        b"0123456789abcdef"[usize::try_from(bits >> (60 - 4 * at) & 15).expect("below 16")]
    })
}

/// A small generator (SplitMix64), the same on every machine and in every version of the crates.
#[derive(Clone, Debug)]
pub(crate) struct Random(u64);

impl Random {
    /// The sequence of a seed.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ (mixed >> 31)
    }

    /// A number below `bound`, which must be above 0.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// Fills a page with noise.
    pub(crate) fn fill(&mut self, page: &mut Page) {
        for word in page.as_chunks_mut::<8>().0 {
            *word = self.next().to_le_bytes();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::bound::SiteNames;

    const PAGES: u64 = 4096;

    fn written(write: impl Fn(&Path) -> io::Result<()>) -> Vec<u8> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("content");
        write(&path).unwrap();
        std::fs::read(path).unwrap()
    }

    #[test]
    fn the_same_seed_gives_the_same_memory_and_another_a_different_one() {
        let memory = |seed| written(|path| Content::new(seed, PAGES).write_memory(path));
        assert_eq!(memory(1).len() as u64, PAGES * PAGE_SIZE as u64);
        assert!(memory(1) == memory(1));
        assert!(memory(1) != memory(2));
    }

    #[test]
    fn the_memory_has_the_stated_mix() {
        let content = Content::new(7, PAGES);
        let memory = written(|path| content.write_memory(path));
        let bound = SiteNames::default().bound_of(&memory[..]).unwrap();
        assert_eq!(bound.zero_pages, content.count(Kind::Zero));
        assert_eq!(bound.distinct_pages, bound.nonzero_pages - content.count(Kind::Duplicate));
        assert_eq!(MIX.iter().map(|(_, percent)| percent).sum::<u64>(), 100);
        assert_eq!(MIX.iter().map(|(kind, _)| content.count(*kind)).sum::<u64>(), PAGES);
        for (kind, percent) in MIX {
            assert!(content.count(kind).abs_diff(PAGES * percent / 100) <= 6, "{kind:?}");
            assert!(MIX_IN_WORDS.contains(&format!("{percent}% ")), "{kind:?} is stated");
        }
    }

    #[test]
    fn the_site_lacks_exactly_the_unique_pages() {
        let content = Content::new(7, PAGES);
        let mut site = SiteNames::default();
        site.add(&written(|path| content.write_near_file(path))[..]).unwrap();
        site.add(&written(|path| content.write_far_file(path))[..]).unwrap();
        site.add(&written(|path| content.write_sibling(path))[..]).unwrap();
        let bound = site.bound_of(&written(|path| content.write_memory(path))[..]).unwrap();
        assert_eq!(bound.missing_pages, content.count(Kind::Text) + content.count(Kind::Noise));
    }

    #[test]
    fn records_compress_three_to_four_times_and_noise_does_not() {
        let content = Content::new(7, PAGES);
        let size = |kind| {
            let mut batch = vec![0; 64 * PAGE_SIZE];
            for (page, number) in batch.as_chunks_mut().0.iter_mut().zip(0..) {
                content.make(kind, number, page);
            }
            zstd::bulk::compress(&batch, 3).unwrap().len()
        };
        let text = size(Kind::Text);
        assert!((64 * 1024..=64 * PAGE_SIZE / 3).contains(&text), "{}", 64.0 * 4096.0 / text as f64);
        assert!(size(Kind::Noise) >= 64 * PAGE_SIZE);
    }
}
