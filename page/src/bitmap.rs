//! Sets of pages.

use crate::addr::Gfn;

/// A set of frames below a fixed bound, one bit a page, in 64-bit words as KVM's dirty log has them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PageSet {
    words: Vec<u64>,
    pages: u64,
}

impl PageSet {
    /// The empty set over frames `0..pages`.
    ///
    /// # Panics
    /// If so many bits do not fit the address space.
    #[must_use]
    pub fn empty(pages: u64) -> Self {
        let words = usize::try_from(pages.div_ceil(64)).expect("a page count fits the address space");
        Self { words: vec![0; words], pages }
    }

    /// The set of all frames `0..pages`.
    #[must_use]
    pub fn full(pages: u64) -> Self {
        let mut set = Self::empty(pages);
        set.words.fill(u64::MAX);
        if let (Some(last), rest @ 1..) = (set.words.last_mut(), pages % 64) {
            *last = (1 << rest) - 1;
        }
        set
    }

    /// The bound: every member is below it.
    #[must_use]
    pub fn bound(&self) -> u64 {
        self.pages
    }

    fn place(&self, gfn: Gfn) -> Option<(usize, u64)> {
        (gfn.0 < self.pages).then(|| (usize::try_from(gfn.0 / 64).expect("within words"), 1 << (gfn.0 % 64)))
    }

    /// Adds `gfn`; says whether it was new.
    ///
    /// # Panics
    /// If `gfn` is not below the bound: a frame outside memory is a bug of the caller.
    pub fn insert(&mut self, gfn: Gfn) -> bool {
        let (word, bit) = self.place(gfn).expect("frame within the set's bound");
        let new = self.words[word] & bit == 0;
        self.words[word] |= bit;
        new
    }

    /// Takes `gfn` out; says whether it was there.
    pub fn remove(&mut self, gfn: Gfn) -> bool {
        let Some((word, bit)) = self.place(gfn) else { return false };
        let was = self.words[word] & bit != 0;
        self.words[word] &= !bit;
        was
    }

    /// Whether `gfn` is a member.
    #[must_use]
    pub fn contains(&self, gfn: Gfn) -> bool {
        self.place(gfn).is_some_and(|(word, bit)| self.words[word] & bit != 0)
    }

    /// Adds 64 frames at once: bit `i` of `word` is frame `first + i`. Bits at or beyond the bound are ignored.
    ///
    /// # Panics
    /// If `first` is not a multiple of 64.
    pub fn insert_word(&mut self, first: Gfn, word: u64) {
        assert_eq!(first.0 % 64, 0, "words are aligned");
        let Some(left) = self.pages.checked_sub(first.0).filter(|n| *n > 0) else { return };
        let mask = if left >= 64 { u64::MAX } else { (1 << left) - 1 };
        let at = usize::try_from(first.0 / 64).expect("within words");
        self.words[at] |= word & mask;
    }

    /// Adds every member of `other`, which must have the same bound.
    ///
    /// # Panics
    /// If the bounds differ.
    pub fn union_with(&mut self, other: &Self) {
        assert_eq!(self.pages, other.pages, "sets over the same memory");
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
    }

    /// The number of members.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// Whether there is no member.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|w| *w == 0)
    }

    /// The members, ascending.
    pub fn iter(&self) -> impl Iterator<Item = Gfn> + '_ {
        self.iter_from(Gfn(0))
    }

    /// The members from `first` on, ascending.
    pub fn iter_from(&self, first: Gfn) -> impl Iterator<Item = Gfn> + '_ {
        let skipped = usize::try_from(first.0 / 64).unwrap_or(usize::MAX);
        self.words.iter().zip(0u64..).skip(skipped).flat_map(move |(word, at)| {
            let before = if at == first.0 / 64 { (1 << (first.0 % 64)) - 1 } else { 0 };
            let mut left = *word & !before;
            std::iter::from_fn(move || {
                let bit = (left != 0).then(|| u64::from(left.trailing_zeros()))?;
                left &= left - 1;
                Some(Gfn(at * 64 + bit))
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_like_a_set(pages in 1u64..300, steps in prop::collection::vec((any::<bool>(), 0u64..300), 0..200)) {
            let (mut set, mut model) = (PageSet::empty(pages), BTreeSet::new());
            for (add, at) in steps {
                let gfn = Gfn(at % pages);
                if add { prop_assert_eq!(set.insert(gfn), model.insert(gfn)); }
                else { prop_assert_eq!(set.remove(gfn), model.remove(&gfn)); }
            }
            prop_assert_eq!(set.len(), model.len() as u64);
            prop_assert_eq!(set.iter().collect::<Vec<_>>(), model.into_iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_full_set_ends_at_its_bound() {
        for pages in [0, 1, 63, 64, 65, 512] {
            assert_eq!(PageSet::full(pages).len(), pages);
        }
        let mut set = PageSet::empty(70);
        set.insert_word(Gfn(64), u64::MAX);
        assert_eq!(set.len(), 6);
    }
}
