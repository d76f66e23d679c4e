//! Versions of pages that the destination has: the bytes to which the protocol core holds the names. The core decides what is kept and what is
//! dropped; the bound is held here as well, whatever it says.

use std::collections::BTreeMap;
use std::sync::Arc;

use migration_proto::source::Literal;
use page::{Gfn, PAGE_SIZE, Page, PageHash};

/// A share of the VM's memory, and the most, that the versions take if the caller does not say: bytes.
const MEMORY_SHARE: u64 = 8;
const MOST_BYTES: u64 = 1 << 30;

/// A page to be kept once it is on its way.
#[derive(Clone, Debug)]
pub struct Version {
    /// Where it belongs.
    pub gfn: Gfn,
    /// Its name.
    pub name: PageHash,
    /// Its bytes.
    pub page: Arc<Page>,
}

/// The kept versions.
#[derive(Debug)]
pub struct Versions {
    most: usize,
    kept: BTreeMap<Gfn, (PageHash, Arc<Page>)>,
    /// What is being encoded and is to be kept then. What is dropped meanwhile is not.
    awaited: BTreeMap<Gfn, PageHash>,
}

impl Versions {
    /// Room for as many as `budget_bytes` hold; `None` for an eighth of `memory_bytes`, and no more than 1 GiB.
    #[must_use]
    pub fn new(budget_bytes: Option<u64>, memory_bytes: u64) -> Self {
        let usual = (memory_bytes / MEMORY_SHARE).min(MOST_BYTES);
        let budget = budget_bytes.unwrap_or(usual).min(memory_bytes);
        let most = usize::try_from(budget / PAGE_SIZE as u64).unwrap_or(usize::MAX);
        Self { most, kept: BTreeMap::new(), awaited: BTreeMap::new() }
    }

    /// How many there may be.
    #[must_use]
    pub fn most(&self) -> usize {
        self.most
    }

    /// A literal is to be encoded: its base, if it has one and that is here.
    pub fn give_out(&mut self, literal: &Literal) -> Option<Arc<Page>> {
        if literal.keep {
            self.awaited.insert(literal.gfn, literal.name);
        }
        let (name, page) = self.kept.get(&literal.gfn)?;
        (Some(*name) == literal.base).then(|| Arc::clone(page))
    }

    /// Keeps those of these that are still to be kept, each in the place of its frame's older version.
    pub fn keep(&mut self, versions: Vec<Version>) {
        for Version { gfn, name, page } in versions {
            if self.awaited.get(&gfn) != Some(&name) {
                continue;
            }
            self.awaited.remove(&gfn);
            if self.kept.len() < self.most || self.kept.contains_key(&gfn) {
                self.kept.insert(gfn, (name, page));
            }
        }
    }

    /// Drops those of these frames.
    pub fn drop_frames(&mut self, frames: &[Gfn]) {
        for gfn in frames {
            self.kept.remove(gfn);
            self.awaited.remove(gfn);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn version(gfn: u64, fill: u8) -> Version {
        Version { gfn: Gfn(gfn), name: PageHash([fill; 32]), page: Arc::new([fill; PAGE_SIZE]) }
    }

    fn literal(gfn: u64, base: u8) -> Literal {
        let base = Some(PageHash([base; 32]));
        Literal { gfn: Gfn(gfn), name: PageHash([99; 32]), base, keep: false }
    }

    /// A page that is to be kept has been encoded.
    fn sent(versions: &mut Versions, version: Version) {
        let (gfn, name) = (version.gfn, version.name);
        versions.give_out(&Literal { gfn, name, base: None, keep: true });
        versions.keep(vec![version]);
    }

    #[test]
    fn a_base_is_the_version_that_is_asked_for_or_none() {
        let mut versions = Versions::new(Some(8192), 1 << 20);
        (1..4u8).for_each(|n| sent(&mut versions, version(n.into(), n)));
        assert!(versions.give_out(&literal(3, 3)).is_none(), "there is room for two");
        assert_eq!(versions.give_out(&literal(1, 1)).unwrap()[0], 1);
        sent(&mut versions, version(1, 7));
        assert!(versions.give_out(&literal(1, 1)).is_none(), "the older one is gone");
        versions.drop_frames(&[Gfn(2)]);
        sent(&mut versions, version(3, 3));
        assert!(versions.give_out(&literal(2, 2)).is_none() && versions.give_out(&literal(3, 3)).is_some());
    }

    #[test]
    fn what_is_dropped_while_it_is_encoded_is_not_kept() {
        let mut versions = Versions::new(Some(8192), 1 << 20);
        versions.give_out(&Literal { keep: true, name: PageHash([1; 32]), ..literal(1, 0) });
        versions.drop_frames(&[Gfn(1)]);
        versions.keep(vec![version(1, 1)]);
        assert!(versions.give_out(&literal(1, 1)).is_none());
    }

    #[test]
    fn the_usual_budget_is_a_share_of_memory() {
        assert_eq!(Versions::new(None, 512 << 20).most(), (64 << 20) / PAGE_SIZE);
        assert_eq!(Versions::new(None, 1 << 40).most(), (1 << 30) / PAGE_SIZE);
        assert_eq!(Versions::new(Some(0), 1 << 30).most(), 0);
    }
}
