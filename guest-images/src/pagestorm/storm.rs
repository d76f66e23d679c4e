//! The working set: written page by page, and checked.

use core::fmt;

use super::content::{self, Found, Identity, Page};
use super::counters::{self, Counter, Raw};
use super::layout::{COUNTER_BYTES, COUNTERS_PER_PAGE, Layout};
use super::limits::PAGE_BYTES;
use super::options::{Content, Options};
use super::pace::Order;
use super::rewrite;

/// Guest memory by address. `gpa` is always a page's first byte inside the working set of the layout.
pub trait Ram {
    /// The page at `gpa`.
    fn page(&self, gpa: u64) -> &Page;
    /// The page at `gpa`, to be written.
    fn page_mut(&mut self, gpa: u64) -> &mut Page;
}

/// A failure of the self-check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// A page does not hold what it ought to.
    Page {
        /// Its address.
        gpa: u64,
        /// The generation it ought to hold.
        expected: u32,
        /// What it holds.
        found: Found,
    },
    /// A counter in the working set does not fit the number of writes.
    Counter {
        /// Its address.
        gpa: u64,
    },
    /// The header of the counters does not fit the number of writes.
    Header {
        /// Its address.
        gpa: u64,
        /// The number of writes by the guest's own count.
        expected: u64,
        /// The number in the header; `None` if it is not one.
        found: Option<u64>,
    },
}

impl Failure {
    /// Where it is.
    #[must_use]
    pub const fn gpa(&self) -> u64 {
        match self {
            Self::Page { gpa, .. } | Self::Counter { gpa } | Self::Header { gpa, .. } => *gpa,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Page { gpa, expected, found } => match found {
                Found::Generation(older) if older < expected => {
                    write!(f, "page {gpa:#x} is lost: expected generation {expected}, found {older}")
                }
                Found::Generation(newer) => {
                    write!(f, "page {gpa:#x} is wrong: expected generation {expected}, found {newer}")
                }
                Found::Zeros => {
                    write!(f, "page {gpa:#x} is lost: expected generation {expected}, found zeros")
                }
                Found::Expected | Found::Unknown => {
                    write!(f, "page {gpa:#x} is wrong: expected generation {expected}, found other bytes")
                }
            },
            Self::Counter { gpa } => write!(f, "counter {gpa:#x} is lost or wrong"),
            Self::Header { gpa, expected, found: Some(found) } => {
                write!(f, "counters at {gpa:#x} are lost or wrong: expected {expected} writes, found {found}")
            }
            Self::Header { gpa, expected, found: None } => {
                write!(f, "counters at {gpa:#x} are wrong: expected {expected} writes, found other bytes")
            }
        }
    }
}

/// The outcome of checking a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Its page has never been written.
    Unwritten,
    /// Page and counter are right.
    Good,
    /// They are not.
    Bad(Failure),
}

/// The working set and its history.
#[derive(Debug)]
pub struct Storm<R> {
    ram: R,
    seed: u64,
    content: Content,
    prefill: bool,
    layout: Layout,
    order: Order,
    writes: u64,
    scratch: Page,
}

impl<R: Ram> Storm<R> {
    /// A new working set in `ram`: counters at zero, pages as they are.
    pub fn create(ram: R, options: &Options, layout: Layout) -> Self {
        let mut storm = Self::attach(ram, options, layout, 0);
        storm.put(0, counters::header_to_raw(storm.seed, 0));
        for slot in 0..storm.layout.data_pages {
            let counter = Counter { generation: 0, kept: 0 };
            storm.put(slot + 1, counter.to_raw(storm.seed, slot + 1));
        }
        storm
    }

    /// The working set that a guest with these options left in `ram`, with the number of writes that its header
    /// states: to check a dump of memory from outside. `None` if there is no such header.
    pub fn open(ram: R, options: &Options, layout: Layout) -> Option<Self> {
        let mut storm = Self::attach(ram, options, layout, 0);
        storm.writes = counters::header_from_raw(storm.seed, storm.get(0))?;
        Some(storm)
    }

    fn attach(ram: R, options: &Options, layout: Layout, writes: u64) -> Self {
        let order = Order::new(options.seed, layout.data_pages);
        let scratch = [0; PAGE_BYTES];
        let Options { seed, content, prefill, .. } = *options;
        Self { ram, seed, content, prefill, layout, order, writes, scratch }
    }

    /// Page writes so far.
    pub const fn writes(&self) -> u64 {
        self.writes
    }

    /// Slots: as many as data pages.
    pub const fn slots(&self) -> u64 {
        self.layout.data_pages
    }

    /// Address of the page of `slot`.
    pub fn page_gpa(&self, slot: u64) -> u64 {
        self.layout.page_gpa(self.order.page_of(slot))
    }

    /// Its memory, for whoever wants to look from outside.
    pub const fn ram_mut(&mut self) -> &mut R {
        &mut self.ram
    }

    /// Writes the page that is next in the order.
    pub fn write_next(&mut self) {
        let slot = self.writes % self.slots();
        let generation = counters::expected_generation(self.writes, self.slots(), slot) + 1;
        let index = self.order.page_of(slot);
        let id = Identity { seed: self.seed, index };
        let kept = match self.content {
            Content::Random => {
                content::fill_random(id, generation, self.ram.page_mut(self.layout.page_gpa(index)));
                0
            }
            Content::Text => {
                content::fill_text(id, generation, self.ram.page_mut(self.layout.page_gpa(index)));
                0
            }
            Content::Rewrite => self.rewrite(id, generation, slot),
        };
        self.put(slot + 1, Counter { generation, kept }.to_raw(self.seed, slot + 1));
        self.writes += 1;
        self.put(0, counters::header_to_raw(self.seed, self.writes));
    }

    fn rewrite(&mut self, id: Identity, generation: u32, slot: u64) -> u64 {
        // A counter that is no counter any more must not be made good by this write: its bytes are taken as they
        // are, and the sum that follows from them fails the next check.
        let [.., k0, k1, k2, k3, k4, k5, k6, k7] = self.get(slot + 1);
        let page = self.ram.page_mut(self.layout.page_gpa(id.index));
        let kept = if generation == 1 {
            if self.prefill {
                content::fill_text(id, 0, page);
            }
            rewrite::kept_sum(id, 0, page)
        } else {
            u64::from_le_bytes([k0, k1, k2, k3, k4, k5, k6, k7])
        };
        rewrite::rewrite(id, generation, page, kept)
    }

    /// Checks a slot: its counter against the number of writes, its page against its counter.
    pub fn check(&mut self, slot: u64) -> Verdict {
        let expected = counters::expected_generation(self.writes, self.slots(), slot);
        let counter = Counter::from_raw(self.seed, slot + 1, self.get(slot + 1));
        let Some(counter) = counter.filter(|counter| counter.generation == expected) else {
            return Verdict::Bad(Failure::Counter { gpa: self.layout.counter_gpa(slot + 1) });
        };
        if expected == 0 {
            return Verdict::Unwritten;
        }
        let index = self.order.page_of(slot);
        let id = Identity { seed: self.seed, index };
        let gpa = self.layout.page_gpa(index);
        let page = self.ram.page(gpa);
        let found = match self.content {
            Content::Random => content::examine_random(id, expected, page, &mut self.scratch),
            Content::Text => content::examine_text(id, expected, page, &mut self.scratch),
            Content::Rewrite => rewrite::examine(id, expected, page, counter.kept),
        };
        match found {
            Found::Expected => Verdict::Good,
            Found::Generation(_) | Found::Zeros | Found::Unknown => {
                Verdict::Bad(Failure::Page { gpa, expected, found })
            }
        }
    }

    /// Checks the header against the number of writes that the guest itself counted.
    pub fn check_header(&self) -> Option<Failure> {
        let found = counters::header_from_raw(self.seed, self.get(0));
        let gpa = self.layout.counter_gpa(0);
        (found != Some(self.writes)).then_some(Failure::Header { gpa, expected: self.writes, found })
    }

    fn get(&self, number: u64) -> Raw {
        let (page, at) = self.place(number);
        let bytes = &self.ram.page(page)[at..];
        *bytes.first_chunk().expect("counters do not cross pages")
    }

    fn put(&mut self, number: u64, raw: Raw) {
        let (page, at) = self.place(number);
        self.ram.page_mut(page)[at..at + raw.len()].copy_from_slice(&raw);
    }

    /// The page of a counter and where in it the counter starts.
    fn place(&self, number: u64) -> (u64, usize) {
        let gpa = self.layout.counter_gpa(number);
        let at = (number % COUNTERS_PER_PAGE) as usize * COUNTER_BYTES;
        (gpa - at as u64, at)
    }
}
