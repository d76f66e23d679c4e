//! Guest RAM: one memfd, mapped shared, so that a site's peer can read it through a descriptor of its own.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use page::{Gfn, PAGE_SIZE, Page, PageSet};
use rustix::fs::{FallocateFlags, MemfdFlags, Mode, OFlags, SealFlags};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::FromRangesError;
use vm_memory::{
    Address as _, FileOffset, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestMemoryRegion as _,
    GuestRegionMmap, MemoryRegionAddress,
};

pub(crate) mod absent;
pub(crate) mod buffers;

use crate::limits::{LOW_RAM_END, MEMORY_GRANULE_BYTES, MEMORY_MAX_BYTES};

/// Where RAM goes on above the hole for devices that ends at 4 GiB.
const HIGH_RAM_START: u64 = 4 << 30;

/// A run of RAM, contiguous in guest-physical addresses and in the memfd.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Extent {
    /// The first frame: a multiple of 512.
    pub first_gfn: u64,
    /// Its pages: a multiple of 512.
    pub pages: u64,
    /// Where it begins in the memfd, bytes.
    pub file_offset: u64,
}

impl Extent {
    /// The guest-physical address of its first byte.
    #[must_use]
    pub fn start(&self) -> u64 {
        self.first_gfn * PAGE_SIZE as u64
    }

    /// Its length in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.pages * PAGE_SIZE as u64
    }
}

/// The extents of a machine with `memory_bytes` of RAM: up to 3 GiB at address 0, the rest from 4 GiB up.
///
/// # Errors
/// [`MemoryError::Size`] if it is not a positive multiple of 2 MiB, or above what one VM may have.
pub fn layout(memory_bytes: u64) -> Result<Vec<Extent>, MemoryError> {
    if memory_bytes == 0
        || !memory_bytes.is_multiple_of(MEMORY_GRANULE_BYTES)
        || memory_bytes > MEMORY_MAX_BYTES
    {
        return Err(MemoryError::Size(memory_bytes));
    }
    let page = PAGE_SIZE as u64;
    let low = memory_bytes.min(LOW_RAM_END);
    let mut extents = vec![Extent { first_gfn: 0, pages: low / page, file_offset: 0 }];
    if memory_bytes > low {
        extents.push(Extent {
            first_gfn: HIGH_RAM_START / page,
            pages: (memory_bytes - low) / page,
            file_offset: low,
        });
    }
    Ok(extents)
}

/// Errors of guest memory.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A size that no VM can have.
    #[error("{0} bytes of memory: it must be a multiple of 2 MiB, from 2 MiB to 1 TiB; change --memory")]
    Size(u64),
    /// Extents, of a description from elsewhere, that are not those of any size.
    #[error("the description's memory extents are not laid out as this build lays them out: {0:?}")]
    Extents(Vec<Extent>),
    /// The host would not give the memory.
    #[error("could not get {bytes} bytes of memory for the guest ({step}); free some or launch it with less")]
    Allocate {
        /// How much.
        bytes: u64,
        /// Which call failed.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The mapping failed.
    #[error(
        "could not map {bytes} bytes of guest memory; is the process's address space limited (ulimit -v)?"
    )]
    Map {
        /// How much.
        bytes: u64,
        /// Why.
        source: FromRangesError,
    },
}

/// The mapping, with one bit a page for what this process wrote.
pub(crate) type Mapping = GuestMemoryMmap<AtomicBitmap>;

/// A VM's RAM.
#[derive(Debug)]
pub struct Memory {
    file: File,
    extents: Vec<Extent>,
    mapping: Mapping,
}

impl Memory {
    /// Makes zeroed RAM of `extents`, which must be those of [`layout`].
    /// # Errors
    /// [`MemoryError`].
    pub fn new(extents: &[Extent]) -> Result<Self, MemoryError> {
        // Extents may come from another host: what this build would not lay out itself is refused, not interpreted.
        let bytes =
            extents.iter().try_fold(0u64, |sum, e| sum.checked_add(e.pages.checked_mul(PAGE_SIZE as u64)?));
        let refused = || MemoryError::Extents(extents.to_vec());
        let bytes = bytes.ok_or_else(refused)?;
        if layout(bytes)? != extents {
            return Err(refused());
        }
        let file = create_memfd(bytes)?;
        let map = |e: &Extent| {
            let at = FileOffset::new(
                file.try_clone().map_err(vm_memory::mmap::MmapRegionError::Mmap)?,
                e.file_offset,
            );
            let size = usize::try_from(e.bytes()).map_err(|_| FromRangesError::InvalidGuestRegion)?;
            GuestRegionMmap::<AtomicBitmap>::from_range(GuestAddress(e.start()), size, Some(at))
        };
        let regions = extents.iter().map(map).collect::<Result<Vec<_>, _>>();
        let mapping = regions
            .and_then(|r| Ok(Mapping::from_regions(r)?))
            .map_err(|source| MemoryError::Map { bytes, source })?;
        Ok(Self { file, extents: extents.to_vec(), mapping })
    }

    /// The extents, ascending. Up to 3 GiB there is one, at frame 0; the rest stands from 4 GiB up.
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// One more than the highest frame: the bound of page sets over this memory.
    pub fn bound(&self) -> u64 {
        self.extents.last().map_or(0, |e| e.first_gfn + e.pages)
    }

    /// RAM in bytes.
    pub fn bytes(&self) -> u64 {
        self.extents.iter().map(Extent::bytes).sum()
    }

    fn place(&self, gfn: Gfn) -> Option<(&GuestRegionMmap<AtomicBitmap>, MemoryRegionAddress)> {
        let address = gfn.0.checked_mul(PAGE_SIZE as u64)?;
        self.mapping.to_region_addr(GuestAddress(address))
    }

    /// Whether the frame is RAM.
    pub fn has(&self, gfn: Gfn) -> bool {
        self.place(gfn).is_some()
    }

    /// Copies a page out. The guest may be writing it: the copy is what verification is done on.
    /// # Panics
    /// If `gfn` is not RAM.
    pub fn read_page(&self, gfn: Gfn, into: &mut Page) {
        let (region, at) = self.place(gfn).expect("the frame is RAM");
        let slice = region.get_slice(at, PAGE_SIZE).expect("extents are whole pages");
        slice.copy_to(&mut into[..]);
    }

    /// Copies whole pages of one extent out, from the frame `first` on. Unlike [`Memory::read_page`], this does not make pages that nobody has touched take
    /// memory.
    /// # Errors
    /// The system call's; also if they are not RAM of one extent.
    pub fn peek_pages(&self, first: Gfn, into: &mut [u8]) -> io::Result<()> {
        let pages = (into.len() / PAGE_SIZE) as u64;
        let mut offset = self.file_offset(first, pages)?;
        let mut left = into;
        while !left.is_empty() {
            let got = rustix::io::pread(&self.file, &mut *left, offset)?;
            if got == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            offset += got as u64;
            left = &mut left[got..];
        }
        Ok(())
    }

    /// Where a run of frames within one extent stands in the memfd.
    fn file_offset(&self, first: Gfn, pages: u64) -> io::Result<u64> {
        let within = |e: &&Extent| first.0 >= e.first_gfn && first.0 + pages <= e.first_gfn + e.pages;
        let extent = self.extents.iter().find(within).ok_or(io::ErrorKind::InvalidInput)?;
        Ok(extent.file_offset + (first.0 - extent.first_gfn) * PAGE_SIZE as u64)
    }

    /// Writes a page as the monitor: it counts as dirty.
    /// # Panics
    /// If `gfn` is not RAM.
    pub fn write_page(&self, gfn: Gfn, page: &Page) {
        let (region, at) = self.place(gfn).expect("the frame is RAM");
        let slice = region.get_slice(at, PAGE_SIZE).expect("extents are whole pages");
        slice.copy_from(&page[..]);
    }

    /// A new read-only descriptor of the memfd.
    /// # Errors
    /// If the kernel refuses to open it.
    pub fn read_only_fd(&self) -> io::Result<OwnedFd> {
        let path = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        Ok(rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
    }

    /// What this process itself wrote since the last call, added to `set`; forgets it.
    /// # Panics
    /// If the set's bound is not this memory's.
    pub(crate) fn take_monitor_writes(&self, set: &mut PageSet) {
        assert_eq!(set.bound(), self.bound(), "a set over this memory");
        for (extent, region) in self.extents.iter().zip(self.mapping.iter()) {
            add_words(set, extent, &(**region).bitmap().get_and_reset());
        }
    }

    /// The mapping: for loaders and devices, whose writes it notes.
    pub(crate) fn mapping(&self) -> &Mapping {
        &self.mapping
    }

    /// Where each extent is mapped in this process: for KVM's memory slots alone.
    pub(crate) fn host_addresses(&self) -> impl Iterator<Item = (Extent, u64)> + '_ {
        self.extents.iter().zip(self.mapping.iter()).map(|(e, region)| (*e, region.as_ptr().addr() as u64))
    }

    /// Where a frame is mapped in this process; `None` if it is not RAM.
    fn host_address(&self, gfn: Gfn) -> Option<u64> {
        let (region, at) = self.place(gfn)?;
        Some(region.as_ptr().addr() as u64 + at.raw_value())
    }

    /// Gives up what stands in a run of frames within one extent: they read as zeros, and take no memory.
    ///
    /// # Errors
    /// The system call's; also if the run is not RAM.
    fn punch(&self, first: Gfn, pages: u64) -> io::Result<()> {
        let offset = self.file_offset(first, pages)?;
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.file, how, offset, pages * PAGE_SIZE as u64)?)
    }

    /// Copies what there is of `len` bytes from a guest-physical address; shorter where RAM ends.
    pub(crate) fn peek(&self, address: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let got = self.mapping.to_region_addr(GuestAddress(address)).map_or(0, |(region, at)| {
            let left = region.len().saturating_sub(at.raw_value());
            let count = usize::try_from(left).map_or(len, |left| left.min(len));
            region.get_slice(at, count).map_or(0, |slice| slice.copy_to(&mut bytes[..count]))
        });
        bytes.truncate(got);
        bytes
    }
}

/// Adds one extent's dirty words, as KVM and the bitmap have them, to a set over the whole memory.
pub(crate) fn add_words(set: &mut PageSet, extent: &Extent, words: &[u64]) {
    for (word, at) in words.iter().zip(0u64..) {
        if *word != 0 {
            set.insert_word(Gfn(extent.first_gfn + at * 64), *word);
        }
    }
}

fn create_memfd(bytes: u64) -> Result<File, MemoryError> {
    let failed = |step| move |e: rustix::io::Errno| MemoryError::Allocate { bytes, step, source: e.into() };
    let fd = rustix::fs::memfd_create("tern-guest-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
        .map_err(failed("memfd_create"))?;
    rustix::fs::ftruncate(&fd, bytes).map_err(failed("ftruncate"))?;
    // A peer maps this file: if anyone could shrink it, its reads would end in SIGBUS.
    rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
        .map_err(failed("F_ADD_SEALS"))?;
    // Read-only descriptors must not be turned into writable ones by opening them again through /proc.
    rustix::fs::fchmod(&fd, Mode::RUSR).map_err(failed("fchmod"))?;
    Ok(File::from(fd))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt as _;

    use super::*;

    fn memory(bytes: u64) -> Memory {
        Memory::new(&layout(bytes).unwrap()).unwrap()
    }

    #[test]
    fn ram_beyond_three_gibibytes_stands_above_four() {
        assert_eq!(layout(512 << 20).unwrap(), [Extent { first_gfn: 0, pages: 131_072, file_offset: 0 }]);
        let two = layout(5 << 30).unwrap();
        assert_eq!(two[0], Extent { first_gfn: 0, pages: 786_432, file_offset: 0 });
        assert_eq!(two[1], Extent { first_gfn: 1 << 20, pages: 524_288, file_offset: 3 << 30 });
        // At the edge: all below the hole, and the first granule behind it.
        assert_eq!(layout(3 << 30).unwrap().len(), 1);
        assert_eq!(layout((3 << 30) + MEMORY_GRANULE_BYTES).unwrap()[1].bytes(), MEMORY_GRANULE_BYTES);
        for wrong in
            [0, 4096, 1 << 20, (2 << 20) + 1, (3 << 30) + 4096, u64::MAX, MEMORY_MAX_BYTES + (2 << 20)]
        {
            assert!(matches!(layout(wrong), Err(MemoryError::Size(_))), "{wrong}");
        }
    }

    #[test]
    fn foreign_extents_are_refused() {
        let hole = [Extent { first_gfn: 512, pages: 512, file_offset: 0 }];
        assert!(matches!(Memory::new(&hole), Err(MemoryError::Extents(_))));
        let endless = [Extent { first_gfn: 0, pages: u64::MAX, file_offset: 0 }];
        assert!(matches!(Memory::new(&endless), Err(MemoryError::Extents(_))));
    }

    #[test]
    fn monitor_writes_are_noted_once_where_they_are() {
        let memory = memory((3 << 30) + (4 << 20));
        let high = Gfn((1 << 20) + 3);
        memory.write_page(Gfn(5), &[1; PAGE_SIZE]);
        memory.write_page(high, &[2; PAGE_SIZE]);
        let mut set = PageSet::empty(memory.bound());
        memory.take_monitor_writes(&mut set);
        assert_eq!(set.iter().collect::<Vec<_>>(), [Gfn(5), high]);
        let mut again = PageSet::empty(memory.bound());
        memory.take_monitor_writes(&mut again);
        assert!(again.is_empty());
        let mut page = [0; PAGE_SIZE];
        memory.read_page(high, &mut page);
        assert_eq!(page, [2; PAGE_SIZE]);
    }

    #[test]
    fn the_other_descriptor_reads_the_same_and_writes_nothing() {
        let memory = memory(2 << 20);
        memory.write_page(Gfn(1), &[7; PAGE_SIZE]);
        let file = File::from(memory.read_only_fd().unwrap());
        let mut byte = [0];
        file.read_exact_at(&mut byte, PAGE_SIZE as u64).unwrap();
        assert_eq!(byte, [7]);
        assert!(file.write_at(&[1], 0).is_err());
        assert!(file.set_len(0).is_err());
        assert_eq!(memory.file.set_len(0).unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    }

    #[test]
    fn peeking_ends_where_ram_ends() {
        let memory = memory(2 << 20);
        assert_eq!(memory.peek((2 << 20) - 3, 16).len(), 3);
        assert_eq!(memory.peek(2 << 20, 16).len(), 0);
    }
}
