//! TLS 1.3 (RFC 8446) with raw trust: the peer's certificate is only the wrapping of its Ed25519 key, and the key is looked up, as
//! SSH does it. Names, dates and issuers of certificates mean nothing here.
//!
//! There is no session resumption: a resumed session would not look at the authorised keys again.

use std::sync::{Arc, Mutex, PoisonError};

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, PeerIncompatible, SignatureScheme};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::MigrateError;
use super::identity::{HostIdentity, HostKey};

/// The name that certificates carry, because TLS wants one. Nobody looks at it.
pub const SERVER_NAME: &str = "tern";

/// The protocol's name in the handshake (RFC 7301): another version is another name.
pub const ALPN: &[u8] = b"tern/1";

/// Which key the peer must prove.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// This one: a ticket said so.
    Key(HostKey),
    /// Any of the authorised ones.
    Authorized,
}

/// Why a peer's key was refused.
#[derive(Clone, Debug)]
pub enum Refusal {
    /// It is not among the authorised keys.
    NotAuthorized(HostKey),
    /// It is not the ticket's.
    NotTheTickets {
        /// The key that the peer has.
        presented: HostKey,
        /// The ticket's key.
        expected: HostKey,
    },
    /// Its certificate holds no Ed25519 key.
    NoKey,
    /// The authorised keys could not be read.
    File(MigrateError),
}

/// Where a verifier leaves its reason: TLS itself can say no more than "access denied".
pub type RefusalSlot = Arc<Mutex<Option<Refusal>>>;

/// The Ed25519 key in a certificate.
#[must_use]
pub fn key_of(certificate: &CertificateDer<'_>) -> Option<HostKey> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let info = parsed.public_key();
    if info.algorithm.algorithm != x509_parser::oid_registry::OID_SIG_ED25519 {
        return None;
    }
    info.subject_public_key.data.as_ref().try_into().ok().map(HostKey)
}

/// Lets in peers by their keys, as a server's verifier and as a client's. Made anew for each connection.
#[derive(Debug)]
struct PeerVerifier {
    host: Arc<HostIdentity>,
    expect: Expect,
    provider: Arc<CryptoProvider>,
    refusal: RefusalSlot,
}

impl PeerVerifier {
    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), rustls::Error> {
        let verdict = match (key_of(certificate), self.expect) {
            (None, _) => Err(Refusal::NoKey),
            (Some(presented), Expect::Key(expected)) if presented == expected => Ok(()),
            (Some(presented), Expect::Key(expected)) => Err(Refusal::NotTheTickets { presented, expected }),
            (Some(presented), Expect::Authorized) => match self.host.authorizes(presented) {
                Ok(true) => Ok(()),
                Ok(false) => Err(Refusal::NotAuthorized(presented)),
                Err(error) => Err(Refusal::File(error)),
            },
        };
        verdict.map_err(|refusal| {
            *self.refusal.lock().unwrap_or_else(PoisonError::into_inner) = Some(refusal);
            CertificateError::ApplicationVerificationFailure.into()
        })
    }

    fn verify_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.provider.signature_verification_algorithms)
    }
}

fn no_tls12() -> rustls::Error {
    PeerIncompatible::Tls12NotOffered.into()
}

impl ServerCertVerifier for PeerVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(end_entity).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verify_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

impl ClientCertVerifier for PeerVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check(end_entity).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(no_tls12())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verify_signature(message, certificate, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }
}

fn verifier(host: &Arc<HostIdentity>, expect: Expect) -> (Arc<PeerVerifier>, RefusalSlot) {
    let refusal = RefusalSlot::default();
    let provider = Arc::new(ring::default_provider());
    let verifier = PeerVerifier { host: Arc::clone(host), expect, provider, refusal: Arc::clone(&refusal) };
    (Arc::new(verifier), refusal)
}

/// TLS for one connection that this host makes.
///
/// # Errors
/// If the TLS library refuses this host's own key.
pub fn client(
    host: &Arc<HostIdentity>,
    expect: Expect,
) -> Result<(QuicClientConfig, RefusalSlot), MigrateError> {
    let (verifier, refusal) = verifier(host, expect);
    let mut config = rustls::ClientConfig::builder_with_provider(Arc::clone(&verifier.provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(tls_error)?
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_client_auth_cert(vec![host.certificate()], PrivateKeyDer::Pkcs8(host.secret()))
        .map_err(tls_error)?;
    config.resumption = rustls::client::Resumption::disabled();
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok((QuicClientConfig::try_from(config).map_err(tls_error)?, refusal))
}

/// TLS for one connection that this host accepts.
///
/// # Errors
/// If the TLS library refuses this host's own key.
pub fn server(host: &Arc<HostIdentity>) -> Result<(QuicServerConfig, RefusalSlot), MigrateError> {
    let (verifier, refusal) = verifier(host, Expect::Authorized);
    let mut config = rustls::ServerConfig::builder_with_provider(Arc::clone(&verifier.provider))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(tls_error)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![host.certificate()], PrivateKeyDer::Pkcs8(host.secret()))
        .map_err(tls_error)?;
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.alpn_protocols = vec![ALPN.to_vec()];
    Ok((QuicServerConfig::try_from(config).map_err(tls_error)?, refusal))
}

fn tls_error(error: impl std::fmt::Display) -> MigrateError {
    MigrateError::Tls { why: error.to_string().into() }
}
