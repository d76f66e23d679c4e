//! The bytes of what several messages have in common, or one has beside its own.

use page::{Gfn, RegionId, ShortId};

use super::codec::{Reader, WireError, Writer};
use crate::limits;
use crate::stats::DestinationStats;
use crate::switchover::MigrationId;

pub(super) fn read_region_id(input: &mut Reader<'_>) -> Result<RegionId, WireError> {
    let region = input.varint("region")?;
    if region < limits::REGIONS {
        Ok(RegionId(region))
    } else {
        Err(WireError::OutOfRange { field: "region" })
    }
}

pub(super) fn read_migration(input: &mut Reader<'_>) -> Result<MigrationId, WireError> {
    Ok(MigrationId(input.array("migration id")?))
}

pub(super) fn read_round(input: &mut Reader<'_>) -> Result<u32, WireError> {
    u32::try_from(input.varint("round")?).map_err(|_| WireError::OutOfRange { field: "round" })
}

pub(super) fn read_flag(input: &mut Reader<'_>, field: &'static str) -> Result<bool, WireError> {
    match input.byte(field)? {
        0 => Ok(false),
        1 => Ok(true),
        _ => Err(WireError::OutOfRange { field }),
    }
}

pub(super) fn read_stats(input: &mut Reader<'_>) -> Result<DestinationStats, WireError> {
    Ok(DestinationStats::from_array(read_counters(input)?))
}

pub(super) fn read_counters<const N: usize>(input: &mut Reader<'_>) -> Result<[u64; N], WireError> {
    let mut fields = [0; N];
    for field in &mut fields {
        *field = input.varint("counter")?;
    }
    Ok(fields)
}

pub(super) fn write_frames(out: &mut Writer, frames: &[Gfn]) {
    out.varint(frames.len() as u64);
    let mut last = Gfn(0);
    for gfn in frames {
        out.frame(last, *gfn);
        last = *gfn;
    }
}

pub(super) fn read_frames(input: &mut Reader<'_>, field: &'static str) -> Result<Vec<Gfn>, WireError> {
    let count = input.count(field, limits::WANT_BATCH_PAGES)?;
    let mut last = Gfn(0);
    (0..count)
        .map(|_| {
            last = input.frame(field, last)?;
            Ok(last)
        })
        .collect()
}

pub(super) fn read_stale(input: &mut Reader<'_>) -> Result<Vec<(Gfn, ShortId)>, WireError> {
    let count = input.count("stale frames", limits::LITERAL_BATCH_PAGES)?;
    (0..count)
        .map(|_| {
            let gfn = Gfn(input.varint("stale frame")?);
            Ok((gfn, ShortId(u64::from_be_bytes(input.array("stale id")?))))
        })
        .collect()
}

pub(super) fn write_reason(out: &mut Writer, reason: &str) {
    let end = (0..=reason.len().min(limits::REASON_BYTES)).rev().find(|at| reason.is_char_boundary(*at));
    out.blob(reason.get(..end.unwrap_or(0)).unwrap_or_default().as_bytes());
}

pub(super) fn read_reason(input: &mut Reader<'_>) -> Result<String, WireError> {
    let bytes = input.blob("reason", limits::REASON_BYTES)?;
    String::from_utf8(bytes.to_vec()).map_err(|_| WireError::OutOfRange { field: "reason" })
}
