//! The MultiProcessor table (Intel, MultiProcessor Specification 1.4, chapter 4): how a kernel without ACPI finds the other
//! virtual CPUs and the interrupt lines. It is there when the ACPI tables are not.

const FLOATING_BYTES: u64 = 16;
const APIC_VERSION: u8 = 0x14;
const IO_APIC_ADDRESS: u32 = 0xfec0_0000;
const LOCAL_APIC_ADDRESS: u32 = 0xfee0_0000;
/// As many as KVM's I/O APIC has. Those from 16 on stand as lines of the ISA bus too: they are edge-triggered and active high.
const LINES: u8 = 24;

/// Entry types.
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;
/// Interrupt types.
const VECTORED: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;

fn set_checksum(bytes: &mut [u8], at: usize) {
    bytes[at] = 0;
    let sum = bytes.iter().fold(0u8, |sum, b| sum.wrapping_add(*b));
    bytes[at] = sum.wrapping_neg();
}

fn interrupt(entry: u8, kind: u8, line: u8, apic: u8, pin: u8) -> Vec<u8> {
    // Polarity and trigger mode (two bytes of zero) as the bus has them.
    vec![entry, kind, 0, 0, 0, line, apic, pin]
}

/// The floating pointer and the table behind it, to be put at `at`.
pub(crate) fn build(cpus: u8, at: u64) -> Vec<u8> {
    let io_apic = cpus;
    let mut entries: Vec<Vec<u8>> = (0..cpus)
        .map(|id| {
            // Enabled, and the first one is the boot processor; family 6 with an FPU and an APIC.
            let flags = 1 | if id == 0 { 2 } else { 0 };
            let mut entry = vec![PROCESSOR, id, APIC_VERSION, flags];
            entry.extend(0x600u32.to_le_bytes());
            entry.extend(0x201u32.to_le_bytes());
            entry.extend([0; 8]);
            entry
        })
        .collect();
    entries.push([&[BUS, 0][..], b"ISA   "].concat());
    entries.push([&[IO_APIC, io_apic, APIC_VERSION, 1][..], &IO_APIC_ADDRESS.to_le_bytes()].concat());
    entries.extend((0..LINES).map(|line| interrupt(IO_INTERRUPT, VECTORED, line, io_apic, line)));
    entries.push(interrupt(LOCAL_INTERRUPT, EXT_INT, 0, 0, 0));
    entries.push(interrupt(LOCAL_INTERRUPT, NMI, 0, 0xff, 1));

    let body = entries.concat();
    let length = u16::try_from(44 + body.len()).expect("it fits the last kibibyte, see the test");
    let mut table = Vec::new();
    table.extend(b"PCMP");
    table.extend(length.to_le_bytes());
    table.extend([4, 0]);
    table.extend(b"TERN    VM          ");
    table.extend([0; 6]);
    table.extend(u16::try_from(entries.len()).expect("few").to_le_bytes());
    table.extend(LOCAL_APIC_ADDRESS.to_le_bytes());
    table.extend([0; 4]);
    table.extend(body);
    set_checksum(&mut table, 7);

    let mut floating = b"_MP_".to_vec();
    floating.extend(u32::try_from(at + FLOATING_BYTES).expect("below 1 MiB").to_le_bytes());
    floating.extend([1, 4, 0, 0, 0, 0, 0, 0]);
    set_checksum(&mut floating, 10);
    [floating, table].concat()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::layout::{LEGACY_HOLE, MP_TABLE};
    use crate::limits::CPUS_MAX;

    #[test]
    fn checksums_are_zero_and_the_largest_fits() {
        for cpus in [1, 2, 32] {
            let bytes = build(cpus, MP_TABLE);
            let (floating, table) = bytes.split_at(16);
            assert_eq!(floating.iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0);
            assert_eq!(table.iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0);
            assert_eq!(u16::from_le_bytes([table[4], table[5]]) as usize, table.len());
        }
        assert!(build(CPUS_MAX, MP_TABLE).len() as u64 <= LEGACY_HOLE.0 - MP_TABLE);
    }
}
