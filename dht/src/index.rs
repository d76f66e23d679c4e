//! The host's own index: which of its contents has a page, by the page's short id.
//!
//! An entry costs 16 bytes and the table's slack. Besides it, each content keeps the id of each of its pages (8 bytes), so that a
//! rescan replaces what changed and a removed content gives way to others that hold the same pages.

use std::{
    collections::{BTreeMap, HashMap},
    hash::{BuildHasherDefault, Hasher},
};

use page::ShortId;

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

/// The index. Pure: it reads no content.
#[derive(Debug, Default)]
pub struct HostIndex {
    places: HashMap<ShortId, Place, BuildHasherDefault<IdHasher>>,
    contents: BTreeMap<ContentId, Indexed>,
}

#[derive(Debug)]
struct Indexed {
    names: Vec<Option<std::num::NonZeroU64>>,
    /// Files keep their pages, memories do not: a file's place wins over a memory's.
    lasting: bool,
}

impl HostIndex {
    /// Makes room for a content of `pages` pages; `lasting` says that its pages are not expected to change.
    pub fn add_content(&mut self, content: ContentId, pages: u32, lasting: bool) {
        let names = vec![None; pages as usize];
        self.contents.insert(content, Indexed { names, lasting });
    }

    /// Takes a content out; pages that others hold too stay findable there.
    pub fn remove_content(&mut self, content: ContentId) {
        if self.contents.remove(&content).is_none() {
            return;
        }
        self.places.retain(|_, place| place.content != content);
        self.refill();
    }

    /// Finds places for names that lost theirs but stand elsewhere.
    fn refill(&mut self) {
        for (content, indexed) in &self.contents {
            for (name, page) in indexed.names.iter().zip(0u32..) {
                if let Some(name) = name {
                    let place = Place { content: *content, page };
                    self.places.entry(ShortId(name.get())).or_insert(place);
                }
            }
        }
    }

    /// Notes the ids of the pages from `first` on, as just read; `None` is a page that is not indexed (a zero page).
    /// Ids that the host did not have before are appended to `added`. Unknown contents (just removed) are ignored.
    pub fn update(
        &mut self,
        content: ContentId,
        first: u32,
        ids: &[Option<ShortId>],
        added: &mut Vec<ShortId>,
    ) {
        let Some(indexed) = self.contents.get_mut(&content) else { return };
        let lasting = indexed.lasting;
        let mut displaced = Vec::new();
        let from = first as usize;
        for ((name, id), page) in indexed.names.iter_mut().skip(from).zip(ids).zip(first..) {
            let place = Place { content, page };
            let now = id.and_then(|id| std::num::NonZeroU64::new(id.0));
            if let Some(before) = name.filter(|before| Some(*before) != now) {
                let before = ShortId(before.get());
                if self.places.get(&before) == Some(&place) {
                    self.places.remove(&before);
                }
            }
            *name = now;
            let Some(now) = now.map(|id| ShortId(id.get())) else { continue };
            match self.places.get(&now).copied() {
                None => {
                    self.places.insert(now, place);
                    added.push(now);
                }
                Some(other) if lasting && other.content != content => displaced.push((now, place, other)),
                Some(_) => {}
            }
        }
        for (id, place, other) in displaced {
            if self.contents.get(&other.content).is_none_or(|indexed| !indexed.lasting) {
                self.places.insert(id, place);
            }
        }
    }

    /// Where the page of `id` was when it was last read.
    #[must_use]
    pub fn place(&self, id: ShortId) -> Option<Place> {
        self.places.get(&id).copied()
    }

    /// Forgets that `place` has `id`: it was read and has something else.
    pub fn forget(&mut self, id: ShortId, place: Place) {
        if self.places.get(&id) == Some(&place) {
            self.places.remove(&id);
        }
        let name = self
            .contents
            .get_mut(&place.content)
            .and_then(|indexed| indexed.names.get_mut(usize::try_from(place.page).ok()?));
        if let Some(name) = name.filter(|name| name.is_some_and(|n| n.get() == id.0)) {
            *name = None;
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
        self.contents.get(&content).map_or(0, |c| c.names.iter().flatten().count() as u64)
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
        index.update(memory, 0, &ids(&[5, 6, 0]), &mut added);
        index.update(file, 0, &ids(&[6, 7]), &mut added);
        assert_eq!(added, [ShortId(5), ShortId(6), ShortId(7)]);
        assert_eq!(index.place(ShortId(6)), Some(Place { content: file, page: 0 }), "a file's place wins");
        index.update(memory, 0, &ids(&[8]), &mut added);
        assert_eq!(index.place(ShortId(5)), None);
        index.remove_content(file);
        assert_eq!(index.place(ShortId(6)), Some(Place { content: memory, page: 1 }));
        assert_eq!(index.place(ShortId(7)), None);
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
                    index.update(*content, 0, &ids(&round[at * 4..at * 4 + 4]), &mut Vec::new());
                }
            }
            let last = rounds.last().unwrap();
            // A name that lost its place comes back with the rescan of a content that still has it.
            for (at, content) in contents.iter().enumerate() {
                index.update(*content, 0, &ids(&last[at * 4..at * 4 + 4]), &mut Vec::new());
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
    }
}
