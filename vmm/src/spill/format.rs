//! The bytes of a spill file: see the head of [`crate::spill`].

use std::collections::BTreeMap;
use std::io::{self, Read};

use migration_proto::{Epoch, Extent, Layout, MigrationId, VmId};
use page::{DomainId, Gfn, PAGE_SIZE, Page, PageHash, RegionId};
use sha2::{Digest as _, Sha256};

const MAGIC: [u8; 8] = *b"TERNSPIL";
const VERSION: u32 = 1;
const END: u8 = 0;
const PAGE: u8 = 1;
const ZERO: u8 = 2;

/// Whose pages a file holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// The migration.
    pub migration: MigrationId,
    /// The VM.
    pub vm: VmId,
    /// The epoch as whose owner the source ran it.
    pub epoch: Epoch,
    /// The domain that names are of.
    pub domain: DomainId,
    /// The name of a zero page in it.
    pub zero: PageHash,
    /// The VM's RAM.
    pub layout: Layout,
}

/// Where a page stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Nowhere: it is a zero page.
    Zero,
    /// In the file.
    At {
        /// Its first byte.
        offset: u64,
        /// Its name.
        name: PageHash,
    },
}

/// What a whole file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Contents {
    /// Whose pages.
    pub head: Head,
    /// Where each stands.
    pub pages: BTreeMap<Gfn, Place>,
    /// The root that both ends agree on.
    pub root: PageHash,
}

/// Why bytes are not a whole spill file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// It ends too early.
    #[error("it ends in the middle of {0}")]
    Truncated(&'static str),
    /// It begins otherwise.
    #[error("it does not begin as one")]
    Magic,
    /// A later build's, or none.
    #[error("it is of version {0}, and this build reads version {VERSION}")]
    Version(u32),
    /// A value that cannot be.
    #[error("{0} is out of range")]
    OutOfRange(&'static str),
    /// A frame outside RAM.
    #[error("frame {0} is not RAM of the VM")]
    NotRam(Gfn),
    /// Neither page, zero page nor end.
    #[error("a record is of the unknown kind {0}")]
    Kind(u8),
    /// Records are missing or too many.
    #[error("it has {found} pages and says {told}")]
    Count {
        /// As counted.
        found: u64,
        /// As written.
        told: u64,
    },
    /// Some byte is not what was written.
    #[error("its digest does not match")]
    Digest,
    /// Bytes behind the end.
    #[error("something follows its end")]
    Trailing,
    /// The file cannot be read.
    #[error("it cannot be read")]
    Io(#[source] io::Error),
}

/// The bytes of a head.
#[must_use]
pub(super) fn head(head: &Head) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(MAGIC);
    out.extend(VERSION.to_le_bytes());
    out.extend(head.migration.0);
    out.extend(head.vm.0);
    out.extend(head.epoch.0.to_le_bytes());
    out.extend(head.domain.0);
    out.extend(head.zero.0);
    let extents = head.layout.extents();
    out.extend(u32::try_from(extents.len()).unwrap_or(u32::MAX).to_le_bytes());
    for extent in extents {
        out.extend(extent.first.0.to_le_bytes());
        out.extend(extent.regions.to_le_bytes());
    }
    out
}

/// The bytes before a page's own; `None` for a zero page, which has no others.
pub(super) fn record(out: &mut Vec<u8>, gfn: Gfn, page: Option<(&PageHash, &Page)>) {
    out.push(if page.is_some() { PAGE } else { ZERO });
    out.extend(gfn.0.to_le_bytes());
    if let Some((name, bytes)) = page {
        out.extend(name.0);
        out.extend(bytes);
    }
}

/// The bytes of the end, without the digest.
#[must_use]
pub(super) fn end(root: &PageHash, records: u64) -> Vec<u8> {
    [[END].as_slice(), &root.0, &records.to_le_bytes()].concat()
}

/// A whole file in memory, of these pages: `None` is a zero page. [`super::Writer`] writes what does not fit there.
#[must_use]
pub fn encode(whose: &Head, pages: &[(Gfn, Option<(PageHash, &Page)>)], root: &PageHash) -> Vec<u8> {
    let mut out = head(whose);
    for (gfn, page) in pages {
        record(&mut out, *gfn, page.as_ref().map(|(name, bytes)| (name, *bytes)));
    }
    out.extend(end(root, pages.len() as u64));
    let digest = Sha256::digest(&out);
    out.extend(digest);
    out
}

/// Reads a whole file, hashing as it goes. It holds in memory what the file names, never the pages.
///
/// # Errors
/// Where it is not a whole spill file.
pub fn parse(input: impl Read) -> Result<Contents, FormatError> {
    let mut input = Input { from: input, digest: Sha256::new(), at: 0 };
    let head = input.head()?;
    let (mut pages, mut records) = (BTreeMap::new(), 0);
    loop {
        let [kind] = input.array("a record's kind")?;
        if kind == END {
            break;
        }
        let gfn = Gfn(input.u64("a record's frame")?);
        if !head.layout.has(gfn.region()) {
            return Err(FormatError::NotRam(gfn));
        }
        let place = match kind {
            PAGE => {
                let name = PageHash(input.array("a page's name")?);
                let offset = input.at;
                input.array::<PAGE_SIZE>("a page")?;
                Place::At { offset, name }
            }
            ZERO => Place::Zero,
            unknown => return Err(FormatError::Kind(unknown)),
        };
        pages.insert(gfn, place);
        records += 1;
    }
    let root = PageHash(input.array("the root")?);
    let told = input.u64("the number of pages")?;
    if told != records {
        return Err(FormatError::Count { found: records, told });
    }
    let ours: [u8; 32] = input.digest.clone().finalize().into();
    if input.array("the digest")? != ours {
        return Err(FormatError::Digest);
    }
    let mut more = [0];
    match input.from.read(&mut more) {
        Ok(0) => Ok(Contents { head, pages, root }),
        Ok(_) => Err(FormatError::Trailing),
        Err(error) => Err(FormatError::Io(error)),
    }
}

struct Input<R> {
    from: R,
    digest: Sha256,
    at: u64,
}

impl<R: Read> Input<R> {
    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], FormatError> {
        let mut bytes = [0; N];
        self.from.read_exact(&mut bytes).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => FormatError::Truncated(field),
            _ => FormatError::Io(error),
        })?;
        self.digest.update(bytes);
        self.at += N as u64;
        Ok(bytes)
    }

    fn u64(&mut self, field: &'static str) -> Result<u64, FormatError> {
        Ok(u64::from_le_bytes(self.array(field)?))
    }

    fn u32(&mut self, field: &'static str) -> Result<u32, FormatError> {
        Ok(u32::from_le_bytes(self.array(field)?))
    }

    fn head(&mut self) -> Result<Head, FormatError> {
        if self.array("the head")? != MAGIC {
            return Err(FormatError::Magic);
        }
        let version = self.u32("the version")?;
        if version != VERSION {
            return Err(FormatError::Version(version));
        }
        let migration = MigrationId(self.array("the migration")?);
        let vm = VmId(self.array("the VM")?);
        let epoch = self.u64("the epoch")?;
        // The destination runs it as the owner of the next one.
        if epoch == u64::MAX {
            return Err(FormatError::OutOfRange("the epoch"));
        }
        let domain = DomainId(self.array("the domain")?);
        let zero = PageHash(self.array("the zero page's name")?);
        let count = self.u32("the number of extents")? as usize;
        if count > migration_proto::limits::EXTENTS {
            return Err(FormatError::OutOfRange("the number of extents"));
        }
        let extents = (0..count)
            .map(|_| {
                let first = RegionId(self.u64("an extent")?);
                Ok(Extent { first, regions: self.u64("an extent")? })
            })
            .collect::<Result<Vec<_>, _>>()?;
        let layout = Layout::new(extents).ok_or(FormatError::OutOfRange("the memory layout"))?;
        Ok(Head { migration, vm, epoch: Epoch(epoch), domain, zero, layout })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn a_head() -> Head {
        Head {
            migration: MigrationId([1; 16]),
            vm: VmId([2; 16]),
            epoch: Epoch(3),
            domain: DomainId([4; 16]),
            zero: PageHash([5; 32]),
            layout: Layout::new(vec![Extent { first: RegionId(0), regions: 2 }]).unwrap(),
        }
    }

    fn whole(pages: &[(u64, Option<u8>)], root: u8) -> Vec<u8> {
        let fills: Vec<[u8; PAGE_SIZE]> =
            pages.iter().map(|(_, fill)| [fill.unwrap_or_default(); PAGE_SIZE]).collect();
        let pages: Vec<_> = pages
            .iter()
            .zip(&fills)
            .map(|((gfn, fill), bytes)| (Gfn(*gfn), fill.map(|fill| (PageHash([fill; 32]), bytes))))
            .collect();
        encode(&a_head(), &pages, &PageHash([root; 32]))
    }

    fn records() -> impl Strategy<Value = Vec<(u64, Option<u8>)>> {
        prop::collection::vec((0..1024u64, any::<Option<u8>>()), 0..12)
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(pages in records(), root: u8) {
            let bytes = whole(&pages, root);
            let contents = parse(bytes.as_slice()).unwrap();
            prop_assert_eq!(&contents.head, &a_head());
            prop_assert_eq!(contents.root, PageHash([root; 32]));
            let newest: BTreeMap<Gfn, Option<u8>> = pages.iter().map(|(gfn, fill)| (Gfn(*gfn), *fill)).collect();
            prop_assert_eq!(contents.pages.len(), newest.len());
            for (gfn, place) in contents.pages {
                match (place, newest[&gfn]) {
                    (Place::Zero, None) => {}
                    (Place::At { offset, name }, Some(fill)) => {
                        let at = usize::try_from(offset).unwrap();
                        prop_assert_eq!(name, PageHash([fill; 32]));
                        prop_assert!(bytes[at..at + PAGE_SIZE].iter().all(|byte| *byte == fill));
                    }
                    (place, fill) => prop_assert!(false, "{place:?} for {fill:?}"),
                }
            }
        }

        #[test]
        fn a_torn_or_changed_file_is_recognised(pages in records(), at: prop::sample::Index, bit in 0..8u32) {
            let bytes = whole(&pages, 7);
            let at = at.index(bytes.len());
            prop_assert!(parse(&bytes[..at]).is_err());
            let mut changed = bytes.clone();
            changed[at] ^= 1 << bit;
            prop_assert!(parse(changed.as_slice()).is_err());
            let longer = [bytes.as_slice(), &[0]].concat();
            prop_assert!(matches!(parse(longer.as_slice()), Err(FormatError::Trailing)));
        }

        #[test]
        fn any_bytes_are_an_error_and_nothing_worse(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(parse(bytes.as_slice()).is_err());
            let headed = [head(&a_head()), bytes].concat();
            prop_assert!(parse(headed.as_slice()).is_err());
        }
    }
}
