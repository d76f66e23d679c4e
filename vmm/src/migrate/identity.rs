//! Who this host is, and whom it lets in.

use std::path::Path;

use super::MigrateError;

/// A host's Ed25519 key and the file of the keys that it lets in.
#[derive(Debug)]
pub struct HostIdentity {}

impl HostIdentity {
    /// Reads the key in `key_file` (PKCS#8 PEM), making it first with mode 0600 if there is none. `authorized_keys` is read again at every
    /// connection; it need not exist.
    ///
    /// # Errors
    /// If the key cannot be read or made, or others than its owner may read it.
    pub fn load_or_create(_key_file: &Path, _authorized_keys: &Path) -> Result<Self, MigrateError> {
        todo!()
    }

    /// The public key, 64 hex digits.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        todo!()
    }

    /// The line that another host puts into its authorised keys: `tern-ed25519 HEX64 COMMENT`.
    #[must_use]
    pub fn line(&self) -> String {
        todo!()
    }
}
