//! Content names.
//!
//! A page's name is SHA-256 (FIPS 180-4) over (domain block ‖ page). The domain block is 64 bytes, one SHA-256 input block, so
//! its midstate is computed once a domain and a name costs as many compressions (65) as plain SHA-256 of a page.

use std::fmt;

use sha2::{Digest, Sha256};

use crate::addr::{PAGE_SIZE, Page};

/// The secret of a dedup domain. Who does not know it cannot name a page of their own choosing.
#[derive(Clone)]
pub struct DomainKey(pub [u8; 32]);

impl fmt::Debug for DomainKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DomainKey(secret)")
    }
}

/// A public fingerprint of a domain: two ends compare it to learn whether their names agree.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DomainId(pub [u8; 16]);

impl fmt::Debug for DomainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("DomainId(")?;
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))?;
        f.write_str(")")
    }
}

/// A dedup domain: what turns pages into names. Cheap to clone.
#[derive(Clone)]
pub struct Domain {
    block: [u8; 64],
    midstate: Sha256,
    id: DomainId,
    zero: PageHash,
}

impl Domain {
    /// The domain of a key.
    #[must_use]
    pub fn from_key(key: &DomainKey) -> Self {
        let half = |label: &[u8]| Sha256::new().chain_update(label).chain_update(key.0).finalize();
        let mut block = [0u8; 64];
        block[..32].copy_from_slice(&half(b"tern domain block 1, first half"));
        block[32..].copy_from_slice(&half(b"tern domain block 1, second half"));
        Self::from_block(block)
    }

    /// The domain of an already derived block, as a peer hands it to the VMs of its host. The block is as secret as the key.
    #[must_use]
    pub fn from_block(block: [u8; 64]) -> Self {
        let midstate = Sha256::new().chain_update(block);
        let digest = Sha256::new().chain_update(b"tern domain id 1").chain_update(block).finalize();
        let mut id = [0u8; 16];
        id.copy_from_slice(&digest[..16]);
        let mut domain = Self { block, midstate, id: DomainId(id), zero: PageHash([0; 32]) };
        domain.zero = domain.name(&[0; PAGE_SIZE]);
        domain
    }

    /// The domain without a secret, for a migration between hosts that share no site: its names mean something only
    /// to the two ends of one authenticated connection.
    #[must_use]
    pub fn unkeyed() -> Self {
        let mut block = [0u8; 64];
        block[..20].copy_from_slice(b"tern unkeyed domain\0");
        Self::from_block(block)
    }

    /// The block that names are prefixed with. Secret: hand it only to processes of this host.
    #[must_use]
    pub fn block(&self) -> &[u8; 64] {
        &self.block
    }

    /// The public fingerprint.
    #[must_use]
    pub fn id(&self) -> DomainId {
        self.id
    }

    /// The name of `page`.
    #[must_use]
    pub fn name(&self, page: &Page) -> PageHash {
        PageHash(self.midstate.clone().chain_update(page).finalize().into())
    }

    /// The name of the zero page.
    #[must_use]
    pub fn zero_name(&self) -> PageHash {
        self.zero
    }
}

impl fmt::Debug for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Domain").field("id", &self.id).finish_non_exhaustive()
    }
}

/// The name of a page: 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PageHash(pub [u8; 32]);

impl PageHash {
    /// The first eight bytes.
    #[must_use]
    pub fn short(&self) -> ShortId {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        ShortId(u64::from_be_bytes([a, b, c, d, e, f, g, h]))
    }
}

impl fmt::Debug for PageHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for PageHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

/// The first eight bytes of a name, big-endian: what manifests carry and the index is keyed by. It finds a page; only
/// the full name, or a root over full names, proves it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ShortId(pub u64);

impl fmt::Debug for ShortId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}…", self.0)
    }
}

/// SHA-256 over the names, in order: the root of a region over its pages, or of a whole memory over its regions' roots.
#[must_use]
pub fn root_of<'a>(names: impl IntoIterator<Item = &'a PageHash>) -> PageHash {
    let mut hasher = Sha256::new();
    for name in names {
        hasher.update(name.0);
    }
    PageHash(hasher.finalize().into())
}

/// Page bytes together with the name that was computed from them.
#[derive(Clone)]
pub struct VerifiedPage {
    bytes: Box<Page>,
    name: PageHash,
}

impl VerifiedPage {
    /// Hashes `bytes` in `domain`.
    #[must_use]
    pub fn new(domain: &Domain, bytes: Box<Page>) -> Self {
        let name = domain.name(&bytes);
        Self { bytes, name }
    }

    /// The name, computed from the bytes.
    #[must_use]
    pub fn name(&self) -> PageHash {
        self.name
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &Page {
        &self.bytes
    }
}

impl fmt::Debug for VerifiedPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VerifiedPage({})", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The slow reference: no midstate.
    fn reference_name(block: &[u8; 64], page: &Page) -> PageHash {
        let mut input = block.to_vec();
        input.extend_from_slice(page);
        PageHash(Sha256::digest(&input).into())
    }

    #[test]
    fn the_midstate_gives_the_same_name_as_hashing_block_and_page() {
        for domain in [Domain::unkeyed(), Domain::from_key(&DomainKey([7; 32]))] {
            let page: Page = std::array::from_fn(|i| u8::try_from(i % 251).unwrap());
            assert_eq!(domain.name(&page), reference_name(domain.block(), &page));
            assert_eq!(domain.zero_name(), reference_name(domain.block(), &[0; PAGE_SIZE]));
        }
    }

    #[test]
    fn domains_do_not_share_names_or_ids() {
        let (a, b) = (Domain::from_key(&DomainKey([1; 32])), Domain::from_key(&DomainKey([2; 32])));
        assert_ne!(a.name(&[3; PAGE_SIZE]), b.name(&[3; PAGE_SIZE]));
        assert_ne!(a.id(), b.id());
    }

    #[test]
    fn the_short_id_is_the_front_of_the_printed_name() {
        let name = Domain::unkeyed().name(&[9; PAGE_SIZE]);
        assert!(name.to_string().starts_with(&format!("{:016x}", name.short().0)));
    }
}
