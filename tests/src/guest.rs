//! A model VM: a few regions of RAM, a guest that writes while it runs, and the dirty log as `Machine::take_dirty` gives it.

use migration_proto::{Extent, Layout};
use page::{Gfn, PageSet, RegionId};

use crate::palette::{CONTENTS, Content};
use crate::rng::Rng;

/// How the guest writes.
#[derive(Debug, Clone)]
pub(crate) struct Habits {
    /// Microseconds between two bursts.
    pub(crate) every: u64,
    /// Pages written in a burst, at most.
    pub(crate) burst: u64,
    /// How many frames it writes to.
    pub(crate) working_set: u64,
    /// Contents that it writes: `base..base + variety`.
    pub(crate) base: Content,
    pub(crate) variety: u16,
    /// Percent of writes that put the content before the last one back.
    pub(crate) back: u64,
    /// Percent of writes that zero the page.
    pub(crate) zero: u64,
    /// Percent of RAM that is not zero at the start.
    pub(crate) filled: u64,
}

impl Habits {
    pub(crate) fn draw(rng: &mut Rng) -> Self {
        let variety = u16::try_from(rng.pick(&[2, 6, 30, 200, 900])).unwrap_or(2);
        Self {
            every: rng.spread(4_000, 200_000),
            burst: rng.pick(&[0, 1, 2, 5, 20, 60]),
            working_set: rng.pick(&[1, 3, 10, 60, 400, 4000]),
            base: 1 + Content::try_from(rng.below(u64::from(CONTENTS - 1 - variety))).unwrap_or(0),
            variety,
            back: rng.pick(&[0, 20, 60]),
            zero: rng.pick(&[0, 5, 30]),
            filled: rng.pick(&[1, 10, 50, 100]),
        }
    }

    /// A guest that writes much, all over its memory.
    pub(crate) fn draw_busy(rng: &mut Rng) -> Self {
        Self {
            every: rng.spread(2_000, 20_000),
            burst: rng.pick(&[20, 60, 300]),
            working_set: rng.pick(&[60, 400, 4000]),
            filled: rng.pick(&[50, 100]),
            ..Self::draw(rng)
        }
    }

    fn content(&self, rng: &mut Rng) -> Content {
        if rng.chance(self.zero) {
            return 0;
        }
        self.base + Content::try_from(rng.below(u64::from(self.variety))).unwrap_or(0)
    }
}

/// RAM in two to four regions, sometimes with a hole.
pub(crate) fn draw_layout(rng: &mut Rng) -> Layout {
    let extent = |first, regions| Extent { first: RegionId(first), regions };
    let extents = match rng.below(6) {
        0 => vec![extent(0, 1), extent(2, 1)],
        1 => vec![extent(1, 2), extent(4, 1)],
        2 => vec![extent(0, 4)],
        3 => vec![extent(0, 1)],
        _ => vec![extent(0, 2)],
    };
    Layout::new(extents).expect("ascending extents that do not overlap")
}

/// What stands at every frame below the layout's bound.
pub(crate) type Image = Vec<Content>;

/// An image of zero pages.
pub(crate) fn zeroed(layout: &Layout) -> Image {
    vec![0; place(Gfn(layout.page_bound()))]
}

/// A frame's place in an image.
pub(crate) fn place(gfn: Gfn) -> usize {
    usize::try_from(gfn.0).expect("a model VM has few pages")
}

/// The VM in the source's process.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) layout: Layout,
    habits: Habits,
    frames: Vec<Gfn>,
    pages: Image,
    before: Image,
    dirty: PageSet,
    logging: bool,
    /// Whether its virtual CPUs run.
    pub(crate) running: bool,
    /// Percent of the time that they rest all the same.
    pub(crate) throttle: u8,
}

impl Guest {
    pub(crate) fn new(rng: &mut Rng, layout: Layout, habits: Habits) -> Self {
        let frames: Vec<Gfn> = (0..layout.page_bound()).map(Gfn).filter(|g| layout.has(g.region())).collect();
        let mut pages = zeroed(&layout);
        for gfn in &frames {
            if rng.chance(habits.filled) {
                pages[place(*gfn)] = habits.content(rng);
            }
        }
        let dirty = PageSet::empty(layout.page_bound());
        let before = pages.clone();
        Self { before, layout, habits, frames, pages, dirty, logging: false, running: true, throttle: 0 }
    }

    /// A burst of writes, if the virtual CPUs run.
    pub(crate) fn burst(&mut self, rng: &mut Rng) {
        let rests = self.throttle > 0 && rng.chance(u64::from(self.throttle));
        if !self.running || rests {
            return;
        }
        for _ in 0..rng.below(self.habits.burst + 1) {
            // A working set of few frames, spread over all of RAM.
            let set = self.frames.len().min(usize::try_from(self.habits.working_set).unwrap_or(1));
            let gfn = self.frames[rng.index(set) * (self.frames.len() / set)];
            let content =
                if rng.chance(self.habits.back) { self.before[place(gfn)] } else { self.habits.content(rng) };
            self.write(gfn, content);
        }
    }

    fn write(&mut self, gfn: Gfn, content: Content) {
        let at = place(gfn);
        self.before[at] = std::mem::replace(&mut self.pages[at], content);
        if self.logging {
            self.dirty.insert(gfn);
        }
    }

    pub(crate) fn interval(&self) -> u64 {
        self.habits.every
    }

    pub(crate) fn read(&self, gfn: Gfn) -> Content {
        self.pages[place(gfn)]
    }

    pub(crate) fn image(&self) -> &Image {
        &self.pages
    }

    pub(crate) fn start_dirty_log(&mut self) {
        self.dirty = PageSet::empty(self.layout.page_bound());
        self.logging = true;
    }

    pub(crate) fn take_dirty(&mut self) -> PageSet {
        std::mem::replace(&mut self.dirty, PageSet::empty(self.layout.page_bound()))
    }

    pub(crate) fn stop_dirty_log(&mut self) {
        self.logging = false;
    }
}
