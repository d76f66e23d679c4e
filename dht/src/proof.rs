//! The proof of the site's key, spoken once on each connection after its TLS handshake and before anything else. Pure.
//!
//! TLS says which peer the other end is; this says that it belongs to the site. Each end sends
//!
//! ```text
//! HMAC-SHA256(connection key, "tern site proof 1" ‖ role:u8 ‖ session:32 ‖ dialer ‖ listener)       32 bytes
//! ```
//!
//! `role` is 1 from the dialer and 2 from the listener, so that a proof sent back is not one. `session` is exported from the TLS session
//! (RFC 8446, section 7.5, as RFC 9266 binds channels): it is fresh on both sides' randomness, so that a recorded proof is worth nothing elsewhere.
//! `dialer` and `listener` are the public keys that TLS has authenticated, so that nobody in the middle can pass a proof on.

use libp2p::{
    PeerId,
    identity::{PublicKey, ed25519},
};
use ring::hmac;
use thiserror::Error;

/// Bytes of a proof.
pub const PROOF_BYTES: usize = 32;
/// Bytes exported from the TLS session.
pub const SESSION_BYTES: usize = 32;
/// What TLS exports the session under (RFC 5705's label).
pub const SESSION_LABEL: &[u8] = b"EXPORTER-tern-site-session-1";

/// An Ed25519 public key in DER (RFC 8410, section 4) is this and the key's 32 bytes.
const ED25519_SPKI: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
const LABEL: &[u8] = b"tern site proof 1";

/// Why the other end is not a peer of this site.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum ProofError {
    /// The raw public key of the TLS handshake is not an Ed25519 key.
    #[error("the other end's identity is not an Ed25519 public key")]
    NotEd25519,
    /// The proof is not of this site's key, or not for this session, this direction and these two peers.
    #[error("it does not prove this site's key: it has a different site key")]
    WrongKey,
}

/// Which end of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// It dialled.
    Dialer,
    /// It listened.
    Listener,
}

impl End {
    /// The end opposite.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Dialer => Self::Listener,
            Self::Listener => Self::Dialer,
        }
    }

    fn to_wire(self) -> u8 {
        match self {
            Self::Dialer => 1,
            Self::Listener => 2,
        }
    }
}

/// The public key of one end, as TLS has authenticated it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EndKey(ed25519::PublicKey);

impl EndKey {
    /// Reads the raw public key of a handshake (RFC 7250): a DER `SubjectPublicKeyInfo`, Ed25519 alone.
    ///
    /// # Errors
    /// [`ProofError::NotEd25519`].
    pub fn from_spki(der: &[u8]) -> Result<Self, ProofError> {
        let key = der.strip_prefix(&ED25519_SPKI).filter(|key| key.len() == 32);
        key.and_then(|key| ed25519::PublicKey::try_from_bytes(key).ok())
            .map(Self)
            .ok_or(ProofError::NotEd25519)
    }

    /// The key in DER.
    #[must_use]
    pub fn to_spki(&self) -> Vec<u8> {
        [&ED25519_SPKI[..], &self.0.to_bytes()].concat()
    }

    /// The peer that it is the identity of.
    #[must_use]
    pub fn peer_id(&self) -> PeerId {
        PublicKey::from(self.0.clone()).to_peer_id()
    }
}

impl From<ed25519::PublicKey> for EndKey {
    fn from(key: ed25519::PublicKey) -> Self {
        Self(key)
    }
}

/// What both proofs of one connection speak of.
#[derive(Debug)]
pub struct Session<'a> {
    /// Exported from TLS under [`SESSION_LABEL`].
    pub exported: [u8; SESSION_BYTES],
    /// Who dialled.
    pub dialer: &'a EndKey,
    /// Who listened.
    pub listener: &'a EndKey,
}

impl Session<'_> {
    fn text(&self, from: End) -> Vec<u8> {
        let (dialer, listener) = (self.dialer.0.to_bytes(), self.listener.0.to_bytes());
        [LABEL, &[from.to_wire()], &self.exported, &dialer, &listener].concat()
    }

    /// The proof that `from` sends.
    #[must_use]
    pub fn prove(&self, key: &hmac::Key, from: End) -> [u8; PROOF_BYTES] {
        let mut proof = [0; PROOF_BYTES];
        proof.copy_from_slice(hmac::sign(key, &self.text(from)).as_ref());
        proof
    }

    /// Checks the proof that came from `from`, in constant time.
    ///
    /// # Errors
    /// [`ProofError::WrongKey`].
    pub fn check(&self, key: &hmac::Key, from: End, proof: &[u8]) -> Result<(), ProofError> {
        hmac::verify(key, &self.text(from), proof).map_err(|_| ProofError::WrongKey)
    }
}

#[cfg(test)]
mod tests {
    use libp2p::identity::ed25519::Keypair;
    use proptest::prelude::*;

    use super::*;

    fn end_key() -> EndKey {
        Keypair::generate().public().into()
    }

    fn key(byte: u8) -> hmac::Key {
        hmac::Key::new(hmac::HMAC_SHA256, &[byte; 32])
    }

    #[test]
    fn a_proof_holds_for_its_key_session_direction_and_peers_alone() {
        let (a, b, stranger) = (end_key(), end_key(), end_key());
        let session = Session { exported: [7; 32], dialer: &a, listener: &b };
        let proof = session.prove(&key(1), End::Dialer);
        assert_eq!(session.check(&key(1), End::Dialer, &proof), Ok(()));
        let wrong = Err(ProofError::WrongKey);
        assert_eq!(session.check(&key(2), End::Dialer, &proof), wrong, "another site's key");
        assert_eq!(session.check(&key(1), End::Listener, &proof), wrong, "reflected");
        assert_eq!(session.check(&key(1), End::Dialer, &proof[..31]), wrong, "truncated");
        assert_eq!(session.check(&key(1), End::Dialer, &[]), wrong);
        let replayed = Session { exported: [8; 32], ..session };
        assert_eq!(replayed.check(&key(1), End::Dialer, &proof), wrong, "replayed in another session");
        for (dialer, listener) in [(&a, &stranger), (&stranger, &b), (&b, &a)] {
            let relayed = Session { exported: [7; 32], dialer, listener };
            assert_eq!(relayed.check(&key(1), End::Dialer, &proof), wrong, "for another peer");
        }
    }

    #[test]
    fn a_key_survives_der_and_names_its_peer() {
        let pair = Keypair::generate();
        let key = EndKey::from(pair.public());
        assert_eq!(EndKey::from_spki(&key.to_spki()), Ok(key.clone()));
        assert_eq!(key.peer_id(), libp2p::identity::Keypair::from(pair).public().to_peer_id());
        let der = key.to_spki();
        for bad in [&der[..43], &[&der[..], &[0]].concat(), &der[12..], &[]] {
            assert_eq!(EndKey::from_spki(bad), Err(ProofError::NotEd25519));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_key_or_refused_without_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            let _ = EndKey::from_spki(&bytes).is_ok();
            let whole = [&ED25519_SPKI[..], &bytes].concat();
            if let Ok(key) = EndKey::from_spki(&whole) {
                prop_assert_eq!(key.to_spki(), whole);
            }
        }
    }
}
