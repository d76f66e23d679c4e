//! What the destination has been told of each frame, and what stands there.

use std::collections::{BTreeMap, BTreeSet};

use page::{Gfn, PageHash, REGION_PAGES, RegionId, ShortId};

use crate::error::ProtocolError;
use crate::manifest::{Entry, Layout};
use crate::memory_names::MemoryNames;
use crate::postcopy::ABSENT_NAME;
use crate::wire::Region;

/// What a record says about one frame, seen from what is already here.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Told {
    /// The frame awaited this id and does not any more.
    Renamed {
        /// The id.
        from: ShortId,
        /// The frame.
        gfn: Gfn,
    },
    /// A zero page; `write` if something else stands there.
    Zero {
        /// The frame.
        gfn: Gfn,
        /// See above.
        write: bool,
    },
    /// It is there already.
    InPlace,
    /// Another frame holds the same.
    Copy {
        /// Whence.
        from: Gfn,
        /// Where.
        to: Gfn,
    },
    /// It is not here.
    Missing {
        /// What to look for.
        id: ShortId,
        /// Where it belongs.
        gfn: Gfn,
        /// It was called a duplicate, so the source does not push it.
        duplicate: bool,
    },
}

/// A region's own bookkeeping.
#[derive(Debug, Clone, Default)]
struct RegionState {
    /// Frames whose content is not what was last announced.
    missing: u16,
    /// The root that was last announced.
    root: Option<PageHash>,
    /// The root matched.
    verified: bool,
    /// Full names have been asked for and not come.
    asked: bool,
}

/// Told and held, frame by frame.
#[derive(Debug)]
pub(super) struct Memory {
    /// What stands at each frame.
    held: MemoryNames,
    /// What was announced for each frame; `None` before the first round reached it.
    expected: Vec<Option<ShortId>>,
    /// Frames for which only this full name will do, after a short id led astray.
    strict: BTreeMap<Gfn, PageHash>,
    /// A frame for each short id that stands somewhere; checked against `held` when used.
    places: BTreeMap<ShortId, Gfn>,
    regions: Vec<RegionState>,
    unchecked: BTreeSet<RegionId>,
    zero: PageHash,
}

fn at(gfn: Gfn) -> usize {
    usize::try_from(gfn.0).expect("a frame of the layout, which is bounded by limits::REGIONS")
}

fn region_at(region: RegionId) -> usize {
    usize::try_from(region.0).expect("a region of the layout, which is bounded by limits::REGIONS")
}

impl Memory {
    /// Zeroed memory of which nothing has been announced.
    pub(super) fn new(layout: Layout, zero: PageHash) -> Self {
        let mut regions = vec![RegionState::default(); usize::try_from(layout.region_bound()).unwrap_or(0)];
        for region in layout.regions() {
            regions[region_at(region)].missing = u16::try_from(REGION_PAGES).expect("512");
        }
        Self {
            expected: vec![None; usize::try_from(layout.page_bound()).unwrap_or(0)],
            held: MemoryNames::new(layout, zero),
            strict: BTreeMap::new(),
            places: BTreeMap::new(),
            regions,
            unchecked: BTreeSet::new(),
            zero,
        }
    }

    fn layout(&self) -> &Layout {
        self.held.layout()
    }

    /// One more than the highest frame.
    pub(super) fn page_bound(&self) -> u64 {
        self.layout().page_bound()
    }

    /// Whether what was announced for the frame stands there.
    fn satisfied(&self, gfn: Gfn) -> bool {
        let held = self.held.get(gfn);
        match self.strict.get(&gfn) {
            Some(full) => held == Some(*full),
            None => held.map(|name| name.short()) == self.expected[at(gfn)] && held.is_some(),
        }
    }

    /// What the frame awaits, if it awaits anything.
    pub(super) fn awaited(&self, gfn: Gfn) -> Option<ShortId> {
        (self.layout().has(gfn.region()) && !self.satisfied(gfn)).then(|| self.expected[at(gfn)]).flatten()
    }

    /// Takes a record of the manifest.
    ///
    /// # Errors
    /// If it names what is not RAM, or a duplicate of what has not been named.
    pub(super) fn region(&mut self, record: &Region) -> Result<Vec<Told>, ProtocolError> {
        let region = record.region;
        if !self.layout().has(region) {
            return Err(ProtocolError::NoSuchRegion(region));
        }
        let mut told = Vec::with_capacity(record.entries.len());
        for (gfn, entry) in &record.entries {
            self.told(*gfn, *entry, &mut told)?;
        }
        let state = &mut self.regions[region_at(region)];
        state.root = Some(record.root);
        state.verified = false;
        state.asked = false;
        self.unchecked.insert(region);
        Ok(told)
    }

    fn told(&mut self, gfn: Gfn, entry: Entry, told: &mut Vec<Told>) -> Result<(), ProtocolError> {
        let id = match entry {
            Entry::Zero => self.zero.short(),
            Entry::Name(id) => id,
            Entry::Duplicate(of) => {
                if !self.layout().has(of.region()) {
                    return Err(ProtocolError::NotRam(of));
                }
                self.expected[at(of)].ok_or(ProtocolError::DanglingDuplicate(of))?
            }
        };
        let before = self.satisfied(gfn);
        if let Some(old) = self.awaited(gfn).filter(|old| *old != id) {
            told.push(Told::Renamed { from: old, gfn });
        }
        let awaited_same = self.awaited(gfn) == Some(id);
        self.strict.remove(&gfn);
        self.expected[at(gfn)] = Some(id);
        if entry == Entry::Zero {
            let write = self.held.get(gfn) != Some(self.zero);
            self.held.set(gfn, self.zero);
            told.push(Told::Zero { gfn, write });
        } else if self.satisfied(gfn) {
            told.push(Told::InPlace);
        } else if let Some((from, name)) = self.original(entry, id).or_else(|| self.place_of(id)) {
            self.held.set(gfn, name);
            told.push(Told::Copy { from, to: gfn });
            if awaited_same {
                told.push(Told::Renamed { from: id, gfn });
            }
        } else {
            if awaited_same {
                told.push(Told::Renamed { from: id, gfn });
            }
            let duplicate = matches!(entry, Entry::Duplicate(_));
            told.push(Told::Missing { id, gfn, duplicate });
        }
        self.count(gfn, before);
        Ok(())
    }

    /// The frame that `entry` calls its original, if `id` has come to stand there.
    fn original(&self, entry: Entry, id: ShortId) -> Option<(Gfn, PageHash)> {
        let of = match entry {
            Entry::Duplicate(of) => of,
            Entry::Zero | Entry::Name(_) => return None,
        };
        let name = self.held.get(of)?;
        (name.short() == id).then_some((of, name))
    }

    /// A frame where `id` stands now, if the last one that it came to has not changed since.
    fn place_of(&self, id: ShortId) -> Option<(Gfn, PageHash)> {
        let from = *self.places.get(&id)?;
        let name = self.held.get(from)?;
        (name.short() == id).then_some((from, name))
    }

    /// Keeps the region's count of missing frames after one that was satisfied or not may have changed.
    fn count(&mut self, gfn: Gfn, before: bool) {
        let after = self.satisfied(gfn);
        let missing = &mut self.regions[region_at(gfn.region())].missing;
        match (before, after) {
            (false, true) => *missing -= 1,
            (true, false) => *missing += 1,
            (true, true) | (false, false) => {}
        }
    }

    /// `name` has come for `gfn`; whether it is to be installed there.
    pub(super) fn install(&mut self, gfn: Gfn, name: PageHash) -> bool {
        let wanted = self.awaited(gfn) == Some(name.short()) && !self.strict.contains_key(&gfn);
        if wanted {
            self.set(gfn, name);
        }
        wanted
    }

    /// As [`Memory::install`], for a frame for which only one full name will do.
    pub(super) fn install_strictly(&mut self, gfn: Gfn, name: PageHash) -> bool {
        let wanted = self.strict.get(&gfn) == Some(&name) && !self.satisfied(gfn);
        if wanted {
            self.set(gfn, name);
        }
        wanted
    }

    fn set(&mut self, gfn: Gfn, name: PageHash) {
        let before = self.satisfied(gfn);
        self.held.set(gfn, name);
        self.places.insert(name.short(), gfn);
        self.unchecked.insert(gfn.region());
        self.count(gfn, before);
    }

    /// Checks a region's root if the region is complete. True if it does not match and full names are to be asked for.
    pub(super) fn check(&mut self, region: RegionId) -> bool {
        let state = &self.regions[region_at(region)];
        if state.missing > 0 || state.verified || state.asked {
            return false;
        }
        let Some(root) = state.root else { return false };
        let matches = self.held.region_root(region) == root;
        self.unchecked.remove(&region);
        let state = &mut self.regions[region_at(region)];
        state.verified = matches;
        state.asked = !matches;
        !matches
    }

    /// Regions that have changed since they were last checked.
    pub(super) fn take_unchecked(&mut self) -> BTreeSet<RegionId> {
        std::mem::take(&mut self.unchecked)
    }

    /// Whether full names or the literals after them are awaited.
    pub(super) fn awaits_names(&self) -> bool {
        self.regions.iter().any(|state| state.asked) || self.strict.keys().any(|gfn| !self.satisfied(*gfn))
    }

    /// Full names of a region: the frames whose content is wrong, to be asked of the source.
    ///
    /// # Errors
    /// If they do not give the region's root.
    pub(super) fn full_names(
        &mut self,
        region: RegionId,
        names: &[PageHash],
    ) -> Result<Vec<Gfn>, ProtocolError> {
        if !self.layout().has(region) {
            return Err(ProtocolError::NoSuchRegion(region));
        }
        let state = &mut self.regions[region_at(region)];
        if !state.asked {
            // A later record has come in between and is checked by its own root.
            return Ok(Vec::new());
        }
        state.asked = false;
        if state.root != Some(page::root_of(names)) {
            return Err(ProtocolError::NamesAgainstRoot(region));
        }
        let mut wrong = Vec::new();
        for (gfn, name) in (region.first().0..).map(Gfn).zip(names) {
            if self.held.get(gfn) != Some(*name) {
                let before = self.satisfied(gfn);
                self.strict.insert(gfn, *name);
                self.expected[at(gfn)] = Some(name.short());
                self.count(gfn, before);
                wrong.push(gfn);
            }
        }
        Ok(wrong)
    }

    /// These frames of a region are absent: what they awaited, they await no more. Returns that.
    ///
    /// # Errors
    /// If the region is not RAM.
    pub(super) fn absent(
        &mut self,
        region: RegionId,
        frames: &[Gfn],
        root: PageHash,
    ) -> Result<Vec<(ShortId, Gfn)>, ProtocolError> {
        if !self.layout().has(region) {
            return Err(ProtocolError::NoSuchRegion(region));
        }
        let mut awaited = Vec::new();
        for gfn in frames {
            awaited.extend(self.awaited(*gfn).map(|id| (id, *gfn)));
            let before = self.satisfied(*gfn);
            self.strict.remove(gfn);
            self.expected[at(*gfn)] = Some(ABSENT_NAME.short());
            self.held.set(*gfn, ABSENT_NAME);
            self.count(*gfn, before);
        }
        let state = &mut self.regions[region_at(region)];
        state.root = Some(root);
        state.verified = false;
        state.asked = false;
        self.unchecked.insert(region);
        Ok(awaited)
    }

    /// Frames whose content is not what was last announced, with that.
    pub(super) fn missing(&self) -> Vec<(Gfn, ShortId)> {
        let incomplete =
            self.layout().regions().filter(|region| self.regions[region_at(*region)].missing > 0);
        let frames = incomplete.flat_map(|region| (region.first().0..).take(REGION_PAGES).map(Gfn));
        frames.filter_map(|gfn| Some((gfn, self.awaited(gfn)?))).collect()
    }

    /// The source cannot send what full names asked for at this frame: whatever stands there, the region's root decides.
    pub(super) fn relax(&mut self, gfn: Gfn) {
        let before = self.satisfied(gfn);
        self.strict.remove(&gfn);
        self.count(gfn, before);
    }

    /// The regions that stand here as they were told, with the short form of their roots. Of every other region the record counts as not told.
    pub(super) fn keep_whole(&mut self) -> Vec<(RegionId, ShortId)> {
        let strict: Vec<Gfn> = self.strict.keys().copied().collect();
        strict.into_iter().for_each(|gfn| self.relax(gfn));
        let mut whole = Vec::new();
        for region in self.layout().clone().regions() {
            let state = &self.regions[region_at(region)];
            let complete = state.root.filter(|_| state.missing == 0);
            let here = complete.filter(|root| state.verified || self.held.region_root(region) == *root);
            let state = &mut self.regions[region_at(region)];
            state.root = here;
            state.verified = here.is_some();
            state.asked = false;
            whole.extend(here.map(|root| (region, root.short())));
        }
        self.unchecked.clear();
        whole
    }

    /// The root over all of RAM as it stands here.
    pub(super) fn root(&mut self) -> PageHash {
        self.held.root()
    }
}
