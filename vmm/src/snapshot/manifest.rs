//! The manifest: which page of which pack belongs where, and the name that it must have.
//!
//! ```text
//! "TERNSNAP" | version u32 | domain id (16 bytes) | created u64 (ms since 1970)
//! | SHA-256 of `machine.json` | SHA-256 of `state`
//! | packs u32 | pack*                     pack = id u64 | pages u32
//! | runs u64  | run*                      run  = first frame u64 | pages u32 | pack u32 (index) | first page u32 | name (32 bytes)*
//! | SHA-256 of all before it
//! ```
//! Integers little-endian. Runs ascend and do not overlap; frames that are in no run are zero. Nothing here panics, or takes
//! more memory than a small multiple of its input, on any input.

use page::{DomainId, Gfn, PageHash};
use sha2::{Digest as _, Sha256};

use crate::limits::{MEMORY_MAX_BYTES, PACK_PAGES_MAX, SNAPSHOT_PACKS_MAX};

/// The version that this build writes and reads.
pub const MANIFEST_VERSION: u32 = 1;

const MAGIC: [u8; 8] = *b"TERNSNAP";
const DIGEST_BYTES: usize = 32;
/// One more than the highest frame that any machine has.
const FRAMES_END: u64 = (MEMORY_MAX_BYTES >> 12) + (1 << 20);

/// Why bytes are no manifest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Not one at all.
    #[error("it is not a snapshot's manifest")]
    Magic,
    /// Of another build.
    #[error("it has version {0}, and this build reads version {MANIFEST_VERSION}: use the newer build")]
    Version(u32),
    /// Changed since it was written.
    #[error("it is damaged: its digest does not match")]
    Digest,
    /// It ends too early.
    #[error("it ends within {0}")]
    Truncated(&'static str),
    /// It goes on.
    #[error("it has {0} bytes after its last field")]
    Trailing(usize),
    /// A field beyond its bound.
    #[error("its {0} is out of bounds")]
    Bound(&'static str),
    /// Names that cannot be checked here.
    #[error("its names are of the dedup domain {0:?}, and snapshots are verified without a domain's key")]
    Domain(DomainId),
}

/// A pack that a manifest refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackRef {
    /// Its file name, as a number.
    pub id: u64,
    /// How many pages it has at least.
    pub pages: u32,
}

/// Frames that follow each other, whose pages follow each other in one pack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run {
    /// The first frame.
    pub first: Gfn,
    /// The pack: an index into [`Manifest::packs`].
    pub pack: u32,
    /// The first page in it.
    pub page: u32,
    /// The names, one a page.
    pub names: Vec<PageHash>,
}

/// A snapshot's manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// The domain of the names.
    pub domain: DomainId,
    /// When it was taken, milliseconds since 1970.
    pub created_unix_ms: u64,
    /// SHA-256 of the machine's description.
    pub machine: [u8; 32],
    /// SHA-256 of the state.
    pub state: [u8; 32],
    /// The packs.
    pub packs: Vec<PackRef>,
    /// The pages that are not zero, ascending.
    pub runs: Vec<Run>,
}

impl Manifest {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.extend(MANIFEST_VERSION.to_le_bytes());
        out.extend(self.domain.0);
        out.extend(self.created_unix_ms.to_le_bytes());
        out.extend(self.machine);
        out.extend(self.state);
        out.extend(count32(self.packs.len()).to_le_bytes());
        for pack in &self.packs {
            out.extend(pack.id.to_le_bytes());
            out.extend(pack.pages.to_le_bytes());
        }
        out.extend((self.runs.len() as u64).to_le_bytes());
        for run in &self.runs {
            out.extend(run.first.0.to_le_bytes());
            out.extend(count32(run.names.len()).to_le_bytes());
            out.extend(run.pack.to_le_bytes());
            out.extend(run.page.to_le_bytes());
            run.names.iter().for_each(|name| out.extend(name.0));
        }
        let digest = Sha256::digest(&out);
        out.extend(digest);
        out
    }

    /// Reads one.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestError> {
        let rest = bytes.strip_prefix(&MAGIC).ok_or(ManifestError::Magic)?;
        let (version, _) = rest.split_first_chunk().ok_or(ManifestError::Truncated("version"))?;
        let version = u32::from_le_bytes(*version);
        if version != MANIFEST_VERSION {
            return Err(ManifestError::Version(version));
        }
        let (body, digest) =
            bytes.split_last_chunk::<DIGEST_BYTES>().ok_or(ManifestError::Truncated("digest"))?;
        if Sha256::digest(body).as_slice() != digest {
            return Err(ManifestError::Digest);
        }
        Self::decode_body(&mut Reader(body.get(MAGIC.len() + 4..).ok_or(ManifestError::Truncated("digest"))?))
    }

    fn decode_body(reader: &mut Reader<'_>) -> Result<Self, ManifestError> {
        let domain = DomainId(reader.array("domain")?);
        let created_unix_ms = reader.u64("date")?;
        let (machine, state) = (reader.array("description's digest")?, reader.array("state's digest")?);
        let packs = reader.u32("number of packs")? as usize;
        if packs > SNAPSHOT_PACKS_MAX {
            return Err(ManifestError::Bound("number of packs"));
        }
        let packs: Vec<PackRef> = (0..packs).map(|_| reader.pack()).collect::<Result<_, _>>()?;
        let count = reader.u64("number of runs")?;
        let (mut runs, mut end) = (Vec::new(), 0);
        for _ in 0..count {
            let run = reader.run(&packs)?;
            if run.first.0 < end {
                return Err(ManifestError::Bound("order of runs"));
            }
            end = run.first.0 + run.names.len() as u64;
            runs.push(run);
        }
        match reader.0.len() {
            0 => Ok(Self { domain, created_unix_ms, machine, state, packs, runs }),
            left => Err(ManifestError::Trailing(left)),
        }
    }
}

/// Whether `bytes` are a manifest that this build reads.
///
/// # Errors
/// What is wrong with them.
pub fn check_manifest(bytes: &[u8]) -> Result<(), ManifestError> {
    Manifest::decode(bytes).map(|_| ())
}

fn count32(count: usize) -> u32 {
    u32::try_from(count).expect("bounded when it was built")
}

struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&mut self, field: &'static str) -> Result<[u8; N], ManifestError> {
        let (array, rest) = self.0.split_first_chunk().ok_or(ManifestError::Truncated(field))?;
        self.0 = rest;
        Ok(*array)
    }

    fn u32(&mut self, field: &'static str) -> Result<u32, ManifestError> {
        self.array(field).map(u32::from_le_bytes)
    }

    fn u64(&mut self, field: &'static str) -> Result<u64, ManifestError> {
        self.array(field).map(u64::from_le_bytes)
    }

    fn pack(&mut self) -> Result<PackRef, ManifestError> {
        let pack = PackRef { id: self.u64("pack")?, pages: self.u32("pack's pages")? };
        if pack.pages > PACK_PAGES_MAX { Err(ManifestError::Bound("pack's pages")) } else { Ok(pack) }
    }

    fn run(&mut self, packs: &[PackRef]) -> Result<Run, ManifestError> {
        let first = self.u64("run")?;
        let (pages, pack, page) =
            (self.u32("run's pages")?, self.u32("run's pack")?, self.u32("run's page")?);
        let bound = ManifestError::Bound;
        if pages == 0 || first.checked_add(pages.into()).is_none_or(|end| end > FRAMES_END) {
            return Err(bound("run's frames"));
        }
        let in_pack = packs.get(pack as usize).ok_or(bound("run's pack"))?;
        if page.checked_add(pages).is_none_or(|end| end > in_pack.pages) {
            return Err(bound("run's page"));
        }
        let (names, rest) =
            self.0.split_at_checked(pages as usize * 32).ok_or(ManifestError::Truncated("names"))?;
        self.0 = rest;
        let names = names.as_chunks().0.iter().map(|name| PageHash(*name)).collect();
        Ok(Run { first: Gfn(first), pack, page, names })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn manifest() -> Manifest {
        let name = |n: u8| PageHash([n; 32]);
        Manifest {
            domain: page::Domain::unkeyed().id(),
            created_unix_ms: 1,
            machine: [2; 32],
            state: [3; 32],
            packs: vec![PackRef { id: 7, pages: 9 }, PackRef { id: 8, pages: 1 }],
            runs: vec![
                Run { first: Gfn(5), pack: 0, page: 7, names: vec![name(1), name(2)] },
                Run { first: Gfn(7), pack: 1, page: 0, names: vec![name(3)] },
            ],
        }
    }

    #[test]
    fn what_is_written_is_read() {
        assert_eq!(Manifest::decode(&manifest().encode()), Ok(manifest()));
    }

    #[test]
    fn what_is_wrong_is_named() {
        let bytes = manifest().encode();
        assert_eq!(Manifest::decode(b"ELF"), Err(ManifestError::Magic));
        assert_eq!(Manifest::decode(&bytes[..10]), Err(ManifestError::Truncated("version")));
        assert_eq!(Manifest::decode(&bytes[..bytes.len() - 1]), Err(ManifestError::Digest));
        let mut other = bytes;
        other[8] = 2;
        assert_eq!(Manifest::decode(&other), Err(ManifestError::Version(2)));
        let wrong = |change: fn(&mut Manifest)| {
            let mut manifest = manifest();
            change(&mut manifest);
            Manifest::decode(&manifest.encode()).unwrap_err()
        };
        let bound = ManifestError::Bound;
        assert_eq!(wrong(|m| m.runs[0].first = Gfn(6)), bound("order of runs"));
        assert_eq!(wrong(|m| m.runs[1].first = Gfn(u64::MAX)), bound("run's frames"));
        assert_eq!(wrong(|m| m.runs[1].names.clear()), bound("run's frames"));
        assert_eq!(wrong(|m| m.runs[1].pack = 2), bound("run's pack"));
        assert_eq!(wrong(|m| m.runs[0].page = 8), bound("run's page"));
        assert_eq!(wrong(|m| m.packs[0].pages = u32::MAX), bound("pack's pages"));
    }

    proptest! {
        #[test]
        fn nothing_makes_it_panic(
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
            cut in any::<prop::sample::Index>(),
        ) {
            let mut bytes = manifest().encode();
            bytes.truncate(bytes.len() - DIGEST_BYTES);
            for (at, value) in edits {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            bytes.truncate(cut.index(bytes.len() + 1));
            let digest = Sha256::digest(&bytes);
            bytes.extend(digest);
            if let Ok(read) = Manifest::decode(&bytes) {
                prop_assert_eq!(read.encode(), bytes);
            }
        }
    }
}
