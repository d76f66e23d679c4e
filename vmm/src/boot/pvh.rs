//! The PVH boot protocol (Xen, docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h): start information, memory map,
//! command line, one module, and a flat 32-bit start.

use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Bytes as _, GuestAddress};

use super::BootError;
use super::layout::{Area, CMDLINE, GDT, LEGACY_HOLE, MEMORY_MAP, MODULES, MP_TABLE, START_INFO};
use super::mptable;
use crate::config::VmConfig;
use crate::memory::{Extent, Memory};

const MAGIC: u32 = 0x336e_c578;
/// The version from which on there is a memory map.
const VERSION: u32 = 1;
const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// Descriptors: none, flat 32-bit code, flat 32-bit data, a 32-bit task state segment at 0.
const GDT_ENTRIES: [u64; 4] = [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067];

/// The registers of the boot processor that the protocol leaves to the loader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BootRegisters {
    pub(crate) entry: u64,
    pub(crate) start_info: u64,
    pub(crate) gdt_base: u64,
    pub(crate) gdt_limit: u16,
    pub(crate) code_selector: u16,
    pub(crate) data_selector: u16,
    pub(crate) tss_selector: u16,
}

/// Writes what the kernel finds through `ebx`.
pub(crate) fn write_boot_parameters(
    config: &VmConfig,
    entry: u64,
    module: Option<&Area>,
    memory: &Memory,
) -> Result<BootRegisters, BootError> {
    let map = memory_map(memory.extents());
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        cmdline_paddr: CMDLINE,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).expect("a handful"),
        ..Default::default()
    };
    let mut areas = vec![(CMDLINE, [config.cmdline.as_bytes(), &[0]].concat())];
    areas.push((GDT, GDT_ENTRIES.iter().flat_map(|e| e.to_le_bytes()).collect()));
    areas.push((MEMORY_MAP, map.iter().flat_map(map_bytes).collect()));
    if let Some(module) = module {
        (info.nr_modules, info.modlist_paddr) = (1, MODULES);
        let entry = hvm_modlist_entry { paddr: module.start, size: module.bytes, ..Default::default() };
        areas.push((MODULES, module_bytes(&entry)));
    }
    areas.push((START_INFO, info_bytes(&info)));
    if config.cpus > 1 {
        areas.push((MP_TABLE, mptable::build(config.cpus, MP_TABLE)));
    }
    for (at, bytes) in areas {
        memory.mapping().write_slice(&bytes, GuestAddress(at)).expect("the areas were claimed in RAM");
    }
    Ok(BootRegisters {
        entry,
        start_info: START_INFO,
        gdt_base: GDT,
        gdt_limit: 8 * 4 - 1,
        code_selector: 8,
        data_selector: 16,
        tss_selector: 24,
    })
}

/// RAM as the kernel may use it: without the last kibibyte of conventional memory (tables) and the classic hole.
fn memory_map(extents: &[Extent]) -> Vec<hvm_memmap_table_entry> {
    let entry = |addr, end: u64, type_| hvm_memmap_table_entry { addr, size: end - addr, type_, reserved: 0 };
    let mut map = vec![entry(0, MP_TABLE, RAM), entry(MP_TABLE, LEGACY_HOLE.1, RESERVED)];
    for extent in extents {
        map.push(entry(extent.start().max(LEGACY_HOLE.1), extent.start() + extent.bytes(), RAM));
    }
    map
}

fn map_bytes(entry: &hvm_memmap_table_entry) -> Vec<u8> {
    [&entry.addr.to_le_bytes()[..], &entry.size.to_le_bytes(), &entry.type_.to_le_bytes(), &[0; 4]].concat()
}

fn module_bytes(entry: &hvm_modlist_entry) -> Vec<u8> {
    [entry.paddr, entry.size, entry.cmdline_paddr, 0].iter().flat_map(|f| f.to_le_bytes()).collect()
}

fn info_bytes(info: &hvm_start_info) -> Vec<u8> {
    let head = [info.magic, info.version, info.flags, info.nr_modules];
    let addresses = [info.modlist_paddr, info.cmdline_paddr, info.rsdp_paddr, info.memmap_paddr];
    let mut bytes: Vec<u8> = head.iter().flat_map(|f| f.to_le_bytes()).collect();
    bytes.extend(addresses.iter().flat_map(|f| f.to_le_bytes()));
    bytes.extend([info.memmap_entries, info.reserved].iter().flat_map(|f| f.to_le_bytes()));
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_covers_ram_without_the_legacy_hole() {
        let extents = crate::memory::layout(4 << 30).unwrap();
        let map = memory_map(&extents);
        let ram: Vec<_> = map.iter().filter(|e| e.type_ == RAM).map(|e| (e.addr, e.addr + e.size)).collect();
        assert_eq!(ram, [(0, 0x9_fc00), (0x10_0000, 3 << 30), (4 << 30, 5 << 30)]);
    }

    #[test]
    fn structures_have_the_protocols_sizes() {
        assert_eq!(info_bytes(&hvm_start_info::default()).len(), size_of::<hvm_start_info>());
        assert_eq!(module_bytes(&hvm_modlist_entry::default()).len(), size_of::<hvm_modlist_entry>());
        assert_eq!(map_bytes(&hvm_memmap_table_entry::default()).len(), size_of::<hvm_memmap_table_entry>());
    }
}
