//! The bytes of Held: what the destination has whole, when a connection was lost before Commit.

use page::{RegionId, ShortId};

use super::codec::{Reader, WireError, Writer};
use super::fields::{read_flag, read_region_id};
use crate::limits;

pub(super) fn write_held(out: &mut Writer, regions: &[(RegionId, ShortId)], last: bool) {
    out.byte(u8::from(last));
    out.varint(regions.len() as u64);
    for (region, root) in regions {
        out.varint(region.0);
        out.bytes(&root.0.to_be_bytes());
    }
}

pub(super) fn read_held(input: &mut Reader<'_>) -> Result<(Vec<(RegionId, ShortId)>, bool), WireError> {
    let last = read_flag(input, "last")?;
    let count = input.count("held regions", limits::HELD_REGIONS)?;
    let region = |_| {
        let region = read_region_id(input)?;
        Ok((region, ShortId(u64::from_be_bytes(input.array("region root")?))))
    };
    Ok(((0..count).map(region).collect::<Result<_, _>>()?, last))
}
