//! The name of every page of a VM, and the roots over them: the source's record of what it has said, the
//! destination's of what it has.

use page::{Gfn, PageHash, REGION_PAGES, RegionId, root_of};

use crate::manifest::Layout;

/// Names of all pages, with cached roots.
#[derive(Debug)]
pub(crate) struct MemoryNames {
    layout: Layout,
    names: Vec<PageHash>,
    roots: Vec<Option<PageHash>>,
}

impl MemoryNames {
    /// Every page has the name `initial`.
    pub(crate) fn new(layout: Layout, initial: PageHash) -> Self {
        let count = |n: u64| usize::try_from(n).expect("a layout is bounded by limits::REGIONS");
        let names = vec![initial; count(layout.page_bound())];
        let roots = vec![None; count(layout.region_bound())];
        Self { layout, names, roots }
    }

    pub(crate) fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The place of a frame in `names`, if it is RAM.
    fn place(&self, gfn: Gfn) -> Option<usize> {
        self.layout.has(gfn.region()).then(|| usize::try_from(gfn.0).expect("below the bound"))
    }

    /// The name of a frame; `None` if it is not RAM.
    pub(crate) fn get(&self, gfn: Gfn) -> Option<PageHash> {
        self.place(gfn).map(|at| self.names[at])
    }

    /// Gives a frame a name. A frame that is not RAM is left out: callers have checked.
    pub(crate) fn set(&mut self, gfn: Gfn, name: PageHash) {
        let Some(at) = self.place(gfn) else { return };
        self.names[at] = name;
        self.roots[at / REGION_PAGES] = None;
    }

    /// The names of a region, which is RAM.
    pub(crate) fn region(&self, region: RegionId) -> &[PageHash] {
        let first = usize::try_from(region.first().0).expect("below the bound");
        &self.names[first..first + REGION_PAGES]
    }

    /// The root of a region, which is RAM.
    pub(crate) fn region_root(&mut self, region: RegionId) -> PageHash {
        let at = usize::try_from(region.0).expect("below the bound");
        match self.roots[at] {
            Some(root) => root,
            None => {
                *self.roots[at].insert(root_of(self.names[at * REGION_PAGES..(at + 1) * REGION_PAGES].iter()))
            }
        }
    }

    /// The root over all regions' roots, ascending.
    pub(crate) fn root(&mut self) -> PageHash {
        let regions: Vec<RegionId> = self.layout.regions().collect();
        let roots: Vec<PageHash> = regions.into_iter().map(|region| self.region_root(region)).collect();
        root_of(roots.iter())
    }
}

#[cfg(test)]
mod tests {
    use page::{Domain, PAGE_SIZE};

    use super::*;
    use crate::manifest::Extent;

    #[test]
    fn a_cached_root_follows_every_change() {
        let domain = Domain::unkeyed();
        let layout = Layout::new(vec![
            Extent { first: RegionId(0), regions: 2 },
            Extent { first: RegionId(5), regions: 1 },
        ])
        .unwrap();
        let mut names = MemoryNames::new(layout, domain.zero_name());
        let mut seen = vec![names.root()];
        for gfn in [Gfn(0), Gfn(1023), Gfn(5 * 512)] {
            names.set(gfn, domain.name(&[1; PAGE_SIZE]));
            let root = names.root();
            assert!(!seen.contains(&root));
            let plain =
                names.layout().clone().regions().map(|r| root_of(names.region(r).iter())).collect::<Vec<_>>();
            assert_eq!(root, root_of(plain.iter()));
            seen.push(root);
        }
        assert_eq!(names.get(Gfn(1024)), None, "a hole is not RAM");
    }
}
