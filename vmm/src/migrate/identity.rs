//! Who this host is, and whom it lets in: an Ed25519 key (RFC 8032) in a file of mode 0600, and a file of authorised keys.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer};

use super::MigrateError;
use super::limits;

/// The word that begins a line of an authorised-keys file.
const LINE_WORD: &str = "tern-ed25519";

/// A host's Ed25519 public key, which is its fingerprint too. Prints as 64 hex digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HostKey(pub [u8; 32]);

impl HostKey {
    /// Reads 64 hex digits.
    #[must_use]
    pub fn from_hex(digits: &str) -> Option<Self> {
        let mut key = [0; 32];
        hex::decode_to_slice(digits, &mut key).ok()?;
        Some(Self(key))
    }
}

impl fmt::Display for HostKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for HostKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A host's key, its self-signed certificate, and the file of the keys that it lets in.
pub struct HostIdentity {
    key: HostKey,
    secret: PrivatePkcs8KeyDer<'static>,
    certificate: CertificateDer<'static>,
    authorized_keys: PathBuf,
}

impl fmt::Debug for HostIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HostIdentity").field("key", &self.key).finish_non_exhaustive()
    }
}

impl HostIdentity {
    /// Reads the key in `key_file` (PKCS#8 PEM), making it first with mode 0600 if there is none. `authorized_keys` is read again
    /// at every connection; it need not exist.
    ///
    /// # Errors
    /// If the key cannot be read or made, or others than its owner may read it.
    pub fn load_or_create(key_file: &Path, authorized_keys: &Path) -> Result<Self, MigrateError> {
        let pem = match read_key_file(key_file)? {
            Some(pem) => pem,
            None => create_key_file(key_file)?,
        };
        let bad = |why: rcgen::Error| {
            let why = format!("not an Ed25519 key in PKCS#8 PEM ({why}); move it away and a new one is made");
            identity_error("read the host key", key_file, &why)
        };
        let pair = rcgen::KeyPair::from_pem_and_sign_algo(&pem, &rcgen::PKCS_ED25519).map_err(bad)?;
        let certificate = rcgen::CertificateParams::new(vec![super::tls::SERVER_NAME.to_owned()])
            .and_then(|params| params.self_signed(&pair))
            .map_err(bad)?;
        let key =
            pair.public_key_raw().try_into().map_err(|_| bad(rcgen::Error::UnsupportedSignatureAlgorithm))?;
        Ok(Self {
            key: HostKey(key),
            secret: PrivatePkcs8KeyDer::from(pair.serialize_der()),
            certificate: certificate.der().clone(),
            authorized_keys: authorized_keys.to_owned(),
        })
    }

    /// The public key.
    #[must_use]
    pub fn key(&self) -> HostKey {
        self.key
    }

    /// The public key, 64 hex digits.
    #[must_use]
    pub fn fingerprint(&self) -> String {
        self.key.to_string()
    }

    /// The line that another host puts into its authorised keys: `tern-ed25519 HEX64`.
    #[must_use]
    pub fn line(&self) -> String {
        format!("{LINE_WORD} {}", self.key)
    }

    /// The file of the keys that this host lets in.
    #[must_use]
    pub fn authorized_keys(&self) -> &Path {
        &self.authorized_keys
    }

    /// Whether `key` is among the authorised ones. Reads the file; one that does not exist authorises nobody.
    ///
    /// # Errors
    /// If the file cannot be read, is too long, or others than its owner may write it.
    pub fn authorizes(&self, key: HostKey) -> Result<bool, MigrateError> {
        let path = &self.authorized_keys;
        let failed = |why: &str| identity_error("read the authorised keys", path, why);
        let file = match File::open(path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(e) => return Err(failed(&e.to_string())),
        };
        let text = read_bounded(&file, limits::MAX_AUTHORIZED_KEYS_BYTES, 0o022).map_err(|e| match e {
            Unreadable::Io(e) => failed(&e.to_string()),
            Unreadable::Mode(mode) => failed(&format!("mode {mode:o} lets others write it; `chmod go-w` it")),
            Unreadable::TooLong => failed("longer than 1 MiB"),
        })?;
        Ok(keys_of(&text, path).any(|known| known == key))
    }

    pub(super) fn secret(&self) -> PrivatePkcs8KeyDer<'static> {
        self.secret.clone_key()
    }

    pub(super) fn certificate(&self) -> CertificateDer<'static> {
        self.certificate.clone()
    }
}

/// The keys of an authorised-keys file. A line that cannot be read is left out, with a warning: the others stand.
fn keys_of<'a>(text: &'a str, path: &'a Path) -> impl Iterator<Item = HostKey> + 'a {
    text.lines().zip(1u32..).filter_map(move |(line, number)| {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            return None;
        }
        let mut words = line.split_whitespace();
        let key = (words.next() == Some(LINE_WORD)).then(|| words.next().and_then(HostKey::from_hex)).flatten();
        if key.is_none() {
            tracing::warn!(path = %path.display(), line = number, "not `{LINE_WORD} HEX64 [comment]`: this line authorises nobody");
        }
        key
    })
}

fn identity_error(what: &'static str, path: &Path, why: &str) -> MigrateError {
    MigrateError::Identity { what, path: path.to_owned(), why: why.into() }
}

enum Unreadable {
    Io(io::Error),
    Mode(u32),
    TooLong,
}

fn read_bounded(file: &File, most: u64, forbidden: u32) -> Result<String, Unreadable> {
    let mode = file.metadata().map_err(Unreadable::Io)?.permissions().mode() & 0o777;
    if mode & forbidden != 0 {
        return Err(Unreadable::Mode(mode));
    }
    let mut text = String::new();
    file.take(most + 1).read_to_string(&mut text).map_err(Unreadable::Io)?;
    if text.len() as u64 > most { Err(Unreadable::TooLong) } else { Ok(text) }
}

fn read_key_file(path: &Path) -> Result<Option<String>, MigrateError> {
    let failed = |why: &str| identity_error("read the host key", path, why);
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(failed(&e.to_string())),
    };
    read_bounded(&file, limits::MAX_KEY_FILE_BYTES, 0o077).map(Some).map_err(|e| match e {
        Unreadable::Io(e) => failed(&e.to_string()),
        Unreadable::Mode(mode) => failed(&format!(
            "mode {mode:o} lets others use this host's key; `chmod 600` it, or move it away for a new key"
        )),
        Unreadable::TooLong => failed("too long for a key"),
    })
}

/// Makes a key. Two processes that start at the same time end up with the same one: the file appears whole or not at all.
fn create_key_file(path: &Path) -> Result<String, MigrateError> {
    let failed = |why: &dyn fmt::Display| identity_error("make the host key", path, &why.to_string());
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    DirBuilder::new().recursive(true).mode(0o700).create(folder).map_err(|e| failed(&e))?;
    let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).map_err(|e| failed(&e))?;
    let draft = path.with_extension(format!("draft-{}", std::process::id()));
    let written =
        write_new(&draft, pair.serialize_pem().as_bytes()).and_then(|()| match fs::hard_link(&draft, path) {
            // Another process was first: its key is the host's.
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            other => other,
        });
    let removed = fs::remove_file(&draft);
    written.and(removed).map_err(|e| failed(&e))?;
    read_key_file(path)?.ok_or_else(|| failed(&"it vanished again"))
}

fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity_in(folder: &Path) -> Result<HostIdentity, MigrateError> {
        HostIdentity::load_or_create(&folder.join("new/host.key"), &folder.join("authorized_keys"))
    }

    #[test]
    fn a_key_is_made_once_with_mode_0600_and_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let first = identity_in(folder.path()).unwrap();
        let mode = fs::metadata(folder.path().join("new/host.key")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(identity_in(folder.path()).unwrap().key(), first.key());
        assert_eq!(fs::read_dir(folder.path().join("new")).unwrap().count(), 1, "no draft is left");
        assert_eq!(first.line(), format!("tern-ed25519 {}", first.fingerprint()));
    }

    #[test]
    fn a_key_that_others_may_read_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        identity_in(folder.path()).unwrap();
        let path = folder.path().join("new/host.key");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
        let error = identity_in(folder.path()).unwrap_err().to_string();
        assert!(error.contains("640") && error.contains("chmod 600"), "{error}");
    }

    #[test]
    fn a_file_that_holds_no_key_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("new")).unwrap();
        write_new(&folder.path().join("new/host.key"), b"hello").unwrap();
        let error = identity_in(folder.path()).unwrap_err().to_string();
        assert!(error.contains("PKCS#8"), "{error}");
    }

    #[test]
    fn authorised_keys_are_read_again_each_time_and_bad_lines_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let host = identity_in(folder.path()).unwrap();
        let (a, b) = (HostKey([0xaa; 32]), HostKey([0xbb; 32]));
        let b_short = "bb".repeat(31);
        assert!(!host.authorizes(a).unwrap(), "no file authorises nobody");
        let path = folder.path().join("authorized_keys");
        fs::write(
            &path,
            format!("# friends\n\ntern-ed25519 {a} the a host\ntern-ed25519 {b_short}\nssh-rsa {b}\n{b}\n"),
        )
        .unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(host.authorizes(a).unwrap());
        assert!(!host.authorizes(b).unwrap());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o664)).unwrap();
        assert!(host.authorizes(a).unwrap_err().to_string().contains("go-w"));
    }
}
