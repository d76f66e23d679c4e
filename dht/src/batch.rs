//! Pages in one buffer, each with the id it was asked by: from the file or the network to the next socket without a copy a page.

use std::fmt;

use page::{PAGE_SIZE, Page, ShortId};

/// Pages of a holder, or of an answer.
#[derive(Default)]
pub struct PageBatch {
    buffer: Vec<u8>,
    /// The ids, and the place of each page among the buffer's, ascending.
    pages: Vec<(ShortId, u32)>,
}

impl PageBatch {
    /// Room for so many pages.
    #[must_use]
    pub fn with_capacity(pages: usize) -> Self {
        Self { buffer: vec![0; pages * PAGE_SIZE], pages: Vec::with_capacity(pages) }
    }

    /// Those of the pages in `buffer`, one after the other, that are named with their ids and places, ascending.
    ///
    /// # Panics
    /// If there is no page at one of the places, or they do not ascend.
    #[must_use]
    pub fn of_buffer(buffer: Vec<u8>, pages: Vec<(ShortId, u32)>) -> Self {
        assert!(pages.is_sorted_by(|(_, a), (_, b)| a < b), "the places ascend");
        let last = pages.last().map_or(0, |(_, number)| *number as usize + 1);
        assert!(buffer.len() >= last * PAGE_SIZE, "each id has its page");
        Self { buffer, pages }
    }

    /// Takes all pages out; the room stays.
    pub fn clear(&mut self) {
        self.pages.clear();
    }

    /// Adds those of a run of pages that `keep` wants, after `fill` has written all of them into place; none if `fill` returns
    /// `false`. Grows if there is no room left.
    pub fn add_run(
        &mut self,
        ids: impl ExactSizeIterator<Item = ShortId>,
        fill: impl FnOnce(&mut [u8]) -> bool,
        mut keep: impl FnMut(ShortId, &Page) -> bool,
    ) -> bool {
        let first = self.pages.last().map_or(0, |(_, number)| number + 1);
        let at = first as usize * PAGE_SIZE;
        let end = at + ids.len() * PAGE_SIZE;
        if self.buffer.len() < end {
            self.buffer.resize(end, 0);
        }
        if !fill(&mut self.buffer[at..end]) {
            return false;
        }
        let bytes = self.buffer[at..end].as_chunks::<PAGE_SIZE>().0;
        let kept = ids.zip(bytes).zip(first..).filter(|((id, page), _)| keep(*id, page));
        self.pages.extend(kept.map(|((id, _), number)| (id, number)));
        true
    }

    /// Takes the pages of another batch, without a copy if it has none itself.
    pub fn append(&mut self, other: Self) {
        if self.is_empty() {
            *self = other;
        } else {
            self.extend(other.iter().map(|(id, page)| (id, *page)));
        }
    }

    /// How many pages.
    #[must_use]
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// The ids.
    pub fn ids(&self) -> impl ExactSizeIterator<Item = ShortId> + '_ {
        self.pages.iter().map(|(id, _)| *id)
    }

    /// The pages.
    pub fn iter(&self) -> impl Iterator<Item = (ShortId, &Page)> + '_ {
        let all = self.buffer.as_chunks::<PAGE_SIZE>().0;
        self.pages.iter().map(move |(id, number)| (*id, &all[*number as usize]))
    }

    /// Changes the pages' bytes.
    pub fn for_each_mut(&mut self, mut change: impl FnMut(&mut Page)) {
        let all = self.buffer.as_chunks_mut::<PAGE_SIZE>().0;
        self.pages.iter().for_each(|(_, number)| change(&mut all[*number as usize]));
    }

    /// Keeps the pages that `keep` wants.
    pub fn retain(&mut self, mut keep: impl FnMut(ShortId, &Page) -> bool) {
        let all = self.buffer.as_chunks::<PAGE_SIZE>().0;
        self.pages.retain(|(id, number)| keep(*id, &all[*number as usize]));
    }

    /// The pages' bytes in order, neighbours in one piece.
    pub fn pieces(&self) -> impl Iterator<Item = &[u8]> + '_ {
        let runs = self.pages.chunk_by(|(_, a), (_, b)| a + 1 == *b);
        runs.map(|run| {
            let at = run[0].1 as usize * PAGE_SIZE;
            &self.buffer[at..at + run.len() * PAGE_SIZE]
        })
    }
}

impl PartialEq for PageBatch {
    fn eq(&self, other: &Self) -> bool {
        self.iter().eq(other.iter())
    }
}

impl Eq for PageBatch {}

impl fmt::Debug for PageBatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PageBatch({} pages)", self.pages.len())
    }
}

impl Extend<(ShortId, Page)> for PageBatch {
    fn extend<I: IntoIterator<Item = (ShortId, Page)>>(&mut self, pages: I) {
        for (id, page) in pages {
            let fill = |bytes: &mut [u8]| {
                bytes.copy_from_slice(&page);
                true
            };
            self.add_run(std::iter::once(id), fill, |_, _| true);
        }
    }
}

impl FromIterator<(ShortId, Page)> for PageBatch {
    fn from_iter<I: IntoIterator<Item = (ShortId, Page)>>(pages: I) -> Self {
        let mut batch = Self::default();
        batch.extend(pages);
        batch
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(byte: u8) -> Page {
        [byte; PAGE_SIZE]
    }

    #[test]
    fn what_is_not_filled_or_kept_is_not_there_and_neighbours_are_one_piece() {
        let mut batch = PageBatch::with_capacity(2);
        let write = |first: u8| {
            move |bytes: &mut [u8]| {
                bytes.chunks_mut(PAGE_SIZE).zip(first..).for_each(|(bytes, byte)| bytes.fill(byte));
                true
            }
        };
        let ids = |range: std::ops::Range<u64>| range.map(ShortId).collect::<Vec<_>>().into_iter();
        assert!(batch.add_run(ids(0..2), write(0), |_, _| true));
        assert!(!batch.add_run(ids(2..3), |_| false, |_, _| true));
        assert!(batch.add_run(ids(3..7), write(3), |id, _| id.0 != 6));
        assert_eq!(batch.pieces().map(<[u8]>::len).collect::<Vec<_>>(), [5 * PAGE_SIZE]);
        batch.retain(|id, bytes| {
            assert_eq!(u64::from(bytes[0]), id.0);
            id.0 != 1
        });
        assert_eq!(batch.pieces().map(<[u8]>::len).collect::<Vec<_>>(), [PAGE_SIZE, 3 * PAGE_SIZE]);
        assert_eq!(batch.ids().map(|id| id.0).collect::<Vec<_>>(), [0, 3, 4, 5]);
        assert!(batch.iter().all(|(id, bytes)| bytes == &page(u8::try_from(id.0).unwrap())));
        let in_buffer = PageBatch::of_buffer(
            [page(1), page(9), page(2)].concat(),
            vec![(ShortId(1), 0), (ShortId(2), 2)],
        );
        assert_eq!(in_buffer, [(ShortId(1), page(1)), (ShortId(2), page(2))].into_iter().collect());
        batch.clear();
        assert!(batch.add_run(ids(8..9), write(8), |_, _| true) && batch.len() == 1, "{batch:?}");
        assert!(batch.iter().all(|(id, bytes)| id == ShortId(8) && bytes == &page(8)));
    }
}
