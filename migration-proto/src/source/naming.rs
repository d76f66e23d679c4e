//! The names of what is absent at the destination: which the source knows, which it has told over this connection, and which region comes next.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use page::{Gfn, PageHash, PageSet, REGION_PAGES, RegionId};

use crate::limits;
use crate::postcopy::FullName;

/// What is to be done next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Name these frames.
    Hash { region: RegionId, pages: Vec<Gfn> },
    /// Tell these names.
    Tell { region: RegionId, entries: Vec<(Gfn, FullName)> },
    /// Send this page before all else.
    Fault(Gfn),
}

/// See the module's head.
#[derive(Debug)]
pub(super) struct Naming {
    absent: PageSet,
    zero: PageHash,
    /// Names of absent frames. Memory does not change any more, so a name once known stands.
    names: BTreeMap<Gfn, PageHash>,
    /// Regions to tell over this connection.
    queue: BTreeSet<RegionId>,
    /// Those near recent faults, the latest first; each counts only while it is in `queue`.
    near: VecDeque<RegionId>,
    /// Where the walk through `queue` goes on.
    next: RegionId,
    /// Regions under way, and whether to tell them when they come.
    hashing: BTreeMap<RegionId, bool>,
    /// The frame that a name was told for over this connection.
    told: BTreeMap<PageHash, Gfn>,
    /// Faults that wait for room, and the same as a set.
    faults: VecDeque<Gfn>,
    waiting: BTreeSet<Gfn>,
    /// Faults that this connection brought: their answers carry their names.
    answered: BTreeSet<Gfn>,
    sending: usize,
}

/// How many regions near faults are remembered.
const NEAR_REGIONS: usize = 64;

impl Naming {
    /// All regions with absent frames are to be told.
    pub(super) fn new(absent: PageSet, zero: PageHash) -> Self {
        let queue = absent.iter().map(Gfn::region).collect();
        Self {
            absent,
            zero,
            names: BTreeMap::new(),
            queue,
            near: VecDeque::new(),
            next: RegionId(0),
            hashing: BTreeMap::new(),
            told: BTreeMap::new(),
            faults: VecDeque::new(),
            waiting: BTreeSet::new(),
            answered: BTreeSet::new(),
            sending: 0,
        }
    }

    /// Of these frames every name is known. The destination will ask for what it lacks.
    pub(super) fn known(bound: u64, names: BTreeMap<Gfn, PageHash>, zero: PageHash) -> Self {
        let mut absent = PageSet::empty(bound);
        names.keys().for_each(|gfn| {
            absent.insert(*gfn);
        });
        let mut naming = Self { names, ..Self::new(absent, zero) };
        naming.cut();
        naming
    }

    /// Whether the destination was told that the frame is absent.
    pub(super) fn has(&self, gfn: Gfn) -> bool {
        self.absent.contains(gfn)
    }

    /// The name of an absent frame, if it is known.
    pub(super) fn name(&self, gfn: Gfn) -> Option<PageHash> {
        self.names.get(&gfn).copied()
    }

    /// The connection is lost, and what was said over it may be. The destination will ask for what it lacks.
    pub(super) fn cut(&mut self) {
        self.queue.clear();
        self.near.clear();
        self.told.clear();
        self.faults.clear();
        self.waiting.clear();
        self.answered.clear();
        self.hashing.values_mut().for_each(|tell| *tell = false);
    }

    /// Work that was given out may never come back.
    pub(super) fn lost_work(&mut self) {
        self.hashing.clear();
        self.sending = 0;
    }

    /// The destination lacks names of this region.
    pub(super) fn wanted(&mut self, region: RegionId) {
        match self.hashing.get_mut(&region) {
            Some(tell) => *tell = true,
            None => {
                self.queue.insert(region);
            }
        }
    }

    /// A virtual CPU waits for this absent frame.
    pub(super) fn fault(&mut self, gfn: Gfn) {
        self.answered.insert(gfn);
        if self.waiting.insert(gfn) {
            self.faults.push_back(gfn);
            self.near.push_front(gfn.region());
            self.near.truncate(NEAR_REGIONS);
        }
    }

    /// A page has been sent for a fault, under this name.
    pub(super) fn fault_sent(&mut self, gfn: Gfn, name: PageHash) {
        self.sending = self.sending.saturating_sub(1);
        if self.has(gfn) {
            self.names.insert(gfn, name);
        }
    }

    /// Names have come: the region's entries, if they are to be told.
    pub(super) fn hashed(&mut self, region: RegionId, pages: &[(Gfn, PageHash)]) -> Option<Step> {
        self.names.extend(pages.iter().filter(|(gfn, _)| self.absent.contains(*gfn)).copied());
        let tell = self.hashing.remove(&region)?;
        tell.then(|| self.tell(region))
    }

    /// The next thing to do, within the windows.
    pub(super) fn step(&mut self) -> Option<Step> {
        if self.sending < limits::FAULT_WINDOW_PAGES
            && let Some(gfn) = self.faults.pop_front()
        {
            self.waiting.remove(&gfn);
            self.sending += 1;
            return Some(Step::Fault(gfn));
        }
        if self.hashing.len() >= limits::HASH_WINDOW_REGIONS {
            return None;
        }
        let region = self.next_region()?;
        let unknown = |gfn: &Gfn| self.absent.contains(*gfn) && !self.names.contains_key(gfn);
        let pages: Vec<Gfn> = frames(region).filter(unknown).collect();
        if pages.is_empty() {
            return Some(self.tell(region));
        }
        self.hashing.insert(region, true);
        Some(Step::Hash { region, pages })
    }

    fn next_region(&mut self) -> Option<RegionId> {
        while let Some(region) = self.near.pop_front() {
            if self.queue.remove(&region) {
                return Some(region);
            }
        }
        let region = self.queue.range(self.next..).next().or_else(|| self.queue.first()).copied()?;
        self.queue.remove(&region);
        self.next = RegionId(region.0 + 1);
        Some(region)
    }

    fn tell(&mut self, region: RegionId) -> Step {
        let mut entries = Vec::new();
        for gfn in frames(region).filter(|gfn| !self.answered.contains(gfn)) {
            let Some(name) = self.names.get(&gfn).copied() else { continue };
            let entry = if name == self.zero {
                FullName::Zero
            } else {
                match *self.told.entry(name).or_insert(gfn) {
                    of if of == gfn => FullName::Name(name),
                    of => FullName::Duplicate(of),
                }
            };
            entries.push((gfn, entry));
        }
        Step::Tell { region, entries }
    }
}

fn frames(region: RegionId) -> impl Iterator<Item = Gfn> {
    (region.first().0..).take(REGION_PAGES).map(Gfn)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ZERO: PageHash = PageHash([0; 32]);

    fn name(n: u8) -> PageHash {
        PageHash([n; 32])
    }

    fn naming(frames: &[u64]) -> Naming {
        let mut absent = PageSet::empty(512 * 8);
        frames.iter().for_each(|gfn| assert!(absent.insert(Gfn(*gfn))));
        Naming::new(absent, ZERO)
    }

    #[test]
    fn the_region_of_a_fault_is_named_next() {
        let mut naming = naming(&[1, 600, 1100, 3000]);
        naming.fault(Gfn(3000));
        naming.fault(Gfn(3000));
        assert_eq!(naming.step(), Some(Step::Fault(Gfn(3000))));
        let hashes: Vec<_> = std::iter::from_fn(|| naming.step()).collect();
        let order: Vec<_> = hashes
            .iter()
            .map(|step| if let Step::Hash { region, .. } = step { region.0 } else { panic!("{step:?}") })
            .collect();
        assert_eq!(order, [5, 0, 1, 2], "once each, the fault's first");
    }

    #[test]
    fn a_duplicate_refers_to_what_was_told_over_this_connection() {
        let mut naming = naming(&[1, 2, 3, 600]);
        while naming.step().is_some() {}
        let told = naming.hashed(RegionId(0), &[(Gfn(1), name(7)), (Gfn(2), ZERO), (Gfn(3), name(7))]);
        let entries = vec![
            (Gfn(1), FullName::Name(name(7))),
            (Gfn(2), FullName::Zero),
            (Gfn(3), FullName::Duplicate(Gfn(1))),
        ];
        assert_eq!(told, Some(Step::Tell { region: RegionId(0), entries }));
        naming.cut();
        assert_eq!(
            naming.hashed(RegionId(1), &[(Gfn(600), name(7))]),
            None,
            "the destination will ask for it"
        );
        assert_eq!(naming.step(), None);
        naming.wanted(RegionId(1));
        let entries = vec![(Gfn(600), FullName::Name(name(7)))];
        assert_eq!(
            naming.step(),
            Some(Step::Tell { region: RegionId(1), entries }),
            "known: not hashed again"
        );
    }

    #[test]
    fn lost_work_is_done_again_when_it_is_asked_for() {
        let mut naming = naming(&[1]);
        assert!(matches!(naming.step(), Some(Step::Hash { .. })));
        naming.cut();
        naming.lost_work();
        naming.wanted(RegionId(0));
        assert!(matches!(naming.step(), Some(Step::Hash { .. })));
    }
}
