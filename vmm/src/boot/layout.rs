//! Who stands where in guest memory at the start.

use std::borrow::Cow;
use std::fmt;

use page::PAGE_SIZE;

use super::BootError;
use crate::memory::{Extent, Memory};

/// The global descriptor table that the boot processor starts with.
pub(crate) const GDT: u64 = 0x500;
/// PVH's start-of-day structure.
pub(crate) const START_INFO: u64 = 0x6000;
/// Its list of modules.
pub(crate) const MODULES: u64 = 0x6100;
/// Its memory map.
pub(crate) const MEMORY_MAP: u64 = 0x7000;
/// The kernel's command line.
pub(crate) const CMDLINE: u64 = 0x2_0000;
/// The MultiProcessor table, in the last kibibyte of conventional memory, where kernels look for it.
pub(crate) const MP_TABLE: u64 = 0x9_fc00;
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

/// What the boot protocol itself puts into memory.
pub(crate) fn boot_areas(cmdline_bytes: usize, cpus: u8) -> Vec<Area> {
    let mut areas = vec![
        Area::new("the boot descriptor table", GDT, 0x20),
        Area::new("the boot start information", START_INFO, 0x200),
        Area::new("the boot memory map", MEMORY_MAP, 0x100),
        Area::new("the command line", CMDLINE, cmdline_bytes as u64 + 1),
    ];
    if cpus > 1 {
        areas.push(Area::new("the multiprocessor table", MP_TABLE, LEGACY_HOLE.0 - MP_TABLE));
    }
    areas
}

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

    /// Takes the highest free run of whole pages below 3 GiB that holds `bytes`, above the first mebibyte.
    pub(crate) fn claim_high(&mut self, what: &'static str, bytes: u64) -> Result<Area, BootError> {
        let none = BootError::NoRoomForInitramfs { bytes };
        let Some(low) = self.extents.first() else { return Err(none) };
        let mut ends: Vec<u64> = self.claimed.iter().map(|c| c.start).filter(|s| *s <= low.bytes()).collect();
        ends.push(low.bytes());
        ends.sort_unstable();
        for end in ends.into_iter().rev() {
            let Some(start) = end.checked_sub(bytes).map(|s| s - s % PAGE_SIZE as u64) else { continue };
            let area = Area::new(what, start, bytes);
            if start >= LEGACY_HOLE.1 && !self.claimed.iter().any(|c| c.overlaps(&area)) {
                self.claimed.push(area.clone());
                return Ok(area);
            }
        }
        Err(none)
    }
}

#[cfg(test)]
mod tests {
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
        assert_eq!(map.claim_high("i", 0x1801).unwrap().start, (8 << 20) - 0x3000);
        map.claim(Area::new("big", 0x10_0000, 0x60_0000)).unwrap();
        assert!(matches!(map.claim_high("j", 0x10_0000), Err(BootError::NoRoomForInitramfs { .. })));
    }
}
