//! The ACPI tables (ACPI 6.5, chapter 5), for hardware-reduced ACPI (section 4.1): no fixed timers, events or power buttons, only
//! processors, interrupt controllers, the serial port, the devices on virtio-mmio, and ports to power off and to reset.
//!
//! ```text
//! RSDP ─► XSDT ─┬─► FADT ─► DSDT: processors, COM1, devices, \_S5
//!               └─► MADT: local APICs, their NMI line, the I/O APIC
//! ```
//! They stand one behind the other where the classic PC has its firmware, and the memory map says reserved.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;

use super::MmioDevice;
use crate::devices::{power, reset, serial};

const OEM: [u8; 6] = *b"TERN  ";
const OEM_TABLE: [u8; 8] = *b"TERNVM  ";
const OEM_REVISION: u32 = 1;

const IO_APIC_ADDRESS: u32 = 0xfec0_0000;
const LOCAL_APIC_ADDRESS: u32 = 0xfee0_0000;
const MADT_REVISION: u8 = 5;
/// The MADT's header with the local APICs' address and the flags behind it.
const MADT_HEAD_BYTES: u32 = 44;
/// PCAT_COMPAT: there are two 8259s as well.
const MADT_FLAGS: u32 = 1;
/// A local APIC's NMI line: type, length, every processor, polarity and trigger as the bus has them, LINT1.
const LOCAL_NMI: [u8; 6] = [4, 6, 0xff, 0, 0, 1];
const DSDT_REVISION: u8 = 2;
/// The FADT's IAPC_BOOT_ARCH (table 5.11): user-visible devices on ISA; no 8042, no VGA, no CMOS clock.
const BOOT_ARCH: u16 = 1 | 1 << 2 | 1 << 5;

/// Tables begin at multiples of this.
const ALIGNMENT: u64 = 64;

/// The tables, to be put at `at`, where the RSDP stands.
pub(crate) fn build(at: u64, cpus: u8, devices: &[MmioDevice]) -> Vec<u8> {
    let mut tables = Tables { at, bytes: vec![0; Rsdp::len()] };
    let dsdt = tables.push(&dsdt(cpus, devices));
    let fadt = tables.push(&fadt(dsdt));
    let madt = tables.push(&madt(cpus));
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = tables.push(&bytes(&xsdt));
    let rsdp = bytes(&Rsdp::new(OEM, xsdt));
    tables.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    tables.bytes
}

struct Tables {
    at: u64,
    bytes: Vec<u8>,
}

impl Tables {
    /// Appends a table; returns its guest-physical address.
    fn push(&mut self, table: &[u8]) -> u64 {
        let offset = (self.bytes.len() as u64).next_multiple_of(ALIGNMENT);
        self.bytes.resize(usize::try_from(offset).expect("a few KiB"), 0);
        self.bytes.extend(table);
        self.at + offset
    }
}

fn bytes(object: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    object.to_aml_bytes(&mut bytes);
    bytes
}

/// An 8-bit register in I/O space.
fn port(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port))
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::PerformanceServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::ResetRegSup)
        .flag(Flags::HwReducedAcpi);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = port(reset::PORT);
    fadt.reset_value = reset::PULSE_RESET;
    fadt.sleep_control_reg = port(power::CONTROL);
    fadt.sleep_status_reg = port(power::STATUS);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE).into();
    bytes(&fadt.finalize())
}

fn madt(cpus: u8) -> Vec<u8> {
    let mut madt = Sdt::new(*b"APIC", MADT_HEAD_BYTES, MADT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
    madt.write_u32(36, LOCAL_APIC_ADDRESS);
    madt.write_u32(40, MADT_FLAGS);
    for id in 0..cpus {
        madt.append_slice(&bytes(&ProcessorLocalApic::new(id, id, EnabledStatus::Enabled)));
    }
    // Its lines are the global interrupts from 0 on; as the timer's is 0 there is no override.
    madt.append_slice(&bytes(&IoApic::new(cpus, IO_APIC_ADDRESS, 0)));
    madt.append_slice(&LOCAL_NMI);
    madt.as_slice().to_vec()
}

fn dsdt(cpus: u8, devices: &[MmioDevice]) -> Vec<u8> {
    let mut inside: Vec<Raw> = (0..cpus).map(processor).collect();
    inside.push(com1());
    inside.extend(devices.iter().enumerate().map(|(index, device)| virtio(index, device)));
    let inside: Vec<&dyn Aml> = inside.iter().map(|raw| raw as &dyn Aml).collect();
    let mut dsdt = Sdt::new(*b"DSDT", 36, DSDT_REVISION, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&bytes(&Scope::new("_SB_".into(), inside)));
    // What the sleep control register is to be told for soft-off; the other elements belong to registers that are not there.
    let soft_off = Package::new(vec![&power::SOFT_OFF, &power::SOFT_OFF, &0u8, &0u8]);
    dsdt.append_slice(&bytes(&Name::new("_S5_".into(), &soft_off)));
    dsdt.as_slice().to_vec()
}

/// Finished AML.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn device(name: &str, children: Vec<&dyn Aml>) -> Raw {
    Raw(bytes(&Device::new(Path::new(name), children)))
}

fn processor(index: u8) -> Raw {
    let hid = Name::new("_HID".into(), &"ACPI0007");
    let uid = Name::new("_UID".into(), &index);
    device(&format!("C{index:03}"), vec![&hid, &uid])
}

fn com1() -> Raw {
    let hid = Name::new("_HID".into(), &EISAName::new("PNP0501"));
    let uid = Name::new("_UID".into(), &1u8);
    let length = u8::try_from(serial::PORTS).expect("eight");
    let ports = IO::new(serial::PORT, serial::PORT, 1, length);
    let line = edge(serial::INTERRUPT_LINE);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &line]));
    device("COM1", vec![&hid, &uid, &resources])
}

/// A device on virtio-mmio (the kernel's Documentation/devicetree/bindings/virtio/mmio.txt names its ACPI ID beside).
fn virtio(index: usize, at: &MmioDevice) -> Raw {
    let low = |value| u32::try_from(value).expect("devices stand below 4 GiB");
    let hid = Name::new("_HID".into(), &"LNRO0005");
    let uid = Name::new("_UID".into(), &index);
    let registers = Memory32Fixed::new(true, low(at.base), low(at.bytes));
    let line = edge(at.gsi);
    let resources = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&registers, &line]));
    device(&format!("V{index:03}"), vec![&hid, &uid, &resources])
}

/// An interrupt that one device raises: edge-triggered, active high.
fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::layout::{ACPI_TABLES, LEGACY_HOLE};
    use crate::limits::CPUS_MAX;

    fn devices(count: u32) -> Vec<MmioDevice> {
        (0..count)
            .map(|n| MmioDevice { base: 0xd000_0000 + u64::from(n) * 4096, bytes: 4096, gsi: 5 + n })
            .collect()
    }

    fn word(bytes: &[u8], at: usize) -> usize {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
    }

    fn pointer(bytes: &[u8], at: usize) -> usize {
        usize::try_from(u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) - ACPI_TABLES).unwrap()
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
    }

    /// The table at `at`, with its signature, length and checksum looked at.
    fn table<'a>(all: &'a [u8], at: usize, signature: &[u8; 4]) -> &'a [u8] {
        let table = &all[at..at + word(all, at + 4)];
        assert_eq!(&table[..4], signature);
        assert_eq!((sum(table), at % 64), (0, 0), "{signature:?}");
        table
    }

    fn count(haystack: &[u8], needle: &[u8]) -> usize {
        haystack.windows(needle.len()).filter(|w| *w == needle).count()
    }

    #[test]
    fn every_table_is_found_and_sums_to_zero() {
        for (cpus, found) in [(1, 0), (2, 3), (CPUS_MAX, 19)] {
            let all = build(ACPI_TABLES, cpus, &devices(found));
            assert!(all.len() as u64 <= LEGACY_HOLE.1 - ACPI_TABLES);
            assert_eq!(&all[..8], b"RSD PTR ");
            assert_eq!((sum(&all[..20]), sum(&all[..36]), all[15]), (0, 0, 2));
            let xsdt = table(&all, pointer(&all, 24), b"XSDT");
            assert_eq!(xsdt.len(), 36 + 2 * 8);
            let fadt = table(&all, pointer(xsdt, 36), b"FACP");
            assert_eq!(fadt.len(), 276, "ACPI 6.5, table 5.9");
            let madt = table(&all, pointer(xsdt, 44), b"APIC");
            assert_eq!(madt.len(), 44 + usize::from(cpus) * 8 + 12 + 6);
            let dsdt = table(&all, pointer(fadt, 140), b"DSDT");
            assert_eq!(count(dsdt, b"ACPI0007"), usize::from(cpus));
            assert_eq!(count(dsdt, b"LNRO0005"), found as usize);
            assert_eq!(count(dsdt, b"_S5_"), 1);
        }
    }

    #[test]
    fn the_fadt_says_how_to_power_off_and_to_reset() {
        let fadt = fadt(0x1234);
        let flags = word(&fadt, 112);
        assert_eq!((flags >> 20 & 1, flags >> 10 & 1), (1, 1), "hardware-reduced, reset register");
        // Generic addresses: I/O space, 8 bits wide, from bit 0, byte access.
        assert_eq!(fadt[116..129], [1, 8, 0, 1, 0x64, 0, 0, 0, 0, 0, 0, 0, 0xfe]);
        assert_eq!(fadt[244..252], [1, 8, 0, 1, 0, 6, 0, 0]);
        assert_eq!(fadt[256..264], [1, 8, 0, 1, 1, 6, 0, 0]);
    }

    #[test]
    fn a_device_has_its_registers_and_its_line() {
        let dsdt = dsdt(1, &[MmioDevice { base: 0xd000_2000, bytes: 0x1000, gsi: 23 }]);
        // ACPI 6.5, 6.4.3.4 and 6.4.3.6.
        let registers = [0x86, 9, 0, 1, 0, 0x20, 0, 0xd0, 0, 0x10, 0, 0];
        let line = [0x89, 6, 0, 0b0011, 1, 23, 0, 0, 0];
        assert_eq!(count(&dsdt, &[&registers[..], &line].concat()), 1);
    }
}
