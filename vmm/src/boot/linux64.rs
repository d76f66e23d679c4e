//! The 64-bit entry of Linux's boot protocol (the kernel's Documentation/arch/x86/boot.rst, "64-bit Boot Protocol", and
//! zero-page.rst): `boot_params`, an identity map, descriptors, and long mode from the first instruction on.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::ByteValued as _;

use super::layout::{Area, CMDLINE, GDT, MemoryRun, PAGE_TABLES, ZERO_PAGE};
use super::{BootRegisters, Mode};

/// "An unknown boot loader": none has been registered for this monitor.
const LOADER_UNDEFINED: u8 = 0xff;
const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = 0x5372_6448;
/// The version of the protocol that a vmlinux, which has no header of its own, is told: that of the fields written here.
const VERSION: u16 = 0x20f;
const LOADED_HIGH: u8 = 1;
const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// Descriptors: none, none, 64-bit code (__BOOT_CS, 0x10), flat data (__BOOT_DS, 0x18), and a task state segment at 0 that takes two
/// entries in long mode.
pub(crate) const GDT_ENTRIES: [u64; 6] =
    [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x0000_8b00_0000_0067, 0];

/// Page table entries: present and writable; and for a directory's, a page of 2 MiB.
const TABLE: u64 = 0b11;
const LARGE: u64 = TABLE | 1 << 7;
/// Entries of a table.
const ENTRIES: usize = 512;
const TABLE_BYTES: u64 = 4096;
/// Directories of 1 GiB each: all below 4 GiB is mapped, for everything that the protocol wants mapped stands there.
const DIRECTORIES: u64 = 4;
/// The bytes of all page tables.
pub(crate) const PAGE_TABLES_BYTES: u64 = (2 + DIRECTORIES) * TABLE_BYTES;

/// What the kernel is told.
#[derive(Debug)]
pub(crate) struct Told<'a> {
    /// The kernel's own setup header, if it has one, and where it stands.
    pub(crate) header: Option<(&'a setup_header, u64)>,
    pub(crate) initramfs: Option<&'a Area>,
    pub(crate) map: &'a [MemoryRun],
    /// Where the ACPI tables begin; 0 for none.
    pub(crate) rsdp: u64,
    /// The command line's length, without its final zero.
    pub(crate) cmdline_bytes: usize,
}

/// What goes to which address.
pub(crate) fn structures(told: &Told<'_>) -> Vec<(u64, Vec<u8>)> {
    vec![
        (GDT, GDT_ENTRIES.iter().flat_map(|e| e.to_le_bytes()).collect()),
        (ZERO_PAGE, zero_page(told).as_slice().to_vec()),
        (PAGE_TABLES, page_tables(PAGE_TABLES)),
    ]
}

/// The registers that the protocol asks for.
pub(crate) fn registers(entry: u64) -> BootRegisters {
    BootRegisters {
        mode: Mode::Long { page_tables: PAGE_TABLES },
        entry,
        info: ZERO_PAGE,
        gdt_base: GDT,
        gdt_limit: 8 * 6 - 1,
        code_selector: 0x10,
        data_selector: 0x18,
        tss_selector: 0x20,
    }
}

fn low(address: u64) -> u32 {
    u32::try_from(address).expect("it was placed below 4 GiB")
}

fn zero_page(told: &Told<'_>) -> boot_params {
    let mut page = boot_params { acpi_rsdp_addr: told.rsdp, ..Default::default() };
    page.hdr = match told.header {
        Some((header, at)) => setup_header { code32_start: low(at), ..*header },
        None => setup_header {
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            version: VERSION,
            loadflags: LOADED_HIGH,
            cmdline_size: u32::try_from(told.cmdline_bytes).expect("it is bounded"),
            ..Default::default()
        },
    };
    page.hdr.type_of_loader = LOADER_UNDEFINED;
    page.hdr.cmd_line_ptr = low(CMDLINE);
    if let Some(initramfs) = told.initramfs {
        (page.hdr.ramdisk_image, page.hdr.ramdisk_size) = (low(initramfs.start), low(initramfs.bytes));
    }
    let mut table = [boot_e820_entry::default(); 128];
    for (entry, run) in table.iter_mut().zip(told.map) {
        let kind = if run.usable { RAM } else { RESERVED };
        *entry = boot_e820_entry { addr: run.start, size: run.end - run.start, r#type: kind };
    }
    page.e820_table = table;
    page.e820_entries = u8::try_from(told.map.len()).expect("a handful");
    page
}

/// An identity map of all below 4 GiB, with its root at `at`.
fn page_tables(at: u64) -> Vec<u8> {
    let table = |number: u64| (at + number * TABLE_BYTES) | TABLE;
    let mut entries = vec![table(1)];
    entries.resize(ENTRIES, 0);
    entries.extend((0..DIRECTORIES).map(|directory| table(2 + directory)));
    entries.resize(2 * ENTRIES, 0);
    entries.extend((0..DIRECTORIES << 9).map(|page| page << 21 | LARGE));
    entries.iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Walks the tables as the processor does.
    fn translate(tables: &[u8], at: u64, address: u64) -> Option<u64> {
        let entry = |table: u64, index: u64| {
            let from = usize::try_from(table - at + 8 * index).unwrap();
            u64::from_le_bytes(tables[from..from + 8].try_into().unwrap())
        };
        let mut table = at;
        for shift in [39, 30, 21] {
            let found = entry(table, (address >> shift) & 511);
            if found & 1 == 0 {
                return None;
            }
            if found & 1 << 7 != 0 {
                return Some((found & !0x1f_ffff) | (address & 0x1f_ffff));
            }
            table = found & !0xfff;
        }
        None
    }

    #[test]
    fn all_below_4_gib_is_mapped_to_itself_and_nothing_else() {
        let tables = page_tables(PAGE_TABLES);
        assert_eq!(tables.len() as u64, PAGE_TABLES_BYTES);
        for address in [0, 0xfff, 0x10_0000, 0x1234_5678, (3 << 30) - 1, (4 << 30) - 1] {
            assert_eq!(translate(&tables, PAGE_TABLES, address), Some(address), "{address:#x}");
        }
        assert_eq!(translate(&tables, PAGE_TABLES, 4 << 30), None);
        assert_eq!(translate(&tables, PAGE_TABLES, 512 << 30), None);
    }

    #[test]
    fn a_kernels_own_header_is_kept_but_for_what_the_loader_fills_in() {
        let header = setup_header { version: 0x20f, init_size: 77, setup_sects: 3, ..Default::default() };
        let initramfs = Area::new("i", 0x100_0000, 0x2000);
        let map = [MemoryRun { start: 0, end: 0x9_fc00, usable: true }];
        let told = Told {
            header: Some((&header, 0x20_0000)),
            initramfs: Some(&initramfs),
            map: &map,
            rsdp: 0xe_0000,
            cmdline_bytes: 5,
        };
        let page = zero_page(&told);
        let hdr = page.hdr;
        assert_eq!(({ hdr.version }, { hdr.init_size }, hdr.setup_sects), (0x20f, 77, 3));
        assert_eq!((hdr.type_of_loader, { hdr.code32_start }), (0xff, 0x20_0000));
        assert_eq!(({ hdr.ramdisk_image }, { hdr.ramdisk_size }), (0x100_0000, 0x2000));
        assert_eq!(({ hdr.cmd_line_ptr }, { page.acpi_rsdp_addr }), (0x2_0000, 0xe_0000));
        assert_eq!(page.e820_entries, 1);
        let first = page.e820_table[0];
        assert_eq!(({ first.addr }, { first.size }, { first.r#type }), (0, 0x9_fc00, RAM));
        // boot.rst: the structure is to be zero but for what is filled in.
        assert_eq!((page.sentinel, { page.ext_cmd_line_ptr }, { page.ext_ramdisk_image }), (0, 0, 0));
    }
}
