//! The file of a retained checkpoint, and which of them give way to a new one.
//!
//! A checkpoint has the distinct pages of a VM that left this host, but for those that the host had in files or other checkpoints already. The file
//! is a whole number of pages long; integers are big-endian:
//!
//! ```text
//! page 0   magic:8 version:u16 domain-id:16 pages:u32 name:[u8], zeros, and in the last 32 bytes a digest
//! table    ids:u64 each, ascending, and zeros to the next page
//! pages    4096 bytes each, in the order of the ids
//! ```
//!
//! The digest is SHA-256 over page 0 without it and the table. Pages need none: each is hashed when it is served, and one that is not what its id
//! says is a miss. A file is written under another name and moved into place when it is complete, and its length must be what its header
//! says, so that one whose writer died is never taken. Pure: bytes in, bytes out.

use std::{num::NonZeroUsize, time::SystemTime};

use page::{DomainId, PAGE_SIZE, Page, ShortId};
use sha2::{Digest, Sha256};
use thiserror::Error;

use crate::{
    codec::{CodecError, Reader, cut, put_sized},
    limits::{CONTENT_PAGES, MEMORY_NAME_BYTES},
};

/// The version that this build writes and reads.
pub const VERSION: u16 = 1;
const MAGIC: [u8; 8] = *b"ternckpt";
/// Where the digest stands in page 0.
pub const DIGEST_AT: usize = PAGE_SIZE - 32;

/// Why a file is not a checkpoint that can be taken.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// It begins otherwise.
    #[error("it is not a checkpoint")]
    NotOne,
    /// A build of another version wrote it.
    #[error("it is of version {0}, this build reads version {VERSION}")]
    Version(u16),
    /// A field of its header is wrong.
    #[error("its header is damaged")]
    Header(#[from] CodecError),
    /// It has another length than its header says: whoever wrote it did not finish, or it was cut.
    #[error("it has {bytes} bytes, and its header says {expected}")]
    Length {
        /// Its length.
        bytes: u64,
        /// What it should be.
        expected: u64,
    },
    /// Header and table do not give their digest.
    #[error("its header or its table of pages is damaged: the digest differs")]
    Digest,
    /// The table's ids do not ascend.
    #[error("its table of pages is out of order at entry {0}")]
    Order(usize),
}

/// What the file says of itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    /// The domain of its names.
    pub domain: DomainId,
    /// How many pages it has.
    pub pages: u32,
    /// The VM's name, for people.
    pub name: String,
}

impl Header {
    /// Reads page 0. The digest is looked at with the table, by [`read_table`].
    ///
    /// # Errors
    /// [`CheckpointError`].
    pub fn decode(first: &Page) -> Result<Self, CheckpointError> {
        let mut fields = Reader::new(&first[..DIGEST_AT]);
        if fields.array::<8>("magic")? != &MAGIC {
            return Err(CheckpointError::NotOne);
        }
        let version = fields.u16("version")?;
        if version != VERSION {
            return Err(CheckpointError::Version(version));
        }
        let domain = DomainId(*fields.array("domain")?);
        let pages = fields.u32("pages")?;
        if pages > CONTENT_PAGES {
            let bound = CONTENT_PAGES.into();
            return Err(CodecError::TooLarge { field: "pages", value: pages.into(), bound }.into());
        }
        let name = fields.text(MEMORY_NAME_BYTES, "name")?;
        Ok(Self { domain, pages, name })
    }

    fn encode(&self) -> Page {
        let mut bytes = Vec::with_capacity(PAGE_SIZE);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_be_bytes());
        bytes.extend_from_slice(&self.domain.0);
        bytes.extend_from_slice(&self.pages.to_be_bytes());
        put_sized(&mut bytes, cut(&self.name, MEMORY_NAME_BYTES).as_bytes());
        let mut first = [0; PAGE_SIZE];
        first[..bytes.len()].copy_from_slice(&bytes);
        first
    }

    /// Bytes of the table, its padding included.
    #[must_use]
    pub fn table_bytes(&self) -> u64 {
        (u64::from(self.pages) * 8).next_multiple_of(PAGE_SIZE as u64)
    }

    /// Where the pages begin.
    #[must_use]
    pub fn pages_at(&self) -> u64 {
        PAGE_SIZE as u64 + self.table_bytes()
    }

    /// The file's length.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        self.pages_at() + u64::from(self.pages) * PAGE_SIZE as u64
    }
}

fn digest(first: &Page, table: &[u8]) -> [u8; 32] {
    Sha256::new().chain_update(&first[..DIGEST_AT]).chain_update(table).finalize().into()
}

/// The front of a checkpoint's file, up to its pages. `ids` ascend.
#[must_use]
pub fn front(header: &Header, ids: &[ShortId]) -> Vec<u8> {
    debug_assert!(ids.len() == header.pages as usize && ids.is_sorted());
    let mut table: Vec<u8> = ids.iter().flat_map(|id| id.0.to_be_bytes()).collect();
    table.resize(table.len().next_multiple_of(PAGE_SIZE), 0);
    let mut first = header.encode();
    let digest = digest(&first, &table);
    first[DIGEST_AT..].copy_from_slice(&digest);
    [&first[..], &table].concat()
}

/// Reads the table that follows page 0.
///
/// # Errors
/// [`CheckpointError`].
pub fn read_table(first: &Page, table: &[u8]) -> Result<Vec<ShortId>, CheckpointError> {
    let header = Header::decode(first)?;
    if table.len() as u64 != header.table_bytes() {
        return Err(CheckpointError::Length { bytes: table.len() as u64, expected: header.table_bytes() });
    }
    if digest(first, table) != first[DIGEST_AT..] {
        return Err(CheckpointError::Digest);
    }
    let entries = table.as_chunks::<8>().0.iter().take(header.pages as usize);
    let ids: Vec<ShortId> = entries.map(|id| ShortId(u64::from_be_bytes(*id))).collect();
    match ids.windows(2).position(|pair| pair[0] >= pair[1]) {
        Some(at) => Err(CheckpointError::Order(at + 1)),
        None => Ok(ids),
    }
}

/// A retained checkpoint, as eviction sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Retained<T> {
    /// What names it.
    pub id: T,
    /// Its file's length.
    pub bytes: u64,
    /// When it was last of use to somebody.
    pub last_use: SystemTime,
}

/// Which of `retained` must go, the longest unused first, so that `coming` bytes more fit in `budget`, and so that at most `count` are left
/// with the coming one. `None` if it does not fit even alone.
#[must_use]
pub fn evict<T: Copy>(
    mut retained: Vec<Retained<T>>,
    coming: u64,
    budget: u64,
    count: NonZeroUsize,
) -> Option<Vec<T>> {
    if coming > budget {
        return None;
    }
    retained.sort_by_key(|checkpoint| checkpoint.last_use);
    let mut bytes = retained.iter().fold(coming, |sum, checkpoint| sum.saturating_add(checkpoint.bytes));
    let mut left = retained.len() + 1;
    let mut gone = Vec::new();
    for checkpoint in retained {
        if bytes <= budget && left <= count.get() {
            break;
        }
        bytes -= checkpoint.bytes;
        left -= 1;
        gone.push(checkpoint.id);
    }
    Some(gone)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn first(front: &[u8]) -> Page {
        *front.first_chunk().unwrap()
    }

    fn example(ids: &[ShortId]) -> (Header, Vec<u8>) {
        let header = Header {
            domain: DomainId([3; 16]),
            pages: u32::try_from(ids.len()).unwrap(),
            name: "vm é".to_owned(),
        };
        let bytes = front(&header, ids);
        (header, bytes)
    }

    #[test]
    fn a_changed_bit_is_found_wherever_it_is() {
        let ids: Vec<_> = (1..=600).map(|n| ShortId(n << 40)).collect();
        let (_, bytes) = example(&ids);
        for at in (0..bytes.len()).step_by(97) {
            let mut bytes = bytes.clone();
            bytes[at] ^= 4;
            assert!(read_table(&first(&bytes), &bytes[PAGE_SIZE..]).is_err(), "byte {at}");
        }
    }

    #[test]
    fn a_count_beyond_the_bound_and_another_version_are_refused_by_name() {
        let (_, bytes) = example(&[ShortId(1)]);
        let mut page = first(&bytes);
        page[26] = 0xff;
        let error = Header::decode(&page).unwrap_err();
        assert!(
            matches!(error, CheckpointError::Header(CodecError::TooLarge { field: "pages", .. })),
            "{error}"
        );
        page[9] = 9;
        assert_eq!(Header::decode(&page), Err(CheckpointError::Version(9)));
        assert_eq!(Header::decode(&[0; PAGE_SIZE]), Err(CheckpointError::NotOne));
    }

    proptest! {
        #[test]
        fn a_front_reads_back(ids in prop::collection::btree_set(any::<u64>(), 0..1100)) {
            let ids: Vec<_> = ids.into_iter().map(ShortId).collect();
            let (header, bytes) = example(&ids);
            prop_assert_eq!(bytes.len() as u64, header.pages_at());
            prop_assert_eq!(Header::decode(&first(&bytes)), Ok(header));
            prop_assert_eq!(read_table(&first(&bytes), &bytes[PAGE_SIZE..]), Ok(ids));
        }

        #[test]
        fn any_bytes_are_read_or_refused(
            start in prop::collection::vec(any::<u8>(), 0..80), good_magic: bool, table in prop::collection::vec(any::<u8>(), 0..50),
        ) {
            let mut page = [0; PAGE_SIZE];
            page[..start.len()].copy_from_slice(&start);
            if good_magic {
                page[..8].copy_from_slice(&MAGIC);
                page[8..10].copy_from_slice(&VERSION.to_be_bytes());
            }
            let _ = (Header::decode(&page).is_ok(), read_table(&page, &table).is_ok());
        }

        #[test]
        fn the_longest_unused_go_and_no_more_than_must(
            all in prop::collection::vec((1u64..100, 0u64..50), 0..12), coming in 0u64..300, budget in 0u64..300, count in 1usize..10,
        ) {
            let retained: Vec<_> = all
                .iter()
                .enumerate()
                .map(|(id, (bytes, at))| Retained { id, bytes: *bytes, last_use: SystemTime::UNIX_EPOCH + Duration::from_secs(*at) })
                .collect();
            let bytes_of = |gone: &[usize]| coming + retained.iter().filter(|c| !gone.contains(&c.id)).map(|c| c.bytes).sum::<u64>();
            let count = NonZeroUsize::new(count).unwrap();
            match evict(retained.clone(), coming, budget, count) {
                None => prop_assert!(coming > budget),
                Some(gone) => {
                    prop_assert!(bytes_of(&gone) <= budget && retained.len() - gone.len() < count.get());
                    let oldest_left = retained.iter().filter(|c| !gone.contains(&c.id)).map(|c| c.last_use).min();
                    prop_assert!(gone.iter().all(|id| oldest_left.is_none_or(|left| retained[*id].last_use <= left)));
                    if let Some((_, kept)) = gone.split_last() {
                        prop_assert!(bytes_of(kept) > budget || retained.len() - kept.len() >= count.get());
                    }
                }
            }
        }
    }
}
