//! Whether a page is still the one that was hashed, at a tenth of the cost of hashing it again.
//!
//! When a page is hashed, a second, quick hash of it is kept with the id that it got. A page is served if its quick hash and the id it is asked by
//! are those, so that one that has changed is a miss. The quick hash is NH of UMAC (RFC 4418, section 5.2.2; Black et al., CRYPTO 1999) with words of 64
//! bits, folded to 64, under a secret of this process: whoever writes the page cannot aim at another one with the same value, and by chance one in about
//! 2^64 has it. Should it happen, whoever asked sees that the page is wrong: it hashes what it gets.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering},
};

use page::{PAGE_SIZE, Page, ShortId};

const WORDS: usize = PAGE_SIZE / 8;

/// The secret of the quick hash.
pub(crate) struct CheckKey(Box<[u64; WORDS]>);

impl fmt::Debug for CheckKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("CheckKey(secret)")
    }
}

impl CheckKey {
    pub(crate) fn generate() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; PAGE_SIZE];
        getrandom::fill(&mut bytes)?;
        Ok(Self(Box::new(words(&bytes))))
    }

    fn hash(&self, page: &Page) -> u64 {
        let mut sum = 0u128;
        let pairs = page.as_chunks::<16>().0.iter().zip(self.0.as_chunks::<2>().0);
        for (words, key) in pairs {
            let [low, high] = halves(u128::from_le_bytes(*words));
            let factor = |word: u64, key: u64| u128::from(word.wrapping_add(key));
            sum = sum.wrapping_add(factor(low, key[0]).wrapping_mul(factor(high, key[1])));
        }
        let [low, high] = halves(sum);
        low ^ high
    }

    /// What is kept of a page that has hashed to `id`; never 0.
    fn value(&self, page: &Page, id: ShortId) -> u64 {
        (self.hash(page) ^ id.0).max(1)
    }
}

fn halves(value: u128) -> [u64; 2] {
    let [low, high] = [0, 64].map(|shift| (value >> shift) & u128::from(u64::MAX));
    [low, high].map(|half| u64::try_from(half).expect("the upper bits are masked"))
}

fn words(bytes: &Page) -> [u64; WORDS] {
    let mut words = [0; WORDS];
    for (word, bytes) in words.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *word = u64::from_le_bytes(*bytes);
    }
    words
}

/// The values of one content's pages; 0 where there is none.
#[derive(Debug)]
pub(crate) struct Checks(Vec<AtomicU64>);

impl Checks {
    pub(crate) fn new(pages: u32) -> Self {
        Self((0..pages).map(|_| AtomicU64::new(0)).collect())
    }

    /// Page `number` has just been hashed to `id`.
    pub(crate) fn note(&self, number: u32, key: &CheckKey, page: &Page, id: ShortId) {
        if let Some(value) = self.0.get(number as usize) {
            value.store(key.value(page, id), Ordering::Release);
        }
    }

    /// Whether page `number`, as just read, is what was hashed to `id`; `None` if it was never hashed.
    pub(crate) fn same(&self, number: u32, key: &CheckKey, page: &Page, id: ShortId) -> Option<bool> {
        match self.0.get(number as usize)?.load(Ordering::Acquire) {
            0 => None,
            value => Some(value == key.value(page, id)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_page_is_itself_under_its_own_id_until_it_is_hashed_anew() {
        let (key, checks) = (CheckKey::generate().unwrap(), Checks::new(2));
        let (old, new) = ([1; PAGE_SIZE], [2; PAGE_SIZE]);
        assert_eq!(checks.same(1, &key, &old, ShortId(7)), None);
        assert_eq!(checks.same(2, &key, &old, ShortId(7)), None, "there is no such page");
        checks.note(1, &key, &old, ShortId(7));
        assert_eq!(checks.same(1, &key, &old, ShortId(7)), Some(true));
        assert_eq!(checks.same(1, &key, &new, ShortId(7)), Some(false));
        checks.note(1, &key, &new, ShortId(8));
        assert_eq!(checks.same(1, &key, &new, ShortId(7)), Some(false), "whoever asks by the old id");
        assert_eq!(checks.same(1, &key, &new, ShortId(8)), Some(true));
    }

    proptest! {
        #[test]
        fn any_change_of_a_page_is_seen(
            at in 0..PAGE_SIZE, other in 0..PAGE_SIZE, flip in 1u8..,
            page in prop::collection::vec(any::<u8>(), PAGE_SIZE),
        ) {
            let (key, checks) = (CheckKey::generate().unwrap(), Checks::new(1));
            let mut page: Page = page.try_into().unwrap();
            checks.note(0, &key, &page, ShortId(1));
            page.swap(at, other);
            let swapped_alike = page[at] == page[other];
            prop_assert_eq!(checks.same(0, &key, &page, ShortId(1)), Some(swapped_alike));
            page.swap(at, other);
            page[at] ^= flip;
            prop_assert_eq!(checks.same(0, &key, &page, ShortId(1)), Some(false));
        }
    }
}
