//! The bytes of Offer and Accept: what the two versions of the wire say differently.

use page::DomainId;

use super::codec::{Reader, WireError, Writer};
use super::fields::{read_migration, read_region_id};
use super::message::Offer;
use crate::limits;
use crate::manifest::{Extent, Layout};
use crate::postcopy::Mode;
use crate::switchover::{Epoch, VmId};
use crate::timer::Span;

/// In Accept, the bits of its one byte. The first version knew the first alone, and is told it alone: its offers are of pre-copy.
const SHARED_BIT: u8 = 1;
const POSTCOPY_BIT: u8 = 2;

pub(super) fn write_accept(out: &mut Writer, shared: bool, postcopy: bool) {
    out.byte((u8::from(shared) * SHARED_BIT) | (u8::from(postcopy) * POSTCOPY_BIT));
}

pub(super) fn write_offer(out: &mut Writer, offer: &Offer) {
    // Pre-copy without deltas and over one connection is all that the first version knows, and says nothing that it does not know.
    let plain = offer.mode == Mode::Precopy && !offer.deltas && offer.resume_for == Span(0);
    let version = if plain { limits::WIRE_VERSION_BEFORE } else { limits::WIRE_VERSION };
    out.varint(u64::from(version));
    out.bytes(&offer.migration.0);
    out.bytes(&offer.vm.0);
    out.varint(offer.epoch.0);
    out.bytes(&offer.domain.0);
    out.varint(offer.layout.extents().len() as u64);
    for extent in offer.layout.extents() {
        out.varint(extent.first.0);
        out.varint(extent.regions);
    }
    out.blob(&offer.machine);
    if version == limits::WIRE_VERSION {
        let mode = match offer.mode {
            Mode::Precopy => PRECOPY,
            Mode::Hybrid => HYBRID,
            Mode::Postcopy => POSTCOPY,
        };
        out.byte(mode | (u8::from(offer.deltas) * DELTAS_BIT));
        out.varint(offer.resume_for.millis());
    }
}

const PRECOPY: u8 = 0;
const HYBRID: u8 = 1;
const POSTCOPY: u8 = 2;
/// Beside the mode.
const DELTAS_BIT: u8 = 4;

pub(super) fn read_offer(input: &mut Reader<'_>) -> Result<Offer, WireError> {
    let version = u16::try_from(input.varint("wire version")?).unwrap_or(u16::MAX);
    if version != limits::WIRE_VERSION && version != limits::WIRE_VERSION_BEFORE {
        return Err(WireError::UnknownVersion(version));
    }
    let migration = read_migration(input)?;
    let vm = VmId(input.array("VM id")?);
    let epoch = Epoch(input.varint("epoch")?);
    let domain = DomainId(input.array("domain id")?);
    let count = input.count("extents", limits::EXTENTS)?;
    let extents = (0..count)
        .map(|_| Ok(Extent { first: read_region_id(input)?, regions: input.varint("extent's regions")? }))
        .collect::<Result<_, _>>()?;
    let layout = Layout::new(extents).ok_or(WireError::OutOfRange { field: "memory layout" })?;
    let machine = input.blob("machine", limits::MACHINE_BYTES)?.to_vec();
    let (mode, resume_ms) = if version == limits::WIRE_VERSION_BEFORE {
        (PRECOPY, 0)
    } else {
        (input.byte("mode")?, input.varint("time to resume")?)
    };
    let deltas = mode & DELTAS_BIT != 0;
    let mode = match mode & !DELTAS_BIT {
        PRECOPY => Mode::Precopy,
        HYBRID => Mode::Hybrid,
        POSTCOPY => Mode::Postcopy,
        _ => return Err(WireError::OutOfRange { field: "mode" }),
    };
    if resume_ms > limits::RESUME_FOR_MAX.millis() {
        return Err(WireError::OutOfRange { field: "time to resume" });
    }
    let resume_for = Span::from_millis(resume_ms);
    Ok(Offer { migration, vm, epoch, domain, layout, machine, mode, deltas, resume_for })
}

pub(super) fn read_accept(input: &mut Reader<'_>) -> Result<(bool, bool), WireError> {
    let bits = input.byte("accept")?;
    if bits & !(SHARED_BIT | POSTCOPY_BIT) != 0 {
        return Err(WireError::OutOfRange { field: "accept" });
    }
    Ok((bits & SHARED_BIT != 0, bits & POSTCOPY_BIT != 0))
}
