//! One request of a block device's driver (virtio 1.2, 5.2.6): what it says, and what comes of it.

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::SECTOR_BYTES;
use super::disk::Disk;
use crate::devices::virtio::queue::{Chain, QueueError};
use crate::limits::{BLOCK_DISCARD_SECTORS, BLOCK_RANGES, BLOCK_REQUEST_BYTES, BLOCK_WRITE_ZEROES_SECTORS};
use crate::memory::buffers::Buffers;

const HEADER_BYTES: usize = 16;
const RANGE_BYTES: usize = 16;
const RANGES_BYTES: usize = BLOCK_RANGES as usize * RANGE_BYTES;
const ID_BYTES: usize = VIRTIO_BLK_ID_BYTES as usize;

/// Why a request was answered with an error.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    /// The host's file failed.
    #[error("the host could not carry it out")]
    Host(#[source] io::Error),
    /// The driver asks for what the device did not offer.
    #[error("the device does not do that: {0}")]
    Unsupported(&'static str),
    /// The driver asks for what it may not.
    #[error("{0}")]
    Forbidden(&'static str),
}

impl Refusal {
    fn status(&self) -> u32 {
        match self {
            Self::Host(error) if error.kind() == io::ErrorKind::Unsupported => VIRTIO_BLK_S_UNSUPP,
            Self::Host(_) | Self::Forbidden(_) => VIRTIO_BLK_S_IOERR,
            Self::Unsupported(_) => VIRTIO_BLK_S_UNSUPP,
        }
    }
}

/// What a request did.
pub(super) struct Done {
    /// The descriptor that names it.
    pub(super) head: u16,
    /// Bytes of its writable part that are to be looked at by the driver.
    pub(super) written: usize,
    /// What went wrong, for the log.
    pub(super) refusal: Option<(u32, Refusal)>,
}

/// Carries a request out and writes its status.
/// # Errors
/// If it has no header, or no byte for the status.
pub(super) fn carry_out(disk: &Disk, write_back: bool, chain: Chain<'_>) -> Result<Done, QueueError> {
    let head = chain.head;
    let wrong = |what| QueueError::Request { head, what };
    let written = chain.writable.bytes();
    let (header, output) = chain.readable.split_at(HEADER_BYTES).ok_or(wrong("it has no whole header"))?;
    let before_status = written.checked_sub(1).ok_or(wrong("it has no room for a status"))?;
    let (input, status) =
        chain.writable.split_at(before_status).ok_or(wrong("it has no room for a status"))?;
    let mut bytes = [0; HEADER_BYTES];
    header.copy_to(&mut bytes);
    let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = bytes;
    let (kind, sector) = (u32::from_le_bytes([t0, t1, t2, t3]), u64::from_le_bytes(sector));

    let outcome = execute(disk, write_back, kind, sector, &input, &output);
    let code = outcome.as_ref().map_or_else(Refusal::status, |()| VIRTIO_BLK_S_OK);
    status.copy_from(&code.to_le_bytes()[..1]);
    Ok(Done { head, written, refusal: outcome.err().map(|refusal| (kind, refusal)) })
}

fn execute(
    disk: &Disk,
    write_back: bool,
    kind: u32,
    sector: u64,
    input: &Buffers<'_>,
    output: &Buffers<'_>,
) -> Result<(), Refusal> {
    match kind {
        VIRTIO_BLK_T_IN => {
            let offset = place(disk, sector, input.bytes())?;
            disk.read(offset, input).map_err(Refusal::Host)
        }
        VIRTIO_BLK_T_OUT => {
            must_be_writable(disk)?;
            let offset = place(disk, sector, output.bytes())?;
            disk.write(offset, output).map_err(Refusal::Host)?;
            written(disk, write_back)
        }
        VIRTIO_BLK_T_FLUSH if disk.options().read_only => Ok(()),
        VIRTIO_BLK_T_FLUSH => disk.flush().map_err(Refusal::Host),
        VIRTIO_BLK_T_GET_ID => {
            let mut id = [0; ID_BYTES];
            let name = disk.options().id.as_deref().unwrap_or_default().as_bytes();
            id.iter_mut().zip(name).for_each(|(to, from)| *to = *from);
            if input.bytes() < ID_BYTES {
                return Err(Refusal::Forbidden("there is no room for the disk's id"));
            }
            input.copy_from(&id);
            Ok(())
        }
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            must_be_writable(disk)?;
            ranges(disk, kind, output)?;
            written(disk, write_back)
        }
        _ => Err(Refusal::Unsupported("a type of request that it does not know")),
    }
}

fn must_be_writable(disk: &Disk) -> Result<(), Refusal> {
    if disk.options().read_only { Err(Refusal::Forbidden("the disk is read-only")) } else { Ok(()) }
}

/// In write-through mode a write is done when it is safe.
fn written(disk: &Disk, write_back: bool) -> Result<(), Refusal> {
    if write_back { Ok(()) } else { disk.flush().map_err(Refusal::Host) }
}

/// Where a transfer begins, bytes.
fn place(disk: &Disk, sector: u64, bytes: usize) -> Result<u64, Refusal> {
    let sector_bytes = u64::from(SECTOR_BYTES);
    if bytes == 0 || !(bytes as u64).is_multiple_of(sector_bytes) {
        return Err(Refusal::Forbidden("its length is not that of whole sectors"));
    }
    if bytes > BLOCK_REQUEST_BYTES {
        return Err(Refusal::Forbidden("it is longer than the limits that the device told"));
    }
    within(disk, sector, bytes as u64)
}

fn within(disk: &Disk, sector: u64, bytes: u64) -> Result<u64, Refusal> {
    let outside = Refusal::Forbidden("it reaches beyond the disk's end");
    let Some(offset) = sector.checked_mul(SECTOR_BYTES.into()) else { return Err(outside) };
    match offset.checked_add(bytes) {
        Some(end) if end <= disk.capacity_bytes() => Ok(offset),
        Some(_) | None => Err(outside),
    }
}

/// The ranges of a discard or a write of zeros: each is checked before the first is touched.
fn ranges(disk: &Disk, kind: u32, output: &Buffers<'_>) -> Result<(), Refusal> {
    let length = output.bytes();
    if length == 0 || !length.is_multiple_of(RANGE_BYTES) || length > RANGES_BYTES {
        return Err(Refusal::Forbidden("its ranges are not whole, or too many"));
    }
    let mut bytes = [0; RANGES_BYTES];
    output.copy_to(&mut bytes);
    let (discard, most) = match kind {
        VIRTIO_BLK_T_DISCARD => (true, BLOCK_DISCARD_SECTORS),
        _ => (false, BLOCK_WRITE_ZEROES_SECTORS),
    };
    let parse = |range: &[u8]| {
        let word = |at: usize| u32::from_le_bytes([range[at], range[at + 1], range[at + 2], range[at + 3]]);
        let (sectors, flags) = (word(8), word(12));
        let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
        if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || discard && unmap {
            return Err(Refusal::Unsupported("a flag that it does not know"));
        }
        if sectors > most {
            return Err(Refusal::Forbidden("a range is longer than the limits that the device told"));
        }
        let length = u64::from(sectors) * u64::from(SECTOR_BYTES);
        let offset = within(disk, u64::from(word(4)) << 32 | u64::from(word(0)), length)?;
        Ok((offset, length, unmap))
    };
    let ranges = bytes[..length].chunks_exact(RANGE_BYTES).map(parse).collect::<Result<Vec<_>, _>>()?;
    for (offset, length, unmap) in ranges.into_iter().filter(|(_, length, _)| *length > 0) {
        if discard { disk.discard(offset, length) } else { disk.write_zeroes(offset, length, unmap) }
            .map_err(Refusal::Host)?;
    }
    Ok(())
}
