//! What the hosts of a simulated site hold.
//!
//! Two kinds of names. *Probe* names are those of the VMs that are looked up and of what the site holds of them: every one of them is
//! announced, kept and asked for, so that a lookup's messages, bytes and hits are the true ones. *Background* names stand for the rest
//! of each host's 64 GiB: one of them stands for [`Content::background_weight`] true ones, and is counted as that many in bytes, entries and
//! messages. They are never looked up; a table's answers do not depend on what else is in it.
//!
//! The shares are those measured on real Linux guests (the project's corpus: 26 dumps of 128 to 512 MiB):
//! - of a guest's pages 11.5% are zero and 81% have names of their own, the rest are duplicates within the guest;
//! - the files of its image and kernel hold 46 to 65% of its non-zero pages: a half here;
//! - siblings' memories hold a few percent beyond the files: 5% here, on three hosts;
//! - a VM that returns finds 85 to 99%: 92% here, 37% of it on one host alone;
//! - a VM of another distribution gives 1%: nothing here.
//!
//! A host of 64 GiB holds two of the site's eight images as files and the memory of 62 VMs of 1 GiB, so it has
//! 2 * 131,072 + 62 * 262,144 * 81% * (1 - 1/2) = 6.8 million names. A looked-up VM has 262,144 non-zero pages with as many names, which is more
//! than a real one has.

use page::ShortId;

use crate::rng::Rng;

/// Pages of a looked-up VM, all of them with names of their own.
pub(super) const VM_PAGES: usize = 262_144;
/// Names of the image that the looked-up VMs were started from.
pub(super) const IMAGE_NAMES: u64 = 131_072;
const SIBLING_NAMES: u64 = 13_107;
const RETAINED_NAMES: u64 = 96_993;
/// Names of one host, rounded.
pub(super) const HOST_NAMES: u64 = 6_844_000;
/// One host in so many holds the looked-up VMs' image.
pub(super) const IMAGE_HOSTS: u64 = 4;
/// Hosts with siblings of a looked-up VM.
pub(super) const SIBLING_HOSTS: usize = 3;
/// The looked-up VMs, every second of which returns to the site.
pub(super) const VMS: u64 = 4;
/// Pages of a VM that follow each other and come from the same place, on average: page caches and allocators work in such runs.
const RUN_PAGES: u64 = 16;
/// What the seeds of background names begin with, where those of pages have their [`Kind`].
const BACKGROUND: u64 = 5;

/// Where pages of a looked-up VM come from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Kind {
    /// The image's files, on every fourth host.
    Image,
    /// Siblings' memories, on three hosts.
    Sibling,
    /// A checkpoint of the VM itself, on one host.
    Retained,
    /// Nobody.
    Own,
}

/// A page, by what its bytes are made from; its name is the mixed seed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct PageSeed(pub(super) u64);

impl PageSeed {
    fn new(kind: Kind, vm: u64, n: u64) -> Self {
        let kind: u64 = match kind {
            Kind::Image => 1,
            Kind::Sibling => 2,
            Kind::Retained => 3,
            Kind::Own => 4,
        };
        Self(kind << 56 | vm << 40 | n)
    }

    /// The page that has this name.
    pub(super) fn of(id: ShortId) -> Self {
        Self(unmix(id.0))
    }

    /// The page's name: what whoever has fetched it computes.
    pub(super) fn name(self) -> ShortId {
        ShortId(mix(self.0))
    }

    /// Where the page comes from, and of which VM it is.
    pub(super) fn origin(self) -> (Kind, u64) {
        let kind = match self.0 >> 56 {
            1 => Kind::Image,
            2 => Kind::Sibling,
            3 => Kind::Retained,
            _ => Kind::Own,
        };
        (kind, self.0 >> 40 & 0xffff)
    }
}

/// The finaliser of splitmix64 (Steele et al. 2014), a bijection.
fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

fn unmix(x: u64) -> u64 {
    let x = (x ^ (x >> 31) ^ (x >> 62)).wrapping_mul(0x3196_42b2_d24d_8ec3);
    let x = (x ^ (x >> 27) ^ (x >> 54)).wrapping_mul(0x96de_1b17_3f11_9089);
    x ^ (x >> 30) ^ (x >> 60)
}

fn names(kind: Kind, vm: u64, count: u64) -> impl Iterator<Item = ShortId> {
    (0..count).map(move |n| PageSeed::new(kind, vm, n).name())
}

/// What one host holds of the looked-up VMs.
#[derive(Clone, Default, Debug)]
pub(super) struct Holding {
    /// The image's files.
    pub(super) image: bool,
    /// VMs whose siblings run here.
    pub(super) sibling: Vec<u64>,
    /// VMs whose checkpoint is here.
    pub(super) retained: Vec<u64>,
}

impl Holding {
    /// Whether the host holds the page of this name.
    pub(super) fn has(&self, id: ShortId) -> bool {
        match PageSeed::of(id).origin() {
            (Kind::Image, _) => self.image,
            (Kind::Sibling, vm) => self.sibling.contains(&vm),
            (Kind::Retained, vm) => self.retained.contains(&vm),
            (Kind::Own, _) => false,
        }
    }

    /// The probe names that the host holds.
    pub(super) fn names(&self) -> Vec<ShortId> {
        let image = self.image.then(|| names(Kind::Image, 0, IMAGE_NAMES)).into_iter().flatten();
        let sibling = self.sibling.iter().flat_map(|vm| names(Kind::Sibling, *vm, SIBLING_NAMES));
        let retained = self.retained.iter().flat_map(|vm| names(Kind::Retained, *vm, RETAINED_NAMES));
        image.chain(sibling).chain(retained).collect()
    }
}

/// How the background is thinned.
#[derive(Clone, Copy, Debug)]
pub(super) struct Content {
    /// True names that one background name stands for.
    pub(super) background_weight: u64,
}

impl Content {
    /// About `per_host` background names a host.
    pub(super) fn new(per_host: u64) -> Self {
        Self { background_weight: (HOST_NAMES / per_host).max(1) }
    }

    /// The background names of a host.
    pub(super) fn background(self, host: u64) -> impl Iterator<Item = ShortId> {
        let count = HOST_NAMES / self.background_weight;
        (0..count).map(move |n| ShortId(mix(BACKGROUND << 56 | host << 32 | n)))
    }
}

/// Whether a name is a background name.
pub(super) fn is_background(id: ShortId) -> bool {
    PageSeed::of(id).0 >> 56 == BACKGROUND
}

/// Whether a VM was here before.
pub(super) fn returns(vm: u64) -> bool {
    vm % 2 == 1
}

/// Where a VM's pages come from, and how many.
pub(super) fn makeup(vm: u64) -> [(Kind, u64); 4] {
    let retained = if returns(vm) { RETAINED_NAMES } else { 0 };
    let own = VM_PAGES as u64 - IMAGE_NAMES - SIBLING_NAMES - retained;
    [(Kind::Image, IMAGE_NAMES), (Kind::Sibling, SIBLING_NAMES), (Kind::Retained, retained), (Kind::Own, own)]
}

/// The names of a VM's pages in the order of its memory.
pub(super) fn vm_names(vm: u64, rng: &mut Rng) -> Vec<ShortId> {
    let mut left = makeup(vm);
    let total = left.map(|(_, count)| count);
    let mut ids = Vec::with_capacity(VM_PAGES);
    while ids.len() < VM_PAGES {
        let all: u64 = left.iter().map(|(_, count)| count).sum();
        let mut at = rng.below(all);
        let run = rng.between(1, 2 * RUN_PAGES - 1);
        for ((kind, count), total) in left.iter_mut().zip(total) {
            if at < *count {
                let taken = run.min(*count);
                let from = total - *count;
                let vm = if *kind == Kind::Image { 0 } else { vm };
                ids.extend((from..from + taken).map(|n| PageSeed::new(*kind, vm, n).name()));
                *count -= taken;
                break;
            }
            at -= *count;
        }
    }
    ids
}

/// The names that a liar says it holds: all of the looked-up VMs.
pub(super) fn every_name() -> Vec<ShortId> {
    let vm = |vm: u64| {
        makeup(vm)
            .into_iter()
            .filter(|(kind, _)| *kind != Kind::Image)
            .flat_map(move |(kind, n)| names(kind, vm, n))
    };
    names(Kind::Image, 0, IMAGE_NAMES).chain((0..VMS).flat_map(vm)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_tells_its_page_and_a_vm_has_its_shares() {
        for vm in 0..VMS {
            let ids = vm_names(vm, &mut Rng::new(7));
            assert_eq!(ids.len(), VM_PAGES);
            for (kind, count) in makeup(vm) {
                let of_kind = ids.iter().filter(|id| PageSeed::of(**id).origin().0 == kind).count();
                assert_eq!(of_kind as u64, count, "{kind:?}");
            }
            assert!(ids.iter().all(|id| PageSeed::of(*id).name() == *id && !is_background(*id)));
        }
    }

    #[test]
    fn background_stands_for_the_rest_of_a_host() {
        let content = Content::new(4096);
        let names: Vec<_> = content.background(3).collect();
        assert!(names.iter().all(|id| is_background(*id)));
        let stands_for = names.len() as u64 * content.background_weight;
        assert!(stands_for.abs_diff(HOST_NAMES) <= content.background_weight);
    }
}
