//! The saved state as bytes.
//!
//! ```text
//! "TERNVMST" | version u32 | body | SHA-256 of all before it
//! body    = section*                      in the order of `MachineState`'s fields, each virtual CPU's after the other
//! section = length u32 | bytes            integers little-endian; KVM's structures as the x86-64 kernel interface has them
//! ```
//! The kernel interface never changes a structure's layout, so its bytes are a stable form. A section of another length, one
//! too many or too few, or a list beyond its bound is an error that names the field; nothing here panics on any input.

use kvm_bindings::{kvm_cpuid_entry2, kvm_msr_entry};
use sha2::{Digest as _, Sha256};
use vm_superio::serial::SerialState;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::state::{ChipState, MachineState, VcpuState};
use crate::devices::serial::FIFO_BYTES;
use crate::limits::{CPUS_MAX, STATE_ENTRIES_MAX, STATE_MAX_BYTES};

/// The version that this build writes and reads.
pub const STATE_VERSION: u32 = 1;

const MAGIC: [u8; 8] = *b"TERNVMST";
const DIGEST_BYTES: usize = 32;

/// Why bytes are no state that this build can load.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StateError {
    /// Not one at all.
    #[error("these bytes are not the saved state of a VM")]
    Magic,
    /// One of another build.
    #[error("the saved state has version {0}, and this build reads version {STATE_VERSION}")]
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
    if version != STATE_VERSION {
        return Err(StateError::Version(version));
    }
    let (body, digest) =
        rest.split_last_chunk::<DIGEST_BYTES>().ok_or(StateError::Truncated { field: "digest" })?;
    if Sha256::digest(&bytes[..bytes.len() - DIGEST_BYTES]).as_slice() != digest {
        return Err(StateError::Digest);
    }
    decode_body(body)
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
    put(out, &u32::try_from(state.vcpus.len()).expect("at most 32").to_le_bytes());
    for vcpu in &state.vcpus {
        put(out, vcpu.cpuid.as_slice().as_bytes());
        put(out, &vcpu.tsc_khz.to_le_bytes());
        put(out, vcpu.mp_state.as_bytes());
        put(out, vcpu.regs.as_bytes());
        put(out, vcpu.sregs.as_bytes());
        put(out, vcpu.xsave.as_bytes());
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

fn decode_body(body: &[u8]) -> Result<MachineState, StateError> {
    let mut reader = Reader(body);
    let clock_ns = u64::from_le_bytes(reader.value("clock")?);
    let irqchips = [
        reader.value("first interrupt controller")?,
        reader.value("second interrupt controller")?,
        reader.value("I/O APIC")?,
    ];
    let chips = ChipState { irqchips, pit: reader.value("programmable timer")? };
    let serial = decode_serial(&mut reader)?;
    let count =
        usize::try_from(u32::from_le_bytes(reader.value("number of virtual CPUs")?)).unwrap_or(usize::MAX);
    if count > usize::from(CPUS_MAX) {
        return Err(StateError::TooMany { field: "virtual CPUs", got: count, most: usize::from(CPUS_MAX) });
    }
    let vcpus = (0..count).map(|_| decode_vcpu(&mut reader)).collect::<Result<_, _>>()?;
    match reader.0.len() {
        0 => Ok(MachineState { clock_ns, chips, serial, vcpus }),
        left => Err(StateError::Trailing(left)),
    }
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

fn decode_vcpu(reader: &mut Reader<'_>) -> Result<VcpuState, StateError> {
    Ok(VcpuState {
        cpuid: reader.list::<kvm_cpuid_entry2>("CPUID entries", STATE_ENTRIES_MAX)?,
        tsc_khz: u32::from_le_bytes(reader.value("time-stamp counter rate")?),
        mp_state: reader.value("multiprocessing state")?,
        regs: reader.value("registers")?,
        sregs: reader.value("system registers")?,
        xsave: Box::new(reader.value("vector registers")?),
        xcrs: reader.value("extended control registers")?,
        debug: reader.value("debug registers")?,
        lapic: reader.value("local APIC")?,
        msrs: reader.list::<kvm_msr_entry>("model-specific registers", STATE_ENTRIES_MAX)?,
        events: reader.value("pending events")?,
    })
}

#[cfg(test)]
mod tests {
    use kvm_bindings::{kvm_regs, kvm_xsave};
    use proptest::prelude::*;

    use super::*;

    fn vcpu(rip: u64) -> VcpuState {
        VcpuState {
            cpuid: vec![kvm_cpuid_entry2 { function: 1, ..Default::default() }; 3],
            tsc_khz: 2_500_000,
            mp_state: Default::default(),
            regs: kvm_regs { rip, ..Default::default() },
            sregs: Default::default(),
            xsave: Box::new(kvm_xsave { region: [7; 1024], ..Default::default() }),
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
        MachineState { clock_ns: 123, chips, serial, vcpus: vec![vcpu(0x10_0000), vcpu(0xfff0)] }
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
        bytes[8] = 2;
        assert_eq!(decode(&bytes).unwrap_err(), StateError::Version(2));
    }

    #[test]
    fn every_truncation_of_the_body_is_an_error() {
        let body = body();
        for end in 0..body.len() {
            let error = decode_body(&body[..end]).unwrap_err();
            assert!(matches!(error, StateError::Truncated { .. }), "{end}: {error}");
        }
        let mut long = body;
        long.push(0);
        assert_eq!(decode_body(&long).unwrap_err(), StateError::Trailing(1));
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
            let _: Result<_, _> = decode_body(&bytes);
            let _: Result<_, _> = decode_body(&bytes[..cut]);
            let _: Result<_, _> = decode_body(&raw);
            let _: Result<_, _> = decode(&raw);
        }
    }
}
