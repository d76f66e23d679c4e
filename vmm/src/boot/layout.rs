//! Who stands where in guest memory at the start.

use std::borrow::Cow;
use std::fmt;

use page::PAGE_SIZE;

use super::BootError;
use super::linux64::PAGE_TABLES_BYTES;
use crate::limits::CMDLINE_MAX_BYTES;
use crate::memory::{Extent, Memory};

/// The global descriptor table that the boot processor starts with.
pub(crate) const GDT: u64 = 0x500;
/// PVH's start-of-day structure.
pub(crate) const START_INFO: u64 = 0x6000;
/// Its list of modules.
pub(crate) const MODULES: u64 = 0x6100;
/// Its memory map.
pub(crate) const MEMORY_MAP: u64 = 0x7000;
/// Linux's `boot_params`.
pub(crate) const ZERO_PAGE: u64 = 0x8000;
/// The page tables that a kernel which is entered in long mode starts with.
pub(crate) const PAGE_TABLES: u64 = 0x9000;
/// The kernel's command line.
pub(crate) const CMDLINE: u64 = 0x2_0000;
/// The MultiProcessor table, in the last kibibyte of conventional memory, where kernels look for it.
pub(crate) const MP_TABLE: u64 = 0x9_fc00;
/// The ACPI tables, where kernels look for firmware's.
pub(crate) const ACPI_TABLES: u64 = 0xe_0000;
/// Where the classic PC's hole for video memory and firmware begins and ends.
pub(crate) const LEGACY_HOLE: (u64, u64) = (0xa_0000, 0x10_0000);

/// A named run of guest memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Area {
    /// What stands there.
    pub what: Cow<'static, str>,
    /// Its first byte.
    pub start: u64,
    /// Its length.
    pub bytes: u64,
}

impl Area {
    pub(crate) fn new(what: impl Into<Cow<'static, str>>, start: u64, bytes: u64) -> Self {
        Self { what: what.into(), start, bytes }
    }

    /// One past its last byte; none if that is beyond any address.
    fn end(&self) -> Option<u64> {
        self.start.checked_add(self.bytes)
    }

    /// Whether `address` is in it.
    pub(crate) fn holds(&self, address: u64) -> bool {
        address.checked_sub(self.start).is_some_and(|offset| offset < self.bytes)
    }

    fn overlaps(&self, other: &Self) -> bool {
        // Claimed areas have ends; an empty one is in nobody's way.
        self.bytes > 0 && other.bytes > 0 && (self.holds(other.start) || other.holds(self.start))
    }
}

impl fmt::Display for Area {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} bytes at {:#x})", self.what, self.bytes, self.start)
    }
}

/// A run of guest-physical addresses as the kernel is told of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemoryRun {
    pub(crate) start: u64,
    /// One past its last byte.
    pub(crate) end: u64,
    /// Whether it is RAM that the kernel may use as it likes.
    pub(crate) usable: bool,
}

/// RAM as the kernel may use it: without the last kibibyte of conventional memory and the classic hole, where tables stand.
pub(crate) fn memory_map(extents: &[Extent]) -> Vec<MemoryRun> {
    let run = |start, end, usable| MemoryRun { start, end, usable };
    let mut map = vec![run(0, MP_TABLE, true), run(MP_TABLE, LEGACY_HOLE.1, false)];
    map.extend(extents.iter().map(|e| run(e.start().max(LEGACY_HOLE.1), e.start() + e.bytes(), true)));
    map
}

/// What every boot puts into memory besides the kernel and the files, whatever the protocol.
pub(crate) fn boot_areas(cmdline_bytes: usize) -> Vec<Area> {
    vec![
        Area::new("the boot descriptor table", GDT, 0x40),
        Area::new("the boot start information", START_INFO, ZERO_PAGE - START_INFO),
        Area::new("the boot parameters", ZERO_PAGE, PAGE_SIZE as u64),
        Area::new("the boot page tables", PAGE_TABLES, PAGE_TABLES_BYTES),
        Area::new("the command line", CMDLINE, cmdline_bytes as u64 + 1),
        Area::new("the firmware tables", MP_TABLE, LEGACY_HOLE.1 - MP_TABLE),
    ]
}

const _: () = assert!(PAGE_TABLES + PAGE_TABLES_BYTES <= CMDLINE);
const _: () = assert!(CMDLINE + (CMDLINE_MAX_BYTES as u64) < MP_TABLE);

/// Who has claimed what.
#[derive(Debug)]
pub(crate) struct Map<'a> {
    extents: &'a [Extent],
    memory_bytes: u64,
    claimed: Vec<Area>,
}

impl<'a> Map<'a> {
    pub(crate) fn new(memory: &'a Memory) -> Self {
        Self { extents: memory.extents(), memory_bytes: memory.bytes(), claimed: Vec::new() }
    }

    /// Takes `area`, which must be within RAM and free.
    pub(crate) fn claim(&mut self, area: Area) -> Result<(), BootError> {
        let within = |e: &Extent| {
            area.start >= e.start() && area.end().is_some_and(|end| end <= e.start() + e.bytes())
        };
        if !self.extents.iter().any(within) {
            return Err(BootError::OutOfMemory { area, memory_bytes: self.memory_bytes });
        }
        if let Some(first) = self.claimed.iter().find(|c| c.overlaps(&area)) {
            return Err(BootError::Overlap { first: first.clone(), second: area });
        }
        self.claimed.push(area);
        Ok(())
    }

    /// Takes the lowest free run of `bytes` below 3 GiB that begins at a multiple of `alignment`, at `from` or above.
    pub(crate) fn claim_low(
        &mut self,
        what: &'static str,
        bytes: u64,
        from: u64,
        alignment: u64,
    ) -> Result<Area, BootError> {
        let none = || BootError::NoRoomForKernel { bytes, from };
        let low_bytes = self.extents.first().map_or(0, Extent::bytes);
        let mut start = from.checked_next_multiple_of(alignment).ok_or_else(none)?;
        loop {
            let area = Area::new(what, start, bytes);
            if area.end().is_none_or(|end| end > low_bytes) {
                return Err(none());
            }
            match self.claimed.iter().find(|c| c.overlaps(&area)) {
                None => {
                    self.claimed.push(area.clone());
                    return Ok(area);
                }
                // Claimed areas have ends, and this one ends above `start`: the search goes up, by one area at least.
                Some(in_the_way) => {
                    let after = in_the_way.end().ok_or_else(none)?;
                    start = after.checked_next_multiple_of(alignment).ok_or_else(none)?;
                }
            }
        }
    }

    /// Takes the highest free run of whole pages below 3 GiB, and below `below`, that holds `bytes`, above the first mebibyte.
    pub(crate) fn claim_high(
        &mut self,
        what: &'static str,
        bytes: u64,
        below: u64,
    ) -> Result<Area, BootError> {
        let top = self.extents.first().map_or(0, Extent::bytes).min(below);
        let mut ends: Vec<u64> = self.claimed.iter().map(|c| c.start).filter(|s| *s <= top).collect();
        ends.push(top);
        ends.sort_unstable();
        for end in ends.into_iter().rev() {
            let Some(start) = end.checked_sub(bytes).map(|s| s - s % PAGE_SIZE as u64) else { continue };
            let area = Area::new(what, start, bytes);
            if start >= LEGACY_HOLE.1 && !self.claimed.iter().any(|c| c.overlaps(&area)) {
                self.claimed.push(area.clone());
                return Ok(area);
            }
        }
        Err(BootError::NoRoomForInitramfs { bytes, below: top })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::memory::layout;

    fn memory() -> Memory {
        Memory::new(&layout(8 << 20).unwrap()).unwrap()
    }

    #[test]
    fn overlaps_name_both() {
        let memory = memory();
        let mut map = Map::new(&memory);
        map.claim(Area::new("a", 0x1000, 0x1000)).unwrap();
        map.claim(Area::new("b", 0x2000, 1)).unwrap();
        map.claim(Area::new("nothing", 0x1800, 0)).unwrap();
        let error = map.claim(Area::new("c", 0xfff, 2)).unwrap_err().to_string();
        assert!(error.contains("a (4096 bytes at 0x1000)") && error.contains("c (2 bytes"), "{error}");
    }

    #[test]
    fn what_is_beyond_ram_is_refused() {
        let memory = memory();
        let mut map = Map::new(&memory);
        for (start, bytes) in [(8 << 20, 1), ((8 << 20) - 1, 2), (u64::MAX, 2), (0, u64::MAX)] {
            let error = map.claim(Area::new("x", start, bytes)).unwrap_err();
            assert!(matches!(error, BootError::OutOfMemory { .. }), "{error}");
        }
        map.claim(Area::new("x", (8 << 20) - 2, 2)).unwrap();
    }

    #[test]
    fn the_initramfs_goes_into_the_highest_gap() {
        let memory = memory();
        let mut map = Map::new(&memory);
        map.claim(Area::new("top", (8 << 20) - 0x1000, 0x1000)).unwrap();
        assert_eq!(map.claim_high("i", 0x1801, u64::MAX).unwrap().start, (8 << 20) - 0x3000);
        map.claim(Area::new("big", 0x10_0000, 0x60_0000)).unwrap();
        assert!(matches!(
            map.claim_high("j", 0x10_0000, u64::MAX),
            Err(BootError::NoRoomForInitramfs { .. })
        ));
    }

    #[test]
    fn the_initramfs_stays_below_its_bound() {
        let memory = memory();
        let mut map = Map::new(&memory);
        assert_eq!(map.claim_high("i", 0x1000, 0x20_0800).unwrap().start, 0x1f_f000);
        assert!(matches!(map.claim_high("j", 1, 0x10_0000), Err(BootError::NoRoomForInitramfs { .. })));
    }

    #[test]
    fn a_kernel_goes_up_past_what_is_in_its_way() {
        let memory = memory();
        let mut map = Map::new(&memory);
        map.claim(Area::new("a", 0x20_0000, 0x1000)).unwrap();
        map.claim(Area::new("b", 0x40_0000, 1)).unwrap();
        let mut place = |bytes| map.claim_low("k", bytes, 0x10_0000, 0x10_0000).map(|a| a.start);
        assert_eq!(place(0x10_0001).unwrap(), 0x50_0000);
        assert_eq!(place(0x10_0000).unwrap(), 0x10_0000);
        assert!(matches!(place(0x20_0000), Err(BootError::NoRoomForKernel { .. })));
        assert!(matches!(place(u64::MAX), Err(BootError::NoRoomForKernel { .. })));
    }

    #[test]
    fn the_map_covers_ram_without_the_legacy_hole() {
        let usable = |bytes| {
            let map = memory_map(&layout(bytes).unwrap());
            map.iter().filter(|e| e.usable).map(|e| (e.start, e.end)).collect::<Vec<_>>()
        };
        assert_eq!(usable(512 << 20), [(0, 0x9_fc00), (0x10_0000, 512 << 20)]);
        assert_eq!(usable(3 << 30), [(0, 0x9_fc00), (0x10_0000, 3 << 30)]);
        assert_eq!(usable(4 << 30), [(0, 0x9_fc00), (0x10_0000, 3 << 30), (4 << 30, 5 << 30)]);
    }

    proptest! {
        #[test]
        fn what_is_claimed_never_overlaps_and_is_in_ram(
            wishes in proptest::collection::vec((0..3u8, 0..0x90_0000u64, 0..0x30_0000u64, 0..22u32), 1..40)
        ) {
            let memory = memory();
            let mut map = Map::new(&memory);
            for area in boot_areas(100) {
                map.claim(area).unwrap();
            }
            for (kind, at, bytes, shift) in wishes {
                match kind {
                    0 => drop(map.claim(Area::new("fixed", at, bytes))),
                    1 => {
                        if let Ok(area) = map.claim_low("low", bytes, at, 1 << shift) {
                            prop_assert!(area.start >= at && area.start % (1 << shift) == 0);
                        }
                    }
                    _ => {
                        if let Ok(area) = map.claim_high("high", bytes, at) {
                            prop_assert!(area.start + area.bytes <= at && area.start >= LEGACY_HOLE.1);
                        }
                    }
                }
            }
            let mut claimed: Vec<_> = map.claimed.iter().filter(|a| a.bytes > 0).collect();
            claimed.sort_unstable_by_key(|a| a.start);
            for pair in claimed.windows(2) {
                prop_assert!(pair[0].start + pair[0].bytes <= pair[1].start, "{} {}", pair[0], pair[1]);
            }
            prop_assert!(claimed.iter().all(|a| a.start + a.bytes <= 8 << 20));
        }
    }
}
