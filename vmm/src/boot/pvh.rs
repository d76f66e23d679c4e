//! The PVH boot protocol (Xen, docs/misc/pvh.pandoc and public/arch-x86/hvm/start_info.h): start information, memory map,
//! command line, one module, and a flat 32-bit start.

use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};

use super::layout::{Area, CMDLINE, GDT, MEMORY_MAP, MODULES, MemoryRun, START_INFO};
use super::{BootRegisters, Mode};

const MAGIC: u32 = 0x336e_c578;
/// The version from which on there is a memory map.
const VERSION: u32 = 1;
const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// Descriptors: none, flat 32-bit code, flat 32-bit data, a 32-bit task state segment at 0.
const GDT_ENTRIES: [u64; 4] = [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067];

/// What goes to which address.
pub(crate) fn structures(module: Option<&Area>, map: &[MemoryRun], rsdp: u64) -> Vec<(u64, Vec<u8>)> {
    let mut info = hvm_start_info {
        magic: MAGIC,
        version: VERSION,
        cmdline_paddr: CMDLINE,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: u32::try_from(map.len()).expect("a handful"),
        rsdp_paddr: rsdp,
        ..Default::default()
    };
    let entry = |run: &MemoryRun| hvm_memmap_table_entry {
        addr: run.start,
        size: run.end - run.start,
        type_: if run.usable { RAM } else { RESERVED },
        reserved: 0,
    };
    let mut areas = vec![
        (GDT, GDT_ENTRIES.iter().flat_map(|e| e.to_le_bytes()).collect()),
        (MEMORY_MAP, map.iter().map(entry).flat_map(|e| map_bytes(&e)).collect()),
    ];
    if let Some(module) = module {
        (info.nr_modules, info.modlist_paddr) = (1, MODULES);
        let entry = hvm_modlist_entry { paddr: module.start, size: module.bytes, ..Default::default() };
        areas.push((MODULES, module_bytes(&entry)));
    }
    areas.push((START_INFO, info_bytes(&info)));
    areas
}

/// The registers that the protocol asks for.
pub(crate) fn registers(entry: u64) -> BootRegisters {
    BootRegisters {
        mode: Mode::Protected,
        entry,
        info: START_INFO,
        gdt_base: GDT,
        gdt_limit: 8 * 4 - 1,
        code_selector: 8,
        data_selector: 16,
        tss_selector: 24,
    }
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
    fn structures_have_the_protocols_sizes() {
        assert_eq!(info_bytes(&hvm_start_info::default()).len(), size_of::<hvm_start_info>());
        assert_eq!(module_bytes(&hvm_modlist_entry::default()).len(), size_of::<hvm_modlist_entry>());
        assert_eq!(map_bytes(&hvm_memmap_table_entry::default()).len(), size_of::<hvm_memmap_table_entry>());
    }
}
