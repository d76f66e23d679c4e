//! Keys: the site's, the dedup domain's and the peer's own.
//!
//! A key file is two lines of text: what it is, and 64 hex digits. The site key is what makes a peer a member: the
//! key that every connection's ends prove to each other and the names of the site's protocols are derived from it, one way and apart from each other.

use std::{
    fmt,
    fs::OpenOptions,
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::Path,
};

use libp2p::identity::Keypair;
use page::DomainKey;
use sha2::{Digest, Sha256};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::error::NodeError;

const SITE_HEADER: &str = "tern site key 1";
const PEER_HEADER: &str = "tern peer identity 1";
/// A key file is 81 bytes; whatever is much larger is something else.
const KEY_FILE_BYTES: u64 = 256;

/// The secret that the peers of a site share.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct SiteKey([u8; 32]);

impl fmt::Debug for SiteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SiteKey(secret)")
    }
}

impl SiteKey {
    /// A new random key.
    ///
    /// # Errors
    /// [`NodeError::Random`] if the system has no random bytes.
    pub fn generate() -> Result<Self, NodeError> {
        random().map(Self)
    }

    /// Reads a key file.
    ///
    /// # Errors
    /// [`NodeError::ReadKey`] and [`NodeError::BadKey`].
    pub fn read(path: &Path) -> Result<Self, NodeError> {
        read_key(path, "site key", SITE_HEADER).map(Self)
    }

    /// The key file's text.
    #[must_use]
    pub fn to_text(&self) -> Zeroizing<String> {
        key_text(SITE_HEADER, &self.0)
    }

    /// Writes a new key file, readable by its owner alone.
    ///
    /// # Errors
    /// [`NodeError::KeyExists`] and [`NodeError::WriteKey`].
    pub fn write_new(&self, path: &Path) -> Result<(), NodeError> {
        write_new(path, &self.to_text())
    }

    /// The key of the proofs that the ends of a connection give each other.
    pub(crate) fn connection_key(&self) -> [u8; 32] {
        self.derive(b"tern site connection key 1")
    }

    /// A public fingerprint, part of the site's protocol names.
    pub(crate) fn fingerprint(&self) -> String {
        hex::encode(&self.derive(b"tern site fingerprint 1")[..8])
    }

    /// This key as the key of a dedup domain.
    #[must_use]
    pub fn domain_key(&self) -> DomainKey {
        DomainKey(self.0)
    }

    fn derive(&self, label: &[u8]) -> [u8; 32] {
        Sha256::new().chain_update(label).chain_update(self.0).finalize().into()
    }
}

/// The peer's own key from `path`, created there if absent; a new one for this run without a path.
///
/// # Errors
/// As of reading and writing key files.
pub fn peer_identity(path: Option<&Path>) -> Result<Keypair, NodeError> {
    let Some(path) = path else { return Ok(Keypair::generate_ed25519()) };
    let mut secret = Zeroizing::new(match read_key(path, "peer identity", PEER_HEADER) {
        Err(NodeError::ReadKey { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            let secret = random()?;
            write_new(path, &key_text(PEER_HEADER, &secret))?;
            secret
        }
        other => other?,
    });
    let bad = |_| NodeError::BadKey { path: path.to_owned(), expected: "peer identity", header: PEER_HEADER };
    Keypair::ed25519_from_bytes(&mut secret[..]).map_err(bad)
}

fn random() -> Result<[u8; 32], NodeError> {
    let mut bytes = [0; 32];
    getrandom::fill(&mut bytes).map_err(NodeError::Random)?;
    Ok(bytes)
}

fn key_text(header: &str, key: &[u8; 32]) -> Zeroizing<String> {
    Zeroizing::new(format!("{header}\n{}\n", Zeroizing::new(hex::encode(key)).as_str()))
}

fn write_new(path: &Path, text: &str) -> Result<(), NodeError> {
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    write().map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => NodeError::KeyExists { path: path.to_owned() },
        _ => NodeError::WriteKey { path: path.to_owned(), source },
    })
}

fn read_key(path: &Path, expected: &'static str, header: &'static str) -> Result<[u8; 32], NodeError> {
    let failed = |source| NodeError::ReadKey { path: path.to_owned(), source };
    let file = OpenOptions::new().read(true).open(path).map_err(failed)?;
    if file.metadata().map_err(failed)?.mode() & 0o077 != 0 {
        tracing::warn!(path = %path.display(), "others than its owner may read this key file: chmod 600 it");
    }
    let mut bytes = Zeroizing::new(Vec::new());
    file.take(KEY_FILE_BYTES).read_to_end(&mut bytes).map_err(failed)?;
    parse_key(&bytes, header).ok_or(NodeError::BadKey { path: path.to_owned(), expected, header })
}

fn parse_key(bytes: &[u8], header: &str) -> Option<[u8; 32]> {
    let mut lines = std::str::from_utf8(bytes).ok()?.lines();
    if lines.next()?.trim_end() != header {
        return None;
    }
    let mut key = [0; 32];
    hex::decode_to_slice(lines.next()?.trim(), &mut key).ok()?;
    lines.all(|line| line.trim().is_empty()).then_some(key)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_file_reads_back_is_private_and_is_never_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("site.key");
        let key = SiteKey::generate().unwrap();
        key.write_new(&path).unwrap();
        assert_eq!(SiteKey::read(&path).unwrap().0, key.0);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let error = SiteKey::generate().unwrap().write_new(&path).unwrap_err();
        assert!(matches!(error, NodeError::KeyExists { .. }));
        assert_eq!(SiteKey::read(&path).unwrap().0, key.0);
    }

    #[test]
    fn other_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        for text in
            ["", "tern site key 1\n", "tern site key 1\nabcd\n", "tern peer identity 1\n", "\u{0}\u{1}"]
        {
            std::fs::write(&path, text).unwrap();
            assert!(matches!(SiteKey::read(&path), Err(NodeError::BadKey { .. })), "{text:?}");
        }
    }

    #[test]
    fn an_identity_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("peer.key");
        let first = peer_identity(Some(&path)).unwrap().public();
        assert_eq!(peer_identity(Some(&path)).unwrap().public(), first);
    }
}
