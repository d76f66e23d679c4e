//! The host's own index: which of its contents has a page, by the page's short id.
//!
//! An entry costs 16 bytes and the table's slack. Besides it, each content keeps the id of each of its pages (8 bytes), so that a
//! rescan replaces what changed and a removed content gives way to others that hold the same pages.

use std::{
    collections::{BTreeMap, HashMap, HashSet, hash_map::Entry},
    hash::{BuildHasherDefault, Hasher},
    num::NonZeroU64,
};

use page::{Gfn, PageSet, ShortId};

use crate::limits::RESERVED_NAMES;

/// One of this host's memories or files.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ContentId(pub u32);

/// Where a page stands: a content and a page number in it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Place {
    /// The content.
    pub content: ContentId,
    /// The page's number within it.
    pub page: u32,
}

/// Short ids are the front of keyed SHA-256 names of content that this host itself hashed: they are their own hash.
#[derive(Default, Debug)]
pub(crate) struct IdHasher(u64);

impl Hasher for IdHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(*byte);
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = value;
    }
}

/// A content on its way out of the index.
#[derive(Debug)]
pub struct Leaving {
    content: ContentId,
    names: std::vec::IntoIter<Option<NonZeroU64>>,
    /// Names that have no place any more.
    lost: HashSet<ShortId, BuildHasherDefault<IdHasher>>,
    /// Where to look on for places of theirs.
    next: Place,
}

/// The index. Pure: it reads no content.
#[derive(Debug, Default)]
pub struct HostIndex {
    places: HashMap<ShortId, Place, BuildHasherDefault<IdHasher>>,
    contents: BTreeMap<ContentId, Indexed>,
}

#[derive(Debug)]
struct Indexed {
    names: Vec<Option<NonZeroU64>>,
    /// How many of them there are.
    named: u64,
    /// Files and checkpoints keep their pages, memories do not: a place that lasts wins over a memory's.
    lasting: bool,
    /// Pages of a memory that had another name when they were looked at before: they may change again at once.
    unsettled: PageSet,
}

impl Indexed {
    fn settled(&self, page: u32) -> bool {
        !self.unsettled.contains(Gfn(page.into()))
    }
}

/// Whether a content's pages were looked at before.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Look {
    /// Their first scan: nothing is known of how long they stay.
    First,
    /// A later one.
    Again,
}

impl HostIndex {
    /// Makes room for a content of `pages` pages; `lasting` says that its pages are not expected to change.
    pub fn add_content(&mut self, content: ContentId, pages: u32, lasting: bool) {
        let names = vec![None; pages as usize];
        let unsettled = PageSet::empty(if lasting { 0 } else { pages.into() });
        if lasting {
            // Nearly all of its pages will have a name: the table does not grow step by step under them.
            self.places.reserve((pages as usize).min(RESERVED_NAMES));
        }
        self.contents.insert(content, Indexed { names, named: 0, lasting, unsettled });
    }

    /// Begins to take a content out; [`HostIndex::step`] goes on with it. Pages that others hold too stay findable there. `None` for an
    /// unknown content.
    pub fn leave(&mut self, content: ContentId) -> Option<Leaving> {
        let names = self.contents.remove(&content)?.names.into_iter();
        let next = Place { content: ContentId(0), page: 0 };
        Some(Leaving { content, names, lost: HashSet::default(), next })
    }

    /// Takes out some names of a content that leaves, at most as many as said; or finds places elsewhere for names that lost theirs, looking at
    /// as many. Says whether all is done.
    pub fn step(&mut self, leaving: &mut Leaving, names: usize) -> bool {
        let Leaving { content, names: left, lost, next } = leaving;
        let before = left.len();
        for id in left.by_ref().take(names).flatten().map(|name| ShortId(name.get())) {
            if self.places.get(&id).is_some_and(|place| place.content == *content) {
                self.places.remove(&id);
                lost.insert(id);
            }
        }
        let mut room = names - (before - left.len()).min(names);
        if room == 0 || lost.is_empty() {
            return left.len() == 0 && lost.is_empty();
        }
        for (content, indexed) in self.contents.range(next.content..) {
            let from = if *content == next.content { next.page } else { 0 };
            for (name, page) in indexed.names.iter().zip(0u32..).skip(from as usize) {
                if room == 0 {
                    *next = Place { content: *content, page };
                    return false;
                }
                room -= 1;
                if let Some(id) = name.map(|name| ShortId(name.get())).filter(|id| lost.contains(id)) {
                    self.places.entry(id).or_insert(Place { content: *content, page });
                }
            }
        }
        true
    }

    /// Notes the ids of the pages from `first` on, as just read; `None` is a page that is not indexed (a zero page). Returns how many of them
    /// changed. Names that became worth announcing are appended to `added`: those that the host did not have before, but of a memory's page
    /// that changed only once two looks in a row have seen the same. Unknown contents (just removed) are ignored.
    pub fn update(
        &mut self,
        content: ContentId,
        first: u32,
        ids: &[Option<ShortId>],
        look: Look,
        added: &mut Vec<ShortId>,
    ) -> u32 {
        let Some(indexed) = self.contents.get_mut(&content) else { return 0 };
        let (lasting, mut changed, mut elsewhere) = (indexed.lasting, 0, Vec::new());
        let from = first as usize;
        for ((name, id), page) in indexed.names.iter_mut().skip(from).zip(ids).zip(first..) {
            let place = Place { content, page };
            let now = id.and_then(|id| NonZeroU64::new(id.0));
            let same = *name == now;
            changed += u32::from(!same);
            indexed.named = indexed.named - u64::from(name.is_some()) + u64::from(now.is_some());
            if let Some(before) = name.filter(|_| !same).map(|name| ShortId(name.get()))
                && self.places.get(&before) == Some(&place)
            {
                self.places.remove(&before);
            }
            *name = now;
            let settles = indexed.unsettled.remove(Gfn(page.into()));
            let unsettled = look == Look::Again && !lasting && !same && now.is_some();
            if unsettled {
                indexed.unsettled.insert(Gfn(page.into()));
            }
            let Some(now) = now.map(|id| ShortId(id.get())) else { continue };
            // One look at the table: it is far larger than a cache, and this is where a scan's time beside hashing goes.
            match self.places.entry(now) {
                Entry::Vacant(free) => {
                    free.insert(place);
                    added.extend((!unsettled).then_some(now));
                }
                Entry::Occupied(taken) if *taken.get() == place => {
                    added.extend((settles && !unsettled).then_some(now));
                }
                Entry::Occupied(taken) if !unsettled => elsewhere.push((now, place, *taken.get())),
                Entry::Occupied(_) => {}
            }
        }
        for (id, place, other) in elsewhere {
            let other = self
                .contents
                .get(&other.content)
                .map(|indexed| (indexed.lasting, indexed.settled(other.page)));
            match other {
                // A name stands at a page that keeps it, if there is one.
                Some((true, true)) => {}
                Some((false, true)) if !lasting => {}
                Some((false, true)) => drop(self.places.insert(id, place)),
                Some((_, false)) | None => {
                    self.places.insert(id, place);
                    added.push(id);
                }
            }
        }
        changed
    }

    /// Whether a name is one to announce: the host has it, at a page that was not just changed.
    #[must_use]
    pub fn settled(&self, id: ShortId) -> bool {
        let settled = |place: Place| {
            self.contents.get(&place.content).is_some_and(|indexed| indexed.settled(place.page))
        };
        self.place(id).is_some_and(settled)
    }

    /// Where the page of `id` was when it was last read.
    #[must_use]
    pub fn place(&self, id: ShortId) -> Option<Place> {
        self.places.get(&id).copied()
    }

    /// Whether a content that keeps its pages has the page of `id`.
    #[must_use]
    pub fn lasts(&self, id: ShortId) -> bool {
        self.place(id)
            .and_then(|place| self.contents.get(&place.content))
            .is_some_and(|indexed| indexed.lasting)
    }

    /// Forgets that `place` has `id`: it was read and has something else.
    pub fn forget(&mut self, id: ShortId, place: Place) {
        if self.places.get(&id) == Some(&place) {
            self.places.remove(&id);
        }
        let Some(indexed) = self.contents.get_mut(&place.content) else { return };
        let name = usize::try_from(place.page).ok().and_then(|page| indexed.names.get_mut(page));
        if let Some(name) = name.filter(|name| name.is_some_and(|n: NonZeroU64| n.get() == id.0)) {
            *name = None;
            indexed.named -= 1;
        }
    }

    /// Distinct names.
    #[must_use]
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Pages of a content that have a name.
    #[must_use]
    pub fn indexed_pages(&self, content: ContentId) -> u64 {
        self.contents.get(&content).map_or(0, |indexed| indexed.named)
    }

    /// All ids, in no order.
    pub fn ids(&self) -> impl Iterator<Item = ShortId> + '_ {
        self.places.keys().copied()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ids(values: &[u64]) -> Vec<Option<ShortId>> {
        values.iter().map(|v| (*v != 0).then_some(ShortId(*v))).collect()
    }

    #[test]
    fn a_changed_page_loses_its_old_name_and_a_removed_content_gives_way_to_others() {
        let (mut index, mut added) = (HostIndex::default(), Vec::new());
        let (memory, file) = (ContentId(1), ContentId(2));
        index.add_content(memory, 3, false);
        index.add_content(file, 2, true);
        index.update(memory, 0, &ids(&[5, 6, 0]), Look::First, &mut added);
        index.update(file, 0, &ids(&[6, 7]), Look::First, &mut added);
        assert_eq!(added, [ShortId(5), ShortId(6), ShortId(7)]);
        assert_eq!(index.place(ShortId(6)), Some(Place { content: file, page: 0 }), "a file's place wins");
        index.update(memory, 0, &ids(&[8]), Look::Again, &mut added);
        assert_eq!(index.place(ShortId(5)), None);
        let mut leaving = index.leave(file).unwrap();
        // In steps as small as can be, and it comes to its end.
        while !index.step(&mut leaving, 1) {}
        assert!(index.leave(file).is_none());
        assert_eq!(index.place(ShortId(6)), Some(Place { content: memory, page: 1 }));
        assert_eq!(index.place(ShortId(7)), None);
    }

    #[test]
    fn a_changed_page_is_announced_once_two_looks_saw_the_same() {
        let mut index = HostIndex::default();
        let vm = ContentId(1);
        index.add_content(vm, 3, false);
        let mut look = |values: &[u64], look| {
            let mut added = Vec::new();
            let changed = index.update(vm, 0, &ids(values), look, &mut added);
            (changed, added.iter().map(|id| id.0).collect::<Vec<_>>())
        };
        assert_eq!(look(&[1, 2, 0], Look::First), (2, vec![1, 2]));
        assert_eq!(look(&[3, 2, 0], Look::Again), (1, vec![]));
        assert_eq!(look(&[4, 2, 5], Look::Again), (2, vec![]));
        assert_eq!(look(&[4, 2, 6], Look::Again), (1, vec![4]));
        // What moves to a page that is settled is announced there.
        assert_eq!(look(&[4, 2, 6], Look::Again), (0, vec![6]));
        assert_eq!(look(&[4, 2, 6], Look::Again), (0, vec![]));
        assert_eq!(look(&[7, 2, 4], Look::Again), (2, vec![]));
        let index = index;
        assert!(index.place(ShortId(7)).is_some() && !index.settled(ShortId(7)), "found here, not announced");
        assert!(index.settled(ShortId(2)));
    }

    #[test]
    fn a_name_that_just_appeared_in_one_memory_is_announced_if_another_keeps_it() {
        let (mut index, mut added) = (HostIndex::default(), Vec::new());
        let (busy, twin) = (ContentId(1), ContentId(2));
        index.add_content(busy, 1, false);
        index.update(busy, 0, &ids(&[1]), Look::First, &mut added);
        index.update(busy, 0, &ids(&[2]), Look::Again, &mut added);
        assert_eq!(added, [ShortId(1)]);
        index.add_content(twin, 1, false);
        index.update(twin, 0, &ids(&[2]), Look::First, &mut added);
        assert_eq!(added, [ShortId(1), ShortId(2)]);
        assert_eq!(index.place(ShortId(2)), Some(Place { content: twin, page: 0 }));
    }

    proptest! {
        /// Whatever was scanned in whatever order, a full rescan leaves exactly the names that are there, each at a place that has it.
        #[test]
        fn after_a_rescan_the_index_says_what_the_contents_hold(
            rounds in prop::collection::vec(prop::collection::vec(0u64..6, 8), 1..6),
        ) {
            let mut index = HostIndex::default();
            let contents = [ContentId(0), ContentId(1)];
            contents.iter().for_each(|c| index.add_content(*c, 4, c.0 == 1));
            for round in &rounds {
                for (at, content) in contents.iter().enumerate() {
                    index.update(*content, 0, &ids(&round[at * 4..at * 4 + 4]), Look::Again, &mut Vec::new());
                }
            }
            let last = rounds.last().unwrap();
            // A name that lost its place comes back with the rescan of a content that still has it.
            for (at, content) in contents.iter().enumerate() {
                index.update(*content, 0, &ids(&last[at * 4..at * 4 + 4]), Look::Again, &mut Vec::new());
            }
            for id in 1u64..6 {
                match index.place(ShortId(id)) {
                    Some(place) => {
                        prop_assert_eq!(last[(place.content.0 * 4 + place.page) as usize], id);
                    }
                    None => prop_assert!(!last.contains(&id)),
                }
            }
        }

        /// What is to be announced, and was not before, is told once it is so: nobody waits for a renewal.
        #[test]
        fn whatever_becomes_worth_announcing_is_noted(
            rounds in prop::collection::vec((0usize..3, prop::collection::vec(0u64..6, 4), any::<bool>()), 1..12),
        ) {
            let mut index = HostIndex::default();
            let mut looked = [Look::First; 3];
            (0..3).for_each(|c| index.add_content(ContentId(c), 4, c == 1));
            for (at, values, forget) in rounds {
                let before: Vec<u64> = (1..6).filter(|id| index.settled(ShortId(*id))).collect();
                let mut added = Vec::new();
                let look = std::mem::replace(&mut looked[at], Look::Again);
                index.update(ContentId(u32::try_from(at).unwrap()), 0, &ids(&values), look, &mut added);
                for id in (1..6).filter(|id| index.settled(ShortId(*id)) && !before.contains(id)) {
                    prop_assert!(added.contains(&ShortId(id)), "{id} of {added:?}");
                }
                prop_assert!(added.iter().all(|id| index.settled(*id)));
                if let Some(place) = index.place(ShortId(1)).filter(|_| forget) {
                    index.forget(ShortId(1), place);
                }
            }
        }
    }
}
