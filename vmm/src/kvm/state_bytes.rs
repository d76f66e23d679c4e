//! The saved state as bytes.
//!
//! ```text
//! "TERNVMST" | version u32 | body | SHA-256 of all before it
//! body    = section*                      in the order of `MachineState`'s fields, each virtual CPU's after the other
//! section = length u32 | bytes            integers little-endian; KVM's structures as the x86-64 kernel interface has them
//! devices = count section | (kind section | bytes section)*
//! ```
//! Version 2 added the devices, the page-directory pointers (an empty section where there are none) and vector state beyond 4 KiB;
//! version 1 is still read, as a state without them.
//!
//! The kernel interface never changes a structure's layout, so its bytes are a stable form. A section of another length, one
//! too many or too few, or a list beyond its bound is an error that names the field; nothing here panics on any input.

use kvm_bindings::{kvm_cpuid_entry2, kvm_msr_entry};
use sha2::{Digest as _, Sha256};
use vm_superio::serial::SerialState;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::state::{ChipState, DeviceState, MachineState, VcpuState};
use crate::devices::serial::FIFO_BYTES;
use crate::limits::{
    CPUS_MAX, STATE_DEVICE_MAX_BYTES, STATE_DEVICES_MAX, STATE_ENTRIES_MAX, STATE_MAX_BYTES,
    STATE_XSAVE_MAX_BYTES, STATE_XSAVE_MIN_BYTES,
};

/// The version that this build writes.
pub const STATE_VERSION: u32 = 2;
/// The oldest version that this build reads.
pub const STATE_VERSION_OLDEST: u32 = 1;

const MAGIC: [u8; 8] = *b"TERNVMST";
const DIGEST_BYTES: usize = 32;

/// Why bytes are no state that this build can load.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// Not one at all.
    #[error("these bytes are not the saved state of a VM")]
    Magic,
    /// One of another build.
    #[error(
        "the saved state has version {0}, and this build reads versions {STATE_VERSION_OLDEST} to {STATE_VERSION}: use the newer build"
    )]
    Version(u32),
    /// Too long to be one.
    #[error("the saved state is {0} bytes long, more than {STATE_MAX_BYTES}")]
    TooLong(usize),
    /// Changed since it was written.
    #[error("the saved state is damaged: its digest does not match")]
    Digest,
    /// It ends too early.
    #[error("the saved state ends within {field}")]
    Truncated {
        /// Where.
        field: &'static str,
    },
    /// A field that has another length than its type.
    #[error("the saved state's {field} has {got} bytes and should have {expected}")]
    Length {
        /// Which.
        field: &'static str,
        /// What it should have.
        expected: usize,
        /// What it has.
        got: usize,
    },
    /// A list beyond its bound.
    #[error("the saved state's {field} has {got} entries, more than {most}")]
    TooMany {
        /// Which.
        field: &'static str,
        /// How many it has.
        got: usize,
        /// How many it may have.
        most: usize,
    },
    /// A device's part that does not fit the device that was built here.
    #[error("the saved state of the device `{device}` cannot be used here: {what}")]
    Device {
        /// Which.
        device: String,
        /// What is wrong.
        what: &'static str,
    },
    /// More than a state has.
    #[error("the saved state has {0} bytes after its last field")]
    Trailing(usize),
}

/// Writes a state.
pub(crate) fn encode(state: &MachineState) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    out.extend(STATE_VERSION.to_le_bytes());
    encode_body(state, &mut out);
    let digest = Sha256::digest(&out);
    out.extend(digest);
    out
}

/// Whether `bytes` are a saved state that this build reads.
///
/// # Errors
/// What is wrong with them.
pub fn check_state(bytes: &[u8]) -> Result<(), StateError> {
    decode(bytes).map(|_| ())
}

/// Reads a state.
pub(crate) fn decode(bytes: &[u8]) -> Result<MachineState, StateError> {
    if bytes.len() > STATE_MAX_BYTES {
        return Err(StateError::TooLong(bytes.len()));
    }
    let rest = bytes.strip_prefix(&MAGIC).ok_or(StateError::Magic)?;
    let (version, rest) = rest.split_first_chunk::<4>().ok_or(StateError::Truncated { field: "version" })?;
    let version = u32::from_le_bytes(*version);
    if !(STATE_VERSION_OLDEST..=STATE_VERSION).contains(&version) {
        return Err(StateError::Version(version));
    }
    let (body, digest) =
        rest.split_last_chunk::<DIGEST_BYTES>().ok_or(StateError::Truncated { field: "digest" })?;
    if Sha256::digest(&bytes[..bytes.len() - DIGEST_BYTES]).as_slice() != digest {
        return Err(StateError::Digest);
    }
    decode_body(body, version)
}

fn put(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend(u32::try_from(bytes.len()).expect("a state is a few hundred kibibytes").to_le_bytes());
    out.extend(bytes);
}

fn encode_body(state: &MachineState, out: &mut Vec<u8>) {
    put(out, &state.clock_ns.to_le_bytes());
    for chip in &state.chips.irqchips {
        put(out, chip.as_bytes());
    }
    put(out, state.chips.pit.as_bytes());
    let s = &state.serial;
    let registers = [
        s.baud_divisor_low,
        s.baud_divisor_high,
        s.interrupt_enable,
        s.interrupt_identification,
        s.line_control,
        s.line_status,
        s.modem_control,
        s.modem_status,
        s.scratch,
    ];
    put(out, &registers);
    put(out, &s.in_buffer);
    put(out, &u32::try_from(state.devices.len()).expect("at most 64").to_le_bytes());
    for device in &state.devices {
        put(out, &device.kind.to_le_bytes());
        put(out, &device.bytes);
    }
    put(out, &u32::try_from(state.vcpus.len()).expect("at most 32").to_le_bytes());
    for vcpu in &state.vcpus {
        put(out, vcpu.cpuid.as_slice().as_bytes());
        put(out, &vcpu.tsc_khz.to_le_bytes());
        put(out, vcpu.mp_state.as_bytes());
        put(out, vcpu.regs.as_bytes());
        put(out, vcpu.sregs.as_bytes());
        put(out, vcpu.pdptrs.as_ref().map_or(&[], |pdptrs| pdptrs.as_bytes()));
        put(out, &vcpu.xsave);
        put(out, vcpu.xcrs.as_bytes());
        put(out, vcpu.debug.as_bytes());
        put(out, vcpu.lapic.as_bytes());
        put(out, vcpu.msrs.as_slice().as_bytes());
        put(out, vcpu.events.as_bytes());
    }
}

struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn section(&mut self, field: &'static str) -> Result<&'a [u8], StateError> {
        let truncated = StateError::Truncated { field };
        let Some((length, rest)) = self.0.split_first_chunk::<4>() else { return Err(truncated) };
        let length = usize::try_from(u32::from_le_bytes(*length)).map_err(|_| truncated.clone())?;
        let Some((section, rest)) = rest.split_at_checked(length) else { return Err(truncated) };
        self.0 = rest;
        Ok(section)
    }

    fn value<T: FromBytes>(&mut self, field: &'static str) -> Result<T, StateError> {
        let section = self.section(field)?;
        T::read_from_bytes(section).map_err(|_| StateError::Length {
            field,
            expected: size_of::<T>(),
            got: section.len(),
        })
    }

    /// A number of things that follow.
    fn count(&mut self, field: &'static str, most: usize) -> Result<usize, StateError> {
        let got = usize::try_from(u32::from_le_bytes(self.value(field)?)).unwrap_or(usize::MAX);
        if got > most { Err(StateError::TooMany { field, got, most }) } else { Ok(got) }
    }

    /// Bytes of a bounded length.
    fn bytes(&mut self, field: &'static str, most: usize) -> Result<Vec<u8>, StateError> {
        let section = self.section(field)?;
        if section.len() > most {
            return Err(StateError::TooMany { field, got: section.len(), most });
        }
        Ok(section.to_vec())
    }

    fn list<T: FromBytes + IntoBytes + Immutable>(
        &mut self,
        field: &'static str,
        most: usize,
    ) -> Result<Vec<T>, StateError> {
        let section = self.section(field)?;
        let size = size_of::<T>();
        let (got, rest) = (section.len() / size, section.len() % size);
        if rest != 0 {
            return Err(StateError::Length { field, expected: got * size, got: section.len() });
        }
        if got > most {
            return Err(StateError::TooMany { field, got, most });
        }
        let read = |c: &[u8]| T::read_from_bytes(c).expect("a chunk of its size");
        Ok(section.chunks_exact(size).map(read).collect())
    }
}

fn decode_body(body: &[u8], version: u32) -> Result<MachineState, StateError> {
    let mut reader = Reader(body);
    let clock_ns = u64::from_le_bytes(reader.value("clock")?);
    let irqchips = [
        reader.value("first interrupt controller")?,
        reader.value("second interrupt controller")?,
        reader.value("I/O APIC")?,
    ];
    let chips = ChipState { irqchips, pit: reader.value("programmable timer")? };
    let serial = decode_serial(&mut reader)?;
    let devices = if version == 1 { Vec::new() } else { decode_devices(&mut reader)? };
    let count = reader.count("virtual CPUs", usize::from(CPUS_MAX))?;
    let vcpus = (0..count).map(|_| decode_vcpu(&mut reader, version)).collect::<Result<_, _>>()?;
    match reader.0.len() {
        0 => Ok(MachineState { clock_ns, chips, serial, devices, vcpus }),
        left => Err(StateError::Trailing(left)),
    }
}

fn decode_devices(reader: &mut Reader<'_>) -> Result<Vec<DeviceState>, StateError> {
    let count = reader.count("devices", STATE_DEVICES_MAX)?;
    let device = |_| {
        let kind = u32::from_le_bytes(reader.value("device kind")?);
        Ok(DeviceState { kind, bytes: reader.bytes("device state", STATE_DEVICE_MAX_BYTES)? })
    };
    (0..count).map(device).collect()
}

fn decode_serial(reader: &mut Reader<'_>) -> Result<SerialState, StateError> {
    let [
        baud_divisor_low,
        baud_divisor_high,
        interrupt_enable,
        interrupt_identification,
        line_control,
        line_status,
        modem_control,
        modem_status,
        scratch,
    ] = reader.value::<[u8; 9]>("serial port registers")?;
    Ok(SerialState {
        baud_divisor_low,
        baud_divisor_high,
        interrupt_enable,
        interrupt_identification,
        line_control,
        line_status,
        modem_control,
        modem_status,
        scratch,
        in_buffer: reader.list("serial port input", FIFO_BYTES)?,
    })
}

/// None where there is no byte: the guest's paging mode has no such pointers.
fn decode_pdptrs(reader: &mut Reader<'_>) -> Result<Option<[u64; 4]>, StateError> {
    let field = "page-directory pointers";
    let section = reader.section(field)?;
    let wrong = StateError::Length { field, expected: size_of::<[u64; 4]>(), got: section.len() };
    match section {
        [] => Ok(None),
        bytes => <[u64; 4]>::read_from_bytes(bytes).map(Some).map_err(|_| wrong),
    }
}

/// Vector state: whole words, and no less than every processor has.
fn decode_xsave(reader: &mut Reader<'_>, version: u32) -> Result<Vec<u8>, StateError> {
    let field = "vector registers";
    let most = if version == 1 { STATE_XSAVE_MIN_BYTES } else { STATE_XSAVE_MAX_BYTES };
    let bytes = reader.bytes(field, most)?;
    if bytes.len() < STATE_XSAVE_MIN_BYTES || !bytes.len().is_multiple_of(4) {
        return Err(StateError::Length { field, expected: STATE_XSAVE_MIN_BYTES, got: bytes.len() });
    }
    Ok(bytes)
}

fn decode_vcpu(reader: &mut Reader<'_>, version: u32) -> Result<VcpuState, StateError> {
    Ok(VcpuState {
        cpuid: reader.list::<kvm_cpuid_entry2>("CPUID entries", STATE_ENTRIES_MAX)?,
        tsc_khz: u32::from_le_bytes(reader.value("time-stamp counter rate")?),
        mp_state: reader.value("multiprocessing state")?,
        regs: reader.value("registers")?,
        sregs: reader.value("system registers")?,
        pdptrs: if version == 1 { None } else { decode_pdptrs(reader)? },
        xsave: decode_xsave(reader, version)?,
        xcrs: reader.value("extended control registers")?,
        debug: reader.value("debug registers")?,
        lapic: reader.value("local APIC")?,
        msrs: reader.list::<kvm_msr_entry>("model-specific registers", STATE_ENTRIES_MAX)?,
        events: reader.value("pending events")?,
    })
}

#[cfg(test)]
mod tests {
    use kvm_bindings::kvm_regs;
    use proptest::prelude::*;

    use super::*;

    fn vcpu(rip: u64) -> VcpuState {
        VcpuState {
            cpuid: vec![kvm_cpuid_entry2 { function: 1, ..Default::default() }; 3],
            tsc_khz: 2_500_000,
            mp_state: Default::default(),
            regs: kvm_regs { rip, ..Default::default() },
            sregs: Default::default(),
            pdptrs: (rip == 0xfff0).then_some([1, 2, 3, 4]),
            xsave: vec![7; STATE_XSAVE_MIN_BYTES + if rip == 0xfff0 { 4 } else { 0 }],
            xcrs: Default::default(),
            debug: Default::default(),
            lapic: Default::default(),
            msrs: vec![kvm_msr_entry { index: 0x10, data: rip, ..Default::default() }; 43],
            events: Default::default(),
        }
    }

    fn state() -> MachineState {
        let chips = ChipState { irqchips: Default::default(), pit: Default::default() };
        let serial = SerialState { in_buffer: b"unread".to_vec(), ..Default::default() };
        let devices = vec![
            DeviceState { kind: 2, bytes: b"a disk".to_vec() },
            DeviceState { kind: 4, bytes: Vec::new() },
        ];
        MachineState { clock_ns: 123, chips, serial, devices, vcpus: vec![vcpu(0x10_0000), vcpu(0xfff0)] }
    }

    /// As version 1 was written: no devices, no page-directory pointers, 4 KiB of vector state.
    fn version_1(state: &MachineState) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend(1u32.to_le_bytes());
        put(&mut out, &state.clock_ns.to_le_bytes());
        state.chips.irqchips.iter().for_each(|chip| put(&mut out, chip.as_bytes()));
        put(&mut out, state.chips.pit.as_bytes());
        put(&mut out, &[0; 9]);
        put(&mut out, &state.serial.in_buffer);
        put(&mut out, &u32::try_from(state.vcpus.len()).unwrap().to_le_bytes());
        for vcpu in &state.vcpus {
            put(&mut out, vcpu.cpuid.as_slice().as_bytes());
            put(&mut out, &vcpu.tsc_khz.to_le_bytes());
            put(&mut out, vcpu.mp_state.as_bytes());
            put(&mut out, vcpu.regs.as_bytes());
            put(&mut out, vcpu.sregs.as_bytes());
            put(&mut out, &vcpu.xsave[..STATE_XSAVE_MIN_BYTES]);
            put(&mut out, vcpu.xcrs.as_bytes());
            put(&mut out, vcpu.debug.as_bytes());
            put(&mut out, vcpu.lapic.as_bytes());
            put(&mut out, vcpu.msrs.as_slice().as_bytes());
            put(&mut out, vcpu.events.as_bytes());
        }
        let digest = Sha256::digest(&out);
        out.extend(digest);
        out
    }

    #[test]
    fn the_version_before_is_read() {
        let state = state();
        let back = decode(&version_1(&state)).unwrap();
        assert_eq!((back.clock_ns, back.devices.len(), back.vcpus.len()), (123, 0, 2));
        assert_eq!(back.vcpus[1].regs.rip, 0xfff0);
        assert_eq!((back.vcpus[1].pdptrs, back.vcpus[1].xsave.len()), (None, STATE_XSAVE_MIN_BYTES));
    }

    fn body() -> Vec<u8> {
        let mut body = Vec::new();
        encode_body(&state(), &mut body);
        body
    }

    #[test]
    fn what_is_written_is_read() {
        let bytes = encode(&state());
        let back = decode(&bytes).unwrap();
        assert_eq!((back.clock_ns, back.serial.in_buffer.as_slice()), (123, &b"unread"[..]));
        assert_eq!(back.vcpus[1].regs.rip, 0xfff0);
        assert_eq!(back.vcpus[1].msrs.len(), 43);
        assert_eq!(back.devices, state().devices);
        assert_eq!((back.vcpus[0].pdptrs, back.vcpus[1].pdptrs), (None, Some([1, 2, 3, 4])));
        assert_eq!(encode(&back), bytes);
    }

    #[test]
    fn other_versions_and_things_are_named() {
        let mut bytes = encode(&state());
        assert_eq!(decode(b"ELF").unwrap_err(), StateError::Magic);
        assert_eq!(decode(&bytes[..9]).unwrap_err(), StateError::Truncated { field: "version" });
        assert_eq!(decode(&bytes[..bytes.len() - 1]).unwrap_err(), StateError::Digest);
        assert_eq!(
            decode(&vec![0; STATE_MAX_BYTES + 1]).unwrap_err(),
            StateError::TooLong(STATE_MAX_BYTES + 1)
        );
        for other in [0, 3] {
            bytes[8] = other;
            assert_eq!(decode(&bytes).unwrap_err(), StateError::Version(other.into()));
        }
    }

    #[test]
    fn every_truncation_of_the_body_is_an_error() {
        let body = body();
        for end in 0..body.len() {
            let error = decode_body(&body[..end], STATE_VERSION).unwrap_err();
            assert!(matches!(error, StateError::Truncated { .. }), "{end}: {error}");
        }
        let mut long = body;
        long.push(0);
        assert_eq!(decode_body(&long, STATE_VERSION).unwrap_err(), StateError::Trailing(1));
    }

    proptest! {
        #[test]
        fn no_change_of_any_byte_goes_unseen(at in any::<prop::sample::Index>(), flip in 1u8..) {
            let mut bytes = encode(&state());
            let at = at.index(bytes.len());
            bytes[at] ^= flip;
            prop_assert!(decode(&bytes).is_err());
        }

        #[test]
        fn no_body_makes_it_panic(
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
            cut in any::<prop::sample::Index>(),
            raw in prop::collection::vec(any::<u8>(), 0..200),
        ) {
            let mut bytes = body();
            for (at, value) in edits {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            let cut = cut.index(bytes.len());
            for version in [STATE_VERSION_OLDEST, STATE_VERSION] {
                let _: Result<_, _> = decode_body(&bytes, version);
                let _: Result<_, _> = decode_body(&bytes[..cut], version);
                let _: Result<_, _> = decode_body(&raw, version);
            }
            let _: Result<_, _> = decode(&raw);
        }
    }
}
